"""What the rows of `quantization.py` say of the bars, and what calibration costs in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from quantization_data import Case

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.compress.calibration import calibration_request
from edgekit.compress.quantizers import fitted, quantizer_for
from edgekit.compress.scheme import parse_scheme
from edgekit.convert import SUFFIX, convert
from edgekit.data import Dataset, open_dataset
from edgekit.device import Quantization

__all__ = ["bars", "memory", "read_rows", "top1_of_tflite"]

Row = dict[str, Any]

FORMATS = ("onnx", "openvino", "tflite")
_MOST_LOST, _MOST_LOST_INT4 = 0.3, 1.0
_INT8_SIZE, _INT8_SPARE, _INT4_SIZE = 0.27, 100_000, 0.20
_MOST_MEMORY = 1.1


def read_rows(work: Path) -> list[Row]:
    """All rows made so far."""
    return [json.loads(path.read_text()) for path in sorted((work / "rows").glob("*.json"))]


def top1_of_tflite(path: Path, data: Dataset) -> float:
    """Of a TFLite model, whose input and output may be int8, by LiteRT itself."""
    from ai_edge_litert.interpreter import Interpreter

    net = Interpreter(str(path), num_threads=1)
    net.allocate_tensors()
    (taken,), (given,) = net.get_input_details(), net.get_output_details()
    (array,) = data.arrays.values()
    assert data.labels is not None
    right = 0
    for index, label in enumerate(data.labels):
        value = array[index : index + 1]
        if taken["dtype"] == np.int8:
            scale, zero = taken["quantization"]
            value = np.clip(np.round(value / scale) + zero, -128, 127).astype(np.int8)
        net.set_tensor(taken["index"], value)
        net.invoke()
        right += int(net.get_tensor(given["index"]).argmax() == label)
    return right / len(data.labels)


# --- bars -----------------------------------------------------------------------------------------


def bars(rows: list[Row]) -> str:
    """A line per bar and engine: what holds with which scheme."""
    lines = ["| bar | format | best of EdgeKit | reached | holds |", "|---|---|---|---|---|"]
    lines += [
        _line(
            f"Fashion int8 loses at most {_MOST_LOST} points", fmt, _int8(rows, "fashion", fmt),
            lambda row: 100 * row["drop"], lambda value: value <= _MOST_LOST, "{:+.2f} points",
        )
        for fmt in FORMATS
    ]  # fmt: skip
    for model in ("vww", "cifar", "kws"):
        authors = [r for r in rows if r["model"] == model and r["by"] == "authors"]
        if not authors or "metric" not in authors[0]:
            continue
        theirs = authors[0]["metric"]
        lines += [
            _line(
                f"{model}: agreement at least the authors' {100 * theirs:.1f} %", fmt,
                _int8(rows, model, fmt), lambda row: -100 * row["metric"],
                lambda value, theirs=theirs: -value >= 100 * theirs - 1e-9, "{:.1f} %", -1,
            )
            for fmt in FORMATS
        ]  # fmt: skip
    lines += _sizes(rows)
    return "\n".join(lines)


def _int8(rows: list[Row], model: str, fmt: str) -> list[Row]:
    return [
        r for r in rows
        if r["model"] == model and r["format"] == fmt and r["by"] == "edgekit"
        and r["what"].startswith("int8-static") and "metric" in r
    ]  # fmt: skip


def _line(
    bar: str, fmt: str, found: list[Row], value: Any, holds: Any, text: str, sign: int = 1
) -> str:
    if not found:
        return f"| {bar} | {fmt} | none | | no |"
    plain = [row for row in found if row["what"] == "int8-static"]
    best = min(found, key=value)
    told = text.format(sign * value(best))
    if plain:
        told += f" (int8-static: {text.format(sign * value(plain[0]))})"
    return f"| {bar} | {fmt} | {best['what']} | {told} | {'yes' if holds(value(best)) else 'NO'} |"


def _sizes(rows: list[Row]) -> list[str]:
    lines = []
    floats = {
        (r["model"], r["format"]): r for r in rows if r["by"] == "float" and "weights_bytes" in r
    }
    for fmt in FORMATS:
        over, worst = [], (0.0, "")
        for row in rows:
            base = floats.get((row["model"], "onnx"))
            if row["by"] != "edgekit" or row["format"] != fmt or "bytes" not in row or not base:
                continue
            if not row["what"].startswith(("int8-", "int16x8")):
                continue
            most = _INT8_SIZE * base["weights_bytes"] + _INT8_SPARE
            worst = max(worst, (row["bytes"] / most, f"{row['model']} {row['what']}"))
            if row["bytes"] > most:
                over.append(f"{row['model']} {row['what']} {row['bytes'] / most:.2f}x")
        told = f"NO: {'; '.join(over)}" if over else "yes"
        lines.append(
            f"| int8 at most {_INT8_SIZE}x of the float weights + 100 kB | {fmt} | greatest: "
            f"{worst[1]} | {worst[0]:.2f}x of allowed | {told} |"
        )
    for fmt in FORMATS:
        base = floats.get(("text", "onnx"))
        able = [
            r for r in rows
            if (r["model"], r["format"], r["by"]) == ("text", fmt, "edgekit")
            and r["what"].startswith("int4") and "bytes" in r
        ]  # fmt: skip
        if not base or not able:
            lines.append(f"| int4-weights on the transformer | {fmt} | none | | no |")
            continue
        best = min(able, key=lambda r: (100 * r["drop"] > _MOST_LOST_INT4, r["bytes"]))
        share = best["bytes"] / base["weights_bytes"]
        good = share <= _INT4_SIZE and 100 * best["drop"] <= _MOST_LOST_INT4
        lines.append(
            f"| int4-weights on the transformer: at most {_INT4_SIZE}x, {_MOST_LOST_INT4} point | "
            f"{fmt} | {best['what']} | {share:.3f}x of the float weights, "
            f"{100 * best['drop']:+.2f} points | {'yes' if good else 'NO'} |"
        )
    return lines


# --- memory ---------------------------------------------------------------------------------------

_CHILD = """
import importlib, json, resource, sys

request = json.loads(sys.argv[1])
module, _, name = request.pop("function").partition(":")
getattr(importlib.import_module(module), name)(**request)
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
_MEMORY_SCHEMES = (
    ("onnx", "int8-static"), ("onnx", "int8-static:entropy"), ("onnx", "int8-static:nncf"),
    ("onnx", "int8-static:bias-correction"), ("onnx", "int8-static:learned-rounding"),
    ("openvino", "int8-static"), ("openvino", "int8-static:percentile"),
    ("openvino", "int8-static:bias-correction"), ("tflite", "int8-static"),
    ("tflite", "int8-static:mse"), ("tflite", "int8-static:tensorflow"),
)  # fmt: skip


def memory(case: Case, work: Path) -> str:
    """Peak RSS of each tool's process that calibrates with 100 and with 2,000 samples."""
    cache = Cache(work / "cache")
    came = open_model(case.model, reading=case.reading)
    lines = ["| format | scheme | 100 samples | 2,000 samples | ratio | holds |", "|---|" * 3 + "|"]
    lines[1] = "|---|---|---|---|---|---|"
    for fmt, text in _MEMORY_SCHEMES:
        quantizer = quantizer_for(parse_scheme(text), fmt, source="savedmodel")
        scheme = fitted(parse_scheme(text), quantizer, Quantization())
        source = convert(came, quantizer.takes, cache=cache)
        calibration = open_dataset(case.calibration, came.inputs, cache)
        peaks = []
        for count in (100, 2000):
            folder = work / "memory"
            folder.mkdir(exist_ok=True)
            request = {
                "function": quantizer.function, "source": list(source.arguments),
                "target": str(folder / f"model{SUFFIX[fmt]}"), "scheme": scheme.to_json(),
                "calibration": calibration_request(
                    calibration, np.arange(count), source.inputs, folder
                ),
            }  # fmt: skip
            peaks.append(_peak(request))
        ratio = peaks[1] / peaks[0] if min(peaks) else float("nan")
        lines.append(
            f"| {fmt} | {text} | {peaks[0] / 1e3:.0f} MB | {peaks[1] / 1e3:.0f} MB | {ratio:.2f} | "
            f"{'yes' if ratio <= _MOST_MEMORY else 'NO'} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _peak(request: dict[str, Any]) -> int:
    """Kilobytes; 0 where it fails, said on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CHILD, json.dumps(request)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("PEAK "):
            return int(line.split()[1])
    print(done.stderr[-600:], file=sys.stderr)
    return 0
