"""A small Keras CNN trained on labelled digits, as a TFLite file: run as a program, since
TensorFlow brings warnings and threads that tests should not have.

    python keras_cnn.py DATA.npz OUT.tflite      # DATA has image (N, 28, 28, 1) and labels
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def main(data: str, out: str) -> None:
    import numpy as np
    import tensorflow as tf

    tf.keras.utils.set_random_seed(0)
    with np.load(data) as archive:
        images, labels = archive["image"], archive["labels"]
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            layers.Input((28, 28, 1), name="image"),
            layers.Conv2D(8, 3, strides=2, padding="same", activation="relu"),
            layers.DepthwiseConv2D(3, padding="same", activation="relu"),
            layers.Conv2D(16, 1, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    model.compile("adam", tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images, labels, epochs=6, batch_size=64, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        Path(out).write_bytes(converter.convert())


if __name__ == "__main__":
    main(*sys.argv[1:])
