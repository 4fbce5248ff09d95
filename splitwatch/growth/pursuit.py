"""Residual pursuit: new neurons whose features explain most of what the loss still wants from a layer.

The outgoing weights V of those that are chosen (``candidates``) minimise g·V + ½ VᵀQV with the new features' Gram
matrix Q and a ridge; the loss's exact second derivative along V, with what V changes in the existing weights, sets the
length. The whole costs some tens of training steps.

Related: GradMax (Evci et al. 2022) and TINY (Verbockhaven et al. 2024) choose new neurons by the same residual, from
what is linear in the layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from splitwatch.anatomy import flat
from splitwatch.geometry.narrow import LossCurvature
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


@dataclass(frozen=True, slots=True, eq=False)
class Seedlings:
    """Chosen neurons of one layer, best first: incoming weights (n, d), and what was measured of them.

    ``explained`` (n,) is what each adds to ‖g‖²/‖φ⊥‖²; ``readers`` are the layer's consumers, ``repeats`` (n', d)
    neurons that the chosen ones and the layer leave nothing new of.
    """

    layer: HiddenLayer
    readers: tuple[Reader, ...]
    incoming: Tensor
    measured: Measured
    explained: Tensor
    repeats: Tensor

    def first(self, count: int) -> Seedlings:
        """The best of them."""
        at = torch.arange(min(count, len(self.incoming)), device=self.incoming.device)
        some = {"incoming": self.incoming[at], "measured": self.measured.of(at), "explained": self.explained[at]}
        return replace(self, **some)

    def silent(self) -> tuple[Sprout, ...]:
        """Those that were not chosen, without outgoing weights, for who needs the whole number."""
        still, why = torch.zeros(self.measured.gain.shape[1]), "silent: nothing new to the layer yet"
        return tuple(Sprout(self.layer.name, w, still.to(w), 0.0, why) for w in self.repeats.cpu())

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
    layer: HiddenLayer,
    probe: Probe,
    wanted: int,
    geometry: LayerGeometry | None = None,
    *,
    max_bytes: int,
    improved: int = KEPT,
    seed: int = 0,
) -> Seedlings:
    """Search a layer for new neurons; the model and the process's RNG stay as they are.

    Args:
        model: the network.
        layer: one of its hidden layers.
        probe: searched on its fitted half.
        wanted: at most so many; fewer where features repeat.
        geometry: of the layer; finite steps along its split directions are candidates too.
        max_bytes: what may be kept in memory, and once more for the graph of one batch.
        improved: so many candidates, or as many as are wanted.
        seed: of the random candidates.

    Returns:
        The neurons, best first.

    Raises:
        UnsupportedLayerError: the layer cannot hold new neurons.
    """
    count = max(wanted, min(max(LEAST, POOL * wanted), MOST, max(1, _room(model, layer, probe, max_bytes))))
    with full_precision():
        bed = Seedbed(model, layer, probe, count, max_bytes, rows=SEEN)
        w = best(bed, candidates(bed, geometry, seed), max(wanted, improved))
        bed = Seedbed(model, layer, probe, len(w), max_bytes)
        w = ascend(bed, w)
        kept, explained = select(found := bed.measure(w), wanted)
        others = torch.ones(len(w), dtype=torch.bool, device=w.device)
        others[kept] = False
    return Seedlings(layer, bed.readers, w[kept], found.of(kept), explained, w[others][: wanted - len(kept)])


def _room(model: nn.Module, layer: HiddenLayer, probe: Probe, max_bytes: int) -> int:
    """How many candidates the graph of one batch may hold."""
    trace = next(iter(probe.traces(model, [layer], "fitted")))[layer.name]
    ends = [*trace.pre_activations(), *(consumer.input for consumer in trace.consumers)]
    return -int(largest_over_ranks(layer.width - max_bytes * layer.width // (GRAPH * sum(x.nbytes for x in ends))))


def sized(model: nn.Module, layers: Sequence[HiddenLayer], moves: Sequence[Sprout], probe: Probe) -> tuple[Sprout, ...]:
    """Sprouts at the ``lowest`` point; predictions are each one's share, −½ g·v, none where nothing descends."""
    step = lowest(model, layers, moves, probe)
    return tuple(
        replace(
            scale(move, step),
            predicted_decrease=(fall := move.predicted_decrease * step),
            reason=f"slope {-2 * fall:+.2e} along its outgoing weights, feature new to the layer",
        )
        for move in moves
        if step
    )


def lowest(model: nn.Module, layers: Sequence[HiddenLayer], moves: Sequence[Sprout], probe: Probe) -> float:
    """The step to the lowest point of the loss's parabola along sprouts' joint outgoing weights.

    L(t) = L + t gᵀd + ½ t² dᵀHd on the fitted half. Where it has no lowest point (dᵀHd ≤ 0), or one lower than zero
    for a loss that is positive, the step is bounded by a predicted decrease of |L|. Zero where the loss does not fall.
    """
    slope = -2 * sum(move.predicted_decrease for move in moves)
    if not moves or not slope < 0:
        return 0.0
    plan = GrowthPlan(tuple(layers), tuple(moves), "")
    bound, curvature = abs(probe.loss(model, "fitted")), _curvature(model, plan, probe)
    step = 2 * bound / -slope
    return min(step, -slope / curvature) if curvature > 0 else step


def _curvature(model: nn.Module, plan: GrowthPlan, probe: Probe) -> float:
    """Second derivative of the fitted loss along what a plan's sprouts change; zero where autograd knows none."""
    with widened(model, plan), full_precision(model):
        wide = _trainable(model)
    with widened(model, plan, offsets=False), full_precision(model):
        direction = wide - _trainable(model)
        try:
            product = LossCurvature(model, probe).product(direction[None].double(), "fitted")[0]
        except RuntimeError as error:
            if "differentiated only once" not in str(error) and "derivative" not in str(error):
                raise
            return 0.0
        return float(direction.double() @ product)


def _trainable(model: nn.Module) -> Tensor:
    return flat(p.detach() for p in model.parameters() if p.requires_grad)


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
