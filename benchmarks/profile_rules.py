"""What a rule in a device profile changes: one model optimized under each of several rules.

    python benchmarks/profile_rules.py MODEL DATA.npz [--plan-only]

Writes a profile per rule into a temporary folder and prints, for each, the plan's schemes, what was
ruled out with which rule, and what came out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BASE = """schema = "edgekit.device/1"
id = "{id}"
name = "{id}"
kind = "generic"
arch = "{arch}"
[engines.onnxruntime]{engine}
[engines.openvino]{engine}
[engines.litert]{engine}
[engines.ncnn]{engine}
[defaults]
threads = 1
{rules}
[[sources]]
fields = ["engines", "defaults"{fields}]
kind = "choice"
title = "this benchmark"
says = "to show what the rule does"
"""
RULES = {
    "no rule": ("", ""),
    "per tensor only": ("[quantization]\nper_channel = false", ""),
    "int8 activations only": ('[quantization]\nactivations = ["int8"]', ""),
    "reduce_range": ("[quantization]\nreduce_range = true", ""),
    "zero point 0 only": ("[quantization]\nsymmetric = true", ""),
    "static shapes only": ("", "\nstatic_shapes = true"),
}


def profile(folder: Path, rule: str, arch: str) -> Path:
    """The profile of one rule, as a file."""
    rules, engine = RULES[rule]
    name = rule.replace(" ", "-").replace("_", "-")
    file = folder / f"{name}.toml"
    fields = ', "quantization"' if rules else ""
    file.write_text(BASE.format(id=name, arch=arch, engine=engine, rules=rules, fields=fields))
    return file


def edgekit(*arguments: object) -> dict:
    """What `edgekit ... --json` answers; its error ends this script."""
    done = subprocess.run(
        [sys.executable, "-c", "from edgekit.cli import main; main()", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not done.stdout.strip():
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--plan-only", action="store_true")
    options = parser.parse_args()
    arch = edgekit("devices", "show", "this-machine", "--json")["arch"]
    with tempfile.TemporaryDirectory() as folder:
        for rule in RULES:
            file = profile(Path(folder), rule, arch)
            request = ["optimize", options.model, "--for", file, "--data", options.data,
                       "-o", Path(folder) / "out", "--json"]  # fmt: skip
            plan = edgekit(*request, "--dry-run")["candidates"]
            print(f"\n== {rule}")
            for one in plan:
                if one["rule"]:
                    print(f"  {one['id']}: not built: {one['rule']['why']} "
                          f"({one['rule']['field']})")  # fmt: skip
            if options.plan_only:
                continue
            for row in edgekit(*request)["candidates"]:
                if row["rule"] or row["status"] == "skipped":
                    continue
                ratio = f"{row['latency_ratio'][0]:.2f}" if row["latency_ratio"] else "-"
                figure = "-" if row["metric"] is None else f"{row['metric']:.4f}"
                shapes = ", fixed shapes" if row["fixed_shapes"] else ""
                why = f": {row['reason']}" if row["status"] in ("dropped", "failed") else ""
                print(f"  {row['id']:<32} {row['scheme']}{shapes}\n"
                      f"  {'':<32} {figure}  {ratio}x  {row['status']}{why}")  # fmt: skip


if __name__ == "__main__":
    main()
