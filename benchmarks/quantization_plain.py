"""What the quantizers give by themselves, each with its defaults; runs in a child.

    python benchmarks/quantization_plain.py TOOL SOURCE TARGET SAMPLES.npz

The benchmark (`quantization.py`) sets these beside EdgeKit's. `SAMPLES`: arrays by the model's
inputs, first axis samples.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PLAIN", "Plain"]

Rows = list[dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class Plain:
    """A library's default: the formats it reads and writes, what it makes."""

    text: str
    target: str
    run: Callable[[str, str, Rows], None]
    source: str = ""

    @property
    def takes(self) -> str:
        """The format it reads."""
        return self.source or self.target


def _ort_static(source: str, target: str, rows: Rows, **options: Any) -> None:
    from onnxruntime import quantization as tools

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            self._rows = iter(rows)

        def get_next(self) -> Any:
            return next(self._rows, None)

    tools.quantize_static(source, target, Reader(), **options)


def _ort_matmul(source: str, target: str, rows: Rows) -> None:
    _ort_static(
        source, target, rows, op_types_to_quantize=["Conv", "MatMul", "Gemm"], per_channel=True
    )


def _ort_dynamic(source: str, target: str, rows: Rows) -> None:
    from onnxruntime import quantization as tools

    tools.quantize_dynamic(source, target)


def _ort_int4(source: str, target: str, rows: Rows) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source))
    quantizer.process()
    quantizer.model.save_model_to_file(target)


def _nncf_openvino(source: str, target: str, rows: Rows, **options: Any) -> None:
    import nncf
    import openvino as ov

    made = nncf.quantize(ov.Core().read_model(source), nncf.Dataset(rows), **options)
    ov.save_model(made, target, compress_to_fp16=False)


def _nncf_transformer(source: str, target: str, rows: Rows) -> None:
    import nncf

    _nncf_openvino(source, target, rows, model_type=nncf.ModelType.TRANSFORMER)


def _nncf_weights(source: str, target: str, rows: Rows, mode: str = "") -> None:
    import nncf
    import openvino as ov

    options = {"mode": nncf.CompressWeightsMode(mode)} if mode else {}
    made = nncf.compress_weights(ov.Core().read_model(source), **options)
    ov.save_model(made, target, compress_to_fp16=False)


def _nncf_int4(source: str, target: str, rows: Rows) -> None:
    _nncf_weights(source, target, rows, "int4_asym")


def _nncf_onnx(source: str, target: str, rows: Rows) -> None:
    import nncf
    import onnx

    onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(rows)), target)


def _litert(recipe: str) -> Callable[[str, str, Rows], None]:
    def run(source: str, target: str, rows: Rows) -> None:
        from ai_edge_litert.interpreter import Interpreter
        from litert_quantizer import recipe as recipes
        from litert_quantizer.quantizer import Quantizer

        tool = Quantizer(source, getattr(recipes, recipe)())
        results = None
        if tool.need_calibration:
            (signature,) = Interpreter(source).get_signature_list()
            results = tool.calibrate({signature: rows})
        tool.quantize(results).export_model(target)

    return run


def _tensorflow(source: str, target: str, rows: Rows) -> None:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(source)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: _by_signature(rows)
    Path(target).write_bytes(converter.convert())


def _by_signature(rows: Rows) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in rows:
        yield "serving_default", dict(row)


PLAIN = {
    "ort-static": Plain("onnxruntime quantize_static", "onnx", _ort_static),
    "ort-static-matmul": Plain(
        "onnxruntime quantize_static, Conv/MatMul/Gemm, per channel", "onnx", _ort_matmul
    ),
    "ort-dynamic": Plain("onnxruntime quantize_dynamic", "onnx", _ort_dynamic),
    "ort-int4": Plain("onnxruntime MatMulNBitsQuantizer", "onnx", _ort_int4),
    "nncf-onnx": Plain("nncf.quantize", "onnx", _nncf_onnx),
    "nncf": Plain("nncf.quantize", "openvino", _nncf_openvino),
    "nncf-transformer": Plain(
        "nncf.quantize, model_type=TRANSFORMER", "openvino", _nncf_transformer
    ),
    "nncf-int8-weights": Plain("nncf.compress_weights", "openvino", _nncf_weights),
    "nncf-int4-weights": Plain("nncf.compress_weights, INT4_ASYM", "openvino", _nncf_int4),
    "litert-static": Plain("litert-quantizer static_wi8_ai8", "tflite", _litert("static_wi8_ai8")),
    "litert-dynamic": Plain(
        "litert-quantizer dynamic_wi8_afp32", "tflite", _litert("dynamic_wi8_afp32")
    ),
    "litert-int4": Plain(
        "litert-quantizer dynamic_wi4_afp32", "tflite", _litert("dynamic_wi4_afp32")
    ),
    "tensorflow": Plain(
        "TFLiteConverter, representative_dataset", "tflite", _tensorflow, "savedmodel"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=PLAIN)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("samples", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with np.load(args.samples) as archive:
        arrays = dict(archive)
    count = len(next(iter(arrays.values())))
    rows = [
        {name: array[index : index + 1] for name, array in arrays.items()} for index in range(count)
    ]
    try:
        PLAIN[args.tool].run(args.source, args.target, rows)
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        sys.exit(f"{type(error).__name__}: {said[0][:200]}")


if __name__ == "__main__":
    main()
