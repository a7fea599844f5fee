"""Images for models: decoding, sizes, colours and the order of axes, in plain numpy.

All but `layout` take and give (H, W, C), uint8 or float32, in float32 arithmetic of a fixed order.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any, Callable, Literal, Tuple

import numpy as np

from .errors import InputError, MissingToolError
from .steps import MAX_SIDE, MAX_VALUES, Number, Sample, Size, fill_value, must, need

__all__ = ["center_crop", "check_image", "color", "decode_image", "layout", "letterbox", "resize"]

Run = Callable[[np.ndarray], np.ndarray]
Method = Literal["bilinear", "bicubic", "area", "nearest"]

#: what Pillow may try: others start programs (EPS) or are rarely fuzzed
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_BT601 = (0.299, 0.587, 0.114)


def check_image(x: np.ndarray, channels: int = 0) -> None:
    """(H, W, C), not empty, uint8 or float32.

    Raises:
        InputError: it is something else.
    """
    fits = x.ndim == 3 and x.size > 0 and (not channels or x.shape[2] == channels)
    need(fits, f"got the shape {list(x.shape)}; wanted (height, width, {channels or 'channels'})")
    need(x.dtype in (np.uint8, np.float32), f"got {x.dtype}; wanted uint8 or float32: cast before")
    _check_size(x.shape[0], x.shape[1])


def _check_size(height: int, width: int) -> None:
    limit = f"wanted at most {MAX_VALUES} pixels, {MAX_SIDE} a side"
    fits = height * width <= MAX_VALUES and max(height, width) <= MAX_SIDE
    need(fits, f"has {width} x {height} pixels; {limit}")


def decode_image(
    sample: Sample, *, mode: Literal["RGB", "L"] = "RGB"
) -> Callable[[bytes], np.ndarray]:
    """uint8 (H, W, 3) or (H, W, 1), turned as EXIF's Orientation says.

    Transparency and colour profiles are dropped; of an animation the first image counts.
    """
    sample.color = "RGB" if mode == "RGB" else "gray"

    def decode(data: bytes) -> np.ndarray:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError:
            raise MissingToolError("images need Pillow: pip install pillow") from None
        try:
            opened = Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError:
            raise InputError(f"is no image; wanted one of {', '.join(_FORMATS)}") from None
        with opened:
            _check_size(opened.height, opened.width)
            # Pillow would clip 16 bits at 255.
            need(opened.mode[0] not in "IF", f"has the mode {opened.mode}; wanted 8 bits a channel")
            whole: Image.Image = opened
            if whole.mode == "P":  # one with transparency warns unless it becomes RGBA first
                whole = whole.convert("RGBA")
            if whole.mode != mode:
                whole = whole.convert(mode)
            pixels = np.asarray(whole).reshape(whole.height, whole.width, -1)
            turned = opened.getexif().get(0x0112, 1)
        if turned in (5, 6, 7, 8):  # mirrored at the diagonal, then flipped:
            pixels = pixels.transpose(1, 0, 2)
        if turned in (2, 3, 6, 7):
            pixels = pixels[:, ::-1]
        return pixels[::-1] if turned in (3, 4, 7, 8) else pixels

    return decode


# --- sizes ----------------------------------------------------------------------------------------


def _taps(n: int, m: int, method: str, antialias: bool) -> Tuple[np.ndarray, np.ndarray]:
    """Which of `n` pixels make each of `m`, and their shares: intp and float32 (taps, m)."""
    to = np.arange(m, dtype=np.int64)
    if method == "nearest":
        nearest = ((2 * to + 1) * n // (2 * m))[None]
        return nearest.astype(np.intp), np.ones((1, m), np.float32)
    if method == "area":
        index = to * n // m + np.arange(-(-n // m) + 1)[:, None]
        # overlaps in units of 1 / m of a pixel: integers, and so exact
        share = np.minimum((to + 1) * n, (index + 1) * m) - np.maximum(to * n, index * m)
        weight = np.maximum(share, 0) / n
    else:
        wide = max(n / m, 1.0) if antialias else 1.0
        radius = wide if method == "bilinear" else 2 * wide
        centre = ((2 * to + 1) * n - m) / (2 * m)  # (to + 0.5) * n / m - 0.5, rounded once
        first = np.floor(centre - radius).astype(np.int64) + 1
        index = first + np.arange(math.ceil(2 * radius))[:, None]
        x = np.abs(index - centre) / wide
        a = -0.5 if antialias else -0.75  # of Keys' cubic kernel, in torch and Pillow
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
        cubic = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weight = np.maximum(1 - x, 0) if method == "bilinear" else cubic
        if antialias:  # cuts the kernel off at the edges instead of replicating them
            weight = weight * ((index >= 0) & (index < n))
    weight = weight / sum(weight)
    used = weight.any(axis=1)
    # intp is what take() takes: 32 bits on 32-bit boards, where int64 is refused
    return np.clip(index, 0, n - 1)[used].astype(np.intp), weight[used].astype(np.float32)


def _scaler(method: Method, antialias: bool) -> Callable[[np.ndarray, int, int], np.ndarray]:
    """A function of an image, a height and a width."""
    smooth = method in ("bilinear", "bicubic")
    must(smooth or not antialias, f"has antialias = true, which {method} does not know")
    taps = lru_cache(maxsize=16)(_taps)

    def scale(image: np.ndarray, height: int, width: int) -> np.ndarray:
        _check_size(height, width)
        if image.shape[:2] == (height, width):
            return image
        rows = taps(image.shape[0], height, method, antialias)
        columns = taps(image.shape[1], width, method, antialias)
        out = np.empty((height, width, image.shape[2]), image.dtype)
        if method == "nearest":
            out[...] = image.take(rows[0][0], axis=0).take(columns[0][0], axis=1)
            return out
        for start in range(0, height, 16):  # so many rows stay in a cache: half the time
            part = slice(start, start + 16)
            block = _weigh(image, 0, rows[0][:, part], rows[1][:, part])
            block = _weigh(block, 1, *columns)
            if image.dtype == np.uint8:
                # Half up. float32 sums miss a true half by up to 1e-4: 2**-12 keeps it there.
                block = np.clip(block + np.float32(0.5 + 2**-12), 0, 255)
            out[part] = block
        return out

    return scale


def _weigh(x: np.ndarray, axis: int, index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float32, the sum of `weight[t]` * `x[index[t]]` over t, one t after the other."""
    height, _, channels = x.shape
    rows = index.shape[1] if axis == 0 else height
    shares = weight[:, :, None] if axis == 0 else weight.repeat(channels, axis=1)
    parts = (x.take(i, axis).reshape(rows, -1) * share for i, share in zip(index, shares))
    total: np.ndarray = next(parts)
    for part in parts:
        total += part
    return total.reshape(rows, -1, channels)


def resize(
    sample: Sample, *, size: Size, method: Method = "bilinear", antialias: bool = False
) -> Run:
    """To `[height, width]`, or the shorter side to `size` and the longer one rounded down.

    Half-pixel centres: src = (dst + 0.5) * in / out - 0.5, edges replicated. bilinear and bicubic
    are `torch.nn.functional.interpolate(align_corners=False)`, also with `antialias`; area is the
    mean of the box that a pixel covers (when shrinking: OpenCV's INTER_AREA); nearest is torch's
    nearest-exact and Pillow's. uint8 is rounded half up and clipped; float32 stays float32.
    """
    sample.image()
    scale = _scaler(method, antialias)

    def run(image: np.ndarray) -> np.ndarray:
        check_image(image)
        if not isinstance(size, int):
            return scale(image, *size)
        height, width, _ = image.shape
        short = min(height, width)
        return scale(image, size * height // short, size * width // short)

    return run


def _pair(size: Any) -> Tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def center_crop(sample: Sample, *, size: Size) -> Run:
    """The middle `[height, width]`; an odd rest is split as torchvision does, halves to even.

    Raises:
        InputError: the image is smaller.
    """
    sample.image()
    height, width = _pair(size)

    def run(image: np.ndarray) -> np.ndarray:
        check_image(image)
        h, w, _ = image.shape
        fits = h >= height and w >= width
        need(fits, f"cannot cut {width} x {height} pixels out of {w} x {h}: resize before")
        top, left = round((h - height) / 2), round((w - width) / 2)
        return image[top : top + height, left : left + width]

    return run


def letterbox(
    sample: Sample,
    *,
    size: Size,
    fill: Number = 0,
    method: Method = "bilinear",
    antialias: bool = False,
) -> Run:
    """As large as it fits into `[height, width]`, centred, `fill` around it.

    The side that does not fill is rounded half up; an odd rest goes below or to the right.
    """
    sample.image()
    height, width = _pair(size)
    scale = _scaler(method, antialias)

    def run(image: np.ndarray) -> np.ndarray:
        check_image(image)
        h, w, channels = image.shape
        if h * width <= w * height:
            inner = (max(1, (2 * h * width + w) // (2 * w)), width)
        else:
            inner = (height, max(1, (2 * w * height + h) // (2 * h)))
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        out = np.full((height, width, channels), fill_value(fill, image.dtype))
        out[top : top + inner[0], left : left + inner[1]] = scale(image, *inner)
        return out

    return run


# --- colours and axes -----------------------------------------------------------------------------


def color(sample: Sample, *, to: Literal["RGB", "BGR", "gray"]) -> Run:
    """Reorder the channels, or weigh them by BT.601 into (H, W, 1).

    uint8: (19595 R + 38470 G + 7471 B + 32768) >> 16, as Pillow; float32: 0.299 R + 0.587 G +
    0.114 B. Images are decoded to RGB, and an array is taken for it.
    """
    sample.image()
    was, sample.color = sample.color, to

    def run(image: np.ndarray) -> np.ndarray:
        check_image(image, 1 if was == "gray" else 3)
        if was == to:
            return image
        if was == "gray":
            return image.repeat(3, axis=2)
        if to != "gray":
            return image[:, :, ::-1]
        rgb = image if was == "RGB" else image[:, :, ::-1]
        if image.dtype == np.float32:
            red, green, blue = (rgb[:, :, i] * np.float32(w) for i, w in enumerate(_BT601))
            return np.asarray(red + green + blue)[:, :, None]
        r, g, b = (rgb[:, :, i].astype(np.int32) for i in range(3))
        gray = np.asarray(19595 * r + 38470 * g + 7471 * b + 32768)
        return (gray >> 16).astype(np.uint8)[:, :, None]

    return run


def layout(sample: Sample, *, to: Literal["NCHW", "NHWC", "CHW", "HWC"]) -> Run:
    """Reorder the axes; N is a batch of 1. An array is taken for HWC."""
    was = sample.layout
    must(was != "", "is for an image, and the sample is none by then")
    order = [was.strip("N").index(axis) for axis in to.strip("N")]
    sample.layout, sample.channel_axis = to, to.index("C") - len(to)

    def run(x: np.ndarray) -> np.ndarray:
        need(x.ndim == len(was), f"got the shape {list(x.shape)}; wanted {was}")
        plain = (x[0] if was[0] == "N" else x).transpose(order)
        return plain[None] if to[0] == "N" else plain

    return run
