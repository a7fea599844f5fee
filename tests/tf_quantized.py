"""A small network as a SavedModel, and what TensorFlow's converter makes of it under each scheme:
run as a program, since TensorFlow brings warnings and threads that tests should not have.

    python tf_quantized.py FOLDER SCHEME...    # FOLDER has data.npz with image (N, 8, 8, 1)
"""

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def main(folder: Path, schemes: list[str]) -> None:
    from small_net import net_weights

    from edgekit.artifact import open_model
    from edgekit.cache import Cache
    from edgekit.compress.calibration import calibration_request
    from edgekit.compress.quantize_savedmodel import quantize_savedmodel
    from edgekit.compress.scheme import parse_scheme
    from edgekit.data import open_dataset
    from edgekit_converters.savedmodel import to_tflite

    saved = folder / "saved"
    save(saved, net_weights())
    source = open_model(saved)
    to_tflite([str(saved)], str(folder / "float.tflite"), {})
    data = open_dataset(str(folder / "data.npz"), source.inputs, Cache(folder / "cache"))
    request = calibration_request(data, range(len(data.arrays["image"])), source.inputs, folder)
    facts = {
        text: quantize_savedmodel(
            [str(saved)], str(folder / f"{at}.tflite"), parse_scheme(text).to_json(), request
        )
        for at, text in enumerate(schemes)
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def save(folder: Path, weights: dict) -> None:
    import tensorflow as tf

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = {name: tf.Variable(value) for name, value in weights.items()}

        @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 1), tf.float32, "image")])
        def scores(self, image):
            w = self.w
            x = tf.nn.relu(tf.nn.conv2d(image, w["conv"], 1, "SAME") + w["bias"])
            x = tf.reshape(tf.nn.max_pool2d(x, 2, 2, "VALID"), (-1, 128))
            return {"scores": tf.nn.relu(x @ w["first"]) @ w["second"]}

    net = Net()
    tf.saved_model.save(net, str(folder), {"serving_default": net.scores})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
