"""Choose moves: spectra and budget in, a plan out; the model is the same afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from splitwatch.growth.chooser import plan_chosen
from splitwatch.growth.even import plan_even
from splitwatch.growth.mixture import mix
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.preserve import plan_preserving
from splitwatch.growth.rounds import missing, rounds
from splitwatch.growth.search import confirmed_plan, no_room, searched, within_budget
from splitwatch.growth.splits import split_candidates, why_none
from splitwatch.growth.trial import tried
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, SplitWatchError


def plan_growth(
    model: nn.Module,
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy | None = None,
    *,
    layers: Sequence[HiddenLayer] | None = None,
) -> GrowthPlan:
    """Choose which neurons to split, into which coefficients, along which directions and how far, or which to add.

    What is chosen from is ``policy.moves``, see docs/how-to/policies.md. By "splits" every neuron proposes its best
    split by second order (predicted change ½ ε² λ_min of the escape operator); those that descend on the held-out half
    too compete for the budgets by predicted decrease per parameter, neuron or operation. One relative offset for all is
    found by line search on the fitted half and must pay on the held-out half. Signed coefficients cost later training,
    so "auto" turns to them only where equal ones let no neuron descend. By "mixed" a plan of sprouts
    (``growth.pursuit``) and one of half of each compete with the splits on the held-out half, within the same budgets.

    Args:
        model: the network, left as it was.
        geometry: what ``measure_geometry`` returned for it; "even" moves do without, ``{}``. Layers that can only be
            measured are left out, with the reason.
        probe: the batches the geometry was measured on.
        policy: budgets and coefficients.
        layers: what ``find_hidden_layers`` found, where that is at hand; it is found again otherwise.

    Returns:
        The plan; it is empty, with the reason, where growth would not help.

    Raises:
        SplitWatchError: the geometry names a layer that the model does not have or belongs to another width.
    """
    policy = policy or GrowthPolicy()
    given = find_hidden_layers(model, probe) if layers is None else layers
    even = policy.moves == "even"
    if not geometry and not even and policy.layers is None and any(layer.growable for layer in given):
        raise SplitWatchError(
            "geometry: required the measurements of some layers, found none; pass measure_geometry(model, probe), or "
            'plan with moves="even", which does without'
        )
    every = [*geometry] or None if even else [*geometry]
    names = every if policy.layers is None else policy.layers
    able = {layer.name for layer in given if layer.growable and (names is None or layer.name in names)}
    found = tried(model, given, probe, able)
    told = {*geometry, *able} if policy.layers is None else set()
    fixed = [layer for layer in found if layer.measurable and not layer.growable and layer.name in told]
    left_out = {layer.name for layer in fixed}
    layers = select_layers(found, None if names is None else [name for name in names if name not in left_out])
    measured = {layer.name: _of(geometry, layer) for layer in layers if not even or layer.name in geometry}
    plan = _planned(model, measured, probe, policy, layers)
    return replace(plan, reason="; left out: ".join([plan.reason, *map(str, fixed)]))


def _planned(
    model: nn.Module,
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy,
    layers: tuple[HiddenLayer, ...],
) -> GrowthPlan:
    """The plan for some layers by what the policy's moves are."""
    if policy.layers is not None and not policy.layers:
        return GrowthPlan(layers, (), "the policy names no layer that may grow")
    if policy.chooser:
        return plan_chosen(model, geometry, probe, policy, layers)
    if policy.moves == "preserve":
        return plan_preserving(model, geometry, probe, policy, layers)
    if policy.moves == "even":
        return plan_even(model, geometry, probe, policy, layers)
    plan = _splits(model, geometry, probe, policy, layers)
    if policy.moves in {"mixed", "sprouts"}:
        return mix(model, plan, geometry, probe, policy)
    return confirmed_plan(model, searched(model, plan, probe), probe) if plan else plan


def _splits(
    model: nn.Module,
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy,
    layers: tuple[HiddenLayer, ...],
) -> GrowthPlan:
    """The splits that descend and that the budgets allow, at offset 1."""
    candidates = split_candidates(model, layers, geometry, policy)
    confirmed = [item for item in candidates if item.confirmed]
    if not confirmed:
        return GrowthPlan(layers, (), why_none(candidates, policy.moves == "certified"))
    if not rounds(layers, [item.move for item in confirmed]):
        return GrowthPlan(layers, (), missing(layers, [item.move for item in confirmed]))
    moves = within_budget(model, layers, confirmed, probe, policy)
    return GrowthPlan(layers, moves, f"{len(moves)} of {len(candidates)} neurons split" if moves else no_room(layers))


def _of(geometry: Mapping[str, LayerGeometry], layer: HiddenLayer) -> LayerGeometry:
    measured = geometry.get(layer.name)
    if measured is None:
        raise SplitWatchError(
            f"geometry: required a measurement of layer {layer.name!r}, found only {sorted(geometry)}; measure it too"
        )
    if len(measured.min_eigenvalue) != layer.width:
        raise SplitWatchError(
            f"geometry: required {layer.width} neurons in {layer.name!r}, found {len(measured.min_eigenvalue)}; "
            "the model changed since it was measured, measure again"
        )
    return measured
