"""The networks of benchmarks/growth.py, by the width of their hidden layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS = {"tanh": nn.Tanh, "GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}


def mlp(inputs: int, outputs: int, activation: str) -> Callable[[int], nn.Module]:
    act = ACTIVATIONS[activation]
    return lambda width: nn.Sequential(nn.Linear(inputs, width), act(), nn.Linear(width, outputs))


def convolutions(activation: str) -> Callable[[int], nn.Module]:
    """Two hidden layers of as many channels, with BatchNorm and strides, on 28 × 28 images of ten classes."""
    act = ACTIVATIONS[activation]

    def build(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            act(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            act(),
            nn.Flatten(),
            nn.Linear(49 * width, 10),
        )

    return build


class Block(nn.Module):
    """Causal attention and an MLP of some width, both on the normalised residual stream."""

    def __init__(self, size: int, width: int, activation: type[nn.Module], heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(size), nn.LayerNorm(size)])
        self.attend, self.gather = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.act, self.down = nn.Linear(size, width), activation(), nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.attend(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).movedim(1, 3).unbind(1)
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + self.gather((weights @ v).movedim(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norms[1](x))))


class ByteModel(nn.Module):
    """A transformer on bytes."""

    def __init__(self, width: int, activation: type[nn.Module], length: int, size: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, size), nn.Embedding(length, size)
        self.blocks = nn.Sequential(*(Block(size, width, activation) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 256)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(self.bytes(x) + places)))
