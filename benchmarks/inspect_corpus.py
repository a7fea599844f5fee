"""Judges every model of a list for every device of the catalogue: no crash, every operator judged.

    python benchmarks/inspect_corpus.py MODEL [MODEL ...]

Each model also goes through the command line once. Prints a line per model: operators, and at how
many of all (operator, place) pairs the verdict is yes, no, or not known.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from edgekit.errors import EdgeKitError
from edgekit.fit import judge
from edgekit.graph import read_graph, with_batch_one
from edgekit.profiles import catalogue_ids, load_profile


def inspect(model: Path, profile: str) -> str:
    """What the command line makes of it: ok, or its one line."""
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", "inspect",
               str(model), "--for", profile, "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Traceback" in done.stderr:
        sys.exit(f"{model}: {done.stderr}")
    if done.returncode == 2:
        return done.stderr.strip().splitlines()[-1].removeprefix("edgekit: ")
    document = json.loads(done.stdout)
    judged = [len(one["places"]) for one in document["fit"]["operators"]]
    assert judged and set(judged) == {len(document["fit"]["places"])}, "an operator is not judged"
    return "ok" if done.returncode == 0 else "does not fit"


def main(paths: list[str]) -> None:
    """Run and print."""
    profiles = [load_profile(one) for one in catalogue_ids()]
    total: Counter[str] = Counter()
    for number, path in enumerate(paths):
        model = Path(path)
        name = "/".join(model.parts[-2:])
        said = inspect(model, profiles[number % len(profiles)].id)
        if said not in ("ok", "does not fit"):
            print(f"{name}: refused: {said}")
            total["refused"] += 1
            continue
        try:
            graph = read_graph(model)
            shapes = with_batch_one(graph.tensors[one] for one in graph.inputs)
            graph = read_graph(model, shapes=shapes) if shapes else graph
        except EdgeKitError as error:
            sys.exit(f"{name}: {error}")
        states: Counter[str] = Counter()
        unfit = 0
        for profile in profiles:
            fit = judge(graph, profile)
            unfit += bool(fit.hopeless)
            for place in fit.places:
                verdicts = fit.verdicts[place.id]
                assert len(verdicts) == len(graph.operators), name
                states.update(one.state for one in verdicts)
        total["models"] += 1
        total["operators"] += len(graph.operators)
        total.update(states)
        pairs = ", ".join(f"{state} {count}" for state, count in sorted(states.items()))
        print(f"{name}: {len(graph.operators)} operators; {pairs}; fits {len(profiles) - unfit} "
              f"of {len(profiles)} devices", flush=True)  # fmt: skip
    print(dict(total))


if __name__ == "__main__":
    main(sys.argv[1:])
