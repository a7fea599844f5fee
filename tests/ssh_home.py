"""An ssh server in a process of its own, and a link to it that can be cut."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

SERVER = str(Path(__file__).with_name("ssh_server.py"))


class Server:
    """A server process, a home with a key that it accepts, and a known_hosts with its key."""

    def __init__(self, home: Path) -> None:
        import asyncssh

        self.ssh = home / ".ssh"
        self.ssh.mkdir(mode=0o700)
        host_key = asyncssh.generate_private_key("ssh-ed25519")
        host_key.write_private_key(str(self.ssh / "host_key"))
        (self.ssh / "authorized_keys").write_bytes(self.new_key().export_public_key())
        self.process = subprocess.Popen(
            [sys.executable, SERVER, str(self.ssh)], stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.known_hosts = self.ssh / "known_hosts"
        key = host_key.export_public_key().decode().strip()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {key}\n")
        self.target = f"ssh://somebody@127.0.0.1:{self.port}"

    def knows(self, port: int) -> str:
        """The target at another port that leads here."""
        line = self.known_hosts.read_text().splitlines()[0]
        with self.known_hosts.open("a") as out:
            out.write(line.replace(str(self.port), str(port), 1) + "\n")
        return self.target.replace(str(self.port), str(port))

    def new_key(self) -> Any:
        """Another key for the user."""
        import asyncssh

        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(self.ssh / "id_ed25519"))
        key.write_public_key(str(self.ssh / "id_ed25519.pub"))
        return key

    def cut(self) -> None:
        """Cut the cable."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Link:
    """A port that leads to another, as a context. After `most` bytes from the client it is cut:
    closed on both sides, or, `silent`, open with nothing getting through."""

    def __init__(self, port: int, most: float = float("inf"), *, silent: bool = False) -> None:
        self._to, self._most, self._silent, self.bytes = port, most, silent, 0
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._door.getsockname()[1])
        self._ends: list[socket.socket] = []
        self.cut = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._door.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [near, far]
                for one, other, counted in ((near, far, True), (far, near, False)):
                    threading.Thread(
                        target=self._pump, args=(one, other, counted), daemon=True
                    ).start()

    def _pump(self, one: socket.socket, other: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 14):
                if counted:
                    left = self._most - self.bytes
                    self.bytes += len(data)
                    if self.bytes >= self._most:
                        other.sendall(data[: max(0, int(left))])
                        self.cut.set()
                if self.cut.is_set():
                    break
                other.sendall(data)
        if not (self.cut.is_set() and self._silent):
            self._close()

    def _close(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
