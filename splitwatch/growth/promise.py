"""What new neurons promise, asked of the held-out half: the fitted one chose them for what it promises itself.

Along a new neuron's outgoing weights (with what they change in existing ones) the loss falls by L(0) − L(t) =
−t s − t² f. The slope s comes from the held-out half, with its standard error; the curvature 2f, hardly a matter of
sampling, from the parabola on the fitted half, where −2f is the slope.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan

import numpy as np
import torch
from scipy.special import stdtr
from torch import Tensor, nn

from splitwatch.geometry.ends import channels, outgoing_gradient
from splitwatch.growth.grow import widened
from splitwatch.growth.search import scale
from splitwatch.probe import Probe
from splitwatch.ranks import mean_with_error, share_of, summed_number
from splitwatch.records import GrowthPlan, HiddenLayer, Sprout
from splitwatch.trace import LayerTrace

PARTS = 8
"""Parts of the held-out half that the standard error is taken over, at least."""

FALSE = 0.05
"""Expected share of broken promises among those that count as kept (Benjamini & Hochberg 1995)."""


@dataclass(frozen=True, slots=True, eq=False)
class Promise:
    """A sprout and the held-out loss's slope along it, with that slope's standard error.

    ``kept`` says whether the loss descends, beyond what sampling explains among as many sprouts as were asked.
    """

    sprout: Sprout
    slope: float
    error: float
    kept: bool

    def scaled(self, factor: float) -> Promise:
        """The same of a longer or shorter whole step, to the lowest point of the parabola."""
        sprout = replace(scale(self.sprout, factor), predicted_decrease=self.sprout.predicted_decrease * factor)
        return replace(self, sprout=sprout, slope=self.slope * factor, error=self.error * factor)

    def decrease(self, step: float) -> float:
        """What a part of the sprout's step promises."""
        return -step * self.slope - step**2 * self.sprout.predicted_decrease

    def at(self, step: float) -> Sprout:
        """The sprout at a part of its step, with what that promises; a silent one where the promise is not kept."""
        if not self.kept:
            why = f"silent: slope {self.slope:+.2e} ± {self.error:.0e} on the held-out half"
            return replace(scale(self.sprout, 0.0), predicted_decrease=0.0, reason=why)
        why = f"slope {self.slope:+.2e} ± {self.error:.0e} along its outgoing weights on the held-out half"
        return replace(scale(self.sprout, step), predicted_decrease=self.decrease(step), reason=why)


def promises(model: nn.Module, layers: Sequence[HiddenLayer], sprouts: Sequence[Sprout], probe: Probe) -> list[Promise]:
    """The promise of every sprout by itself, layer by layer.

    Args:
        model: the network; widened while it is measured, left as it was.
        layers: the layers that sprouts are in.
        sprouts: with outgoing weights, up to a scale, and half of what they fall by at first order on the fitted half.
        probe: measured on its held-out half.
    """
    mine = {layer: [move for move in sprouts if move.layer == layer.name] for layer in layers}
    mine = {layer: moves for layer, moves in mine.items() if moves}
    asked = [_asked(model, {x: mine[x] for x in group}, probe) for group in apart([*mine])]
    found = [one for some, _ in asked for one in some]
    places = {layer.name: i for i, layer in enumerate(mine)}
    found.sort(key=lambda one: places[one.sprout.layer])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.divide([one.slope for one in found], [one.error for one in found])
    freedom = max((parts for _, parts in asked), default=1) - 1
    kept = _discovered(stdtr(freedom, t).tolist())  # nan of a single part is never below a bar
    return [replace(one, kept=yes) for one, yes in zip(found, kept, strict=True)]


def _discovered(chances: Sequence[float]) -> list[bool]:
    """Which are small enough that only a share ``FALSE`` of those chosen is expected to be chance."""
    ordered = sorted(chance for chance in chances if not isnan(chance))
    bars = (FALSE * k / len(chances) for k in range(1, len(ordered) + 1))
    bar = max((p for p, most in zip(ordered, bars, strict=True) if p <= most), default=-1.0)
    return [p <= bar for p in chances]


def apart(layers: Sequence[HiddenLayer]) -> list[list[HiddenLayer]]:
    """Layers in groups within which no module belongs to two of them: a group is widened and looked at in one pass."""
    groups: list[tuple[list[HiddenLayer], set[str]]] = []
    for layer in layers:
        modules = {*layer.producers, *(consumer.name for consumer in layer.consumers)}
        group, taken = next((x for x in groups if not x[1] & modules), ([], set()))
        if not group:
            groups.append((group, taken))
        group.append(layer)
        taken |= modules
    return [group for group, _ in groups]


@dataclass(frozen=True, slots=True, eq=False)
class _Changes:
    """All that n sprouts of a layer of width m change, in float64 on the model's device.

    Their outgoing weights (n, c), the factors (m, r) and (r, c) of what is added to existing ones, of which ``owner``
    (r,) says whose they are, and what is added to the consumers' biases, (n, outputs) or None.
    """

    outgoing: Tensor
    left: Tensor
    right: Tensor
    owner: Tensor
    biases: Tensor | None

    @classmethod
    def of(cls, sprouts: Sequence[Sprout], width: int, device: torch.device) -> _Changes:
        outgoing = torch.stack([move.outgoing for move in sprouts])
        none = outgoing.new_zeros(width, 0), outgoing.new_zeros(0, outgoing.shape[1])
        left, right = zip(*(move.others or none for move in sprouts), strict=True)
        owner = torch.tensor([j for j, part in enumerate(right) for _ in part], dtype=torch.long, device=device)
        added = [move.biases for move in sprouts]
        size = next((len(part) for part in added if part is not None), 0)
        biases = [outgoing.new_zeros(size) if part is None else part for part in added]
        numbers = outgoing, torch.cat(left, dim=1), torch.cat(right), torch.stack(biases)
        outgoing, left, right, biases = (part.to(device, torch.float64) for part in numbers)
        return cls(outgoing, left, right, owner, biases if size else None)


def _asked(
    model: nn.Module, sprouts: Mapping[HiddenLayer, Sequence[Sprout]], probe: Probe
) -> tuple[list[Promise], float]:
    """Slopes of the held-out loss along the sprouts' changes, with their errors, and how many parts these are of."""
    moves = [move for some in sprouts.values() for move in some]
    silent = GrowthPlan(tuple(sprouts), tuple(scale(move, 0.0) for move in moves), "")
    wide = [replace(layer, width=layer.width + len(some)) for layer, some in sprouts.items()]
    device = next(model.parameters()).device
    changes = {layer.name: _Changes.of(some, layer.width, device) for layer, some in sprouts.items()}
    values, weights = [], []
    with widened(model, silent):
        for traces in probe.traces(model, wide, "held_out", -(-PARTS // len(probe.held_out))):
            values.append(torch.cat([_along(traces[name], change) for name, change in changes.items()]))
            weights.append(next(iter(traces.values())).share)
    slopes = torch.stack(values)
    found = mean_with_error(slopes, slopes.new_tensor(weights) * share_of(probe.samples("held_out")))
    numbers = (part.tolist() for part in found)
    asked = [Promise(move, slope, error, False) for move, slope, error in zip(moves, *numbers, strict=True)]
    return asked, summed_number(len(values))


def _along(trace: LayerTrace, changes: _Changes) -> Tensor:
    """The slopes of one batch's mean loss, (n,), from its gradient in all that the sprouts change."""
    blocks = channels(trace, trace.path(*trace.pre_activations()), 0, trace.layer.width)
    old, new = outgoing_gradient(trace, blocks).double().split([len(changes.left), len(changes.outgoing)])
    slopes = (changes.outgoing * new).sum(1)
    slopes = slopes.index_add(0, changes.owner, (changes.right * (changes.left.T @ old)).sum(1))
    if changes.biases is None:
        return slopes
    maps = zip(trace.consumers, trace.signals, strict=True)
    biases = [consumer.bias_gradient(signal) for consumer, signal in maps if consumer.has_bias]
    return slopes + changes.biases @ torch.cat(biases).double()
