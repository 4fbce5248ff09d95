"""Residual pursuit: new neurons whose features explain most of what the loss still wants from a layer.

The outgoing weights V of those that are chosen (``candidates``) minimise g·V + ½ VᵀQV with the new features' Gram
matrix Q and a ridge; a parabola along V, with what V changes in the existing weights, sets the length. A first look at
few rows finds out which candidates are worth the rest. The whole costs some tens of training steps.

Related: GradMax (Evci et al. 2022) and TINY (Verbockhaven et al. 2024) choose new neurons by the same residual, from
what is linear in the layer's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor, nn

from splitwatch.geometry.response import GRAPH
from splitwatch.growth.candidates import ascend, best, candidates, select
from splitwatch.growth.grow import widened
from splitwatch.growth.search import Candidate, scale
from splitwatch.growth.seedbed import RIDGE, SEEN, Measured, Reader, Seedbed
from splitwatch.precision import full_precision
from splitwatch.probe import Probe
from splitwatch.ranks import largest_over_ranks
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, Sprout

POOL, MOST = 2, 512
"""Candidates tried in a layer, relative to the neurons wanted, and the most beyond them; more gained nothing."""
LEAST, KEPT = 32, 16
"""Fewest candidates, and fewest of them that are improved: where few neurons are wanted there has to be a choice."""
ROUNDINGS = 64
"""How many times the rounding of the loss a bend has to be, to say how much the loss curves."""
TRIES, FAR = 8, 16.0
"""How often the length of the outgoing weights is tried (once or twice where the loss is a parabola along them), and
how far from one length to the next where the loss is infinite, or bends by less than it is rounded by."""


@dataclass(frozen=True, slots=True, eq=False)
class Seedlings:
    """Chosen neurons of one layer, best first: incoming weights (n, d), and what was measured of them.

    ``explained`` (n,) is what each adds to ‖g‖²/‖φ⊥‖²; ``readers`` are the layer's consumers. Of the others,
    ``unchosen`` (n', d), so many are not ``wanted``, or the chosen ones and the layer leave nothing new.
    """

    layer: HiddenLayer
    wanted: int
    readers: tuple[Reader, ...]
    incoming: Tensor
    measured: Measured
    explained: Tensor
    unchosen: Tensor

    def first(self, count: int) -> Seedlings:
        """The best of them."""
        at = torch.arange(min(count, len(self.incoming)), device=self.incoming.device)
        some = {"incoming": self.incoming[at], "measured": self.measured.of(at), "explained": self.explained[at]}
        return replace(self, **some)

    def repeats(self) -> tuple[Sprout, ...]:
        """As many silent neurons of those not chosen as are missing, for who needs the whole number."""
        return self._silent(self.unchosen[: self.wanted - len(self.incoming)], "nothing new to the layer yet")

    def fallow(self) -> tuple[Sprout, ...]:
        """All that are wanted as silent neurons, where the held-out half confirms none."""
        every = torch.cat([self.incoming, self.unchosen])[: self.wanted]
        return self._silent(every, "at a first look the held-out half confirms no new neuron of this layer")

    def _silent(self, incoming: Tensor, why: str) -> tuple[Sprout, ...]:
        still = torch.zeros(self.measured.gain.shape[1])
        return tuple(Sprout(self.layer.name, w, still.to(w), 0.0, f"silent: {why}") for w in incoming.cpu())

    def sprouts(self) -> tuple[Sprout, ...]:
        """The neurons with outgoing weights −(Q + ridge)⁻¹g, up to the scale of the loss; predictions are −½ g·v."""
        if not len(self.incoming):
            return ()
        gain, left = self.measured.gain, self.measured.left + RIDGE * self.measured.norm.diag()
        size = left.diagonal().sqrt()[:, None]
        outgoing = -torch.linalg.solve(left / size / size.T, gain / size) / size
        falls = (-0.5 * (gain * outgoing).sum(1)).tolist()
        change, biases = rebalance(self.readers, self.measured.combination, outgoing)
        parts = (part.to(self.incoming).cpu() for part in (self.incoming, outgoing, change, biases))
        return tuple(
            Sprout(self.layer.name, w, v, fall, "", (a[:, None], v[None]), b)
            for w, v, a, b, fall in zip(*parts, falls, strict=True)
        )


def rebalance(readers: Sequence[Reader], combination: Tensor, outgoing: Tensor) -> tuple[Tensor, Tensor]:
    """What takes φ − φ⊥ of k new neurons out: a and b, (k, m) and (k, outputs).

    Existing outgoing weights change by aᵀv, the biases of the consumers that have some by the sum of b.

    Args:
        readers: the layer's consumers.
        combination: how existing neurons and the consumers' biases make φ − φ⊥, (m + biases, k).
        outgoing: the new neurons' outgoing weights v, (k, c).
    """
    biased = sum(reader.has_bias for reader in readers)
    neurons, constants = combination.split([len(combination) - biased, biased])
    parts = zip(readers, outgoing.split([reader.size for reader in readers], dim=1), strict=True)
    sums = [part.reshape(len(part), x.outputs, -1).sum(2) for x, part in parts if x.has_bias]
    biases = [-constant[:, None] * part for constant, part in zip(constants, sums, strict=True)]
    return -neurons.T, torch.cat([outgoing[:, :0], *biases], dim=1)


def pursue(
    model: nn.Module,
    counts: Mapping[HiddenLayer, int],
    probe: Probe,
    geometry: Mapping[str, LayerGeometry],
    *,
    max_bytes: int,
) -> list[Seedlings]:
    """Search layers for new neurons, each by itself; the model and the process's RNG stay as they are.

    Args:
        model: the network.
        counts: some of its hidden layers, and at most how many neurons for each; fewer where features repeat.
        probe: searched on its fitted half.
        geometry: by layer; finite steps along split directions are candidates too.
        max_bytes: what may be kept in memory, and once more for the graph of one batch.

    Returns:
        For every layer the neurons, best first.

    Raises:
        UnsupportedLayerError: a layer cannot hold new neurons.
    """
    seen = first_look(model, counts, probe, geometry, max_bytes=max_bytes)
    return [improve(model, probe, one, max_bytes=max_bytes) for one in seen]


def first_look(
    model: nn.Module,
    counts: Mapping[HiddenLayer, int],
    probe: Probe,
    geometry: Mapping[str, LayerGeometry],
    *,
    max_bytes: int,
    improved: int = KEPT,
) -> list[Seedlings]:
    """What ``pursue`` would find, were it to improve nothing and to look at few rows.

    Of the candidates ``improved`` are kept, or as many as are wanted.
    """
    if not counts:
        return []
    found = []
    with full_precision():
        rooms = _rooms(model, [*counts], probe, max_bytes)
        for (layer, wanted), room in zip(counts.items(), rooms, strict=True):
            count = max(wanted, min(max(LEAST, POOL * wanted), MOST, room))
            bed = Seedbed(model, layer, probe, count, max_bytes, rows=SEEN)
            w = best(bed, candidates(bed, geometry.get(layer.name), seed=0), max(wanted, improved))
            found.append(_seedlings(bed, w, wanted))
    return found


def improve(model: nn.Module, probe: Probe, seen: Seedlings, *, max_bytes: int) -> Seedlings:
    """The same after gradient ascent, chosen anew on the whole fitted half."""
    w = torch.cat([seen.incoming, seen.unchosen])
    with full_precision():
        bed = Seedbed(model, seen.layer, probe, len(w), max_bytes)
        return _seedlings(bed, ascend(bed, w), seen.wanted)


def _seedlings(bed: Seedbed, w: Tensor, wanted: int) -> Seedlings:
    kept, explained = select(found := bed.measure(w), wanted)
    rest = torch.ones(len(w), dtype=torch.bool, device=w.device)
    rest[kept] = False
    return Seedlings(bed.layer, wanted, bed.readers, w[kept], found.of(kept), explained, w[rest])


def _rooms(model: nn.Module, layers: Sequence[HiddenLayer], probe: Probe, max_bytes: int) -> list[int]:
    """How many candidates of each layer the graph of one batch may hold, one at least."""
    found = []
    for layer, trace in zip(layers, next(iter(probe.traces(model, layers, "fitted"))).values(), strict=True):
        ends = [*trace.pre_activations(), *(consumer.input for consumer in trace.consumers)]
        held = GRAPH * sum(x.nbytes for x in ends)
        found.append(max(1, -int(largest_over_ranks(layer.width - max_bytes * layer.width // held))))
    return found


def sized(model: nn.Module, layers: Sequence[HiddenLayer], moves: Sequence[Sprout], probe: Probe) -> tuple[Sprout, ...]:
    """Sprouts at the ``lowest`` point; predictions are each one's share, −½ g·v, none where nothing descends."""
    step = lowest(model, layers, moves, probe, probe.loss(model, "fitted")) if moves else 0.0
    return tuple(
        replace(
            scale(move, step),
            predicted_decrease=(fall := move.predicted_decrease * step),
            reason=f"slope {-2 * fall:+.2e} along its outgoing weights, feature new to the layer",
        )
        for move in moves
        if step
    )


def lowest(
    model: nn.Module, layers: Sequence[HiddenLayer], moves: Sequence[Sprout], probe: Probe, before: float
) -> float:
    """The step to the lowest point of the loss's parabola along sprouts' joint outgoing weights.

    L(t) = L + t gᵀd + ½ t² c on the fitted half, L being the loss ``before`` and c what the loss at a point close to
    the lowest makes it. Where there is none (c ≤ 0), or one lower than zero for a loss that is positive, the step is
    bounded by a predicted decrease of |L|. Zero where the loss does not fall.
    """
    slope = -2 * sum(move.predicted_decrease for move in moves)
    if not slope < 0:
        return 0.0
    most, least = 2 * abs(before) / -slope, 0.0
    step, rounding = most / FAR if before > 0 else 1.0, ROUNDINGS * _rounding(moves[0].outgoing.dtype) * abs(before)
    for _ in range(TRIES):
        with widened(model, GrowthPlan(tuple(layers), tuple(scale(move, step) for move in moves), "")):
            loss = probe.loss(model, "fitted", finite=False)
        bend = loss - before - step * slope
        if not isfinite(loss):
            step /= FAR
        elif abs(bend) <= rounding and step < most:
            least = step = min(step * FAR, most)
        else:
            last, step = step, -slope * step**2 / (2 * bend) if bend > 0 else most
            step = min(step, most) if before > 0 else step
            if step < least or last / 2 <= step <= 2 * last:
                break
    return step


def _rounding(dtype: torch.dtype) -> float:
    """Of what is computed with weights of a type, which is in float32 at least."""
    return min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def proposals(model: nn.Module, found: Sequence[Seedlings], probe: Probe) -> list[Candidate]:
    """The chosen neurons of every layer in one currency: the decrease predicted for each layer's together."""
    items = []
    for seedlings in found:
        moves = sized(model, [seedlings.layer], seedlings.sprouts(), probe)
        total, explained = sum(move.predicted_decrease for move in moves), seedlings.explained.tolist()
        for move, part in zip(moves, explained, strict=False):
            fall = total * part / sum(explained)
            items.append(Candidate(replace(move, predicted_decrease=fall)))
    return items
