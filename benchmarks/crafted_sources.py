"""Model files that would create a canary if anything read from them were run."""

from __future__ import annotations

import io
import json
import pickle
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def unzipped(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return open, (self.canary, "w")


def crafted_files(folder: Path, canary: Path) -> Iterator[str]:
    """Files whose reading would create the canary, if it ran anything they say."""
    crafted = folder / "crafted"
    bomb = pickle.dumps(Bomb(canary), protocol=2)
    old_torch = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    plain = {
        "bomb.pkl": bomb, "bomb.pickle": bomb, "bomb.joblib": bomb, "legacy.pt": old_torch + bomb,
        "packed.joblib": zlib.compress(bomb), "bare.pt": bomb, "bare.pth": bomb, "bare.pt2": bomb,
        "bare.skops": bomb, "bare.keras": bomb, "bare.h5": bomb, "bare.onnx": bomb,
        "bare.tflite": bomb, "code.py": f"open({str(canary)!r}, 'w')\ndef build(): ...".encode(),
    }  # fmt: skip
    for name, data in plain.items():
        (crafted / name).write_bytes(data)
        yield str(crafted / name) + (":build" if name == "code.py" else "")
    yield str(zipped(crafted / "dict.pt", {"m/data.pkl": bomb, "m/version": b"3"}))
    for maker, base in (
        (_crafted_script, "m.pt"), (_crafted_pt2, "m.pt2"), (_crafted_keras, "m.keras"),
        (_crafted_skops, "tree.skops"),
    ):  # fmt: skip
        if (folder / base).exists():
            for number, contents in enumerate(maker(unzipped(folder / base), bomb, canary)):
                name = f"{maker.__name__[9:]}{number}{Path(base).suffix}"
                yield str(zipped(crafted / name, contents))
    yield from map(str, (p for p in sorted(crafted.iterdir()) if p.stem in ("lambda", "writes")))


Contents = dict[str, bytes]


def _crafted_script(good: Contents, bomb: bytes, canary: Path) -> Iterator[Contents]:
    for name in good:
        if name.endswith("pkl"):
            yield good | {name: bomb}


def _crafted_pt2(good: Contents, bomb: bytes, canary: Path) -> Iterator[Contents]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", bomb)
        archive.writestr("m/version", "3")
    for pickled in (bomb, buffer.getvalue()):
        for name in good:
            if "/data/" in name and not name.endswith(".json"):
                yield good | {name: pickled}
        yield {
            name: re.sub(rb'"use_pickle": false', b'"use_pickle": true', data)
            if name.endswith("_config.json")
            else pickled
            if "/weights/" in name
            else data
            for name, data in good.items()
        }
    code = f"__import__('io').open({str(canary)!r}, 'w')"
    model = next(name for name in good if re.search(r"/models/[^/]+\.json$", name))
    text = good[model].decode()
    changes = [
        (r'("expr_str": )"[^"]*"', rf'\g<1>"{code}"'),
        (r'("guards_code": )\[[^]]*\]', rf'\g<1>["{code}"]'),
        (r'("target": )"torch.ops.aten.linear.default"', r'\g<1>"torch.os.mkdir"'),
        (r'"(?:x|input)"', f'"x={code}"'),
        (r'("stack_trace": )"(?:[^"\\]|\\.)*"', rf'\g<1>"{code}"'),
    ]
    for pattern, new in changes:
        if re.search(pattern, text):
            yield good | {model: re.sub(pattern, new, text).encode()}


def _crafted_keras(good: Contents, bomb: bytes, canary: Path) -> Iterator[Contents]:
    config = good["config.json"].decode()
    call = {"path": str(canary), "file": str(canary), "mode": "w", "name": str(canary)}
    for module, name in (
        ("io", "open"),
        ("builtins", "open"),
        ("os", "mkdir"),
        ("pathlib", "Path"),
    ):
        raw = json.loads(config)
        layer = raw["config"]["layers"][1]
        layer |= {"module": module, "class_name": name, "registered_name": name, "config": call}
        yield good | {"config.json": json.dumps(raw).encode()}
    raw = json.loads(config)
    raw["config"]["layers"][1]["config"]["activation"] = {
        "module": "builtins", "class_name": "function", "config": "open", "registered_name": "open",
    }  # fmt: skip
    yield good | {"config.json": json.dumps(raw).encode()}
    yield good | {"model.weights.h5": bomb}
    weights = {name: data for name, data in good.items() if name != "model.weights.h5"}
    yield weights | {"model.weights.npz": bomb}


def live_skops(canary: Path, protocol: int) -> dict[str, Any]:
    """A schema that opens the canary for writing as it is loaded, if it is trusted."""

    def node(module: str, name: str, loader: str, number: int, **rest: Any) -> dict[str, Any]:
        return {
            "__module__": module,
            "__class__": name,
            "__loader__": loader,
            "__id__": number,
        } | rest

    arguments = [
        node("io", "open", "FunctionNode", 1, content={"module_path": "io", "function": "open"}),
        node("builtins", "str", "JsonNode", 2, content=json.dumps(str(canary)), is_json=True),
        node("builtins", "str", "JsonNode", 3, content='"w"', is_json=True),
    ]
    attrs = node("builtins", "tuple", "TupleNode", 4, content=arguments)
    call = node("operator", "call", "OperatorFuncNode", 5, attrs=attrs)
    return call | {"protocol": protocol, "_skops_version": "0.16.0"}


def _crafted_skops(good: Contents, bomb: bytes, canary: Path) -> Iterator[Contents]:
    schema = json.loads(good["schema.json"])
    nodes: list[dict[str, Any]] = []

    def collect(one: Any) -> None:
        if isinstance(one, dict):
            if "__class__" in one:
                nodes.append(one)
            for value in one.values():
                collect(value)
        elif isinstance(one, list):
            for value in one:
                collect(value)

    collect(schema)
    for index in range(len(nodes)):
        node, before = nodes[index], dict(nodes[index])
        for module, name, loader in (
            ("io", "open", before["__loader__"]), ("builtins", "exec", "FunctionNode"),
            ("operator", "methodcaller", "OperatorFuncNode"), ("os", "system", "MethodNode"),
        ):  # fmt: skip
            nodes[index] |= {"__module__": module, "__class__": name, "__loader__": loader}
            yield good | {"schema.json": json.dumps(schema).encode()}
            node.clear()
            node.update(before)
    for protocol in (0, 1, schema["protocol"]):  # old ones are read by other code
        yield good | {"schema.json": json.dumps(live_skops(canary, protocol)).encode()}
    for name in good:
        if name.endswith((".npy", ".npz")):
            objects = io.BytesIO()
            np.save(objects, np.array([Bomb(canary)], object), allow_pickle=True)
            yield good | {name: objects.getvalue()}


def prove_live(canary: Path) -> None:
    """The bomb goes off where it is unpickled, else its silence would say nothing."""
    bomb = pickle.dumps(Bomb(canary), protocol=2)
    subprocess.run(
        [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"],
        input=bomb, check=True,
    )  # fmt: skip
    assert canary.exists(), "the bomb is a dud"
    canary.unlink()
