"""`edgekit lab up | down | list`."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import App, Parameter

from edgekit.cli.console import TerminalObserver, print_json, stdout
from edgekit.deploy import lab
from edgekit.deploy.lab import Running

__all__ = ["app", "down", "list_", "up"]

app = App(name="lab", help="Boards without hardware, emulated on this machine.")
Json = Annotated[bool, Parameter(negative="")]


@app.command
def up(
    board: str,
    /,
    *,
    virtual_time: Annotated[bool, Parameter(negative="")] = False,
    disk: int = 1024,
    json: Json = False,
) -> None:
    """Start an emulated arm64 board with a real sshd, or a phone with a real adbd, and print its
    TARGET.

    Needs root on Debian or Ubuntu. The first start installs what is missing (apt), and makes the
    board: a minute, 450 MB in the cache folder.

    Parameters
    ----------
    board
        raspberry-pi-4, raspberry-pi-5 or android-phone.
    virtual_time
        A whole virtual machine whose clock counts instructions: latency is repeatable, and
        labelled simulated.
    disk
        Megabytes that can be written to a board without virtual time.
    json
        One JSON object on stdout (schema edgekit.lab/1).
    """
    with TerminalObserver() as observer:
        one = lab.up(board, virtual_time=virtual_time, disk_mb=disk, observer=observer)
    if json:
        print_json({"schema": "edgekit.lab/1", "boards": [_facts(one)]})
    else:
        stdout.print(_line(one), markup=False, soft_wrap=True)


@app.command
def down(board: str | None = None, /, *, json: Json = False) -> None:
    """Switch off boards; what was on them is gone.

    Parameters
    ----------
    board
        The name or port of one; all otherwise.
    json
        One JSON object on stdout (schema edgekit.lab/1).
    """
    _show(lab.down(board), "switched off", json=json)


@app.command(name="list")
def list_(*, json: Json = False) -> None:
    """List the boards that are up.

    Parameters
    ----------
    json
        One JSON object on stdout (schema edgekit.lab/1).
    """
    _show(lab.running(), "", json=json)


def _show(boards: list[Running], verb: str, *, json: bool) -> None:
    if json:
        print_json({"schema": "edgekit.lab/1", "boards": [_facts(one) for one in boards]})
        return
    for one in boards:
        stdout.print(f"{verb} {_line(one)}".strip(), markup=False, soft_wrap=True)
    if not boards:
        names = ", ".join(sorted(lab.BOARDS))
        stdout.print(f"no board is up; edgekit lab up starts one of: {names}", markup=False)


def _line(one: Running) -> str:
    clock = "virtual time (counts instructions)" if one.virtual_time else "emulated"
    python = f"; --python {one.python}" if one.python else ""
    return f"{one.target}  {one.board}, {clock}{python}"


def _facts(one: Running) -> dict[str, Any]:
    return {
        "board": one.board, "target": one.target, "virtual_time": one.virtual_time,
        "python": one.python, "pid": one.pid,
    }  # fmt: skip
