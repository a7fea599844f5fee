"""OpenSSH's sshd on loopback, natively: own port, own keys, no password, for this user."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Server:
    """A server as a context. `as_home` makes its folder ours, with the key and known_hosts."""

    def __init__(self, home: Path) -> None:
        self.home, ssh = home, home / ".ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        self.key, self.known_hosts = ssh / "id_ed25519", ssh / "known_hosts"
        host = ssh / "host_key"
        for key in (self.key, host):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        public = " ".join(host.with_suffix(".pub").read_text().split()[:2])
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public}\n")
        (ssh / "authorized_keys").write_bytes(self.key.with_suffix(".pub").read_bytes())
        self.target = f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        assert SSHD is not None, "openssh-server is not installed"
        Path("/run/sshd").mkdir(exist_ok=True)
        ssh = self.home / ".ssh"
        options = {
            "Port": self.port, "ListenAddress": "127.0.0.1", "HostKey": ssh / "host_key",
            "AuthorizedKeysFile": ssh / "authorized_keys", "StrictModes": "no", "UsePAM": "no",
            "PasswordAuthentication": "no", "KbdInteractiveAuthentication": "no",
            "PidFile": "none", "Subsystem": "sftp internal-sftp", "PermitRootLogin": "yes",
            "SetEnv": f"HOME={self.home}",
        }  # fmt: skip
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", "/dev/null", *words], stderr=subprocess.DEVNULL
        )
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return self
            time.sleep(0.05)
        raise AssertionError("sshd does not listen")

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def as_home(self) -> Iterator[None]:
        """Ours, for what looks for keys."""
        before = os.environ.get("HOME", "/")
        os.environ["HOME"] = str(self.home)
        try:
            yield
        finally:
            os.environ["HOME"] = before
