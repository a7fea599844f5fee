"""An ssh server on loopback, in a process of its own: killing it is cutting the cable.

python ssh_server.py FOLDER       # prints its port; FOLDER has host_key and authorized_keys
"""

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any


async def copy(source: Any, target: Any) -> None:
    """Until the source ends."""
    while data := await source.read(1 << 16):
        target.write(data)
        await target.drain()


async def run(process: Any) -> None:
    """A command in a shell, as sshd runs it."""
    child = await asyncio.create_subprocess_shell(
        process.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin is not None

    async def feed() -> None:
        try:
            with contextlib.suppress(Exception):  # of a link that is lost
                await copy(process.stdin, child.stdin)
        finally:
            child.stdin.close()

    feeding = asyncio.create_task(feed())
    await asyncio.gather(copy(child.stdout, process.stdout), copy(child.stderr, process.stderr))
    feeding.cancel()
    process.exit(await child.wait())


async def main(folder: Path) -> None:
    import asyncssh

    server = await asyncssh.create_server(
        asyncssh.SSHServer, "127.0.0.1", 0, server_host_keys=[str(folder / "host_key")],
        authorized_client_keys=str(folder / "authorized_keys"), sftp_factory=True,
        process_factory=run, encoding=None,
    )  # fmt: skip
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
