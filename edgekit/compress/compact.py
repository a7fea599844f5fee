"""Takes out of quantized models what only makes the file larger: names, copies, white space."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

__all__ = ["compact_ir", "compact_onnx"]


def compact_onnx(model: Any, source_names: set[str]) -> None:
    """Give tensors and nodes that the quantizer added short names, store equal constants once, and
    drop the types of tensors inside, which loading finds again; in place.

    Quantizers name what they add after what it is added to: on a net from Keras a fifth of the
    file. `source_names`: tensors that were there before, which keep their names.
    """
    graph = model.graph
    fixed = {one.name for one in (*graph.input, *graph.output)} | _names_inside(graph) | {""}
    same = _shared(graph, fixed)
    known = source_names | fixed
    added = [name for name in dict.fromkeys(_tensors(graph)) if name not in known]
    short = {name: f"q{number}" for number, name in enumerate(added)}
    called = short | {name: short.get(other, other) for name, other in same.items()}
    for tensor in graph.initializer:
        tensor.name = called.get(tensor.name, tensor.name)
    for place, node in enumerate(graph.node):
        node.input[:] = [called.get(name, name) for name in node.input]
        node.output[:] = [called.get(name, name) for name in node.output]
        if "Quantize" in node.op_type:
            node.name = f"q{place}"
    del graph.value_info[:]


def _shared(graph: Any, fixed: set[str]) -> dict[str, str]:
    """Drops constants that are there already; what they are called instead."""
    first: dict[bytes, str] = {}
    called: dict[str, str] = {}
    copies = []
    for place, tensor in enumerate(graph.initializer):
        name = tensor.name
        tensor.ClearField("name")
        key = sha256(tensor.SerializeToString()).digest()
        tensor.name = name
        if not tensor.external_data and name not in fixed and key in first:
            called[name] = first[key]
            copies.append(place)
        else:
            first.setdefault(key, name)
    for place in reversed(copies):
        del graph.initializer[place]
    return called


def _tensors(graph: Any) -> Iterator[str]:
    for tensor in graph.initializer:
        yield tensor.name
    for node in graph.node:
        yield from node.output


def _names_inside(graph: Any) -> set[str]:
    """What the bodies of If, Loop and Scan may read by name."""
    found: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                found |= {name for one in body.node for name in one.input} | _names_inside(body)
    return found


def compact_ir(path: Path) -> None:
    """Write an IR's XML without white space, the quantizer's diary, and shapes inside, which
    OpenVINO infers again from those of the model's inputs."""
    tree = ElementTree.parse(path)  # noqa: S314  (as above)
    root = tree.getroot()
    for element in root.iter():
        element.text = element.text if element.text and element.text.strip() else None
        element.tail = None
    for place in ("input", "output"):
        for port in root.findall(f"layers/layer/{place}/port"):
            for size in port.findall("dim"):
                port.remove(size)
    for info in root.findall("rt_info"):
        for diary in info.findall("nncf"):
            info.remove(diary)
    tree.write(path, encoding="utf-8", xml_declaration=True)
