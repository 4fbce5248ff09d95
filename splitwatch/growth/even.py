"""Every layer widened by the same ratio, whether that helps now or not: schedules want their neurons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from math import inf, isfinite

import torch
from torch import Tensor, nn

from splitwatch.geometry.measure import EQUAL, measure_geometry
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.cost import duplicates, limits, most_within, size_with
from splitwatch.growth.grow import widened
from splitwatch.growth.mixture import counted, holds_sprouts
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.promise import Promise, promises
from splitwatch.growth.pursuit import Seedlings, first_look, improve, lowest
from splitwatch.growth.refine import halves, refined
from splitwatch.growth.rounds import whole_rounds
from splitwatch.growth.search import NO_LAYER, OFFSETS, confirmed_plan, no_room, on_held_out, searched, stretch
from splitwatch.growth.splits import best_splits
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, Split, Sprout

PARTS = (0.25, 0.1)
"""Parts of the solved outgoing weights, the first of which that lowers the held-out loss is taken.

The whole step lowers the loss most at growth and ends worse: what it brings is fitted to the weights of the moment,
which training at a high rate leaves soon.
"""

SILENT = "new neurons have no outgoing weights yet: none pay on the held-out half"

IMPROVED = 8
"""Fewest candidates that are improved: in the middle of training twice as many gain nothing, and cost as much."""

GRAIN = 64
"""Where budgets do not allow the whole ratio, so many parts of what it adds are the choice."""


def plan_even(
    model: nn.Module,
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy,
    layers: tuple[HiddenLayer, ...],
) -> GrowthPlan:
    """New neurons by residual pursuit, with a part of their outgoing weights.

    Where the held-out half confirms no new neuron of a layer at a first look, they are left silent and nothing more is
    spent. Of the places that it confirms none for later on, half go to finite splits, where these pay. Layers that
    cannot hold new neurons split their neurons along the escape direction; where that does not pay on the held-out
    half, copies part by the smallest offset. ``geometry`` is measured for these where it is missing.
    """
    counts, ratio = _counts(model, probe, policy, layers)
    if not any(counts.values()):
        return GrowthPlan(layers, (), no_room(layers) if layers else NO_LAYER)
    room = policy.max_bytes
    able = {x: counts[x.name] for x in layers if counts[x.name] and holds_sprouts(x)}
    splits = [move for x in layers if x not in able for move in _splits(model, x, geometry, probe, counts, room)]
    plan = _parted(model, GrowthPlan(layers, tuple(splits), ""), probe)
    seen = first_look(model, able, probe, geometry, max_bytes=room, improved=IMPROVED)
    hopeful = {one.sprout.layer for one in _promised(model, seen, probe) if one.kept}
    found = [improve(model, probe, part, max_bytes=room) for part in seen if part.layer.name in hopeful]
    promised, before = _promised(model, found, probe), len(plan.moves)
    plan = refined(model, plan, halves(model, _halves(found, promised), probe, room), probe)
    filled = Counter(move.layer for move in plan.moves[before:])
    fallow = [move for part in seen if part.layer.name not in hopeful for move in part.fallow()]
    silent = [*fallow, *(move for part in found for move in part.repeats())]
    plan = _stepped(model, plan, *_beside(filled, promised, silent), probe)
    told = f"every layer by the ratio {ratio:g}: "
    return replace(plan, reason=told + "; ".join(part for part in (counted(plan), plan.reason) if part))


def _parted(model: nn.Module, splits: GrowthPlan, probe: Probe) -> GrowthPlan:
    """Splits at the offset of a line search, or the least where that does not pay on the held-out half, measured."""
    if not splits.moves:
        return splits
    found = searched(model, splits, probe)
    if paying := confirmed_plan(model, found, probe):
        return replace(paying, reason="")
    least = tuple(stretch(move, OFFSETS[0]) for move in splits.moves if isinstance(move, Split))
    predicted = sum(move.predicted_decrease for move in least)
    why = "no offset pays on the held-out half, so copies part by the least"
    parted = replace(found, moves=least, offset=OFFSETS[0], predicted_decrease=predicted, reason=why)
    return on_held_out(model, parted, probe)


def _promised(model: nn.Module, found: Sequence[Seedlings], probe: Probe) -> list[Promise]:
    """What all neurons found promise."""
    return promises(model, [part.layer for part in found], [move for part in found for move in part.sprouts()], probe)


def _halves(found: Sequence[Seedlings], promised: Sequence[Promise]) -> dict[HiddenLayer, int]:
    """Splits for half of the places that no new neuron is confirmed for, one for a neuron."""
    confirmed = Counter(one.sprout.layer for one in promised if one.kept)
    return {x.layer: min(x.layer.width, (x.wanted - confirmed[x.layer.name]) // 2) for x in found}


def _beside(
    filled: Mapping[str, int], promised: Sequence[Promise], silent: Sequence[Sprout]
) -> tuple[list[Promise], tuple[Sprout, ...]]:
    """The new neurons that stay where splits have filled places: the silent ones go first, then unconfirmed ones."""
    left, stay, rest = Counter(filled), [], []
    for move in reversed(silent):
        rest += [] if left[move.layer] > 0 else [move]
        left[move.layer] -= 1
    for one in reversed(promised):
        goes = not one.kept and left[one.sprout.layer] > 0
        left[one.sprout.layer] -= goes
        stay += [] if goes else [one]
    return stay[::-1], tuple(rest[::-1])


def _stepped(
    model: nn.Module, plan: GrowthPlan, promised: Sequence[Promise], rest: Sequence[Sprout], probe: Probe
) -> GrowthPlan:
    """A plan with new neurons added, at a part of their outgoing weights that pays on the held-out half, or silent."""
    kept = [one.sprout for one in promised if one.kept]
    silent = replace(plan, moves=(*plan.moves, *(one.at(0.0) for one in promised), *rest))
    if promised or rest:
        silent = replace(silent, reason="; ".join(why for why in (plan.reason, SILENT) if why))
    if not (kept or plan.moves):
        return silent
    before = {half: probe.loss(model, half) for half in ("fitted", "held_out")}
    step = lowest(model, plan.layers, kept, probe, before["fitted"])
    promised = [one.scaled(step) for one in promised]

    def at(part: float) -> GrowthPlan:
        return replace(plan, moves=(*plan.moves, *(one.at(part) for one in promised), *rest), step=part)

    def decrease(half: str, plan: GrowthPlan) -> float:
        with widened(model, plan):
            loss = probe.loss(model, half, finite=False)
        return before[half] - loss if isfinite(loss) else -inf

    tried = ((one, decrease("held_out", one)) for one in map(at, PARTS if step else ()))
    chosen, falls = next((x for x in tried if x[1] > plan.held_out_decrease), (silent, plan.held_out_decrease))
    if not (chosen.step or plan.moves):
        return silent
    predicted = sum(move.predicted_decrease for move in chosen.moves)
    fitted = decrease("fitted", chosen)
    return replace(chosen, predicted_decrease=predicted, fitted_decrease=fitted, held_out_decrease=falls)


def _counts(
    model: nn.Module, probe: Probe, policy: GrowthPolicy, layers: tuple[HiddenLayer, ...]
) -> tuple[dict[str, int], float]:
    """New neurons of every layer, and the ratio of widths: ``max_ratio``, or what the other budgets leave of it."""
    assert policy.max_ratio is not None
    more, limit = max(policy.max_ratio - 1, 0.0), limits(model, policy)
    bounded = min(astuple(limit)) < inf

    def counts(grains: int) -> dict[str, int]:
        return {x.name: x.groups * int(more * grains / GRAIN * x.width / x.groups + 0.5) for x in layers}

    def exceeds(grains: int) -> bool:
        moves = [move for x in layers for move in _duplicates(model, x, counts(grains)[x.name])]
        return limit.less(size_with(model, probe, policy, layers, moves)).overdrawn

    grains = most_within(GRAIN, exceeds) if bounded else GRAIN
    return counts(grains), 1 + more * grains / GRAIN


def _shares(width: int, count: int) -> list[int]:
    """How many copies the first, second, … neuron to be split becomes, so that ``count`` are new."""
    more, rest = divmod(count, width)
    return [1 + more + (i < rest) for i in range(width if more else rest)]


def _duplicates(model: nn.Module, layer: HiddenLayer, count: int) -> list[Split]:
    """So many new neurons, without offsets."""
    each = whole_rounds([layer], duplicates(model, layer, dict.fromkeys(range(layer.width), (0.5, 0.5))))
    shares = zip(each, _shares(layer.width, count), strict=False)
    return duplicates(model, layer, {move.neuron: [1 / k] * k for move, k in shares})


def _splits(
    model: nn.Module,
    layer: HiddenLayer,
    measured: Mapping[str, LayerGeometry],
    probe: Probe,
    counts: Mapping[str, int],
    max_bytes: int,
) -> list[Split]:
    """A layer's new neurons by splits at offset 1, of the neurons with most to gain first."""
    count = counts[layer.name]
    if not count:
        return []
    if layer.name not in measured:
        measured = measure_geometry(model, probe, [layer], max_bytes=max_bytes)
    geometry = measured[layer.name]
    best = [item.move for item in best_splits(model, layer, geometry, EQUAL, certified=False)]
    best.sort(key=lambda move: -move.predicted_decrease)
    incoming, outgoing = neuron_weights(model, layer)
    moves = []
    for move, k in zip(whole_rounds([layer], best), _shares(layer.width, count), strict=False):
        assert isinstance(move, Split)
        size = float(torch.cat([incoming[move.neuron], outgoing[move.neuron]]).norm())
        moves.append(move if k == 2 else _in_line(move, k, geometry, size))
    return moves


def _in_line(move: Split, k: int, geometry: LayerGeometry, size: float) -> Split:
    """Three or more equal copies side by side along the lowest curvature of the inner Hessian."""
    r, places = move.neuron, torch.linspace(-1, 1, k, dtype=torch.float64)
    u = geometry.min_vector[r].cpu()
    along: Tensor = torch.outer((places / places.norm()).to(u), u) * size
    value = float(geometry.min_eigenvalue[r]) / k
    return replace(
        move,
        coefficients=(1 / k,) * k,
        in_offset=along,
        out_offset=torch.zeros(k, move.out_offset.shape[1]).to(u),
        predicted_decrease=-0.5 * value * size**2,
        reason=f"curvature {value:+.2e} when {k} copies part in their incoming weights",
    )
