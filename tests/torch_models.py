"""Small PyTorch models as factories, and what tests do with them in one child process."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class Cnn(nn.Module):
    """Two outputs by key; convolution, normalisation and a residual: names change in exporting."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.stem[1].running_mean.uniform_(-1, 1)
            self.stem[1].running_var.uniform_(0.5, 2)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(image)
        x = x + self.body(x)
        features = x.mean((2, 3))
        return {"logits": self.head(features), "features": features}


class Recurrent(nn.Module):
    """A state that is no batch, and an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, state: torch.Tensor, scale: float = 2.0) -> Any:
        state = torch.tanh(self.cell(torch.cat([x, state[0]], -1)))
        return state * scale, state[None]


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class Dense(nn.Module):
    """Free sizes in two axes, integers in, a table looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(tokens).mean(1))


def cnn() -> Any:
    return Cnn().train(), torch.rand(1, 3, 12, 16)


def recurrent() -> Any:
    return Recurrent(), {"x": torch.rand(1, 4), "state": torch.zeros(1, 1, 2)}


def branching() -> Any:
    return Branching(), torch.rand(3)


def dense() -> Any:
    return Dense(), torch.zeros(1, 7, dtype=torch.int64)


def no_model() -> Any:
    return {"a": 1}


def fails() -> Any:
    raise RuntimeError("no such thing")


def steps(jobs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Runs in a child: each job's result, or `[error type, message]`."""
    from edgekit.errors import EdgeKitError

    results: list[Any] = []
    for target, arguments in jobs:
        module, _, name = target.partition(":")
        function = getattr(importlib.import_module(module), name)
        try:
            results.append(function(**arguments))
        except EdgeKitError as error:
            results.append({"error": [type(error).__name__, str(error)]})
        except Exception as error:  # what the sandbox would call a crash
            results.append({"crash": repr(error)})
    return results


def save_files(folder: str) -> None:
    """State dicts as people save them, and files that are not one."""
    torch.manual_seed(1)
    model = Cnn()
    state = model.state_dict()
    torch.save(state, f"{folder}/plain.pt")
    torch.save(state, f"{folder}/legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"module." + k: v for k, v in state.items()}, f"{folder}/parallel.pt")
    torch.save(
        {
            "state_dict": state,
            "epoch": 3,
            "optimizer": torch.optim.SGD(model.parameters()).state_dict(),
        },
        f"{folder}/checkpoint.ckpt",
    )
    torch.save(model, f"{folder}/whole.pt")
    torch.save({k: v for k, v in state.items() if "head" not in k}, f"{folder}/short.pt")
    torch.save({**state, "head.weight": torch.zeros(4, 8)}, f"{folder}/other.pt")
    from safetensors.torch import save_file

    save_file(state, f"{folder}/weights.safetensors")
    x = torch.rand(1, 3, 12, 16)
    with torch.no_grad():
        expected = model.eval()(x)
    np.savez(f"{folder}/expected.npz", x=x.numpy(), **{k: v.numpy() for k, v in expected.items()})
    torch.jit.script(Script()).save(f"{folder}/script.pt")
    torch.jit.script(Counting()).save(f"{folder}/counting.pt")


class Script(nn.Module):
    """Control flow that only scripting keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(image).relu()
        y = y * gain if bool((gain > 1).all()) else y + gain
        return y, y.mean([2, 3])


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = torch.zeros(1)
        self.inner = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return self.inner(x) + self.calls


def train_and_save(folder: str) -> dict[str, Any]:
    """What a training script does: export the live module, which stays as it was."""
    from edgekit_converters.torch import save_live

    torch.manual_seed(0)
    model, image = cnn()
    facts = save_live(model, image, f"{folder}/live.pt2", {})
    return {**facts, "training": model.training and model.stem[1].training}


def onnx_names(path: str) -> dict[str, Any]:
    """The tensors of an ONNX file, and all of it as text."""
    import onnx

    model = onnx.load(path)
    return {
        "tensors": [name for node in model.graph.node for name in node.output],
        "text": str(model),
    }


def onnx_taps(path: str, inputs: str, names: list[str], outputs: str) -> None:
    """The values of tensors inside of an ONNX file, where it has them, for the first sample."""
    import onnx
    import onnxruntime

    from edgekit_runtime.arrays import read_npz, write_npz

    model = onnx.load(path)
    made = {name for node in model.graph.node for name in node.output}
    names = [name for name in names if name in made]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    data = read_npz(Path(inputs))
    feeds = {key.partition("/")[2]: data[key] for key in data if key.startswith("0/")}
    write_npz(Path(outputs), dict(zip(names, session.run(names, feeds), strict=True)))
