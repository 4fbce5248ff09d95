"""Lanczos for many symmetric operators in step, each stopping by itself; the machinery behind ``eigen``.

In the shapes m counts the operators of a group, k those still iterated on, n their dimension, j the steps taken.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from splitwatch.geometry.drift import Drift
from splitwatch.geometry.operators import Scaled, assert_finite

_FIRST_CHECK = 4
_PAUSE = 3  # steps between checks on a device, at least: a check costs more than a product there
_BATCHED = 32  # up to this dimension cuSOLVER takes many matrices at once, beyond it one after the other
_ROOM = 16  # vectors an operator, for which room is made at first
_SAFETY = 0.25  # a residual just below the tolerance is now and then that of another eigenvalue than the extreme one
_COARSE = 0.1  # residual, relative to the operator's size, at which a minimum is known well enough to be ranked


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
    """The Krylov spaces of k operators, grown by one vector a step.

    ``basis`` is (room, m, n): a step's vectors lie side by side, those of the k operators that are still held in front.
    Images are not kept. Everything that is taken from one is noted, so that they follow from the vectors to rounding.
    """

    def __init__(self, operators: Scaled, vectors: Tensor, limit: int) -> None:
        m, n = vectors.shape
        self.operators, self.limit, self.j = operators, limit, 0
        self.precision = 10 * torch.finfo(vectors.dtype).eps * n**0.5
        self.rows, self.live = torch.arange(m), torch.full((m,), True)
        self.basis = vectors.new_empty(min(_ROOM, limit) + 1, m, n)
        self.basis[0] = vectors
        self.alpha, self.beta = torch.zeros(2, m, limit, dtype=torch.float64)
        self.taken: list[Tensor | None] = []  # by step, beyond α and β: what reorthogonalisation took, (k, j)
        self.before = torch.full((m, 2, 2), torch.inf, dtype=torch.float64)  # values at the last two checks
        self.size = self.alpha.new_zeros(m)
        self.pause = 1 if vectors.device.type == "cpu" else _PAUSE
        self.drift = Drift(m, 2 * torch.finfo(vectors.dtype).eps)

    def step(self) -> Tensor:
        """Append the next vector; returns which spaces turned out invariant, (k,) on the CPU."""
        self.j, k = self.j + 1, len(self.rows)
        if self.j == len(self.basis):
            self._make_room()
        *_, vectors, following = self.basis[: self.j + 1, :k]
        images = self.operators(vectors)
        beta = self._orthogonalise(images, vectors)
        # Finished operators go on as zeros until the next compaction; nothing reads what they append.
        length = torch.where(self.live & (beta > 0), beta, torch.inf).to(images)
        torch.div(images, length[:, None], out=following)
        return (beta <= self.precision * self.size) | (self.j == images.shape[1])

    def _orthogonalise(self, images: Tensor, vectors: Tensor) -> Tensor:
        """Leave of the images of the newest vectors, in place, what is new; returns its norms (k,), on the CPU."""
        j, taken, size = self.j, None, images.norm(dim=1)
        alpha = torch.linalg.vecdot(images, vectors)
        images.addcmul_(vectors, alpha[:, None], value=-1)
        if j > 1:
            images.addcmul_(self.basis[j - 2, : len(images)], self.beta[:, j - 2, None].to(images), value=-1)
        numbers = torch.stack([alpha, images.norm(dim=1), size])
        self.alpha[:, j - 1], self.beta[:, j - 1], size = numbers.cpu().double()  # a device is waited for once a step
        if not bool(size.isfinite().all()):
            assert_finite(images)
        self.size = torch.maximum(self.size, size)
        if self.drift.grown(self.alpha[:, :j], self.beta[:, :j], self.size, self.live):
            taken = _project_out(images, self.basis[:j, : len(images)])
            beta = images.norm(dim=1).cpu().double()
            if bool((beta < self.precision**0.5 * self.size).any()):  # most of an image cancelled
                taken += _project_out(images, self.basis[:j, : len(images)])
                beta = images.norm(dim=1).cpu().double()
            self.beta[:, j - 1] = beta
        self.taken.append(taken)
        return self.beta[:, j - 1]

    def ritz(self, which: Tensor, invariant: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of some operators (p,): values (p, 2) of both ends, their residuals, sizes (p,), coefficients (p, 2, j)."""
        j = self.j
        matrices = self.alpha.new_zeros(len(which), j, j)
        matrices.diagonal(0, 1, 2).copy_(self.alpha[which, :j])
        matrices.diagonal(-1, 1, 2).copy_(self.beta[which, : j - 1])  # eigh reads the lower triangle alone
        values, vectors = _eigh(matrices, self.basis.device)
        ends = vectors[:, :, [0, -1]].mT
        residual = torch.where(invariant[which, None], 0.0, self.beta[which, j - 1, None] * ends[:, :, -1].abs())
        return values[:, [0, -1]], residual, values.abs().amax(dim=1), ends

    def combined(self, which: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Combinations of the basis vectors of some operators, (p, 2, j) → (p, 2, n), and their images."""
        both = torch.cat([F.pad(coefficients, (0, 1)), self._images(which, coefficients)], dim=1)
        basis = self.basis[: self.j + 1].index_select(1, which.to(self.basis.device))
        vectors, images = (both.to(basis) @ basis.transpose(0, 1)).split(2, dim=1)
        return vectors, images

    def _images(self, which: Tensor, coefficients: Tensor) -> Tensor:
        """The images of combinations of basis vectors, as combinations of these and the next, (p, 2, j + 1)."""
        alpha, beta = self.alpha[which, None, : self.j], self.beta[which, None, : self.j]
        found = F.pad(alpha * coefficients, (0, 1))
        found[:, :, 1:] += beta * coefficients
        found[:, :, : self.j - 1] += beta[:, :, :-1] * coefficients[:, :, 1:]
        for i, taken in enumerate(self.taken):
            if taken is not None:
                found[:, :, : i + 1] += taken[which, None] * coefficients[:, :, i, None]
        return found

    def _make_room(self) -> None:
        """Twice as many vectors fit."""
        used = self.basis[:, : len(self.rows)]
        self.basis = used.new_empty(min(2 * self.j, self.limit + 1), *used.shape[1:])
        self.basis[: self.j] = used

    def compact(self) -> None:
        """Let go of finished operators once they are a tenth of those held; the last ones take their places."""
        left = int(self.live.sum())
        if left == 0 or 10 * left > 9 * len(self.live):
            return
        keep, freed = torch.arange(left), (~self.live[:left]).nonzero().flatten()
        keep[freed] = left + self.live[left:].nonzero().flatten()
        there, used = keep.to(self.basis.device), self.basis[: self.j + 1]
        used.index_copy_(1, freed.to(there), used.index_select(1, there[freed]))
        self.operators = self.operators.restricted(there)
        self.rows, self.size, self.alpha, self.beta, self.before, self.live = (
            x[keep] for x in (self.rows, self.size, self.alpha, self.beta, self.before, self.live)
        )
        self.taken = [None if x is None else x[keep] for x in self.taken]
        self.drift.keep(keep)


def lanczos(
    operators: Scaled, vectors: Tensor, needed: list[int], tolerance: float, limit: int, screen: Screen, found: Ritz
) -> int:
    """Ritz pairs of both ends from starting vectors (m, n), as exact as ``needed`` ends require; returns the steps.

    A residual proves that an eigenvalue is near, not that it is the extreme one: a value also has to stand still
    since the last check but one, with the steps in between left to turn up something lower or higher.
    """
    space = Lanczos(operators, vectors, limit)
    threshold, check = max(_SAFETY * tolerance, space.precision), _FIRST_CHECK
    while bool(space.live.any()):
        invariant = space.step()
        due = space.j in (check, limit)
        which = (space.live & (invariant | due)).nonzero().flatten()
        if not len(which):
            continue
        check += max(space.pause, space.j // 10) if due else 0
        values, residual, scale, coefficients = space.ritz(which, invariant)
        small = threshold * scale[:, None]
        settled = (residual <= small) & ((values - space.before[which, 1]).abs() <= small)
        reached = settled[:, needed].all(dim=1) | invariant[which]
        space.before[which] = torch.stack([values, space.before[which, 0]], dim=1)
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
    vectors, images = space.combined(which, coefficients)
    norm, rows = vectors.norm(dim=2, keepdim=True), space.rows[which]
    found.vectors[rows.to(norm.device)] = vectors.div_(norm)
    found.measure(rows, vectors, images.div_(norm))


def _project_out(images: Tensor, basis: Tensor) -> Tensor:
    """Take away in place what images (k, n) have in a basis (j, k, n); returns the coefficients, (k, j)."""
    coefficients = images[:, None] @ basis.permute(1, 2, 0)
    images[:, None].baddbmm_(coefficients, basis.transpose(0, 1), alpha=-1)
    return coefficients[:, 0].cpu().double()


def _eigh(matrices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Eigenpairs of many small matrices on the CPU, found on the device where it takes all of them at once."""
    if device.type == "cpu":
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors
    if matrices.shape[1] <= _BATCHED:
        values, vectors = torch.linalg.eigh(matrices.to(device))
        return values.cpu(), vectors.cpu()
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        values, vectors = zip(*pool.map(torch.linalg.eigh, matrices.tensor_split(threads)), strict=True)
    return torch.cat(values), torch.cat(vectors)
