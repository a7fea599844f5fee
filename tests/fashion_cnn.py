"""A CNN trained here on Fashion-MNIST, as Debian packages it: some seconds, seeded."""

import gzip
import subprocess
import tempfile
import warnings
from pathlib import Path

import numpy as np
from store import store

_PACKAGE = "dataset-fashion-mnist"
_TRAINED_ON = 8000  # of the 10,000 of the smaller part


def fashion_mnist() -> tuple[np.ndarray, np.ndarray]:
    """float32 (10000, 1, 28, 28), 0..1, and their labels."""
    with store() as kept, tempfile.TemporaryDirectory() as work:
        if not any(kept.glob(f"{_PACKAGE}_*.deb")):
            fetch = f"apt-get download -q {_PACKAGE}"
            line = f"{fetch} || {{ apt-get update -q && {fetch}; }}"
            subprocess.run(["sh", "-c", line], cwd=kept, check=True)
        (package,) = kept.glob(f"{_PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), work], check=True)
        folder = Path(work, "usr/share/datasets/fashion-mnist")
        images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return pixels.astype(np.float32) / 255, np.frombuffer(labels, np.uint8, offset=8)


def fashion_cnn(path: Path) -> tuple[Path, np.ndarray, float]:
    """The net as ONNX (image: float32 (N, 1, 28, 28)), images it never saw, and its accuracy on
    them."""
    import torch
    from torch import nn

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other where others work, too
    torch.manual_seed(0)
    images, labels = fashion_mnist()
    x, y = torch.tensor(images), torch.tensor(labels.astype(np.int64))
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for batch in torch.randperm(_TRAINED_ON).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this exporter deprecated
        right = (net(x[_TRAINED_ON:]).argmax(1) == y[_TRAINED_ON:]).float().mean()
        torch.onnx.export(
            net, (x[:1],), str(path), dynamo=False, input_names=["image"], opset_version=17,
            output_names=["logits"], dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        )  # fmt: skip
    torch.set_num_threads(threads)
    return path, images[_TRAINED_ON:], float(right)
