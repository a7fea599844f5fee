"""`edgekit eval`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from edgekit.assessment import EvalRequest, assess_model
from edgekit.cache import Cache, write_atomically
from edgekit.cli.console import AnsweredError, TerminalObserver, print_json, stdout
from edgekit.cli.source import SourceOptions
from edgekit.errors import UsageError

__all__ = ["eval_"]

#: a matrix with more classes does not fit on a screen
_MOST_SHOWN = 20
_PAIRS_SHOWN = 10


def eval_(
    model: str,
    /,
    *,
    data: str,
    metric: list[str] | None = None,
    folds: int | None = None,
    reference: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    source: SourceOptions | None = None,
    preprocess: Path | None = None,
    seed: int = 0,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Judge a model on samples: metrics with 95 % intervals, and which classes it confuses.

    A model of an engine's format runs in its engine, others in the framework they come from; of a
    bundle, each variant. Exit code 1 if outputs hold NaN or infinities.

    Parameters
    ----------
    model
        A bundle (.edgekit) or a model, float or quantized, of any format that edgekit convert
        reads.
    data
        Labelled samples: an .npz with arrays named like the model's inputs and 'labels', a folder
        of files with labels.csv, or module.py:function yielding (inputs, label).
    metric
        May be repeated: top1, top5, accuracy; precision, recall, f1, each also -macro, -micro,
        -weighted or -class-N; auc, mae, rmse, r2; against a reference cosine, sqnr, agreement; or
        module.py:function(outputs, labels). Those that suit the labels otherwise.
    folds
        Also the spread of each metric over so many parts of the data.
    reference
        A model to compare with, sample by sample: the float one, usually.
    engine
        onnxruntime, openvino, litert or ncnn, for which the model is converted if need be, with an
        accelerator of it (ncnn:vulkan) or without.
    threads
        Threads for the engine.
    source
        How to read the model.
    preprocess
        A .toml file with the steps from raw samples to inputs (docs/how-to/preprocess.md); a
        bundle has its own.
    seed
        For the bootstrap and the parts.
    out
        File for the result (JSON).
    json
        One JSON object on stdout (schema edgekit.eval/1).
    """
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"-o {out}: cannot write there; wanted a file in a folder that exists")
    with TerminalObserver() as observer:
        document = assess_model(
            EvalRequest(
                model, data, tuple(metric or ()), folds=folds, reference=reference, engine=engine,
                threads=threads, preprocess=preprocess, seed=seed,
                reading=(source or SourceOptions()).reading(),
            ),
            observer, Cache(),
        )  # fmt: skip
    if out is not None:
        write_atomically(out, json_module.dumps(document, indent=1).encode())
    if json:
        print_json(document)
    else:
        _show(document)
        if out is not None:
            stdout.print(f"\n{out}", markup=False, soft_wrap=True)
    broken = max(one["broken_count"] for one in document["results"])
    if broken:
        first = next(one["broken"][0] for one in document["results"] if one["broken"])
        raise AnsweredError(
            f"{model}: NaN or infinities in the outputs of {broken} of {document['samples']} "
            f"samples, the first is sample {first}", 1,
        )  # fmt: skip


def _show(document: dict[str, Any]) -> None:
    names = document["class_names"]
    for result in document["results"]:
        where = result["engine"] or result["framework"]
        variant = f"{result['variant']}, " if "variant" in result else ""
        stdout.print(
            f"\n{document['model']}  {variant}{where}, {result['samples']} samples", style="bold",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        _show_metrics(result)
        if result.get("classes") and len(result["classes"]) > 1:
            _show_classes(result, names)
            _show_confusion(result, names)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"


def _span(interval: list[float] | None) -> str:
    return f"{_number(interval[0])} to {_number(interval[1])}" if interval else "-"


def _show_metrics(result: dict[str, Any]) -> None:
    metrics = result["metrics"]
    compared = any("drop" in one for one in metrics)
    spread = any("folds" in one for one in metrics)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("metric", "value"):  # whatever the width, these stay whole; others wrap
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for name in ("95 % interval", *(["reference", "drop (95 %)"] if compared else []),
                 *(["folds: mean, sd", "least to greatest"] if spread else [])):  # fmt: skip
        table.add_column(name, justify="right", min_width=7)
    for one in metrics:
        row = [
            escape(one["name"].rpartition(":")[2]),
            _number(one["value"]),
            _span(one["interval"]),
        ]
        if compared:
            drop = one.get("drop")
            text = "-" if drop is None else f"{drop:+.4f}"
            ends = one.get("drop_interval")
            text += f" ({ends[0]:+.4f} to {ends[1]:+.4f})" if ends else ""
            row += [_number(one.get("reference")), text]
        if spread:
            folds = one["folds"]
            row.append(f"{_number(folds['mean'])}, {_number(folds['sd'])}")
            row.append(_span([folds["least"], folds["greatest"]]) if folds["mean"] else "-")
        table.add_row(*row)
    stdout.print(table)


def _named(number: int, names: list[str] | None) -> str:
    name = names[number] if names and 0 <= number < len(names) else str(number)
    return name if name == str(number) else f"{number} {name}"


def _show_classes(result: dict[str, Any], names: list[str] | None) -> None:
    """Every class, or those with the lowest F1."""
    classes = [one for one in result["classes"] if one["samples"] or one["answers"]]
    shown = classes
    title = "classes, 95 % intervals"
    if len(classes) > _MOST_SHOWN:
        shown = sorted(
            (one for one in classes if one["samples"]), key=lambda one: (one["f1"], one["class"])
        )[:_PAIRS_SHOWN]
        title = f"the {len(shown)} of {len(classes)} classes with the lowest F1, 95 % intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("class", max_width=14, no_wrap=True)
    for name in ("samples", "precision", "recall", "F1"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in shown:
        figures = [_with_span(one, key) for key in ("precision", "recall", "f1")]
        table.add_row(escape(_named(one["class"], names)), str(one["samples"]), *figures)
    stdout.print(table)


def _with_span(one: dict[str, Any], key: str) -> str:
    low, high = one[f"{key}_interval"]
    return f"{one[key]:.2f} ({low:.2f}-{high:.2f})"


def _show_confusion(result: dict[str, Any], names: list[str] | None) -> None:
    """The matrix; of many classes the pairs that are confused most."""
    classes = [one["class"] for one in result["classes"]]
    confusion = result["confusion"]
    if len(classes) > _MOST_SHOWN:
        stdout.print("most confused")
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("class", "taken for"):
            table.add_column(name, max_width=30, no_wrap=True)
        table.add_column("samples", justify="right")
        for true, guess, count in confusion["most_confused"][:_PAIRS_SHOWN]:
            table.add_row(escape(_named(true, names)), escape(_named(guess, names)), str(count))
        stdout.print(table)
        return
    stdout.print("confusion: a row for each class, its samples by what they were taken for")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    table.add_column("", max_width=16, no_wrap=True)
    for number in classes:
        table.add_column(str(number), justify="right", no_wrap=True, min_width=3)
    for number, row in zip(classes, confusion["matrix"], strict=True):
        cells = [
            f"[bold]{n}[/bold]" if i == classes.index(number) else str(n) if n else "."
            for i, n in enumerate(row)
        ]
        table.add_row(escape(_named(number, names)), *cells)
    stdout.print(table)
