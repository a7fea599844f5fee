"""Operators of a QDQ model that are to stay float stay so in ONNX Runtime.

Its transformer WeightBiasQuantization (1.19 and newer) rounds the float weights of every Conv,
ConvTranspose and Gemm that reads a DequantizeLinear with one scale, per tensor and in 8 bits: what
a quantizer was told to leave alone is quantized after all when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from edgekit.compress.layers_onnx import readers_of
from edgekit.errors import require

__all__ = ["stay_float"]

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")


def stay_float(model: Any, kept: Collection[str]) -> int:
    """Change the model in place so that operators with float weights compute in float; returns how
    many would not have. `kept`: names of nodes that are to stay float.

    What a float operator makes, a float operator reads as it is, not rounded. What a quantized one
    makes is read through a DequantizeLinear with a scale per channel, all the same: that one ONNX
    Runtime leaves alone.
    """
    graph = _Graph(model)
    freed = 0
    for node in list(model.graph.node):
        weighted = node.op_type in _WEIGHTED and node.input[1] in graph.stored
        if not weighted and node.name not in kept:
            continue
        for place, name in enumerate(node.input):
            rounded = graph.rounded(name)
            if rounded is not None and not graph.fused(rounded):
                node.input[place] = rounded
        if weighted and getattr(graph.makers.get(node.input[0]), "op_type", "") == _ROUNDING[1]:
            freed += graph.scale_per_channel(node)
    graph.sweep()
    return freed


class _Graph:
    def __init__(self, model: Any) -> None:
        self._onnx = require("onnx", extra="onnx")
        self._model, self._graph = model, model.graph
        self.stored = {one.name: one for one in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}

    def rounded(self, name: str) -> str | None:
        """The tensor of which `name` is the rounded value."""
        back = self.makers.get(name)
        if back is None or back.op_type != _ROUNDING[1]:
            return None
        there = self.makers.get(back.input[0])
        if there is None or there.op_type != _ROUNDING[0]:
            return None
        return str(there.input[0])

    def fused(self, name: str) -> bool:
        """Whether what makes the tensor becomes one with the rounding of it."""
        node = self.makers.get(name)
        if node is None:
            return False
        read = [one for one in node.input if one]
        if node.op_type in (*_WEIGHTED, "MatMul"):
            read = read[:2]
        return all(
            getattr(self.makers.get(one), "op_type", "") == _ROUNDING[1]
            for one in read
            if one not in self.stored or node.op_type in _WEIGHTED
        )

    def scale_per_channel(self, node: Any) -> bool:
        """Give the node a DequantizeLinear of its own; False where it has one channel only."""
        onnx, weight = self._onnx, self.stored[node.input[1]]
        attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        axis = 1
        if node.op_type == "Conv":
            channels = weight.dims[1] * attributes.get("group", 1)
        elif node.op_type == "ConvTranspose":
            channels = weight.dims[0]
        else:
            channels = weight.dims[1 if attributes.get("transB") else 0]
            axis = 0 if attributes.get("transA") else 1
        back = self.makers[node.input[0]]
        scale = self.stored.get(back.input[1])
        if channels == 1 or scale is None or scale.dims not in ([], [1]):
            return False
        made = onnx.NodeProto()
        made.CopyFrom(back)
        del made.attribute[:]
        made.attribute.append(onnx.helper.make_attribute("axis", axis))
        made.name, made.output[0] = f"{node.name}_input", f"{node.name}_input"
        for place in range(1, len(back.input)):
            made.input[place] = self._spread(back.input[place], channels)
        node.input[0] = made.output[0]
        self._graph.node.insert(self._place(node), made)
        self.makers[made.output[0]] = made
        return True

    def _spread(self, name: str, count: int) -> str:
        numpy = self._onnx.numpy_helper
        wide = f"{name}_{count}"
        if wide not in self.stored:
            array = numpy.to_array(self.stored[name]).reshape(-1).repeat(count)
            tensor = numpy.from_array(array, wide)
            self._graph.initializer.append(tensor)
            self.stored[wide] = tensor
        return wide

    def _place(self, node: Any) -> int:
        return next(i for i, one in enumerate(self._graph.node) if one.name == node.name)

    def sweep(self) -> None:
        """Take out roundings that nothing reads any more, and their constants."""
        while dead := self._unread():
            for node in dead:
                self._graph.node.remove(node)
        read = self._read()
        for tensor in [one for one in self._graph.initializer if one.name not in read]:
            self._graph.initializer.remove(tensor)

    def _unread(self) -> list[Any]:
        nodes, read = self._graph.node, self._read()
        return [one for one in nodes if one.op_type in _ROUNDING and not read & set(one.output)]

    def _read(self) -> set[str]:
        return {*readers_of(self._model), *(one.name for one in self._graph.output)}
