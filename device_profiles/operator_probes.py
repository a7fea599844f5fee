"""How make_operator_tables.py asks engines: the ONNX models, and the child processes that try them,
since some models crash an engine.

As a child, this file runs in any Python that has the engine and needs nothing else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "Operator",
    "Used",
    "ask",
    "attempts",
    "definitions",
    "definitions_used",
    "node_tests",
    "one_node",
    "stamped",
]


def ask(python: str, *words: str) -> Any:
    """The answer of another Python: to version, kernels or layers."""
    command = [python, __file__, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout.splitlines()[-1])


def attempts(python: str, engine: str, models: Iterable[bytes]) -> list[str]:
    """What each model led to in `python`: "" if it was taken, else the engine's words."""
    with tempfile.TemporaryDirectory() as folder:
        count = 0
        for count, model in enumerate(models, 1):
            Path(folder, str(count - 1)).write_bytes(model)
        answers: list[str] = []
        while len(answers) < count:
            command = [python, __file__, "_try", engine, folder, str(len(answers)), str(count)]
            child = subprocess.run(command, check=False, stdout=subprocess.PIPE)
            answers += [json.loads(line) for line in child.stdout.splitlines()]
            if len(answers) < count:  # it crashed on the next one
                printed = Path(folder, "printed").read_text(encoding="utf-8", errors="replace")
                answers.append(f"ended with {child.returncode}: {printed}")
        return answers


def _try(engine: str, folder: str, first: str, end: str) -> None:
    """In the child: tries models one after the other, a line of JSON on the real standard output
    for each; what the engine prints joins its words."""
    answers = os.fdopen(os.dup(1), "w")
    with Path(folder, "printed").open("w+", encoding="utf-8", errors="replace") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        attempt = ENGINES[engine]()
        for number in range(int(first), int(end)):
            os.ftruncate(printed.fileno(), os.lseek(printed.fileno(), 0, os.SEEK_SET))
            said = ""
            try:
                attempt(Path(folder, str(number)).read_bytes())
            except Exception as error:
                printed.seek(0)
                said = f"{type(error).__name__}: {error}\n{printed.read()}"
            print(json.dumps(said), file=answers, flush=True)


def _litert() -> Callable[[bytes], Any]:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter
    return lambda model: Interpreter(model_content=model)


def _tflm() -> Callable[[bytes], Any]:
    from tflite_micro.python.tflite_micro.runtime import Interpreter

    return lambda model: Interpreter.from_bytes(model, arena_size=1 << 16)


def _onnxruntime() -> Callable[[bytes], Any]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options, providers = onnxruntime.SessionOptions(), ["CPUExecutionProvider"]
    options.intra_op_num_threads = 1
    return lambda model: onnxruntime.InferenceSession(model, options, providers=providers)


def _openvino() -> Callable[[bytes], Any]:
    import openvino

    core = openvino.Core()
    return lambda model: core.compile_model(core.read_model(model), "CPU")


ENGINES = {
    "litert": _litert, "tflm": _tflm, "onnxruntime": _onnxruntime, "openvino": _openvino,
}  # fmt: skip


def _kernels(opset: str) -> list[tuple[str, str, int]]:
    """In the child: the newest definition of each operator that has a kernel. One that is open
    towards newer opsets is for the definition it starts with only, as ONNX Runtime has it."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    defined, best = defaultdict(set), {}
    for schema in state.get_all_operator_schema():
        defined[schema.domain, schema.name].add(schema.since_version)
    for kernel in state.get_all_opkernel_def():
        operator, (first, last) = (kernel.domain, kernel.op_name), kernel.version_range
        own = kernel.domain == "com.microsoft.nchwc" or kernel.op_name.startswith("Memcpy")
        for since in defined[operator] if not own else ():  # own: it puts them into graphs itself
            fits = since == first or (last < 1 << 30 and first <= since <= last)
            if fits and (kernel.domain or since <= int(opset)):
                best[operator] = max(best.get(operator, 0), since)
    return [(*operator, top) for operator, top in best.items()]


def _contrib() -> list[str]:
    """In the child: ONNX Runtime's own operators."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return sorted({s.name for s in state.get_all_operator_schema() if s.domain == "com.microsoft"})


def _layers() -> list[str]:
    """In the child: the layer types. Their names are among the words of the library, whole or as
    the end of another, which linkers let them share."""
    import ncnn

    [library] = Path(ncnn.__file__).parent.glob("ncnn*.so")
    found = re.findall(rb"(?=([A-Z][A-Za-z0-9]{1,40})\0)", library.read_bytes())
    index = {word: ncnn.layer_to_index(word) for word in {word.decode() for word in found}}
    return [word for word, number in index.items() if number >= 0 and ncnn.create_layer(number)]


#: an operator: domain and name; and with the opset that its definition is from
Operator = tuple[str, str]
Used = dict[Operator, int]


def definitions() -> dict[Operator, list[int]]:
    """The opsets with a definition of an operator."""
    import onnx

    found: dict[Operator, list[int]] = defaultdict(list)
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.deprecated:
            found[schema.domain, schema.name].append(schema.since_version)
    return found


def one_node(operator: Operator, opset: int) -> bytes:
    from onnx import TensorProto, helper

    domain, name = operator
    values = [helper.make_tensor_value_info(one, TensorProto.FLOAT, [1]) for one in "xy"]
    node = helper.make_node(name, ["x"], ["y"], domain=domain)
    opsets = [helper.make_opsetid(*one) for one in ({"": 18} | {domain: opset}).items()]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def definitions_used(model: Any) -> Used:
    """What a model is made of."""
    import onnx

    opsets = {one.domain: one.version for one in model.opset_import}
    return {
        (n.domain, n.op_type): onnx.defs.get_schema(
            n.op_type, opsets[n.domain], n.domain
        ).since_version
        for n in model.graph.node
    }


def node_tests() -> Iterator[tuple[Any, Used]]:
    """ONNX's own test models, with what they are made of; each a second time
    with all inputs but the first constant, as they mostly are in real models."""
    import onnx
    from onnx.backend.test.case import model as models
    from onnx.backend.test.case import node

    for case in [*node.collect_testcases(None), *models.collect_testcases()]:
        if case.model is None:
            continue
        versions = definitions_used(case.model)
        yield case.model, versions
        inputs = case.model.graph.input
        values = case.data_sets[0][0] if case.data_sets else []
        if len(inputs) > 1 and all(hasattr(value, "dtype") for value in values):
            constant = onnx.ModelProto()
            constant.CopyFrom(case.model)
            del constant.graph.input[1:]
            for one, value in [*zip(inputs, values, strict=False)][1:]:
                constant.graph.initializer.append(onnx.numpy_helper.from_array(value, one.name))
            yield constant, versions


def stamped(model: Any, domain: str, opset: int) -> Any:
    """The model as one of another opset; None where that makes it an invalid one."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for one in copy.opset_import:
        one.version = opset if one.domain == domain else one.version
    try:
        copy.ir_version = onnx.helper.find_min_ir_version_for(copy.opset_import)
        onnx.checker.check_model(copy, full_check=True)
    except Exception:
        return None
    return copy


if __name__ == "__main__":
    if sys.argv[1] == "_try":
        _try(*sys.argv[2:])
    else:
        questions = {
            "version": metadata.version,
            "kernels": _kernels,
            "layers": _layers,
            "contrib": _contrib,
        }
        print(json.dumps(questions[sys.argv[1]](*sys.argv[2:])))
