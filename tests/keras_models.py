"""Small TensorFlow models with their results, and calls of the converters, all in one process that
the tests start: TensorFlow brings warnings and threads that tests should not have.

    python keras_models.py FOLDER CALLS.json      # writes FOLDER/answers.json

CALLS.json is a list of [function, arguments]; the answers are {"result": ...}, or {"error": ...,
"kind": ...} for an EdgeKitError. `FOLDER/NAME.npz` has a model's inputs (`0/...`) and, under
`want/...`, what TensorFlow itself gives for them.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path, calls: Path) -> None:
    import tf_keras

    make_keras(folder)
    make_saved(folder)
    for legacy in sorted(folder.glob("*.h5")):  # Keras 2 reads them as they are: the reference
        if legacy.stem.startswith("legacy"):
            model = tf_keras.models.load_model(legacy, compile=False)
            image = noise((2, *model.inputs[0].shape[1:]))
            note(folder / legacy.stem, {model.input_names[0]: image},
                 {model.output_names[0]: model(image, training=False)})  # fmt: skip
    answers = [answer(*one) for one in json.loads(calls.read_text())]
    (folder / "answers.json").write_text(json.dumps(answers))


def answer(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from edgekit.errors import EdgeKitError

    module, _, name = function.partition(":")
    try:
        return {"result": getattr(importlib.import_module(module), name)(**arguments)}
    except EdgeKitError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except Exception as error:  # one test fails, not all
        return {"crash": traceback.format_exc(), "kind": type(error).__name__}


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def note(stem: Path, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    arrays = {f"0/{name}": np.asarray(array) for name, array in inputs.items()}
    np.savez(stem.with_suffix(".in.npz"), **arrays)
    arrays |= {f"want/{name}": np.asarray(array) for name, array in outputs.items()}
    np.savez(stem.with_suffix(".npz"), **arrays)


def make_keras(folder: Path) -> None:
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)

    image = layers.Input((8, 8, 3), name="image")
    x = layers.Rescaling(0.5)(image)
    x = layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0])(x)  # as EfficientNet
    x = layers.Conv2D(6, 3, strides=2, padding="same", name="conv1")(x)
    x = layers.BatchNormalization(moving_mean_initializer="random_normal")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="gelu")(x)  # Erfc
    x = layers.GlobalAveragePooling2D()(x)
    net = keras.Model(image, layers.Dense(4, name="scores")(x))
    data = noise((2, 8, 8, 3))
    net.save(folder / "net.keras")
    note(folder / "net", {"image": data}, {"scores": net(data, training=False)})
    net.save_weights(folder / "only.weights.h5")
    from edgekit_converters.keras import save_live

    save_live(net, str(folder / "live"), {})

    zeta, alpha = layers.Input((None, 4), name="zeta"), layers.Input((3,), name="alpha")
    state = layers.LSTM(5)(zeta)
    joined = layers.Concatenate()([state, alpha])
    ends = [layers.Dense(2, name="second")(joined), layers.Dense(3, name="first")(state)]
    pair = keras.Model([zeta, alpha], ends)
    given = {"zeta": noise((2, 6, 4)), "alpha": noise((2, 3))}
    second, first = pair([given["zeta"], given["alpha"]], training=False)
    pair.save(folder / "pair.keras")
    note(folder / "pair", given, {"second": second, "first": first})

    class Own(layers.Layer):
        def call(self, x: Any) -> Any:
            return x * 2

    for name, layer in (
        ("lambda", layers.Lambda(lambda x: x + 1, name="plus_one", output_shape=(3,))),
        ("own", Own(name="mine")),
        ("activation", layers.Activation(own_activation, name="odd")),
    ):
        start = layers.Input((3,))
        keras.Model(start, layer(start)).save(folder / f"{name}.keras")


def own_activation(x: Any) -> Any:
    return x * 3


def make_saved(folder: Path) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.weight = tf.Variable(noise((3, 2)))
    spec = tf.TensorSpec([None, 3], tf.float32, name="x")
    unused = tf.TensorSpec([None, 1], tf.float32, name="unused")
    double = tf.function(lambda x: {"y": x * 2.0}, input_signature=[spec])
    times = tf.function(
        lambda x, unused: {"same": x, "b": x @ module.weight, "a": tf.nn.relu(x @ module.weight)},
        input_signature=[spec, unused],
    )
    module.double, module.times = double, times
    tf.saved_model.save(module, folder / "two", signatures={"double": double, "times": times})
    x = noise((4, 3))
    y = x @ module.weight.numpy()
    note(folder / "two", {"x": x, "unused": x[:, :1]}, {"same": x, "b": y, "a": np.maximum(y, 0)})

    @tf.function(input_signature=[spec])
    def hostile(x: Any) -> dict[str, Any]:
        tf.io.write_file(str(folder / "canary"), "it ran")
        return {"y": x * 2.0}

    module = tf.Module()
    module.hostile = hostile
    tf.saved_model.save(module, folder / "hostile", signatures=hostile)

    make_estimator(tf, folder)


def make_estimator(tf: Any, folder: Path) -> None:
    """As Estimator saved them: serialized examples for serving, numbers under `predict`."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        texts = v1.placeholder(tf.string, [None], name="input_example_tensor")
        features = {"x": tf.io.FixedLenFeature([3], tf.float32)}
        parsed = tf.io.parse_example(texts, features)["x"]
        x = v1.placeholder_with_default(parsed, [None, 3], name="x")
        weight = v1.get_variable("w", initializer=noise((3, 2)), use_resource=False)
        y = tf.nn.softmax(x @ weight, name="probabilities")
        session.run(v1.global_variables_initializer())
        build = v1.saved_model.predict_signature_def
        builder = v1.saved_model.Builder(str(folder / "estimator"))
        signatures = {
            "serving_default": build({"examples": texts}, {"y": y}),
            "predict": build({"x": x}, {"y": y}),
        }
        builder.add_meta_graph_and_variables(session, ["serve"], signatures)
        builder.save()
        data = noise((4, 3))
        note(folder / "estimator", {"x": data}, {"y": session.run(y, {x: data})})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
