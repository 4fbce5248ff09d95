"""How steeply the loss descends and where it neither rises nor falls, for one neuron with data points on its kink.

D(u) = g·u + Σ b_i |x_i·u| is one neuron's one-sided derivative, with g = v·G̃ and b_i = v·β_i (see ``piecewise``). It is
convex where no b_i is negative. Bounds are exact up to rounding unless many kinks are concave; what they do not decide
is left undecided.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from splitwatch.geometry.piecewise import PiecewiseNeuron

_ENUMERATED = 6  # concave kinks up to which every sign pattern is tried
_SAMPLES = 256
_MARGIN = 0.01  # how far inside the box a second solution is looked for


@dataclass(frozen=True, slots=True, eq=False)
class Descent:
    """Bounds on min D over the unit ball; ``strict``: where D ≥ 0, it vanishes only off every kink the loss feels."""

    lower: float
    upper: float
    direction: Tensor
    strict: bool


def steepest_descent(neuron: PiecewiseNeuron) -> Descent:
    """D = min over signs σ of its concave kinks of a convex D_σ = sup {s·u : s ∈ Z_σ}, Z_σ = g_σ + Σ b_i [−x_i, x_i].

    min D_σ over the unit ball is −dist(0, Z_σ): any point of Z_σ gives a lower bound, any direction an upper one.
    """
    slope, kinks = neuron.outgoing @ neuron.smooth, _felt(neuron)
    height = (neuron.bend @ neuron.outgoing)[:, None] * neuron.kinks
    convex, concave = height[kinks > 0], height[kinks < 0]
    slack = float((-(neuron.bend @ neuron.outgoing)[kinks == 0]).clamp(min=0) @ neuron.kinks[kinks == 0].norm(dim=1))
    signs = list(product((1.0, -1.0), repeat=len(concave))) if len(concave) <= _ENUMERATED else [(0.0,) * len(concave)]
    if len(concave) > _ENUMERATED:
        slack += float(concave.norm(dim=1).sum())
    shares, rests = [], []
    for sign in signs:
        start = slope + slope.new_tensor(sign) @ concave
        shares.append(_nearest(convex, start))
        rests.append(start + shares[-1] @ convex)
    rest = torch.stack(rests)
    tried = _unit(torch.cat([-rest, neuron.kinks, -neuron.kinks, _normal(_SAMPLES if len(kinks) else 0, len(slope))]))
    values = neuron.slopes(tried)
    best, farthest = int(values.argmin()), float(rest.norm(dim=1).max())
    strict = not len(concave) and farthest <= neuron.flat and _inside(convex, slope, shares[0], neuron.flat)
    return Descent(-farthest - slack, min(0.0, float(values[best])), tried[best], strict)


def _felt(neuron: PiecewiseNeuron) -> Tensor:
    """+1 for kinks where the loss bends upwards, -1 downwards, 0 where it does not feel them, (n,)."""
    bend = neuron.bend @ neuron.outgoing
    size = bend.abs() * neuron.kinks.norm(dim=1)
    return torch.where(size * (len(bend) + 1) > neuron.flat, bend.sign(), 0)


def _inside(box: Tensor, start: Tensor, shares: Tensor, flat: float) -> bool:
    """Whether start + Σ τ_i box_i = 0 for some −1 < τ < 1: for these or, if kinks depend on each other, for others."""
    if bool((shares.abs() < 1 - 1e-6).all()):
        return True
    smaller = (1 - _MARGIN) * box
    return _MARGIN * float(box.norm(dim=1).min()) > flat >= float((start + _nearest(smaller, start) @ smaller).norm())


def _nearest(box: Tensor, start: Tensor) -> Tensor:
    """The τ in [−1, 1]ⁿ that brings start + Σ τ_i box_i closest to zero."""
    scale = float(box.norm())
    if not scale:
        return start.new_zeros(len(box))
    fit = lsq_linear((box.T / scale).numpy(), (-start / scale).numpy(), (-1, 1), method="bvls", tol=1e-15)
    return torch.as_tensor(fit.x).clamp(-1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Escape:
    """The verdict "escape", "none" or "undecided", and the direction found."""

    verdict: str
    direction: Tensor
    output: int = -1
    strength: float = 0.0


def search_escape(neuron: PiecewiseNeuron, strict: bool) -> Escape:
    """Look for u across w with D(u) = 0 ≠ d(u), off the kinks that the loss feels: there D is linear, so zero.

    With a single output, D = v d vanishes only together with d, unless v does.
    """
    unfelt, w = _felt(neuron) == 0, neuron.incoming[None]
    plain, level = (_null_space(torch.cat([kinks, w])) for kinks in (neuron.kinks, neuron.kinks[~unfelt]))
    linear = neuron.across(neuron.smooth.T).T
    right = torch.cat([torch.linalg.svd(linear @ b, full_matrices=False).Vh @ b.T for b in (plain, level)])
    draws = _normal(_SAMPLES if len(unfelt) else 0, level.shape[1]) @ level.T
    tried = _unit(torch.cat([right, -right, draws, torch.zeros_like(w)]))
    change = neuron.across(neuron.rates(tried))
    best = int(change.norm(dim=1).argmax())
    strength = float(change[best].norm())
    if strength > neuron.zero:
        return Escape("escape", tried[best], int(change[best].abs().argmax()), strength)
    bends = neuron.across(neuron.bend[unfelt]).norm(dim=1) @ (neuron.kinks[unfelt] @ level).norm(dim=1)
    strict |= len(neuron.outgoing) == 1 and not neuron.silent
    none = strict and float((linear @ level).norm() + bends) <= neuron.zero
    return Escape("none" if none else "undecided", tried[-1])


def _null_space(rows: Tensor) -> Tensor:
    """Orthonormal basis of {u : rows u = 0}, (d, …)."""
    _, values, vh = torch.linalg.svd(_unit(rows))
    return vh[int((values > 1e-10).sum()) :].T


def _unit(rows: Tensor) -> Tensor:
    size = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(size > 0, size, 1)


def _normal(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
