"""State inside the model, and a real streaming network: silero-vad against ONNX Runtime itself."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from engine_cases import in_threads, noise
from store import fetch_wheel

from edgekit_runtime import InputError, UsageError, load


def _litert_counter(folder: Path) -> Path:
    """A TFLite model with a variable: v += x; y = v."""
    import tensorflow as tf

    class Counter(tf.Module):
        def __init__(self) -> None:
            self.total = tf.Variable(tf.zeros([1, 2]))

        @tf.function(input_signature=[tf.TensorSpec([1, 2], tf.float32, name="x")])
        def call(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            self.total.assign_add(x)
            return {"y": self.total.read_value()}

    module = Counter()
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [module.call.get_concrete_function()], module
    )
    converter.experimental_enable_resource_variables = True
    path = folder / "counter.tflite"
    path.write_bytes(converter.convert())
    return path


def _openvino_counter(folder: Path) -> Path:
    """An IR with ReadValue and Assign: v += x; y = v."""
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([1, 2], np.float32, name="x")
    before = ops.read_value(ops.constant(np.zeros((1, 2), np.float32)), "total")
    after = ops.add(before, x)
    after.output(0).set_names({"y"})
    x.output(0).set_names({"x"})
    model = ov.Model([ops.result(after)], [ops.assign(after, "total")], [x], "counter")
    path = folder / "counter.xml"
    ov.save_model(model, path, compress_to_fp16=False)
    return path


COUNTERS = [
    pytest.param(_litert_counter, marks=pytest.mark.needs("litert", "tensorflow"), id="litert"),
    pytest.param(_openvino_counter, marks=pytest.mark.needs("openvino"), id="openvino"),
]


@pytest.mark.parametrize("make", COUNTERS)
@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.filterwarnings("ignore")  # TensorFlow's own
def test_state_inside_the_model_belongs_to_the_stream(
    make: object, isolate: bool, tmp_path: Path
) -> None:
    assert callable(make)
    with load(make(tmp_path), isolate=isolate) as session:
        streams = [session.stream() for _ in range(2)]
        totals = np.zeros((2, 1, 2), np.float32)
        for turn in range(6):
            number = turn % 2
            x = noise(1, 2, seed=turn)
            totals[number] += x
            np.testing.assert_allclose(
                streams[number].run({"x": x})["y"], totals[number], rtol=1e-5
            )
            np.testing.assert_allclose(session.run({"x": x})["y"], x, rtol=1e-6)  # keeps none
        streams[0].reset()
        np.testing.assert_allclose(streams[0].run({"x": x})["y"], x, rtol=1e-6)


@pytest.fixture(scope="module")
def silero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silero")
    with zipfile.ZipFile(fetch_wheel("silero-vad==6.2.3")) as archive:
        for name in ("silero_vad.onnx", "silero_vad_op18_ifless.onnx"):
            (folder / name).write_bytes(archive.read(f"silero_vad/data/{name}"))
    return folder


def _reference(path: Path, frames: np.ndarray) -> list[np.ndarray]:
    """What ONNX Runtime gives when the caller carries the state."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    state = np.zeros((2, 1, 128), np.float32)
    rate = {"sr": np.array(16000, np.int64)} if len(session.get_inputs()) == 3 else {}
    found = []
    for frame in frames:
        out, state = session.run(None, {"input": frame, "state": state, **rate})
        found.append(out)
    return found


@pytest.mark.needs("onnxruntime")
def test_voice_activity_of_many_speakers_on_one_model(silero: Path) -> None:
    path = silero / "silero_vad.onnx"
    speakers = np.random.default_rng(0).standard_normal((4, 30, 1, 576)).astype(np.float32)
    wanted = [_reference(path, frames) for frames in speakers]
    rate = np.array(16000, np.int64)
    with load(path) as session:

        def speak(number: int) -> None:
            stream = session.stream({"state": "stateN"})
            for frame, want in zip(speakers[number], wanted[number], strict=True):
                found = stream.run({"input": frame, "sr": rate})
                assert list(found) == ["output"]
                np.testing.assert_array_equal(found["output"], want)

        in_threads(4, speak)
        with pytest.raises(InputError, match="'input' is no state"):
            session.stream({"state": "stateN"}, shapes={"input": (1, 576)})
        together = session.stream({"state": "stateN"}, shapes={"state": (2, 4, 128)})
        for turn in range(5):
            found = together.run({"input": speakers[:, turn, 0], "sr": rate})["output"]
            for number in range(4):
                np.testing.assert_allclose(found[number], wanted[number][turn][0], atol=1e-5)
        with pytest.raises(UsageError, match="cannot be fed by"):
            session.stream({"sr": "stateN"})


@pytest.mark.needs("onnxruntime", "openvino")
def test_another_engine_carries_the_same_state(silero: Path) -> None:
    path = silero / "silero_vad_op18_ifless.onnx"
    frames = np.random.default_rng(1).standard_normal((20, 1, 576)).astype(np.float32)
    wanted = _reference(path, frames)
    with load(path, engine="openvino") as session:
        rate = {"sr": np.array(16000, np.int64)} if len(session.inputs) == 3 else {}
        stream = session.stream({"state": "stateN"})
        for frame, want in zip(frames, wanted, strict=True):
            np.testing.assert_allclose(
                stream.run({"input": frame, **rate})["output"], want, atol=1e-4
            )
