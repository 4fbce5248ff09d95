"""Residual pursuit: new neurons whose features explain most of what the loss still wants from a layer.

Candidates are scored by ‖g‖²/‖φ⊥‖² on one batch, the best are improved by stochastic gradient ascent, as training
would, then put in order, each against what those before it leave (orthogonal matching pursuit, Pati, Rezaiifar &
Krishnaprasad 1993), on all batches. Their outgoing weights V minimise g·V + ½ VᵀQV with the new features' Gram matrix Q
and a ridge; the loss's exact second derivative along V, with what V changes in the existing weights, sets the length.
The whole costs some tens of training steps.

Related: GradMax (Evci et al. 2022) and TINY (Verbockhaven et al. 2024) choose new neurons by the same residual, from
what is linear in the layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from splitwatch.geometry.narrow import LossCurvature
from splitwatch.geometry.response import GRAPH
from splitwatch.growth.grow import widened
from splitwatch.growth.search import Candidate, scale
from splitwatch.growth.seedbed import RIDGE, SEEN, THRESHOLD, Measured, Reader, Seedbed
from splitwatch.precision import full_precision
from splitwatch.probe import Probe
from splitwatch.ranks import largest_over_ranks
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, Sprout

POOL, MOST = 2, 512
"""Candidates tried in a layer, relative to the neurons wanted, and the most beyond them; more gained nothing."""
LEAST, KEPT = 32, 16
"""Fewest candidates, and fewest of them that are improved: where few neurons are wanted there has to be a choice."""
REACHES = (0.3, 1.0)
"""Finite steps along split directions among the candidates, relative to the norm of the incoming weights."""
MORE = 1.15
"""How much more candidates of twice the spread have to explain to be taken instead.

In staged training 1.05 makes teachers' students worse, 1.25 gains less where steeper neurons are wanted. Four times as
steep ones gain little more, and where features grow with their weights (SiLU) training with SGD can diverge.
"""
ASCENT, RATE = 5, 0.1
"""Steps of gradient ascent, and how far the first goes relative to the norm of the incoming weights.

The rate falls to zero, so that the last batches do not decide. In staged training 4 and 10 steps lower the loss at
growth by about as much and end alike; none lowers it by less.
"""


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
        w = candidates(bed, geometry, seed)
        w = w[bed.measure(w, pairs=False).scores.argsort(descending=True, stable=True)[: max(wanted, improved)]]
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


def candidates(bed: Seedbed, geometry: LayerGeometry | None, seed: int) -> Tensor:
    """Incoming weights (k, d): finite steps along the lowest split directions (up to half of k), the rest random.

    Random ones spread their pre-activations as the existing neurons do, or more widely, around a random sample's.
    """
    steps = bed.incoming[:0]
    if geometry is not None:
        lowest = geometry.min_eigenvalue.argsort()[: bed.count // (4 * len(REACHES))]
        old, along = bed.incoming[lowest], geometry.min_vector[lowest].to(bed.incoming)
        sizes = [sign * reach for reach in REACHES for sign in (1, -1)]
        steps = torch.cat([old + size * old.norm(dim=1, keepdim=True) * along for size in sizes])
    k, generator = bed.count - len(steps), torch.Generator().manual_seed(seed)
    w = torch.randn(k, bed.d, generator=generator, dtype=torch.float64).to(bed.incoming)
    where = torch.rand(k, generator=generator, dtype=torch.float64)
    return torch.cat([steps, widely(bed, bed.fitted_to_data(w, where))])


def widely(bed: Seedbed, w: Tensor) -> Tensor:
    """Incoming weights (k, d), doubled if their features then explain clearly more of what the loss wants.

    Where existing neurons are still in the linear part of their activations, features like theirs add little to them.
    """
    if bed.scales():  # then all explain the same
        return w
    some = w[:KEPT]
    one, two = (select(bed.measure(factor * some), len(some))[1].sum() for factor in (1, 2))
    return 2 * w if two > MORE * one else w


def ascend(bed: Seedbed, w: Tensor) -> Tensor:
    """Incoming weights after stochastic gradient ascent on log ‖g‖²/(‖φ⊥‖² + ridge) or ‖g‖²/‖φ‖², (k', d)."""
    size = w.norm(dim=1, keepdim=True) / w.shape[1] ** 0.5
    place = torch.nn.Parameter(w / torch.where(size > 0, size, 1))
    optimizer = torch.optim.Adam([place], lr=RATE)
    for step in range(ASCENT):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / ASCENT)
        place.grad = -(bed.at(step).slope(place.detach() * size) * size).nan_to_num(0, 0, 0)
        optimizer.step()
    return place.detach() * size


def select(measured: Measured, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the neurons that together explain most, one after the other, and what each adds, both (n,).

    A pivoted Cholesky factorisation of φ⊥ᵀφ⊥ that carries g along; neurons of which the ones before leave less than
    ``THRESHOLD`` are not chosen.
    """
    gain, left = measured.gain.clone(), measured.left.clone()
    chosen, explained = [], []
    open_, least = torch.ones(len(gain), dtype=torch.bool, device=gain.device), THRESHOLD * measured.norm
    for _ in range(min(count, len(gain))):
        rest = left.diagonal()
        open_ &= rest > least
        scores = torch.where(open_, gain.square().sum(1) / rest, 0)
        i = int(scores.argmax())
        if not scores[i] > 0:
            break
        chosen.append(i)
        explained.append(scores[i])
        column = left[:, i] / left[i, i]
        gain, left = gain - torch.outer(column, gain[i]), left - torch.outer(column, left[i])
        open_[i] = False
    index = torch.tensor(chosen, dtype=torch.long, device=gain.device)
    return index, torch.stack(explained) if explained else gain.new_zeros(0)


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
    return parameters_to_vector(p.detach() for p in model.parameters() if p.requires_grad)


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
