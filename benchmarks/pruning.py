"""The bars of pruning, each as rows of a table.

    python benchmarks/pruning.py FOLDER channels zeros latency int8 [--nets plain residual]
    python benchmarks/pruning.py MODEL.onnx TEST.npz CALIBRATION.npz --amounts 0.05 0.1 0.2 [--even]
        [--multiple 16]

`FOLDER` holds the networks of `pruning_nets.py`, `test.npz` and `calib.npz` (`image`, float32
(N, 1, 28, 28), and `labels`). The second line is for any other model.

latency: the networks take images of any size, so both are run on 96x96, where arithmetic and not
calls fills the time, and channels are left in multiples of this machine's vectors, as `--for` does
it. int8: candidates of `edgekit optimize --prune 0.5`, measured alone and interleaved.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.compress.prune import Pruning
from edgekit.convert import convert
from edgekit.errors import EdgeKitError
from edgekit.graph import read_graph
from edgekit.measure.benchmark import Contender, Rounds, measure
from edgekit.measure.statistics import ratio_interval
from edgekit.observer import Diary, Observer
from edgekit.preparation import Request, prepare
from edgekit.profiles import load_profile
from edgekit.pruning import Pruned, PruneRequest, prune_model
from edgekit.sandbox import Limits

NETS = ("plain", "residual", "depthwise", "concat", "squeeze")
#: what the rows of the first table are made by: amount, and how
WAYS = (
    (0.3, Pruning("channels")),
    (0.5, Pruning("channels")),
    (0.5, Pruning("channels", refit=False)),
    (0.5, Pruning("channels", importance="l1", refit=False)),
)
_SIDE = 96
_ALIKE = 0.15


def pruned(model: Path, data: tuple[Path, Path], pruning: Pruning, amount: float) -> Pruned:
    """As `edgekit prune MODEL --amount AMOUNT` does it."""
    return prune_model(
        PruneRequest(
            str(model), replace(pruning, amount=amount), amount=amount, data=str(data[0]),
            calibration=str(data[1]), limits=Limits(timeout_s=7200.0),
        )
    )  # fmt: skip


def row(*cells: object) -> None:
    """One line of a Markdown table."""
    print("| " + " | ".join(str(one) for one in cells) + " |", flush=True)


def points(made: Pruned) -> str:
    """What it lost, in hundredths, with its interval."""
    found = made.evaluation
    span = found.get("drop_interval")
    more = f" ({100 * span[0]:.2f} to {100 * span[1]:.2f})" if span else ""
    return f"{100 * found['drop']:.2f}{more}"


def channels(folder: Path, nets: list[str]) -> None:
    """Points lost by amount and way."""
    data = (folder / "test.npz", folder / "calib.npz")
    for name in nets:
        found = [pruned(folder / f"{name}.onnx", data, way, amount) for amount, way in WAYS]
        parameters = found[0].facts["parameters"][0]
        row(name, f"{parameters:,}", f"{100 * found[0].evaluation['reference']:.2f} %",
            *(points(one) for one in found))  # fmt: skip


def zeros(folder: Path, nets: list[str]) -> None:
    """Points lost and compressed bytes."""
    data = (folder / "test.npz", folder / "calib.npz")
    for name in nets:
        for method, amount in (("n-m", 0.5), ("magnitude", 0.6)):
            made = pruned(folder / f"{name}.onnx", data, Pruning(method), amount)
            row(name, made.pruning.id, points(made), made.before.size_bytes,
                made.facts["deflated_bytes"])  # fmt: skip


def latency(folder: Path, nets: list[str]) -> None:
    """The latency ratio beside the ratio of the MACs, in ONNX Runtime and LiteRT."""
    data, cache = (folder / "test.npz", folder / "calib.npz"), Cache()
    for name in nets:
        for aim in ("macs", "latency"):
            way = Pruning("channels", minimize=aim, multiple=_multiple())
            made = pruned(folder / f"{name}.onnx", data, way, 0.5)
            with tempfile.TemporaryDirectory() as work:
                pair = [_sized(one.path, Path(work) / f"{at}.onnx")
                        for at, one in enumerate((made.before, made.artifact))]  # fmt: skip
                macs = [read_graph(one).macs or 0 for one in pair]
                for engine in ("onnxruntime", "litert"):
                    files = pair
                    if engine == "litert":
                        files = [convert(open_model(one), "tflite", cache=cache).path
                                 for one in pair]  # fmt: skip
                    ratio = _ratio(files, engine, Path(work))
                    share = macs[1] / macs[0]
                    off = ratio[0] / share - 1
                    row(name, aim, engine, f"{share:.3f}", f"{ratio[0]:.3f} ({ratio[1]:.3f} to "
                        f"{ratio[2]:.3f})", f"{100 * off:+.0f} %",
                        "yes" if abs(off) <= _ALIKE else "no")  # fmt: skip


def _multiple() -> int:
    cpu = load_profile("this-machine").cpu
    return max(1, (cpu.simd_bits or 32) // 32) if cpu else 1


def _sized(path: Path, target: Path) -> Path:
    """The same network for one larger image."""
    import onnx

    model = onnx.load(path)
    del model.graph.value_info[:]
    for one, size in zip(
        model.graph.input[0].type.tensor_type.shape.dim, (1, 1, _SIDE, _SIDE), strict=True
    ):
        one.Clear()
        one.dim_value = size
    onnx.save(onnx.shape_inference.infer_shapes(model), target)
    return target


def _ratio(files: list[Path], engine: str, work: Path) -> tuple[float, float, float]:
    found = open_model(files[0]).inputs[0]
    inputs = work / f"{engine}.npz"
    shape = [int(n) for n in found.shape]
    noise = np.random.default_rng(0).random((1, *shape), np.float32)
    np.savez(inputs, allow_pickle=False, **{found.name: noise})
    contenders = [
        Contender(name, file, 1, engine)
        for name, file in zip(("before", "after"), files, strict=True)
    ]
    taken = measure(contenders, "before", inputs=inputs, rounds=Rounds(least=12))
    return ratio_interval(taken["after"].medians_ns, taken["before"].medians_ns)


def int8(folder: Path, nets: list[str], amount: float) -> None:
    """int8 with and without pruning: what each loses, and how many times faster the pruned is."""
    limits = Limits(timeout_s=900)
    for name in nets:
        with tempfile.TemporaryDirectory() as out:
            job = prepare(
                Request(
                    folder / f"{name}.onnx", "this-machine", str(folder / "test.npz"), Path(out),
                    calibration=str(folder / "calib.npz"), prune=(amount,),
                ),
                Diary(Observer()), Cache(),
            )  # fmt: skip
        tried = [one for one in job.plan if not one.skip and one.scheme.id == "int8-static"]
        drops, contenders, builder = {}, [], job.builder
        samples = np.sort(np.concatenate([job.split.selection, job.split.confirmation]))
        builder.evaluate(job.plan[0], job.source, samples, limits, _silent)
        for one in tried:
            made = builder.artifact(one, limits, _silent)
            drops[one.id] = builder.evaluate(one, made, samples, limits, _silent)["drop"]
            contenders.append(Contender(one.id, made.path, 1, one.engine))
        taken = measure(
            contenders, contenders[0].id, inputs=None, rounds=Rounds(least=16, block_s=0.03)
        )
        for one in tried:
            if one.pruning:
                plain = f"{one.engine}-int8-static"
                ratio = ratio_interval(taken[plain].medians_ns, taken[one.id].medians_ns)
                row(name, one.id, f"{100 * drops[plain]:.2f}", f"{100 * drops[one.id]:.2f}",
                    f"{ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})")  # fmt: skip


def _silent(done: int, total: int) -> None:
    del done, total


def frontier(
    model: Path, data: tuple[Path, Path], amounts: list[float], spread: str, multiple: int
) -> None:
    """What is lost by amount; latency of the whole model in ONNX Runtime, one thread."""
    way = Pruning("channels", spread=spread, multiple=multiple)
    for amount in amounts:
        try:
            made = pruned(model, data, way, amount)
        except EdgeKitError as error:
            row(amount, error)
            continue
        before, after = made.facts["macs"]
        ratio = made.facts["latency"].get("ratio", [float("nan")] * 3)
        row(f"{after / before:.3f}", points(made),
            f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("rest", nargs="+")
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.05, 0.1, 0.15, 0.2])
    parser.add_argument("--even", action="store_true")
    parser.add_argument("--multiple", type=int, default=1)
    args = parser.parse_args()
    if args.source.suffix == ".onnx":
        test, calibration = map(Path, args.rest)
        return frontier(
            args.source, (test, calibration), args.amounts, "even" if args.even else "least-loss",
            args.multiple,
        )  # fmt: skip
    tables = {"channels": channels, "zeros": zeros, "latency": latency}
    for word in args.rest:
        print(f"\n{word}", flush=True)
        if word == "int8":
            for amount in args.amounts:
                int8(args.source, args.nets, amount)
        else:
            tables[word](args.source, args.nets)
    return None


if __name__ == "__main__":
    main()
