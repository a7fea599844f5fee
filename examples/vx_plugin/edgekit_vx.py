"""The NPU of NXP's i.MX 8M Plus for EdgeKit, as `litert:vx`.

Its driver for LiteRT is VeriSilicon's VX delegate, a library of NXP's Linux for the board.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import partial

from edgekit_runtime import EngineMissingError
from edgekit_runtime.engines import Loaded, Options, litert
from edgekit_runtime.engines.accelerators import Accelerator

LIBRARY = "libvx_delegate.so"


def load(files: Mapping[str, bytes], options: Options) -> Loaded:
    """A TFLite model for the NPU; what it does not take stays on the CPU, and is counted.

    Raises:
        EngineMissingError: the library is not here.
    """
    from ai_edge_litert.interpreter import load_delegate

    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        raise EngineMissingError(
            f"no {LIBRARY} here: it comes with NXP's Linux for the i.MX 8M Plus"
        ) from None
    delegate = partial(load_delegate, LIBRARY)
    return litert.load(files, options, delegate=delegate, device="NPU", provider="VX delegate")


# `provider` is what device profiles call it: imx8mp-evk says provider = "vx-delegate".
VX = Accelerator("NPU", "vx-delegate", load=load)
