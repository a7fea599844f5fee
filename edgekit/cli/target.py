"""The options that say how to reach a target, shared by the verbs that measure on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from edgekit.measure.target import Target

__all__ = ["TargetOptions"]


@Parameter(name="*")
@dataclass
class TargetOptions:
    """How to reach the target.

    Parameters
    ----------
    on
        Where to measure: local, ssh://user@host:port or adb:SERIAL.
    python
        The interpreter on the target that has numpy and an engine; python3 otherwise.
    root
        The folder of EdgeKit on the target; EDGEKIT_ROOT there, or ~/.local/share/edgekit
        otherwise.
    provision
        Bring numpy and engines to a target that has none: wheels are resolved here.
    accept_new_host_key
        Add the key of a host that is not known yet to known_hosts.
    """

    on: str = "local"
    python: str | None = None
    root: str | None = None
    provision: Annotated[bool, Parameter(negative="")] = False
    accept_new_host_key: Annotated[bool, Parameter(negative="")] = False

    def target(self) -> Target:
        """For `open_site`."""
        return Target(
            self.on, self.python, self.root, self.provision, self.accept_new_host_key
        )  # fmt: skip
