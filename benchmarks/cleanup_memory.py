"""Peak memory of the ONNX clean-up against the size of the model (the bar: 2.5 times).

    python benchmarks/cleanup_memory.py [GIGABYTES ...]

Makes models of random weights (in one file below 1.8 GB, with external data above), cleans each in
a child process as `edgekit convert` does, and prints the child's peak resident memory, imports
included, over the model's size.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekit import sandbox
from edgekit_converters.onnx_files import MOST_BYTES_IN_ONE_FILE

_WIDTH = 4096


def make(path: Path, gigabytes: float) -> int:
    """MatMul and Relu by turns; returns the bytes of all its files."""
    rng = np.random.default_rng(0)
    layers = max(1, round(gigabytes * 1e9 / (4 * _WIDTH * _WIDTH)))
    nodes, weights, here = [], [], "x"
    for i in range(layers):
        array = rng.standard_normal((_WIDTH, _WIDTH), dtype=np.float32)
        weights.append(onnx.numpy_helper.from_array(array, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [here, f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"r{i}"]))
        here = f"r{i}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", _WIDTH])
    y = helper.make_tensor_value_info(here, TensorProto.FLOAT, ["N", _WIDTH])
    graph = helper.make_graph(nodes, "big", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    whole = gigabytes * 1e9 < MOST_BYTES_IN_ONE_FILE
    onnx.save(model, str(path), save_as_external_data=not whole, location="weights.data")
    return sum(one.stat().st_size for one in path.parent.iterdir())


def cleaned(source: str, target: str) -> int:
    """Runs in the child: clean up; returns its peak resident bytes."""
    from edgekit_converters.onnx import clean_up

    clean_up([source], target, {})
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    sizes = [float(one) for one in sys.argv[1:]] or [1.0, 2.5]
    sys.modules["cleanup_memory"] = sys.modules["__main__"]
    for gigabytes in sizes:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "in").mkdir()
            (Path(folder) / "out").mkdir()
            path = Path(folder) / "in" / "model.onnx"
            size = make(path, gigabytes)
            started = time.monotonic()
            peak = sandbox.call(
                "benchmarks.cleanup_memory:cleaned",
                {"source": str(path), "target": str(Path(folder) / "out" / "model.onnx")},
                what="cleaning up",
            )
            files = len(list(path.parent.iterdir()))
            print(
                f"{size / 1e9:.2f} GB in {files} file(s): peak {peak / 1e9:.2f} GB, "
                f"{peak / size:.2f} x the model (bar 2.5), {time.monotonic() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
