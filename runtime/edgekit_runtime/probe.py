"""One-operator models: an engine counts as usable only after it compiled and ran one."""

from __future__ import annotations

import base64
import zlib
from typing import Tuple

import numpy as np

from .engines import Options, load_engine
from .engines.accelerators import accelerator_of, split_engine
from .errors import EngineError, MissingToolError, one_line

__all__ = ["ONNX_MODEL", "probe", "stand_in", "tflite_model"]

# y = x @ x for float32 (2, 2), opset 13: `onnx.helper.make_model` with nothing optional set.
ONNX_MODEL = base64.b64decode(
    "CAcSADpAChEKAXgKAXgSAXkiBk1hdE11bBIBcFoTCgF4Eg4KDAgBEggKAggCCgIIAmITCgF5Eg4KDAgBEggKAggC"
    "CgIIAkIECgAQDQ=="
)
# y = x + x for float32 (1, 2), from TensorFlow 2.21's converter, deflated.
_TFLITE = (
    "eNplUr1OwlAUPoUKBJqqoTEOHRgcTQP4M7gRxISEH4PEyaQ0aTVNoCSlEEwcHZ2cGRkceAafwMEH4Dkcrefcnosk3O"
    "RL7/3OOd/5qwkA/ZvWmQElMOEYDDgADbkcqHgH5ABeEWvEmwKwQHylANL4xit608mLKIrJ40vjuHPEPmLihTM/eLJd"
    "79GZDiMRpyKWcRzLO32f+UtvHW2SnyNSrEfcmm2EIqLe7dw3enfNbsduN/q161q/hrUk9eQgqVX6jvzADqdB5I88e+"
    "aFE38cwB7yK6oHsUC8sP875xls+qS56Btd4k4EmxFchuNAzEDOUhXzuGyksuZP00xzL6qIAqha1YpV3tUg7Yp1kZj4"
    "LH/j+AOxQtBc261mr1QfB9hH5LmWmJUhPPVNdtLUmaedPHA/LucZOX4APGcZa4j8GhQ4lnsvaHw/5b0p3Is8yhaAbQ"
    "PO84kxZDpgDbKVaLfIH+L31gkjP8JteG7dGQ6vyuzzn+NI9ATcVXKyyCappa7Cut+oW9z99+w5Km/rKmKnVKMq6vwD"
    "60xj5A=="
)


# y = x * 2 for float32 (1, 2).
_NCNN = {
    "probe.param": b"7767517\n2 2\nInput in 0 1 x\nBinaryOp m 1 1 x y 0=2 1=1 2=2.0\n",
    "probe.bin": b"",
    "probe.json": b"""{"inputs": [{"name": "x", "dtype": "float32", "shape": [1, 2]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [1, 2]}]}""",
}


def tflite_model() -> bytes:
    """A TFLite model of one operator."""
    return zlib.decompress(base64.b64decode(_TFLITE))


def probe(engine: str) -> str:
    """Compile and run one operator, for `ENGINE:ACCELERATOR` on the accelerator; returns the
    engine's version.

    Raises:
        EngineMissingError: not installed, or nothing here to run on.
        EngineError: installed, but it does not compute, or computes somewhere else.
    """
    return _tried(engine)[0]


def stand_in(engine: str) -> str:
    """As `probe`, but returns what stands in for the accelerator here, `Qualcomm's HTP emulator`
    say; empty if it is the accelerator itself, or is not known."""
    return _tried(engine)[1]


def _tried(engine: str) -> Tuple[str, str]:
    base, accelerator = split_engine(engine)
    own = accelerator_of(engine).probe if accelerator else None
    if own is not None:
        return own(), ""
    files = {"probe.onnx": ONNX_MODEL}
    x = np.array([[1.5, -2.0]], np.float32)
    wanted = x + x
    if base == "litert":
        files = {"probe.tflite": tflite_model()}
    elif base == "ncnn":
        files = _NCNN
    else:
        x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
        wanted = x @ x
    try:
        loaded = load_engine(engine, files, Options())
        binding = loaded.bind((x.shape,))
        binding.inputs[0][...] = x
        binding.invoke()
        placement = loaded.placement()
    except MissingToolError:
        raise
    except Exception as error:
        raise EngineError(f"{engine} does not run one operator: {one_line(error)}") from error
    allowed = 1e-2 if accelerator else 1e-5  # some compute in float16, whatever they are told
    if not np.allclose(binding.outputs[0], wanted, atol=allowed, rtol=allowed):
        raise EngineError(f"{engine} computes wrong results for one operator: do not use it here")
    if accelerator and placement.shares.get(accelerator_of(engine).device) != 1.0:
        raise EngineError(f"{engine} was asked for and ran {placement}")
    return loaded.version, placement.simulated
