"""`make demo`: a real trained network becomes a measured, safe, faster bundle on this machine.

Takes the file-type classifier out of the package `magika`, gathers labelled data from the files
of this machine (nothing leaves it), and calls `edgekit optimize`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

from gather import Config, save_folder

PACKAGE = "magika==1.0.3"
INSIDE = "magika/models/standard_v3_3"


def main() -> int:
    """Fetch, gather, optimize, check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="scratch folder")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    model = args.work / "model.onnx"
    if not model.exists():
        print(f"[1/3] fetching {PACKAGE} and taking its model", flush=True)
        fetch(args.work)
    data = args.work / "files"
    if not data.exists():
        print("[2/3] gathering labelled files of this machine", flush=True)
        print(save_folder(Config.read(args.work), data), flush=True)

    print("[3/3] optimizing\n", flush=True)
    bin_folder = Path(sys.executable).parent
    for command in (
        ["optimize", str(model), "--for", "this-machine", "--data", str(data),
         "--preprocess", str(args.work / "steps.toml"), "--max-drop", "0.01", "-o", str(args.out)],
        ["inspect", str(args.out / "model.edgekit")],
    ):  # fmt: skip
        print(f"$ edgekit {shlex.join(command)}", flush=True)
        done = subprocess.run([str(bin_folder / "edgekit"), *command], check=False)
        if done.returncode:
            return done.returncode
    print(
        f"\nOpen {args.out / 'report.html'} in a browser. Run the bundle:\n"
        f"  {bin_folder / 'edgekit-runtime'} check {args.out / 'model.edgekit'}\n"
        f"  {bin_folder / 'edgekit-runtime'} run {args.out / 'model.edgekit'} --input README.md\n"
        f"  {bin_folder / 'edgekit'} bench {args.out / 'model.edgekit'}"
    )
    return 0


def fetch(work: Path) -> None:
    """The package's model and settings, without installing it or what it depends on."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--disable-pip-version-check", "--dest", str(work), PACKAGE],
        check=True,
    )  # fmt: skip
    (wheel,) = work.glob("magika-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for inside, name in (
            (f"{INSIDE}/config.min.json", "config.json"),
            ("magika/config/content_types_kb.min.json", "types.json"),
            (f"{INSIDE}/model.onnx", "model.onnx"),
        ):
            part = work / f"{name}.part"
            part.write_bytes(archive.read(inside))
            part.rename(work / name)


if __name__ == "__main__":
    sys.exit(main())
