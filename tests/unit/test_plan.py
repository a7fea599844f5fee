"""What is planned, and what is ruled out with which reason."""

from edgekit import plan as plan_module
from edgekit.device import load_profile
from edgekit.plan import make_plan


def test_reference_comes_first_and_every_engine_has_every_scheme() -> None:
    profile = load_profile("generic-x86-64")
    plan = make_plan("onnx", profile, threads=2, engine_faults={})
    assert plan[0].id == "onnxruntime-fp32"
    assert len(plan) == len({c.id for c in plan}) == 12
    assert {c.engine for c in plan} == {"onnxruntime", "openvino", "litert"}
    assert all(c.scheme.reduce_range for c in plan if c.scheme.kind == "int8-static")


def test_profile_decides_the_range() -> None:
    plan = make_plan("onnx", load_profile("raspberry-pi-5"), threads=4, engine_faults={})
    assert not any(c.scheme.reduce_range for c in plan)


def test_broken_engine_is_skipped_with_the_probes_words() -> None:
    profile = load_profile("generic-x86-64")
    plan = make_plan("onnx", profile, threads=1, engine_faults={"openvino": "crashed with SIGILL"})
    skipped = [c for c in plan if c.engine == "openvino"]
    assert all(c.skip == "openvino: crashed with SIGILL" for c in skipped)


def test_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr(plan_module, "missing_extra", lambda edge: edge.modules[0])
    plan = make_plan("onnx", load_profile("generic-x86-64"), threads=1, engine_faults={})
    litert = [c for c in plan if c.engine == "litert"]
    assert all("pip install -e '.[tflite-convert]'" in (c.skip or "") for c in litert)


def test_no_way_back_from_tflite_is_said() -> None:
    plan = make_plan("tflite", load_profile("generic-x86-64"), threads=1, engine_faults={})
    assert plan[0].id == "litert-fp32"
    assert plan[0].skip is None
    assert all("no way from TFLite" in (c.skip or "") for c in plan if c.engine != "litert")
