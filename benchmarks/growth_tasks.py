"""What the networks of benchmarks/growth.py learn, and how: problems and the cells of the grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
ACTIVATIONS = {"tanh": nn.Tanh, "GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}


@dataclass(frozen=True)
class Problem:
    """A network by width, batches without end, the loss, and data to judge by; ``error`` is what is reported at last."""

    build: Callable[[int], nn.Module]
    batches: Iterator[Batch]
    loss: Callable[[nn.Module, Any], Tensor]
    validation: Sequence[Batch]
    test: Sequence[Batch]
    error: Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: a problem and how it is trained.

    ``widths`` doubles at the shares ``at`` of the budget, which is the FLOPs of ``steps`` steps at the last width.
    ``probe`` counts the fresh batches that growth sees.
    """

    name: str
    problem: Callable[[str, int], Problem]
    activation: str
    optimizer: str
    rate: float
    widths: tuple[int, ...]
    at: tuple[float, ...]
    steps: int
    probe: int = 8


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def drawn(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Random batches, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            if len(rows) == size:
                yield x[rows], y[rows]


def mlp(inputs: int, outputs: int, activation: str) -> Callable[[int], nn.Module]:
    act = ACTIVATIONS[activation]
    return lambda width: nn.Sequential(nn.Linear(inputs, width), act(), nn.Linear(width, outputs))


def teacher(activation: str, seed: int) -> Problem:
    """16 tanh neurons, 6 inputs, 2 outputs; every batch is fresh."""
    generator = torch.Generator().manual_seed(1000 + seed)
    w, b = torch.randn(6, 16, generator=generator), torch.randn(16, generator=generator)
    v = torch.randn(16, 2, generator=generator)

    def pairs(count: int) -> Batch:
        x = torch.randn(count, 6, generator=generator)
        return x, torch.tanh(x @ w + b) @ v

    mean, std = (s := pairs(8192)[1]).mean(0), s.std(0)
    scaled = lambda count: (lambda x, y: (x, (y - mean) / std))(*pairs(count))  # noqa: E731
    validation, test = scaled(2048), scaled(8192)
    return Problem(mlp(6, 2, activation), (scaled(128) for _ in iter(int, 1)), mse, [validation], [test], mse)


@cache
def water() -> Batch:
    """Density, heat capacity and speed of sound of water by the reference equation of state, standardised."""
    from CoolProp.CoolProp import PropsSI

    rng = np.random.default_rng(0)
    t, p = rng.uniform(280, 1000, 30_000), np.exp(rng.uniform(np.log(1e5), np.log(1e8), 30_000))
    y = np.stack([np.log(PropsSI(name, "T", t, "P", p, "Water")) for name in ("D", "C", "A")], 1)
    x = np.stack([t, np.log(p)], 1)
    x, y = (torch.tensor((a - a.mean(0)) / a.std(0), dtype=torch.float32) for a in (x, y))
    return x, y


def coolprop(activation: str, seed: int) -> Problem:
    x, y = water()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 2048), (2048, 8192))]
    return Problem(mlp(2, 3, activation), drawn(x[8192:], y[8192:], 128, seed), mse, [parts[0]], [parts[1]], mse)


STAGED = {"widths": (8, 16, 32, 64), "at": (0.03, 0.10, 0.25)}
CELLS = [
    Cell("teacher tanh", teacher, "tanh", "adam", 3e-3, steps=3000, **STAGED),
    Cell("teacher GELU", teacher, "GELU", "adam", 3e-3, steps=3000, **STAGED),
    Cell("CoolProp tanh", coolprop, "tanh", "adam", 3e-3, steps=3000, **STAGED),
    Cell("CoolProp GELU", coolprop, "GELU", "adam", 3e-3, steps=3000, **STAGED),
]
BY_NAME = {cell.name: cell for cell in CELLS}
