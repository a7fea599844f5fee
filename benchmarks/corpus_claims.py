"""What the converters promise, each as a check on real models that prints its figure.

References are not ours: the package's own file, scikit-learn, ONNX Runtime, labels of photographs
and digits, a fault we put in ourselves.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from corpus import MODELS, SILABS_REFUSED, TARGETS, Ready, Sentences, by_name, imagenet
from corpus_cell import Cell, convert_cell, words
from numpy.typing import NDArray
from store import mnist

from edgekit.artifact import Artifact, open_model
from edgekit.cache import Cache
from edgekit.execute import run_samples

__all__ = ["CLAIMS", "Claim", "Desk"]


@dataclass(frozen=True)
class Claim:
    """A promise, the figure that was measured, and whether it is kept."""

    text: str
    figure: str
    holds: bool

    def __str__(self) -> str:
        return f"MUST {self.text}: {self.figure}" + ("" if self.holds else "  <-- DOES NOT HOLD")


@dataclass(frozen=True)
class Desk:
    """A folder to work in, and what claims ask of the matrix: `cell(model, format)`."""

    folder: Path
    cell: Callable[[str, str], Cell]
    _ready: dict[str, Ready] = field(default_factory=dict)
    _made: dict[tuple[str, str], Artifact] = field(default_factory=dict)

    def model(self, name: str) -> Ready:
        """A model of the corpus, put on disk once."""
        if name not in self._ready:
            folder = self.folder / name.replace("/", "-").replace(" ", "-")
            folder.mkdir()
            self._ready[name] = by_name(name).prepare(folder)
        return self._ready[name]

    def converted(self, name: str, target: str) -> Artifact:
        """A model of the corpus after what `edgekit convert` does.

        Raises:
            RuntimeError: it did not work; the message is the command's.
        """
        if (name, target) not in self._made:
            cache = Cache(self.folder / "cache")
            cell, found = convert_cell(by_name(name), self.model(name), target, cache)
            if found is None or not found.passed:
                raise RuntimeError(f"{cell.command}: {words(cell)}")
            self._made[name, target] = found.artifact
        return self._made[name, target]

    def edgekit(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """The command line, with a cache of its own."""
        return self.python("from edgekit.cli import main; main()", *arguments)

    def python(self, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Another Python, so that frameworks stay out of this process."""
        return subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", code, *map(str, arguments)],
            env={**os.environ, "EDGEKIT_CACHE": str(self.folder / "cache")}, text=True,
            capture_output=True, check=False, cwd=self.folder,
        )  # fmt: skip


def _run(artifact: Artifact, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The first output for each input array, through `edgekit_runtime.load` in a child."""
    name, output = artifact.inputs[0].name, artifact.outputs[0].name
    return [one[output] for one in run_samples(artifact, [{name: array} for array in arrays])]


def _onnx(path: Path, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """ONNX Runtime itself."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path))
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


# --- silabs -------------------------------------------------------------------------------------

_BOUND = 1e-4


def silabs(desk: Desk) -> Iterator[Claim]:
    """17 Keras-2 files: as they are, repaired, or refused by the layer's name."""
    names = [one.name for one in MODELS if one.name.startswith("silabs/") and ".h5" in one.name]
    loaded = [name for name in names if name not in SILABS_REFUSED]
    cells = {name: [desk.cell(name, to) for to in ("onnx", "tflite", "openvino")] for name in names}
    repaired = [n for n in loaded if any("groups" in note for c in cells[n] for note in c.notes)]
    figure = f"{len(loaded) - len(repaired)} as they are, {len(repaired)} repaired"
    refused = [n for n in SILABS_REFUSED if all(c.as_expected() for c in cells[n])]
    yield Claim(
        "silabs: at least 12 of 17 .h5 load, 5 by dropping groups; the others are refused by name",
        f"{figure}, {len(refused)} refused ({', '.join(SILABS_REFUSED[n] for n in refused)})",
        len(loaded) >= 12 and len(repaired) == 5 and len(refused) == len(names) - len(loaded),
    )
    for place, target in enumerate(("ONNX", "TFLite", "IR")):
        mine = [cells[name][place] for name in loaded]
        good = [c for c in mine if c.outcome == "same" and (c.relative or 0) <= _BOUND]
        worst = max((c.relative or 0 for c in good), default=math.nan)
        bad = ", ".join(c.model for c in mine if c not in good)
        yield Claim(
            f"silabs .h5 -> {target} within 1e-4",
            f"{len(good)} of {len(mine)}, worst {worst:.1e}" + (f"; not: {bad}" if bad else ""),
            len(good) == len(mine) >= 12,
        )


# --- basic-pitch --------------------------------------------------------------------------------

#: the package's inference.py: what the outputs of its .onnx are
_NOTE_ONSET_CONTOUR = {
    "note": "StatefulPartitionedCall:1", "onset": "StatefulPartitionedCall:2",
    "contour": "StatefulPartitionedCall:0",
}  # fmt: skip


def basic_pitch(desk: Desk) -> Iterator[Claim]:
    """The same network in three formats: ours against the authors' ONNX file.

    On quiet noise. The network takes the logarithm of what is nearly nothing, so on a clean chord
    ONNX Runtime differs from itself by 2e-4, with and without its optimizations.
    """
    sound = (0.1 * np.random.default_rng(0).normal(size=(1, 43844, 1))).astype(np.float32)
    theirs = _onnx(Path(desk.model("basic-pitch.onnx").model), {"serving_default_input_2:0": sound})
    for name in ("basic-pitch SavedModel", "basic-pitch.tflite"):
        made = desk.converted(name, "onnx")
        ours = _onnx(made.path, {made.inputs[0].name: sound})
        errors = [
            float(np.abs(ours[what if what in ours else number] - theirs[number]).max())
            for what, number in _NOTE_ONSET_CONTOUR.items()
        ]
        yield Claim(
            f"{name} -> ONNX agrees with the package's own ONNX to 1e-4",
            f"greatest difference {max(errors):.1e} (note, onset, contour)", max(errors) <= _BOUND,
        )  # fmt: skip


# --- top-1 --------------------------------------------------------------------------------------


def _photo(path: Path) -> NDArray[np.float32]:
    """As EfficientNet is evaluated: 224/256 of the short side, bicubic; (x - 127) / 128, NCHW."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    width, height = image.size
    side = int(224 / 256 * min(width, height))
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), np.float32)
    return ((pixels.transpose(2, 0, 1)[None] - 127) / 128).astype(np.float32)


def efficientnet(desk: Desk) -> Iterator[Claim]:
    """Photographs of ImageNet, in every format."""
    photos = imagenet(desk.folder)
    images, labels = [_photo(path) for path, _ in photos], [label for _, label in photos]
    for target in TARGETS:
        made = desk.converted("efficientnet-lite0.py", target)
        right = sum(
            int(row.argmax()) == label
            for row, label in zip(_run(made, images), labels, strict=True)
        )
        yield Claim(
            f"EfficientNet-Lite0 (PyTorch) -> {target}: top-1 18 of foolbox's 20", str(right),
            right == 18,
        )  # fmt: skip


def digits(desk: Desk) -> Iterator[Claim]:
    """500 digits: every format chooses what PyTorch chooses."""
    images, labels = mnist()
    pick = np.random.default_rng(0).permutation(len(images))[:500]
    samples = [images[index : index + 1] for index in pick]
    ready = desk.model("digits.py")
    torch = [int(one.argmax()) for one in _run(open_model(ready.model, reading=ready.reading),
                                               samples)]  # fmt: skip
    right = sum(a == b for a, b in zip(torch, labels[pick], strict=True))
    found = {
        target: [int(one.argmax()) for one in _run(desk.converted("digits.py", target), samples)]
        for target in TARGETS
    }
    equal = {to: sum(a == b for a, b in zip(torch, one, strict=True)) for to, one in found.items()}
    yield Claim(
        "digit-recognizer (PyTorch): top-1 on 500 MNIST digits is PyTorch's in every format",
        ", ".join(f"{to} {count}/500" for to, count in equal.items()) + f"; PyTorch {right} right",
        set(equal.values()) == {500},
    )


# --- scikit-learn -------------------------------------------------------------------------------

_PROBABILITIES = """
import sys, json
import joblib, numpy as np

texts = json.load(open(sys.argv[2]))
np.save(sys.argv[3], joblib.load(sys.argv[1]).predict_proba(texts))
"""


def profanity(desk: Desk) -> Iterator[Claim]:
    """Text in, probabilities out; scikit-learn itself is the reference."""
    texts = Sentences.make(300, seed=1)
    (desk.folder / "texts.json").write_text(json.dumps(texts))
    ready = desk.model("profanity.joblib")
    wanted = desk.folder / "probabilities.npy"
    done = desk.python(_PROBABILITIES, ready.model, desk.folder / "texts.json", wanted)
    assert done.returncode == 0, done.stderr
    made = desk.converted("profanity.joblib", "onnx")
    name = next(one.name for one in made.outputs if "prob" in one.name)
    shape = (-1, 1) if len(made.inputs[0].shape) == 2 else (-1,)
    rows = _onnx(made.path, {made.inputs[0].name: np.array(texts, object).reshape(shape)})[name]
    off = float(np.abs(rows - np.load(wanted)).max())
    yield Claim(
        "alt-profanity-check pipeline -> ONNX: text in, the probabilities of scikit-learn to 1e-5",
        f"greatest difference {off:.1e} on {len(texts)} sentences", off <= 1e-5,
    )  # fmt: skip


# --- live export --------------------------------------------------------------------------------

_LIVE_KERAS = """
import keras
import edgekit

keras.utils.set_random_seed(1)
layers = keras.layers
image = layers.Input((24, 24, 3), name="image")
x = layers.Conv2D(8, 3, padding="same", use_bias=False)(image)
x = layers.BatchNormalization(moving_mean_initializer="random_normal")(x)
x = layers.DepthwiseConv2D(3, strides=2, activation="relu6")(x)
x = layers.GlobalAveragePooling2D()(x)
net = keras.Model(image, layers.Dense(5, activation="softmax", name="scores")(x))
net.save("live.keras")
edgekit.export(net, to="live-keras.onnx")
"""
_LIVE_TORCH = """
import torch
import edgekit
from {module} import factory

net, example = factory()
net.load_state_dict(torch.load({weights!r}, weights_only=True))
net.eval()
example = example.repeat(2, 1, 1, 1)
free = ({{0: torch.export.Dim("batch")}},)
torch.export.save(torch.export.export(net, (example,), dynamic_shapes=free), "live.pt2")
edgekit.export(net, example_inputs=torch.rand(4, 1, 28, 28), to="live-torch.onnx")
"""


def live_keras(desk: Desk) -> Iterator[Claim]:
    """`edgekit.export` at the end of a Keras script, and `edgekit convert` of what it saved."""
    yield _live(desk, "Keras", _LIVE_KERAS, "live.keras", (2, 24, 24, 3))


def live_torch(desk: Desk) -> Iterator[Claim]:
    """The same for PyTorch."""
    ready = desk.model("digits.py")
    code = Path(ready.model.removesuffix(":factory"))
    script = _LIVE_TORCH.format(module=code.stem, weights=str(ready.reading.weights))
    script = f"import sys\nsys.path.insert(0, {str(code.parent)!r})\n{script}"
    yield _live(desk, "PyTorch", script, "live.pt2", (2, 1, 28, 28))


def _live(desk: Desk, framework: str, script: str, saved: str, shape: tuple[int, ...]) -> Claim:
    text = f"{framework}: exported live and from its file gives identical ONNX outputs"
    live, file = (desk.folder / f"{way}-{framework.lower()}.onnx" for way in ("live", "file"))
    live = live.with_name(live.name.replace("pytorch", "torch"))
    for done in (
        desk.python(script),
        desk.edgekit("convert", desk.folder / saved, "--to", "onnx", "-o", file),
    ):
        if done.returncode:
            return Claim(text, done.stderr.strip().splitlines()[-1], False)
    found = []
    for path in (live, file):
        name = open_model(path).inputs[0].name
        array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        found.append(_onnx(path, {name: array}))
    same = [np.array_equal(found[0][name], array) for name, array in found[1].items()]
    figure = f"{sum(same)} of {len(same)} outputs identical ({', '.join(found[1])})"
    return Claim(text, figure, list(found[0]) == list(found[1]) and all(same))


# --- refusals and faults ------------------------------------------------------------------------

_STRINGS = """
import sys
import tensorflow as tf

class Net(tf.Module):
    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(tf.random.stateless_normal((192, 3), (1, 2)))

    @tf.function(input_signature=[tf.TensorSpec([], tf.string, "jpeg")])
    def __call__(self, jpeg):
        image = tf.image.resize(tf.io.decode_jpeg(jpeg, channels=3), (8, 8)) / 255.0
        return {"scores": tf.reshape(image, (1, 192)) @ self.kernel}

net = Net()
tf.saved_model.save(net, sys.argv[1], signatures=net.__call__)
"""


def string_input(desk: Desk) -> Iterator[Claim]:
    """A SavedModel that decodes JPEG is refused, and told what is possible."""
    folder = desk.folder / "strings"
    made = desk.python(_STRINGS, folder)
    assert made.returncode == 0, made.stderr
    done = desk.edgekit("convert", folder, "--to", "onnx", "-o", desk.folder / "strings.onnx")
    said = (done.stderr.strip().splitlines() or [""])[-1]
    yield Claim(
        "a SavedModel with a string input is refused with the reason", f"exit {done.returncode}, "
        f"{said.replace(str(desk.folder) + '/', '')!r}",
        done.returncode == 2 and "jpeg" in said and "string" in said,
    )  # fmt: skip


_PLANTED = 49


def _deep_net(path: Path, *, fault: bool) -> str:
    """100 operators in residual blocks; the fault: one weight of the convolution in the middle.
    Returns that one's name."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, here, skip, faulty = [], [], "image", "image", ""
    for number in range(99):
        kind = ("Conv", "Relu", "Add")[number % 3]
        inputs, more = [here], {}
        if kind == "Conv":
            kernel = rng.normal(size=(8, 8, 3, 3)).astype(np.float32) / np.float32(12)
            if number >= _PLANTED and not faulty:
                faulty = f"block{number // 3}/conv"
                kernel[3, 5, 1, 1] += 0.5 if fault else 0.0
            weights.append(numpy_helper.from_array(kernel, f"weight{number}"))
            inputs, more = [here, f"weight{number}"], {"pads": [1, 1, 1, 1]}
        elif kind == "Add":
            inputs, skip = [here, skip], f"t{number}"
        here = f"t{number}"
        name = f"block{number // 3}/{kind.lower()}"
        nodes.append(helper.make_node(kind, inputs, [here], name=name, **more))
    nodes.append(helper.make_node("GlobalAveragePool", [here], ["scores"], name="pool"))
    graph = helper.make_graph(
        nodes, "deep",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 8, 16, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 8, 1, 1])], weights,
    )  # fmt: skip
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return faulty


def planted_fault(desk: Desk) -> Iterator[Claim]:
    """A wrong weight in the middle of 100 operators is found by name, in ONNX and in what becomes
    of it in OpenVINO."""
    right, wrong = desk.folder / "right.onnx", desk.folder / "wrong.onnx"
    planted = _deep_net(right, fault=False)
    _deep_net(wrong, fault=True)
    done = desk.edgekit("convert", wrong, "--to", "openvino", "-o", desk.folder / "wrong.xml")
    assert done.returncode == 0, done.stderr
    for candidate in (wrong, desk.folder / "wrong.xml"):
        done = desk.edgekit("check", right, candidate, "--json")
        found = json.loads(done.stdout)["divergence"] if done.stdout else None
        where = found or {"node": done.stderr.strip()[-300:], "runs": math.inf}
        yield Claim(
            f"a fault planted in a graph of 100 nodes is found by name ({candidate.suffix})",
            f"planted in {planted}, found in {where['node']} after {where['runs']} runs",
            done.returncode == 1 and planted in where["node"]
            and where["runs"] <= math.log2(100) + 2,
        )  # fmt: skip


CLAIMS: dict[str, Callable[[Desk], Iterator[Claim]]] = {
    "silabs": silabs, "basic-pitch": basic_pitch, "efficientnet": efficientnet, "digits": digits,
    "profanity": profanity, "live-keras": live_keras, "live-torch": live_torch,
    "string-input": string_input, "planted-fault": planted_fault,
}  # fmt: skip
