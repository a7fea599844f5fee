"""What is tried for devices that run firmware: int8 TFLite by TensorFlow Lite Micro or Ethos-U."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgekit.compress.quantizers import candidate_schemes, quantizer_for, readable_as
from edgekit.convert import install_line, missing_extra, path_between
from edgekit.device import DeviceProfile
from edgekit.firmware.probe import probe_tool
from edgekit.plan import Candidate, make_plan
from edgekit_runtime.engines import ENGINES

__all__ = ["ETHOS_U", "TFLM", "firmware_plan", "runs_firmware"]

TFLM, ETHOS_U = "tflm", "ethos-u"
#: engine -> the tools that stand in for it here: memory and answers are always the interpreter's
_TOOLS = {TFLM: ("tflite-micro",), ETHOS_U: ("vela", "tflite-micro")}


def runs_firmware(profile: DeviceProfile) -> bool:
    """Whether the device has none of the engines that run on this machine, but one of firmware."""
    return not ENGINES.keys() & profile.engines.keys() and bool(
        _TOOLS.keys() & profile.engines.keys()
    )


def firmware_plan(
    source_format: str, profile: DeviceProfile, *, engine_faults: Mapping[str, str | None],
    came: str = "", source_quantized: str | None = None,
) -> tuple[Candidate, ...]:  # fmt: skip
    """Candidates in the order they are built; the first is the model as it came, which only this
    machine runs. `engine_faults`, `came` and `source_quantized` as for `make_plan`.

    TensorFlow Lite Micro's interpreter stands in for the device; LiteRT reads what a model takes.
    """
    first, *_ = make_plan(
        source_format, profile, threads=1, engine_faults=engine_faults, came=came,
        source_quantized=source_quantized,
    )  # fmt: skip
    wanted = {tool for engine in _TOOLS.keys() & profile.engines.keys() for tool in _TOOLS[engine]}
    tool_faults = {tool: probe_tool(tool) for tool in wanted}
    found = [replace(first, skip=engine_faults.get(first.engine), reference_only=True)]
    for target in (ETHOS_U, TFLM):
        if target not in profile.engines:
            continue
        faults = [f"{tool}: {tool_faults[tool]}" for tool in _TOOLS[target] if tool_faults[tool]]
        tools = "; ".join(faults) or None
        for scheme in candidate_schemes("tflite", profile.quantization, came):
            if scheme.kind not in ("fp32", "int8-static") or scheme.operators != "all":
                continue
            if scheme.tool:  # inside a converter, which leaves shapes free
                continue
            if target == ETHOS_U and scheme.kind == "fp32":
                continue  # it computes integers only
            one = Candidate(
                f"{target}-{scheme.id}", "litert", "tflite", scheme, 1, fixed_shapes=True,
                target=target,
            )  # fmt: skip
            skip = engine_faults.get("litert") or tools or _no_compiler(target, profile)
            if source_quantized and scheme.kind != "fp32":
                skip = skip or f"the model is quantized already: {source_quantized}"
            found.append(replace(one, skip=skip or _no_way(one, source_format, came)))
    return tuple(found)


def _no_compiler(target: str, profile: DeviceProfile) -> str | None:
    known = any(
        one.engine == target and one.compiler_target for one in profile.accelerators.values()
    )
    if target != ETHOS_U or known:
        return None
    return f"{profile.id} does not say which Ethos-U it has (accelerators.*.compiler_target)"


def _no_way(candidate: Candidate, source_format: str, came: str) -> str | None:
    path = path_between(source_format, "tflite")
    if path is None:
        return "no way to TFLite in this version"
    for edge in path:
        missing = missing_extra(edge)
        if missing:
            return f"converting needs {missing}: {install_line(edge)}"
    if candidate.scheme.kind == "fp32":
        return None
    return quantizer_for(candidate.scheme, "tflite", source=readable_as(came)).missing()
