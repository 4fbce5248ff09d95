"""Choose moves: spectra and budget in, a plan out; the model is the same afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from splitwatch.geometry.measure import EQUAL
from splitwatch.geometry.plateau import splitting_modes
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.mixture import mix
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.search import NO_ROOM, Candidate, confirmed_plan, searched, stretch, within_budget
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.probe import Probe
from splitwatch.ranks import rank_count
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, Split, SplitWatchError


def plan_growth(
    model: nn.Module,
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy | None = None,
    *,
    layers: Sequence[HiddenLayer] | None = None,
) -> GrowthPlan:
    """Choose which neurons to split, into which coefficients, along which directions and how far, or which to add.

    Every neuron proposes its best split by second order (predicted change ½ ε² λ_min of the escape operator); those
    that descend on the held-out half too compete for the budget by predicted decrease per parameter. One relative
    offset for all is found by line search on the fitted half and must pay on the held-out half. Signed coefficients
    cost later training, so "auto" turns to them only where equal ones let no neuron descend. With ``policy.moves``
    "mixed" a plan of as many sprouts (``growth.pursuit``) and one of half of each compete with the splits on the
    held-out half.

    Args:
        model: the network, left as it was.
        geometry: what ``measure_geometry`` returned for it.
        probe: the batches the geometry was measured on.
        policy: budgets and coefficients.
        layers: what ``find_hidden_layers`` found, where that is at hand; it is found again otherwise.

    Returns:
        The plan; it is empty, with the reason, where growth would not help.

    Raises:
        SplitWatchError: the geometry names a layer that the model does not have or belongs to another width.
    """
    policy = policy or GrowthPolicy()
    found = find_hidden_layers(model, probe) if layers is None else layers
    layers = select_layers(found, list(policy.layers or geometry))
    measured = [(layer, _of(geometry, layer), *neuron_weights(model, layer)) for layer in layers]
    candidates: list[Candidate] = []
    confirmed: list[Candidate] = []
    for coefficients in _preferences(policy):
        candidates = [item for layer in measured for item in _candidates(*layer, coefficients)]
        confirmed = [item for item in candidates if item.confirmed]
        if confirmed:
            break
    moves = within_budget(model, layers, confirmed, policy)
    reason = f"{len(moves)} of {len(candidates)} neurons split" if confirmed else _why_none(candidates)
    plan = GrowthPlan(layers, moves, reason)
    if policy.moves != "splits" and rank_count() == 1:
        return mix(model, plan, geometry, probe, policy)
    if not confirmed:
        return plan
    return confirmed_plan(model, searched(model, plan, probe), probe) if moves else replace(plan, reason=NO_ROOM)


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


def _preferences(policy: GrowthPolicy) -> tuple[tuple[float, ...], ...]:
    """The coefficients to try, the next ones only where the ones before let no neuron descend."""
    signed = ((1 + policy.cap) / 2, (1 - policy.cap) / 2)
    named = {"auto": (EQUAL, signed), "equal": (EQUAL,), "signed": (signed,)}
    if isinstance(policy.coefficients, str):
        return named[policy.coefficients]
    return (tuple(float(value) for value in policy.coefficients),)


def _candidates(
    layer: HiddenLayer, geometry: LayerGeometry, incoming: Tensor, outgoing: Tensor, coefficients: tuple[float, ...]
) -> list[Candidate]:
    """The best split of every neuron into given coefficients."""
    scale = torch.cat([incoming, outgoing], dim=1).norm(dim=1)
    scale = torch.where(scale > 0, scale, scale.mean())
    cost = (incoming.shape[1] + outgoing.shape[1]) * (len(coefficients) - 1)
    directions = _directions(geometry, coefficients)
    found = []
    for r in range(layer.width):
        best = min(directions, key=lambda direction: (not direction.descends[r], float(direction.value[r])))
        u, v = best.u[r].cpu(), best.v[r].cpu()
        move = Split(
            layer.name,
            r,
            coefficients,
            torch.outer(best.in_pattern.to(u), u),
            torch.outer(best.out_pattern.to(v), v),
            predicted_decrease=-0.5 * float(best.value[r]),
            reason=_why(coefficients, float(best.value[r]), v),
        )
        found.append(Candidate(stretch(move, float(scale[r])), cost, bool(best.descends[r])))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Direction:
    """One way in which the copies of every neuron can part: ε along it changes the loss by ½ ε² ``value``."""

    value: Tensor
    u: Tensor
    v: Tensor
    in_pattern: Tensor
    out_pattern: Tensor
    descends: Tensor


def _directions(geometry: LayerGeometry, coefficients: tuple[float, ...]) -> list[_Direction]:
    modes, found = splitting_modes(coefficients), []
    still = torch.zeros_like(geometry.escape_out)
    scale = torch.stack([geometry.min_eigenvalue.abs(), geometry.max_eigenvalue.abs(), geometry.coupling_norm]).amax(0)
    rounding = 1e3 * torch.finfo(scale.dtype).eps * scale
    for kappa, pattern in zip(modes.curvature.tolist(), modes.in_pattern, strict=True):
        low = kappa > 0
        value = kappa * (geometry.min_eigenvalue if low else geometry.max_eigenvalue)
        held_out = kappa * (geometry.interval if low else geometry.max_interval).mean(1)
        descends = (value < -rounding) & (held_out < 0)
        vector = geometry.min_vector if low else geometry.max_vector
        found.append(_Direction(value, vector, still, pattern, torch.zeros_like(pattern), descends))
    if coefficients == EQUAL:
        value, held_out = geometry.escape_eigenvalue, geometry.escape_interval.mean(1)
        patterns = modes.in_pattern[0], modes.out_pattern[0]
        descends = (value < -rounding) & (held_out < 0)
        found.append(_Direction(value, geometry.escape_in, geometry.escape_out, *patterns, descends))
    return found


def _why(coefficients: tuple[float, ...], value: float, v: Tensor) -> str:
    through = "incoming and outgoing weights" if bool(v.abs().max() > 0) else "incoming weights"
    signs = "signed copies" if min(coefficients) < 0 else "copies"
    return f"curvature {value:+.2e} when {signs} part in their {through}"


def _why_none(candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "growth would not help here: no hidden layer can be widened"
    descending = sum(item.move.predicted_decrease > 0 for item in candidates)
    if descending:
        return (
            f"growth would not help here: {descending} of {len(candidates)} neurons descend on the fitted half, "
            "none does beyond rounding and on the held-out half; a larger probe may decide"
        )
    return "growth would not help here: no neuron has a direction in which its copies could descend"
