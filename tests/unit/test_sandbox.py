"""Children that crash, hang, eat memory or print: one clear error each, the parent healthy."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from edgekit import sandbox
from edgekit.errors import ChildError, InputError, MissingExtraError, require

HERE = "bad_children"
SOURCE = """
import ctypes, os, sys, time
from edgekit.errors import InputError
from edgekit.sandbox import report_progress
def add(a, b): print('noise on stdout'); return a + b
def crash(): ctypes.string_at(0)
def killed(): os.kill(os.getpid(), 9)
def leave(): print('last words', file=sys.stderr); os._exit(7)
def hang(): time.sleep(600)
def eat():
    held = []
    while True: held.append(bytearray(os.urandom(1 << 20) * 32)); time.sleep(0.01)
def ours(): raise InputError('wanted x')
def theirs(): raise ValueError('two\\nlines')
def steps():
    for i in range(3): report_progress(i + 1, 3)
    return 'done'
def orphan():
    import subprocess
    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    return os.getpid()
def litter():
    import tempfile
    handle, name = tempfile.mkstemp()
    return name
"""


@pytest.fixture(autouse=True)
def children(tmp_path, monkeypatch) -> None:
    (tmp_path / f"{HERE}.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_result_survives_prints() -> None:
    assert sandbox.call(f"{HERE}:add", {"a": 2, "b": 3}) == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("crash", "crashed with SIGSEGV"),
        ("killed", "as a system does when its memory runs out"),
        ("leave", r"ended with code 7 .*last words"),
        ("theirs", "ValueError: two lines"),
    ],
)
def test_failures_are_one_line(name, said) -> None:
    with pytest.raises(ChildError, match=said) as caught:
        sandbox.call(f"{HERE}:{name}", {}, what="converting")
    assert "\n" not in str(caught.value)
    assert "converting" in str(caught.value)


def test_our_errors_keep_their_type() -> None:
    with pytest.raises(InputError, match="^wanted x$"):
        sandbox.call(f"{HERE}:ours", {})


def test_time_limit() -> None:
    start = time.monotonic()
    with pytest.raises(ChildError, match="not done after 1 s"):
        sandbox.call(f"{HERE}:hang", {}, limits=sandbox.Limits(timeout_s=1))
    assert time.monotonic() - start < 30


def test_memory_limit() -> None:
    with pytest.raises(ChildError, match=r"used 0\.\d GB of memory, stopped at the limit of 0.3"):
        sandbox.call(f"{HERE}:eat", {}, limits=sandbox.Limits(memory_bytes=300 << 20))


def test_cancel_from_another_thread() -> None:
    event = threading.Event()
    threading.Timer(0.5, event.set).start()
    with pytest.raises(ChildError, match="stopped on request"):
        sandbox.call(f"{HERE}:hang", {}, limits=sandbox.Limits(cancel=event))


def test_progress_arrives_in_order() -> None:
    seen: list[tuple[int, int]] = []
    assert sandbox.call(f"{HERE}:steps", {}, progress=lambda *p: seen.append(p)) == "done"
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_grandchildren_go_with_the_child() -> None:
    pid = sandbox.call(f"{HERE}:orphan", {})
    deadline = time.monotonic() + 10
    while left := [p.pid for p in psutil.process_iter() if _group(p.pid) == pid]:
        if time.monotonic() > deadline or all(_is_zombie(p) for p in left):
            break
        time.sleep(0.05)
    assert all(_is_zombie(p) for p in left)


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_temporary_files_go_with_the_child() -> None:
    assert not Path(sandbox.call(f"{HERE}:litter", {})).parent.exists()


def test_child_dies_with_a_killed_parent(tmp_path) -> None:
    code = textwrap.dedent(f"""
        import threading, time, psutil, os
        from edgekit import sandbox
        threading.Thread(target=lambda: sandbox.call("{HERE}:hang", {{}}), daemon=True).start()
        while not psutil.Process().children(): time.sleep(0.05)
        time.sleep(1)
        print(psutil.Process().children()[0].pid, flush=True)
        os.kill(os.getpid(), 9)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    child = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_require_tells_missing_from_broken(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match=r"pip install -c constraints.txt -e '\.\[onnx\]'"):
        require("edgekit_no_such_library", extra="onnx")
    (tmp_path / "half_installed.py").write_text("import edgekit_no_such_library")
    with pytest.raises(Exception, match="installed but broken: it needs edgekit_no_such_library"):
        require("half_installed", extra="onnx")
