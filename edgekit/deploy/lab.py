"""Boards without hardware: arm64 Debian with a real sshd, and a phone with a real adbd, under
emulation on this machine.

A board is made once, in `edgekit/lab` of the cache folder, and starts in a second or two. Its key
and its host's key are the lab's own: `SshTransport` uses them for the addresses in `running`.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from edgekit.cache import default_root, write_atomically
from edgekit.errors import MissingToolError, TargetError, UsageError
from edgekit.observer import Observer

__all__ = [
    "BOARDS", "PHONE", "Board", "Keys", "Running", "down", "keys_for", "lab_root", "running", "up",
]  # fmt: skip

_SCRIPTS = Path(__file__).parent / "lab_scripts"
#: the board that has adbd in place of sshd, and no Python
PHONE = "android-phone"
_ROOT_BYTES, _VM_BYTES, _PHONE_BYTES = 700 << 20, 1500 << 20, 200 << 20  # of disk, with some room
_VM_MEMORY_MB = 768
_FIRST_PORT = 2240


@dataclass(frozen=True)
class Board:
    """What a board says of itself: the processor qemu plays, and the files it is known by."""

    id: str
    model: str
    cpu: str
    midr: str
    part: str
    revision: str
    features: str


#: features as the boards' own /proc/cpuinfo lists them
BOARDS = {
    one.id: one
    for one in (
        Board(
            "raspberry-pi-4", "Raspberry Pi 4 Model B Rev 1.4", "cortex-a72",
            "0x00000000410fd083", "0xd08", "3", "fp asimd evtstrm crc32 cpuid",
        ),
        Board(
            "raspberry-pi-5", "Raspberry Pi 5 Model B Rev 1.0", "cortex-a76",
            "0x00000000414fd0b1", "0xd0b", "1",
            "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm "
            "lrcpc dcpop asimddp",
        ),
        Board(
            PHONE, "EdgeKit Emulated Phone", "cortex-a76", "0x00000000413fd0b1", "0xd0b", "1",
            "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm "
            "lrcpc dcpop asimddp",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Running:
    """A board that is up. `virtual_time`: its clock counts instructions. The `port` of a phone is
    a number only: it has a network, and an address, of its own."""

    board: str
    pid: int
    port: int
    virtual_time: bool
    started: str

    @property
    def target(self) -> str:
        """What to give to `--to` and `--on`."""
        if self.board == PHONE:
            return f"adb:10.213.{self.port - _FIRST_PORT}.2:5555"
        return f"ssh://pi@127.0.0.1:{self.port}"

    @property
    def python(self) -> str | None:
        """The interpreter there that has the engines, None on a phone."""
        return None if self.board == PHONE else "/opt/edge/bin/python3"


@dataclass(frozen=True)
class Keys:
    """A private key that the lab's boards accept, and what they identify themselves by."""

    key: Path
    known_hosts: str


def lab_root() -> Path:
    """Where boards are kept."""
    return default_root() / "lab"


def up(
    board: str,
    *,
    virtual_time: bool = False,
    disk_mb: int = 1024,
    keep: Path | None = None,
    observer: Observer | None = None,
) -> Running:
    """Start a board, made first if it is the first one (half a minute, 450 MB).

    With `virtual_time` it is a machine of its own whose clock counts instructions. `keep` is a file
    for what such a machine writes to its disk, which outlives a power cut; otherwise boards start
    clean. `disk_mb` is the room on a board without virtual time.

    Raises:
        UsageError: no such board, or this machine cannot hold a lab.
        TargetError: it could not be made or does not start.
    """
    observer = observer or Observer()
    if board not in BOARDS:
        raise UsageError(f"no board {board!r} in the lab; known: {', '.join(sorted(BOARDS))}")
    _check_host()
    folder, chosen = lab_root(), BOARDS[board]
    with _locked(folder):
        if board == PHONE:
            if virtual_time or keep is not None:
                raise UsageError(f"{PHONE} is no virtual machine: without --virtual-time")
            return _phone_up(folder, chosen, disk_mb, observer)
        root, machine = folder / "board-arm64", folder / "vm-arm64"
        if not root.is_dir():
            _check_room(folder, _ROOT_BYTES)
            observer.phase("making the board (once; about half a minute)")
            _script("make_board.sh", root, folder / "keys", sys.executable)
        port = _free_port({one.port for one in running()})
        log = folder / "run" / f"{port}.log"
        log.parent.mkdir(exist_ok=True)
        whole = virtual_time or keep is not None
        if whole and not machine.is_dir():
            _check_room(folder, _VM_BYTES)
            observer.phase("making the virtual machine (once; some seconds)")
            _script("make_vm.sh", root, machine)
        observer.phase(f"starting {board}")
        if whole:
            pid = _script(
                "vm_up.sh", machine, port, chosen.cpu, _VM_MEMORY_MB, int(virtual_time),
                keep or "-", log,
            )  # fmt: skip
        else:
            facts = _facts(folder, chosen)
            pid = _script("board_up.sh", root, facts, port, chosen.cpu, board, disk_mb, log)
        return _noted(Running(board, int(pid), port, virtual_time, _started(int(pid))), log)


def _phone_up(folder: Path, chosen: Board, disk_mb: int, observer: Observer) -> Running:
    root = folder / "phone-arm64"
    if not root.is_dir():
        _check_room(folder, _PHONE_BYTES)
        observer.phase("making the phone (once; some seconds)")
        _script("make_phone.sh", root)
    port = _free_port({one.port for one in running()} | _phone_ports())
    log = folder / "run" / f"{port}.log"
    log.parent.mkdir(exist_ok=True)
    observer.phase(f"starting {PHONE}")
    facts = _facts(folder, chosen)
    number = port - _FIRST_PORT
    pid = _script("phone_up.sh", root, facts, number, chosen.cpu, disk_mb, log)
    return _noted(Running(PHONE, int(pid), port, False, _started(int(pid))), log)


def _phone_ports() -> set[int]:
    """Those of phones that are up, of other cache folders, too: each has a network of its name."""
    found = set()
    for path in Path("/run/netns").glob("edgekit-phone-*"):
        line = ["ip", "netns", "pids", path.name]
        if subprocess.run(line, capture_output=True, check=False).stdout.strip():
            found.add(_FIRST_PORT + int(path.name.rpartition("-")[2]))
    return found


def _facts(folder: Path, chosen: Board) -> Path:
    """The folder of the files a board is known by."""
    facts = folder / "facts" / chosen.id
    facts.mkdir(parents=True, exist_ok=True)
    _script(
        "facts.sh", facts, chosen.midr, chosen.part, chosen.revision, chosen.features, chosen.model
    )
    return facts


def _noted(one: Running, log: Path) -> Running:
    write_atomically(log.with_suffix(".json"), json.dumps(asdict(one)).encode())
    return one


def running() -> list[Running]:
    """The boards that are up, by port; what was said of those that are not is removed."""
    found = []
    for path in sorted((lab_root() / "run").glob("*.json")):
        with suppress(OSError, ValueError, TypeError):
            one = Running(**json.loads(path.read_text()))
            if one.started and _started(one.pid) == one.started:
                found.append(one)
            else:
                path.unlink()
    return found


def down(board: str | None = None) -> list[Running]:
    """Switch off the boards of this name or port, all of them without one; returns them.

    Raises:
        UsageError: none of that name is up.
    """
    off = [one for one in running() if board in (None, one.board, str(one.port))]
    if board is not None and not off:
        raise UsageError(f"no board {board!r} is up; edgekit lab list shows those that are")
    for one in off:
        with suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
        for _ in range(100):
            if _started(one.pid) != one.started:
                break
            time.sleep(0.05)
        (lab_root() / "run" / f"{one.port}.json").unlink(missing_ok=True)
        if one.board == PHONE:  # its network goes with it
            name = f"edgekit-phone-{one.port - _FIRST_PORT}"
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return off


def keys_for(host: str | None, port: int) -> Keys | None:
    """The lab's keys, if the address is that of a board that is up."""
    if host != "127.0.0.1" or not any(one.port == port for one in running()):
        return None
    folder = lab_root() / "keys"
    public = (folder / "host_ed25519.pub").read_text().split()
    return Keys(folder / "id_ed25519", f"[127.0.0.1]:{port} {public[0]} {public[1]}\n")


def _check_host() -> None:
    if platform.system() != "Linux":
        raise UsageError(f"the lab needs Linux (Debian or Ubuntu); this is {platform.system()}")
    if shutil.which("apt-get") is None:
        raise UsageError("the lab needs Debian or Ubuntu: there is no apt-get here")
    if os.geteuid() != 0:
        raise UsageError("the lab needs root (it mounts and starts boards); use sudo")
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if tried.returncode:
        raise UsageError(
            "the lab needs to mount, which this machine forbids; a container takes --privileged"
        )


def _check_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UsageError(
            f"{folder} has {free / 1e6:.0f} MB free, the lab needs {wanted / 1e6:.0f} MB; point "
            "EDGEKIT_CACHE at another disk"
        )


def _script(name: str, *arguments: object) -> str:
    """What the script prints. Its children keep its streams open: only its own end counts."""
    with (lab_root() / "run.log").open("w+") as said:
        done = subprocess.run(
            ["bash", str(_SCRIPTS / name), *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout.strip()
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    if done.returncode == 127:
        raise MissingToolError(f"the lab: {lines[-1] if lines else name}")
    raise TargetError(f"the lab: {name} failed: {lines[-1][:200] if lines else 'it says nothing'}")


def _free_port(taken: set[int]) -> int:
    for port in range(_FIRST_PORT, _FIRST_PORT + 200):
        if port in taken:
            continue
        with socket.socket() as one, suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", port))
            return port
    raise TargetError(f"no free port from {_FIRST_PORT} on")


def _started(pid: int) -> str:
    """When the process started, in ticks: what tells it from a later one of the same number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two commands do not make one board at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {folder}: {error.strerror}") from None
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
