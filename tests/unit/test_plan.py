"""What is planned, and what is ruled out by which rule."""

from typing import Any

import pytest

from edgekit import plan as plan_module
from edgekit.compress.prune import Pruning
from edgekit.compress.scheme import Scheme
from edgekit.device import Cpu, DeviceProfile
from edgekit.plan import Candidate, Ruling, make_plan, with_pruned
from edgekit.profiles import load_profile


def profile(engines: dict[str, Any] | None = None, **rules: Any) -> DeviceProfile:
    engines = engines or {"onnxruntime": {}, "openvino": {}, "litert": {}}
    source = {"kind": "choice", "title": "data sheet 7", "says": "so"}
    named = ["engines", *(["quantization"] if rules else [])]
    return DeviceProfile.model_validate(
        {
            "schema": "edgekit.device/1", "id": "mine", "name": "Mine", "kind": "board",
            "arch": "x86_64", "engines": engines, "sources": [{**source, "fields": named}],
            **({"quantization": rules} if rules else {}),
        }
    )  # fmt: skip


def planned(source: str, device: DeviceProfile, **options: Any) -> dict[str, Candidate]:
    made = make_plan(source, device, threads=1, engine_faults={}, **options)
    assert len({one.id for one in made}) == len(made)
    return {one.id: one for one in made}


def built(plan: dict[str, Candidate]) -> set[str]:
    return {one.id for one in plan.values() if not one.skip}


def test_reference_comes_first_and_every_engine_has_every_scheme() -> None:
    plan = planned("onnx", load_profile("generic-x86-64"))
    assert next(iter(plan)) == "onnxruntime-fp32"
    assert len(plan) == 17
    assert {c.engine for c in plan.values()} == {"onnxruntime", "openvino", "litert", "ncnn"}
    assert [c.scheme.kind for c in plan.values() if c.engine == "ncnn"] == ["fp32"]
    # 7 bits where the engine's pair sums saturate; LiteRT's do not, so it keeps all 8.
    for one in plan.values():
        if one.scheme.kind == "int8-static":
            assert one.scheme.reduce_range is (one.engine != "litert")


def test_tensorflows_own_quantizer_is_tried_on_what_came_from_it() -> None:
    profile = load_profile("generic-x86-64")
    extra = planned("onnx", profile, came="keras").keys() - planned("onnx", profile).keys()
    assert extra == {"litert-int8-static-tensorflow"}


def test_profile_decides_the_range() -> None:
    plan = planned("onnx", load_profile("raspberry-pi-5"))
    assert not any(c.scheme.reduce_range for c in plan.values())


def test_per_tensor_only_reaches_every_scheme() -> None:
    plan = planned("onnx", profile(per_channel=False))
    assert not any(c.scheme.per_channel for c in plan.values() if "int8-static" in c.scheme.kind)
    assert len(built(plan)) == 15
    assert "cannot do per-tensor" in (plan["openvino-int8-weights"].skip or "")


def test_int8_activations_only_leaves_static_int8_in_engines_that_can() -> None:
    plan = planned("onnx", profile(activations=["int8"]))
    # The reference stays, to compare with.
    assert built(plan) == {"onnxruntime-fp32", "onnxruntime-int8-static", "litert-int8-static"}
    assert plan["onnxruntime-fp32"].reference_only
    assert plan["onnxruntime-int8-static"].scheme.activations == "int8"
    ruling = plan["openvino-int8-static"].ruling
    assert ruling is not None and ruling.field == "quantization.activations"
    assert str(ruling) == (
        "ruled out by mine: its activations are uint8, allowed are int8 "
        "(quantization.activations; data sheet 7)"
    )
    for name in ("onnxruntime-int8-static-matmul", "litert-int8-dynamic", "openvino-fp32"):
        assert "float32" in (plan[name].skip or ""), name


def test_a_model_that_is_int8_already_needs_no_float() -> None:
    plan = planned("tflite", profile(activations=["int8"]), source_activations=frozenset(["int8"]))
    assert plan["litert-fp32"].skip is None
    assert not plan["litert-fp32"].reference_only


def test_weight_types_rule_float_or_int8_out() -> None:
    plan = planned("onnx", profile(weights=["float32", "float16"]))
    floats = {f"{e}-fp{n}" for e in ("onnxruntime", "openvino", "litert") for n in (16, 32)}
    assert built(plan) == floats
    assert not plan["onnxruntime-fp32"].reference_only


def test_symmetric_reaches_static_schemes_and_rules_scales_at_run_time_out() -> None:
    plan = planned("onnx", profile(symmetric=True))
    static = [c.scheme for c in plan.values() if c.scheme.kind == "int8-static"]
    assert static and all(scheme.symmetric for scheme in static)
    assert plan["onnxruntime-int8-static"].scheme.activations == "int8"  # uint8's 0 is 128
    ruling = plan["onnxruntime-int8-dynamic"].ruling
    assert ruling is not None and ruling.field == "quantization.symmetric"


def test_float_activations_only_rule_out_types_made_at_run_time() -> None:
    plan = planned("onnx", profile(activations=["float32"]))
    floats = {f"{e}-fp{n}" for e in ("onnxruntime", "openvino", "litert") for n in (16, 32)}
    assert built(plan) == {*floats, "openvino-int8-weights"}  # stored in 8 bits, computed in float


def test_7_bit_weights_are_said_only_where_they_are_made() -> None:
    plan = planned("onnx", profile(reduce_range=True))
    said = {name for name, one in plan.items() if "7-bit" in str(one.scheme)}
    assert said == {
        "onnxruntime-int8-static", "onnxruntime-int8-static-matmul", "onnxruntime-int8-dynamic",
        "openvino-int8-static", "openvino-int8-static-matmul", "openvino-int8-static-transformer",
    }  # fmt: skip


def test_bfloat16_is_tried_where_the_processor_multiplies_it() -> None:
    device = profile()
    able = device.model_copy(update={"cpu": Cpu(features=["avx2", "avx512_bf16"])})
    assert "openvino-bf16" not in planned("onnx", device)
    one = planned("onnx", able)["openvino-bf16"]
    assert (one.precision, one.skip) == ("bfloat16", None)


def test_nothing_is_quantized_twice() -> None:
    plan = planned("tflite", profile(), source_quantized="8 of its weights are integers")
    assert built(plan) == {"litert-fp32", "openvino-fp32", "onnxruntime-fp32"}
    assert "quantized already: 8 of" in (plan["litert-int8-static"].skip or "")


def test_what_forbids_the_model_as_it_came_leaves_smaller_ones() -> None:
    ruling = Ruling("mine", "memory.model_bytes", "too big", "sheet")
    plan = planned("onnx", profile(), source_ruling=ruling)
    assert built(plan) == {name for name in plan if "fp32" not in name} | {"onnxruntime-fp32"}
    assert plan["onnxruntime-fp32"].reference_only


def test_fixed_shapes_keep_the_free_model_as_reference() -> None:
    fixed = {"onnxruntime": {"static_shapes": True}, "litert": {}}
    plan = planned("onnx", profile(fixed), free_dimensions=True)
    first = next(iter(plan.values()))
    assert (first.id, first.fixed_shapes, first.reference_only) == ("onnxruntime-fp32", False, True)
    assert plan["onnxruntime-fp32-fixed"].fixed_shapes
    assert all(c.fixed_shapes for c in plan.values() if c.engine == "onnxruntime" and c != first)
    assert not plan["litert-fp32"].fixed_shapes
    # A model without free dimensions is as fixed as it gets.
    assert "onnxruntime-fp32-fixed" not in planned("onnx", profile(fixed), free_dimensions=False)


def test_engines_the_device_lacks_are_listed_and_not_built() -> None:
    plan = planned("onnx", profile({"litert": {}}))
    assert {name for name in built(plan) if "litert" not in name} == {"onnxruntime-fp32"}
    assert plan["onnxruntime-fp32"].reference_only
    assert "openvino is not among its engines (litert)" in (plan["openvino-fp32"].skip or "")


def test_broken_engine_is_skipped_with_the_probes_words() -> None:
    made = make_plan(
        "onnx", profile(), threads=1, engine_faults={"openvino": "crashed with SIGILL"}
    )
    skipped = [c for c in made if c.engine == "openvino"]
    assert all(c.skip == "openvino: crashed with SIGILL" and c.ruling is None for c in skipped)


def test_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr(plan_module, "missing_extra", lambda edge: edge.modules[0])
    litert = [c for c in planned("onnx", profile()).values() if c.engine == "litert"]
    assert all("-e '.[tflite-convert]'" in (c.skip or "") for c in litert)


def test_no_way_back_from_ir_is_said() -> None:
    plan = planned("openvino", profile())
    first = next(iter(plan.values()))
    assert first.id == "openvino-fp32"
    assert first.skip is None
    others = [c for c in plan.values() if c.engine in ("onnxruntime", "litert")]
    assert others and all("no way from OpenVINO IR" in (c.skip or "") for c in others)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme("fp32"), "fp32"),
        (Scheme("int8-dynamic", per_channel=False), "int8 dynamic, all operators, per-tensor"),
        (
            Scheme("int8-static", reduce_range=True, activations="uint8", symmetric=True),
            "int8 static, all operators, per-channel, 7-bit weights, uint8 activations, symmetric",
        ),
    ],
)
def test_schemes_in_words(scheme, words) -> None:
    assert str(scheme) == words


def test_pruned_candidates_stand_behind_the_others_and_under_names_of_their_own() -> None:
    plan = make_plan("onnx", load_profile("generic-x86-64"), threads=1, engine_faults={})
    made = with_pruned(plan, [Pruning("channels", 0.3), Pruning("channels", 0.5)], "onnx")
    assert made[: len(plan)] == plan
    ids = [one.id for one in made]
    assert len(set(ids)) == len(ids)
    assert "onnxruntime-channels-30%" in ids
    assert "litert-channels-50%+int8-static" in ids
    assert not any(one.pruning and one.scheme.kind == "int8-dynamic" for one in made)
    for one in made[len(plan) :]:
        assert one.family == f"{one.engine}-channels-{100 * one.pruning.amount:g}%+"


def test_what_only_a_converter_quantizes_is_not_pruned() -> None:
    plan = make_plan("onnx", load_profile("generic-x86-64"), threads=1, engine_faults={},
                     came="keras")  # fmt: skip
    ids = {one.id for one in with_pruned(plan, [Pruning("channels", 0.3)], "onnx")}
    assert {"litert-int8-static-tensorflow", "litert-channels-30%+int8-static"} <= ids
    assert not any("channels" in one and "tensorflow" in one for one in ids)


def test_what_cannot_become_onnx_is_not_pruned_and_says_why() -> None:
    plan = make_plan("ncnn", load_profile("generic-x86-64"), threads=1, engine_faults={})
    made = with_pruned(plan, [Pruning("channels", 0.3)], "ncnn")
    skips = [one.skip for one in made if one.pruning]
    assert skips
    assert all("no way to it" in skip for skip in skips)
