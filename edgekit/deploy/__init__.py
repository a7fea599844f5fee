"""Reaching devices: transports."""

from __future__ import annotations

from edgekit.deploy.transport import Completed, Conversation, Transport, connect

__all__ = ["Completed", "Conversation", "Transport", "connect"]
