"""The networks that the pruning benchmark trains itself on Fashion-MNIST, by one recipe, seeded.

    python benchmarks/pruning_nets.py IMAGES.npz FOLDER [NET ...]

`IMAGES.npz`: `x` uint8 (N, 28, 28), `y` 0..9. Each net is written as FOLDER/NET.onnx, with input
`image`, float32 (N, 1, 28, 28), 0..1. Run as a child: torch stays out of the benchmark's process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["NETS", "train"]

NETS = ("plain", "residual", "depthwise", "concat", "squeeze")
_EPOCHS, _BATCH, _RATE = 3, 128, 4e-3


def _build(name: str) -> Any:
    """A net of at most 300,000 parameters."""
    import torch
    from torch import nn

    def conv(inner: int, outer: int, size: int = 3, stride: int = 1, groups: int = 1) -> Any:
        return nn.Sequential(
            nn.Conv2d(inner, outer, size, stride, size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outer), nn.ReLU(),
        )  # fmt: skip

    class Squeeze(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(size, size // 4, 1), nn.ReLU(),
                nn.Conv2d(size // 4, size, 1), nn.Sigmoid(),
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            return x * self.gate(x)

    class Residual(nn.Module):
        def __init__(self, inner: int, outer: int, stride: int, *, gated: bool) -> None:
            super().__init__()
            self.body = nn.Sequential(
                conv(inner, outer, 3, stride), nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outer), Squeeze(outer) if gated else nn.Identity(),
            )  # fmt: skip
            alike = inner == outer and stride == 1
            self.past = nn.Identity() if alike else nn.Conv2d(inner, outer, 1, stride)

        def forward(self, x: Any) -> Any:
            return torch.relu(self.body(x) + self.past(x))

    class Branches(nn.Module):
        def __init__(self, inner: int, size: int) -> None:
            super().__init__()
            self.one = conv(inner, size, 1)
            self.three = nn.Sequential(conv(inner, size, 1), conv(size, size))
            self.five = nn.Sequential(conv(inner, size, 1), conv(size, size), conv(size, size))

        def forward(self, x: Any) -> Any:
            return torch.cat([self.one(x), self.three(x), self.five(x)], 1)

    def separable(inner: int, outer: int, stride: int = 1) -> Any:
        return nn.Sequential(conv(inner, inner, 3, stride, inner), conv(inner, outer, 1))

    bodies: dict[str, list[Any]] = {
        "plain": [conv(1, 32, 3, 2), conv(32, 48), conv(48, 64, 3, 2), conv(64, 96)],
        "residual": [conv(1, 32, 3, 2), Residual(32, 64, 2, gated=False),
                     Residual(64, 64, 1, gated=False)],
        "depthwise": [conv(1, 32, 3, 2), separable(32, 64), separable(64, 96, 2),
                      separable(96, 128), separable(128, 128)],
        "concat": [conv(1, 32, 3, 2), nn.MaxPool2d(2), Branches(32, 48), Branches(144, 48)],
        "squeeze": [conv(1, 32, 3, 2), Residual(32, 64, 2, gated=True),
                    Residual(64, 64, 1, gated=True)],
    }  # fmt: skip
    last = {"plain": 96, "residual": 64, "depthwise": 128, "concat": 144, "squeeze": 64}[name]
    return nn.Sequential(
        *bodies[name], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10)
    )  # fmt: skip


def train(name: str, images: Path, folder: Path) -> None:
    """Adam, one cycle of the rate."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    with np.load(images) as archive:
        x = torch.tensor(archive["x"])[:, None].float() / 255
        y = torch.tensor(archive["y"])
    net = _build(name)
    steps = _EPOCHS * (len(x) // _BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), _RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    draw = np.random.default_rng(0)
    for epoch in range(_EPOCHS):
        order, losses = draw.permutation(len(x)), []
        for start in range(0, len(order) - _BATCH + 1, _BATCH):
            rows = torch.tensor(order[start : start + _BATCH])
            seen = x[rows]
            loss = nn.functional.cross_entropy(net(seen), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        print(f"{name} epoch {epoch}: loss {np.mean(losses):.3f}", flush=True)
    net.eval()
    torch.onnx.export(
        net, (x[:1],), str(folder / f"{name}.onnx"), dynamo=False, opset_version=17,
        input_names=["image"], output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
    )  # fmt: skip
    print(f"{name}: {sum(one.numel() for one in net.parameters())} parameters", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("nets", nargs="*", default=list(NETS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.nets:
        train(name, args.images, args.folder)


if __name__ == "__main__":
    main()
