"""A software Vulkan driver: SwiftShader, out of Debian's chromium."""

import os
import subprocess
import tempfile
from pathlib import Path

from store import store

_PACKAGE = "chromium-common"
_FILES = ("libvk_swiftshader.so", "libvulkan.so.1", "vk_swiftshader_icd.json")


def software_vulkan() -> dict[str, str]:
    """The environment of a process that is to find the driver."""
    with store() as kept:
        folder = kept / "swiftshader"
        if not all((folder / name).exists() for name in _FILES):
            with tempfile.TemporaryDirectory(dir=kept) as work:
                fetch = f"apt-get download -q {_PACKAGE}"
                line = f"{fetch} || {{ apt-get update -q && {fetch}; }}"
                subprocess.run(["sh", "-c", line], cwd=work, check=True)
                (package,) = Path(work).glob("*.deb")
                subprocess.run(["dpkg-deb", "-x", str(package), work], check=True)
                folder.mkdir(exist_ok=True)
                for name in _FILES:
                    (Path(work, "usr/lib/chromium") / name).replace(folder / name)
    found = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, found)),
        "VK_ICD_FILENAMES": str(folder / "vk_swiftshader_icd.json"),
    }  # fmt: skip
