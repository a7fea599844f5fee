"""The command line: one file per verb, imported when called, so that `--help` stays fast."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, MissingArgumentError

__all__ = ["app", "main"]


def _version() -> str:
    from edgekit import __version__

    return __version__


app = App(
    suppress_keyboard_interrupt=False,
    name="edgekit",
    help="Fit a trained model to a device: convert, quantize, measure, choose, bundle, run.",
    help_epilogue="A first run on this machine: make demo. Exit codes: 0 done, 1 a stated limit "
    "was not met, 2 wrong usage or unusable input, 3 a tool is missing, 4 the target failed.",
    version=_version,
    help_format="plaintext",  # markdown costs 0.1 s of imports at every start
    version_flags=["--version"],
)
app.command(
    "edgekit.cli.optimize:optimize",
    name="optimize",
    help="Find the fastest variant of a model within an accuracy budget, and bundle it.",
)
app.command(
    "edgekit.cli.run:run",
    name="run",
    help="Run a model or bundle on one sample, here or on a device.",
)
app.command(
    "edgekit.cli.bench:bench", name="bench", help="Time a model or bundle: cold start and warm."
)
app.command(
    "edgekit.cli.trace:trace",
    name="trace",
    help="Show where a model's time goes, operator by operator, and what to fix.",
)
app.command(
    "edgekit.cli.compare:compare",
    name="compare",
    help="Is the new one slower? Both measured in turn; exit code 1 on a regression.",
)
app.command("edgekit.cli.report:report", name="report", help="Write results as one HTML page.")
app.command(
    "edgekit.cli.runs:app", name="runs", help="List, show and export the runs in the result store."
)
app.command(
    "edgekit.cli.convert:convert",
    name="convert",
    help="Convert a model, and prove at every hop that it computes the same.",
)
app.command("edgekit.cli.check:check", name="check", help="Check that two models compute the same.")
app.command(
    "edgekit.cli.quantize:quantize",
    name="quantize",
    help="Quantize a model under one scheme, and account for every operator.",
)
app.command(
    "edgekit.cli.prune:prune",
    name="prune",
    help="Make a model smaller after training, from samples without labels.",
)
app.command(
    "edgekit.cli.eval:eval_",
    name="eval",
    help="Judge a model on samples: metrics with intervals, and which classes it confuses.",
)
app.command(
    "edgekit.cli.inspect:inspect",
    name="inspect",
    help="Show what is in a bundle or a model; judge a model for a device.",
)
app.command(
    "edgekit.cli.runtime_zip:runtime_zip",
    name="runtime-zip",
    help="Write the on-device runtime as one file.",
)
app.command(
    "edgekit.cli.devices:app", name="devices", help="List, show, check and probe device profiles."
)
app.command(
    "edgekit.cli.deploy:deploy",
    name="deploy",
    help="Install a bundle on a device, prove it there, and activate it in one step.",
)
app.command(
    "edgekit.cli.pack:pack", name="pack", help="Bundle a model as it is, with golden outputs."
)
app.command(
    "edgekit.cli.unpack:unpack",
    name="unpack",
    help="Write a bundle's plain model files and a how-to, for an app's project.",
)
app.command("edgekit.cli.deploy:status", name="status", help="Show what is installed on a device.")
app.command("edgekit.cli.deploy:rollback", name="rollback", help="Go back to the version before.")
app.command("edgekit.cli.deploy:gc", name="gc", help="Remove versions a device no longer needs.")
app.command(
    "edgekit.cli.lab:app", name="lab", help="Start and stop emulated boards on this machine."
)
app.command(
    "edgekit.cli.doctor:doctor",
    name="doctor",
    help="Check which engines, accelerators and converters really work here.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit; a user's mistake is one line on stderr, never a traceback."""
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    try:
        app(
            arguments or ["--help"], exit_on_error=False, print_error=False,
            result_action="return_value",
        )  # fmt: skip
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains again on exit
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except Exception as error:
        answered = type(error).__name__ == "AnsweredError"  # importing rich to ask takes 0.1 s
        return _fail(*_explain(error), answered=answered)
    return 0


def _explain(error: Exception) -> tuple[str, int]:
    """The line and the exit code for a user's mistake; ours keep their traceback."""
    from edgekit.errors import EdgeKitError

    if isinstance(error, EdgeKitError):
        return str(error), error.exit_code
    if isinstance(error, CycloptsError):
        verb = next((word for word in sys.argv[1:2] if not word.startswith("-")), "")
        words = str(error)
        if isinstance(error, MissingArgumentError) and error.argument is not None:
            name = error.argument.name
            given = any(word.partition("=")[0] == name for word in sys.argv)
            words = f"{name} needs a value" if given else f"{verb} needs {name}"
        return f"{words} (see {' '.join(['edgekit', verb]).strip()} --help)", 2
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return f"the disk is full, writing {error.filename or 'a file'}", 2
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 2
    raise error


def _fail(message: str, code: int, *, answered: bool = False) -> int:
    line = " ".join(message.split())
    print(f"edgekit: {line}", file=sys.stderr)
    if "--json" in sys.argv and not answered:
        print(json.dumps({"schema": "edgekit.error/1", "error": line, "exit_code": code}))
    return code
