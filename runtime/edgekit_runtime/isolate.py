"""The engine in a process of its own: what crashes or hangs there is an error here.

The child loads the model and answers over a socket pair; arrays are in memory that both share. To
a session it is an engine like any other.

Messages are a 4-byte little-endian length and JSON; `files` and outputs whose shapes vary follow
as raw bytes.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from typing import IO, Any, Deque, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from . import errors
from .engines import Binding, Loaded, Options, Shapes, load_engine
from .errors import ClosedError, EdgeKitError, EngineCrashed, EngineError, ModelError, one_line
from .manifest import TensorSpec
from .placement import Placement

__all__ = ["load_isolated", "main"]

_LENGTH = struct.Struct("<I")
_ALIGNMENT = 4096  # mmap offsets are pages; also more than any engine asks of a buffer
#: `-c` searches the working folder first, where anybody may have put a json.py
_START = (
    "import sys; sys.path[:] = sys.argv[1].split(chr(10)); sys.dont_write_bytecode = True\n"
    "from edgekit_runtime.isolate import main; main(*map(int, sys.argv[2:]))"
)
_LOAD_TIMEOUT_S = 60.0  # importing an engine takes its time, whatever a call may take
_LONGEST_POLL_MS = 86_400_000
Layout = List[Tuple[str, List[int], int]]  # dtype, shape, offset in the shared memory


def load_isolated(
    name: str, files: Mapping[str, bytes], options: Options, *, timeout_s: float
) -> Loaded:
    """As `load_engine`, in a child process.

    Raises:
        EngineCrashed: the engine died or did not answer within `timeout_s`.
        EdgeKitError: what `load_engine` raises.
    """
    if os.name != "posix":
        raise EngineError("isolate=True needs Linux, Android or macOS")
    child = _Child(timeout_s)
    try:
        reply = child.ask(
            {
                "do": "load",
                "engine": name,
                "options": dataclasses.asdict(options),
                "files": [[path, len(data)] for path, data in files.items()],
            },
            *files.values(),
        )
        return _Remote(child, reply)
    except BaseException:
        child.close()
        raise


class _Child:
    """The process, the socket and the shared memory. One question at a time."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._lock = timeout_s, threading.Lock()
        self._owner = os.getpid()
        self.loaded: object = None
        #: bindings that nobody has any more; the child is told before the next question
        self.dropped: Deque[int] = deque()
        self.memory = _shared_memory()
        root = str(Path(__file__).parents[1])  # the folder, or the .pyz, that we come from
        paths = "\n".join([root, *(path for path in sys.path if path and path != root)])
        ours, theirs = socket.socketpair()
        self._pipe = ours
        with theirs:
            command = [sys.executable, "-c", _START, paths]
            self._process = subprocess.Popen(
                [*command, str(self.memory), str(theirs.fileno()), str(self._owner)],
                stdin=subprocess.DEVNULL,
                stdout=2 if _is_open(2) else subprocess.DEVNULL,
                pass_fds=(self.memory, theirs.fileno()),
                start_new_session=True,  # Ctrl-C is for the host, which may handle it
            )

    def ask(self, question: Dict[str, Any], *data: bytes) -> Dict[str, Any]:
        """Send one message and read the answer.

        Raises:
            EngineCrashed: the child died, or did not answer in time and was killed.
            EdgeKitError: what the child raised.
        """
        if os.getpid() != self._owner:
            raise ClosedError("the engine's process belongs to the one this was forked from")
        with self._lock:
            if self.memory < 0:
                raise self._crashed("is gone")
            limit_s = self._timeout_s
            if question["do"] == "load":
                limit_s = max(limit_s, _LOAD_TIMEOUT_S)
            try:
                while self.dropped:
                    self._exchange({"do": "unbind", "id": self.dropped.popleft()}, (), limit_s)
                reply = self._exchange(question, data, limit_s)
            except (OSError, EOFError, ValueError):
                raise self._crashed(self._how()) from None
            except EngineCrashed:
                raise
            except BaseException:  # Ctrl-C: the answer to come would be taken for the next one's
                self._crashed("was interrupted")
                raise
        if "error" in reply:
            kind = getattr(errors, str(reply["kind"]), EngineError)
            raise kind(reply["error"])
        return reply

    def _exchange(
        self, question: Dict[str, Any], data: Sequence[bytes], limit_s: float
    ) -> Dict[str, Any]:
        deadline = time.monotonic() + limit_s
        text = json.dumps(question).encode()
        for piece in (_LENGTH.pack(len(text)) + text, *data):
            self._send(piece, deadline)
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        reply: Dict[str, Any] = json.loads(self._read(length, deadline))
        reply["data"] = [self._read(size, deadline) for size in reply.get("sizes", ())]
        return reply

    def close(self) -> None:
        """End the child and wait for it."""
        if os.getpid() != self._owner:
            return
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._pipe.close()
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1

    def _read(self, count: int, deadline: float) -> bytes:
        pieces, left = [], count
        while left:
            self._await(select.POLLIN, deadline)
            piece = self._pipe.recv(min(left, 1 << 20))
            if not piece:
                raise EOFError
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._await(select.POLLOUT, deadline)
            # Not a signal when the child is dead: a host may have SIGPIPE end it.
            view = view[self._pipe.send(view[: 1 << 16], getattr(socket, "MSG_NOSIGNAL", 0)) :]

    def _await(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._pipe, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(min(left * 1000, _LONGEST_POLL_MS)):
            raise self._crashed(f"did not answer within {self._timeout_s:g} s and was stopped")

    def _how(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "does not answer"
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"died of {signal.Signals(-code).name}"
        except ValueError:
            return f"died of signal {-code}"

    def _crashed(self, how: str) -> EngineCrashed:
        self.close()
        crash = EngineCrashed(f"the engine's process {how}")
        crash.loaded = self.loaded
        return crash


class _Remote(Loaded):
    def __init__(self, child: _Child, reply: Dict[str, Any]) -> None:
        self._child = child
        child.loaded = self
        self.version, self.stateful = str(reply["version"]), bool(reply["stateful"])
        self.max_bindings = int(reply["max_bindings"])
        self.inputs = tuple(_spec(one) for one in reply["inputs"])
        self.outputs = tuple(_spec(one) for one in reply["outputs"])

    def bind(self, shapes: Shapes) -> Binding:
        reply = self._child.ask(
            {"do": "bind", "shapes": [list(map(int, shape)) for shape in shapes]}
        )
        return _RemoteBinding(self._child, reply)

    def placement(self, *, operators: bool = True) -> Placement:
        question = {"do": "placement", "operators": operators, "usual": self.usual_shapes}
        found = self._child.ask(question)["placement"]
        return Placement(**found)

    def retire(self) -> None:
        self._child.close()  # at once: there is no use in asking it to let go of its buffers

    def close(self) -> None:
        self._child.close()


class _RemoteBinding(Binding):
    def __init__(self, child: _Child, reply: Dict[str, Any]) -> None:
        self._child, self._id = child, int(reply["id"])
        self._release = weakref.finalize(self, child.dropped.append, self._id)
        memory = mmap.mmap(child.memory, reply["length"], offset=reply["offset"])
        self.inputs = _arrays(memory, reply["inputs"])
        self.fixed_outputs = reply["outputs"] is not None
        self.fresh_outputs = not self.fixed_outputs
        self.outputs = _arrays(memory, reply["outputs"] or [])
        self.invoke = self._run

    def _run(self) -> None:
        reply = self._child.ask({"do": "invoke", "id": self._id})
        if "arrays" in reply:
            self.fixed_outputs, self.fresh_outputs = False, True
            # bytearray: the arrays are the caller's, to be written, too
            self.outputs = tuple(
                np.frombuffer(bytearray(data), np.dtype(kind)).reshape(shape)
                for (kind, shape), data in zip(reply["arrays"], reply["data"])
            )

    def reset(self) -> None:
        self._child.ask({"do": "reset", "id": self._id})

    def close(self) -> None:
        super().close()
        self._release()


def _spec(raw: Dict[str, Any]) -> TensorSpec:
    return TensorSpec(str(raw["name"]), str(raw["dtype"]), tuple(raw["shape"]))


def _arrays(memory: mmap.mmap, layout: Layout) -> Tuple[np.ndarray, ...]:
    return tuple(
        np.ndarray(tuple(shape), np.dtype(kind), buffer=memory, offset=offset)
        for kind, shape, offset in layout
    )


# --- the child ------------------------------------------------------------------------------------


def _shared_memory() -> int:
    """A descriptor of memory without a name, above those of the standard streams."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("edgekit")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    low = []
    while memory < 3:  # a daemon's host has closed those; the child opens them again
        low.append(memory)
        memory = os.dup(memory)
    for one in low:
        os.close(one)
    return memory


def _is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True


def main(memory: int, pipe: int, parent: int) -> None:
    """Answer questions until there are no more."""
    requests, answers = os.fdopen(os.dup(pipe), "rb"), os.fdopen(pipe, "wb")
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    served = _Served(memory)
    while True:
        head = requests.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return
        question = json.loads(requests.read(_LENGTH.unpack(head)[0]))
        data: List[bytes] = []
        try:
            reply = served.answer(question, requests, data)
        except EdgeKitError as error:
            reply, data = {"error": str(error), "kind": type(error).__name__}, []
        except Exception as error:  # the parent's own layers say what failed
            reply, data = {"error": one_line(error), "kind": "EngineError"}, []
        text = json.dumps({**reply, "sizes": [len(one) for one in data]}).encode()
        answers.write(_LENGTH.pack(len(text)) + text)
        for one in data:
            answers.write(one)
        answers.flush()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


class _Served:
    def __init__(self, memory: int) -> None:
        self._memory, self._size, self._count = memory, 0, 0
        self._bound: Dict[int, Tuple[Binding, Tuple[np.ndarray, ...], Tuple[np.ndarray, ...]]] = {}
        self._places: Dict[int, Tuple[int, int]] = {}  # binding -> offset and length
        self._free: List[Tuple[int, int]] = []

    def answer(
        self, question: Dict[str, Any], source: IO[bytes], data: List[bytes]
    ) -> Dict[str, Any]:
        """What to reply; raw bytes are put into `data`."""
        kind = question["do"]
        if kind == "load":
            files = {name: source.read(size) for name, size in question["files"]}
            self._loaded = load_engine(question["engine"], files, Options(**question["options"]))
            specs = {
                which: [dataclasses.asdict(spec) for spec in getattr(self._loaded, which)]
                for which in ("inputs", "outputs")
            }
            if any(one["dtype"] == "string" for both in specs.values() for one in both):
                raise ModelError("strings cannot be shared with a process; load it without isolate")
            facts = {
                one: getattr(self._loaded, one) for one in ("version", "stateful", "max_bindings")
            }
            return {**specs, **{one: getattr(self._loaded, one) for one in facts}}
        if kind == "bind":
            return self._bind(tuple(tuple(shape) for shape in question["shapes"]))
        if kind == "placement":
            usual = question["usual"]
            self._loaded.usual_shapes = usual and tuple(tuple(shape) for shape in usual)
            found = self._loaded.placement(operators=question["operators"])
            return {"placement": dataclasses.asdict(found)}
        binding, inputs, outputs = self._bound[question["id"]]
        if kind == "invoke":
            return self._invoke(binding, inputs, outputs, data)
        if kind == "reset":
            binding.reset()
        elif kind == "unbind":
            del self._bound[question["id"]]
            self._give_back(*self._places.pop(question["id"]))
            binding.close()
        return {}

    def _bind(self, shapes: Shapes) -> Dict[str, Any]:
        binding = self._loaded.bind(shapes)
        fixed = binding.fixed_outputs
        arrays = [*binding.inputs, *(binding.outputs if fixed else ())]
        layout: Layout = []
        end = 0
        for array in arrays:
            layout.append((array.dtype.str, list(array.shape), end))
            end += -(-array.nbytes // 64) * 64
        length = max(1, -(-end // _ALIGNMENT)) * _ALIGNMENT
        offset = self._place(length)
        shared = _arrays(mmap.mmap(self._memory, length, offset=offset), layout)
        count = len(binding.inputs)
        self._count += 1
        self._bound[self._count] = (binding, shared[:count], shared[count:])
        self._places[self._count] = (offset, length)
        return {
            "id": self._count, "offset": offset, "length": length, "inputs": layout[:count],
            "outputs": layout[count:] if fixed else None,
        }  # fmt: skip

    def _give_back(self, offset: int, length: int) -> None:
        """Neighbours become one piece: lengths that grow and grow find room again."""
        merged: List[Tuple[int, int]] = []
        for start, size in sorted([*self._free, (offset, length)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self._free = merged

    def _place(self, length: int) -> int:
        """The offset of a piece of the shared memory: one that was given back, or a new one."""
        fitting = [(free, offset) for offset, free in self._free if free >= length]
        if fitting:
            free, offset = min(fitting)
            self._free.remove((offset, free))
            if free > length:
                self._free.append((offset + length, free - length))
            return offset
        offset, self._size = self._size, self._size + length
        os.ftruncate(self._memory, self._size)
        return offset

    def _invoke(
        self, binding: Binding, inputs: Tuple[np.ndarray, ...], outputs: Tuple[np.ndarray, ...],
        data: List[bytes],
    ) -> Dict[str, Any]:  # fmt: skip
        for buffer, array in zip(binding.inputs, inputs):
            buffer[...] = array
        try:
            binding.invoke()
        except Exception as error:
            binding.retry(error)
        if outputs and binding.fixed_outputs:
            for array, found in zip(outputs, binding.outputs):
                array[...] = found
            return {}
        data += [np.ascontiguousarray(one).tobytes() for one in binding.outputs]
        return {"arrays": [(one.dtype.str, list(one.shape)) for one in binding.outputs]}
