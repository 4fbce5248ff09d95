"""Every layer widened by the same ratio, whether that helps now or not: schedules want their neurons."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from splitwatch.geometry.measure import EQUAL
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.cost import duplicate, limits, size_with
from splitwatch.growth.mixture import counted, holds_sprouts, solved
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.pursuit import Seedlings, pursue
from splitwatch.growth.search import NO_ROOM, OFFSETS, confirmed_plan, scale, searched, stretch, weighed
from splitwatch.growth.splits import best_splits
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, Split

SILENT = "silent: outgoing weights of zero"

GRAIN = 64
"""Where budgets do not allow the whole ratio, so many parts of what it adds are the choice."""


def plan_even(
    model: nn.Module,
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy,
    layers: tuple[HiddenLayer, ...],
) -> GrowthPlan:
    """Half splits along the escape direction, half new neurons, at the offset and step of a line search.

    Where new neurons do not pay on the held-out half they begin with outgoing weights of zero; where splits do not
    either, copies part by the smallest offset only, and the function is kept but for that.
    """
    counts, ratio = _counts(model, probe, policy, layers)
    if not any(counts.values()):
        return GrowthPlan(layers, (), NO_ROOM)
    found = [_new(model, layer, probe, policy, geometry, counts[layer.name] // 2) for layer in layers]
    silent = [scale(move, 0.0) for part in found if part for move in part.sprouts()]
    sprouts = solved(model, [part for part in found if part], probe)
    sprouts = sprouts if len(sprouts) == len(silent) else tuple(silent)
    splits: list[Split] = []
    for layer in layers:
        count = counts[layer.name] - sum(move.layer == layer.name for move in sprouts)
        splits += _splits(model, layer, geometry[layer.name], count)
    stills = tuple(replace(move, predicted_decrease=0.0, reason=SILENT) for move in silent)
    start = GrowthPlan(layers, (*splits, *sprouts), "")
    told = f"every layer by the ratio {ratio:g}: {counted(start)}"
    if paying := confirmed_plan(model, searched(model, start, probe), probe):
        return replace(paying, reason=told)
    parted = searched(model, replace(start, moves=tuple(splits)), probe)
    if paying := confirmed_plan(model, replace(parted, moves=parted.moves + stills), probe):
        return replace(paying, reason=f"{told}; new neurons do not pay on the held-out half yet, so they are silent")
    least = (*(stretch(move, OFFSETS[0]) for move in splits), *stills)
    why = "no size of the moves pays on the held-out half, so copies part by the least and new neurons are silent"
    predicted = sum(move.predicted_decrease for move in least)
    last = replace(parted, moves=least, offset=OFFSETS[0], predicted_decrease=predicted, reason=f"{told}; {why}")
    return weighed(model, last, probe)


def _counts(
    model: nn.Module, probe: Probe, policy: GrowthPolicy, layers: tuple[HiddenLayer, ...]
) -> tuple[dict[str, int], float]:
    """New neurons of every layer, and the ratio of widths: ``max_ratio``, or what the other budgets leave of it."""
    assert policy.max_ratio is not None
    more, limit = max(policy.max_ratio - 1, 0.0), limits(model, policy)

    def counts(grains: int) -> dict[str, int]:
        return {layer.name: int(more * grains / GRAIN * layer.width + 0.5) for layer in layers}

    def exceeds(grains: int) -> bool:
        moves = [move for x in layers for move in _duplicates(model, x, counts(grains)[x.name])]
        return limit.less(size_with(model, probe, policy, layers, moves)).overdrawn

    grains = GRAIN if not exceeds(GRAIN) else bisect_right(range(1, GRAIN), False, key=exceeds)
    return counts(grains), 1 + more * grains / GRAIN


def _new(
    model: nn.Module,
    layer: HiddenLayer,
    probe: Probe,
    policy: GrowthPolicy,
    geometry: Mapping[str, LayerGeometry],
    wanted: int,
) -> Seedlings | None:
    if not wanted or not holds_sprouts(layer):
        return None
    return pursue(model, layer, probe, wanted, geometry[layer.name], max_bytes=policy.max_bytes)


def _shares(width: int, count: int) -> list[int]:
    """How many copies the first, second, … neuron to be split becomes, so that ``count`` are new."""
    more, rest = divmod(count, width)
    return [1 + more + (i < rest) for i in range(width if more else rest)]


def _duplicates(model: nn.Module, layer: HiddenLayer, count: int) -> list[Split]:
    """So many new neurons, without offsets."""
    return [duplicate(model, layer, r, [1 / k] * k) for r, k in enumerate(_shares(layer.width, count))]


def _splits(model: nn.Module, layer: HiddenLayer, geometry: LayerGeometry, count: int) -> list[Split]:
    """So many new neurons by splits at offset 1, of the neurons with most to gain first."""
    best = [item.move for item in best_splits(model, layer, geometry, EQUAL, certified=False)]
    best.sort(key=lambda move: -move.predicted_decrease)
    incoming, outgoing = neuron_weights(model, layer)
    moves = []
    for move, k in zip(best, _shares(layer.width, count), strict=False):
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
