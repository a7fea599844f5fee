"""Sound for models: WAV files, sampling rates, frames and log-mel features, in plain numpy."""

from __future__ import annotations

import io
import math
import wave
from typing import Callable, Literal, Optional, Tuple

import numpy as np

from .steps import MAX_VALUES, Count, Number, Sample, must, need

__all__ = ["frame", "log_mel", "read_wav", "resample"]

Run = Callable[[np.ndarray], np.ndarray]

_MAX_RATIO = 1 << 16  # of two rates in lowest terms: their filter has 20 times as many taps
_MAX_WEIGHTS = 1 << 22  # fft * mels: 32 MB
_EXTENSIBLE, _PCM = b"\xfe\xff", b"\x01\x00"  # format tags of WAV


def read_wav(data: bytes) -> Tuple[np.ndarray, int]:
    """float32 (samples,) in -1..1 and the rate in Hz: PCM, 8 to 32 bits, the mean of all channels.

    Raises:
        InputError: no samples, another number of them than announced, or far too many.
        wave.Error, EOFError: no WAV, or one that is not PCM.
    """
    if data[12:16] == b"fmt " and data[20:22] == _EXTENSIBLE and data[44:46] == _PCM:
        data = data[:20] + _PCM + data[22:]  # `wave` knows the tag from Python 3.12 on only
    with wave.open(io.BytesIO(data)) as file:
        width, channels, frames = file.getsampwidth(), file.getnchannels(), file.getnframes()
        rate, packed = file.getframerate(), np.frombuffer(file.readframes(frames), np.uint8)
    need(width <= 4, f"has {8 * width} bits a sample; wanted 8, 16, 24 or 32")
    have = len(packed) / (channels * width)
    need(frames and have == frames, f"announces {frames} samples and holds {have:g}")
    need(frames * channels <= MAX_VALUES, f"has {frames} samples; wanted at most {MAX_VALUES}")
    wide = np.zeros((frames * channels, 4), np.uint8)  # any width is the upper part of an int32
    wide[:, 4 - width :] = packed.reshape(-1, width) ^ (0x80 if width == 1 else 0)  # 8: unsigned
    total = wide.view("<i4").reshape(frames, channels).sum(axis=1, dtype=np.float64)  # exact
    return (total / (channels * 2.0**31)).astype(np.float32), rate


def resample(x: np.ndarray, have: int, want: int) -> np.ndarray:
    """float32 (ceil(n * want / have),): windowed sinc, polyphase, as `scipy.signal.resample_poly`.

    With up / down = want / have in lowest terms and m = max(up, down):
    y[n] = sum over k of x[k] * h(n * down - k * up), x = 0 outside, and for |i| <= 10 m
    h(i) = sinc(i / m) * kaiser(i; beta = 5), scaled to a sum of `up`.

    Raises:
        InputError: the rates have no common measure, or the result would be far too long.
    """
    divisor = math.gcd(have, want)
    up, down = want // divisor, max(1, have // divisor)
    most, count = max(up, down), -(-len(x) * up // down)
    fits = have > 0 and most <= _MAX_RATIO and count <= MAX_VALUES
    need(fits, f"cannot resample {len(x)} samples from {have} Hz to {want} Hz")
    half = 10 * most
    h = np.sinc(np.arange(-half, half + 1) / most) * np.kaiser(2 * half + 1, 5.0)
    h *= up / h.sum()
    reach = half // up + 1  # samples of x on either side of an output
    at = np.arange(-reach, reach + 1)[:, None] * up + np.arange(up) + half
    phases = np.where((at >= 0) & (at <= 2 * half), h.take(at, mode="clip"), 0.0)
    padded = np.pad(x.astype(np.float64), reach, mode="constant")
    out = np.empty(count, np.float32)
    for start in range(0, count, 1 << 16):
        centre = np.arange(start, min(start + (1 << 16), count), dtype=np.int64) * down
        total = np.zeros(len(centre))
        for j, row in enumerate(phases):
            total += row[centre % up] * padded[centre // up + 2 * reach - j]
        out[start : start + len(centre)] = total
    return out


def _frames(x: np.ndarray, length: int, hop: int) -> np.ndarray:
    """A view (1 + (n - length) // hop, length); what is left at the end is dropped."""
    need(len(x) >= length, f"got {len(x)} samples, one frame has {length}: pad before")
    step = x.strides[0]
    shape = (1 + (len(x) - length) // hop, length)
    return np.lib.stride_tricks.as_strided(x, shape, (hop * step, step), writeable=False)


def frame(sample: Sample, *, length: Count, hop: Count) -> Run:
    """Cut (n,) into frames (1 + (n - length) // hop, length); the rest at the end is dropped."""
    sample.signal()

    def run(x: np.ndarray) -> np.ndarray:
        need(x.ndim == 1, f"got the shape {list(x.shape)}; wanted (n,)")
        frames = _frames(x, length, hop)
        need(frames.size <= MAX_VALUES, f"would make {len(frames)} frames of {length}: too many")
        return frames

    return run


def _mel_filters(
    *, rate: int, fft: int, mels: int, scale: str, triangles: str, ends: Tuple[float, float]
) -> Tuple[np.ndarray, np.ndarray]:
    """float64 (fft // 2 + 1, mels), and the width of each filter in Hz."""
    bend, log_step = 1000.0, math.log(6.4) / 27

    def to_mel(f: np.ndarray) -> np.ndarray:
        if scale == "htk":
            return 2595 * np.log10(1 + f / 700)
        return np.where(f < bend, f * 3 / 200, 15 + np.log(np.maximum(f, bend) / bend) / log_step)

    def to_hz(mel: np.ndarray) -> np.ndarray:
        if scale == "htk":
            return 700 * (10 ** (mel / 2595) - 1)
        return np.where(
            mel < 15, mel * 200 / 3, bend * np.exp((np.maximum(mel, 15) - 15) * log_step)
        )

    low, high = to_mel(np.array(ends))
    edges = np.linspace(low, high, mels + 2)
    hertz = to_hz(edges)
    bins = np.arange(fft // 2 + 1)[:, None] * (rate / fft)
    place, edge = (to_mel(bins), edges) if triangles == "mel" else (bins, hertz)
    rise = (place - edge[:-2]) / (edge[1:-1] - edge[:-2])
    fall = (edge[2:] - place) / (edge[2:] - edge[1:-1])
    return np.maximum(np.minimum(rise, fall), 0), hertz[2:] - hertz[:-2]


def log_mel(
    sample: Sample,
    *,
    rate: Count,
    fft: Count,
    frame: Count,
    hop: Count,
    mels: Count,
    fmin: Number = 0.0,
    fmax: Optional[Number] = None,
    window: Literal["hann", "hamming"] = "hann",
    power: Literal[1, 2] = 2,
    scale: Literal["htk", "slaney"] = "htk",
    triangles: Optional[Literal["mel", "hz"]] = None,
    norm: Literal["none", "slaney"] = "none",
    log: Literal["ln", "log10", "db", "none"] = "ln",
    offset: Optional[Number] = None,
    center: bool = False,
) -> Run:
    """(samples,) at `rate` Hz -> float32 (frames, mels).

    Frames of `frame` samples every `hop`, weighted by a periodic window w[i] = a - (1 - a) *
    cos(2 pi i / frame), a = 0.5 (hann) or 0.54 (hamming), and padded with zeros to `fft`:
    `tf.signal.stft`. There are 1 + (n - frame) // hop; with `center` the first is centred on
    sample 0, the signal mirrored at both ends: `torch.stft`, 1 + n // hop. |FFT| ** power times the
    filters, then `log`: ln and log10 of (mel + offset), offset 1e-6; db is 10 log10 (20 for power
    1) of max(mel, offset), offset 1e-10, as `librosa.power_to_db(top_db=None)`.

    The filters rise from edge m to edge m + 1 and fall to m + 2; mels + 2 edges are equally far
    apart in mel from `fmin` to `fmax` (rate / 2). htk: mel = 2595 log10(1 + f / 700). slaney
    (Auditory Toolbox): 3 f / 200, from 1 kHz on 15 + 27 ln(f / 1000) / ln 6.4. `triangles` are
    straight over mel (default for htk: `tf.signal.linear_to_mel_weight_matrix`, Kaldi) or over hz
    (default for slaney: librosa; torchaudio, also for htk). norm slaney divides by half the width
    in Hz: librosa's default.
    """
    sample.signal()
    known = sample.rate if sample.source == "audio" else None
    must(known in (None, rate), f"has rate = {rate}, the step decode has {known}")
    sample.rate = rate
    top = rate / 2 if fmax is None else fmax
    must(frame <= fft, f"has frame = {frame}; wanted at most fft = {fft}")
    must(fft * mels <= _MAX_WEIGHTS, f"has fft = {fft}, mels = {mels}: more than any model uses")
    must(0 <= fmin < top <= rate / 2, f"has fmin = {fmin}, fmax = {top}; wanted 0 to rate / 2")
    least = {"db": 1e-10, "none": 0.0}.get(log, 1e-6) if offset is None else offset
    must(least > 0 or log == "none", f"has offset = {least}; wanted a number above 0")
    straight = triangles or ("mel" if scale == "htk" else "hz")
    bank, width = _mel_filters(
        rate=rate, fft=fft, mels=mels, scale=scale, triangles=straight, ends=(fmin, top)
    )
    bank = bank * 2 / width if norm == "slaney" else bank
    a = 0.5 if window == "hann" else 0.54
    weights = a - (1 - a) * np.cos(2 * np.pi * np.arange(frame) / frame)
    before = fft // 2 - (fft - frame) // 2  # the window is in the middle of the FFT: torch.stft
    block = max(1, (1 << 18) // fft)  # frames at a time: 2 MB

    def run(x: np.ndarray) -> np.ndarray:
        need(x.ndim == 1 and x.dtype.kind in "iuf", f"got {x.dtype} {list(x.shape)}; wanted (n,)")
        need(np.isfinite(x).all(), "got NaN or Inf")
        signal = x.astype(np.float64)
        if center:
            need(len(x) > fft // 2, f"got {len(x)} samples; center wants more than {fft // 2}")
            count = 1 + (len(x) + 2 * (fft // 2) - fft) // hop
            after = max(0, (count - 1) * hop + frame - before - len(x))
            signal = np.pad(signal, (before, after), mode="reflect")[: (count - 1) * hop + frame]
        frames = _frames(signal, frame, hop)
        need(len(frames) * mels <= MAX_VALUES, f"would make {len(frames)} frames: too many")
        out = np.empty((len(frames), mels), np.float32)
        for start in range(0, len(frames), block):
            spectrum = np.fft.rfft(frames[start : start + block] * weights, fft)
            energy = spectrum.real**2 + spectrum.imag**2
            mel = (energy if power == 2 else np.sqrt(energy)) @ bank
            if log == "db":
                mel = (20 // power) * np.log10(np.maximum(mel, least))
            elif log == "none":
                mel = mel + least
            else:
                mel = (np.log if log == "ln" else np.log10)(mel + least)
            out[start : start + block] = mel
        return out

    return run
