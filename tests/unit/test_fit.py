"""Where operators run and why not, and whether the model fits; on graphs made by hand."""

from typing import Any

import pytest

from edgekit.device import DeviceProfile, Quantization
from edgekit.fit import Fit, judge
from edgekit.graph import Graph, Operator, Tensor
from edgekit.precision import broken_promise, computed_types, in_8_bits


def device(**facts: Any) -> DeviceProfile:
    stated = {"engines": {"onnxruntime": {}}, "kind": "board", "arch": "aarch64", **facts}
    named = [key for key in stated if key not in ("kind", "arch") and stated[key] != {}]
    source = {"fields": named, "kind": "choice", "title": "sheet", "says": "so"}
    return DeviceProfile.model_validate(
        {"schema": "edgekit.device/1", "id": "it", "name": "It", **stated, "sources": [source]}
    )


def tensor(name: str, dtype: str = "float32", shape: Any = (1, 8), **more: Any) -> Tensor:
    sizes = {"float32": 4, "int8": 1, "uint8": 1, "int64": 8}
    size = sizes.get(dtype, 4)
    for dim in shape:
        size *= dim if isinstance(dim, int) else 1
    known = all(isinstance(dim, int) for dim in shape)
    return Tensor(name, dtype, shape, size_bytes=size if known else None, **more)


def step(kind: str, inputs: str, outputs: str, **more: Any) -> Operator:
    facts: dict[str, Any] = {"version": 13, "custom": False, "macs": 0, "canonical": kind, **more}
    return Operator(
        f"{kind}_of_{inputs.split()[0]}", kind, facts.pop("version"), facts.pop("custom"),
        tuple(inputs.split()), tuple(outputs.split()), facts.pop("macs"), facts.pop("canonical"),
    )  # fmt: skip


def graph(steps: list[Operator], tensors: list[Tensor], fmt: str = "onnx", **more: Any) -> Graph:
    made = {name for one in steps for name in one.outputs}
    read = {name for one in steps for name in one.inputs}
    constants = {one.name for one in tensors if one.constant}
    weights = sum(one.size_bytes or 0 for one in tensors if one.constant)
    return Graph(
        fmt, more.get("opset", 17 if fmt == "onnx" else None), {}, tuple(steps),
        {one.name: one for one in tensors}, tuple(sorted(read - made - constants)),
        tuple(sorted(made - read)), weights,
    )  # fmt: skip


def small(**x: Any) -> Graph:
    """x @ w -> Relu -> y."""
    return graph(
        [step("MatMul", "x w", "h", macs=64), step("Relu", "h", "y")],
        [tensor("x", **x), tensor("w", shape=(8, 8), constant=True), tensor("h"), tensor("y")],
    )


def verdicts(fit: Fit, place: str) -> list[str]:
    return [str(one) for one in fit.verdicts[place]]


def npu(**facts: Any) -> dict[str, Any]:
    stated = {"kind": "npu", "engine": "onnxruntime", "operator_format": "onnx",
              "operators": ["MatMul", "Relu"], **facts}  # fmt: skip
    return {"npu": stated}


def test_operators_of_an_engine_run_and_others_are_named() -> None:
    model = small()
    odd = graph(
        [model.operators[0], step("my:Thing", "h", "y", custom=True, canonical=None)],
        list(model.tensors.values()),
    )  # fmt: skip
    assert verdicts(judge(model, device()), "onnxruntime") == ["yes", "yes"]
    fit = judge(odd, device())
    assert verdicts(fit, "onnxruntime") == ["yes", "no"]
    assert fit.hopeless and "my:Thing (my:Thing_of_h) cannot run on it" in fit.hopeless[0]
    assert "is not among the operators of onnxruntime" in fit.hopeless[0]


def test_a_newer_opset_than_the_engine_takes_is_refused_with_both_numbers() -> None:
    model = graph(list(small().operators), list(small().tensors.values()), opset=99)
    fit = judge(model, device())
    assert {one.state for one in fit.verdicts["onnxruntime"]} == {"no"}
    assert "opset 99; onnxruntime" in fit.verdicts["onnxruntime"][0].reason
    old = judge(small(), device(engines={"onnxruntime": {"opset": 13}}))
    assert "takes up to 13" in old.verdicts["onnxruntime"][0].reason


def test_tflite_operator_versions_are_compared() -> None:
    steps = [step("FULLY_CONNECTED", "x w", "y", version=12, canonical="Gemm", macs=64)]
    model = graph(steps, [tensor("x"), tensor("w", constant=True), tensor("y")], "tflite")
    assert verdicts(judge(model, device(engines={"litert": {}})), "litert") == ["yes"]
    old = {"litert": {"distribution": "tflite-runtime", "version": "2.14.0"}}
    fit = judge(model, device(engines=old))
    assert "FULLY_CONNECTED version 12; tflite-runtime 2.14.0 takes up to" in fit.hopeless[0]


def test_other_formats_are_judged_by_the_same_operator_under_its_name_there() -> None:
    fit = judge(small(), device(engines={"litert": {}}))
    assert [one.state for one in fit.verdicts["litert"]] == ["runs", "runs"]
    assert fit.verdicts["litert"][1].reason == "as RELU"
    # What has no counterpart of its own may be built of others: not known, so no refusal.
    odd = graph([step("Celu", "x", "y")], [tensor("x"), tensor("y")])
    fit = judge(odd, device(engines={"litert": {}}))
    assert [one.state for one in fit.verdicts["litert"]] == ["unknown"]
    assert not fit.hopeless and fit.macs_share(fit.places[0]) is None


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ({}, ["yes", "yes"]),
        ({"dtypes": ["int8"]}, ["if int8", "if int8"]),
        ({"dtypes": ["float16"]}, ["if float16", "if float16"]),
        ({"operators": ["MatMul"]}, ["yes", "no"]),
        ({"most_dimensions": 1}, ["no", "no"]),
        ({"memory_bytes": 300}, ["no", "yes"]),
        ({"static_shapes": True}, ["yes", "yes"]),
        ({"operators": None, "operator_format": None}, ["?", "?"]),
    ],
)
def test_accelerators_take_what_their_facts_say(facts, wanted) -> None:
    fit = judge(small(), device(accelerators=npu(**facts)))
    assert verdicts(fit, "npu") == wanted


def test_reasons_of_an_accelerator_have_the_figures() -> None:
    fit = judge(small(), device(accelerators=npu(memory_bytes=300)))
    assert fit.verdicts["npu"][0].reason == "needs 320 bytes, has 300 bytes"
    fit = judge(small(dtype="int64"), device(accelerators=npu(dtypes=["int8"])))
    assert fit.verdicts["npu"][0].reason == "int64 activations; takes int8"


def test_free_dimensions_need_fixed_shapes_where_only_those_are_taken() -> None:
    free = small(shape=("N", 8))
    fit = judge(free, device(accelerators=npu(static_shapes=True)))
    assert verdicts(fit, "npu") == ["if fixed shapes", "yes"]
    fit = judge(free, device(engines={"onnxruntime": {"static_shapes": True}}))
    assert verdicts(fit, "onnxruntime") == ["if fixed shapes", "yes"]


def test_weights_with_a_scale_per_channel_are_refused_where_one_per_tensor_is_taken() -> None:
    weights = tensor("w", "int8", (8, 8), constant=True, quantized=True, per_channel=True)
    model = graph(
        [step("MatMul", "x w", "y", macs=64)], [tensor("x", "int8"), weights, tensor("y", "int8")]
    )
    fit = judge(model, device(accelerators=npu(per_channel=False, dtypes=["int8"])))
    assert fit.verdicts["npu"][0].reason == "weights with a scale per channel; takes one per tensor"
    fit = judge(model, device(accelerators=npu(per_channel=True, dtypes=["int8"])))
    assert verdicts(fit, "npu") == ["yes"]


def test_memory_is_a_lower_bound_and_refuses_with_the_numbers() -> None:
    # x (32 bytes) and h (32) live at MatMul; y is written over h. Weights: 256.
    need = judge(small(), device()).needs[0]
    assert (need.weights, need.activations, need.at) == (256, 64, "MatMul_of_x")
    int8 = judge(small(), device()).needs[1]
    assert (int8.weights, int8.activations) == (64, 16)
    tight = {"memory": {"sram_bytes": 15, "flash_bytes": 64}, "kind": "microcontroller"}
    fit = judge(small(), device(**tight))
    assert fit.hopeless == (
        "activations need at least 16 bytes even in int8 (most at MatMul_of_x); it has 15 bytes "
        "(memory.sram_bytes; sheet); estimated",
    )
    roomy = {"memory": {"sram_bytes": 16, "flash_bytes": 64}, "kind": "microcontroller"}
    assert not judge(small(), device(**roomy)).hopeless


def test_where_int8_is_not_allowed_the_model_must_fit_as_it_came() -> None:
    memory = {"ram_bytes": 200}
    assert not judge(small(), device(memory=memory)).hopeless
    rules = {"activations": ["float32"], "weights": ["float32"]}
    fit = judge(small(), device(memory=memory, quantization=rules))
    assert (
        "need at least 320 bytes even with 4 bytes a weight and 4 an activation"
        in (fit.hopeless[0])
    )
    # 8-bit weights with float activations: 64 + 64.
    rules = {"activations": ["float32"], "weights": ["int8"]}
    assert not judge(small(), device(memory=memory, quantization=rules)).hopeless
    # The model as it came is over it, all the same: that decides which candidates are built.
    fit = judge(small(), device(memory=memory))
    assert [field for field, _ in fit.too_big(fit.needs[0])] == ["memory.ram_bytes"]


def test_the_smallest_board_sold_counts() -> None:
    fit = judge(small(), device(memory={"ram_sold_bytes": [10_000, 50]}))
    assert "memory.ram_sold_bytes" in fit.hopeless[0]


def test_the_document_has_every_operator_at_every_place() -> None:
    fit = judge(small(), device(accelerators=npu(dtypes=["int8"])))
    document = fit.to_json()
    assert [one["name"] for one in document["operators"]] == ["MatMul_of_x", "Relu_of_h"]
    assert document["operators"][0]["places"]["npu"]["needs"] == ["int8"]
    assert document["places"][1]["macs_share"] == 1.0
    assert document["memory"][0]["label"] == "estimated"


# --- what a graph computes in -------------------------------------------------------------------


def qdq() -> Graph:
    """q -> DequantizeLinear -> MatMul -> QuantizeLinear -> DequantizeLinear -> LayerNorm -> y."""
    weight = tensor(
        "w", "int8", (8, 8), constant=True, quantized=True, per_channel=True, symmetric=True
    )
    return graph(
        [
            step("DequantizeLinear", "q", "x"),
            step("DequantizeLinear", "w", "wf"),
            step("MatMul", "x wf", "h", macs=64),
            step("QuantizeLinear", "h", "hq"),
            step("DequantizeLinear", "hq", "hf"),
            step("Reshape", "hf", "r"),
            step("LayerNormalization", "r", "y"),
        ],
        [tensor("q", "uint8"), weight, tensor("x"), tensor("wf", shape=(8, 8), constant=True),
         tensor("h"), tensor("hq", "uint8"), tensor("hf"), tensor("r"), tensor("y")],
    )  # fmt: skip


def test_between_dequantize_and_quantize_it_computes_in_8_bits() -> None:
    types = computed_types(qdq())
    assert [types[name] for name in ("x", "h", "hf", "r", "y")] == ["uint8"] * 4 + ["float32"]


def test_operators_left_in_float_break_an_int8_only_promise() -> None:
    rules = Quantization(activations=["uint8"])
    assert broken_promise(qdq(), rules) == "operators still compute in float32: LayerNormalization"
    assert broken_promise(qdq(), Quantization()) is None
    assert "scale per channel (w)" in (broken_promise(qdq(), Quantization(per_channel=False)) or "")


def test_what_is_between_dequantize_and_quantize_takes_one_byte_and_the_two_cost_nothing() -> None:
    # q (8 bytes) becomes h (8): 16 at MatMul; then hq, hf and r are one buffer of 8, y is 32.
    peak = in_8_bits(qdq()).peak_activation_bytes()
    assert peak == (40, "LayerNormalization_of_r")
    assert judge(qdq(), device()).needs[0].activations == 40


def test_weights_left_in_float_break_a_weights_promise() -> None:
    rules = Quantization(weights=["int8"])
    assert broken_promise(qdq(), rules) is None
    assert broken_promise(small(), rules) == "1 weights are float32 (w)"


def test_types_that_are_not_allowed_are_found_whichever_they_are() -> None:
    rules = Quantization(activations=["float32"])
    said = broken_promise(qdq(), rules) or ""
    assert "compute in uint8" in said and "MatMul" in said


def test_kernels_of_rare_types_and_old_opsets_are_not_promised() -> None:
    assert verdicts(judge(small(dtype="float64"), device()), "onnxruntime")[0] == "?"
    old = graph(list(small().operators), list(small().tensors.values()), opset=5)
    assert verdicts(judge(old, device()), "onnxruntime") == ["?", "?"]
    newer = graph(
        [step("GlobalLpPool", "x", "y", version=22)], [tensor("x"), tensor("y")], opset=22
    )
    reason = judge(newer, device()).verdicts["onnxruntime"][0].reason
    assert reason.startswith("GlobalLpPool as of opset 22; onnxruntime 1.31.1 has that of")


def test_zero_points_that_are_not_0_break_a_symmetric_promise() -> None:
    model = graph(
        [step("CONV_2D", "x w", "y", canonical="Conv", macs=1)],
        [tensor("x", "int8", quantized=True, symmetric=False), tensor("w", constant=True),
         tensor("y", "int8", quantized=True, symmetric=True)], "tflite",
    )  # fmt: skip
    assert "zero point that is not 0 (x)" in (
        broken_promise(model, Quantization(symmetric=True)) or ""
    )
