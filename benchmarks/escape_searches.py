"""Two searches for descent from a network with data on its kinks: linear programs, and samples of the loss itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from escape_points import Net
from scipy.optimize import linprog
from torch import Tensor, nn

ROUNDING = 1e-14  # of a difference of losses of size 1
FIRST_ORDER = 1e-6  # rates below count as zero, as a share of Σ |e_i| |x_i| |ρ'|


@dataclass(frozen=True)
class Programs:
    """What linear programs over all cells of one neuron find, as shares of the largest possible rates.

    ``descent`` ≤ 0 is the first-order change along the steps ``w`` (d,), ``v`` (c,); ``escape`` the largest |d(u)|
    where D(u) = 0, at u = ``lead`` (d,).
    """

    descent: float
    w: Tensor
    v: Tensor
    escape: float
    lead: Tensor


def programs(net: Net, r: int) -> Programs:
    z, e = net.x @ net.w[r], net.signals()
    kinks, v = net.x[net.on_kink()[:, r]], net.v[r]
    reach = float((e.norm(dim=1) * net.x.norm(dim=1)).sum())
    gradient = (e.T @ nn.functional.leaky_relu(z, net.leak)) / reach
    best, escape = (0.0, torch.zeros_like(net.w[r]), torch.zeros_like(v)), (0.0, torch.zeros_like(net.w[r]))
    for signs in product((1.0, -1.0), repeat=len(kinks)):
        side = z.sign()
        side[net.on_kink()[:, r]] = side.new_tensor(signs)
        d = (e * torch.where(side > 0, 1.0, net.leak)[:, None]).T @ net.x / reach
        cell = -side.new_tensor(signs)[:, None] * kinks / kinks.norm(dim=1, keepdim=True)
        value, step = lowest(torch.cat([v @ d, gradient]), torch.nn.functional.pad(cell, (0, len(v))))
        if value < best[0]:
            best = value, step[: len(net.w[r])], step[len(net.w[r]) :]
        if best[0] > -FIRST_ORDER:
            level = torch.cat([cell, (v @ d)[None]])
            solved = [lowest(sign * row, level) for row in d for sign in (1, -1)]
            escape = min([escape, *solved], key=lambda pair: pair[0])
    return Programs(*best, -escape[0], escape[1])


def lowest(cost: Tensor, cell: Tensor) -> tuple[float, Tensor]:
    """The minimum of cost·u over the box |u_a| ≤ 1 with cell u ≤ 0; coefficients at rounding level are zeros."""
    cost, cell = (torch.where(t.abs() > 1e-12, t, 0) for t in (cost, cell))
    limits = {"A_ub": cell.numpy(), "b_ub": torch.zeros(len(cell)).numpy()} if len(cell) else {}
    for tolerance in (1e-10, 1e-8, 1e-7):
        options = {"primal_feasibility_tolerance": tolerance, "dual_feasibility_tolerance": tolerance}
        found = linprog(cost.numpy(), bounds=(-1, 1), method="highs", options=options, **limits)
        if found.status == 0:
            return float(found.fun), torch.as_tensor(found.x, dtype=torch.float64)
    raise ArithmeticError(found.message)


def everywhere(net: Net, rng: torch.Generator, leads: Sequence[Tensor] = (), samples: int = 1500) -> float:
    """The lowest change of the loss among random steps of many sizes: in all weights, and along and across kinks.

    ``leads``: one more direction to follow for every neuron.
    """
    m, d, c = *net.w.shape, net.v.shape[1]
    small, ratio = (10 ** uniform(rng, samples, *ends) for ends in ((-5, -3), (-3, 2)))
    keep = (torch.rand(samples, m, 1, generator=rng) < 0.6).double()
    w = small * ratio.clamp(max=1) * keep * normal(rng, samples, m, d)
    v = small / ratio.clamp(min=1) * normal(rng, samples, m, c)
    found = [net.changes(w, v)]
    for r in range(m):
        u = tangents(net, r, rng, leads[r] if leads else None)
        size, ratio = (10 ** uniform(rng, len(u), *ends) for ends in ((-5, -2.5), (-3, 3)))
        w, v = torch.zeros(len(u), m, d).double(), torch.zeros(len(u), m, c).double()
        w[:, r] = (size * ratio.clamp(max=1))[:, 0] * u
        v[:, r] = (size / ratio.clamp(min=1)).clamp(max=1e-3)[:, 0] * normal(rng, len(u), c)
        found.append(net.changes(w, v))
    return float(torch.cat(found).min())


def tangents(net: Net, r: int, rng: torch.Generator, lead: Tensor | None, samples: int = 150) -> Tensor:
    """Unit directions across w: any, those that leave all kink samples on the kink, or all but one, and ± the kinks."""
    kinks, d = net.x[net.on_kink()[:, r]], net.w.shape[1]
    found = [normal(rng, samples, d), kinks, -kinks]
    found += [] if lead is None else [lead.expand(samples, d)]
    for left_out in range(-1, len(kinks)):
        held = kinks[[i for i in range(len(kinks)) if i != left_out]]
        _, s, vh = torch.linalg.svd(torch.cat([held, net.w[r : r + 1]]))
        basis = vh[int((s > 1e-9 * s[0]).sum()) :]
        found.append(normal(rng, samples, len(basis)) @ basis)
    u = torch.cat(found)
    u = u - (u @ net.w[r])[:, None] * net.w[r] / net.w[r].square().sum()
    return u[u.norm(dim=1) > 1e-9] / u.norm(dim=1, keepdim=True)[u.norm(dim=1) > 1e-9]


def after_split(net: Net, r: int, coefficients: tuple[float, ...], rng: torch.Generator, lead: Tensor) -> float:
    """The lowest change of the wide loss: the copies r and the last move apart and exchange outgoing weights."""
    u = tangents(net, r, rng, lead, 400)
    m, (a, b) = len(net.w), coefficients
    step, exchange = (10 ** uniform(rng, len(u), *ends)[:, 0] for ends in ((-6, -3), (-3, -2)))
    w, v = torch.zeros(len(u), *net.w.shape).double(), torch.zeros(len(u), *net.v.shape).double()
    least = float(net.v[[r, m - 1]].norm(dim=1).min())  # a step beyond it, the copies' signs and bends are others
    w[:, r], v[:, r] = step * b * u, exchange * (min(least, 1) or 1) * normal(rng, len(u), net.v.shape[1])
    alone = torch.rand(len(u), 1, generator=rng) < 0.5
    w[:, m - 1], v[:, m - 1] = torch.where(alone, 0, -step * a * u), -v[:, r]
    return float(net.changes(w, v).min())


def uniform(rng: torch.Generator, samples: int, low: float, high: float) -> Tensor:
    return torch.rand(samples, 1, 1, generator=rng, dtype=torch.float64) * (high - low) + low


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)
