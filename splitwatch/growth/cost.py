"""What growth costs in neurons, parameters and floating-point operations, and what of it a policy allows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from math import inf

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.grow import count_parameters, widened
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.rounds import rounds
from splitwatch.probe import Probe
from splitwatch.ranks import summed_number
from splitwatch.records import GrowthPlan, HiddenLayer, Move, Split


@dataclass(frozen=True, slots=True)
class Size:
    """New neurons, parameters, and operations a sample: of a network, of one more neuron, or the most allowed."""

    neuron: float
    parameter: float
    flop: float

    def less(self, other: Size, times: int = 1) -> Size:
        """What is left of this when the other is taken so many times."""
        return Size(*(a - times * b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def overdrawn(self) -> bool:
        """Whether more was taken than there was."""
        return min(astuple(self)) < 0


def count_flops(model: nn.Module, probe: Probe) -> float:
    """Floating-point operations of one sample's forward and backward pass, the mean over the probe's first batch.

    As ``torch.utils.flop_counter`` counts them: matrix products, convolutions and attention, a multiplication and an
    addition being two. Compare with ``GrowthPolicy.max_flops``.
    """
    with FlopCounterMode(display=False) as counter:
        _, samples = next(probe.gradients(model, at_least=1))
    return summed_number(counter.get_total_flops()) / summed_number(samples)


def limits(model: nn.Module, policy: GrowthPolicy) -> Size:
    """The most that the network may have after an event, infinite where nothing is said.

    With "even" moves ``max_ratio`` is one of widths and bounds nothing here.
    """
    times = None if policy.moves == "even" else policy.max_ratio
    ratio = None if times is None else times * count_parameters(model)
    parameters = min((limit for limit in (policy.max_parameters, ratio) if limit is not None), default=inf)
    return Size(_or_inf(policy.max_neurons), parameters, _or_inf(policy.max_flops))


def size(model: nn.Module, probe: Probe, policy: GrowthPolicy, neurons: int = 0) -> Size:
    """What the network has; operations are counted only where the policy asks for them."""
    asked = policy.max_flops is not None or policy.per == "flop"
    return Size(neurons, count_parameters(model), count_flops(model, probe) if asked else 0.0)


def size_with(
    model: nn.Module, probe: Probe, policy: GrowthPolicy, layers: Sequence[HiddenLayer], moves: Sequence[Move]
) -> Size:
    """What the network would have after some moves."""
    with widened(model, GrowthPlan(tuple(layers), tuple(moves), "")):
        return size(model, probe, policy, sum(move.added for move in moves))


def prices(model: nn.Module, probe: Probe, policy: GrowthPolicy, layers: Sequence[HiddenLayer]) -> dict[str, Size]:
    """What one more neuron of each layer costs, the others left as they are; in a grouped one its share of a round."""
    before, found = size(model, probe, policy), {}
    for x in layers:
        more = size_with(model, probe, policy, layers, one_round(model, x)).less(before)
        found[x.name] = Size(*(value / x.groups for value in astuple(more)))
    return found


def fitting(
    model: nn.Module,
    probe: Probe,
    policy: GrowthPolicy,
    layers: Sequence[HiddenLayer],
    moves: Sequence[Move],
) -> tuple[Move, ...]:
    """As many of the first whole rounds as keep within the budgets: neighbours that grow together cost more."""
    limit, parts = limits(model, policy), rounds(layers, moves)

    def exceeds(count: int) -> bool:
        return limit.less(size_with(model, probe, policy, layers, [*chain(*parts[:count])])).overdrawn

    return tuple(chain(*parts[: most_within(len(parts), exceeds)]))


def most_within(count: int, exceeds: Callable[[int], bool]) -> int:
    """The largest number up to ``count`` that does not exceed; ``count`` is asked first, because often all fits."""
    return bisect_left(range(1, count), True, key=exceeds) if exceeds(count) else count


def duplicate(model: nn.Module, layer: HiddenLayer, neuron: int, coefficients: Sequence[float] = (0.5, 0.5)) -> Split:
    """A split without offsets."""
    return duplicates(model, layer, {neuron: coefficients})[0]


def duplicates(model: nn.Module, layer: HiddenLayer, coefficients: Mapping[int, Sequence[float]]) -> list[Split]:
    """Splits without offsets of some neurons of a layer, whose weights are looked at once for all."""
    d, c = (torch.zeros(1, weights.shape[1]) for weights in neuron_weights(model, layer))
    return [
        Split(layer.name, r, tuple(shares), d.expand(len(shares), -1), c.expand(len(shares), -1), 0.0)
        for r, shares in coefficients.items()
    ]


def one_round(model: nn.Module, layer: HiddenLayer) -> list[Split]:
    """One more neuron in each of a layer's groups, without offsets."""
    return duplicates(model, layer, {group * layer.width // layer.groups: (0.5, 0.5) for group in range(layer.groups)})


def _or_inf(limit: float | None) -> float:
    return inf if limit is None else limit
