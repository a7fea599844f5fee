"""An ML program run by PyTorch's operators: what Core ML is not here to say.

It knows the operators of the networks that the tests convert, as
`coremltools/converters/mil/mil/ops/defs` documents them, and refuses others. It reads the file with
coremltools' message classes, the numbers with EdgeKit's reader.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgekit_converters.mlpackage import accounted, read_package
from edgekit_runtime.arrays import read_npz, write_npz

Array = np.ndarray[Any, Any]


def run(folder: str, inputs: str, outputs: str) -> None:
    """In a child: samples `{i}/{input}` of an `.npz` through the program, into another."""
    torch.set_num_threads(1)
    samples: dict[str, dict[str, Array]] = {}
    for key, array in read_npz(Path(inputs)).items():
        index, _, name = key.partition("/")
        samples.setdefault(index, {})[name] = array
    made = {
        f"{index}/{name}": array
        for index, sample in samples.items()
        for name, array in run_program(Path(folder), sample).items()
    }
    write_npz(Path(outputs), made)


def account(folder: str, weights: str) -> dict[str, Any]:
    """In a child: which of the arrays of an `.npz` are in the package."""
    return accounted(read_npz(Path(weights)), read_package(Path(folder))).to_json()


def run_program(folder: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    """The outputs by name."""
    from coremltools.proto import Model_pb2

    found = read_package(folder)
    spec = Model_pb2.Model()
    (main,) = folder.rglob("*.mlmodel")
    spec.ParseFromString(main.read_bytes())
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    values: dict[str, Any] = {name: torch.from_numpy(one) for name, one in inputs.items()}
    for op in block.operations:
        name = op.outputs[0].name
        if op.type == "const":
            known = found.constants.get(name)
            text = op.attributes["val"].immediateValue.tensor.strings.values
            values[name] = text[0] if known is None else torch.from_numpy(np.array(known))
            continue
        given = {key: [values[b.name] for b in one.arguments] for key, one in op.inputs.items()}
        values[name] = _OPERATORS[op.type](
            **{key: one if key == "values" else one[0] for key, one in given.items()}
        )
        shape = [dim.constant.size for dim in op.outputs[0].type.tensorType.dimensions]
        assert list(values[name].shape) == shape, (op.type, name, values[name].shape, shape)
    return {one.name: values[one.name].numpy() for one in found.outputs}


def _padded(x: Any, pad_type: str, pad: Any, kernel: Any, strides: Any, fill: float) -> Any:
    """`same`: as TensorFlow, the odd one at the end; `custom`: as given, begin and end per axis."""
    if pad_type == "valid":
        return x
    around = []
    for axis in reversed(range(x.ndim - 2)):
        if pad_type == "custom":
            around += [int(pad[2 * axis]), int(pad[2 * axis + 1])]
            continue
        size, step, k = x.shape[2 + axis], int(strides[axis]), int(kernel[axis])
        need = max((-(-size // step) - 1) * step + k - size, 0)
        around += [need // 2, need - need // 2]
    return F.pad(x, around, value=fill)


def _conv(x, weight, strides, pad_type, pad, dilations, groups, bias=None):  # type: ignore[no-untyped-def]
    kernel = [(k - 1) * int(d) + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    x = _padded(x, pad_type, pad, kernel, strides, 0.0)
    conv = F.conv1d if x.ndim == 3 else F.conv2d
    return conv(
        x, weight, bias, stride=strides.tolist(), dilation=dilations.tolist(), groups=int(groups)
    )


def _max_pool(x, kernel_sizes, strides, pad_type, pad, ceil_mode):  # type: ignore[no-untyped-def]
    x = _padded(x, pad_type, pad, kernel_sizes, strides, -torch.inf)
    return F.max_pool2d(x, kernel_sizes.tolist(), strides.tolist(), ceil_mode=bool(ceil_mode))


def _avg_pool(  # type: ignore[no-untyped-def]
    x, kernel_sizes, strides, pad_type, pad, exclude_padding_from_average, ceil_mode
):
    def total(one):  # type: ignore[no-untyped-def]
        one = _padded(one, pad_type, pad, kernel_sizes, strides, 0.0)
        kernel, step = kernel_sizes.tolist(), strides.tolist()
        return F.avg_pool2d(one, kernel, step, ceil_mode=bool(ceil_mode))

    return total(x) / total(torch.ones_like(x)) if exclude_padding_from_average else total(x)


def _pad(x, pad, mode, constant_val):  # type: ignore[no-untyped-def]
    pairs = [n for pair in reversed(pad.reshape(-1, 2).tolist()) for n in pair]
    if mode == "constant":
        return F.pad(x, pairs, value=float(constant_val))
    while not any(pairs[-2:]):  # PyTorch reflects the last axes only
        pairs = pairs[:-2]
    return F.pad(x, pairs, mode=mode)


def _slice_by_index(  # type: ignore[no-untyped-def]
    x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None
):
    none = torch.zeros(x.ndim, dtype=torch.bool)
    masks = [none if one is None else one for one in (begin_mask, end_mask, squeeze_mask)]
    steps = [1] * x.ndim if stride is None else stride.tolist()
    where = []
    for axis, (first, last, step) in enumerate(
        zip(begin.tolist(), end.tolist(), steps, strict=True)
    ):
        open_first, open_last, squeezed = (bool(mask[axis]) for mask in masks)
        where.append(
            int(first)
            if squeezed
            else slice(None if open_first else first, None if open_last else last, step)
        )
    return x[tuple(where)]


def _expand_dims(x, axes):  # type: ignore[no-untyped-def]
    for axis in axes.tolist():
        x = x.unsqueeze(axis)
    return x


def _batch_norm(x, mean, variance, gamma, beta, epsilon):  # type: ignore[no-untyped-def]
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def _concat(values, axis, interleave):  # type: ignore[no-untyped-def]
    assert not interleave
    return torch.cat(values, int(axis))


def _matmul(x, y, transpose_x, transpose_y):  # type: ignore[no-untyped-def]
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


_OPERATORS = {
    "conv": _conv, "max_pool": _max_pool, "avg_pool": _avg_pool, "pad": _pad, "matmul": _matmul,
    "relu": lambda x: F.relu(x), "relu6": lambda x: F.relu6(x),
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "add": lambda x, y: x + y, "mul": lambda x, y: x * y,
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes.tolist(), bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
    "softmax": lambda x, axis: F.softmax(x, int(axis)),
    "identity": lambda x: x,
    "slice_by_index": _slice_by_index, "expand_dims": _expand_dims, "batch_norm": _batch_norm,
    "concat": _concat, "stack": lambda values, axis: torch.stack(values, int(axis)),
    "sub": lambda x, y: x - y, "real_div": lambda x, y: x / y, "pow": lambda x, y: x**y,
    "sqrt": lambda x: x.sqrt(), "sigmoid": lambda x: x.sigmoid(), "tanh": lambda x: x.tanh(),
    "log": lambda x, epsilon: (x + epsilon).log(),
    "reduce_sum": lambda x, axes, keep_dims: x.sum(axes.tolist(), bool(keep_dims)),
    "reduce_min": lambda x, axes, keep_dims: x.amin(axes.tolist(), bool(keep_dims)),
    "reduce_max": lambda x, axes, keep_dims: x.amax(axes.tolist(), bool(keep_dims)),
}  # fmt: skip


def save_weights(weights: str, target: str) -> None:
    """In a child: a PyTorch state dict as an `.npz`."""
    state = torch.load(weights, map_location="cpu", weights_only=True)
    write_npz(Path(target), {name: one.numpy() for name, one in state.items()})
