"""Lines of text for PP-OCR recognition, drawn with PIL, and the share that is read as it is.

    python benchmarks/ocr_lines.py DATA.npz [--lines 400] [--seed 0]
    edgekit optimize rec.onnx --data DATA.npz --metric benchmarks/ocr_lines.py:exact ...

The words are those of Python's own manual. A line is 48 pixels high and padded to 320; its label is
its letters as Unicode code points, padded with 0. `exact` needs no other file: the alphabet of the
model is read from `EDGEKIT_OCR_MODEL`, its `character` metadata.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HEIGHT, _WIDTH, _LONGEST = 48, 320, 32


def drawn(text: str, size: int) -> NDArray[np.float32]:
    """A line as (3, 48, 320), black on white, -1 to 1; to the right of it 0, as PaddleOCR pads."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (int(right - left) + 12, int(bottom - top) + 12), 255)
    ImageDraw.Draw(image).text((6 - left, 6 - top), text, fill=0, font=font)
    width = min(_WIDTH, round(image.width * _HEIGHT / image.height))
    pixels = np.asarray(image.resize((width, _HEIGHT), Image.Resampling.BILINEAR), np.float32)
    line = np.zeros((3, _HEIGHT, _WIDTH), np.float32)
    line[:, :, :width] = pixels / 127.5 - 1
    return line


def lines(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images (count, 3, 48, 320) and labels (count, 32)."""
    from pydoc_data.topics import topics

    words = re.findall(r"[A-Za-z]{2,12}[,.]?|[0-9]{1,4}", " ".join(topics.values()))
    draw = np.random.default_rng(seed)
    images, labels = [], np.zeros((count, _LONGEST), np.int64)
    for label in labels:
        start = int(draw.integers(len(words) - 4))
        text = " ".join(words[start : start + int(draw.integers(2, 4))])[:24].strip()
        label[: len(text)] = [ord(letter) for letter in text]
        images.append(drawn(text, int(draw.integers(24, 44))))
    return np.stack(images), labels


@cache
def _alphabet() -> str:
    import onnxruntime

    session = onnxruntime.InferenceSession(os.environ["EDGEKIT_OCR_MODEL"])
    letters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    return "\0" + "".join(letters) + " "


def exact(outputs: Mapping[str, NDArray[np.float32]], labels: NDArray[np.int64]) -> float:
    """The share of lines read without a mistake, spaces aside: best path, repeats and blanks
    dropped."""
    right = 0
    for scores, label in zip(next(iter(outputs.values())), labels, strict=True):
        best = scores.argmax(-1)
        kept = best[(best != 0) & (best != np.concatenate(([0], best[:-1])))]
        read = "".join(_alphabet()[i] for i in kept)
        wanted = "".join(chr(letter) for letter in label if letter)
        right += read.replace(" ", "") == wanted.replace(" ", "")
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--lines", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, labels = lines(args.lines, args.seed)
    np.savez(args.out, x=images, labels=labels)


if __name__ == "__main__":
    main()
