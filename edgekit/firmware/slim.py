"""Leaves out of a TFLite file what a firmware does not read: it lies in flash as it is."""

from __future__ import annotations

from edgekit.tflite_file import read_tflite, write_tflite

__all__ = ["slimmed"]

#: what TensorFlow Lite Micro and the Ethos-U driver look for in the file's metadata
_READ = (b"OfflineMemoryAllocation", b"vela_version")


def slimmed(content: bytes) -> bytes:
    """The model without names of inner tensors, ranges that quantization came from, and notes."""
    model = read_tflite(content)
    model.description = None
    for graph in model.subgraphs:
        ports = {int(at) for at in (*graph.inputs, *graph.outputs)}
        for place, tensor in enumerate(graph.tensors):
            if place not in ports:
                tensor.name = None
            if tensor.quantization is not None:
                tensor.quantization.min = tensor.quantization.max = None
    model.metadata = [one for one in model.metadata or () if one.name in _READ] or None
    kept = {0, *(int(t.buffer) for g in model.subgraphs for t in g.tensors)}
    kept |= {int(one.buffer) for one in model.metadata or ()}
    order = sorted(kept)
    new = {old: place for place, old in enumerate(order)}
    model.buffers = [model.buffers[at] for at in order]
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.buffer = new[int(tensor.buffer)]
    for one in model.metadata or ():
        one.buffer = new[int(one.buffer)]
    return write_tflite(model)
