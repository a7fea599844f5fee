"""Reads and writes TFLite files as the objects of LiteRT's schema.

Big constants may lie behind the flatbuffer, at an offset from the beginning of the file: the
schema's own reader leaves them there, and what its writer makes of that model points into nothing.
"""

from __future__ import annotations

from typing import Any

from edgekit.errors import ModelError, require

__all__ = ["read_tflite", "write_tflite"]

_MAGIC = b"TFL3"


def read_tflite(content: bytes, *, extra: str = "litert") -> Any:
    """The `ModelT` of a file, every buffer in it. `extra` names what to install if need be.

    Raises:
        ModelError: a buffer lies outside the file. The schema's reader raises anything for what is
            no flatbuffer.
    """
    schema = require("ai_edge_litert.schema_py_generated", extra=extra)
    np = require("numpy", extra=extra)
    model = schema.ModelT.InitFromPackedBuf(bytearray(content))

    def taken(offset: int, size: int) -> Any:
        if offset + size > len(content):
            raise ModelError(
                f"damaged: a constant at bytes {offset} to {offset + size} of a file of "
                f"{len(content)}"
            )
        return np.frombuffer(content, np.uint8, size, offset)

    for buffer in model.buffers or ():
        if buffer.offset > 1:
            buffer.data = taken(buffer.offset, buffer.size)
            buffer.offset = buffer.size = 0
    for graph in model.subgraphs or ():
        for operator in graph.operators or ():
            if operator.largeCustomOptionsOffset > 1:
                operator.customOptions = taken(
                    operator.largeCustomOptionsOffset, operator.largeCustomOptionsSize
                )
                operator.largeCustomOptionsOffset = operator.largeCustomOptionsSize = 0
    return model


def write_tflite(model: Any, *, extra: str = "litert") -> bytes:
    """The file of a `ModelT`."""
    builder = require("flatbuffers", extra=extra).Builder(1 << 20)
    builder.Finish(model.Pack(builder), _MAGIC)
    return bytes(builder.Output())
