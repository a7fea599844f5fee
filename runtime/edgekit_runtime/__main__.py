"""`edgekit-runtime run|check|bench|info|serve-stdin`: what a device needs, without the SDK."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional

from . import EdgeKitError, EngineError, UsageError, __version__, load
from .arrays import write_npz
from .bundle import Bundle, is_bundle
from .engines import ENGINES
from .errors import one_line
from .golden import check
from .machine import peak_rss_bytes
from .manifest import Variant
from .serve import plain, serve
from .timing import sample, summary
from .worker import cold_start, main_loop, raw_input, read_samples, synthetic_inputs

__all__ = ["main"]


def main(arguments: Optional[List[str]] = None, *, started_ns: Optional[int] = None) -> int:
    """Run one command; returns the exit code (0 done, 1 limit not met, 2 bad input, 3 tool).

    `started_ns` is `time.perf_counter_ns()` before this module was imported, for `bench --cold`.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    args.started_ns = started_ns
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            code = int(args.command(args))
        sys.stdout.flush()
    except EdgeKitError as error:
        print(f"edgekit-runtime: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # nobody reads on; nor may the interpreter's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("edgekit-runtime: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"edgekit-runtime: {one_line(error)}", file=sys.stderr)
        return 2
    return code


def _show_warning(message: Any, category: Any, *_: Any) -> None:
    """What falls back says so here: on one line of stderr."""
    print(f"edgekit-runtime: {category.__name__}: {one_line(message)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgekit-runtime", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    shown = "{run,check,bench,info,serve-stdin}"  # the others are for edgekit on the host
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=shown)

    def verb(name: str, command: Any, text: str, **options: Any) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, description=text, **options)
        one.add_argument("model", type=Path, help="a bundle (.edgekit) or a plain model file")
        one.add_argument("--variant", help="a variant of the bundle, by id")
        one.add_argument("--threads", type=int, help="threads for the engine")
        one.add_argument("--engine", help=f"for a plain model: {', '.join(ENGINES)}")
        one.set_defaults(command=command)
        return one

    def public(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        one = verb(name, command, text, help=text)
        if name != "serve-stdin":
            one.add_argument("--json", action="store_true", help="one JSON object on stdout")
        return one

    run = public("run", _run, "run the model on a file and print or save the answer")
    run.add_argument(
        "--input", action="append", required=True, metavar="[NAME=]FILE",
        help="a sample: an image, .wav, text or any file the bundle's preprocessing takes, .npy, "
        "or .npz with arrays named as the inputs; once per input",
    )  # fmt: skip
    run.add_argument("--output", type=Path, help="save the model's outputs as .npz")
    public("check", _check, "compare the bundle's golden outputs with what it computes here")
    bench = public("bench", _bench, "time the model on this device")
    bench.add_argument("--runs", type=int, default=200, help="timed runs (default 200)")
    bench.add_argument("--input", type=Path, help="samples as for run; else seeded noise")
    bench.add_argument("--cold", action="store_true", help="one load and one run only")
    public("info", _info, "show what is in the bundle or model")
    served = public("serve-stdin", _serve, "answer length-prefixed requests on stdin (see docs)")
    worker = verb("worker", _worker, "measure on command (for edgekit on the host)")
    worker.add_argument("--input", type=Path, help=".npz with samples")
    worker.add_argument("--intent", default="latency", choices=("latency", "throughput"))
    trial = verbs.add_parser("trial", description="try a bundle (for edgekit deploy)")
    trial.add_argument("model", type=Path)
    trial.add_argument("--active", type=Path, help="the version it is to follow")
    trial.add_argument("--max-latency-ns", type=int)
    trial.add_argument("--timeout", type=int, default=0, help="seconds to live")
    trial.set_defaults(command=_trial)
    blocks = verbs.add_parser("blocks", description="time what stdin asks for, line by line")
    blocks.set_defaults(command=_blocks)
    bandwidth = verbs.add_parser("bandwidth", description="time this device's memory")
    bandwidth.add_argument("--threads", type=int, default=1, help="that copy at once")
    bandwidth.set_defaults(command=_bandwidth)
    for one in (worker, bench):
        one.add_argument("--precision", default="float32", help="float precision, plain models")
    for one in (run, bench):
        one.add_argument(
            "--tensors", action="store_true",
            help="the file holds the model's inputs as they are: no preprocessing",
        )  # fmt: skip
    for one in (run, served):
        one.add_argument("--guard", choices=("raise", "warn"), help="look at every output")
        one.add_argument("--isolate", action="store_true", help="the engine in its own process")
        one.add_argument("--timeout", type=float, default=60.0, help="of an isolated call, seconds")
    return parser


def _options(args: argparse.Namespace) -> Dict[str, Any]:
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads is {args.threads}; wanted at least 1")
    options = {"variant": args.variant, "threads": args.threads, "engine": args.engine}
    for name in ("precision", "guard", "isolate", "intent"):
        if hasattr(args, name):
            options[name] = getattr(args, name)
    if hasattr(args, "timeout"):
        if not args.timeout > 0:
            raise UsageError(f"--timeout is {args.timeout:g}; wanted more than 0")
        options["timeout_s"] = args.timeout
    return options


def _run(args: argparse.Namespace) -> int:
    with load(args.model, **_options(args)) as session:
        raw = raw_input(session, args.input, tensors=args.tensors)
        inputs = raw if args.tensors else session.preprocess(raw)
        outputs = session.run(inputs)
        answer = session.postprocess(outputs)
    if args.output:
        write_npz(args.output, outputs)
    if args.json:
        _print({"schema": "edgekit.run/1", "outputs": answer})
    elif not args.output:
        for name, value in answer.items():
            if hasattr(value, "dtype"):
                print(f"{name} {value.dtype} {list(value.shape)}\n{value}")
            else:
                print(f"{name} {_shown(value)}")
    return 0


def _shown(value: Any) -> str:
    """A postprocessed answer for a person: rows of a list each on a line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = ["  ".join(f"{k} {_cell(v)}" for k, v in row.items()) for row in value]
        return "\n" + "\n".join(f"  {row}" for row in rows)
    return str(plain(value))


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(plain(value))


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
            print(
                f"{result.output}: {verdict} (largest difference {result.max_abs:.3g}, "
                f"{100 * result.worst:.3g} % of what is allowed, {result.samples} samples)"
            )
    return 0 if ok else 1


def _bench(args: argparse.Namespace) -> int:
    if args.runs < 1:
        raise UsageError(f"--runs is {args.runs}; wanted at least 1")
    if args.cold:
        cold = cold_start(args.model, _options(args), args.input, started_ns=args.started_ns)
        _print({"schema": "edgekit.cold/1", **cold})
        return 0
    with load(args.model, **_options(args)) as session:
        raw = session.takes_raw and args.input is not None and not args.tensors
        if raw and args.input.suffix != ".npz":
            found = [raw_input(session, [str(args.input)])]
        else:
            found = read_samples(session, args.input, raw=raw)
        samples = itertools.cycle(found)
        call = session.predict if raw else session.run
        try:
            sample(lambda: call(next(samples)), max(3, args.runs // 10))
        except EngineError as error:
            if args.input is not None:
                raise
            hint = "sizes the model leaves free were taken as 1: give real ones with --input"
            raise type(error)(f"{error}; {hint}") from error
        with session.measure(capacity=args.runs) as measured:
            taken = sample(lambda: call(next(samples)), args.runs)
        placement = session.placement
    parts = measured.summary()
    label = "simulated" if placement.simulated else "measured"
    latency = summary(taken, label=label)
    if args.json:
        document = {
            "schema": "edgekit.bench/1",
            "latency_ns": latency,
            "samples_ns": taken,
            "parts_ns": {name: parts[name] for name in ("pre", "infer", "post")},
            "placement": str(placement),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        names = ("cpu_ns", "wall_ns", "energy_j", "rss_bytes", "temperature_c", "frequency_mhz")
        _print({**document, **{name: parts[name] for name in names}})
    else:
        known = [k for k in ("p50", "p90", "min") if latency[k] is not None]
        shown = "  ".join(f"{k} {latency[k] / 1e6:.3f} ms" for k in known)
        split = ", ".join(f"{k} {parts[k]['p50'] / 1e6:.3f}" for k in ("pre", "infer", "post"))
        print(f"{shown}  ({latency['samples']} runs, {label} here; {placement})")
        print(f"p50 of the parts in ms: {split}")
    return 0


def _print_contract(variant: Variant) -> None:
    """What is promised of an accelerator, and what happens where that is not kept."""
    else_ = {
        "warn": "else it warns", "next": "else the next variant is taken",
        "refuse": "else it is refused",
    }[variant.on_misplacement]  # fmt: skip
    of = "multiply-accumulates" if variant.macs else "operators"
    for device, share in variant.placement.items():
        if device != "CPU":
            print(f"  promise  {100 * share:.4g} % of its {of} on {device}, {else_}")
    found = variant.expected.get("placement")
    for one in found.get("left") or () if isinstance(found, dict) else ():
        print(f"  on CPU   {' '.join(map(str, one[1:]))}, where the bundle was made")


def _info(args: argparse.Namespace) -> int:
    if is_bundle(args.model):
        with Bundle(args.model) as bundle:
            manifest = bundle.manifest
        if args.json:
            print(manifest.to_json(), end="")
            return 0
        print(f"{manifest.name}  {manifest.bundle_id}  sequence {manifest.sequence}")
        print(f"made {manifest.created} for {', '.join(manifest.profiles)}")
        _print_specs(manifest.inputs, manifest.outputs)
        for name, one in manifest.preprocess.items():
            print(f"before   {name}: {one.source}, {', '.join(str(s['op']) for s in one.steps)}")
        if manifest.postprocess:
            print(f"after    {', '.join(str(step['op']) for step in manifest.postprocess)}")
        for state in manifest.states:
            print(f"state    {state.input} <- {state.output}")
        sizes = {entry.path: entry.size_bytes for entry in manifest.files}
        for variant in manifest.variants:
            size = sum(sizes[path] for path in variant.files) / 1e6
            print(
                f"variant  {variant.id}: {variant.engine}, {variant.scheme}, threads "
                f"{variant.threads}, {size:.2f} MB"
            )
            _print_contract(variant)
        return 0
    with load(args.model, **_options(args)) as session:
        if args.json:
            specs = {
                kind: [vars(spec) for spec in getattr(session, kind)]
                for kind in ("inputs", "outputs")
            }
            _print({"schema": "edgekit.info/1", "placement": str(session.placement), **specs})
            return 0
        print(f"{args.model}  runs on {session.placement}, version {session.engine_version}")
        _print_specs(session.inputs, session.outputs)
    return 0


def _print_specs(inputs: Any, outputs: Any) -> None:
    for kind, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            print(f"{kind:<8} {spec}")


def _serve(args: argparse.Namespace) -> int:
    with load(args.model, **_options(args)) as session, os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what an engine prints must not get between the answers
        return serve(session, sys.stdin.buffer, answers)


def _worker(args: argparse.Namespace) -> int:
    return main_loop(args.model, _options(args), args.input, sys.stdin, sys.stdout)


def _blocks(args: argparse.Namespace) -> int:
    """One block of samples for each line of stdin, which names any plain model: a device that takes
    seconds to start Python and an engine does so once for dozens of models.

        {"model": PATH, "engine": E, "threads": N, "precision": P, "block_ns": NS}
        ->  {"samples": [ns, ...], "precision": P} or {"error": TEXT, "kind": K, "exit_code": N}
    """
    for line in sys.stdin:
        try:
            answer = _block(**json.loads(line))
        except EdgeKitError as error:
            kind = type(error).__name__
            answer = {"error": str(error), "kind": kind, "exit_code": error.exit_code}
        print(json.dumps(answer), flush=True)
    return 0


def _block(model: str, engine: str, threads: int, precision: str, block_ns: int) -> Dict[str, Any]:
    """Runs for `block_ns`, at least one, after two that are not counted: the engine's own work,
    without copies of inputs and outputs. It is closed then, with all its threads."""
    with load(Path(model), engine=engine, threads=threads, precision=precision) as session:
        bound = session.bind()
        for name, value in synthetic_inputs(session).items():
            bound.inputs[name][...] = value
        sample(bound, 2)
        samples: List[int] = []
        while not samples or (sum(samples) < block_ns and len(samples) < 400):
            samples += sample(bound, 1)
        return {"samples": samples, "precision": session.placement.precision}


def _trial(args: argparse.Namespace) -> int:
    from .acceptance import accept

    if args.timeout and hasattr(signal, "alarm"):
        signal.alarm(args.timeout)  # whoever started it may be gone by then
    verdict = accept(args.model, active=args.active, latency_ns=args.max_latency_ns)
    _print(verdict)
    return 0 if verdict["ok"] else 1


def _bandwidth(args: argparse.Namespace) -> int:
    from .bandwidth import memory_bandwidth

    _print({"schema": "edgekit.bandwidth/1", **memory_bandwidth(threads=args.threads)})
    return 0


def _print(value: Dict[str, Any]) -> None:
    """One line of JSON. It has no NaN: those, and infinities, become null."""
    print(json.dumps(plain(value), allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
