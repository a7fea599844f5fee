"""`edgekit-runtime run|check|bench|info|worker`: what a device needs, without the SDK."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from . import EdgeKitError, UsageError, load
from .arrays import write_npz
from .bundle import Bundle, is_bundle
from .errors import one_line
from .golden import check
from .timing import sample, summary
from .worker import cold_start, input_arrays, main_loop, peak_rss_bytes, read_samples

__all__ = ["main"]


def main(arguments: Optional[List[str]] = None, *, started_ns: Optional[int] = None) -> int:
    """Run one command; returns the exit code (0 done, 1 limit not met, 2 bad input, 3 tool).

    `started_ns` is `time.perf_counter_ns()` before this module was imported, for `bench --cold`.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    args.started_ns = started_ns
    try:
        code = int(args.command(args))
        sys.stdout.flush()
    except EdgeKitError as error:
        print(f"edgekit-runtime: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # nobody reads on; nor may the interpreter's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"edgekit-runtime: {one_line(error)}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgekit-runtime", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=text, description=text)
        one.add_argument("model", type=Path, help="a bundle (.edgekit) or a plain model file")
        one.add_argument("--variant", help="a variant of the bundle, by id")
        one.add_argument("--threads", type=int, help="threads for the engine")
        one.add_argument("--engine", help="engine for a plain model")
        one.add_argument("--json", action="store_true", help="one JSON object on stdout")
        one.set_defaults(command=command)
        return one

    run = verb("run", _run, "run the model on arrays from an .npz and print or save the outputs")
    run.add_argument("--input", type=Path, required=True, help=".npz with arrays named as inputs")
    run.add_argument("--output", type=Path, help="save the outputs as .npz")
    verb("check", _check, "compare the bundle's golden outputs with what it computes here")
    bench = verb("bench", _bench, "time the model on this device")
    bench.add_argument("--runs", type=int, default=200, help="timed runs (default 200)")
    bench.add_argument("--input", type=Path, help=".npz with samples; otherwise seeded noise")
    bench.add_argument("--cold", action="store_true", help="one load and one run only")
    verb("info", _info, "show what is in the bundle or model")
    worker = verb("worker", _worker, "measure on command (for edgekit on the host)")
    worker.add_argument("--input", type=Path, help=".npz with samples")
    for one in (worker, bench):
        one.add_argument("--precision", default="float32", help="float precision, plain models")
    return parser


def _options(args: argparse.Namespace) -> Dict[str, Any]:
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads is {args.threads}; wanted at least 1")
    options = {"variant": args.variant, "threads": args.threads, "engine": args.engine}
    if hasattr(args, "precision"):
        options["precision"] = args.precision
    return options


def _run(args: argparse.Namespace) -> int:
    with load(args.model, **_options(args)) as session:
        outputs = session.run(input_arrays(session, args.input))
    if args.output:
        write_npz(args.output, outputs)
    if args.json:
        shown = {name: array.tolist() for name, array in outputs.items()}
        _print({"schema": "edgekit.run/1", "outputs": shown})
    elif not args.output:
        for name, array in outputs.items():
            print(f"{name} {array.dtype} {list(array.shape)}\n{array}")
    return 0


def _check(args: argparse.Namespace) -> int:
    if not is_bundle(args.model):
        raise UsageError(f"{args.model} is a plain model; only bundles have golden outputs")
    if args.engine is not None:
        raise UsageError("--engine is for plain models; choose one of the bundle's variants")
    results = check(args.model, variant=args.variant, threads=args.threads)
    ok = all(result.ok for result in results)
    if args.json:
        shown = [vars(result) for result in results]
        _print({"schema": "edgekit.check/1", "ok": ok, "outputs": shown})
    else:
        for result in results:
            verdict = "ok" if result.ok else f"DIFFERS {result.note}"
            print(f"{result.output}: {verdict} (largest difference {result.max_abs:.3g})")
    return 0 if ok else 1


def _bench(args: argparse.Namespace) -> int:
    if args.runs < 1:
        raise UsageError(f"--runs is {args.runs}; wanted at least 1")
    if args.cold:
        cold = cold_start(args.model, _options(args), args.input, started_ns=args.started_ns)
        _print({"schema": "edgekit.cold/1", **cold})
        return 0
    with load(args.model, **_options(args)) as session:
        samples = itertools.cycle(read_samples(session, args.input))
        sample(lambda: session.run(next(samples)), max(3, args.runs // 10))
        taken = sample(lambda: session.run(next(samples)), args.runs)
        placement = str(session.placement)
    latency = summary(taken)
    if args.json:
        _print(
            {
                "schema": "edgekit.bench/1",
                "latency_ns": latency,
                "samples_ns": taken,
                "placement": placement,
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
    else:
        shown = "  ".join(f"{k} {latency[k] / 1e6:.3f} ms" for k in ("p50", "p90", "min"))
        print(f"{shown}  ({latency['samples']} runs, measured here; {placement})")
    return 0


def _info(args: argparse.Namespace) -> int:
    if is_bundle(args.model):
        with Bundle(args.model) as bundle:
            print(bundle.manifest.to_json(), end="")
        return 0
    with load(args.model, **_options(args)) as session:
        specs = {
            kind: [vars(spec) for spec in getattr(session, kind)] for kind in ("inputs", "outputs")
        }
        _print({"schema": "edgekit.info/1", "placement": str(session.placement), **specs})
    return 0


def _worker(args: argparse.Namespace) -> int:
    return main_loop(args.model, _options(args), args.input, sys.stdin, sys.stdout)


def _print(value: Dict[str, Any]) -> None:
    """One line of JSON. It has no NaN: those, and infinities, become null."""
    try:
        print(json.dumps(value, allow_nan=False))
    except ValueError:
        print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
