"""How often the population's curvature lies outside the bound that the held-out half gives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from curvature_clock import Row
from curvature_nets import Case
from torch import Tensor, nn
from tqdm import tqdm

from splitwatch import Probe, find_hidden_layers, measure_geometry
from splitwatch.geometry.dense import layer_curvature

NOMINAL = 0.05
SAMPLES = 512  # of a probe
POPULATION = 64  # times a probe
NEURONS = 16


@dataclass(frozen=True)
class Task:
    """Inputs and the labels a noisy random teacher gives them."""

    inputs: int
    teacher: Tensor

    @classmethod
    def drawn(cls, inputs: int) -> Task:
        return cls(inputs, torch.randn(inputs, 4))

    def draw(self, samples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(samples, self.inputs)
        return x, torch.distributions.Categorical(logits=torch.tanh(x @ self.teacher)).sample()


def held_out(quick: bool) -> list[Row]:
    activations = (nn.Tanh, nn.GELU) if quick else (nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.Mish, nn.Tanh)
    probes = 4 if quick else 40
    outside = torch.cat([_outside(seed, kind, probes) for seed, kind in enumerate(tqdm(activations, desc="held out"))])
    missed, n = float(outside.double().mean()), outside.numel()
    binomial = (NOMINAL * (1 - NOMINAL) / n) ** 0.5
    clustered = float(outside.double().mean(dim=1).std() / len(outside) ** 0.5)
    measured = f"{missed:.1%} ± {binomial:.1%} (binomial; {clustered:.1%} between probes)"
    return [
        Row(
            f"population above the one-sided 95 % bound, {n} neurons, {len(outside)} probes",
            measured,
            f"≤ {NOMINAL:.0%} + 2 errors",
            missed <= NOMINAL + 2 * binomial,
        )
    ]


def _outside(seed: int, activation: type[nn.Module], probes: int) -> Tensor:
    """Which fitted directions curve upwards more than their bound, (probes, neurons)."""
    torch.manual_seed(seed)
    task = Task.drawn(12 if seed % 2 else 32)
    model = nn.Sequential(nn.Linear(task.inputs, NEURONS), activation(), nn.Linear(NEURONS, 4))
    case = Case(model, task.draw(4096)).trained(100)
    everything = Probe([task.draw(POPULATION * SAMPLES)] * 2, case.loss_fn)
    layer = find_hidden_layers(model, Probe([task.draw(8)], case.loss_fn))[0]
    population = layer_curvature(model, layer, everything, "fitted")
    found = []
    for _ in range(probes):
        probe = Probe([task.draw(SAMPLES)], case.loss_fn)
        geometry = measure_geometry(model, probe, [layer], confidence=1 - NOMINAL)[layer.name]
        value = (geometry.min_vector * population.hessian(geometry.min_vector)).sum(dim=1)
        found.append(value > geometry.interval[:, 1])
    return torch.stack(found)
