"""Runs one function in a child process with a time and a memory limit.

Everything that touches an untrusted file or a heavy framework goes through `call`: a crash, a
hang or an allocation without end over there is one clear error here. Arguments and results are
JSON; big data travels as files. The child's own output goes to a log, its last words into the
error.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from edgekit.errors import ChildError, EdgeKitError, by_name, one_line

__all__ = ["Limits", "call", "child_environment", "report_progress", "until_interrupt"]

Progress = Callable[[int, int], None]


class Limits:
    """Limits of a child: wall-clock seconds, resident bytes of its process tree, and an event
    that stops it when set."""

    def __init__(
        self,
        timeout_s: float = 900.0,
        memory_bytes: int | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes if memory_bytes is not None else _most_of_memory()
        self.cancel = cancel or threading.Event()


def call(
    target: str,
    arguments: dict[str, Any],
    *,
    limits: Limits | None = None,
    progress: Progress | None = None,
    what: str = "",
) -> Any:
    """Run `module:function(**arguments)` in a fresh process and return its (JSON) result.

    `progress(done, total)` is called from a thread when the child reports. `what` names the work
    in errors ("reading model.onnx").

    Raises:
        ChildError: it crashed, ran over `limits`, or raised something it should not.
        EdgeKitError: the very error the function raised, if it was one of ours.
    """
    limits = limits or Limits()
    what = what or target
    with tempfile.TemporaryFile() as log, _child(target, log) as process:
        reply = _Reply(process, progress)
        _send(process, {"target": target, "arguments": arguments})
        over = _supervise(process, limits, what)
        if over:
            raise ChildError(over)
        reply.join()
        return _result(reply.final, process.returncode, log, what)


def report_progress(done: int, total: int) -> None:
    """Called in the child: how far it is. Ignored when not in one."""
    if _channel is not None:
        _channel.write(json.dumps({"progress": [done, total]}) + "\n")
        _channel.flush()


def child_environment() -> dict[str, str]:
    """The environment of children: quiet frameworks, and none of them phones home."""
    quiet = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",  # its results vary with the CPU's features
        "TF_USE_LEGACY_KERAS": "1",  # onnx2tf builds with Keras 2
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "-1"),
        "NNCF_CI": "1",  # switches NNCF's telemetry off
        "PYTHONUNBUFFERED": "1",
        # On a busy machine its threads wait for each other ten times as long as they compute.
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"),
    }
    return {**os.environ, **quiet}


class _Reply:
    """Reads the child's lines: progress as it comes, the final answer kept."""

    def __init__(self, process: subprocess.Popen[bytes], progress: Progress | None) -> None:
        self.final: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._read, args=(process, progress), daemon=True)
        self._thread.start()

    def _read(self, process: subprocess.Popen[bytes], progress: Progress | None) -> None:
        assert process.stdout is not None  # noqa: S101  (for the type checker)
        for line in process.stdout:
            with suppress(ValueError):
                message = json.loads(line)
                if "progress" not in message:
                    self.final = message
                elif progress is not None:
                    progress(*message["progress"])

    def join(self) -> None:
        self._thread.join(timeout=10)


@contextmanager
def _child(target: str, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a process group of its own, gone when the block ends, whatever happens."""
    # Its temporary files go with it: killed, or done and not asked to tidy up, it leaves them.
    with tempfile.TemporaryDirectory(prefix="edgekit-", ignore_cleanup_errors=True) as scratch:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "edgekit.sandbox", target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**child_environment(), "TMPDIR": scratch},
            start_new_session=True,  # Ctrl-C is for the parent; it ends its children itself
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()


def _send(process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    assert process.stdin is not None  # noqa: S101  (for the type checker)
    with suppress(BrokenPipeError):  # it died at once: its last words say why
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()


def _supervise(process: subprocess.Popen[bytes], limits: Limits, what: str) -> str | None:
    """Wait for the end; returns what limit was broken, if one was."""
    deadline = time.monotonic() + limits.timeout_s
    pause = 0.005
    while process.poll() is None:
        if limits.cancel.is_set():
            return f"{what}: stopped on request"
        if time.monotonic() > deadline:
            return f"{what}: not done after {limits.timeout_s:.0f} s, stopped"
        used = _tree_rss_bytes(process.pid)
        if used > limits.memory_bytes:
            return (
                f"{what}: used {used / 1e9:.1f} GB of memory, stopped at the limit of "
                f"{limits.memory_bytes / 1e9:.1f} GB"
            )
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    return None


def _result(final: dict[str, Any] | None, code: int, log: IO[bytes], what: str) -> Any:
    if final is not None and "result" in final:
        return final["result"]
    if final is not None and "error" in final:
        raise by_name(final["kind"], final["error"])
    if final is not None:
        raise ChildError(f"{what}: {final['crash']}")
    words = _last_words(log)
    if code == -signal.SIGKILL:  # not by `_supervise`, which answers for itself
        raise ChildError(f"{what}: killed, as a system does when its memory runs out (SIGKILL)")
    if code < 0:
        with suppress(ValueError):
            name = signal.Signals(-code).name
            raise ChildError(f"{what}: crashed with {name}{words}")
    raise ChildError(f"{what}: ended with code {code} and no answer{words}")


def _last_words(log: IO[bytes]) -> str:
    end = log.seek(0, os.SEEK_END)
    log.seek(max(0, end - 2000))
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return f" ({lines[-1].strip()[:200]})" if lines else ""


def _tree_rss_bytes(pid: int) -> int:
    import psutil

    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _most_of_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total * 0.8)


# --- the child's side ---------------------------------------------------------------------------

_channel: IO[str] | None = None


def _die_with_parent() -> None:
    """On Linux: killed when the parent goes, and first in line when memory runs out."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1  # <sys/prctl.h>
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("1000")


def _main() -> None:
    """Read one request from stdin, answer on what was stdout; all other output is the log."""
    global _channel  # noqa: PLW0603  (one child, one channel)
    _die_with_parent()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a framework that prints must not break the protocol
    request = json.loads(sys.stdin.buffer.read())
    # This file runs as __main__; the functions called import it under its name.
    sys.modules["edgekit.sandbox"] = sys.modules["__main__"]
    _channel = channel
    answer: dict[str, Any]
    try:
        module, _, name = request["target"].partition(":")
        function = getattr(importlib.import_module(module), name)
        answer = {"result": function(**request["arguments"])}
    except EdgeKitError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    except MemoryError:
        answer = {"crash": "ran out of memory"}
    except SystemExit as error:
        answer = {"crash": f"its code ended the process: sys.exit({error.code})"}
    except Exception as error:
        import traceback

        traceback.print_exc()
        answer = {"crash": f"{type(error).__name__}: {one_line(error)}"}
    channel.write(json.dumps(answer) + "\n")
    channel.flush()
    # Frameworks' destructors crash now and then; the answer is out, so leave without them.
    os._exit(0)


if __name__ == "__main__":
    _main()


@contextmanager
def until_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that the best so far is returned; the second stops."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        with suppress(OSError):  # not print: it may be what was interrupted
            os.write(2, b"stopping: choosing from what is known (again to stop at once)\n")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
