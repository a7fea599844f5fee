"""Which operators the noise at the outputs comes from: each one quantized alone, the rest float.

Taken on ONNX for all engines: what an operator does to the answers is the network's matter, not the
engine's. `aligned` says what the operators are called in another format; what comes out of it is a
ranking that is always confirmed in the engine itself.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import Artifact
from edgekit.cache import Cache, content_key
from edgekit.compress.calibration import CalibrationSamples, calibration_request
from edgekit.compress.prepare_onnx import float_session, prepare_onnx, save_onnx
from edgekit.data import Dataset
from edgekit.errors import require
from edgekit.graph import Graph

__all__ = ["Ranking", "Sensitivity", "aligned", "noise_of_each", "sensitivities"]

#: samples that the noise is taken from, and groups that operators are put into if there are more
_SAMPLES, _MOST_GROUPS = 16, 96


@dataclass(frozen=True)
class Sensitivity:
    """A group of neighbouring operators (mostly of one), by the names of their first outputs, and
    the noise that quantizing them alone brings to the model's outputs: its power over the
    outputs' own, of the output that suffers most."""

    outputs: tuple[str, ...]
    types: tuple[str, ...]
    noise: float

    @property
    def sqnr_db(self) -> float:
        """The same in decibels; 200 where there is none."""
        return 200.0 if self.noise <= 0 else min(200.0, -10 * float(np.log10(self.noise)))


@dataclass(frozen=True)
class Ranking:
    """Groups of operators, the noisiest first. `model` is the cleaned model they are in."""

    groups: tuple[Sensitivity, ...]
    model: Path

    def left(self, count: int) -> float:
        """The share of the noise that stays when so many groups are float. Infinite noise counts
        as a thousand times all other."""
        noise = np.array([one.noise for one in self.groups])
        finite = np.isfinite(noise)
        noise[~finite] = 1000 * max(float(noise[finite].sum()), 1e-30)
        return float(noise[count:].sum() / max(noise.sum(), 1e-30))


def sensitivities(
    model: Artifact, quantized: Artifact, data: Dataset, indices: NDArray[np.int64],
    *, cache: Cache, limits: sandbox.Limits | None = None,
) -> Ranking:  # fmt: skip
    """The noise of every operator that is quantized in `quantized`.

    `model`: the float ONNX model that `quantized` was made of (int8-static or int16x8).

    Raises:
        EdgeKitError: a model does not run, or crashed.
    """
    picked = indices[:: max(1, len(indices) // _SAMPLES)][:_SAMPLES]
    key = content_key(
        kind="sensitivity", recipe=3, model=model.sha256, quantized=quantized.sha256,
        data=data.sha256, samples=picked.tolist(),
    )  # fmt: skip

    def make(folder: Path) -> None:
        found = sandbox.call(
            "edgekit.compress.sensitivity:noise_of_each",
            {
                "model": str(model.path), "quantized": str(quantized.path),
                "cleaned": str(folder / "model.onnx"),
                "calibration": calibration_request(data, picked, model.inputs, folder),
            },
            limits=limits, what="finding the sensitive operators",
        )  # fmt: skip
        (folder / "noise.json").write_text(json.dumps(found))

    folder = cache.folder(key, make)
    raw = json.loads((folder / "noise.json").read_text())
    found = [Sensitivity(tuple(one), tuple(types), noise) for one, types, noise in raw]
    found.sort(key=lambda one: -one.noise)
    return Ranking(tuple(found), folder / "model.onnx")


def aligned(names: Sequence[str], source: Graph, target: Graph) -> tuple[str, ...]:
    """The operators of `target`, by first output, that do the work of those of `source`.

    Tensors keep their names on most ways; what multiplies matrices is found by the order and the
    number of its multiplications where they do not. What is not found is left out.
    """
    made = {name: one for one in target.operators for name in one.outputs}
    ours = [one for one in source.operators if one.macs]
    theirs = [one for one in target.operators if one.macs and one.outputs]
    matcher = SequenceMatcher(
        None, [one.macs for one in ours], [one.macs for one in theirs], autojunk=False
    )
    partner = {
        ours[a + i].outputs[0]: theirs[b + i].outputs[0]
        for a, b, size in matcher.get_matching_blocks()
        for i in range(size)
    }
    found: dict[str, None] = {}
    for name in names:
        if name in partner:
            found[partner[name]] = None
        elif name in made:
            found[made[name].outputs[0]] = None
    return tuple(found)


# --- runs in a child ------------------------------------------------------------------------------


def noise_of_each(
    model: str, quantized: str, cleaned: str, calibration: dict[str, Any]
) -> list[tuple[list[str], list[str], float]]:
    """Outputs and types of each group of operators, and its noise; writes the cleaned model."""
    onnx = require("onnx", extra="onnx")
    with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
        before = prepare_onnx(model, work, ()).proto
        after = onnx.load(quantized)
        one_by_one = _Alone(onnx, before, after)
        groups = _grouped(one_by_one.candidates())
        samples = [dict(one) for one in CalibrationSamples(calibration)]
        save_onnx(before, cleaned)
        wanted, path = _run(cleaned, samples), str(Path(work) / "model.onnx")
        found = []
        for done, group in enumerate(groups):
            save_onnx(one_by_one.quantized(group), path)
            noise = _noise(wanted, _run(path, samples))
            nodes = [one_by_one.nodes[name] for name in group]
            found.append(([n.output[0] for n in nodes], [n.op_type for n in nodes], noise))
            sandbox.report_progress(done + 1, len(groups))
        return found


def _grouped(names: list[str]) -> list[list[str]]:
    size = -(-len(names) // _MOST_GROUPS) or 1
    return [names[start : start + size] for start in range(0, len(names), size)]


def _run(path: str, samples: Sequence[Mapping[str, Any]]) -> list[list[NDArray[Any]]]:
    """The float outputs of each sample. Nothing is fused, so that 8-bit sums cannot overflow."""
    session = float_session(path)
    names = [one.name for one in session.get_outputs() if one.type == "tensor(float)"]
    return [session.run(names, dict(sample)) for sample in samples]


def _noise(wanted: list[list[NDArray[Any]]], found: list[list[NDArray[Any]]]) -> float:
    """Power of the difference over the power, of the worst output."""
    worst = 0.0
    for outputs in zip(*(zip(a, b, strict=True) for a, b in zip(wanted, found, strict=True)),
                       strict=True):  # fmt: skip
        power = sum(float((one.astype(np.float64) ** 2).sum()) for one, _ in outputs)
        error = sum(float(((one.astype(np.float64) - two) ** 2).sum()) for one, two in outputs)
        worst = max(worst, error / power if power > 0 else 0.0)
    return worst if np.isfinite(worst) else float("inf")


class _Alone:
    """The float model with the rounding of chosen operators, as the quantized model has it."""

    def __init__(self, onnx: Any, before: Any, after: Any) -> None:
        self._onnx, self._before = onnx, before
        self.nodes = {node.name: node for node in before.graph.node}
        self._theirs = {
            node.name: node for node in after.graph.node
            if node.name in self.nodes and node.op_type == self.nodes[node.name].op_type
        }  # fmt: skip
        self._stored = {one.name: one for one in after.graph.initializer}
        self._makers = {name: node for node in after.graph.node for name in node.output}
        self._readers: dict[str, Any] = {}
        for node in after.graph.node:
            if node.op_type == "QuantizeLinear":
                self._readers.setdefault(node.input[0], node)

    def candidates(self) -> list[str]:
        """Nodes that read something rounded, in execution order."""
        return [
            name for name, node in self._theirs.items()
            if next(self._rounded(node), None) is not None
        ]  # fmt: skip

    def _rounded(self, node: Any) -> Iterator[int]:
        for place, name in enumerate(node.input):
            if getattr(self._makers.get(name), "op_type", "") == "DequantizeLinear":
                yield place

    def quantized(self, names: Sequence[str]) -> Any:
        """The model in which only these nodes are quantized."""
        chosen = set(names)
        made = self._onnx.ModelProto()
        made.CopyFrom(self._before)
        nodes = [self._onnx.NodeProto.FromString(n.SerializeToString()) for n in made.graph.node]
        del made.graph.node[:]
        for node in nodes:
            if node.name not in chosen:
                made.graph.node.append(node)
                continue
            theirs = self._theirs[node.name]
            for place in self._rounded(theirs):
                maker = self._makers[theirs.input[place]]
                if maker.input[0] in self._stored:
                    node.input[place] = self._constant(made, maker, f"{node.name}_{place}")
                    continue
                rounding = self._makers[maker.input[0]]
                node.input[place] = self._inserted(
                    made, (rounding, maker), node.input[place], f"{node.name}_{place}"
                )
            rounding = self._readers.get(theirs.output[0])
            if rounding is None:
                made.graph.node.append(node)
                continue
            name, inside = node.output[0], f"{node.name}_before"
            node.output[0] = inside
            made.graph.node.append(node)
            self._inserted(made, (rounding, rounding), inside, f"{node.name}_out", name)
        return made

    def _constant(self, made: Any, maker: Any, name: str) -> str:
        """A DequantizeLinear of a stored tensor, in front of the node."""
        inputs = [self._copied(made, one) for one in maker.input]
        node = self._onnx.NodeProto()
        node.CopyFrom(maker)
        node.name, node.input[:], node.output[:] = f"{name}_dq", inputs, [f"{name}_weights"]
        made.graph.node.append(node)
        return f"{name}_weights"

    def _inserted(
        self, made: Any, like: tuple[Any, Any], value: str, name: str, result: str = ""
    ) -> str:
        """QuantizeLinear and DequantizeLinear as they are there (`like`: the first, and one of the
        two to take scales from)."""
        rounding, scales = like
        inputs = [self._copied(made, one) for one in scales.input[1:]]
        one, two = self._onnx.NodeProto(), self._onnx.NodeProto()
        one.CopyFrom(rounding)
        one.name, one.input[:], one.output[:] = f"{name}_q", [value, *inputs], [f"{name}_integers"]
        two.op_type, two.domain, two.name = "DequantizeLinear", rounding.domain, f"{name}_dq"
        two.attribute.extend(a for a in rounding.attribute if a.name in ("axis", "block_size"))
        result = result or f"{name}_rounded"
        two.input[:], two.output[:] = [f"{name}_integers", *inputs], [result]
        made.graph.node.extend([one, two])
        return result

    def _copied(self, made: Any, name: str) -> str:
        if name not in self._stored:
            return name
        ours = f"{name}_of_quantized"
        if all(one.name != ours for one in made.graph.initializer):
            tensor = self._onnx.TensorProto()
            tensor.CopyFrom(self._stored[name])
            tensor.name = ours
            made.graph.initializer.append(tensor)
        return ours
