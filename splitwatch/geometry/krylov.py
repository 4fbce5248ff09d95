"""Lanczos for many symmetric operators in step, each stopping by itself; the machinery behind ``eigen``.

In the shapes m counts the operators of a group, k those still iterated on, n their dimension, j the steps taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from splitwatch.geometry.drift import Drift
from splitwatch.records import SplitWatchError

_FIRST_CHECK = 4
_ROOM = 16  # vectors an operator, for which room is made at first
_SAFETY = 0.5  # a residual just below the tolerance is now and then that of another eigenvalue than the extreme one
_COARSE = 0.1  # residual, relative to the operator's size, at which a minimum is known well enough to be ranked


class Operators(Protocol):
    """Many symmetric operators; applying them maps (k, n) → new images (k, n)."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """One vector an operator, in its row, to the images."""
        ...

    def restricted(self, rows: Tensor) -> Operators:
        """Some of the operators, given by their indices (k,)."""
        ...


@dataclass(frozen=True, slots=True)
class _Padded:
    """A product that knows only all m operators at once: the others are applied to zero."""

    product: Callable[[Tensor], Tensor]
    m: int
    rows: Tensor | None = None

    def __call__(self, vectors: Tensor) -> Tensor:
        if self.rows is None:
            return self.product(vectors).clone()  # it may return what it was given
        full = vectors.new_zeros(self.m, vectors.shape[1]).index_copy_(0, self.rows, vectors)
        return self.product(full)[self.rows]

    def restricted(self, rows: Tensor) -> _Padded:
        return _Padded(self.product, self.m, rows if self.rows is None else self.rows[rows])


def assert_finite(images: Tensor) -> None:
    """Name the operators whose images (k, ·) are not finite, if any."""
    if not bool(images.sum().isfinite()):  # a sum is cheaper than a look at every number
        broken = (~images.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if broken:
            found = f"found inf or nan in {len(broken)} of {len(images)} operators (first rows: {broken[:8]})"
            raise SplitWatchError(f"product must be finite, {found}; look for overflow, or a loss that is not finite")


class Scaled:
    """Operators divided by powers of two near their own sizes: exact, and no square in here under- or overflows.

    ``unit`` (k, 1) holds the powers, known after the first product.
    """

    def __init__(self, operators: Operators) -> None:
        self.operators, self.calibrated, self.unit = operators, False, torch.ones(1, 1)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The scaled images of (k, n) vectors."""
        images = self.raw(vectors)
        if not self.calibrated:
            self.calibrate(images)
        return images.div_(self.unit)

    def raw(self, vectors: Tensor) -> Tensor:
        """The images as they are."""
        images = self.operators(vectors).detach().to(vectors.dtype)
        if images.shape != vectors.shape:
            raise SplitWatchError(f"product must return the shape {tuple(vectors.shape)}, found {tuple(images.shape)}")
        return images

    def restricted(self, rows: Tensor) -> Scaled:
        """Some of the operators, at the same scale."""
        part = Scaled(self.operators.restricted(rows))
        part.unit, part.calibrated = self.unit[rows], self.calibrated
        return part

    def calibrate(self, images: Tensor) -> None:
        """Take the scale from images (k, ·)."""
        self.calibrated = True
        assert_finite(images)
        largest = images.abs().amax(dim=1, keepdim=True)
        power = largest / (2 * torch.frexp(largest).mantissa)
        self.unit = torch.where(largest > 0, power.clamp(min=torch.finfo(images.dtype).tiny), 1.0)


def scaled(product: Callable[[Tensor], Tensor] | Operators, m: int, rows: Tensor | None) -> Scaled:
    """The operators, or those at ``rows``, scaled."""
    operators = product if hasattr(product, "restricted") else _Padded(product, m)
    return Scaled(operators if rows is None else operators.restricted(rows))  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


class Screen:
    """Which of m minima can still be among the ``wanted`` lowest; every value found so far bounds its minimum above."""

    def __init__(self, m: int, wanted: int | None) -> None:
        self.wanted = wanted if wanted is not None and wanted < m else None
        self.lowest = torch.full((m,), torch.inf, dtype=torch.float64)

    def out(self, rows: Tensor, minimum: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
        """Which rows cannot, from their minima so far, the residuals of these and the operators' sizes, all (k,)."""
        if self.wanted is None:
            return torch.zeros(len(rows), dtype=torch.bool)
        self.lowest[rows] = minimum
        bar = self.lowest.kthvalue(max(self.wanted, 1)).values
        return (residual <= _COARSE * scale) & (minimum - 2 * residual > bar)


@dataclass(frozen=True, slots=True)
class Ritz:
    """What Krylov spaces show of m operators: ``vectors`` (m, 2, n), ``values`` and ``residual`` (m, 2) of both ends.

    Values and residuals are true ones, in float64 on the CPU, in units of ``unit`` (m, 1). ``first`` is the number of
    the first operator where the record is part of a larger one.
    """

    vectors: Tensor
    values: Tensor
    residual: Tensor
    unit: Tensor
    exhausted: Tensor
    screened: Tensor
    first: int = 0

    @classmethod
    def empty(cls, m: int, n: int, like: Tensor) -> Ritz:
        """A record to be filled."""
        values, residual = torch.zeros(2, m, 2, dtype=torch.float64)
        exhausted, screened = torch.zeros(2, m, dtype=torch.bool)
        return cls(like.new_zeros(m, 2, n), values, residual, torch.ones(m, 1), exhausted, screened)

    def part(self, first: int, end: int) -> Ritz:
        """The record of some of the operators; to fill it is to fill this one."""
        rows = slice(first, end)
        tensors = self.vectors, self.values, self.residual, self.unit, self.exhausted, self.screened
        return Ritz(*(x[rows] for x in tensors), first=first)

    def measure(self, rows: Tensor, vectors: Tensor, images: Tensor) -> None:
        """Rayleigh quotients and residuals of unit vectors (k, 2, n) with known images."""
        theta = (vectors * images).sum(dim=2, dtype=torch.float64)
        self.values[rows] = theta.cpu()
        rest = images - theta.to(images)[:, :, None] * vectors
        self.residual[rows] = torch.linalg.vector_norm(rest, dim=2, dtype=torch.float64).cpu()


class Lanczos:
    """The Krylov spaces of k operators, grown by one vector a step."""

    def __init__(self, operators: Scaled, vectors: Tensor, limit: int) -> None:
        m, n = vectors.shape
        self.operators, self.vectors, self.limit, self.j = operators, vectors, limit, 0
        self.precision = 10 * torch.finfo(vectors.dtype).eps * n**0.5
        self.rows, self.live = torch.arange(m), torch.full((m,), True)
        self.basis = vectors.new_empty(2, m, min(_ROOM, limit), n)  # the vectors and their images
        self.alpha, self.beta = torch.zeros(2, m, limit, dtype=torch.float64)
        self.before = torch.full((m, 2), torch.inf, dtype=torch.float64)  # values at the last check
        self.size = vectors.new_zeros(m)
        self.drift = Drift(m, limit, 2 * torch.finfo(vectors.dtype).eps)

    def step(self) -> Tensor:
        """Append the next vector; returns which spaces turned out invariant, (k,) on the CPU."""
        self.j = j = self.j + 1
        if j > self.basis.shape[2]:
            room = min(2 * self.basis.shape[2], self.limit)
            self.basis = self._copied(None, room)
        images = self.operators(self.vectors)
        if not bool((size := images.norm(dim=1)).isfinite().all()):
            assert_finite(images)
        self.basis[0, :, j - 1], self.basis[1, :, j - 1] = self.vectors, images
        self.size = torch.maximum(self.size, size)
        alpha = _project_out(images, self.basis[0, :, j - 1 : j])[:, 0]
        if j > 1:
            images.addcmul_(self.basis[0, :, j - 2], self.beta[:, j - 2, None].to(images), value=-1)
        beta = images.norm(dim=1)
        self.alpha[:, j - 1], self.beta[:, j - 1] = alpha.cpu(), beta.cpu()
        if self.drift.grown(self.alpha[:, :j], self.beta[:, :j], self.size.cpu(), self.live):
            _project_out(images, self.basis[0, :, :j])
            beta = images.norm(dim=1)
            if bool((beta < self.precision**0.5 * self.size).any()):  # most of an image cancelled
                _project_out(images, self.basis[0, :, :j])
                beta = images.norm(dim=1)
            self.beta[:, j - 1] = beta.cpu()
        invariant = (beta <= self.precision * self.size) | (j == images.shape[1])
        # Finished operators go on as zeros until the next compaction; nothing reads what they append.
        going = self.live.to(beta.device) & ~invariant
        self.vectors = images.div_(torch.where(going, beta, torch.inf)[:, None])
        return invariant.cpu()

    def ritz(self, which: Tensor, invariant: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of some operators (p,): values (p, 2) of both ends, their residuals, sizes (p,), coefficients (p, 2, j)."""
        j = self.j
        lower = torch.diag_embed(self.beta[which, : j - 1], offset=-1)  # all that eigh reads, beside the diagonal
        values, vectors = torch.linalg.eigh(torch.diag_embed(self.alpha[which, :j]) + lower)
        ends = vectors[:, :, [0, -1]].mT
        residual = torch.where(invariant[which, None], 0.0, self.beta[which, j - 1, None] * ends[:, :, -1].abs())
        return values[:, [0, -1]], residual, values.abs().amax(dim=1), ends

    def _copied(self, rows: Tensor | None, room: int) -> Tensor:
        """The basis of some operators, or of all, with room for more vectors; only what is in use is copied."""
        used = self.basis[:, :, : min(self.j, self.basis.shape[2])]
        k = len(self.rows) if rows is None else len(rows)
        basis = used.new_empty(2, k, room, used.shape[3])
        if rows is None:
            basis[:, :, : used.shape[2]] = used
        else:
            torch.index_select(used, 1, rows, out=basis[:, :, : used.shape[2]])
        return basis

    def compact(self) -> None:
        """Let go of finished operators once they are a quarter of those held."""
        if bool(self.live.all()) or not bool(self.live.any()) or 4 * int(self.live.sum()) > 3 * len(self.live):
            return
        keep = self.live.nonzero().flatten()
        there = keep.to(self.basis.device)
        self.operators, self.size = self.operators.restricted(there), self.size[there]
        self.basis, self.vectors = self._copied(there, self.basis.shape[2]), self.vectors[there]
        self.rows, self.alpha, self.beta, self.before = (
            x[keep] for x in (self.rows, self.alpha, self.beta, self.before)
        )
        self.live = self.live[keep]
        self.drift.keep(keep)


def lanczos(
    operators: Scaled, vectors: Tensor, needed: list[int], tolerance: float, limit: int, screen: Screen, found: Ritz
) -> int:
    """Ritz pairs of both ends from starting vectors (m, n), as exact as ``needed`` ends require; returns the steps.

    A residual proves that an eigenvalue is near, not that it is the extreme one: a value also has to stand still
    between two checks, with the steps in between left to turn up something lower or higher.
    """
    space = Lanczos(operators, vectors, limit)
    threshold, check = max(_SAFETY * tolerance, space.precision), _FIRST_CHECK
    while bool(space.live.any()):
        invariant = space.step()
        due = space.j in (check, limit)
        which = (space.live & (invariant | due)).nonzero().flatten()
        if not len(which):
            continue
        check += max(2, space.j // 5) if due else 0
        values, residual, scale, coefficients = space.ritz(which, invariant)
        small = threshold * scale[:, None]
        settled = (residual <= small) & ((values - space.before[which]).abs() <= small)
        reached = settled[:, needed].all(dim=1) | invariant[which]
        space.before[which] = values
        rows, unit = space.rows[which], space.operators.unit.cpu().double()[which, 0]
        out = screen.out(found.first + rows, values[:, 0] * unit, residual[:, 0] * unit, scale * unit) & ~reached
        ended = reached | out | (space.j == limit)
        found.exhausted[rows], found.screened[rows] = invariant[which], out
        _fill(found, space, which[ended], coefficients[ended])
        space.live[which[ended]] = False
        space.compact()
    found.unit[:] = operators.unit
    return space.j


def _fill(found: Ritz, space: Lanczos, which: Tensor, coefficients: Tensor) -> None:
    """Form the Ritz vectors of some operators and their images, which give true Rayleigh quotients and residuals."""
    rows = space.rows[which]
    there = which.to(space.basis.device)
    pairs = coefficients.to(space.basis) @ space.basis[:, there, : space.j]
    vectors, images = pairs / pairs[0].norm(dim=2, keepdim=True)
    found.vectors[rows.to(vectors.device)] = vectors
    found.measure(rows, vectors, images)


def _project_out(images: Tensor, basis: Tensor) -> Tensor:
    """Take away in place what images (k, n) have in a basis (k, j, n); returns the coefficients, (k, j)."""
    coefficients = (basis @ images[:, :, None]).mT
    images[:, None].baddbmm_(coefficients, basis, alpha=-1)
    return coefficients[:, 0]
