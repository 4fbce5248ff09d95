"""Splits, sprouts, or half of each: plans within the same budgets, among which the held-out half decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite, isnan

from torch import Tensor, nn

from splitwatch.growth.cost import fitting
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.pursuit import Seedlings, proposals, pursue, sized
from splitwatch.growth.search import NO_LAYER, NO_ROOM, held_out_gains, rejected, searched, within_budget
from splitwatch.probe import Probe
from splitwatch.ranks import paired_error
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, Move, Split, Sprout


def mix(
    model: nn.Module, splits: GrowthPlan, geometry: Mapping[str, LayerGeometry], probe: Probe, policy: GrowthPolicy
) -> GrowthPlan:
    """The plan of splits, or one with sprouts in it where that decreases the held-out loss more.

    Each may take the whole budget: that fewer neurons have a split that descends is no reason for fewer new ones.

    Args:
        model: the network, left as it was.
        splits: those that the budgets allow, not searched yet; none is one possibility.
        geometry: of the plan's layers.
        probe: sprouts are searched on its fitted half, plans compared on the other.
        policy: budgets; ``moves`` is "sprouts" or "mixed".

    Returns:
        The best plan, with the reason; it is empty where none pays.
    """
    layers = splits.layers
    budget = _bounded(layers, policy)
    found = _pursued(model, layers, geometry, probe, budget)
    items = proposals(model, found, probe)
    order = [move for move in within_budget(model, layers, items, probe, budget) if isinstance(move, Sprout)]
    half = len(splits.moves) // 2
    variants: dict[str, tuple[Move, ...]] = {"sprouts": _sprouts(model, found, order, probe)}
    if policy.moves == "mixed":
        room = max(0, (budget.max_neurons or 0) - sum(move.added for move in splits.moves[:half]))
        variants["splits"] = splits.moves
        beside = _sprouts(model, found, order[:room], probe) if half else ()
        variants["half and half"] = (*splits.moves[:half], *beside) if beside else ()
    plans = {
        name: searched(model, replace(splits, moves=fitting(model, probe, policy, layers, moves)), probe)
        for name, moves in variants.items()
        if moves
    }
    if plans:
        return _chosen(model, plans, probe)
    nothing = "growth would not help here: no new neuron is possible that explains a slope of the loss"
    if not layers:
        nothing = f"growth would not help here: {NO_LAYER}"
    elif not any(map(holds_sprouts, layers)):
        nothing = "growth would not help here: beside depthwise and grouped convolutions neurons can only be split"
    if items or policy.max_neurons == 0:
        nothing = NO_ROOM
    elif not splits.moves and policy.moves == "mixed":
        nothing = splits.reason
    return GrowthPlan(layers, (), nothing)


def _bounded(layers: Sequence[HiddenLayer], policy: GrowthPolicy) -> GrowthPolicy:
    """The policy's budgets, and at most as many new neurons as there are."""
    width = sum(layer.width for layer in layers)
    return replace(policy, max_neurons=width if policy.max_neurons is None else min(width, policy.max_neurons))


def _pursued(
    model: nn.Module,
    layers: Sequence[HiddenLayer],
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy,
) -> list[Seedlings]:
    """New neurons for every layer that can hold some, at most as many as it has."""
    most = policy.max_neurons or 0
    counts = {layer: min(layer.width, most) for layer in layers if most and holds_sprouts(layer)}
    return pursue(model, counts, probe, geometry, max_bytes=policy.max_bytes)


def holds_sprouts(layer: HiddenLayer) -> bool:
    """Whether a layer can hold new neurons; a depthwise convolution would need a kernel for each, groups a place."""
    return layer.groups == 1 and not layer.depthwise


def _sprouts(model: nn.Module, found: Sequence[Seedlings], order: Sequence[Sprout], probe: Probe) -> tuple[Sprout, ...]:
    """The sprouts of a selection with their outgoing weights solved for jointly."""
    counts = Counter(move.layer for move in order)
    return solved(model, [seedlings.first(counts[seedlings.layer.name]) for seedlings in found], probe)


def solved(model: nn.Module, chosen: Sequence[Seedlings], probe: Probe) -> tuple[Sprout, ...]:
    """New neurons of several layers, with a step of their outgoing weights for all of them."""
    parts = [sized(model, [part.layer], part.sprouts(), probe) for part in chosen]
    moves = [move for part in parts for move in part]
    several = sum(map(bool, parts)) > 1
    return sized(model, [part.layer for part in chosen], moves, probe) if several else tuple(moves)


def _chosen(model: nn.Module, plans: Mapping[str, GrowthPlan], probe: Probe) -> GrowthPlan:
    """The plan that decreases the held-out loss most."""
    means, gains, weights = held_out_gains(model, plans, probe, GrowthPlan((), (), ""))
    means = {name: mean if plans[name].fitted_decrease > 0 else 0.0 for name, mean in means.items()}
    best = max(means, key=lambda name: means[name] if isfinite(means[name]) else -inf)
    plan = plans[best]
    told = ", ".join(f"{name} {means[name]:.2e}{_error(gains, weights, name, best)}" for name in plans)
    if not means[best] > 0:
        return rejected(plan, f"growth would not help here: no plan decreases the loss on the held-out half ({told})")
    reason = f"{best}: {counted(plan)}; held-out decrease of {told}"
    return replace(plan, reason=reason, held_out_decrease=means[best])


def _error(gains: Mapping[str, Tensor], weights: Tensor, name: str, best: str) -> str:
    """The standard error of a plan's difference to the best one, over parts of the held-out half."""
    error = float("nan") if name == best else paired_error(gains[best] - gains[name], weights)
    return "" if isnan(error) else f" (± {error:.0e})"


def counted(plan: GrowthPlan) -> str:
    """How many moves of each kind."""
    kinds = Counter("split" if isinstance(move, Split) else "sprout" for move in plan.moves)
    return " and ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(kinds.items()))
