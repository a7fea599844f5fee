"""Makes the operator tables in edgekit_device_profiles/operators by asking the engines.

    python make_operator_tables.py TABLE [--python PY] [--distribution tflite-runtime]

TABLE is litert, tflm, onnxruntime, openvino, ncnn or ethos-u; --distribution is for litert.
Run it in EdgeKit's development environment (the models are made with its ai-edge-litert and onnx).
PY is a Python that has the engine's version to look at, if that is another: for an older ONNX
Runtime, that of a virtual environment with nothing but it. Tables come out sorted, so that a diff
shows what a new version changed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from operator_probes import (
    Operator,
    Used,
    ask,
    attempts,
    definitions,
    definitions_used,
    node_tests,
    one_node,
    stamped,
)

Facts = dict[str, Any]
Source = dict[str, str]

TABLES = Path(__file__).parent / "edgekit_device_profiles" / "operators"
#: versions and opsets are asked for up to here; the highest seen are 14 and 28
MOST_VERSIONS, MOST_OPSETS = 20, 40
#: how TFLite, and how OpenVINO, says that it has no such operator
NO_TFLITE_OPERATOR = "Didn't find op for builtin opcode|Op builtin_code out of range"
NO_ONNX_RULE = "No conversion rule found|Install OpenVINO Tokenizers"


def write(table_id: str, facts: Facts, operators: dict[str, int], source: Source) -> None:
    """Writes a table, and says on standard error how many operators it has."""
    fields = ["operators", *(["opset"] if "opset" in facts else [])]
    parts: dict[str, Facts] = {
        "": {"schema": "edgekit.operators/1", "id": table_id} | facts,
        "source": {"fields": fields} | source,
        "operators": dict(sorted(operators.items())),
    }
    lines = []
    for name, values in parts.items():
        lines += ["", f"[{name}]"] if name else []
        keys = [k if re.fullmatch(r"[A-Za-z0-9_-]+", k) else json.dumps(k) for k in values]
        lines += [f"{k} = {json.dumps(v)}" for k, v in zip(keys, values.values(), strict=True)]
    (TABLES / f"{table_id}.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{table_id}: {len(operators)} operators", file=sys.stderr)


def probe(title: str, says: str) -> Source:
    return {"kind": "probe", "title": f"{title} on x86-64", "says": says}


def engine_facts(python: str, engine: str, format_: str, distribution: str) -> Facts:
    version = ask(python, "version", distribution)
    return {"format": format_, "engine": engine, "distribution": distribution, "version": version}


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def probe_builtins(
    python: str, engine: str, versions: Iterable[int], *, node: bool
) -> dict[str, list[int]]:
    """The versions of each TFLite operator that the engine takes: of models with one operator
    code, and a node of it without tensors if `node` is set."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def model(code: int, version: int) -> bytes:
        model, operator, graph = schema.ModelT(), schema.OperatorCodeT(), schema.SubGraphT()
        operator.builtinCode, operator.version = code, version
        operator.deprecatedBuiltinCode = min(code, 127)
        graph.tensors, graph.inputs, graph.outputs = [], [], []
        graph.operators = [schema.OperatorT()] if node else []
        for one in graph.operators:
            one.inputs, one.outputs = [], []
        model.operatorCodes, model.subgraphs = [operator], [graph]
        model.version, model.buffers = 3, [schema.BufferT()]
        builder = flatbuffers.Builder(256)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    codes = {n: c for n, c in vars(schema.BuiltinOperator).items() if not n.startswith("_")}
    for name in ("CUSTOM", "DELEGATE", "PLACEHOLDER_FOR_GREATER_OP_CODES"):
        del codes[name]
    tried = [(name, version) for name in codes for version in versions]
    taken = defaultdict(list)
    said = attempts(python, engine, (model(codes[name], version) for name, version in tried))
    for (name, version), words in zip(tried, said, strict=True):
        if not re.search(NO_TFLITE_OPERATOR, words):
            if words and not node:
                raise SystemExit(f"{name} {version}: not understood: {words}")
            taken[name].append(version)
    return taken


def litert(python: str, distribution: str) -> None:
    facts = engine_facts(python, "litert", "tflite", distribution)
    version = facts["version"]
    taken = probe_builtins(python, "litert", range(1, MOST_VERSIONS + 1), node=False)
    gaps = [f"{n} {v}" for n, has in taken.items() for v in range(1, max(has)) if v not in has]
    name = "litert" if distribution == "ai-edge-litert" else distribution
    says = (
        f"a model with one operator code, for every builtin operator and the versions 1 to "
        f"{MOST_VERSIONS}: those that are missing end with: Didn't find op for builtin opcode. "
        f"Missing below the highest version: {', '.join(gaps) or 'none'}"
    )
    operators = {name: max(has) for name, has in taken.items()}
    title = f"Interpreter of {distribution} {version}"
    write(f"{name}-{minor(version)}", facts, operators, probe(title, says))


def tflm(python: str) -> None:
    facts = engine_facts(python, "tflm", "tflite", "tflite-micro")
    taken = probe_builtins(python, "tflm", (1, 99), node=True)
    if any(len(versions) < 2 for versions in taken.values()):
        raise SystemExit("versions mean something now: look for the highest of each")
    says = (
        "a model with one node, for every builtin operator: those that are missing end with: "
        "Didn't find op for builtin opcode. Versions are not looked at. A "
        "firmware has those of them that it registers"
    )
    title = f"Interpreter of tflite-micro {facts['version']} with its resolver of all"
    write("tflm", facts, dict.fromkeys(taken, 0), probe(title, says))


def onnx_names(operators: dict[Operator, int]) -> dict[str, int]:
    return {
        f"{domain}:{name}" if domain else name: top for (domain, name), top in operators.items()
    }


def probe_node_tests(python: str, engine: str, known: Used) -> Used:
    """The newest definition of each operator with a test model that the engine takes, where it is
    newer than `known`. Models are tried as ones of other opsets, too, as far as they are valid."""
    best, tests, defined = dict(known), list(node_tests()), definitions()
    stamps: list[tuple[Any, Used]] = []

    def note(models: list[tuple[Any, Used]]) -> None:
        said = attempts(python, engine, (model.SerializeToString() for model, _ in models))
        for (_, used), words in zip(models, said, strict=True):
            for operator, since in used.items() if not words else ():
                best[operator] = max(best.get(operator, 0), since)

    def newer(used: Used) -> set[tuple[str, int]]:
        """The definitions newer than those taken of what a model is made of: domain and opset."""
        return {
            (operator[0], since)
            for operator in used
            for since in defined[operator]
            if since > best.get(operator, 0)
        }

    note([(m, used) for m, used in tests if any(n > best.get(o, 0) for o, n in used.items())])
    for model, used in tests:
        copies = (stamped(model, *definition) for definition in sorted(newer(used)))
        stamps += [(copy, definitions_used(copy)) for copy in copies if copy]
    note(stamps)
    return best


def onnxruntime(python: str) -> None:
    facts = engine_facts(python, "onnxruntime", "onnx", "onnxruntime")
    version, identity = facts["version"], ("", "Identity")
    opsets = range(1, MOST_OPSETS + 1)
    said = attempts(python, "onnxruntime", (one_node(identity, opset) for opset in opsets))
    opset = max(opset for opset, words in zip(opsets, said, strict=True) if not words)
    kernels = {(domain, name): top for domain, name, top in ask(python, "kernels", str(opset))}
    operators = onnx_names(probe_node_tests(python, "onnxruntime", kernels))
    says = (
        "kernels by get_all_opkernel_def; functions, which have none, by a session on the node "
        f"tests of onnx {metadata.version('onnx')}; opset by a session on an Identity. Many "
        "kernels take some types only"
    )
    title = f"onnxruntime {version}, CPUExecutionProvider"
    facts["opset"] = opset
    facts["opset_least"] = 7  # "ONNX Runtime compatibility": all versions support 7 and higher
    write(f"onnxruntime-{minor(version)}", facts, operators, probe(title, says))


def openvino(python: str) -> None:
    facts = engine_facts(python, "openvino", "onnx", "openvino")
    version = facts["version"]
    operators = probe_node_tests(python, "openvino", {})
    newest = {operator: opsets[-1] for operator, opsets in definitions().items()}
    newest |= {("com.microsoft", name): 1 for name in ask(sys.executable, "contrib")}
    rest = [operator for operator in newest if operator not in operators]
    said = attempts(python, "openvino", (one_node(operator, newest[operator]) for operator in rest))
    ruled = [o for o, words in zip(rest, said, strict=True) if not re.search(NO_ONNX_RULE, words)]
    operators |= {operator: newest[operator] for operator in ruled}
    says = (
        f"read and compiled: the node tests of onnx {metadata.version('onnx')}. By the front end "
        "having a rule for them only (a model with one node does not end with: No conversion rule "
        f"found): {', '.join(sorted(name for domain, name in ruled if not domain))} and those of "
        "com.microsoft and ai.onnx.ml. Sequences are taken in certain patterns only. Any opset is "
        "accepted, with the newest rule there is"
    )
    title = f"openvino {version}, ONNX front end and CPU plugin"
    write(f"openvino-{minor(version)}", facts, onnx_names(operators), probe(title, says))


def ncnn(python: str) -> None:
    facts = engine_facts(python, "ncnn", "ncnn", "ncnn")
    layers = dict.fromkeys(ask(python, "layers"), 0)
    title = f"layer_to_index and create_layer of ncnn {facts['version']}"
    says = "asked for every word in ncnn's library; a layer type is one that both know"
    write(f"ncnn-{facts['version']}", facts, layers, probe(title, says))


def ethos_u(python: str) -> None:
    version = ask(python, "version", "ethos-u-vela")
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "ethosu.vela", "--supported-ops-report"]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        report = Path(folder, "SUPPORTED_OPS.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", report, re.M | re.S))
    for device in ("55", "65", "85"):
        heading = "Ethos-U85 TFLite" if device == "85" else "Ethos-U55 and Ethos-U65 TFLite"
        rules = sections[f"{heading} Generic Constraints"]
        types = re.findall(r'"(\w+)"', re.search(r"dataTypes must be one of (.*)", rules)[0])
        operators = re.findall(r"^\| ([A-Z0-9_]+) \|", sections[f"{heading} Summary Table"], re.M)
        per_axis = re.search(r"Per-axis .*\n.*\[(.*)\]", rules)[1]
        says = (
            f"operators that can be placed on the NPU; activations {', '.join(types).lower()}, "
            "most operators without those above 16 bits; constant shapes; weights of 8 bits; "
            f"quantization per axis for {per_axis} only; more constraints for each operator"
        )
        title = f"SUPPORTED_OPS.md that ethos-u-vela {version} writes, {heading}"
        source = {"kind": "documentation", "title": title, "says": says}
        tags = {"format": "tflite"}
        write(f"ethos-u{device}", tags, dict.fromkeys(operators, 0), source)


def main() -> None:
    commands = {f.__name__.replace("_", "-"): f for f in (litert, tflm, onnxruntime, openvino)}
    commands |= {"ncnn": ncnn, "ethos-u": ethos_u}
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("table", choices=sorted(commands))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--distribution", default="ai-edge-litert")
    given = parser.parse_args()
    python = str(Path(given.python).absolute())
    more = [given.distribution] if given.table == "litert" else []
    commands[given.table](python, *more)


if __name__ == "__main__":
    main()
