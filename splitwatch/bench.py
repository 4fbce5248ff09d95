"""What measuring costs against a training step, in CPU time."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from splitwatch.geometry.dense import layer_curvature
from splitwatch.geometry.measure import measure_geometry
from splitwatch.layers import find_hidden_layers
from splitwatch.probe import Probe

REPEATS = 5


def curvature_costs(width: int = 512, samples: int = 1024) -> list[tuple[str, float, float]]:
    """Rows of (what, median CPU seconds, ratio to one forward+backward of the whole network), on one thread.

    Args:
        width: neurons in each of two hidden layers of 784-width-width-10 with tanh and GELU.
        samples: batch size.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rows(width, samples)
    finally:
        torch.set_num_threads(threads)


def _rows(width: int, samples: int) -> list[tuple[str, float, float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))
    batches = [(torch.rand(samples, 784), torch.randint(0, 10, (samples,))) for _ in range(2)]
    probe = Probe(batches, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    layers = [layer for layer in find_hidden_layers(model, probe) if layer.growable]
    curvature = layer_curvature(model, layers[0], probe, "fitted")
    direction = torch.randn(width, curvature.d)

    def step() -> None:
        model.zero_grad()
        probe.loss_fn(model, batches[0]).backward()

    work: dict[str, Callable[[], object]] = {
        "training step (forward + backward)": step,
        f"inner Hessian product, {width} neurons": lambda: curvature.hessian(direction),
        f"coupling product, {width} neurons": lambda: curvature.coupling(direction),
        f"geometry of one layer, {width} neurons": lambda: measure_geometry(model, probe, layers[:1]),
    }
    seconds = {name: median(_seconds(function) for _ in range(REPEATS)) for name, function in tqdm(work.items())}
    unit = seconds["training step (forward + backward)"]
    return [(name, value, value / unit) for name, value in seconds.items()]


def _seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
