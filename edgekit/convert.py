"""The table of format edges, the paths through it, and conversion along one.

Each edge is a function in `edgekit_converters`, named by a string and run in a child process:
`(source, target, options) -> facts`. Adding one touches three files: the module, the table line,
the contract test's parameter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module, util
from pathlib import Path
from typing import Any

from edgekit import sandbox
from edgekit.artifact import FORMAT_NAMES, SOURCES, Artifact, artifact_of, read_model
from edgekit.cache import Cache, content_key
from edgekit.errors import EdgeKitError, ModelError, UsageError, pip_install
from edgekit.reading import Reading

__all__ = [
    "CLEAN_UP", "EDGES", "NOT_RUN", "SUFFIX", "TARGETS", "Edge", "Step", "along", "convert",
    "install_line", "missing_extra", "path_between", "paths_for", "run_edge", "tool_versions",
]  # fmt: skip

#: what can be asked for
TARGETS = ("onnx", "tflite", "openvino", "ncnn", "coreml")
#: what nothing here runs, and why: such a result is not compared
NOT_RUN = {"coreml": "Core ML runs on Apple's systems only"}
SUFFIX = {
    "onnx": ".onnx", "openvino": ".xml", "tflite": ".tflite", "ncnn": ".param", "savedmodel": "",
    "torch-export": ".pt2", "coreml": ".mlpackage",
}  # fmt: skip

_FACTS = "facts.json"
#: fields of Reading that some step of a way must obey
_OPTIONS = ("inputs", "values", "layout", "opset")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Edge:
    """One conversion: who does it, what it needs installed, and from which extra.

    `takes`: the options it obeys, beside those of reading its source. `clean`: wants an ONNX
    model that was cleaned up.
    """

    source: str
    target: str
    function: str
    modules: tuple[str, ...]
    extra: str
    distributions: tuple[str, ...]
    takes: frozenset[str] = frozenset()
    clean: bool = False

    @property
    def tool(self) -> str:
        """Who does it, in a word."""
        return self.distributions[0]


def _takes(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TF = ("tensorflow",)
_TF_DISTRIBUTIONS = ("tensorflow-cpu", "keras")

#: ONNX to ONNX: what every way through ONNX may stop for
CLEAN_UP = Edge(
    "onnx", "onnx", "edgekit_converters.onnx:clean_up", ("onnx", "onnxscript"), "onnx",
    ("onnxscript", "onnx-ir", "onnx"), _takes("inputs values layout opset"),
)  # fmt: skip

EDGES = (
    Edge(
        "keras", "savedmodel", "edgekit_converters.keras:to_savedmodel", ("keras", *_TF),
        "tensorflow",
        ("keras", "tensorflow-cpu"), _takes("inputs layout"),
    ),
    Edge(
        "savedmodel", "tflite", "edgekit_converters.savedmodel:to_tflite", _TF, "tensorflow",
        ("tensorflow-cpu",), _takes("inputs layout"),
    ),
    Edge(
        "savedmodel", "onnx", "edgekit_converters.savedmodel:to_onnx", ("tf2onnx", *_TF),
        "tensorflow",
        ("tf2onnx", "tensorflow-cpu"), _takes("inputs layout opset"),
    ),
    Edge(
        "savedmodel", "openvino", "edgekit_converters.savedmodel:to_openvino",
        ("openvino", *_TF), "tensorflow", ("openvino", "tensorflow-cpu"), _takes("inputs layout"),
    ),
    Edge(
        "savedmodel", "coreml", "edgekit_converters.coreml:savedmodel_to_coreml",
        ("coremltools", *_TF), "coreml", ("coremltools", "tensorflow-cpu"),
        _takes("inputs layout"),
    ),
    Edge(
        "torch", "torch-export", "edgekit_converters.torch:factory_to_pt2", ("torch",), "torch",
        ("torch",), _takes("inputs"),
    ),
    Edge(
        "torch-export", "onnx", "edgekit_converters.torch:pt2_to_onnx", ("torch", "onnxscript"),
        "torch",
        ("torch", "onnxscript"), _takes("opset"),
    ),
    Edge(
        "torch-export", "tflite", "edgekit_converters.torch:pt2_to_tflite", ("litert_torch",),
        "torch-tflite", ("litert-torch", "torch"), _takes("inputs"),
    ),
    Edge(
        "torch-export", "ncnn", "edgekit_converters.torch:pt2_to_ncnn", ("torch", "pnnx"), "torch",
        ("pnnx", "torch"), _takes("inputs"),
    ),
    Edge(
        "torchscript", "onnx", "edgekit_converters.torchscript:to_onnx", ("torch", "onnxscript"),
        "torch",
        ("torch",), _takes("inputs opset"),
    ),
    Edge(
        "torchscript", "ncnn", "edgekit_converters.torchscript:to_ncnn", ("torch", "pnnx"), "torch",
        ("pnnx", "torch"), _takes("inputs"),
    ),
    Edge(
        "torch-export", "coreml", "edgekit_converters.coreml:pt2_to_coreml",
        ("coremltools", "torch"), "coreml", ("coremltools", "torch"), _takes("inputs"),
    ),
    Edge(
        "torchscript", "coreml", "edgekit_converters.coreml:torchscript_to_coreml",
        ("coremltools", "torch"), "coreml", ("coremltools", "torch"), _takes("inputs"),
    ),
    Edge(
        "sklearn", "onnx", "edgekit_converters.sklearn:to_onnx", ("skl2onnx",), "sklearn",
        ("skl2onnx", "scikit-learn"), _takes("inputs opset"),
    ),
    Edge(
        "tflite", "openvino", "edgekit_converters.tflite:to_openvino",
        ("openvino", "ai_edge_litert"), "openvino",
        ("openvino",),
    ),
    Edge(
        "tflite", "onnx", "edgekit_converters.tflite:to_onnx", ("tf2onnx", *_TF), "tensorflow",
        ("tf2onnx", "tensorflow-cpu"), _takes("opset"),
    ),
    Edge(
        "onnx", "openvino", "edgekit_converters.openvino:from_onnx",
        ("openvino",), "openvino", ("openvino",),
    ),
    Edge(
        "onnx", "tflite", "edgekit_converters.onnx2tf:from_onnx",
        ("onnx2tf", "tensorflow", "ai_edge_litert", "onnxscript", "onnxslim"), "tflite-convert",
        ("onnx2tf", "tensorflow-cpu", "ai-edge-litert", "onnxslim"), clean=True,
    ),
    Edge(
        "onnx", "ncnn", "edgekit_converters.pnnx:onnx_to_ncnn", ("pnnx", "ncnn"), "ncnn",
        ("pnnx", "ncnn"), clean=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """An edge and the options it is given."""

    edge: Edge
    reading: Reading

    def __str__(self) -> str:
        edge = self.edge
        what = f"{FORMAT_NAMES[edge.source]} -> {FORMAT_NAMES[edge.target]}"
        if edge is CLEAN_UP:
            what = "clean up ONNX"
        return f"{what} ({edge.tool})"


def path_between(source: str, target: str) -> tuple[Edge, ...] | None:
    """The fewest edges from one format to another; empty if they are the same, None if none."""
    return () if source == target else next(_paths(source, target), None)


def _paths(source: str, target: str) -> Iterator[tuple[Edge, ...]]:
    """All ways that visit no format twice, the shortest first, then in the table's order. What was
    made for an engine is no station: TFLite is left only by models that came as TFLite."""
    ways: list[tuple[Edge, ...]] = [(edge,) for edge in EDGES if edge.source == source]
    while ways:
        way = ways.pop(0)
        if way[-1].target == target:
            yield way
            continue
        seen = {source, *(edge.target for edge in way)}
        ways += [
            (*way, edge) for edge in EDGES
            if edge.source == way[-1].target and edge.target not in seen
            and edge.source != "tflite"
        ]  # fmt: skip


def paths_for(source: str, target: str, reading: Reading) -> list[tuple[Step, ...]]:
    """The ways to a format that obey every option, the best first.

    Raises:
        UsageError: an option cannot be obeyed on any of them.
        ModelError: there is no way.
    """
    ways = [()] if source == target else list(_paths(source, target))
    if not ways or (source == target and source != "onnx"):
        raise ModelError(_no_way(source, target))
    found, useless = [], ""
    if source == "onnx":  # what a converter refuses as it came, it may take cleaned up
        ways += [(CLEAN_UP, *way) for way in ways if way and not way[0].clean]
    for way in ways:
        steps = _with_options(way, source, target, reading)
        if isinstance(steps, str):
            useless = steps
        elif steps not in found:
            found.append(steps)
    if not found:
        raise UsageError(
            f"--{useless.replace('values', 'set')} cannot be obeyed from {FORMAT_NAMES[source]} "
            f"to {FORMAT_NAMES[target]}"
        )
    return found


def _with_options(
    way: tuple[Edge, ...], source: str, target: str, reading: Reading
) -> tuple[Step, ...] | str:
    """The way with clean-ups where they are due, each option given to the first step that takes
    it; or the option that none takes."""
    given = {name for name in _OPTIONS if getattr(reading, name)}
    edges: list[Edge] = []
    here = source
    for edge in (*way, None):
        left = given - {name for one in edges for name in one.takes}
        due = edge is None or edge.clean or (left - edge.takes and left & CLEAN_UP.takes)
        if here == "onnx" and due and (edge is not None or target == "onnx"):
            edges.append(CLEAN_UP)
        if edge is not None:
            edges.append(edge)
            here = edge.target
    steps: list[Step] = []
    for number, edge in enumerate(edges):
        mine = given & edge.takes
        given = given - mine
        only = {name: getattr(reading, name) for name in mine}
        if number == 0:
            only |= {name: getattr(reading, name) for name in ("signature", "weights")}
        trusted = reading.trust_source and edge.source in SOURCES
        steps.append(Step(edge, replace(Reading(trust_source=trusted), **only)))
    return min(given) if given else tuple(steps)


def _no_way(source: str, target: str) -> str:
    text = f"no way from {FORMAT_NAMES[source]} to {FORMAT_NAMES[target]}"
    if source == target:
        return f"it is {FORMAT_NAMES[source]} already"
    if source in ("openvino", "ncnn", "coreml"):
        return f"{text}: nothing reads {FORMAT_NAMES[source]} back; convert what it was made from"
    if target == "coreml":
        return f"{text}: convert the PyTorch, Keras or TensorFlow model it was made from"
    return text


def missing_extra(edge: Edge) -> str | None:
    """The first library the edge needs that is not installed, or None."""
    return next((m for m in edge.modules if util.find_spec(m) is None), None)


def install_line(edge: Edge) -> str:
    """What to type for it. pnnx asks for libraries it does not need, so it comes without them."""
    line = pip_install(edge.extra)
    return f"{line}; pip install --no-deps pnnx" if "pnnx" in edge.modules else line


def tool_versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by distribution name; `absent` for those that are not."""
    from importlib import metadata

    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def convert(
    artifact: Artifact,
    target: str,
    *,
    cache: Cache,
    limits: sandbox.Limits | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """The artifact in another format, by the shortest path that works; from the cache if made
    before. Whether it computes the same is for `edgekit.conversion` to find out.

    Raises:
        ModelError: there is no path, or a converter refused the model.
        ChildError: a converter crashed or went over its limits.
    """
    if artifact.format == target:
        return artifact
    failures: list[EdgeKitError] = []
    for steps in paths_for(artifact.format, target, artifact.reading):
        made = artifact
        try:
            for step in steps:
                made = along(step, made, cache=cache, limits=limits, progress=progress)
        except EdgeKitError as error:
            failures.append(error)
            continue
        return made
    raise failures[0]


def along(
    step: Step,
    artifact: Artifact,
    *,
    cache: Cache,
    limits: sandbox.Limits | None = None,
    progress: Progress | None = None,
    phase: str = "",
) -> Artifact:
    """The artifact after one step. `phase` goes before the work's name in errors: `[3/6]`.

    Raises:
        EdgeKitError: as `convert`.
    """
    edge, options = step.edge, step.reading.to_json()
    texts = [spec.name for spec in artifact.inputs if spec.dtype == "string"]
    if texts and edge.source == "onnx" and edge.target != "onnx":
        raise ModelError(
            f"the input {texts[0]!r} takes texts, which {FORMAT_NAMES[edge.target]} does not: "
            "--to onnx (ONNX Runtime takes them), or convert what comes after texts became numbers"
        )
    versions = tool_versions(edge.distributions)
    key = content_key(
        kind="edge", recipe=4, edge=edge.function, source=artifact.sha256, tools=versions,
        options=options, # Python code may read anything, so its hash is not its content
        nonce=time.time_ns() if artifact.format == "torch" else None,
    )  # fmt: skip
    name = f"model{SUFFIX[edge.target]}"
    left = Reading(trust_source=step.reading.trust_source)
    called = f"the converted {FORMAT_NAMES[edge.target]} model"

    def make(folder: Path) -> None:
        made = sandbox.call(
            "edgekit.convert:run_edge",
            {
                "function": edge.function,
                "source": list(artifact.arguments),
                "target": str(folder / name),
                "options": options,
                "reading": left.to_json(),
                "called": called,
            },
            limits=limits,
            progress=progress,
            what=f"{phase} {step}".strip(),
        )
        (folder / _FACTS).write_text(json.dumps(made))

    try:
        folder = cache.folder(key, make)
    except EdgeKitError as error:
        if phase and not str(error).startswith(phase):
            raise type(error)(f"{phase} {edge.tool}: {error}") from None
        raise
    made = json.loads((folder / _FACTS).read_text())
    done = {
        "step": "clean-up" if edge is CLEAN_UP else "convert", "to": edge.target, "tools": versions,
        "from": artifact.sha256, "options": options, **made["facts"],
    }  # fmt: skip
    # external data is beside the model, wherever the cache has put both
    specs = made["specs"] | {
        "files": [str(folder / Path(one).name) for one in made["specs"].get("files", ())]
    }
    return artifact_of(
        folder / name, specs, reading=left, provenance=(*artifact.provenance, done), called=called
    )


def run_edge(
    *,
    function: str,
    source: list[str],
    target: str,
    options: dict[str, Any],
    reading: dict[str, Any],
    called: str,
) -> dict[str, Any]:
    """Runs in the child: convert, and read what was made while its framework is loaded.

    Raises:
        ModelError: the converter refuses the model, or what it wrote cannot be read.
    """
    module, _, name = function.partition(":")
    facts = getattr(import_module(module), name)(source, target, options)
    if not Path(target).exists():
        raise ModelError(f"{module} wrote no {Path(target).name}")
    return {"facts": facts or {}, "specs": read_model(target, reading, called)}
