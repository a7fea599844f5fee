"""serve-stdin and the one-file runtime, as a program in another language would use them."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LENGTH = struct.Struct("<I")


class Client:
    """What a client in any language must do: lengths, JSON, bytes."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout
        self.hello = self.receive()[0]

    def send(self, request: dict[str, Any], data: bytes = b"") -> None:
        text = json.dumps(request).encode()
        self.stdin.write(LENGTH.pack(len(text)) + text + data)
        self.stdin.flush()

    def receive(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        answer = json.loads(self._exactly(LENGTH.unpack(self._exactly(4))[0]))
        arrays = {}
        for name, one in answer.get("outputs", {}).items():
            dtype = np.dtype(one["dtype"]).newbyteorder("<")
            data = self._exactly(dtype.itemsize * int(np.prod(one["shape"])))
            arrays[name] = np.frombuffer(data, dtype).reshape(one["shape"])
        return answer, arrays

    def _exactly(self, count: int) -> bytes:
        data = self.stdout.read(count)
        assert len(data) == count, "the server is gone"
        return data


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    from small_models import save_onnx

    model = str(save_onnx(tmp_path, "linear"))
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekit_runtime", "serve-stdin", model],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    yield Client(process)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _asks(shape: tuple[int, ...], dtype: str = "float32", name: str = "x") -> dict[str, Any]:
    return {"inputs": {name: {"dtype": dtype, "shape": list(shape)}}}


@pytest.mark.needs("onnxruntime", "onnx")
def test_requests_are_answered_in_order(client: Client) -> None:
    from small_models import linear

    assert client.hello["schema"] == "edgekit.serve/1"
    assert client.hello["model"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 4]}]
    for number in range(5):
        x = np.random.default_rng(number).random((number + 1, 4), np.float32)
        client.send({"id": number, **_asks(x.shape)}, x.tobytes())
        answer, arrays = client.receive()
        assert answer["id"] == number
        assert answer["ns"]["infer"] > 0
        np.testing.assert_allclose(arrays["y"], linear(x), rtol=1e-5)
    assert client.process.stdin is not None
    client.process.stdin.close()
    assert client.process.wait(timeout=20) == 0


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_bad_request_costs_only_itself(client: Client) -> None:
    for request, data, says in (
        ({"id": 1, **_asks((1, 3))}, bytes(12), "[1, 3]"),
        ({"id": 2, **_asks((1, 4), "float64")}, bytes(32), "float64"),
        ({"id": 3, **_asks((1, 4), name="z")}, bytes(16), "named z; wanted: x"),
        ({"id": 4}, b"", "either inputs or raw"),
        ({"id": 5, "raw": {"x": {"size": 3}}}, b"abc", "bytes; wanted a numpy float32 array"),
    ):
        client.send(request, data)
        answer, _ = client.receive()
        assert (answer["id"], answer["kind"]) == (request["id"], "InputError")
        assert says in answer["error"]
    x = np.ones((1, 4), np.float32)
    client.send({"id": "last", **_asks(x.shape)}, x.tobytes())
    assert client.receive()[0]["id"] == "last"


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GET / HTTP/1.0\r\n", "begins with the length"),
        (LENGTH.pack(1 << 31), "begins with the length"),
        (LENGTH.pack(4) + b"nope", "cannot be read"),
        (LENGTH.pack(2) + b"[]", "not a JSON object"),
        (b"\x05", "begins with the length 0"),
        (LENGTH.pack(50) + b"{}", "ends inside"),
        (LENGTH.pack(9) + b'{"raw":1}', "cannot be read"),
    ],
)
def test_broken_framing_ends_the_server_with_a_reason(
    client: Client, data: bytes, says: str
) -> None:
    client.stdin.write(data)
    client.stdin.close()
    answer, _ = client.receive()
    assert says in answer["error"]
    assert client.process.wait(timeout=20) == 2


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize(
    "one",
    [
        {"dtype": "float32", "shape": [1 << 40, 4]},
        {"dtype": "float32", "shape": [-1, 4]},
        {"dtype": "object", "shape": [1]},
        {"dtype": "nope", "shape": [1]},
        {"size": 1 << 50},
        {"size": -1},
        {},
    ],
    ids=str,
)
def test_lying_sizes_are_refused_at_once(client: Client, one: dict[str, Any]) -> None:
    start = time.monotonic()
    client.send({"inputs": {"x": one}})
    assert client.receive()[0]["kind"] == "UsageError"
    assert client.process.wait(timeout=20) == 2
    assert time.monotonic() - start < 20


# --- the one-file runtime -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgekit.deploy.runtime_archive import runtime_archive as archive

    path = tmp_path_factory.mktemp("zip") / "runtime.pyz"
    path.write_bytes(archive())
    assert archive() == path.read_bytes()
    return path


@pytest.mark.needs("onnxruntime", "onnx")
def test_one_file_is_the_whole_runtime(pyz: Path, tmp_path: Path) -> None:
    from small_models import linear, save_onnx

    assert len(pyz.read_bytes()) < 135_000  # ADR 0004
    x = np.random.default_rng(0).random((2, 4), np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    model = save_onnx(tmp_path, "linear")
    code = (  # what is installed here must not help
        "import sys, runpy, numpy, onnxruntime\n"
        "sys.path[:] = [p for p in sys.path if not p.endswith('runtime')]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "sys.argv = sys.argv[1:]\n"
        "try: import edgekit_runtime\n"
        "except ImportError: pass\n"
        "else: raise SystemExit('found elsewhere')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    for extra in ([], ["--isolate"]):
        done = subprocess.run(
            [sys.executable, "-c", code, str(pyz), "run", str(model), "--input",
             str(tmp_path / "x.npz"), "--json", *extra],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(json.loads(done.stdout)["outputs"]["y"], linear(x), rtol=1e-5)


def test_it_is_written_by_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", "runtime-zip"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "runtime.pyz"), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["schema"] == "edgekit.runtime-zip/1"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a python3 with numpy
    version = subprocess.run(
        [str(tmp_path / "runtime.pyz"), "--version"],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert version.stdout.strip() == json.loads(done.stdout)["version"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "is a folder; wanted a file name" in done.stderr
