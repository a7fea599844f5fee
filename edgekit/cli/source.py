"""The options that say how a model is to be read, shared by every verb that takes a MODEL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from edgekit.reading import Layout, Reading, parse_inputs

__all__ = ["SourceOptions"]


@Parameter(name="*")
@dataclass
class SourceOptions:
    """How to read the model.

    Parameters
    ----------
    inputs
        Shapes of inputs: NAME=1x3x224x224:float32. A letter is a free dimension (X=Nx36); the
        dtype may be left out.
    signature
        Which signature of a SavedModel.
    weights
        A file with the parameters (PyTorch state dict, .safetensors) for module.py:factory.
    trust_source
        Allow what unpickles or runs code from the model: module.py:factory, TorchScript, .joblib
        and .pkl. It runs with your rights.
    """

    inputs: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None
    signature: str | None = None
    weights: Path | None = None
    trust_source: Annotated[bool, Parameter(negative="")] = False

    def reading(self, layout: Layout | None = None, opset: int | None = None) -> Reading:
        """For `open_model`.

        Raises:
            UsageError: `inputs` are not of that form.
        """
        return Reading(
            parse_inputs(self.inputs or []), layout=layout, opset=opset, signature=self.signature,
            weights=self.weights, trust_source=self.trust_source,
        )  # fmt: skip
