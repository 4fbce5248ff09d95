"""Every neuron's best split by second order, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitwatch.geometry.measure import EQUAL
from splitwatch.geometry.plateau import classify_split, splitting_modes
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.search import NO_LAYER, Candidate, stretch
from splitwatch.records import HiddenLayer, LayerGeometry, PlateauVerdict, Split


def preferences(policy: GrowthPolicy) -> tuple[tuple[float, ...], ...]:
    """The coefficients to try, the next ones only where the ones before let no neuron descend."""
    signed = ((1 + policy.cap) / 2, (1 - policy.cap) / 2)
    named = {"auto": (EQUAL, signed), "equal": (EQUAL,), "signed": (signed,)}
    if isinstance(policy.coefficients, str):
        return named[policy.coefficients]
    given = [float(value) for value in policy.coefficients]
    return (tuple(value / sum(given) for value in given),)  # they may come from float32


def split_candidates(
    model: nn.Module, layers: Sequence[HiddenLayer], geometry: Mapping[str, LayerGeometry], policy: GrowthPolicy
) -> list[Candidate]:
    """The best split of every neuron, with the first of the preferred coefficients that let one descend.

    Where none surely does, with those by which most would on the fitted half.
    """
    tried: list[list[Candidate]] = []
    for coefficients in preferences(policy):
        found = [
            item
            for layer in layers
            for item in best_splits(model, layer, geometry[layer.name], coefficients, policy.moves == "certified")
        ]
        if any(item.confirmed for item in found):
            return found
        tried.append(found)
    return max(tried, key=descending)


def descending(candidates: Sequence[Candidate]) -> int:
    """How many descend on the fitted half."""
    return sum(item.move.predicted_decrease > 0 for item in candidates)


def best_splits(
    model: nn.Module, layer: HiddenLayer, geometry: LayerGeometry, coefficients: tuple[float, ...], certified: bool
) -> list[Candidate]:
    """The best split of every neuron into given coefficients, at offset 1; ``certified`` as for ``_directions``."""
    incoming, outgoing = neuron_weights(model, layer)
    scale = torch.cat([incoming, outgoing], dim=1).norm(dim=1)
    scale = torch.where(scale > 0, scale, scale.mean())
    directions = _directions(geometry, coefficients, certified)
    found = []
    for r in range(layer.width):
        best = min(directions, key=lambda direction: (not direction.descends[r], float(direction.value[r])))
        u, v = best.u[r].cpu(), best.v[r].cpu()
        reason, sure = _why(coefficients, float(best.value[r]), v), bool(best.descends[r])
        if certified and sure:
            verdict = _verdict(geometry, r, coefficients, v)
            reason, sure = f"{reason}; {verdict}", verdict.kind == "strict_saddle"
        move = Split(
            layer.name,
            r,
            coefficients,
            torch.outer(best.in_pattern.to(u), u),
            torch.outer(best.out_pattern.to(v), v),
            predicted_decrease=-0.5 * float(best.value[r]),
            reason=reason,
        )
        found.append(Candidate(stretch(move, float(scale[r])), sure))
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


def _directions(geometry: LayerGeometry, coefficients: tuple[float, ...], certified: bool) -> list[_Direction]:
    """The ways in which copies part; those that descend do so on both halves.

    Certified are those that descend on the fitted half by more than the eigenvalue's residual, and on the held-out
    half up to the confidence bound of the quotient; for the others the held-out mean is enough.
    """
    modes, found = splitting_modes(coefficients), []
    still = torch.zeros_like(geometry.escape_out)
    scale = torch.stack([geometry.min_eigenvalue.abs(), geometry.max_eigenvalue.abs(), geometry.coupling_norm]).amax(0)
    rounding = 1e3 * torch.finfo(scale.dtype).eps * scale

    def descends(value: Tensor, bounds: Tensor, residual: Tensor) -> Tensor:
        if certified:
            return (value + residual < -rounding) & (bounds.amax(1) < 0)
        return (value < -rounding) & (bounds.mean(1) < 0)

    for kappa, pattern in zip(modes.curvature.tolist(), modes.in_pattern, strict=True):
        low = kappa > 0
        value = kappa * (geometry.min_eigenvalue if low else geometry.max_eigenvalue)
        bounds = kappa * (geometry.interval if low else geometry.max_interval)
        sure = descends(value, bounds, abs(kappa) * geometry.residual[:, 0 if low else 1])
        vector = geometry.min_vector if low else geometry.max_vector
        found.append(_Direction(value, vector, still, pattern, torch.zeros_like(pattern), sure))
    if coefficients == EQUAL:
        value, patterns = geometry.escape_eigenvalue, (modes.in_pattern[0], modes.out_pattern[0])
        sure = descends(value, geometry.escape_interval, geometry.escape_residual)
        found.append(_Direction(value, geometry.escape_in, geometry.escape_out, *patterns, sure))
    return found


def _verdict(geometry: LayerGeometry, r: int, coefficients: tuple[float, ...], v: Tensor) -> PlateauVerdict:
    """What the split is by the theory, through the inner Hessian's signs where they suffice, else the coupling."""
    ends = torch.stack([geometry.min_eigenvalue[r], geometry.max_eigenvalue[r]])
    error, coupled = float(geometry.residual[r].max()), bool(v.abs().max() > 0)
    verdict = classify_split(ends, coefficients, outputs=len(v), narrow="undecided", tolerance=error)
    if verdict.kind == "strict_saddle" or not coupled:
        return verdict
    return classify_split(ends, coefficients, coupling_rank=1, outputs=len(v), narrow="undecided", tolerance=error)


def _why(coefficients: tuple[float, ...], value: float, v: Tensor) -> str:
    through = "incoming and outgoing weights" if bool(v.abs().max() > 0) else "incoming weights"
    signs = "signed copies" if min(coefficients) < 0 else "copies"
    return f"curvature {value:+.2e} when {signs} part in their {through}"


def why_none(candidates: Sequence[Candidate], certified: bool = False) -> str:
    """Why no neuron is split."""
    if not candidates:
        return f"growth would not help here: {NO_LAYER}"
    some = descending(candidates)
    if some and certified:
        return (
            f"growth would not be certified here: {some} of {len(candidates)} neurons descend on the fitted "
            "half, none beyond its eigenvalue's residual and its held-out confidence bound; a larger probe may decide"
        )
    if some:
        return (
            f"growth would not help here: {some} of {len(candidates)} neurons descend on the fitted half, "
            "none does beyond rounding and on the held-out half; a larger probe may decide"
        )
    return "growth would not help here: no neuron has a direction in which its copies could descend"
