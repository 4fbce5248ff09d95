"""Where a network is about to grow, as every method of benchmarks/growth.py sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from splitwatch import Probe
from splitwatch.anatomy import plain_module
from splitwatch.geometry.weights import neuron_weights
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.records import GrowthPlan, HiddenLayer, Move, Sprout


@dataclass(frozen=True)
class Site:
    """A network about to grow until every hidden layer has a width; ``parameters`` is what it may have by then."""

    model: nn.Module
    probe: Probe
    width: int
    seed: int
    parameters: int

    @cached_property
    def layers(self) -> tuple[HiddenLayer, ...]:
        return select_layers(find_hidden_layers(self.model, self.probe), None)

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def missing(self, layer: HiddenLayer) -> int:
        return max(self.width - layer.width, 0)


Choice = Callable[[Site, HiddenLayer, int], Sequence[Move]]


def everywhere(choose: Choice) -> Callable[[Site], GrowthPlan]:
    """A choice made in every hidden layer; neurons that it does not find are random."""

    def plan(site: Site) -> GrowthPlan:
        moves: list[Move] = []
        for layer in site.layers:
            found = list(choose(site, layer, site.missing(layer)))
            moves += found + random_new(site, layer, site.missing(layer) - sum(move.added for move in found))
        return GrowthPlan(site.layers, tuple(moves), "")

    return plan


def random_new(site: Site, layer: HiddenLayer, count: int) -> list[Move]:
    """Neurons as a fresh layer has them, with outgoing weights zero: the function stays as it is."""
    if not count:
        return []
    c = neuron_weights(site.model, layer)[1].shape[1]
    return [Sprout(layer.name, w, torch.zeros(c)) for w in fresh(site, layer, count)]


def fresh(site: Site, layer: HiddenLayer, count: int) -> Tensor:
    """Incoming weights as PyTorch's own initialisation draws them, (count, d)."""
    parts = []
    for name in layer.producers:
        module = plain_module(site.model, name)
        inputs = module.weight[0].numel()
        drawn = torch.rand(count, inputs + (module.bias is not None), generator=site.generator)
        parts.append((2 * drawn - 1) / inputs**0.5)
    return torch.cat(parts, dim=1)
