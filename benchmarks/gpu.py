"""What measuring costs and how exact it is on a device: one command, one table.

    python benchmarks/gpu.py                        # on CUDA, a few minutes
    python benchmarks/gpu.py --device cpu --quick   # the same code on a CPU, in seconds

Every network is measured as trained in float32, under autocast to bfloat16 and under autocast to float16, with TF32 as
training often has it. Values are compared with those measured in float64 on the CPU, on a smaller probe: deviations
relative to the largest value of its kind. From a random start one end in a thousand may be missed for its neighbour, in
either measurement, so the one value in a thousand that deviates most is shown beside the others, not among them. Exit
status 1 where another deviates by more than ``TOLERANCE`` or the function drifts at growth by more than ``DRIFT``.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from splitwatch import (
    GrowthPlan,
    GrowthPolicy,
    Probe,
    Split,
    find_hidden_layers,
    grow,
    measure_geometry,
    plan_growth,
)
from splitwatch.geometry.dense import layer_curvature

TOLERANCE = 1e-3  # float32 against float64, both stopped at the solver's default tolerance
MISSED = 1e-3  # share of the values that may deviate by more
DRIFT = 1e-6
PRECISIONS = {"float32": None, "autocast bfloat16": torch.bfloat16, "autocast float16": torch.float16}


class Block(nn.Module):
    """The MLP half of a transformer layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.SiLU()]


@dataclass(frozen=True)
class Setup:
    """A network with its batches; ``checked`` is how many samples are compared with float64."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    checked: int
    classes: int = 10

    def data(self, samples: int, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Two batches: one is fitted on, the other verifies."""
        generator = torch.Generator().manual_seed(1)
        x = [torch.randn(samples, *self.shape, generator=generator) for _ in range(2)]
        rows = (samples,) if self.name.split()[0] != "transformer" else (samples, self.shape[0])
        y = [torch.randint(self.classes, rows, generator=generator) for _ in range(2)]
        return [(a.to(device, dtype), b.to(device)) for a, b in zip(x, y, strict=True)]


def setups(quick: bool) -> list[Setup]:
    def mlp(width: int, inputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10)
        )

    def conv(a: int, b: int) -> nn.Module:
        return nn.Sequential(
            *convolution(3, a), *convolution(a, b), nn.AvgPool2d(2), *convolution(b, 2 * b),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * b, 10),
        )  # fmt: skip

    def transformer(width: int, hidden: int) -> nn.Module:
        return nn.Sequential(*[Block(width, hidden) for _ in range(4)], nn.Linear(width, 10))

    if quick:
        return [
            Setup("MLP 16-12-12-10", partial(mlp, 12, 16), (16,), 32, 16),
            Setup("conv 4-6-12", partial(conv, 4, 6), (3, 8, 8), 8, 4),
            Setup("transformer MLP 8-16-8 ×4", partial(transformer, 8, 16), (8, 8), 8, 4),
        ]
    return [
        Setup("MLP 784-512-512-10", partial(mlp, 512, 784), (784,), 1024, 256),
        Setup("conv 32-64-128", partial(conv, 32, 64), (3, 32, 32), 256, 8),
        Setup("transformer MLP 256-1024-256 ×4", partial(transformer, 256, 1024), (128, 256), 64, 2),
    ]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor], half: torch.dtype | None) -> Tensor:
    """The loss as a user writes it, with autocast inside where it is asked for."""
    x, y = batch
    with nullcontext() if half is None else torch.autocast(x.device.type, dtype=half):
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


# --- one row --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Milliseconds, bytes (0 where the device does not count them), relative deviation and drift.

    ``event`` widens every layer to twice its width, in steps of the widened network.
    """

    network: str
    precision: str
    step: float
    product: float
    geometry: float
    event: float
    peak: int
    deviation: float
    worst: float
    drift: float


def row(setup: Setup, precision: str, reference: dict[str, Tensor], device: torch.device, repeats: int) -> Row:
    half = PRECISIONS[precision]
    torch.manual_seed(0)
    model, loss = setup.build().to(device), partial(loss_fn, half=half)
    probe = Probe(setup.data(setup.batch, device, torch.float32), loss)
    small = Probe(setup.data(setup.checked, device, torch.float32), loss)
    worst = largest_deviations(values(model, small), reference)
    layers = [layer for layer in find_hidden_layers(model, probe) if layer.growable]
    curvature = layer_curvature(model, layers[0], probe, "fitted")
    direction = torch.randn(curvature.layer.width, curvature.d, device=device)
    product = milliseconds(partial(curvature.hessian, direction), device, repeats)
    del curvature
    reset_peak(device)
    geometry = milliseconds(partial(measure_geometry, model, probe, layers), device, 1)
    peak = peak_bytes(device)
    drift = drift_at_growth(copy.deepcopy(model), small)
    event = milliseconds(partial(doubled, model, probe), device, 1)
    step = step_time(model, loss, half, probe, repeats)
    event /= step_time(doubled(model, probe), loss, half, probe, repeats)
    return Row(setup.name, precision, step, product, geometry, event, peak, worst[-1], worst[0], drift)


def doubled(model: nn.Module, probe: Probe) -> nn.Module:
    """A copy with every layer at twice its width: search, line search and surgery of one scheduled growth event."""
    grown = copy.deepcopy(model)
    plan = plan_growth(grown, {}, probe, GrowthPolicy(moves="even", max_ratio=2))
    assert grow(grown, plan, probe=probe).grown
    return grown


def step_time(model: nn.Module, loss, half: torch.dtype | None, probe: Probe, repeats: int) -> float:
    """Milliseconds of a training step with Adam."""
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(loss(model, probe.fitted[0])).backward()
        scaler.step(optimizer)
        scaler.update()

    return milliseconds(step, device, repeats)


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time once warm, with the device waited for."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors took since the reset; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def values(model: nn.Module, probe: Probe) -> dict[str, Tensor]:
    """Everything measured that is a number a neuron, in float64 on the CPU."""
    fields = ("min_eigenvalue", "max_eigenvalue", "coupling_norm", "escape_eigenvalue")
    found = measure_geometry(model, probe)
    return {f"{name} {f}": getattr(layer, f).detach().double().cpu() for name, layer in found.items() for f in fields}


def largest_deviations(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[float]:
    """The largest deviations, in descending order: one for every value that may be missed, and the next."""
    assert found.keys() == expected.keys()
    every = torch.cat([(found[key] - expected[key]).abs() / expected[key].abs().max() for key in expected])
    return every.topk(ceil(MISSED * len(every)) + 1).values.tolist()


def drift_at_growth(model: nn.Module, probe: Probe) -> float:
    """Relative change of the function when one neuron of the first layer is split without an offset."""
    layer = next(layer for layer in find_hidden_layers(model, probe) if layer.growable)
    found = measure_geometry(model, probe, [layer])[layer.name]
    d, c = found.escape_in.shape[1], found.escape_out.shape[1]
    move = Split(layer.name, 0, (0.5, 0.5), torch.zeros(2, d), torch.zeros(2, c), 0.0)
    return grow(model, GrowthPlan((layer,), (move,), "by hand"), probe=probe).drift


# --- the table ------------------------------------------------------------------------------------------------------


def references(every: Sequence[Setup]) -> dict[str, dict[str, Tensor]]:
    """The float64 values of every network, on the CPU."""
    found = {}
    for setup in tqdm(every, desc="float64 on the CPU", leave=False):
        torch.manual_seed(0)
        model = setup.build().double()
        data = setup.data(setup.checked, torch.device("cpu"), torch.float64)
        found[setup.name] = values(model, Probe(data, partial(loss_fn, half=None)))
    return found


def table(rows: Sequence[Row], title: str) -> Table:
    shown = Table(title=title)
    for column in (
        "network",
        "training in",
        "step",
        "one product",
        "geometry",
        "event",
        "peak",
        "deviation",
        "worst",
        "drift",
    ):
        shown.add_column(column, justify="left" if column in ("network", "training in") else "right")
    for r in rows:
        peak = f"{r.peak / 2**20:.0f} MiB" if r.peak else "–"
        times = (f"{r.step:.2f} ms", f"{r.product:.2f} ms", f"{r.geometry:.0f} ms", f"{r.event:.0f} steps")
        shown.add_row(r.network, r.precision, *times, peak, f"{r.deviation:.1e}", f"{r.worst:.1e}", f"{r.drift:.1e}")
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--quick", action="store_true", help="tiny networks, one repeat")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: required a CUDA device, found none; pass --device cpu --quick")
    start, before = time.perf_counter(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        every = setups(options.quick)
        expected, repeats = references(every), 1 if options.quick else 20
        work = [(setup, precision) for setup in every for precision in PRECISIONS]
        rows = [row(setup, p, expected[setup.name], device, repeats) for setup, p in tqdm(work, leave=False)]
    finally:
        torch.set_float32_matmul_precision(before)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console = Console(width=144)
    console.print(table(rows, f"{kind}, torch {torch.__version__}, TF32 allowed in training"))
    bad = [r for r in rows if not (r.deviation <= TOLERANCE and r.drift <= DRIFT)]
    console.print(f"{len(bad)} of {len(rows)} rows out of bounds, {time.perf_counter() - start:.0f} s")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
