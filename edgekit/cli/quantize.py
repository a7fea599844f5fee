"""`edgekit quantize`."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from edgekit.cache import Cache
from edgekit.cli.console import AnsweredError, TerminalObserver, print_json, size, stdout
from edgekit.cli.source import SourceOptions
from edgekit.compress.scheme import parse_scheme
from edgekit.conversion import check_target, made_by_edgekit, write_model
from edgekit.convert import SUFFIX
from edgekit.errors import UsageError
from edgekit.formats import detect
from edgekit.quantization import Quantized, QuantizeRequest, quantize_model, target_of
from edgekit.sandbox import Limits

__all__ = ["quantize"]

_NOISIEST = 10


def quantize(
    model: str,
    /,
    *,
    scheme: str,
    data: str | None = None,
    calibration: str | None = None,
    for_: Annotated[str | None, Parameter(name="--for")] = None,
    to: Literal["onnx", "tflite", "openvino"] | None = None,
    source: SourceOptions | None = None,
    preprocess: Path | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    keep_float: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    seed: int = 0,
    timeout: float = 900.0,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    keep: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Quantize a model under one scheme, and account for every operator.

    The result is compared with the float model on samples that calibration has not seen. What was
    quantized, what stayed float and why, and the noise on each tensor are printed and written
    beside the result as FILE.provenance.json. (edgekit optimize tries many schemes and engines,
    and measures which is fastest.)

    Parameters
    ----------
    model
        A float model of any format that edgekit convert reads.
    scheme
        fp16, int8-static, int8-dynamic, int8-weights, int4-weights or int16x8, and options after a
        colon: int8-static:per-tensor,percentile (docs/how-to/quantize.md lists them).
    data
        Samples, as for optimize. Calibration takes up to 200, the rest is for comparing. Without
        data, ranges come from seeded noise.
    calibration
        Samples for calibration alone.
    for_
        A device profile, whose rules complete the scheme or refuse it.
    to
        The format to write; otherwise what -o says, or the model's own (Keras and TensorFlow:
        TFLite; PyTorch and scikit-learn: ONNX).
    source
        How to read the model.
    preprocess
        A .toml file with the steps from raw samples to inputs (docs/how-to/preprocess.md).
    metric
        As for optimize: top1 with labels, cosine to the float model without.
    max_drop
        How much may be lost, in the metric's own units; more is exit code 1 and no model.
    keep_float
        Names of tensors whose operators stay float.
    seed
        For parting the data.
    timeout
        Seconds that any one step may take.
    out
        The file to write; the model's name with the scheme otherwise.
    keep
        Write the result even if it loses too much.
    json
        One JSON object on stdout (schema edgekit.quantize/1).
    """
    if max_drop is not None and not 0 <= max_drop < math.inf:
        raise UsageError(f"--max-drop is {max_drop}; wanted 0 or more")
    if not 0 < timeout < math.inf:
        raise UsageError(f"--timeout is {timeout}; wanted a number above 0")
    wanted = parse_scheme(scheme)
    found = detect(model)
    target = target_of(found.format, out, to)
    path = out or Path(f"{Path(model.partition('.py:')[0]).stem}-{wanted.id}{SUFFIX[target]}")
    check_target(path, target)
    if out is None and path.exists() and not made_by_edgekit(path):
        raise UsageError(f"{path} exists, and EdgeKit did not make it: say with -o where to write")
    if path.resolve() == Path(model).resolve():
        raise UsageError(f"-o {path} is the model itself; choose another name")
    cache = Cache()
    with TerminalObserver() as observer:
        made = quantize_model(
            QuantizeRequest(
                model, wanted, target, data=data, calibration=calibration, preprocess=preprocess,
                profile=for_, metric=metric, max_drop=max_drop, keep=tuple(keep_float or ()),
                seed=seed, reading=(source or SourceOptions()).reading(),
                limits=Limits(timeout_s=timeout),
            ),
            observer, cache,
        )  # fmt: skip
    document = _document(model, made)
    written = write_model(
        made.artifact, path, rejected=bool(made.reason) and not keep,
        more={"quantization": document},
    )  # fmt: skip
    cache.trim()
    document["files"] = [str(one) for one in written]
    if json:
        print_json(document)
    else:
        _show(made, written)
    if made.reason:
        kept = "" if keep else ", so it was not written (--keep writes it all the same)"
        raise AnsweredError(f"{made.reason}{kept}", 1)


def _document(model: str, made: Quantized) -> dict[str, Any]:
    return {
        "schema": "edgekit.quantize/1",
        "model": model,
        "format": made.artifact.format,
        "scheme": made.scheme.to_json(),
        "scheme_text": str(made.scheme),
        "tool": made.tool,
        "size_bytes": made.artifact.size_bytes,
        "float_bytes": made.before.size_bytes,
        "evaluation": made.evaluation,
        "passed": not made.reason,
        "reason": made.reason,
        "notes": list(made.notes),
        "search": made.search or None,
        "operators": [one.to_json() for one in made.operators],
        "provenance": list(made.artifact.provenance),
    }


def _show(made: Quantized, written: list[Path]) -> None:
    for note in made.notes:
        stdout.print(f"note: {note}", markup=False, soft_wrap=True)
    by = "" if made.scheme.tool else f", by {made.tool}"
    stdout.print(f"\n{made.scheme}{by}", style="bold", markup=False, soft_wrap=True)
    stdout.print(_types(made))
    reasons = Counter((one.kept, one.type) for one in made.operators if one.kept)
    by_reason: dict[str, list[str]] = {}
    for (why, kind), count in reasons.items():
        by_reason.setdefault(why, []).append(f"{count} {kind}")
    for why, kinds in by_reason.items():
        stdout.print(f"float: {', '.join(kinds)}: {why}", markup=False, soft_wrap=True)
    noisy = sorted((one for one in made.operators if one.sqnr_db is not None),
                   key=lambda one: one.sqnr_db or 0.0)  # fmt: skip
    if noisy:
        stdout.print(f"\nnoisiest of {len(noisy)} tensors (with the noise of all before them)")
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
        for _ in range(2):
            table.add_column(no_wrap=True)
        table.add_column(overflow="fold")  # whole, since --keep-float wants it so
        for one in noisy[:_NOISIEST]:
            table.add_row(f"{one.sqnr_db:.1f} dB", one.type, escape(one.output))
        stdout.print(table)
    _show_evaluation(made)
    for path in written:
        stdout.print(f"{path}  {size(path.stat().st_size)}", markup=False, soft_wrap=True)


def _types(made: Quantized) -> Table:
    """How many operators compute in what, by kind."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("computes in", "weights in", "operators"):
        table.add_column(name)
    groups: dict[tuple[str, str], Counter[str]] = {}
    for one in made.operators:
        groups.setdefault((one.computed, one.weights or "-"), Counter())[one.type] += 1
    for (computed, weights), kinds in sorted(groups.items()):
        text = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        table.add_row(computed, weights, escape(text))
    return table


def _show_evaluation(made: Quantized) -> None:
    found = made.evaluation
    interval = found.get("drop_interval")
    span = f", 95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ""
    stdout.print(
        f"\n{found['name']} {found['reference']:.4f} -> {found['metric']:.4f} on "
        f"{found['samples']} samples (drop {found['drop']:+.4f}{span})", markup=False,
        soft_wrap=True,
    )  # fmt: skip
    stdout.print(
        f"size {size(made.before.size_bytes)} -> {size(made.artifact.size_bytes)} "
        f"({made.size_ratio:.2f}x)", markup=False,
    )  # fmt: skip
