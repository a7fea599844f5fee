"""Random ONNX graphs, legal combinations of the operators that pruning knows."""

import random

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

__all__ = ["BLOCKS", "generated"]


class Builder:
    """Values are (1, C, H, W) until a block changes that; zero stays zero in all of them, but for
    weights and biases, and those of `zeroed` are taken away."""

    def __init__(self, seed: int) -> None:
        self.draw, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.nodes, self.weights, self.count = [], {}, 0

    def weight(self, *shape: int, scale: float | None = None) -> str:
        self.count += 1
        name = f"w{self.count}"
        fan = int(np.prod(shape[1:])) or 1
        self.weights[name] = (self.rng.normal(size=shape) * (scale or fan**-0.5)).astype(np.float32)
        return name

    def ints(self, *values: int) -> str:
        self.count += 1
        self.weights[f"i{self.count}"] = np.array(values, np.int64)
        return f"i{self.count}"

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes) -> str | list[str]:
        self.count += 1
        names = [f"{kind}{self.count}_{n}" for n in range(outputs)]
        self.nodes.append(
            helper.make_node(kind, list(inputs), names, f"{kind}{self.count}", **attributes)
        )
        return names[0] if outputs == 1 else names

    def conv(self, x: str, inner: int, outer: int, size: int = 3, group: int = 1) -> str:
        pad = size // 2
        return self.add(
            "Conv", x, self.weight(outer, inner // group, size, size), self.weight(outer),
            pads=[pad] * 4, group=group,
        )  # fmt: skip


def _plain(b: Builder, x: str, c: int, s: int):
    outer = b.draw.choice([6, 8, 12])
    return b.add(b.draw.choice(["Relu", "LeakyRelu", "Tanh"]), b.conv(x, c, outer)), outer, s


def _depthwise(b: Builder, x: str, c: int, s: int):
    multiple = b.draw.choice([1, 2])
    y = b.add("Relu", b.conv(x, c, c * multiple, group=c))
    return b.conv(y, c * multiple, 8, 1), 8, s


def _grouped(b: Builder, x: str, c: int, s: int):
    y = b.conv(x, c, 12)
    y = b.add("Relu", b.conv(y, 12, 8, group=b.draw.choice([2, 4])))
    return b.conv(y, 8, 6, 1), 6, s


def _residual(b: Builder, x: str, c: int, s: int):
    y = b.conv(b.add("Relu", b.conv(x, c, 10)), 10, c)
    return b.add("Relu", b.add("Add", x, y)), c, s


def _concat(b: Builder, x: str, c: int, s: int):
    parts = [b.conv(x, c, n, k) for n, k in ((4, 1), (5, 3), (3, 3))]
    if b.draw.random() < 0.5:
        parts.append(x)
        return b.add("Concat", *parts, axis=1), 12 + c, s
    return b.add("Concat", *parts, axis=1), 12, s


def _split(b: Builder, x: str, c: int, s: int):
    y = b.conv(x, c, 12)
    one, two, three = b.add("Split", y, b.ints(5, 4, 3), outputs=3, axis=1)
    one = b.conv(one, 5, 4, 1)
    return b.add("Concat", b.add("Mul", one, two), three, axis=1), 7, s


def _slice(b: Builder, x: str, c: int, s: int):
    y = b.conv(x, c, 12)
    low = b.draw.choice([0, 2])
    y = b.add("Slice", y, b.ints(low), b.ints(-1), b.ints(1))
    return y, 11 - low, s


def _pick(b: Builder, x: str, c: int, s: int):
    order = b.rng.permutation(10)[:7]
    return b.add("Gather", b.conv(x, c, 10), b.ints(*map(int, order)), axis=1), 7, s


def _shuffle(b: Builder, x: str, c: int, s: int):
    y = b.add("Reshape", b.conv(x, c, 12), b.ints(1, 3, 4, s, s))
    y = b.add("Transpose", y, perm=[0, 2, 1, 3, 4])
    return b.conv(b.add("Reshape", y, b.ints(1, 12, s, s)), 12, 8, 1), 8, s


def _norm(b: Builder, x: str, c: int, s: int):
    b.weights[var := f"v{b.count}"] = b.rng.uniform(0.5, 2, 8).astype(np.float32)
    y = b.conv(x, c, 8)
    zeros = b.weight(8)
    b.weights[zeros][:] = 0
    kind = b.draw.choice(["BatchNormalization", "InstanceNormalization"])
    more = [zeros, var] if kind[0] == "B" else []
    y = b.add(kind, y, b.weight(8), zeros, *more)
    return b.conv(b.add("Relu", y), 8, 6), 6, s


def _prelu(b: Builder, x: str, c: int, s: int):
    y = b.add("PRelu", b.conv(x, c, 9), b.weight(9, 1, 1))
    return b.add("Mul", y, b.weight(1, 9, 1, 1)), 9, s


def _gate(b: Builder, x: str, c: int, s: int):
    y = b.conv(x, c, 8)
    g = b.add("GlobalAveragePool", y) if b.draw.random() < 0.5 else b.add(
        "ReduceMean", y, axes=[2, 3], keepdims=1
    )  # fmt: skip
    g = b.conv(b.add("Relu", b.conv(g, 8, 4, 1)), 4, 8, 1)
    return b.add("Mul", y, b.add("Sigmoid", g)), 8, s


def _up(b: Builder, x: str, c: int, s: int):
    y = b.add("ConvTranspose", x, b.weight(c, 6, 2, 2), b.weight(6), strides=[2, 2])
    return b.add("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]), 6, s


def _resize(b: Builder, x: str, c: int, s: int):
    y = b.conv(x, c, 7)
    y = b.add("Resize", y, "", "", b.ints(1, 7, 2 * s, 2 * s), mode="nearest")
    return b.add("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2]), 7, s


def _pixels(b: Builder, x: str, c: int, s: int):
    y = b.add("DepthToSpace", b.conv(x, c, 16), blocksize=2, mode=b.draw.choice(["DCR", "CRD"]))
    y = b.add("SpaceToDepth", y, blocksize=2)
    return b.conv(y, 16, 6, 1), 6, s


def _pad(b: Builder, x: str, c: int, s: int):
    y = b.add("Pad", b.conv(x, c, 8), b.ints(0, 0, 1, 1, 0, 0, 1, 1))
    return b.add("Conv", y, b.weight(6, 8, 3, 3)), 6, s


def _softmax(b: Builder, x: str, c: int, s: int):
    """Over the channels: these stay."""
    return b.add("Softmax", b.conv(x, c, 6), axis=1), 6, s


def _attention(b: Builder, x: str, c: int, s: int):
    heads, size, wide = 4, 3, 12
    rows = b.add("Transpose", b.add("Reshape", x, b.ints(1, c, s * s)), perm=[0, 2, 1])

    def made() -> str:
        y = b.add("Add", b.add("MatMul", rows, b.weight(c, wide)), b.weight(wide))
        y = b.add("Reshape", y, b.ints(1, s * s, heads, size))
        return b.add("Transpose", y, perm=[0, 2, 1, 3])

    query, key, value = made(), made(), made()
    scores = b.add("MatMul", query, b.add("Transpose", key, perm=[0, 1, 3, 2]))
    y = b.add("MatMul", b.add("Softmax", scores, axis=-1), value)
    y = b.add("Reshape", b.add("Transpose", y, perm=[0, 2, 1, 3]), b.ints(1, s * s, wide))
    y = b.add("MatMul", y, b.weight(wide, 8))
    y = b.add("Transpose", y, perm=[0, 2, 1])
    return b.add("Reshape", y, b.ints(1, 8, s, s)), 8, s


def _mlp(b: Builder, x: str, c: int, s: int):
    y = b.add("Transpose", x, perm=[0, 2, 3, 1])
    y = b.add("LayerNormalization", y, b.weight(c), b.weight(c), axis=-1)
    y = b.add("Relu", b.add("Add", b.add("MatMul", y, b.weight(c, 14)), b.weight(14)))
    y = b.add("MatMul", y, b.weight(14, c))
    return b.add("Add", x, b.add("Transpose", y, perm=[0, 3, 1, 2])), c, s


BLOCKS = (
    _plain, _depthwise, _grouped, _residual, _concat, _split, _slice, _pick, _shuffle, _norm,
    _prelu, _gate, _up, _resize, _pixels, _pad, _softmax, _attention, _mlp,
)  # fmt: skip


def generated(seed: int) -> ModelProto:
    """Input x (1, 3, 8, 8), a Conv, three to six blocks, a head; output y (1, 5)."""
    b = Builder(seed)
    x, c, s = b.add("Relu", b.conv("x", 3, 8)), 8, 8
    # Each block comes about equally often over seeds.
    blocks = [BLOCKS[seed % len(BLOCKS)], *b.draw.choices(BLOCKS, k=b.draw.randint(2, 5))]
    for block in blocks:
        x, c, s = block(b, x, c, s)
    if b.draw.random() < 0.5:
        x = b.add("Flatten", b.add("GlobalAveragePool", x))
        inner = c
    else:
        x = b.add("Flatten", b.add("MaxPool", x, kernel_shape=[4, 4], strides=[4, 4]))
        inner = c * 4
    x = b.add("Relu", b.add("Gemm", x, b.weight(9, inner), b.weight(9), transB=1))
    b.nodes.append(helper.make_node("Gemm", [x, b.weight(9, 5), b.weight(5)], ["y"], "head"))
    graph = helper.make_graph(
        b.nodes, f"generated{seed}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(array, name) for name, array in b.weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model, full_check=True)
    return model
