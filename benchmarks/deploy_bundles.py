"""Bundles for the benchmarks of deploying: a linear model (ONNX), as large as wanted.

python benchmarks/deploy_bundles.py FOLDER [--large BYTES]     # 1.edgekit, 2.edgekit, large.edgekit
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from deployable import Maker
from small_models import SAVERS


def maker(folder: Path, **manifest: Any) -> Maker:
    """As the tests have it."""
    with tempfile.TemporaryDirectory() as work:
        model = SAVERS["onnxruntime"](Path(work), "linear").read_bytes()
    return Maker(model, folder, **manifest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--large", type=int, default=50_000_000)
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    make, noise = maker(args.folder), np.random.default_rng(0)
    for number in (1, 2):
        print(make(number, extra=noise.bytes(200_000)))
    print(make(3, extra=noise.bytes(args.large // 2), name="large"))


if __name__ == "__main__":
    main()
