"""What the native runner costs over ONNX Runtime's C API called plainly, on this machine.

`native_overhead.c` makes its tensors once and calls `Run`; the runner's worker does what it always
does: looks at the inputs' names, types and shapes, copies them, runs, names the outputs. Both are
processes with the same library, one model, one thread; rounds of calls are interleaved in random
order, and ratio and difference are of the two medians of a round. Both are started anew several
times, since a process keeps the luck of its memory layout. The bar: at most 2 % or 20 us.

    python benchmarks/native_overhead.py MODEL.onnx ... [--rounds 40] [--starts 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from edgekit.deploy.capsule import native_headers, native_runner
from edgekit.measure.statistics import median_interval

_ROUND_NS = 100e6
BAR_RATIO, BAR_NS = 1.02, 20_000


def library() -> Path:
    """The C library of the onnxruntime that is installed."""
    import onnxruntime

    (found,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    return found


def plain_program(folder: Path) -> Path:
    """`native_overhead.c`, built."""
    made = folder / "plain"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(
        ["cc", "-O2", "-Wall", "-isystem", str(native_headers()), str(source), "-o", str(made),
         "-ldl"], check=True,
    )  # fmt: skip
    return made


class Contender:
    """A process that times calls of a model on request."""

    def __init__(self, command: list[str], *, plain: bool) -> None:
        self._plain = plain
        environment = {"EDGEKIT_ONNXRUNTIME": str(library())}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if not plain:
            json.loads(self._line())

    def median_ns(self, count: int) -> float:
        """Of so many calls, after a tenth of them untimed."""
        request: object = f"{count} {count // 10}"
        if not self._plain:
            request = json.dumps({"cmd": "sample", "count": count, "untimed": count // 10})
        assert self._process.stdin is not None
        print(request, file=self._process.stdin, flush=True)
        line = self._line()
        samples = map(int, line.split()) if self._plain else json.loads(line)["samples"]
        return statistics.median(samples)

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a process ended")
        return line


def compare(model: Path, plain: Path, rounds: int, starts: int) -> tuple[list[float], list[float]]:
    """Medians in nanoseconds, round by round: plain, and the runner's."""
    medians: tuple[list[float], list[float]] = ([], [])
    for _ in range(starts):
        both = (
            Contender([str(plain), str(library()), str(model), "1"], plain=True),
            Contender([str(native_runner(platform.machine())), "worker", str(model)], plain=False),
        )
        once = max(one.median_ns(5) for one in both)
        count = max(5, min(20_000, int(_ROUND_NS / once)))
        for _ in range(rounds):
            for which in random.sample((0, 1), 2):
                medians[which].append(both[which].median_ns(count))
        for one in both:
            one.close()
    return medians


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--starts", type=int, default=5)
    given = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        program = plain_program(Path(folder))
        for model in given.models:
            plain, ours = compare(model, program, given.rounds, given.starts)
            ratio, low, high = median_interval([b / a for a, b in zip(plain, ours, strict=True)])
            more = statistics.median(b - a for a, b in zip(plain, ours, strict=True))
            met = ratio <= BAR_RATIO or more <= BAR_NS
            missed += not met
            print(
                f"{model.name}: plain {statistics.median(plain) / 1e3:.1f} us, ratio {ratio:.4f} "
                f"({low:.4f} to {high:.4f}), {more / 1e3:+.2f} us: {'met' if met else 'MISSED'}",
                flush=True,
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
