"""Choose moves: spectra and budget in, a plan out; the model is the same afterwards."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from splitwatch.geometry.measure import EQUAL
from splitwatch.geometry.plateau import splitting_modes
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.grow import count_parameters, widened
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, Split, SplitWatchError

OFFSETS = tuple(2.0**power for power in range(-9, 2))
"""Offsets tried in the line search, relative to the norm of a neuron's weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A split at offset 1 (the neuron's own weight norm), its second-order decrease there, its cost in parameters.

    ``confirmed`` says whether it descends on the fitted half beyond rounding, and on the held-out half too.
    """

    move: Split
    cost: int
    confirmed: bool

    @property
    def score(self) -> float:
        """Predicted decrease per parameter."""
        return self.move.predicted_decrease / self.cost


def plan_growth(
    model: nn.Module,
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy | None = None,
    *,
    layers: Sequence[HiddenLayer] | None = None,
) -> GrowthPlan:
    """Choose which neurons to split, into which coefficients, along which directions and how far.

    Every neuron proposes its best split by second order (predicted change ½ ε² λ_min of the escape operator); those
    that descend on the held-out half too compete for the budget by predicted decrease per parameter. One relative
    offset for all is found by line search on the fitted half and must pay on the held-out half. Signed coefficients
    cost later training, so "auto" turns to them only where equal ones let no neuron descend.

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
    if not confirmed:
        return GrowthPlan(layers, (), _why_none(candidates))
    moves = _within_budget(model, layers, confirmed, policy)
    if not moves:
        return GrowthPlan(layers, (), "the budget allows no new neuron")
    plan = GrowthPlan(layers, moves, f"{len(moves)} of {len(candidates)} neurons split")
    return _with_offset(model, plan, probe)


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


def stretch(move: Split, factor: float) -> Split:
    """A split with its offsets times a factor and its second-order decrease times the square."""
    return replace(
        move,
        in_offset=move.in_offset * factor,
        out_offset=move.out_offset * factor,
        predicted_decrease=move.predicted_decrease * factor**2,
    )


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


def _within_budget(
    model: nn.Module, layers: tuple[HiddenLayer, ...], candidates: Sequence[Candidate], policy: GrowthPolicy
) -> tuple[Split, ...]:
    """The best candidates that the budgets allow, by predicted decrease per parameter."""
    parameters = count_parameters(model)
    limits = [policy.max_parameters, None if policy.max_ratio is None else policy.max_ratio * parameters]
    limit = min((limit for limit in limits if limit is not None), default=float("inf"))
    room, neurons = limit - parameters, float("inf") if policy.max_neurons is None else policy.max_neurons
    chosen: list[Split] = []
    for item in sorted(candidates, key=lambda item: -item.score):
        if item.cost <= room and item.move.added <= neurons:
            chosen.append(item.move)
            room, neurons = room - item.cost, neurons - item.move.added

    def exceeds(count: int) -> bool:
        """Whether the first moves are too many: neighbours that grow together cost more than each alone."""
        with widened(model, GrowthPlan(layers, tuple(chosen[:count]), "")):
            return count_parameters(model) > limit

    allowed = bisect_left(range(1, len(chosen) + 1), True, key=exceeds)
    return tuple(chosen[:allowed])


def _with_offset(model: nn.Module, plan: GrowthPlan, probe: Probe) -> GrowthPlan:
    """The plan at the offset that decreases the fitted loss most, or an empty one where none pays."""
    start = probe.loss(model, "fitted")
    signs = (1.0, -1.0) if any(_sign_matters(move) for move in plan.moves) else (1.0,)
    tried = []
    for offset in (sign * size for size in OFFSETS for sign in signs):
        with widened(model, _at(plan, offset)):
            tried.append((offset, start - probe.loss(model, "fitted", finite=False)))
    offset, fitted = max(tried, key=lambda item: item[1])
    found = replace(plan, line_search=tuple(tried))
    if not fitted > 0:
        return replace(found, moves=(), reason="growth would not help here: no offset decreases the loss")
    chosen = _at(found, offset)
    with widened(model, chosen):
        after = probe.loss(model, "held_out", finite=False)
    held_out = probe.loss(model, "held_out") - after
    if not held_out > 0:
        reason = "growth would not help here: the decrease on the fitted half does not survive on the held-out half"
        return replace(found, moves=(), reason=reason)
    return replace(chosen, fitted_decrease=fitted, held_out_decrease=held_out)


def _sign_matters(move: object) -> bool:
    """Exchanging two equal copies reverses their offsets; with other coefficients the third order differs."""
    return isinstance(move, Split) and len(set(move.coefficients)) > 1


def _at(plan: GrowthPlan, offset: float) -> GrowthPlan:
    moves = tuple(stretch(move, offset) for move in plan.moves if isinstance(move, Split))
    predicted = sum(move.predicted_decrease for move in moves)
    return replace(plan, moves=moves, offset=offset, predicted_decrease=predicted)
