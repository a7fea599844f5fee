"""What 7-bit weights win back on a CPU without VNNI, on trained networks.

    python benchmarks/saturation.py FOLDER [NAME ...]

x86 CPUs without VNNI multiply 8-bit numbers with VPMADDUBSW: two products of an unsigned and a
signed byte are summed and clipped to 16 bits. 255 * (127 + 127) does not fit; 255 * (64 + 64) does,
and that is what `reduce_range` of a device profile is for. Here such a CPU is emulated, whatever
this one is: the matrices of a quantized ONNX model are multiplied in numpy, with exact sums and
with sums clipped so; other operators run one by one in ONNX Runtime. Beside it what ONNX Runtime
really gives on this CPU. Networks and samples are those of `quantization_data.py`.

Pairs are those of ONNX Runtime's kernels: neighbours in (height, width, channel) of a filter's
terms, in the order of its columns of a matrix. Depthwise convolutions are exact, as there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from quantization_data import prepare

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.compress.quantize import quantize
from edgekit.compress.quantizers import fitted, quantizer_for
from edgekit.compress.scheme import Scheme
from edgekit.conversion import convert_with_proof
from edgekit.data import open_dataset
from edgekit.device import Quantization
from edgekit.facts import this_machine
from edgekit.profiles import load_profile

__all__ = ["Emulation", "PairSums"]

Array = NDArray[Any]

_BATCH = 50
_LEAST, _MOST = -32768, 32767


@dataclass
class PairSums:
    """Multiplies matrices of bytes; `clipped` counts the pair sums that did not fit, of `total`."""

    saturating: bool
    clipped: int = 0
    total: int = 0

    def product(self, a: NDArray[np.uint8], b: NDArray[np.int8]) -> NDArray[np.int64]:
        """uint8 (M, K) times int8 (K, N)."""
        exact = np.rint(a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
        self.total += len(a) * ((len(b) + 1) // 2) * b.shape[1]
        if not self.saturating:
            return exact
        for k in range(0, len(b) - 1, 2):
            self._clip_pair(exact, a[:, k : k + 2].astype(np.int64), b[k : k + 2].astype(np.int64))
        return exact

    def _clip_pair(self, exact: Array, a: Array, b: Array) -> None:
        """Take off what clipping takes off; only where sums can be too great at all."""
        columns = np.flatnonzero(255 * np.abs(b).sum(axis=0) > _MOST)
        if not len(columns):
            return
        reach = np.abs(b[:, columns]).max(axis=1)
        rows = np.flatnonzero(a @ reach > _MOST)
        sums = a[rows] @ b[:, columns]
        off = np.clip(sums, _LEAST, _MOST) - sums
        self.clipped += int(np.count_nonzero(off))
        exact[np.ix_(rows, columns)] += off


@dataclass(frozen=True)
class _Bytes:
    """What a DequantizeLinear read."""

    values: Array
    scale: Array
    zero: Array


@dataclass
class Emulation:
    """A quantized model (QDQ), its matrices multiplied by `sums`."""

    model: Any
    sums: PairSums
    _sessions: dict[int, Any] = field(default_factory=dict)

    def run(self, given: dict[str, Array]) -> list[Array]:
        """The outputs."""
        known = {one.name: numpy_helper.to_array(one) for one in self.model.graph.initializer}
        known |= given
        stored: dict[str, _Bytes] = {}
        for place, node in enumerate(self.model.graph.node):
            if node.op_type == "DequantizeLinear":
                values, scale = known[node.input[0]], known[node.input[1]]
                zero = known.get(node.input[2]) if len(node.input) > 2 else None
                stored[node.output[0]] = _Bytes(
                    values, scale, np.zeros_like(scale, values.dtype) if zero is None else zero
                )
            pair = [stored[name] for name in node.input[:2] if name in stored]
            if node.op_type in _PRODUCTS and len(pair) == 2:
                made = _PRODUCTS[node.op_type](self.sums, node, *pair)
                if len(node.input) > 2:
                    bias = known[node.input[2]]
                    made += bias.reshape(-1, *[1] * (made.ndim - 2)) if made.ndim > 2 else bias
                known[node.output[0]] = made
            else:
                known |= self._elsewhere(place, node, known)
        return [known[one.name] for one in self.model.graph.output]

    def _elsewhere(self, place: int, node: Any, known: dict[str, Array]) -> dict[str, Array]:
        """One operator in ONNX Runtime."""
        feeds = {name: known[name] for name in node.input if name}
        if place not in self._sessions:
            types = [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(array.dtype), None
                )
                for name, array in feeds.items()
            ]
            outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
            graph = helper.make_graph([node], "one", types, outputs)
            one = helper.make_model(
                graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
            )
            self._sessions[place] = _session(one.SerializeToString())
        session = self._sessions[place]
        names = [one.name for one in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))


def _session(model: bytes | Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _unsigned(one: _Bytes) -> tuple[NDArray[np.uint8], int]:
    """Activations and their zero point; signed ones are moved by 128, as the kernels do."""
    if one.values.dtype == np.uint8:
        return one.values, int(one.zero)
    return (one.values.astype(np.int16) + 128).astype(np.uint8), int(one.zero) + 128


def _matrix(sums: PairSums, node: Any, left: _Bytes, right: _Bytes) -> Array:
    settings = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    weights = right.values.T if settings.get("transB") else right.values
    values, zero = _unsigned(left)
    flat = values.reshape(-1, values.shape[-1])
    made = sums.product(flat, np.ascontiguousarray(weights))
    made -= zero * weights.astype(np.int64).sum(axis=0)
    scaled = made * (np.float64(left.scale) * right.scale.astype(np.float64))
    return scaled.astype(np.float32).reshape(*values.shape[:-1], -1)


def _convolution(sums: PairSums, node: Any, left: _Bytes, right: _Bytes) -> Array:
    settings = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    values, zero = _unsigned(left)
    weights, kernel = right.values, right.values.shape[2:]
    rank, groups = len(kernel), settings.get("group", 1)
    pads = settings.get("pads", [0] * 2 * rank)
    strides = settings.get("strides", [1] * rank)
    dilations = settings.get("dilations", [1] * rank)
    if settings.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise SystemExit(f"{node.name}: auto_pad is not emulated")
    sides = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    padded = np.pad(values, sides, constant_values=zero)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, tuple(range(2, 2 + rank)))
    steps = [slice(None, None, one) for one in (*strides, *dilations)]
    windows = windows[(slice(None), slice(None), *steps)]
    windows = np.moveaxis(windows, 1, -1)  # (batch, *places, *kernel, channels)
    places = windows.shape[: 1 + rank]
    parts = []
    exact = groups == values.shape[1] > 1
    counting = PairSums(False) if exact else sums
    for part in range(groups):
        width, count = weights.shape[1], len(weights) // groups
        columns = np.ascontiguousarray(windows[..., part * width : (part + 1) * width])
        filters = np.moveaxis(weights[part * count : (part + 1) * count], 1, -1)
        filters = np.ascontiguousarray(filters.reshape(count, -1).T)
        made = counting.product(columns.reshape(-1, len(filters)), filters)
        parts.append(made - zero * filters.astype(np.int64).sum(axis=0))
    scaled = np.concatenate(parts, axis=1) * (
        np.float64(left.scale) * right.scale.astype(np.float64)
    )
    return np.moveaxis(scaled.astype(np.float32).reshape(*places, -1), -1, 1)


_PRODUCTS = {"Conv": _convolution, "Gemm": _matrix, "MatMul": _matrix}


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One model computed in one way. noise: mean squared difference from the float outputs, over
    their mean square."""

    what: str
    right: float
    noise: float
    answers: Array
    clipped: float = 0.0


def _rows(path: Path, given: Array, labels: Array, name: str, wanted: Array) -> Iterator[_Row]:
    """Exact sums, clipped sums, and ONNX Runtime here."""
    model = onnx.load(path)
    for saturating in (False, True):
        sums = PairSums(saturating)
        emulation = Emulation(model, sums)
        made = [emulation.run({name: part})[0] for part in _batches(given)]
        what = "sums clipped" if saturating else "exact sums"
        yield _row(what, np.concatenate(made), labels, wanted, sums.clipped / max(1, sums.total))
    session = _session(path)
    made = [session.run(None, {name: part})[0] for part in _batches(given)]
    yield _row("ONNX Runtime here", np.concatenate(made), labels, wanted)


def _row(what: str, made: Array, labels: Array, wanted: Array, clipped: float = 0.0) -> _Row:
    answers = made.reshape(len(labels), -1).argmax(1)
    noise = float(np.mean((made - wanted) ** 2.0) / np.mean(wanted**2.0))
    return _Row(what, float(np.mean(answers == labels)) * 100, noise, answers, clipped)


def _batches(given: Array) -> Iterator[Array]:
    for start in range(0, len(given), _BATCH):
        yield given[start : start + _BATCH]


def compare(name: str, folder: Path, rules: Quantization, count: int) -> None:
    """Print the table of one network."""
    case, cache = prepare(name, folder), Cache(folder / "saturation-cache")
    came = open_model(case.model, reading=case.reading)
    source = convert_with_proof(came, "onnx", cache=cache).artifact
    spare = open_dataset(case.calibration, source.inputs, cache)
    (spec,) = source.inputs
    with np.load(case.test) as archive:
        given, labels = archive[spec.name][:count], archive["labels"][:count]
    session = _session(source.path)
    wanted = np.concatenate([session.run(None, {spec.name: part})[0] for part in _batches(given)])
    print(f"\n{name}: {len(labels)} samples, labels from {case.labels}\n")
    print("| weights | computed | top-1 % | noise dB | same answer as exact | sums clipped % |")
    print("|---|---|---|---|---|---|")
    top = _row("", wanted, labels, wanted)
    print(f"| float | ONNX Runtime here | {top.right:.2f} | | | |")
    found: dict[tuple[int, str], _Row] = {}
    tool = quantizer_for(Scheme("int8-static"), "onnx")
    for bits, obeyed in ((8, Quantization()), (7, rules)):
        scheme = fitted(Scheme("int8-static"), tool, obeyed)
        if scheme.reduce_range != (bits == 7):
            raise SystemExit("the profile does not ask for reduce_range")
        calibration = np.arange(min(spare.count, 200))
        made = quantize(source, scheme, spare, calibration, cache=cache)
        for row in _rows(made.path, given, labels, spec.name, wanted):
            found[bits, row.what] = row
            same = float(np.mean(row.answers == found[bits, "exact sums"].answers)) * 100
            print(
                f"| {bits} bits | {row.what} | {row.right:.2f} | {_db(row.noise):.1f} "
                f"| {same:.2f} | {'' if 'here' in row.what else f'{row.clipped * 100:.4f}'} |"
            )
    _recovered(found)


def _db(noise: float) -> float:
    return float(10 * np.log10(max(noise, 1e-30)))


def _recovered(found: dict[tuple[int, str], _Row]) -> None:
    exact, lost, won = found[8, "exact sums"], found[8, "sums clipped"], found[7, "sums clipped"]
    clipped = found[7, "sums clipped"].clipped
    print(f"\n7 bits: {clipped * 100:.4f} % of the pair sums are clipped")
    for what, best, worst, now in (
        ("top-1", exact.right, lost.right, won.right),
        ("noise", -exact.noise, -lost.noise, -won.noise),
    ):
        if best - worst <= 0:
            print(f"{what}: clipping loses nothing")
        else:
            share = (now - worst) / (best - worst) * 100
            print(f"{what}: {share:.1f} % of what clipping loses is recovered")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=["fashion", "digits", "vww", "cifar"])
    parser.add_argument("--profile", default="generic-x86-64")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    rules = load_profile(args.profile).quantization
    has = "no VNNI" if this_machine().quantization.reduce_range else "VNNI"
    print(f"profile {args.profile}; this CPU has {has}; ONNX Runtime {ort.__version__}")
    for name in args.names:
        compare(name, args.folder.resolve(), rules, args.samples)


if __name__ == "__main__":
    main()
