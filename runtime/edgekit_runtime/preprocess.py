"""From a file to a model's input: the steps a bundle declares, in plain numpy.

    source   raw: bytes, a Path, or                  what the first step sees
    image    uint8 (H, W, 3), mode L: (H, W, 1)      the same, turned as EXIF says
    audio    float32 (samples,), -1..1, mono         the same; files are WAV
    bytes    uint8 (n,)                              the same
    text     str                                     uint8 (n,): UTF-8; see its modes
    array    an array, nothing else                  the same

Calibration, evaluation, benchmark and device run this code and are to see the same numbers: float32
sums are elementwise and in a written order, without BLAS, and so the same on every machine. What
needs a sine, a logarithm or an FFT (`log-mel`, resampling) is float64 rounded to float32 once: two
machines differ in the last bit of one value in millions. Pillow decodes images; builds of its
libjpeg may differ by one of 255.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Literal, Mapping, Optional, Sequence, Tuple

import numpy as np

from .audio import frame, log_mel, read_wav, resample
from .errors import InputError, one_line
from .images import center_crop, check_image, color, decode_image, layout, letterbox, resize
from .steps import (
    MAX_VALUES,
    Axis,
    Count,
    CountOr0,
    Int32,
    Number,
    Numbers,
    Positive,
    Sample,
    Shape,
    along,
    attempt,
    build,
    check_steps,
    fill_value,
    label,
    must,
    need,
    on_axis,
    show,
)

__all__ = ["SOURCES", "Preprocess"]

SOURCES: Tuple[str, ...] = ("image", "audio", "bytes", "text", "array")

_MAX_FILE_BYTES = 1 << 28

Run = Callable[[np.ndarray], np.ndarray]
Decode = Callable[[bytes], np.ndarray]
Dtype = Literal["float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"]


class Preprocess:
    """Makes a model's input from one sample, without a batch axis unless a step adds one.

    `source` says what a sample is and `steps` what is done with it, each a table with an `op` and
    its options; the first may be `decode`. Calling it takes bytes (a file's content), a
    `pathlib.Path`, or what is decoded already, see above; it gives a C-contiguous array of the
    caller's own, the same bytes for the same sample.

    >>> steps = [{"op": "center-crop", "size": 2}, {"op": "layout", "to": "NCHW"}]
    >>> pipeline = Preprocess("image", steps)
    >>> print(pipeline)
    image -> center-crop 2 -> layout NCHW
    >>> pipeline(np.zeros((4, 6, 3), np.uint8)).shape
    (1, 3, 2, 2)

    Raises:
        UsageError: an unknown source, op or option, or one of another type or out of range.
        InputError: when called: the sample cannot be decoded or does not fit the steps.
        MissingToolError: when called: an image without Pillow.
    """

    def __init__(self, source: str, steps: Sequence[Mapping[str, Any]]) -> None:
        known = f"known: {', '.join(SOURCES)}"
        must(isinstance(source, str) and source in SOURCES, f"no source {show(source)}; {known}")
        given = list(check_steps(steps))
        ops = [step.get("op") if isinstance(step, Mapping) else None for step in given]
        must("decode" not in ops[1:], "the step decode can only be the first")
        self.source, self._sample = source, Sample(source)
        if "decode" not in ops:
            given.insert(0, {"op": "decode"})
        self._decode: Decode = build(given[0], 1, {"decode": _DECODERS[source]}, self._sample)
        self._channels = 1 if self._sample.color == "gray" else 3
        self._steps: List[Tuple[str, Run]] = []
        for number, step in enumerate(given[1:], 1 + ("decode" in ops)):
            run = build(step, number, _STEPS, self._sample)
            self._steps.append((f"step {number} ({step['op']})", run))
            self._sample.fresh = False
        self._label = " -> ".join([source, *map(label, steps)])

    def __str__(self) -> str:
        return self._label

    def __call__(self, raw: Any) -> np.ndarray:
        """The model's input."""
        with np.errstate(all="ignore"):  # NaN and Inf travel on, or a step refuses them
            x = self._load(raw)
            for where, run in self._steps:
                x = np.asarray(attempt(where, "failed", run, x))
            out = np.require(x, requirements=["C", "W"])
        theirs = isinstance(raw, np.ndarray) and np.may_share_memory(out, raw)
        return out.copy() if theirs else out

    def _load(self, raw: Any) -> np.ndarray:
        what = str(raw) if isinstance(raw, Path) else f"the {self.source}"
        if isinstance(raw, np.ndarray) and self.source != "text":
            return np.asarray(attempt(what, "failed", self._check, np.asarray(raw)))
        content = raw
        if isinstance(raw, Path) and self.source != "array":
            content = _read(raw, self._sample.block)
        elif isinstance(raw, str) and self.source == "text":
            content = raw.encode("utf-8", "surrogatepass")  # which decoding refuses
        fits = isinstance(content, bytes) and self.source != "array"
        hint = f"; for a file: pathlib.Path({raw[:40]!r})" if isinstance(raw, str) else ""
        need(fits, f"{what} is a {type(raw).__name__}; wanted {_WANTED[self.source]}{hint}")
        return np.asarray(attempt(what, "cannot be decoded", self._decode, content))

    def _check(self, x: np.ndarray) -> np.ndarray:
        """An array that is given instead of a file."""
        found = f"is {x.dtype} {list(x.shape)}; wanted {_WANTED[self.source]}"
        if self.source == "image":
            need(x.dtype == np.uint8 and x.shape[2:] == (self._channels,) and x.size > 0, found)
            check_image(x)
            return x
        if self.source == "array":
            need(x.dtype.kind in "biufOU", found)
            return x.astype(x.dtype.newbyteorder("="), copy=False)
        dtype = np.uint8 if self.source == "bytes" else np.float32
        need(x.ndim == 1 and x.dtype == dtype, found)
        return x


_WANTED = {
    "image": "bytes, a pathlib.Path or uint8 (height, width, channels)",
    "audio": "bytes, a pathlib.Path or float32 (samples,)",
    "bytes": "bytes, a pathlib.Path or uint8 (n,)",
    "text": "a str, bytes or a pathlib.Path",
    "array": "an array of numbers or strings",
}


# --- decoding -------------------------------------------------------------------------------------


def _read(path: Path, block: Optional[int]) -> bytes:
    """The file, or its first and last `block` bytes where it is longer than both."""
    try:
        need(path.is_file(), f"{path} is not a file")  # a pipe would wait, a device never end
        with path.open("rb") as file:
            if block is not None and file.seek(0, io.SEEK_END) > 2 * block:
                file.seek(0)
                first = file.read(block)
                file.seek(-block, io.SEEK_END)
                return first + file.read(block)
            file.seek(0)
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from None
    need(len(data) <= _MAX_FILE_BYTES, f"{path} is longer than {_MAX_FILE_BYTES} bytes")
    return data


def _audio(sample: Sample, *, rate: Optional[Count] = None, resample_: bool = False) -> Decode:
    """float32 (samples,), -1..1, from a WAV of that rate (Hz), or resampled to it.

    An array of samples is taken to have the rate.
    """
    must(rate is not None or not resample_, "has resample = true, but no rate to resample to")
    sample.rate = rate

    def decode(data: bytes) -> np.ndarray:
        samples, found = read_wav(data)
        wanted = sample.rate  # log-mel may have said it
        if wanted is None or wanted == found:
            return samples
        hint = "convert it, or say resample = true in the step decode"
        need(resample_, f"has {found} Hz, the model wants {wanted} Hz: {hint}")
        return resample(samples, found, wanted)

    return decode


def _text(sample: Sample, *, mode: Literal["utf-8", "codepoints", "string"] = "utf-8") -> Decode:
    """uint8 (n,), int32 (n,), or one str of shape (1,) for models that take strings."""

    def decode(data: bytes) -> np.ndarray:
        text = data.decode("utf-8")
        if mode == "string":
            return np.array([text], object)
        codes = np.frombuffer(text.encode("utf-32-le"), "<i4").astype(np.int32)
        return codes if mode == "codepoints" else np.frombuffer(data, np.uint8)

    return decode


def _plain(sample: Sample) -> Decode:
    """uint8 (n,)."""
    return lambda data: np.frombuffer(data, np.uint8)


# --- numbers --------------------------------------------------------------------------------------


def _normalize(
    sample: Sample,
    *,
    scale: Optional[Numbers] = None,
    mean: Optional[Numbers] = None,
    std: Optional[Numbers] = None,
    axis: Optional[Axis] = None,
) -> Run:
    """y = (x * scale - mean) / std in float32, each a number or a list over the channels.

    Channels are the last axis, or where `layout` put them. `axis` says otherwise, and has to
    after `reshape` and `expand`.
    """
    above_zero = std is None or bool((np.array(std, np.float32) > 0).all())
    must(above_zero, f"has std = {std}; wanted numbers above 0")
    given = ((np.multiply, scale), (np.subtract, mean), (np.divide, std))
    work = [(apply, np.array(values, np.float32)) for apply, values in given if values is not None]
    lengths = sorted({values.size for _, values in work if values.ndim})
    where = sample.channel_axis if axis is None else axis
    must(len(lengths) < 2, f"has lists of different lengths: {lengths}")
    must(not lengths or where is not None, "has a list; after reshape or expand it needs axis")
    if sample.source == "image" and axis is None and lengths:
        have = 1 if sample.color == "gray" else 3
        must(lengths == [have], f"has a list of {lengths[0]}, the image has {have} channels")

    def run(x: np.ndarray) -> np.ndarray:
        y = x.astype(np.float32)
        for apply, values in work:
            apply(y, along(values, x, where or 0), out=y)
        return y

    return run


def _cast(sample: Sample, *, dtype: Dtype) -> Run:
    """To another dtype; floats lose their fraction. What does not fit an integer is refused."""

    def run(x: np.ndarray) -> np.ndarray:
        if np.dtype(dtype).kind in "iu" and x.size:
            info = np.iinfo(dtype)
            low, high = np.trunc(x.min()).item(), np.trunc(x.max()).item()  # NaN stays NaN
            need(info.min <= low and high <= info.max, f"got {low} to {high}; {dtype} cannot")
        return x.astype(dtype)

    return run


def _quantize(
    sample: Sample,
    *,
    scale: Positive,
    dtype: Literal["int8", "uint8", "int16"],
    zero_point: Int32 = 0,
) -> Run:
    """round(x / scale) + zero_point in float32, halves to even, saturated.

    As ONNX's QuantizeLinear and TFLite's QUANTIZE (measured: LiteRT 2, with and without XNNPACK;
    its reference kernels alone round halves away from zero, `TfLiteRound`).
    """
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    must(low <= zero_point <= high, f"has zero_point = {zero_point}, which {dtype} cannot hold")

    def run(x: np.ndarray) -> np.ndarray:
        whole = np.rint(x.astype(np.float32) / np.float32(scale))
        need(not np.isnan(whole).any(), "got NaN")
        inside = np.clip(whole, low - zero_point, high - zero_point)
        return np.asarray(inside + zero_point).astype(dtype)

    return run


# --- shapes ---------------------------------------------------------------------------------------


def _pad(
    sample: Sample,
    *,
    length: Count,
    value: Number = 0,
    side: Literal["right", "left"] = "right",
    axis: Axis = -1,
) -> Run:
    """`value` at that side until there are `length` along `axis`; what is longer stays."""

    def run(x: np.ndarray) -> np.ndarray:
        where = on_axis(x, axis)
        missing = max(0, length - x.shape[where])
        size = math.prod(x.shape[:where]) * length * math.prod(x.shape[where + 1 :])
        need(not missing or size <= MAX_VALUES, f"would make {size} values: too many")
        width = [(0, 0)] * x.ndim
        width[where] = (0, missing) if side == "right" else (missing, 0)
        return np.pad(x, width, mode="constant", constant_values=fill_value(value, x.dtype))

    return run


def _truncate(
    sample: Sample, *, length: Count, side: Literal["right", "left"] = "right", axis: Axis = -1
) -> Run:
    """At most `length` along `axis`; the rest is cut off at that side."""
    kept = slice(length) if side == "right" else slice(-length, None)
    return lambda x: x[(slice(None),) * on_axis(x, axis) + (kept,)]


def _reshape(sample: Sample, *, shape: Shape) -> Run:
    """The same values in another shape; one size may be -1, which is what is left."""
    sample.layout, sample.channel_axis = "", None
    return lambda x: x.reshape(shape)


def _expand(sample: Sample, *, axis: Axis) -> Run:
    """One axis of length 1 more, as `numpy.expand_dims`."""
    sample.layout, sample.channel_axis = "", None
    return lambda x: np.expand_dims(x, axis)


def _head_tail(
    sample: Sample,
    *,
    head: CountOr0,
    tail: CountOr0,
    block: Count,
    strip: bool = False,
    pad: Int32 = 0,
    dtype: Literal["int32", "int64", "int16", "uint8", "float32"] = "int32",
) -> Run:
    """(head + tail,): the beginning and the end of a file, for models of bytes.

    Of the first `block` bytes, without leading ASCII white space (`strip`), the first `head`,
    padded at the right; of the last `block`, without trailing white space, the last `tail`, padded
    at the left. Magika 1.0 (`_extract_features_from_seekable`): 1024, 1024, 4096, strip, pad 256.
    """
    must(head + tail > 0, "has head = 0 and tail = 0; wanted one of them above 0")
    must(max(head, tail) <= block, f"has block = {block}; wanted at least head and tail")
    filler = fill_value(pad, np.dtype(dtype))
    sample.signal()
    if sample.source == "bytes" and sample.fresh:
        sample.block = block

    def run(x: np.ndarray) -> np.ndarray:
        fits = x.ndim == 1 and x.dtype == np.uint8
        need(fits, f"got {x.dtype} {list(x.shape)}; wanted uint8 (n,)")
        first, last = x[:block].tobytes(), x[-block:].tobytes()
        if strip:
            first, last = first.lstrip(), last.rstrip()
        first, last = first[:head], last[max(0, len(last) - tail) :]
        out = np.full(head + tail, filler, dtype)
        out[: len(first)] = np.frombuffer(first, np.uint8)
        out[head + tail - len(last) :] = np.frombuffer(last, np.uint8)
        return out

    return run


_DECODERS: Dict[str, Callable[..., Decode]] = {
    "image": decode_image, "audio": _audio, "bytes": _plain, "text": _text, "array": _plain,
}  # fmt: skip
_STEPS: Dict[str, Callable[..., Run]] = {
    "resize": resize, "center-crop": center_crop, "letterbox": letterbox, "color": color,
    "layout": layout, "normalize": _normalize, "cast": _cast, "quantize": _quantize, "pad": _pad,
    "truncate": _truncate, "reshape": _reshape, "expand": _expand, "head-tail": _head_tail,
    "frame": frame, "log-mel": log_mel,
}  # fmt: skip
