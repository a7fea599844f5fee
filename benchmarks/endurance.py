"""A session for a long time: memory over a million runs, right answers from many threads, nothing
left behind by loading and closing.

    python benchmarks/endurance.py [--runs 1000000] [--threads 16] [--loads 500] [--engines ...]
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from engine_cases import in_threads
from small_models import SAVERS, linear

from edgekit_runtime import load
from edgekit_runtime.machine import rss_bytes


def rss_growth_bytes(path: Path, runs: int) -> int:
    """Growth of the resident memory from the first tenth to the end."""
    x = np.random.default_rng(0).random((1, 4), np.float32)
    with load(path) as session:
        bound = session.bind()
        for _ in range(runs // 10):
            session.run({"x": x})
            bound()
        gc.collect()
        before = rss_bytes() or 0
        for _ in range(runs - runs // 10):
            session.run({"x": x})
            bound()
        gc.collect()
        return (rss_bytes() or 0) - before


def wrong_answers(path: Path, threads: int, runs: int) -> int:
    """Answers that were not numpy's, over all threads; some by `run`, some by `submit`."""
    wrong = []
    with load(path, intent="throughput") as session:

        def work(number: int) -> None:
            rng = np.random.default_rng(number)
            for turn in range(runs):
                x = rng.random((1 + turn % 3, 4), np.float32)
                found = session.run({"x": x}) if turn % 8 else session.submit({"x": x}).result()
                if not np.allclose(found["y"], linear(x), rtol=1e-4, atol=1e-4):
                    wrong.append(number)

        in_threads(threads, work)
    return len(wrong)


def left_behind(path: Path, loads: int) -> tuple[int, int, int]:
    """Growth of resident bytes, threads and open files over so many loads and closes."""

    def now() -> tuple[int, int, int]:
        gc.collect()
        count = [len(list(Path("/proc/self", name).iterdir())) for name in ("task", "fd")]
        return rss_bytes() or 0, count[0], count[1]

    x = np.zeros((1, 4), np.float32)

    def once() -> None:
        with load(path, threads=2) as session:
            session.run({"x": x})
            session.submit({"x": x}).result()

    for _ in range(loads // 10):
        once()
    before = now()
    for _ in range(loads):
        once()
    after = now()
    return after[0] - before[0], after[1] - before[1], after[2] - before[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--thread-runs", type=int, default=10_000)
    parser.add_argument("--loads", type=int, default=500)
    parser.add_argument("--engines", nargs="*", default=list(SAVERS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        for engine in args.engines:
            path = SAVERS[engine](Path(text), "linear")
            grown = rss_growth_bytes(path, args.runs)
            wrong = wrong_answers(path, args.threads, args.thread_runs)
            rss, threads, files = left_behind(path, args.loads)
            print(
                f"{engine:<12} {args.runs} runs: RSS {grown / 1e6:+.2f} MB; "
                f"{args.threads} x {args.thread_runs} runs: {wrong} wrong; "
                f"{args.loads} loads: RSS {rss / 1e6:+.2f} MB, threads {threads:+d}, "
                f"files {files:+d}",
                flush=True,
            )


if __name__ == "__main__":
    main()
