"""What `edgekit optimize` chooses beside the plain libraries, in one interleaved run.

    python benchmarks/peers.py [--work FOLDER] [--only MODEL ...] [--max-drop 0.01]

The plain libraries' files are those of `quantization.py` (their defaults, the same calibration
samples). All models of a network take turns in one run, one thread each; a ratio is the latency
over that of the float model in ONNX Runtime. `optimize` decides on one half of the test samples and
confirms on the other; what is shown is measured on all of them, for everyone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from quantization import Bench
from quantization_data import CASES, prepare

from edgekit.artifact import SOURCES, open_model
from edgekit.errors import EdgeKitError
from edgekit_runtime.bundle import Bundle

_SUFFIX = {"onnxruntime": ".onnx", "openvino": ".xml", "litert": ".tflite", "ncnn": ".param"}


def optimized(bench: Bench, max_drop: float) -> dict[str, Any]:
    """What the command says, and a row of what it chose."""
    case, out = bench.case, bench.work / "peers" / bench.case.name
    keras = bench.came.format in SOURCES and ".py:" not in case.model
    model = case.model if keras or bench.came.format == "onnx" else str(
        bench.builder("onnx").source.path
    )  # fmt: skip
    tool = str(Path(sys.executable).with_name("edgekit"))
    start = time.monotonic()
    done = subprocess.run(
        [tool, "optimize", model, "--for", "this-machine", "--data", case.test, "--calibration",
         case.calibration, "--max-drop", str(max_drop), "--threads", "1", "--json", "-o", str(out)],
        env={**os.environ, "EDGEKIT_CACHE": str(bench.work / "peers" / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    document: dict[str, Any] = json.loads(done.stdout)
    chosen = next(one for one in document["candidates"] if one["id"] == document["chosen"])
    with Bundle(out / "model.edgekit") as bundle:
        variant = bundle.manifest.variant()
        for name in variant.files:
            (out / Path(name).name).write_bytes(bundle.read(name))
        path = next(
            out / Path(name).name for name in variant.files
            if name.endswith(_SUFFIX[variant.engine])
        )  # fmt: skip
    row: dict[str, Any] = {
        "model": case.name, "format": chosen["format"], "by": "edgekit optimize",
        "what": chosen["id"], "slug": f"{case.name}-edgekit-optimize", "path": str(path),
        "bytes": chosen["size_bytes"], "took_s": round(time.monotonic() - start),
        "confirmed": document["confirmation"], "search": document["search"],
        "lost": [(one["id"], one["metric"], [b["outputs"][-1] for b in one["blame"]])
                 for one in document["candidates"]
                 if one["status"] == "dropped" and not one["repairs"] and one["metric_drop"]],
    }  # fmt: skip
    if chosen["format"] != "ncnn":
        found = bench.evaluated(bench.builder(chosen["format"]), open_model(path))
        row |= {"metric": found["metric"], "drop": found.get("drop", 0.0)}  # the float model itself
    return row


def table(rows: list[dict[str, Any]], max_drop: float) -> str:
    """The fastest first; what loses more than is allowed below a line of its own."""
    lines = ["| made by | metric | lost | latency | kB |", "|---|---|---|---|---|"]
    able = [row for row in rows if "ratio" in row and "metric" in row]
    able.sort(key=lambda row: (row["drop"] > max_drop, row["ratio"]))
    for row in able:
        over = " (over the budget)" if row["drop"] > max_drop else ""
        name = f"{row['by']} {row['what']}, {row['format']}"
        lines.append(
            f"| {f'**{name}**' if 'optimize' in row['by'] else name} | {row['metric']:.4f} | "
            f"{row['drop']:.4f}{over} | {row['ratio']:.2f} ({row['ratio_low']:.2f} to "
            f"{row['ratio_high']:.2f}) | {row['bytes'] / 1e3:.0f} |"
        )
    lines += [
        f"| {row['by']} {row['what']}, {row['format']} | {row['metric']:.4f} | {row['drop']:.4f} | "
        f"not timed: its inputs are int8 | {row['bytes'] / 1e3:.0f} |"
        for row in rows if "metric" in row and "ratio" not in row
    ]  # fmt: skip
    lines += [
        f"| {row['by']} {row['what']}, {row['format']} | fails: {row['error']} | | | |"
        for row in rows if "error" in row
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/quantization"))
    parser.add_argument("--data", type=Path, help="folder of quantization_data.py; else WORK/data")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--max-drop", type=float, default=0.01)
    args = parser.parse_args()
    work = args.work.resolve()
    for name in args.only:
        bench = Bench(prepare(name, (args.data or work / "data").resolve()), work, fresh=False)
        rows = [bench.row(*one) for one in bench.everything(["int8-static"]) if one[1] != "edgekit"]
        try:
            rows.append(optimized(bench, args.max_drop))
        except EdgeKitError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        bench.time(rows)
        last = rows[-1]
        print(f"\n### {name}\n\n{table(rows, args.max_drop)}\n", flush=True)
        print(f"{last['took_s']} s; {last['search']}; confirmed: {last['confirmed']}", flush=True)
        for candidate, metric, blamed in last["lost"]:
            print(f"dropped: {candidate} {metric:.4f}: {', '.join(blamed) or '-'}", flush=True)


if __name__ == "__main__":
    main()
