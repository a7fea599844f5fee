"""Preprocessing against torch, TensorFlow, SciPy, Pillow, magika's own code and plain loops."""

import io
import itertools
import os
import struct
import sys
import tomllib
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store import fetch_wheel

from edgekit_runtime.errors import InputError, MissingToolError, UsageError
from edgekit_runtime.preprocess import SOURCES, Preprocess

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (45, 64, 3), dtype=np.uint8)
few = settings(deadline=None, max_examples=60)


def run(source: str, raw: Any, *steps: dict[str, Any]) -> np.ndarray:
    return Preprocess(source, steps)(raw)


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal in dtype, shape and every bit."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_array_equal(found, wanted)


def torch_image(image: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1)[None].copy())


def from_torch(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.numpy()[0].transpose(1, 2, 0)
    return found


# --- what is written wrong ------------------------------------------------------------------------

RESIZE = {"op": "resize", "size": 8}
LOG_MEL = {"op": "log-mel", "rate": 16000, "fft": 512, "frame": 400, "hop": 160, "mels": 40}
HEAD_TAIL = {"op": "head-tail", "head": 8, "tail": 8, "block": 16}
TO_CHW = {"op": "layout", "to": "CHW"}
NEEDED = {"resize": RESIZE, "log-mel": LOG_MEL, "head-tail": HEAD_TAIL}

# source, op and its options as in TOML (besides those in NEEDED), and what the message says
MISTAKES = """
image decode mode = "rgb" -> has mode = 'rgb'; wanted one of RGB, L
image decode rate = 16000 -> has the unknown option 'rate'; known: mode
audio decode rate = 0 -> has rate = 0; wanted an integer, 1 to
audio decode rate = 16000.0 -> has rate = 16000.0; wanted an integer
audio decode rate = true -> has rate = True; wanted an integer
audio decode resample = 1 -> has resample = 1; wanted true or false
audio decode resample = true -> has resample = true, but no rate
text decode mode = "ascii" -> has mode = 'ascii'; wanted one of utf-8, codepoints, string
bytes decode mode = "RGB" -> has the unknown option 'mode'; known: none
array decode mode = "RGB" -> has the unknown option 'mode'; known: none
bytes resize -> is for an image (H, W, C), and the sample is none
audio layout to = "CHW" -> is for an image, and the sample is none
image resize size = 0 -> has size = 0; wanted [height, width] or one integer, 1 to 65535
image resize size = [1, 2, 3] -> has size = [1, 2, 3]; wanted [height, width]
image resize size = [8] -> has size = [8]; wanted
image resize size = [] -> has size = []; wanted
image resize size = "8" -> has size = '8'; wanted
image resize size = 65536 -> has size = 65536; wanted
image resize size = true -> has size = True; wanted
image resize size = [1, 1.5] -> has size = [1, 1.5]; wanted
image resize method = "lanczos" -> wanted one of bilinear, bicubic, area, nearest
image resize method = ["area"] -> has method = ['area']; wanted one of
image resize antialias = "yes" -> has antialias = 'yes'; wanted true or false
image resize {method = "area", antialias = true} -> has antialias = true, which area does not know
image resize mode = "x" -> has the unknown option 'mode'; known: size, method, antialias
image center-crop -> has no size; wanted [height, width]
image letterbox -> has no size; wanted
image letterbox {size = 8, fill = "gray"} -> has fill = 'gray'; wanted a finite number
image letterbox {size = 8, fill = inf} -> has fill = inf; wanted a finite number
image letterbox {size = 8, method = 1} -> has method = 1; wanted one of
image letterbox {size = 8, method = "nearest", antialias = true} -> which nearest does not know
image color -> has no to; wanted one of RGB, BGR, gray
image color to = "bgr" -> has to = 'bgr'; wanted one of
image layout to = "CWH" -> has to = 'CWH'; wanted one of NCHW, NHWC, CHW, HWC
image normalize scale = nan -> has scale = nan; wanted a finite number, or a list
image normalize mean = [] -> has mean = []; wanted
image normalize mean = [1, "x", 3] -> has mean = [1, 'x', 3]; wanted
image normalize mean = 1e39 -> has mean = 1e+39; wanted a finite number
image normalize std = 0 -> has std = 0; wanted numbers above 0
image normalize std = [1, 0, 1] -> has std = [1, 0, 1]; wanted numbers above 0
image normalize std = 1e-60 -> has std = 1e-60; wanted numbers above 0
image normalize mean = [1, 2] -> has a list of 2, the image has 3 channels
array normalize {mean = [1, 2], std = [1, 1, 1]} -> has lists of different lengths: [2, 3]
array normalize axis = 9 -> has axis = 9; wanted an integer, -8 to 7
array cast -> has no dtype; wanted one of float32
array cast dtype = "complex64" -> has dtype = 'complex64'; wanted one of
array quantize dtype = "int8" -> has no scale; wanted a number above 0
array quantize scale = 1 -> has no dtype; wanted one of int8, uint8, int16
array quantize {scale = 0, dtype = "int8"} -> has scale = 0; wanted a number above 0
array quantize {scale = 1e-50, dtype = "int8"} -> has scale = 1e-50; wanted a number above 0
array quantize {scale = 1, dtype = "int8", zero_point = 128} -> zero_point = 128, which int8 cannot
array quantize {scale = 1, dtype = "int8", zero_point = 0.0} -> zero_point = 0.0; wanted an integer
array quantize {scale = 1, dtype = "int32"} -> has dtype = 'int32'; wanted one of
array pad -> has no length; wanted an integer, 1 to
array pad length = 1000000000 -> has length = 1000000000; wanted an integer
array pad {length = 4, value = "0"} -> has value = '0'; wanted a finite number
array pad {length = 4, side = "top"} -> has side = 'top'; wanted one of right, left
array pad {length = 4, axis = 1.5} -> has axis = 1.5; wanted an integer
array truncate length = 0 -> has length = 0; wanted an integer
array truncate {length = 4, side = "both"} -> has side = 'both'; wanted one of
array truncate {length = 4, axis = "0"} -> has axis = '0'; wanted an integer
array reshape -> has no shape; wanted a list of sizes
array reshape shape = [-1, -1] -> has shape = [-1, -1]; wanted a list of sizes, one of them
array reshape shape = [0] -> has shape = [0]; wanted
array reshape shape = 4 -> has shape = 4; wanted
array expand -> has no axis; wanted an integer
bytes head-tail head = -1 -> has head = -1; wanted an integer, 0 to
bytes head-tail tail = "x" -> has tail = 'x'; wanted
bytes head-tail block = 4 -> has block = 4; wanted at least head and tail
bytes head-tail {head = 0, tail = 0} -> has head = 0 and tail = 0
bytes head-tail strip = "yes" -> has strip = 'yes'; wanted true or false
bytes head-tail {pad = 256, dtype = "uint8"} -> has 256 for filling, which uint8 cannot hold
bytes head-tail pad = 1.5 -> has pad = 1.5; wanted an integer
bytes head-tail dtype = "int8" -> has dtype = 'int8'; wanted one of
image head-tail -> is for a sample of one axis (n,), not for an image
image frame {length = 4, hop = 2} -> is for a sample of one axis
array frame hop = 1 -> has no length; wanted an integer
array frame {length = 1, hop = 0} -> has hop = 0; wanted an integer
image log-mel -> is for a sample of one axis (n,), not for an image
audio log-mel rate = 0 -> has rate = 0; wanted an integer
audio log-mel fft = "x" -> has fft = 'x'; wanted an integer
audio log-mel frame = 513 -> has frame = 513; wanted at most fft = 512
audio log-mel hop = 0 -> has hop = 0; wanted
audio log-mel fft = 1000000 -> has fft = 1000000, mels = 40: more than
audio log-mel mels = 0 -> has mels = 0; wanted
audio log-mel fmin = -1 -> has fmin = -1, fmax = 8000.0; wanted 0 to rate / 2
audio log-mel fmax = 8001 -> has fmin = 0.0, fmax = 8001; wanted 0 to rate / 2
audio log-mel {fmin = 4000, fmax = 4000} -> has fmin = 4000, fmax = 4000; wanted
audio log-mel window = "blackman" -> has window = 'blackman'; wanted one of hann, hamming
audio log-mel power = 2.0 -> has power = 2.0; wanted one of 1, 2
audio log-mel scale = "mel" -> has scale = 'mel'; wanted one of htk, slaney
audio log-mel triangles = "bark" -> has triangles = 'bark'; wanted one of mel, hz
audio log-mel norm = 2 -> has norm = 2; wanted one of none, slaney
audio log-mel log = "e" -> has log = 'e'; wanted one of ln, log10, db, none
audio log-mel offset = 0 -> has offset = 0; wanted a number above 0
audio log-mel center = 0 -> has center = 0; wanted true or false
"""


def refused(call: Callable[[], object], says: str, kind: type[Exception] = UsageError) -> None:
    """One line, and of that type."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", MISTAKES.strip().splitlines())
def test_a_wrong_option_is_named(line: str) -> None:
    written, says = line.split(" -> ")
    source, op, toml = f"{written} ".split(" ", 2)
    options = tomllib.loads(f"step = {toml}" if toml[:1] == "{" else toml)
    step = {**NEEDED.get(op, {}), "op": op, **options.get("step", options)}
    refused(lambda: Preprocess(source, [step]), says)
    with pytest.raises(UsageError, match=rf"^step 1 \({op}\) "):
        Preprocess(source, [step])


@pytest.mark.parametrize(
    ("source", "steps", "says"),
    [
        ("video", [], "no source 'video'; known: image, audio, bytes, text, array"),
        (None, [], "no source None"),
        ("image", "resize", "the steps are 'resize'; wanted a list"),
        ("image", {"op": "resize"}, "wanted a list"),
        ("image", ["resize"], "step 1 is no table"),
        ("image", [{}], "step 1 has the unknown op None; known ops: resize, center-crop"),
        ("image", [{"op": ["resize"]}], "step 1 has the unknown op ['resize']"),
        ("image", [RESIZE, {"op": "tokens"}], "step 2 has the unknown op 'tokens'; known ops:"),
        ("image", [RESIZE, {"op": "decode"}], "the step decode can only be the first"),
        ("image", [{"op": "decode"}, {"op": "x"}], "step 2 has the unknown op"),
        ("image", [TO_CHW, RESIZE], "step 2 (resize) is for an image (H, W, C), and the sample is"),
        ("array", [{"op": "expand", "axis": 0}, RESIZE], "step 2 (resize) is for an image"),
        ("audio", [{"op": "decode", "rate": 8000}, LOG_MEL], "has rate = 16000, the step decode"),
    ],
)
def test_wrong_steps_are_named(source: Any, steps: Any, says: str) -> None:
    refused(lambda: Preprocess(source, steps), says)


def test_numbers_too_long_to_print() -> None:
    refused(lambda: Preprocess("image", [{"op": "resize", "size": 10**5000}]), "a very long int")
    refused(lambda: Preprocess(10**5000, []), "no source a very long int")  # type: ignore[arg-type]


def test_lists_must_fit_the_channels_known_by_then() -> None:
    step = {"op": "normalize", "mean": [1, 2, 3]}
    for first, says in (
        ({"op": "expand", "axis": 0}, "step 2 (normalize) has a list; after reshape or expand"),
        ({"op": "color", "to": "gray"}, "has a list of 3, the image has 1 channels"),
        ({"op": "decode", "mode": "L"}, "has a list of 3, the image has 1 channels"),
    ):
        refused(lambda first=first: Preprocess("image", [first, step]), says)


def test_it_says_what_it_does() -> None:
    steps = [
        {"op": "resize", "size": [256, 256], "method": "bilinear"},
        {"op": "center-crop", "size": 224},
        {"op": "normalize", "mean": [1, 2, 3]},
        {"op": "layout", "to": "NCHW"},
    ]
    wanted = "image -> resize 256x256 bilinear -> center-crop 224 -> normalize -> layout NCHW"
    assert str(Preprocess("image", steps)) == wanted
    assert [str(Preprocess(source, [])) for source in SOURCES] == list(SOURCES)


# --- what every pipeline promises -----------------------------------------------------------------


def test_the_result_is_contiguous_and_the_callers_own() -> None:
    for steps in ([], [{"op": "color", "to": "BGR"}], [TO_CHW], [{"op": "reshape", "shape": [-1]}]):
        raw = PHOTO.copy()
        pipeline = Preprocess("image", steps)
        first, second = pipeline(raw), pipeline(raw)
        assert first.flags.c_contiguous
        assert first.flags.writeable
        assert not np.shares_memory(first, raw)
        assert first.tobytes() == second.tobytes()
        first[...] = 7
        same(raw, PHOTO)


def test_no_step_changes_the_raw_array() -> None:
    raw = RNG.random((6, 6, 3), np.float32)
    kept = raw.copy()
    for step in (
        RESIZE, {"op": "normalize", "mean": 1}, {"op": "cast", "dtype": "float32"}, TO_CHW,
        {"op": "quantize", "scale": 1, "dtype": "int8"}, {"op": "color", "to": "gray"},
        {"op": "resize", "size": 6}, {"op": "letterbox", "size": 9}, {"op": "pad", "length": 3},
    ):  # fmt: skip
        found = run("array", raw, step)
        found += 1
        same(raw, kept)


def test_a_path_its_bytes_and_the_array_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    for raw in (b"abc", tmp_path / "a.bin", np.frombuffer(b"abc", np.uint8)):
        same(run("bytes", raw), np.array([97, 98, 99], np.uint8))


@pytest.mark.parametrize(
    ("source", "raw", "says"),
    [
        ("image", "photo.jpg", "the image is a str; wanted bytes, a pathlib.Path or uint8"),
        ("audio", 3, "the audio is a int; wanted"),
        ("bytes", None, "the bytes is a NoneType; wanted"),
        ("text", np.zeros(3), "the text is a ndarray; wanted a str, bytes or a pathlib.Path"),
        ("array", b"x", "the array is a bytes; wanted an array"),
        ("array", Path("x.npy"), "x.npy is a PosixPath; wanted an array"),
        ("image", Path("missing.jpg"), "missing.jpg is not a file"),
        ("image", Path(), ". is not a file"),
        ("bytes", Path("/dev/zero"), "/dev/zero is not a file"),
        ("image", np.zeros((4, 4, 3), np.float32), "is float32 [4, 4, 3]; wanted bytes"),
        (
            "image",
            np.zeros((4, 4), np.uint8),
            "is uint8 [4, 4]; wanted bytes, a pathlib.Path or uint8",
        ),
        ("image", np.zeros((4, 4, 4), np.uint8), "is uint8 [4, 4, 4]"),
        ("image", np.zeros((0, 4, 3), np.uint8), "is uint8 [0, 4, 3]"),
        ("image", np.zeros((1, 70000, 3), np.uint8), "has 70000 x 1 pixels; wanted"),
        ("audio", np.zeros(4, np.float64), "is float64 [4]; wanted bytes, a pathlib.Path or"),
        ("audio", np.zeros((4, 1), np.float32), "is float32 [4, 1]"),
        ("bytes", np.zeros(4, np.int8), "is int8 [4]; wanted"),
        ("array", np.zeros(4, complex), "is complex128 [4]; wanted"),
    ],
)
def test_what_is_no_sample_is_refused(source: str, raw: Any, says: str) -> None:
    refused(lambda: Preprocess(source, [])(raw), says, InputError)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file"):
        run("bytes", tmp_path / "pipe")


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate((1 << 28) + 1)  # holes: takes no space
    with pytest.raises(InputError, match="is longer than 268435456 bytes"):
        run("bytes", tmp_path / "big")
    found = run("bytes", tmp_path / "big", {**HEAD_TAIL, "pad": 256})
    same(found, np.zeros(16, np.int32))


FEW = np.zeros((2, 400))
NAN = np.array([np.nan], np.float32)
HUGE = np.array([2.0**63])


@pytest.mark.parametrize(
    ("source", "raw", "op", "options", "says"),
    [
        ("array", np.zeros(4, "f4"), "resize", RESIZE, "got the shape [4]; wanted (height,"),
        (
            "array",
            np.zeros((4, 4, 3), "i4"),
            "resize",
            RESIZE,
            "got int32; wanted uint8 or float32",
        ),
        ("array", np.zeros((0, 4, 3), "u1"), "resize", RESIZE, "got the shape [0, 4, 3]"),
        ("array", np.zeros((4, 4, 1), "u1"), "color", {"to": "BGR"}, "wanted (height, width, 3)"),
        ("array", np.zeros((4, 4), "u1"), "layout", TO_CHW, "got the shape [4, 4]; wanted HWC"),
        ("image", PHOTO, "center-crop", {"size": 46}, "cannot cut 46 x 46 pixels out of 64 x 45"),
        ("image", PHOTO[:1], "resize", {"size": 60000}, "has 3840000 x 60000 pixels"),
        (
            "image",
            PHOTO,
            "letterbox",
            {"size": 70, "fill": 300},
            "has 300 for filling, which uint8",
        ),
        (
            "image",
            PHOTO,
            "letterbox",
            {"size": 70, "fill": 0.5},
            "has 0.5 for filling, which uint8",
        ),
        (
            "array",
            FEW,
            "normalize",
            {"mean": [1, 2, 3]},
            "list of 3, got the shape [2, 400], axis -1",
        ),
        (
            "array",
            FEW,
            "normalize",
            {"mean": [1], "axis": 3},
            "has axis = 3, got the shape [2, 400]",
        ),
        ("array", np.array(["a"]), "normalize", {"mean": 1}, "failed: could not convert string"),
        ("array", NAN, "quantize", {"scale": 1, "dtype": "int8"}, "got NaN"),
        ("array", NAN, "cast", {"dtype": "int32"}, "got nan to nan; int32 cannot"),
        (
            "array",
            np.array([-np.inf]),
            "cast",
            {"dtype": "int64"},
            "got -inf to -inf; int64 cannot",
        ),
        ("array", HUGE, "cast", {"dtype": "int64"}, "int64 cannot"),
        ("array", np.float32([2**31]), "cast", {"dtype": "int32"}, "int32 cannot"),
        ("array", np.array([-1, 3]), "cast", {"dtype": "uint8"}, "got -1 to 3; uint8 cannot"),
        ("bytes", b"ab", "pad", {"length": 4, "value": 256}, "has 256 for filling, which uint8"),
        ("bytes", b"ab", "pad", {"length": 4, "axis": 1}, "has axis = 1, got the shape [2]"),
        ("text", "ab", "pad", {"length": 4, "value": -1}, "has -1 for filling, which uint8"),
        ("array", FEW, "pad", {"length": 1 << 26}, "would make 134217728 values: too many"),
        ("bytes", b"ab", "truncate", {"length": 1, "axis": -2}, "has axis = -2, got the shape [2]"),
        ("bytes", b"ab", "reshape", {"shape": [3]}, "failed: cannot reshape array of size 2"),
        ("bytes", b"ab", "expand", {"axis": 5}, "failed: axis 5 is out of bounds"),
        ("array", FEW, "head-tail", HEAD_TAIL, "got float64 [2, 400]; wanted uint8 (n,)"),
        ("bytes", b"ab", "frame", {"length": 3, "hop": 1}, "got 2 samples, one frame has 3: pad"),
        ("array", FEW, "frame", {"length": 1, "hop": 1}, "got the shape [2, 400]; wanted (n,)"),
        ("array", np.zeros(1 << 20), "frame", {"length": 1 << 19, "hop": 1}, "too many"),
        ("audio", np.zeros(399, "f4"), "log-mel", LOG_MEL, "got 399 samples, one frame has 400"),
        ("audio", np.zeros(256, "f4"), "log-mel", {**LOG_MEL, "center": True}, "more than 256"),
        ("audio", NAN, "log-mel", LOG_MEL, "got NaN or Inf"),
        ("array", FEW, "log-mel", LOG_MEL, "got float64 [2, 400]; wanted (n,)"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(
    source: str, raw: Any, op: str, options: dict[str, Any], says: str
) -> None:
    pipeline = Preprocess(source, [{"op": op, **options}])
    refused(lambda: pipeline(raw), says, InputError)
    with pytest.raises(InputError, match=rf"^step 1 \({op}\) "):
        pipeline(raw)


# --- decoding images ------------------------------------------------------------------------------


def encoded(image: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    from PIL import Image

    made = Image.fromarray(image if image.shape[-1] != 1 else image[..., 0])
    made = made.convert(mode) if mode else made
    buffer = io.BytesIO()
    made.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.needs("PIL")
@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_images_come_back(kind: str) -> None:
    same(run("image", encoded(PHOTO, kind)), PHOTO)


@pytest.mark.needs("PIL")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_what_pillow_makes_of_them(mode: str) -> None:
    from PIL import Image

    data = encoded(PHOTO, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG", mode)
    with Image.open(io.BytesIO(data)) as opened:
        rgb, gray = np.array(opened.convert("RGB")), np.array(opened.convert("L"))
    same(run("image", data), rgb)
    same(run("image", data, {"op": "decode", "mode": "L"}), gray[..., None])


@pytest.mark.needs("PIL")
def test_a_palette_with_transparency_does_not_warn() -> None:
    data = encoded(PHOTO, "PNG", "P", transparency=bytes(range(256)))
    assert run("image", data).shape == PHOTO.shape


@pytest.mark.needs("PIL")
def test_jpeg_is_what_pillow_decodes(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(PHOTO, "JPEG", quality=90))
    with Image.open(path) as opened:
        same(run("image", path), np.array(opened))


@pytest.mark.needs("PIL")
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_pillows(orientation: int, kind: str) -> None:
    from PIL import Image, ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PHOTO, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        turned = ImageOps.exif_transpose(opened)
        same(run("image", data), np.array(turned))


@pytest.mark.needs("PIL")
def test_sixteen_bits_are_refused_not_clipped() -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(buffer, "PNG")
    with pytest.raises(InputError, match="has the mode I;16; wanted 8 bits a channel"):
        run("image", buffer.getvalue())


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is that large and has hardly any data."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.needs("PIL")
@pytest.mark.parametrize(
    ("width", "height", "says"),
    [
        (8193, 8192, "the image has 8193 x 8192 pixels; wanted at most 67108864"),
        (70000, 1, "has 70000 x 1 pixels"),
        (10000, 10000, "cannot be decoded: Image size"),  # Pillow's own warning, an error here
        (2**31 - 1, 2**31 - 1, "cannot be decoded: Image size"),
        (0, 5, "cannot be decoded"),
        (100, 100, "cannot be decoded"),
    ],
)
def test_bombs_and_liars_are_refused(width: int, height: int, says: str) -> None:
    with pytest.raises(InputError) as caught:
        run("image", png_of_size(width, height))
    text = str(caught.value)
    assert says in text or "is no image" in text, text
    assert "\n" not in text


@pytest.mark.needs("PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_cut_image_is_refused_wherever_it_is_cut(kind: str) -> None:
    whole = encoded(PHOTO[:12, :16], kind)
    for length in range(0, len(whole) - 20, max(1, len(whole) // 60)):
        try:
            found = run("image", whole[:length])
        except InputError as error:
            assert "\n" not in str(error)
            assert " at 0x" not in str(error)
        else:  # what is missing was no pixel
            assert found.shape == (12, 16, 3)


MAGIC = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF\x00\x00\x00\x00WEBP"]
MAGIC += [b"II*\x00", b"P6 "]


@few
@given(st.binary(max_size=200), st.sampled_from(MAGIC))
def test_noise_is_no_image(data: bytes, magic: bytes) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(InputError):
        run("image", magic + data)


@few
@given(st.integers(0, 2000), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF"]))
def test_a_changed_byte_never_crashes(at: int, value: int, kind: str) -> None:
    pytest.importorskip("PIL")
    data = bytearray(encoded(PHOTO[:8, :8], kind))
    data[at % len(data)] = value
    try:
        found = run("image", bytes(data))
    except InputError:
        return
    assert (found.dtype, found.ndim, found.shape[2]) == (np.uint8, 3, 3)


def test_eps_is_not_even_tried() -> None:
    """Pillow would start Ghostscript."""
    pytest.importorskip("PIL")
    with pytest.raises(InputError, match="is no image; wanted one of JPEG, PNG"):
        run("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_without_pillow_arrays_work_and_files_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    same(run("image", PHOTO), PHOTO)
    with pytest.raises(MissingToolError, match="pip install pillow"):
        run("image", b"\x89PNG")


# --- decoding audio, text, bytes, arrays ----------------------------------------------------------


def wav(samples: np.ndarray, rate: int = 16000, width: int = 2) -> bytes:
    """A WAV of integers (n,) or (n, channels), written by the standard library."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        raw = samples.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width]
        file.writeframes(raw.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("width", "low", "high", "zero", "full"),
    [
        (1, 0, 255, 128, 128.0),
        (2, -(2**15), 2**15 - 1, 0, 2.0**15),
        (3, -(2**23), 2**23 - 1, 0, 2.0**23),
        (4, -(2**31), 2**31 - 1, 0, 2.0**31),
    ],
)
def test_wav_of_every_width(width: int, low: int, high: int, zero: int, full: float) -> None:
    values = np.concatenate([[low, high, zero], RNG.integers(low, high, 500, endpoint=True)])
    wanted = ((values - zero) / full).astype(np.float32)
    same(run("audio", wav(values, width=width)), wanted)
    stereo = np.stack([values, values[::-1]], axis=1)
    wanted = ((stereo - zero) / full).mean(axis=1).astype(np.float32)
    same(run("audio", wav(stereo, width=width)), wanted)


@pytest.mark.needs("scipy")
def test_wav_is_what_scipy_reads() -> None:
    from scipy.io import wavfile

    values = RNG.integers(-(2**15), 2**15, 1000)
    rate, found = wavfile.read(io.BytesIO(wav(values, 22050)))
    assert rate == 22050
    same(run("audio", wav(values, 22050)), (found / 32768).astype(np.float32))


def test_the_extensible_header_is_read() -> None:
    values = RNG.integers(-(2**15), 2**15, 100)
    plain = wav(values)
    guid = b"\x01\x00" + bytes.fromhex("00000000100080 0000aa00389b71".replace(" ", ""))
    fmt = b"\xfe\xff" + plain[22:36] + struct.pack("<HHI", 22, 16, 4) + guid
    data = plain[:16] + struct.pack("<I", len(fmt)) + fmt + plain[36:]
    data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    same(run("audio", data), run("audio", plain))


def test_another_rate_is_refused_unless_it_is_to_be_resampled() -> None:
    data = wav(RNG.integers(-1000, 1000, 4410), 44100)
    for steps in ([{"op": "decode", "rate": 16000}], [LOG_MEL]):
        with pytest.raises(InputError, match="has 44100 Hz, the model wants 16000 Hz: convert it"):
            run("audio", data, *steps)
    assert run("audio", data).shape == (4410,)
    assert run("audio", data, {"op": "decode", "rate": 44100}).shape == (4410,)
    step = {"op": "decode", "rate": 16000, "resample": True}
    assert run("audio", data, step).shape == (1600,)


@pytest.mark.needs("scipy")
@pytest.mark.parametrize(
    ("have", "want", "count"),
    [(44100, 16000, 5000), (48000, 16000, 5000), (8000, 16000, 3000), (16000, 22050, 2001),
     (16000, 16001, 700), (11025, 8000, 1), (96000, 8000, 100), (22050, 44100, 70000)],
)  # fmt: skip
def test_resampling_is_scipys(have: int, want: int, count: int) -> None:
    from math import gcd

    from scipy.signal import resample_poly

    values = RNG.integers(-(2**15), 2**15, count)
    step = {"op": "decode", "rate": want, "resample": True}
    found = run("audio", wav(values, have), step)
    divisor = gcd(have, want)
    wanted = resample_poly(values / 32768, want // divisor, have // divisor)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-7)


def test_resampling_keeps_a_tone() -> None:
    t = np.arange(48000) / 48000
    tone = np.round(20000 * np.sin(2 * np.pi * 440 * t))
    step = {"op": "decode", "rate": 16000, "resample": True}
    found = run("audio", wav(tone, 48000), step)
    wanted = 20000 / 32768 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(
        found[100:-100], wanted[100:-100], atol=1e-3
    )  # the pass band's ripple


def liar(**fields: Any) -> bytes:
    """A WAV of 100 samples with fields of its header changed."""
    data = bytearray(wav(np.arange(100)))
    places = {
        "riff": (4, "<I"), "size": (16, "<I"), "tag": (20, "<H"), "channels": (22, "<H"),
        "rate": (24, "<I"), "bits": (34, "<H"), "data": (40, "<I"),
    }  # fmt: skip
    for name, value in fields.items():
        struct.pack_into(places[name][1], data, places[name][0], value)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "cannot be decoded: EOFError"),
        (b"RIFF", "cannot be decoded"),
        (b"ID3\x04 an mp3", "cannot be decoded: file does not start with RIFF id"),
        (liar(data=10**6), "the audio announces 500000 samples and holds 100"),
        (liar(data=2**32 - 1), "announces 2147483647 samples and holds 100"),
        (liar(data=0), "announces 0 samples"),
        (liar(riff=60), "announces 100 samples and holds 12"),
        (liar(channels=0), "cannot be decoded: bad # of channels"),
        (liar(bits=0), "cannot be decoded: bad sample width"),
        (liar(bits=64), "has 64 bits a sample; wanted 8, 16, 24 or 32"),
        (liar(channels=65535), "cannot be decoded|announces"),
        (liar(tag=3), "cannot be decoded: unknown format: 3"),
        (liar(tag=0xFFFE), "cannot be decoded"),
        (liar(size=2**32 - 1), "cannot be decoded"),
        (liar(rate=0), "cannot resample 100 samples from 0 Hz to 16000 Hz"),
        (liar(rate=2**32 - 1), "cannot resample 100 samples from 4294967295 Hz"),
        (liar(rate=1), ""),  # 100 samples become 1,600,000
        (liar()[:-1], "announces 100 samples and holds 99"),
    ],
)
def test_wav_headers_that_lie_are_refused(data: bytes, says: str) -> None:
    pipeline = Preprocess("audio", [{"op": "decode", "rate": 16000, "resample": True}])
    if not says:
        assert pipeline(data).shape == (1_600_000,)
        return
    with pytest.raises(InputError) as caught:
        pipeline(data)
    assert any(one in str(caught.value) for one in says.split("|")), str(caught.value)
    assert "\n" not in str(caught.value)


@few
@given(st.integers(0, 60), st.integers(0, 255), st.integers(0, 244))
def test_a_changed_wav_never_crashes(at: int, value: int, length: int) -> None:
    data = bytearray(wav(np.arange(100)))
    data[at] = value
    for raw in (bytes(data), bytes(data[:length])):
        try:
            found = run("audio", raw)
        except InputError:
            continue
        assert found.ndim == 1
        assert np.abs(found).max() <= 1


def test_text_in_its_three_forms(tmp_path: Path) -> None:
    text = "aé\U0001f600"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for raw in (text, text.encode(), tmp_path / "a.txt"):
        same(run("text", raw), np.frombuffer(text.encode(), np.uint8))
        codes = run("text", raw, {"op": "decode", "mode": "codepoints"})
        same(codes, np.array([0x61, 0xE9, 0x1F600], np.int32))
        whole = run("text", raw, {"op": "decode", "mode": "string"}, {"op": "expand", "axis": 0})
        assert (whole.shape, whole.tolist()) == ((1, 1), [[text]])
    assert run("text", "").shape == (0,)


@pytest.mark.parametrize("raw", [b"\xff\xfeab", b"\xc3", "\ud800", b"\xed\xa0\x80"])
def test_text_that_is_not_utf8_is_refused(raw: Any) -> None:
    with pytest.raises(InputError, match="the text cannot be decoded: 'utf-8' codec"):
        run("text", raw)


def test_arrays_become_native_and_stay_what_they_are() -> None:
    for raw in (np.array([1, 2], ">i4"), np.array(3.5), np.zeros((0, 2)), np.array(["a"], object)):
        found = run("array", raw)
        assert found.dtype.isnative
        assert found.shape == raw.shape
        assert found.tolist() == raw.tolist()


# --- resize ---------------------------------------------------------------------------------------

SIZES = [(45, 64), (20, 30), (23, 31), (44, 100), (90, 128), (91, 130), (1, 1), (45, 7), (300, 2)]


@pytest.mark.needs("torch")
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_resize_is_torchs(size: tuple[int, int], method: str, antialias: bool) -> None:
    from torch.nn.functional import interpolate

    image = RNG.random((45, 64, 3), np.float32)
    tensor = interpolate(
        torch_image(image), size, mode=method, align_corners=False, antialias=antialias
    )
    step = {"op": "resize", "size": list(size), "method": method, "antialias": antialias}
    found = run("array", image, step)
    assert found.dtype == np.float32
    # torch computes positions in float32: an error of 1e-7 of the image's 64 pixels
    np.testing.assert_allclose(found, from_torch(tensor), rtol=0, atol=3e-5)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("size", SIZES)
def test_nearest_is_torchs_nearest_exact(size: tuple[int, int]) -> None:
    from torch.nn.functional import interpolate

    step = {"op": "resize", "size": list(size), "method": "nearest"}
    wanted = from_torch(interpolate(torch_image(PHOTO), size, mode="nearest-exact"))
    same(run("image", PHOTO, step), wanted.astype(np.uint8))


@pytest.mark.needs("PIL")
@pytest.mark.parametrize("size", SIZES)
def test_nearest_is_pillows_but_for_ties(size: tuple[int, int]) -> None:
    """Halfway between two pixels Pillow takes either, by the rounding errors of a running sum."""
    from PIL import Image

    step = {"op": "resize", "size": list(size), "method": "nearest"}
    resized = np.array(Image.fromarray(PHOTO).resize(size[::-1], Image.Resampling.NEAREST))
    clear = [
        np.array([(2 * i + 1) * n % (2 * m) != 0 for i in range(m)])
        for n, m in zip((45, 64), size, strict=True)
    ]
    found = run("image", PHOTO, step)
    same(found[clear[0]][:, clear[1]], resized[clear[0]][:, clear[1]])


@pytest.mark.needs("PIL")
@pytest.mark.parametrize("size", SIZES)
def test_antialias_is_pillow_within_one_step(size: tuple[int, int]) -> None:
    """Pillow rounds to 8 bits between the two axes."""
    from PIL import Image

    step = {"op": "resize", "size": list(size), "antialias": True}
    found = run("image", PHOTO, step).astype(int)
    wanted = np.array(Image.fromarray(PHOTO).resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.abs(found - wanted).max() <= 1


@pytest.mark.needs("torch")
@pytest.mark.parametrize("ratio", [(2, 2), (3, 4), (5, 1), (9, 16)])
def test_area_is_the_mean_of_boxes(ratio: tuple[int, int]) -> None:
    from torch.nn.functional import adaptive_avg_pool2d

    size = (45 // ratio[0], 64 // ratio[1])
    image = RNG.random((size[0] * ratio[0], size[1] * ratio[1], 3), np.float32)
    wanted = from_torch(adaptive_avg_pool2d(torch_image(image), size))
    step = {"op": "resize", "size": list(size), "method": "area"}
    np.testing.assert_allclose(run("array", image, step), wanted, rtol=0, atol=1e-6)


def area_by_definition(row: list[Fraction], size: int) -> list[Fraction]:
    ratio = Fraction(len(row), size)
    out = []
    for i in range(size):
        low, high = i * ratio, (i + 1) * ratio
        shares = [max(min(high, j + 1) - max(low, j), Fraction(0)) for j in range(len(row))]
        out.append(sum((s * v for s, v in zip(shares, row, strict=True)), Fraction(0)) / ratio)
    return out


@few
@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(1, 50))
def test_area_is_exact_and_rounds_half_up(row: list[int], size: int) -> None:
    image = np.array(row, np.uint8).reshape(1, -1, 1)
    exact = area_by_definition([Fraction(v) for v in row], size)
    step = {"op": "resize", "size": [1, size], "method": "area"}
    wanted = [int(v + Fraction(1, 2)) for v in exact]
    found = run("array", image, step).ravel().tolist()
    # 2**-12 more than a half: a value that close below one is rounded up, too
    for got, want, value in zip(found, wanted, exact, strict=True):
        assert got == want or (got == want + 1 and want + Fraction(1, 2) - value < 1e-3)


def test_true_halves_are_rounded_up() -> None:
    for width, box in itertools.product((2, 6, 10, 12, 22), (1, 3, 5, 7)):
        low = np.arange(255)
        pixels = np.zeros((box, 255, width), np.uint8)  # 255 images side by side
        pixels[...] = low[:, None]
        pixels[:, :, : width // 2] += 1  # their means are low + 0.5
        step = {"op": "resize", "size": [1, 255], "method": "area"}
        found = run("array", pixels.reshape(box, -1, 1), step)
        assert found.ravel().tolist() == (low + 1).tolist()


@pytest.mark.needs("torch")
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_uint8_is_the_float_result_rounded_half_up(method: str, antialias: bool) -> None:
    import torch
    from torch.nn.functional import interpolate

    size = (30, 100)
    wide = torch_image(PHOTO).to(torch.float64)
    exact = from_torch(
        interpolate(wide, size, mode=method, align_corners=False, antialias=antialias)
    )
    step = {"op": "resize", "size": list(size), "method": method, "antialias": antialias}
    found = run("image", PHOTO, step)
    assert found.dtype == np.uint8
    wanted = np.clip(np.floor(exact + 0.5), 0, 255)
    sure = np.abs(exact + 0.5 - np.rint(exact + 0.5)) > 1e-3
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(found[sure], wanted[sure])
    assert np.abs(found - wanted).max() <= 1


@few
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60),
    st.sampled_from(["bilinear", "bicubic", "area", "nearest"]), st.booleans(), st.integers(0, 255),
)  # fmt: skip
def test_an_even_image_stays_even(
    h: int, w: int, height: int, width: int, method: str, antialias: bool, value: int
) -> None:
    step = {"op": "resize", "size": [height, width], "method": method}
    step["antialias"] = antialias and method in ("bilinear", "bicubic")
    found = run("image", np.full((h, w, 3), value, np.uint8), step)
    same(found, np.full((height, width, 3), value, np.uint8))


@pytest.mark.parametrize(
    ("shape", "size", "wanted"),
    [((480, 640), 256, (256, 341)), ((640, 480), 256, (341, 256)), ((7, 7), 3, (3, 3)),
     ((1, 100), 2, (2, 200)), ((100, 333), 224, (224, 745))],
)  # fmt: skip
def test_one_number_is_the_shorter_side(shape: Any, size: int, wanted: Any) -> None:
    """torchvision's rule: the longer side is int(size * long / short)."""
    step = {"op": "resize", "size": size, "method": "nearest"}
    assert run("image", np.zeros((*shape, 3), np.uint8), step).shape[:2] == wanted


def test_the_same_size_changes_nothing() -> None:
    for method in ("bilinear", "bicubic", "area", "nearest"):
        same(run("image", PHOTO, {"op": "resize", "size": [45, 64], "method": method}), PHOTO)


# --- crop, letterbox, colour, layout --------------------------------------------------------------


@pytest.mark.parametrize("size", [[45, 64], [44, 61], [1, 1], [10, 63], 45])
def test_center_crop_is_torchvisions(size: Any) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    top, left = round((45 - height) / 2.0), round((64 - width) / 2.0)  # its center_crop
    found = run("image", PHOTO, {"op": "center-crop", "size": size})
    same(found, PHOTO[top : top + height, left : left + width])


@few
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.integers(1, 50))
def test_letterbox_keeps_the_aspect_and_fills_the_rest(h: int, w: int, y: int, x: int) -> None:
    image = np.full((h, w, 3), 200, np.uint8)
    found = run("image", image, {"op": "letterbox", "size": [y, x], "fill": 7})
    assert found.shape == (y, x, 3)
    inside = (found == 200).all(axis=2)
    assert ((found == 7).all(axis=2) | inside).all()
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    scale = min(Fraction(y, h), Fraction(x, w))
    tall, wide = (max(1, int(side * scale + Fraction(1, 2))) for side in (h, w))
    assert (len(rows), len(columns)) == (tall, wide)
    assert inside.sum() == tall * wide
    assert (rows[0], columns[0]) == ((y - tall) // 2, (x - wide) // 2)


def test_letterbox_resizes_like_resize() -> None:
    boxed = run("image", PHOTO, {"op": "letterbox", "size": [64, 64], "fill": 114})
    same(boxed[9:54], PHOTO)
    assert (boxed[:9] == 114).all()
    step = {"method": "bicubic", "antialias": True}
    boxed = run("image", PHOTO, {"op": "letterbox", "size": [45, 32], **step})
    same(boxed[11:34], run("image", PHOTO, {"op": "resize", "size": [23, 32], **step}))


@pytest.mark.needs("PIL")
def test_gray_is_pillows() -> None:
    from PIL import Image

    every = RNG.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    wanted = np.array(Image.fromarray(every).convert("L"))[..., None]
    same(run("image", every, {"op": "color", "to": "gray"}), wanted)
    flipped = [{"op": "color", "to": "BGR"}, {"op": "color", "to": "gray"}]
    same(run("image", every, *flipped), wanted)
    same(run("image", encoded(every), {"op": "decode", "mode": "L"}), wanted)


def test_colours_of_floats() -> None:
    image = RNG.random((5, 6, 3), np.float32)
    wanted = image.astype(np.float64) @ [0.299, 0.587, 0.114]
    found = run("array", image, {"op": "color", "to": "gray"})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[..., 0], wanted, rtol=3e-7)
    again = run("array", image, {"op": "color", "to": "gray"}, {"op": "color", "to": "RGB"})
    same(again, np.concatenate([found] * 3, axis=2))


def test_colours_are_tracked() -> None:
    to = {"RGB": {"op": "color", "to": "RGB"}, "BGR": {"op": "color", "to": "BGR"}}
    same(run("image", PHOTO, to["BGR"]), PHOTO[..., [2, 1, 0]])
    same(run("image", PHOTO, to["RGB"]), PHOTO)
    same(run("image", PHOTO, to["BGR"], to["BGR"]), PHOTO[..., [2, 1, 0]])
    same(run("image", PHOTO, to["BGR"], to["RGB"]), PHOTO)


@pytest.mark.parametrize("first", ["NCHW", "NHWC", "CHW", "HWC"])
@pytest.mark.parametrize("second", ["NCHW", "NHWC", "CHW", "HWC"])
def test_layouts_by_einsum(first: str, second: str) -> None:
    found = run("image", PHOTO, {"op": "layout", "to": first}, {"op": "layout", "to": second})
    plain = np.einsum(f"hwc->{second.strip('N').lower()}", PHOTO)
    same(found, plain[None] if second[0] == "N" else plain)


# --- numbers and shapes ---------------------------------------------------------------------------


def test_normalize_is_float32_arithmetic() -> None:
    scale, mean, std = 0.00784, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    found = run("image", PHOTO, {"op": "normalize", "scale": scale, "mean": mean, "std": std})
    f = np.float32
    for c in range(3):
        wanted = [
            (f(f(f(value) * f(scale)) - f(mean[c]))) / f(std[c]) for value in PHOTO[..., c].ravel()
        ]
        same(found[..., c].ravel(), np.array(wanted, f))


@pytest.mark.parametrize("to", ["NCHW", "NHWC", "CHW", "HWC"])
def test_normalize_finds_the_channels_wherever_the_layout_put_them(to: str) -> None:
    step = {"op": "normalize", "mean": [1, 2, 3], "std": [2, 4, 8]}
    layout = {"op": "layout", "to": to}
    same(run("image", PHOTO, layout, step), run("image", PHOTO, step, layout))


def test_normalize_along_a_given_axis() -> None:
    x = RNG.random((2, 3, 2), np.float32)
    found = run("array", x, {"op": "normalize", "mean": [1, 2], "axis": 0})
    same(found, x - np.float32([1, 2])[:, None, None])
    found = run("array", x, {"op": "normalize", "mean": [1, 2]})
    same(found, x - np.float32([1, 2]))
    steps = [{"op": "expand", "axis": 0}, {"op": "normalize", "scale": 2}]
    same(run("array", x, *steps), (x * np.float32(2))[None])
    same(run("array", np.array(3, np.int8), {"op": "normalize", "scale": 2}), np.array(6, "f4"))


def test_cast() -> None:
    x = np.array([-1.9, 0.0, 1.9, 255.9])
    same(run("array", x, {"op": "cast", "dtype": "int32"}), np.array([-1, 0, 1, 255], np.int32))
    same(run("array", x[1:], {"op": "cast", "dtype": "uint8"}), np.array([0, 1, 255], np.uint8))
    same(run("array", x, {"op": "cast", "dtype": "bool"}), np.array([True, False, True, True]))
    same(run("array", x, {"op": "cast", "dtype": "float16"}), x.astype(np.float16))
    same(run("array", np.array([1e300]), {"op": "cast", "dtype": "float32"}), np.float32([np.inf]))
    same(run("array", np.zeros(0), {"op": "cast", "dtype": "int8"}), np.zeros(0, np.int8))


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize(("dtype", "zero"), [("int8", -3), ("uint8", 130), ("int16", 77)])
def test_quantize_is_onnxruntimes(dtype: str, zero: int) -> None:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    scale = 0.037
    halves = np.arange(-400, 400, dtype=np.float32) / 2 * np.float32(scale)
    x = np.concatenate([halves, RNG.normal(0, 1e4, 500).astype(np.float32), [np.inf, -np.inf]])
    x = x.astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(x)])],
        [helper.make_tensor_value_info("y", getattr(TensorProto, dtype.upper()), [len(x)])],
        [numpy_helper.from_array(np.array(scale, np.float32), "s"),
         numpy_helper.from_array(np.array(zero, dtype), "z")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    finite = np.isfinite(x)
    step = {"op": "quantize", "scale": scale, "zero_point": zero, "dtype": dtype}
    found = run("array", x, step)
    same(found[finite], session.run(None, {"x": x})[0][finite])
    info = np.iinfo(dtype)
    assert found[-2:].tolist() == [info.max, info.min]


def test_pad_and_truncate() -> None:
    def array(*values: int) -> np.ndarray:
        return np.array(values, np.uint8)

    assert run("bytes", b"abc", {"op": "pad", "length": 5}).tolist() == [97, 98, 99, 0, 0]
    step = {"op": "pad", "length": 5, "value": 9, "side": "left"}
    assert run("bytes", b"abc", step).tolist() == [9, 9, 97, 98, 99]
    same(run("bytes", b"abc", {"op": "pad", "length": 2}), array(97, 98, 99))
    same(run("bytes", b"", {"op": "pad", "length": 2, "value": 1}), array(1, 1))
    same(run("bytes", b"abc", {"op": "truncate", "length": 2}), array(97, 98))
    same(run("bytes", b"abc", {"op": "truncate", "length": 2, "side": "left"}), array(98, 99))
    same(run("bytes", b"abc", {"op": "truncate", "length": 7, "side": "left"}), array(97, 98, 99))
    table = np.arange(6.0).reshape(2, 3)
    found = run("array", table, {"op": "pad", "length": 3, "value": -0.5, "axis": 0})
    assert found.tolist() == [[0, 1, 2], [3, 4, 5], [-0.5, -0.5, -0.5]]
    assert run("array", table, {"op": "truncate", "length": 1, "axis": 0}).tolist() == [[0, 1, 2]]
    assert run("array", table, {"op": "truncate", "length": 1}).tolist() == [[0], [3]]


def test_reshape_expand_frame() -> None:
    x = np.arange(6, dtype=np.float32)
    assert run("array", x, {"op": "reshape", "shape": [2, -1]}).shape == (2, 3)
    assert run("array", x, {"op": "expand", "axis": -1}).shape == (6, 1)
    found = run("array", x, {"op": "frame", "length": 3, "hop": 2})
    assert found.tolist() == [[0, 1, 2], [2, 3, 4]]


@few
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_frames_by_slices(n: int, length: int, hop: int) -> None:
    x = RNG.random(n, np.float32)
    wanted = [x[i : i + length] for i in range(0, n - length + 1, hop)]
    pipeline = Preprocess("array", [{"op": "frame", "length": length, "hop": hop}])
    if wanted:
        same(pipeline(x), np.stack(wanted))
        same(pipeline(np.repeat(x, 2)[::2]), np.stack(wanted))  # not contiguous
    else:
        with pytest.raises(InputError, match="pad before"):
            pipeline(x)


# --- head-tail ------------------------------------------------------------------------------------

MAGIKA = {
    "op": "head-tail", "head": 1024, "tail": 1024, "block": 4096, "strip": True, "pad": 256,
    "dtype": "int32",
}  # fmt: skip


@pytest.fixture(scope="module")
def magika() -> Any:
    """Magika's own features of bytes, out of its wheel."""
    pytest.importorskip("onnxruntime")
    wheel = str(fetch_wheel("magika==1.0.3"))
    sys.path.insert(0, wheel)
    try:
        from magika.magika import Magika  # type: ignore[import-not-found]
        from magika.types import Seekable  # type: ignore[import-not-found]
    finally:
        sys.path.remove(wheel)

    def features(data: bytes) -> np.ndarray:
        found = Magika._extract_features_from_seekable(
            Seekable(io.BytesIO(data)), 1024, 0, 1024, 256, 4096, False
        )
        return np.array(found.beg + found.end, np.int32)

    return features


def documents() -> list[bytes]:
    text = b" \t\r\n\x0b\x0c"
    noise = RNG.integers(0, 256, 20000, dtype=np.uint8).tobytes()
    lengths = [0, 1, 7, 1023, 1024, 1025, 2047, 2048, 4095, 4096, 4097, 8191, 8192, 8193, 20000]
    return [
        *(noise[:n] for n in lengths),
        *(text * 3 + noise[:n] + text * 5 for n in lengths),
        b" " * 5000, b" " * 4096 + b"x", b"x" + b" " * 4096, b"x" + b" " * 8191 + b"y",
        b"\x1c\x1d\x85\xa0 a \xa0\x85\x1c", b"\x00 a \x00",
    ]  # fmt: skip


def test_head_tail_is_magikas(magika: Callable[[bytes], np.ndarray], tmp_path: Path) -> None:
    pipeline = Preprocess("bytes", [MAGIKA])
    for number, data in enumerate(documents()):
        wanted = magika(data)
        same(pipeline(data), wanted)
        path = tmp_path / str(number)
        path.write_bytes(data)
        same(pipeline(path), wanted)  # reads the ends only
        if data:
            same(pipeline(np.frombuffer(data, np.uint8)), wanted)


@few
@given(st.lists(st.sampled_from([b" ", b"\n", b"\x0c", b"a", b"\xff", b" " * 40]), max_size=60))
def test_head_tail_by_lists(parts: list[bytes]) -> None:
    data = b"".join(parts)
    first, last = list(data[:30].lstrip()), list(data[-30:].rstrip()) if data else []
    wanted = (first + [300] * 9)[:9] + ([300] * 5 + last)[-5:]
    step = {"op": "head-tail", "head": 9, "tail": 5, "block": 30, "strip": True, "pad": 300}
    assert run("bytes", data, step).tolist() == wanted


def test_head_tail_options() -> None:
    step = {"op": "head-tail", "head": 2, "tail": 0, "block": 4}
    same(run("bytes", b" abc", step), np.array([32, 97], np.int32))
    same(run("bytes", b" abc", {**step, "strip": True}), np.array([97, 98], np.int32))
    step = {"op": "head-tail", "head": 0, "tail": 3, "block": 4, "pad": 0, "dtype": "float32"}
    same(run("text", "yz", step), np.array([0, 121, 122], np.float32))


def test_only_a_first_head_tail_reads_the_ends_only(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    cut = {"op": "truncate", "length": 60}
    step = {"op": "head-tail", "head": 1, "tail": 1, "block": 2}
    assert run("bytes", path, cut, step).tolist() == [0, 59]
    assert run("bytes", path, step).tolist() == [0, 99]
    assert run("bytes", path, {"op": "decode"}, step).tolist() == [0, 99]


# --- log-mel --------------------------------------------------------------------------------------

SOUND = (0.3 * RNG.standard_normal(8000)).astype(np.float32)


@pytest.mark.needs("tensorflow")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fmin": 20.0, "fmax": 4000.0},
        {"power": 1, "mels": 64, "offset": 0.01},
        {"window": "hamming", "fft": 400, "hop": 100, "frame": 400},
        {"rate": 8000, "mels": 10, "log": "none", "offset": 0},
    ],
)
def test_log_mel_is_tensorflows(options: dict[str, Any]) -> None:
    import tensorflow as tf

    o = {"fmin": 0.0, "offset": 1e-6, "power": 2, "window": "hann", **LOG_MEL, **options}
    rate = o["rate"]
    window = getattr(tf.signal, f"{o['window']}_window")
    spectrum = tf.abs(
        tf.signal.stft(SOUND.astype(np.float64), o["frame"], o["hop"], o["fft"], window)
    )
    bank = tf.signal.linear_to_mel_weight_matrix(
        o["mels"], o["fft"] // 2 + 1, rate, o["fmin"], o.get("fmax", rate / 2), tf.float64
    )
    mel = (spectrum ** o["power"]).numpy() @ bank.numpy() + o["offset"]
    wanted = mel if o.get("log") == "none" else np.log(mel)
    found = run("audio", SOUND, {**LOG_MEL, **options})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.needs("torch")
@pytest.mark.parametrize(
    ("fft", "frame", "hop"), [(512, 512, 160), (512, 400, 160), (400, 301, 77), (1024, 1024, 512)]
)
def test_centred_frames_are_torchs(fft: int, frame: int, hop: int) -> None:
    import torch

    window = torch.hann_window(frame, dtype=torch.float64)
    spectrum = torch.stft(
        torch.from_numpy(SOUND).double(), fft, hop, frame, window, center=True,
        pad_mode="reflect", return_complex=True,
    )  # fmt: skip
    power = (spectrum.abs() ** 2).numpy().T
    step = {"rate": 16000, "fft": fft, "frame": frame, "hop": hop, "mels": 20, "center": True}
    found = run("audio", SOUND, {"op": "log-mel", **step, "log": "none"})
    bank = slow_filters(16000, fft, 20, 0.0, 8000.0, "htk", "mel", "none")
    assert found.shape == (power.shape[0], 20)
    np.testing.assert_allclose(found, power @ bank, rtol=1e-6, atol=1e-9)


def slow_filters(
    rate: int, fft: int, mels: int, fmin: float, fmax: float, scale: str, triangles: str, norm: str
) -> np.ndarray:
    """One filter and one bin at a time, from the definitions."""
    from math import exp, log

    def mel(f: float) -> float:
        if scale == "htk":
            return 1127.01048 * log(1 + f / 700)
        return f / (200 / 3) if f < 1000 else 15 + log(f / 1000) / (log(6.4) / 27)

    def hz(m: float) -> float:
        if scale == "htk":
            return 700 * (exp(m / 1127.01048) - 1)
        return m * 200 / 3 if m < 15 else 1000 * exp((m - 15) * log(6.4) / 27)

    step = (mel(fmax) - mel(fmin)) / (mels + 1)
    edges = [mel(fmin) + i * step for i in range(mels + 2)]
    out = np.zeros((fft // 2 + 1, mels))
    for k in range(fft // 2 + 1):
        for m in range(mels):
            low, mid, high = edges[m : m + 3]
            at = mel(k * rate / fft)
            if triangles == "hz":
                low, mid, high, at = hz(low), hz(mid), hz(high), k * rate / fft
            weight = (at - low) / (mid - low) if at < mid else (high - at) / (high - mid)
            wide = hz(edges[m + 2]) - hz(edges[m])
            out[k, m] = max(0, weight) * (2 / wide if norm == "slaney" else 1)
    return out


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("triangles", ["mel", "hz", None])
@pytest.mark.parametrize("norm", ["none", "slaney"])
@pytest.mark.parametrize("log", ["ln", "log10", "db", "none"])
def test_every_mel_by_definition(scale: str, triangles: str | None, norm: str, log: str) -> None:
    step = {**LOG_MEL, "fmin": 50.0, "fmax": 7000.0, "scale": scale, "norm": norm, "log": log}
    if triangles:
        step["triangles"] = triangles
    frames = [SOUND[i : i + 400].astype(np.float64) for i in range(0, 7601, 160)]
    window = np.array([0.5 - 0.5 * np.cos(2 * np.pi * i / 400) for i in range(400)])
    power = np.array([np.abs(np.fft.fft(f * window, 512))[:257] ** 2 for f in frames])
    shape = triangles or ("mel" if scale == "htk" else "hz")
    mel = power @ slow_filters(16000, 512, 40, 50.0, 7000.0, scale, shape, norm)
    wanted = {
        "ln": np.log(mel + 1e-6), "log10": np.log10(mel + 1e-6), "none": mel,
        "db": 10 * np.log10(np.maximum(mel, 1e-10)),
    }[log]  # fmt: skip
    np.testing.assert_allclose(run("audio", SOUND, step), wanted, rtol=2e-6, atol=2e-6)


def test_db_of_magnitudes_is_twenty_logarithms() -> None:
    quiet = np.zeros(400, np.float32)
    found = run("audio", quiet, {**LOG_MEL, "log": "db", "power": 1, "offset": 1e-5})
    np.testing.assert_allclose(found, -100, rtol=1e-6)


def test_integers_and_long_sounds_are_the_same_sound() -> None:
    whole = RNG.integers(-(2**15), 2**15, 300_000)
    step = {**LOG_MEL, "log": "none", "mels": 8}
    found = run("array", whole.astype(np.int16), step)
    assert found.shape == (1 + (300_000 - 400) // 160, 8)
    late = run("array", whole[160 * 1500 :].astype(np.float64), step)
    np.testing.assert_allclose(found[1500:], late, rtol=1e-6)


# --- the how-to -----------------------------------------------------------------------------------


def test_the_examples_of_the_how_to_work() -> None:
    from edgekit_runtime.postprocess import Postprocess

    page = (Path(__file__).parents[2] / "docs" / "how-to" / "preprocess.md").read_text()
    blocks = [part.split("```")[0] for part in page.split("```toml\n")[1:]]
    made = {}
    for block in blocks:
        read = tomllib.loads(block)
        ((name, one),) = read["inputs"].items()
        made[name] = Preprocess(one["source"], one["steps"])
        Postprocess(read["outputs"], ["y"], None)
    assert made["x"](np.zeros((300, 400, 3), np.uint8)).shape == (1, 3, 224, 224)
    same(made["bytes"](b""), np.full((1, 2048), 256, np.int32))
    assert made["spectrogram"](SOUND[:5000]).shape == (1, 49, 40, 1)
    for op in ("resize", "log-mel", "head-tail", "ctc-greedy", "nms", "dequantize"):
        assert f"| `{op}` |" in page


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "area", "nearest"])
def test_indices_are_of_the_machines_own_width(method: str) -> None:
    """`take` on a 32-bit board refuses int64 (seen on armv7)."""
    from edgekit_runtime.images import _taps

    for n, m in ((7, 3), (3, 7)):
        index, share = _taps(n, m, method, False)
        assert index.dtype == np.intp
        assert share.dtype == np.float32
