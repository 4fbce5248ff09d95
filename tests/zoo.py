"""Small networks of every supported shape, each with the layers that must be found growable and a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitwatch.probe import Probe


def softsign_square(x: Tensor) -> Tensor:
    """An activation no library knows."""
    return x / (1 + x * x) + 0.3 * x


class Wiggle(nn.Module):
    def forward(self, x):
        return torch.sin(x) * torch.sigmoid(x)


class FunctionalMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        h = self.dropout(softsign_square(self.first(x)))
        return self.third(F.gelu(self.second(h)))


class ResidualBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList([self.block() for _ in range(2)])
        self.head = nn.Linear(4, 3)

    @staticmethod
    def block():
        return nn.Sequential(
            nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.SiLU(),
            nn.Conv2d(5, 4, 3, padding=1),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(self.norm(x))) * self.up(self.norm(x)))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return torch.cat([self.first(h), self.second(h * 0.5)], -1)


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 5), nn.Linear(4, 3), nn.Linear(12, 2)

    def forward(self, x):
        return self.out(torch.cat([torch.tanh(self.left(x)), x, F.softplus(self.right(x))], -1))


class Branching(nn.Module):
    """Control flow that depends on the data, and nested containers."""

    def __init__(self):
        super().__init__()
        first = nn.Sequential(nn.Linear(4, 5), nn.Sequential(Wiggle()))
        self.layers = nn.ModuleDict({"a": first, "b": nn.Linear(5, 2)})

    def forward(self, x):
        h = self.layers["a"](x)
        return self.layers["b"](h) if float(h.detach().sum()) < 1e9 else x


class Experts(nn.Module):
    """Samples with a positive first feature go to a and b, others to c and d: ``routed``, or all to both and masked."""

    def __init__(self, *, routed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(*size).double() for size in 2 * [(3, 4), (4, 2)])
        self.routed = routed

    def forward(self, x: Tensor) -> Tensor:
        one, other = x[:, :1] > 0, x[:, :1] <= 0
        if not self.routed:
            return one * self.b(torch.tanh(self.a(x))) + other * self.d(torch.tanh(self.c(x)))
        first = self.b(torch.tanh(self.a(x[one[:, 0]])))
        return x[:, :2].masked_scatter(one, first).masked_scatter(other, self.d(torch.tanh(self.c(x[other[:, 0]]))))

    @staticmethod
    def batches() -> list[Tensor]:
        """A batch of both kinds, and one for the first expert alone."""
        both, first = torch.randn(2, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return [both, torch.cat([first[:, :1].abs(), first[:, 1:]], 1)]


class InvertedBottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.depth = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.project = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return self.project(F.silu(self.norm(self.depth(F.silu(self.expand(x)))))).mean((2, 3))


class GroupedBlock(nn.Module):
    """A residual block as in ResNeXt: dense → grouped → dense convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    growable: tuple[str, ...]
    classes: bool = False

    def make(self, dtype=torch.float64, seed=0, samples=12, batches=4) -> tuple[nn.Module, Probe]:
        torch.manual_seed(seed)
        model = self.build().to(dtype)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        sizes = [samples + i % 3 - 1 for i in range(batches)]  # ragged in both halves
        data = torch.randn(sum(sizes), *self.shape, dtype=dtype)
        with torch.no_grad():
            outputs = model.eval()(data)
        target = torch.randn_like(outputs)
        model.train()
        return model, Probe(list(zip(data.split(sizes), target.split(sizes), strict=True)), mse)


def mse(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.GELU(), nn.Dropout(0.2), nn.Linear(4, 3))


def conv_bn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(inplace=True), nn.AvgPool2d(2),
        nn.Conv2d(4, 5, 3, stride=2, padding=1, dilation=1), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(5, 3),
    )  # fmt: skip


def flattened():
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding="same"), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 2))


def conv1d():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), nn.Mish(), nn.Conv1d(4, 3, 3, bias=False), nn.PReLU(3),
        nn.Softplus(), nn.Conv1d(3, 2, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
    )  # fmt: skip


def encoder():
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu"), 2, enable_nested_tensor=False
    )


def conv3d():
    return nn.Sequential(nn.Conv3d(1, 3, 3), nn.Tanh(), nn.Conv3d(3, 2, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten())


def swish_after_pool():
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.AvgPool1d(2), nn.SiLU(), nn.Flatten(), nn.Linear(12, 2))


ZOO = {
    "mlp": Case(mlp, (5,), ("0", "2")),
    "user-written activation": Case(FunctionalMLP, (5,), ("first", "second")),
    "conv+bn": Case(conv_bn, (2, 8, 8), ("0", "4")),
    "flatten": Case(flattened, (1, 6, 6), ("0",)),
    "conv1d": Case(conv1d, (2, 7), ("0", "2")),
    "conv3d": Case(conv3d, (1, 5, 5, 5), ("0",)),
    "residual blocks": Case(ResidualBlocks, (2, 6, 6), ("blocks.0.2", "blocks.1.2")),
    "transformer": Case(encoder, (3, 4), ("layers.0.linear1", "layers.1.linear1")),
    "gated": Case(GatedMLP, (3, 4), ("gate",)),
    "several consumers": Case(TwoHeads, (4,), ("trunk",)),
    "concatenation": Case(Concatenated, (4,), ("left", "right")),
    "nested, data-dependent": Case(Branching, (4,), ("layers.a.0",)),
    "inverted bottleneck": Case(InvertedBottleneck, (2, 5, 5), ("expand",)),
    "grouped": Case(GroupedBlock, (2, 5, 5), ("block.0", "block.3")),
    "activation after pooling": Case(swish_after_pool, (2, 8), ("0",)),
}

SINGLY = [name for name in ZOO if name != "grouped"]
"""Networks whose neurons can be copied one by one, and dropped again."""


def in_turn(first: Iterable, *others: Iterable, quick: int = 1) -> list:
    """Every combination as parameters of a test; quick are some for each of the first, going round the others.

    So every value is met quickly, and every combination among the slow tests.
    """
    rest = list(itertools.product(*others))
    return [
        pytest.param(one, *more, marks=[] if (k - i) % len(rest) < quick else pytest.mark.slow)
        for i, one in enumerate(first)
        for k, more in enumerate(rest)
    ]
