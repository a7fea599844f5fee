"""How good the instrument is: does `edgekit compare` tell a difference from none?

    python benchmarks/measurement_quality.py verdicts --trials 60 MODEL... [-o FILE]
    python benchmarks/measurement_quality.py overhead MODEL
    python benchmarks/measurement_quality.py operators MODEL...
    python benchmarks/measurement_quality.py tools MODEL

`verdicts`: per trial a model is compared with itself, with itself 5 % slower and 2 % slower (a
worker that goes on counting after each run), in turn, so that a loaded minute hits all three
alike. `overhead`: what the instrument adds to a run, its memory, the size of 100,000 samples.
`operators`: the sum of a trace's operators against the warm latency. `tools`: the median against
the engine's own tool, interleaved.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from edgekit.measure.compare import duel, verdict
from edgekit.measure.worker import Contender


def slow_worker(share: float, arguments: list[str]) -> int:
    """The runtime's worker whose every run takes `share` longer."""
    from edgekit_runtime import session
    from edgekit_runtime.__main__ import main

    clock, run = time.perf_counter_ns, session.Session.run

    def slower(self: session.Session, inputs: object) -> object:
        start = clock()
        out = run(self, inputs)  # type: ignore[arg-type]
        end = clock()
        until = end + int((end - start) * share)
        while clock() < until:
            pass
        return out

    session.Session.run = slower  # type: ignore[method-assign, assignment]
    return main(arguments)


def verdicts(models: list[Path], trials: int, out: Path | None) -> None:
    wanted = {"same": (0.0, "no difference"), "5 %": (0.05, "slower"), "2 %": (0.02, "slower")}
    rows: list[dict[str, object]] = []
    for trial in range(trials):
        model = models[trial % len(models)]
        for name, (share, right) in wanted.items():
            launcher = (sys.executable, "-P", __file__, "slow-worker", str(share)) if share else ()
            start = time.monotonic()
            found = duel(
                Contender("base", model, 1), Contender("new", model, 1, launcher=launcher),
                seed=trial,
            )  # fmt: skip
            said = verdict(found.latency)
            rows.append(
                {"trial": trial, "planted": name, "model": model.name, "verdict": said,
                 "right": said == right, **found.latency.to_json(), "starts": len(found.ratios),
                 "seconds": round(time.monotonic() - start, 1)}
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    for name, (_, right) in wanted.items():
        ours = [one for one in rows if one["planted"] == name]
        hits = sum(bool(one["right"]) for one in ours)
        print(f"{name}: {right} in {hits} of {len(ours)}")
    if out is not None:
        out.write_text(json.dumps(rows, indent=1))


def main() -> int:
    if sys.argv[1:2] == ["slow-worker"]:
        return slow_worker(float(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("verdicts", "overhead", "operators", "tools"))
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    if args.what == "verdicts":
        verdicts(args.models, args.trials, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
