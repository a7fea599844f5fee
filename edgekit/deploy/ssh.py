"""A target over ssh (asyncssh), with the user's agent, keys and known_hosts; none is changed."""

from __future__ import annotations

import asyncio
import getpass
import logging
import re
import shlex
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from edgekit.deploy.lab import keys_for
from edgekit.deploy.transport import Completed, Conversation, Ended, Transport
from edgekit.errors import TargetError, UsageError, one_line, require

__all__ = ["SshTransport"]

_CONNECT_S = 30.0
_KEEPALIVE_S = 5.0  # three unanswered ones end the connection: a cut is noticed in 15 s
_WRITE_S = 60.0
_PIECE = 32 << 10  # of a write, a packet: asyncio logs the fifth one into a lost link
_T = TypeVar("_T")


class SshTransport(Transport):
    """One connection, used by one thread."""

    def __init__(self, target: str, *, accept_new_host_key: bool = False) -> None:
        super().__init__(target)
        place = _parse(target)
        self._asyncssh = require("asyncssh", extra="ssh")
        logging.getLogger("asyncssh").setLevel(logging.CRITICAL)
        self._loop = asyncio.new_event_loop()
        try:
            if accept_new_host_key:
                self.wait(self._learn(place), _CONNECT_S)
            self._connection = self.wait(self._connect(place), _CONNECT_S)
        except BaseException:
            self._loop.close()
            raise

    async def _connect(self, place: SplitResult) -> Any:
        port = place.port or 22
        keys = keys_for(place.hostname, port)
        known: dict[str, Any] = {}
        if keys is not None:  # a board of the lab: nothing of the user's is asked or changed
            trusted = self._asyncssh.import_known_hosts(keys.known_hosts)
            known = {"client_keys": [str(keys.key)], "known_hosts": trusted, "config": None}
        try:
            return await self._asyncssh.connect(
                place.hostname,
                port=port,
                username=place.username or getpass.getuser(),
                keepalive_interval=_KEEPALIVE_S,
                connect_timeout=_CONNECT_S,
                **known,
            )
        except self._asyncssh.HostKeyNotVerifiable:
            if keys is None and self._is_known(str(place.hostname), port):
                raise TargetError(
                    f"{self.target}: its host key is another than the one in known_hosts; either "
                    "it was set up anew (ssh-keygen -R removes the old key), or this is not it"
                ) from None
            raise

    def _is_known(self, host: str, port: int) -> bool:
        file = Path.home() / ".ssh" / "known_hosts"
        known = str(file) if file.exists() else b""
        return any(self._asyncssh.match_known_hosts(known, host, "", port))

    async def _learn(self, place: SplitResult) -> None:
        """Add the host's key to known_hosts, unless there is one."""
        host, port = str(place.hostname), place.port or 22
        if keys_for(host, port) or self._is_known(host, port):
            return
        file = Path.home() / ".ssh" / "known_hosts"
        key = await self._asyncssh.get_server_host_key(host, port)
        if key is None:
            raise TargetError(f"{self.target}: it shows no host key")
        file.parent.mkdir(mode=0o700, exist_ok=True)
        name = host if port == 22 else f"[{host}]:{port}"
        with file.open("a") as out:
            out.write(f"{name} {key.export_public_key().decode().strip()}\n")

    def run(self, command: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        async def work() -> Completed:
            done = await self._connection.run(shlex.join(command), input=stdin, encoding=None)
            code = done.exit_status
            if code is None:
                raise TargetError(f"{self.target}: {command[0]} was killed there, or the link cut")
            return Completed(code, done.stdout, done.stderr)

        return self.wait(work(), timeout_s, command[0])

    def converse(self, command: Sequence[str]) -> Conversation:
        async def start() -> Any:
            return await self._connection.create_process(shlex.join(command), encoding=None)

        return _SshConversation(self, self.wait(start(), _CONNECT_S, command[0]))

    def push(self, source: Path, target: str) -> None:
        async def work() -> None:
            # asyncssh writes many blocks at once; few keep a lost link from flooding its log.
            async with self._connection.start_sftp_client() as sftp:
                await sftp.put(str(source), target, max_requests=8)

        self.wait(work(), 600, f"copying {source.name}")

    def close(self) -> None:
        if self._loop.is_closed():
            return

        async def work() -> None:
            self._connection.close()
            await self._connection.wait_closed()

        with suppress(Exception):
            self._loop.run_until_complete(asyncio.wait_for(work(), 5))
        self._loop.close()

    def wait(self, work: Coroutine[Any, Any, _T], timeout_s: float, what: str = "") -> _T:
        """The result; asyncssh's many errors as one of ours."""
        ssh = self._asyncssh
        task = self._loop.create_task(asyncio.wait_for(work, timeout_s))
        try:
            return self._loop.run_until_complete(task)
        except KeyboardInterrupt:  # or it would take what comes for the next one
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                self._loop.run_until_complete(task)
            raise
        except TimeoutError:
            late = f"{what} did not end" if what else "no answer"
            raise TargetError(f"{self.target}: {late} within {timeout_s:.0f} s") from None
        except ssh.HostKeyNotVerifiable as error:
            raise TargetError(
                f"{self.target}: {one_line(error).rstrip('.')}; compare the device's key, then let "
                "ssh add it to known_hosts by connecting once, or --accept-new-host-key"
            ) from None
        except ssh.PermissionDenied:
            raise TargetError(
                f"{self.target}: no key of ours is accepted there; ssh-copy-id brings one"
            ) from None
        except ssh.SFTPError as error:
            raise TargetError(f"{self.target}: {what}: {error.reason or 'failed'}") from None
        except (OSError, ssh.Error, UnicodeError) as error:
            words = re.sub(r"^\[Errno -?\d+\] ", "", one_line(error))
            raise TargetError(f"{self.target}: {words}") from None


class _SshConversation(Conversation):
    def __init__(self, transport: SshTransport, process: Any) -> None:
        self._transport, self._process, self._over = transport, process, False
        self._reading: asyncio.Task[bytes] | None = None

    @property
    def target(self) -> str:
        return self._transport.target

    def write(self, data: bytes) -> None:
        async def work() -> None:
            with suppress(BrokenPipeError):  # it ended: reading says how
                for start in range(0, len(data), _PIECE):
                    self._process.stdin.write(data[start : start + _PIECE])
                    await self._process.stdin.drain()
                    await asyncio.sleep(0)  # where a link that is lost is noticed

        self._check()
        self._transport.wait(work(), _WRITE_S, "a write")

    def line(self, timeout_s: float) -> bytes | None:
        async def work() -> bytes | None:
            if self._reading is None:
                self._reading = asyncio.ensure_future(self._process.stdout.readline())
            await asyncio.wait([self._reading], timeout=timeout_s)
            if not self._reading.done():
                return None
            found, self._reading = self._reading.result(), None
            return found or await self._ended()

        self._check()
        return self._transport.wait(work(), timeout_s + 10)

    async def _ended(self) -> bytes:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait_closed(), 5)
        words = (await self._process.stderr.read()).decode(errors="replace").strip()
        last = words.splitlines()[-1] if words else "no last words"
        raise Ended(f"{self.target}: the process there ended ({last})", self._process.exit_status)

    def _check(self) -> None:
        if self._over:
            raise TargetError(f"{self.target}: the conversation is over")

    def close(self) -> None:
        self._over = True
        if self._reading is not None:
            self._reading.cancel()
        with suppress(Exception):
            self._process.kill()
            self._process.close()


def _parse(target: str) -> SplitResult:
    try:
        place = urlsplit(target)
        port = place.port  # raises for one that is no number
    except ValueError as error:
        raise UsageError(f"{target}: {one_line(error)}; wanted ssh://user@host:port") from None
    if place.password is not None:
        raise UsageError("an ssh target takes no password: keys and the agent are those of ssh")
    if not place.hostname or place.path.strip("/") or place.query or place.fragment or port == 0:
        raise UsageError(f"{target!r} is no ssh target; wanted ssh://user@host:port")
    return place
