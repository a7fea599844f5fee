"""The networks that the quantization benchmark trains itself, seeded, in a minute or two each.

    python benchmarks/quantization_nets.py fashion IMAGES.npz MODEL.keras
    python benchmarks/quantization_nets.py text TEXTS.npz FOLDER

Run as a child: the frameworks stay out of the benchmark's own process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["BLOCK_SIZES", "fashion", "text"]

#: channels and stride of each depthwise-separable block of the Fashion-MNIST net
BLOCK_SIZES = ((32, 2), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1))
_FASHION_EPOCHS = 6
_TEXT_EPOCHS = 3
_WIDTH, _LAYERS, _HEADS, _BATCH = 160, 4, 4, 64


def fashion(images: Path, target: Path) -> None:
    """A MobileNet-like Keras net (depthwise convolutions, BatchNorm, ReLU6) for 28x28 images.

    `images`: `x` uint8 (N, 28, 28), `y` 0..9. Its input `image` is float32 (N, 28, 28, 1), 0..1.
    """
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    with np.load(images) as archive:
        x, y = archive["x"][..., None].astype(np.float32) / 255, archive["y"]

    def normed(before: Any) -> Any:
        return layers.ReLU(6.0)(layers.BatchNormalization(momentum=0.9)(before))

    image = layers.Input((28, 28, 1), name="image")
    value = normed(layers.Conv2D(16, 3, padding="same", use_bias=False)(image))
    for channels, stride in BLOCK_SIZES:
        value = normed(layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False)(value))
        value = normed(layers.Conv2D(channels, 1, use_bias=False)(value))
    value = layers.GlobalAveragePooling2D()(value)
    net = keras.Model(image, layers.Dense(10, activation="softmax", name="class")(value))
    batch = 128
    steps = _FASHION_EPOCHS * -(-len(x) // batch)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, alpha=0.02, warmup_target=6e-3, warmup_steps=steps // 6
    )
    net.compile(
        keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    net.fit(x, y, batch, _FASHION_EPOCHS, verbose=2)
    net.save(target)


def text(texts: Path, folder: Path) -> None:
    """A small transformer over word pieces, written as `text.onnx` and `text.pt2`.

    `texts`: `tokens` int64 (N, T), 0 where a text is shorter; `labels` 0..C-1; `vocabulary`. Nine
    tenths of its parameters are in attention and MLP matrices.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    with np.load(texts) as archive:
        tokens = torch.tensor(archive["tokens"])
        labels = torch.tensor(archive["labels"])
        vocabulary = int(archive["vocabulary"])
    length, classes = tokens.shape[1], int(labels.max()) + 1

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
            self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
            self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

        def forward(self, x: Any, hidden: Any) -> Any:
            rows, size = x.shape[0], _WIDTH // _HEADS
            parts = self.qkv(self.norm1(x)).reshape(rows, length, 3, _HEADS, size)
            query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
            scores = query @ key.transpose(-1, -2) / size**0.5 + hidden
            mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(rows, length, _WIDTH)
            x = x + self.out(mixed)
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word = nn.Embedding(vocabulary, _WIDTH)
            self.place = nn.Parameter(0.02 * torch.randn(length, _WIDTH))
            self.blocks = nn.ModuleList([Block() for _ in range(_LAYERS)])
            self.norm, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, classes)
            nn.init.normal_(self.word.weight, std=0.02)

        def forward(self, tokens: Any) -> Any:
            there = (tokens != 0).to(torch.float32)
            hidden = (1 - there)[:, None, None, :] * -1e4
            x = self.word(tokens) + self.place
            for block in self.blocks:
                x = block(x, hidden)
            weight = there / there.sum(1, keepdim=True)
            return self.head((self.norm(x) * weight[..., None]).sum(1))

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.01)
    steps = _TEXT_EPOCHS * (len(tokens) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    draw = np.random.default_rng(0)
    for epoch in range(_TEXT_EPOCHS):
        order, losses = draw.permutation(len(tokens)), []
        for start in range(0, len(order) - _BATCH + 1, _BATCH):
            rows = torch.tensor(order[start : start + _BATCH])
            loss = nn.functional.cross_entropy(net(tokens[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss))
        print(f"epoch {epoch}: loss {np.mean(losses):.3f}", flush=True)
    net.eval()
    example = (tokens[:1],)
    torch.onnx.export(
        net, example, str(folder / "text.onnx"), dynamo=False, opset_version=17,
        input_names=["tokens"], output_names=["logits"],
    )  # fmt: skip
    torch.export.save(torch.export.export(net, example), str(folder / "text.pt2"))
    parts = {name: value.numel() for name, value in net.named_parameters()}
    print(f"{sum(parts.values())} parameters, {parts['word.weight']} in the embedding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("net", choices=("fashion", "text"))
    parser.add_argument("data", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    getattr(sys.modules[__name__], args.net)(args.data, args.target)


if __name__ == "__main__":
    main()
