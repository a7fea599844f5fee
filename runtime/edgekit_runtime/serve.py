"""`serve-stdin`: requests on standard input, answers on standard output, from any language.

Each message, both ways, is a 4-byte little-endian length, a JSON object of that length, and the
bytes of its arrays, one after the other in the order in which the object names them: C order,
little-endian. The first message comes from the server and says what the model takes and gives.

    <- {"schema": "edgekit.serve/1", "model": {"inputs": [{"name", "dtype", "shape"}], ...}}
    -> {"id": 1, "inputs": {"x": {"dtype": "float32", "shape": [1, 4]}}}  + 16 bytes
    <- {"id": 1, "outputs": {"y": {"dtype": "float32", "shape": [1, 3]}}, "ns": {...}}  + 12 bytes
    -> {"id": 2, "raw": {"x": {"size": 51234}}}                            + the file's bytes
    <- {"id": 2, "answer": {"y": [{"index": 3, "label": "cat", "score": 0.98}]}, "ns": {...}}
    <- {"id": 3, "error": "input 'x' has ...", "kind": "InputError"}

`raw` goes through the bundle's pre- and postprocessing; arrays in its answer are JSON lists. An
error ends nothing but its request, except one in the framing itself, after which no request can
be found. End of input ends the server.
"""

from __future__ import annotations

import json
import math
import struct
from typing import IO, Any, Dict, List, Tuple

import numpy as np

from .errors import EdgeKitError, InputError, UsageError, one_line
from .session import Session

__all__ = ["MAX_REQUEST_BYTES", "plain", "serve"]

MAX_REQUEST_BYTES = 1 << 30
_LENGTH = struct.Struct("<I")
_MAX_JSON_BYTES = 1 << 20


def serve(session: Session, source: IO[bytes], target: IO[bytes]) -> int:
    """Answer until the end of input; returns the exit code (2 after a framing error)."""
    _send(target, {"schema": "edgekit.serve/1", "model": _specs(session)}, [])
    while True:
        head = source.read(_LENGTH.size)
        if not head:
            return 0
        try:
            request, data = _request(head, source)
        except UsageError as error:
            _send(target, {"id": None, "error": str(error), "kind": "UsageError"}, [])
            return error.exit_code
        arrays: List[np.ndarray] = []
        try:
            answer = _answer(session, request, data, arrays)
        except EdgeKitError as error:
            answer, arrays = {"error": str(error), "kind": type(error).__name__}, []
        _send(target, {"id": request.get("id"), **answer}, arrays)


def plain(value: Any) -> Any:
    """As JSON can say it: arrays as lists, NaN and infinities as null."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _specs(session: Session) -> Dict[str, Any]:
    return {
        kind: [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs]
        for kind, specs in (("inputs", session.inputs), ("outputs", session.outputs))
    }


def _request(head: bytes, source: IO[bytes]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """One message: the object, and the bytes or arrays by name."""
    size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
    if not 2 <= size <= _MAX_JSON_BYTES:
        raise UsageError(f"a message begins with the length {size}; wanted 2 to {_MAX_JSON_BYTES}")
    try:
        request = json.loads(_exactly(source, size))
        if not isinstance(request, dict):
            raise UsageError("a message is not a JSON object")
        total = 0
        data: Dict[str, Any] = {}
        shape: Tuple[int, ...]
        for name, one in {**request.get("inputs", {}), **request.get("raw", {})}.items():
            if not isinstance(one, dict) or not ("size" in one or {"dtype", "shape"} <= set(one)):
                raise UsageError(
                    f"{name!r} is {json.dumps(one)[:60]}; wanted dtype and shape for an array, "
                    "size for the bytes of a file"
                )
            if "size" in one:
                count, dtype, shape = int(one["size"]), None, ()
            else:
                dtype, shape = _dtype(one["dtype"]), tuple(int(d) for d in one["shape"])
                count = dtype.itemsize * math.prod(shape)
            if count < 0 or min((0, *shape)) < 0 or total + count > MAX_REQUEST_BYTES:
                raise UsageError(f"{name!r} would have {count} bytes; at most {MAX_REQUEST_BYTES}")
            total += count
            held = _exactly(source, count)
            data[name] = held if dtype is None else np.frombuffer(held, dtype).reshape(shape)
    except UsageError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError,
            RecursionError) as error:  # fmt: skip
        raise UsageError(f"a message cannot be read: {one_line(error)}") from None
    return request, data


def _dtype(name: Any) -> Any:
    dtype = np.dtype(name)
    if dtype.kind not in "fiub":
        raise UsageError(f"the dtype {name!r} cannot be sent; wanted a number's")
    return dtype


def _exactly(source: IO[bytes], count: int) -> bytes:
    pieces = []
    while count:
        piece = source.read(min(count, 1 << 20))
        if not piece:
            raise UsageError("the input ends inside a message")
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _answer(
    session: Session, request: Dict[str, Any], data: Dict[str, Any], arrays: List[np.ndarray]
) -> Dict[str, Any]:
    if ("inputs" in request) == ("raw" in request):
        raise InputError("a request has either inputs or raw")
    with session.measure(capacity=1, energy_j=lambda: 0.0) as taken:
        if "raw" in request:
            found: Dict[str, Any] = {"answer": plain(session.predict(data))}
        else:
            outputs = session.run(data)
            if any(array.dtype.kind not in "fiub" for array in outputs.values()):
                raise InputError("the model gives strings, which cannot be sent as arrays: use raw")
            arrays += outputs.values()
            shown = {n: {"dtype": a.dtype.name, "shape": a.shape} for n, a in outputs.items()}
            found = {"outputs": shown}
    pre_ns, infer_ns, post_ns = taken.samples[0]
    return {**found, "ns": {"pre": pre_ns, "infer": infer_ns, "post": post_ns}}


def _send(target: IO[bytes], value: Dict[str, Any], arrays: List[np.ndarray]) -> None:
    text = json.dumps(value).encode()
    target.write(_LENGTH.pack(len(text)) + text)
    for array in arrays:
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        target.write(np.ascontiguousarray(little).tobytes())
    target.flush()
