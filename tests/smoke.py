"""The runtime on any Python from 3.9 and any processor, without pytest: every engine that is here.

    python tests/smoke.py RUNTIME MODELS     (MODELS/<engine>/linear.*, as small_models writes them)

RUNTIME is the folder of edgekit_runtime or a runtime.pyz. Prints a line for each engine and exits
with 1 when one computes wrong.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path


def main(runtime: str, models: str) -> int:
    sys.path.insert(0, runtime)
    import numpy as np

    import edgekit_runtime
    from edgekit_runtime.engines import ENGINES, engine_version
    from edgekit_runtime.installed import install
    from edgekit_runtime.postprocess import Postprocess
    from edgekit_runtime.preprocess import Preprocess
    from edgekit_runtime.probe import probe

    where = f"Python {platform.python_version()} numpy {np.__version__} {platform.machine()}"
    weights = np.array(
        [[0.5, -1.0, 2.0], [1.5, 0.25, -0.75], [-2.0, 1.0, 0.0], [3.0, -0.5, 1.25]], np.float32
    )
    bias = np.array([0.5, -1.0, 2.0], np.float32)
    ran = wrong = 0
    for engine in ENGINES:
        version = engine_version(engine)
        if version is None:
            continue
        probe(engine)
        path = next(p for p in Path(models, engine).glob("linear.*") if p.suffix in
                    (".onnx", ".xml", ".tflite", ".param"))  # fmt: skip
        faults = []
        for isolate in (False, True):
            with edgekit_runtime.load(path, isolate=isolate, intent="throughput") as session:
                for size in (1, 3, 2, 3):
                    x = np.random.RandomState(size).randn(size, 4).astype(np.float32)
                    bound = session.bind({"x": (size, 4)})
                    bound.inputs["x"][...] = x
                    bound()
                    answers = [
                        session.run({"x": x})["y"],
                        session.submit({"x": x}).result()["y"],
                        bound.outputs["y"],
                        next(iter(session.run_batch([{"x": x}])))["y"],
                    ]
                    for number, answer in enumerate(answers):
                        if not np.allclose(answer, x @ weights + bias, rtol=1e-3, atol=1e-3):
                            faults.append((isolate, size, number))
                try:
                    session.run({"x": x[:, :3]})
                except edgekit_runtime.InputError:
                    pass
                else:
                    faults.append("accepted a wrong shape")
                placement = session.placement
        verdict = f"WRONG {faults}" if faults else "ok"
        print(f"{where}  {engine} {version}  {placement}  {verdict}", flush=True)
        ran, wrong = ran + 1, wrong + bool(faults)
    bundle = Path(models, "linear.edgekit")
    if bundle.exists() and engine_version("onnxruntime") is not None:
        with tempfile.TemporaryDirectory() as root:
            install(bundle, "smoke", root=Path(root))
            with edgekit_runtime.open_installed("smoke", root=Path(root)) as session:
                session.run({"x": np.zeros((1, 4), np.float32)})
                assert session.refresh() is False
        print(f"{where}  bundle installed, verified and run")
    image = np.random.RandomState(0).randint(0, 255, (60, 80, 3)).astype(np.uint8)
    steps = [{"op": "resize", "size": [32, 32]}, {"op": "layout", "to": "NCHW"}]
    assert Preprocess("image", steps)(image).shape == (1, 3, 32, 32)
    top = Postprocess([{"op": "softmax"}, {"op": "top-k", "k": 1}], ["y"], None)
    assert top({"y": np.array([[1.0, 5.0, 2.0]])})["y"][0]["index"] == 1
    print(f"{where}  processing ok; {ran} engines, {wrong} wrong")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
