"""Every scheme in every format on the small corpus, beside the plain libraries' defaults.

    python benchmarks/quantization.py [--work FOLDER] [--only MODEL ...] [--scheme TEXT ...]
    python benchmarks/quantization.py --memory      # calibrating with 2,000 samples against 100
    python benchmarks/quantization.py --bars        # what the rows so far say of the bars
    python benchmarks/quantization.py --latency     # times the rows so far
    python benchmarks/quantization.py --tables      # the rows so far

All take the same calibration samples (200) and are evaluated on the same test samples, one at a
time, by the same code. Latency is the median of rounds in which all models of a network take turns,
as a ratio to the float model in ONNX Runtime, one thread. Rows are kept in FOLDER; a row that is
there is not made again unless `--fresh`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import quantization_bars
from quantization_data import CASES, Case, prepare
from quantization_plain import PLAIN

from edgekit import sandbox
from edgekit.artifact import Artifact, open_model
from edgekit.builder import Builder
from edgekit.cache import Cache
from edgekit.compress.quantize import quantize
from edgekit.compress.quantizers import fitted, quantizer_for, readable_as
from edgekit.compress.scheme import Scheme, parse_scheme
from edgekit.conversion import Given, convert_with_proof
from edgekit.convert import convert
from edgekit.data import Split, open_dataset
from edgekit.device import Quantization
from edgekit.errors import EdgeKitError
from edgekit.graph import read_graph
from edgekit.measure.benchmark import Contender, Rounds, measure
from edgekit.measure.conditions import conditions
from edgekit.measure.statistics import median_interval
from edgekit.plan import Candidate
from edgekit_runtime.engines import ENGINE_OF_FORMAT

FORMATS = ("onnx", "openvino", "tflite")
_CALIBRATION = 200
_LIMITS = sandbox.Limits(timeout_s=1800.0)

#: what every model gets; the float model and the libraries' defaults come on top
SCHEMES = {
    "onnx": (
        "fp16", "int8-static", "int8-static:7-bit", "int8-static:matmul",
        "int8-static:matmul,7-bit", "int8-static:nncf", "int8-dynamic", "int16x8", "int8-weights",
        "int4-weights:block=32", "int4-weights",
    ),
    "openvino": (
        "fp16", "int8-static", "int8-static:7-bit", "int8-static:matmul",
        "int8-static:transformer", "int8-weights", "int4-weights:block=32", "int4-weights",
    ),
    "tflite": (
        "fp16", "int8-static", "int8-static:matmul", "int8-static:tensorflow", "int8-dynamic",
        "int16x8", "int16x8:tensorflow", "int8-weights", "int4-weights:block=32", "int4-weights",
    ),
}  # fmt: skip
#: the options, on the networks where they can show something
OPTIONS = {
    "onnx": (
        "int8-static:per-tensor", "int8-static:percentile", "int8-static:entropy",
        "int8-static:mse", "int8-static:bias-correction", "int8-static:equalization",
        "int8-static:learned-rounding", "int4-weights:learned-rounding",
    ),
    "openvino": (
        "int8-static:per-tensor", "int8-static:percentile", "int8-static:mse",
        "int8-static:bias-correction", "int8-static:smooth-quant", "int4-weights:learned-rounding",
    ),
    "tflite": (
        "int8-static:per-tensor", "int8-static:percentile", "int8-static:entropy",
        "int8-static:mse",
    ),
}  # fmt: skip
#: converted best from what the framework exported, not from ONNX
_KERAS = ("fashion", "vww", "cifar", "kws")
_WITH_OPTIONS = ("fashion", "cifar", "magika", "text")


class Bench:
    """One network: its float model in every format, the data, and rows as they are made."""

    def __init__(self, case: Case, work: Path, *, fresh: bool) -> None:
        self.case, self.work, self.fresh = case, work, fresh
        self.cache = Cache(work / "cache")
        self.quantized = Cache(work / f"cache-{_code()}")
        self.came = open_model(case.model, reading=case.reading)
        self._builders: dict[str, Builder | EdgeKitError] = {}

    # --- what all rows share --------------------------------------------------------------------

    def builder(self, fmt: str) -> Builder:
        """The float model in a format, with the data.

        Raises:
            EdgeKitError: it does not convert.
        """
        if fmt not in self._builders:
            try:
                self._builders[fmt] = self._made(fmt)
            except EdgeKitError as error:
                self._builders[fmt] = error
        found = self._builders[fmt]
        if isinstance(found, EdgeKitError):
            raise found
        return found

    def _made(self, fmt: str) -> Builder:
        came = self.came
        data = open_dataset(self.case.test, came.inputs, self.cache)
        calibration = open_dataset(self.case.calibration, came.inputs, self.cache)
        before = came
        if came.format != fmt:
            given = Given.of(calibration, came.inputs)
            found = convert_with_proof(came, fmt, cache=self.cache, given=given, limits=_LIMITS)
            if not found.passed:
                raise EdgeKitError("the float model computes something else in this format")
            before = found.artifact
        indices = np.arange(min(_CALIBRATION, calibration.count))
        empty = np.zeros(0, np.int64)
        split = Split(indices, np.arange(data.count), empty, calibration)
        reference = Candidate("float", ENGINE_OF_FORMAT[fmt], fmt, Scheme("fp32"), 1)
        isa = conditions()["isa"]
        return Builder(before, data, split, "top1", isa, self.cache, reference)

    def evaluated(self, builder: Builder, made: Artifact) -> dict[str, Any]:
        """Top-1, the drop and its interval."""
        reference = builder.reference
        samples = builder.split.selection
        was = builder.evaluate(reference, builder.source, samples, _LIMITS, _silent)
        if made is builder.source:
            return {"metric": was["metric"], "drop": 0.0, "drop_interval": [0.0, 0.0]}
        candidate = replace(reference, id="quantized")
        return builder.evaluate(candidate, made, samples, _LIMITS, _silent)

    # --- rows -----------------------------------------------------------------------------------

    def row(self, fmt: str, by: str, what: str) -> dict[str, Any]:
        """`by`: `edgekit` with a scheme, `plain` with a tool, `float`, or `authors`."""
        slug = re.sub(r"[^a-z0-9.=-]+", "_", f"{self.case.name}-{fmt}-{by}-{what}".lower())
        path = self.work / "rows" / f"{slug}.json"
        if path.exists() and not (self.fresh and by == "edgekit"):
            loaded: dict[str, Any] = json.loads(path.read_text())
            return loaded
        found: dict[str, Any] = {
            "model": self.case.name, "format": fmt, "by": by, "what": what, "slug": slug,
        }  # fmt: skip
        start = time.perf_counter()
        try:
            found |= self._row(fmt, by, what, slug)
        except EdgeKitError as error:
            found["error"] = str(error).splitlines()[0]
        found["seconds"] = round(time.perf_counter() - start, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))
        shown = found.get("error") or f"{found['metric']:.4f} {found['bytes'] / 1e3:.0f} kB"
        print(f"  {slug}: {shown} ({found['seconds']} s)", file=sys.stderr, flush=True)
        return found

    def _row(self, fmt: str, by: str, what: str, slug: str) -> dict[str, Any]:
        if by == "authors":
            path = Path(self.case.authors)
            builder = self.builder("tflite")
            metric = quantization_bars.top1_of_tflite(path, builder.data)
            was = self.evaluated(builder, builder.source)["metric"]
            return {"metric": metric, "drop": was - metric, "bytes": path.stat().st_size}
        builder = self.builder(fmt)
        facts: dict[str, Any] = {}
        if by == "float":
            made = builder.source
            facts["weights_bytes"] = _weights_bytes(made)
        elif by == "plain":
            made = self._plain(builder, what, self.work / "plain" / slug)
        else:
            made, facts = self._edgekit(builder, fmt, what)
        if any(spec.dtype == "int8" for spec in made.inputs):
            try:
                metric = quantization_bars.top1_of_tflite(made.path, builder.data)
            except RuntimeError as error:
                raise EdgeKitError(f"the engine fails: {error}") from error
            was = self.evaluated(builder, builder.source)["metric"]
            return {"metric": metric, "drop": was - metric, "bytes": made.size_bytes}
        found = self.evaluated(builder, made)
        return {
            "metric": found["metric"], "drop": found["drop"], "interval": found["drop_interval"],
            "bytes": made.size_bytes, "path": str(made.path), **facts,
        }  # fmt: skip

    def _edgekit(self, builder: Builder, fmt: str, what: str) -> tuple[Artifact, dict[str, Any]]:
        scheme = parse_scheme(what)
        quantizer = quantizer_for(scheme, fmt, source=self._source)
        scheme = fitted(scheme, quantizer, Quantization())
        source, target = builder.source, None
        if quantizer.takes != fmt:
            source, target = convert(self.came, quantizer.takes, cache=self.cache), fmt
        split = builder.split
        made = quantize(
            source, scheme, split.calibration_data, split.calibration, target=target,
            cache=self.quantized, limits=_LIMITS,
        )  # fmt: skip
        step = made.provenance[-1]
        facts = {name: step[name] for name in ("notes", "corrected", "stored") if step.get(name)}
        return made, {"scheme": str(scheme), "tool": quantizer.tool, "facts": facts}

    @property
    def _source(self) -> str:
        return readable_as(self.came.format)

    def _plain(self, builder: Builder, tool: str, folder: Path) -> Artifact:
        plain = PLAIN[tool]
        source = builder.source
        if plain.takes == "savedmodel":
            source = convert(self.came, "savedmodel", cache=self.cache)
        path = source.path.parent if source.format == "savedmodel" else source.path
        shutil.rmtree(folder, ignore_errors=True)  # litert-quantizer refuses to write over it
        folder.mkdir(parents=True)
        suffix = {"onnx": ".onnx", "openvino": ".xml", "tflite": ".tflite"}[plain.target]
        split = builder.split
        samples = folder / "samples.npz"
        arrays = split.calibration_data.arrays
        np.savez(samples, **{name: a[split.calibration] for name, a in arrays.items()})
        target = folder / f"model{suffix}"
        code = Path(__file__).with_name("quantization_plain.py")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(code), tool, str(path), str(target),
             str(samples)],
            capture_output=True, text=True, timeout=1800, check=False,
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise EdgeKitError(f"it raises: {lines[-1] if lines else done.returncode}")
        return open_model(target)

    def everything(self, wanted: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """Format, by, what of each row."""
        for fmt in FORMATS:
            yield fmt, "float", "fp32"
            for tool, plain in PLAIN.items():
                fits = plain.takes in (fmt, self._source)
                if plain.target == fmt and fits and (self.case.name == "text" or "4" not in tool):
                    yield fmt, "plain", tool
            schemes = SCHEMES[fmt]
            if self.case.name in _WITH_OPTIONS:
                schemes += OPTIONS[fmt]
            for text in wanted or schemes:
                if "tensorflow" not in text or self.case.name in _KERAS:
                    yield fmt, "edgekit", text
        if self.case.authors:
            yield "tflite", "authors", "their int8 file"

    # --- latency --------------------------------------------------------------------------------

    def time(self, rows: list[dict[str, Any]]) -> None:
        """Adds `ratio` to the rows: latency over that of the float model in ONNX Runtime."""
        able = [row for row in rows if "path" in row]
        base = next(row for row in able if (row["format"], row["by"]) == ("onnx", "float"))
        specs = self.builder("onnx").source.inputs
        inputs = self.work / f"{self.case.name}-input.npz"
        np.savez(inputs, **self.builder("onnx").data.sample(0, specs))
        contenders = [
            Contender(row["slug"], Path(row["path"]), 1, ENGINE_OF_FORMAT[row["format"]])
            for row in able
        ]
        taken = measure(
            contenders, base["slug"], inputs=inputs, rounds=Rounds(least=9, most=9, block_s=0.05)
        )
        for row in able:
            one, was = taken[row["slug"]], taken[base["slug"]]
            if one.failure:
                row["latency_error"] = one.failure
            else:
                ratios = [a / b for a, b in zip(one.medians_ns, was.medians_ns, strict=False)]
                row["ratio"], row["ratio_low"], row["ratio_high"] = median_interval(ratios)
                row["p50_ms"] = float(np.median(one.medians_ns)) / 1e6
            (self.work / "rows" / f"{row['slug']}.json").write_text(json.dumps(row, indent=1))


def _silent(done: int, total: int) -> None:
    del done, total


def _code() -> str:
    """Tells versions of the quantizers apart: what they make is cached by their inputs only."""
    folder = Path(quantize.__code__.co_filename).parent
    read = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(read).hexdigest()[:12]


def _weights_bytes(made: Artifact) -> int:
    graph = read_graph(made.path)
    return sum(
        4 * int(np.prod(one.shape))
        for one in graph.tensors.values()
        if one.constant and one.dtype == "float32"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per row."""
    lines = [
        "| format | who | what | top-1 | lost (95 %) | kB | latency |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        what = PLAIN[row["what"]].text if row["by"] == "plain" else row["what"]
        head = f"| {row['format']} | {row['by']} | {what} |"
        if "error" in row:
            lines.append(f"{head} refused: {row['error'][:150].replace('|', '/')} | | | |")
            continue
        low, high = row.get("interval") or (None, None)
        span = f" ({100 * low:+.2f} to {100 * high:+.2f})" if low is not None else ""
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else row.get("latency_error", "")[:60]
        lines.append(
            f"{head} {100 * row['metric']:.2f} % | {100 * row['drop']:+.2f}{span} | "
            f"{row['bytes'] / 1e3:.0f} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/quantization"))
    parser.add_argument("--data", type=Path, help="folder of quantization_data.py; else WORK/data")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--scheme", nargs="*", default=[], help="instead of all")
    parser.add_argument("--fresh", action="store_true", help="make EdgeKit's rows again")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--latency", action="store_true", help="of the rows that there are")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--tables", action="store_true", help="of the rows that there are")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    data = (args.data or work / "data").resolve()
    if args.latency:
        made = quantization_bars.read_rows(work)
        for name in args.only:
            rows = [row for row in made if row["model"] == name and "path" in row]
            print(f"{name}: {len(rows)} models", file=sys.stderr, flush=True)
            Bench(prepare(name, data), work, fresh=False).time(rows)
        return
    if args.memory:
        print(quantization_bars.memory(prepare("fashion", data), work))
        return
    if args.bars:
        print(quantization_bars.bars(quantization_bars.read_rows(work)))
        return
    if args.tables:
        made = quantization_bars.read_rows(work)
        for name in args.only:
            rows = [row for row in made if row["model"] == name]
            rows.sort(key=lambda row: FORMATS.index(row["format"]))
            print(f"\n## {name}\n\n{table(rows)}")
        return
    for name in args.only:
        print(f"{name}", file=sys.stderr, flush=True)
        bench = Bench(prepare(name, data), work, fresh=args.fresh)
        asked = [one for one in bench.everything(args.scheme) if one[0] in args.formats]
        rows = [bench.row(*one) for one in asked]
        if not args.no_latency and any("ratio" not in row for row in rows if "path" in row):
            bench.time(rows)
        labels = "top-1" if bench.case.labels == "data" else f"agreement with {bench.case.labels}"
        count = bench.builder("onnx").data.count
        print(f"\n### {name}: {labels} on {count} samples\n\n{table(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
