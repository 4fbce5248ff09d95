"""Extreme eigenpairs of many symmetric operators at once, from products alone; never sees a model.

Lanczos with partial reorthogonalisation, one starting vector an operator, all in step (Golub & Van Loan, Matrix
Computations, ch. 10; Simon 1984). An operator stops by itself; once a tenth of those that remain have stopped,
products go on for the others only. No epsilon is absolute. In the shapes m counts the operators, n their dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from splitwatch.geometry.krylov import Ritz, Screen, lanczos
from splitwatch.geometry.operators import Operators, Scaled, assert_finite, scaled
from splitwatch.records import SplitWatchError

Product = Callable[[Tensor], Tensor]
Ends = Literal["both", "min", "max"]
_NEEDED: dict[Ends, list[int]] = {"both": [0, 1], "min": [0], "max": [1]}

_DENSE_DIMENSION = 24  # up to here n products and a dense eigh cost no more than iterating, and leave nothing unproved
_MAX_PRODUCTS = 200
_GENERIC = 0.3  # share of randomness beside a given start: no eigenvector is then missed for being orthogonal to it
_PLANNED_BASIS = 32  # vectors an operator, for which room is set aside; most need fewer, and the few that need more fit


@dataclass(frozen=True, slots=True, eq=False)
class ExtremeEigenpairs:
    """The smallest and the largest eigenpair of m symmetric operators.

    ``min_value``, ``max_value`` (m,) are the Rayleigh quotients of the unit vectors ``min_vector``, ``max_vector``
    (m, n), ``residual`` (m, 2) the true norms |A u − θ u| of (min, max), ``scale`` (m,) the largest |θ|, close to ‖A‖.
    ``converged`` (m, 2) says where residual ≤ tolerance · scale: an eigenvalue is that near, not always the extreme
    one; λ_min ≤ min_value ≤ max_value ≤ λ_max always holds. ``exhausted`` (m,) marks operators whose Krylov space is
    invariant or full: from a generic start their values are extreme up to rounding. ``screened`` (m,) marks operators
    left early because their minimum is not among the ``wanted`` lowest. ``products`` counts applications.
    """

    min_value: Tensor
    max_value: Tensor
    min_vector: Tensor
    max_vector: Tensor
    residual: Tensor
    converged: Tensor
    scale: Tensor
    products: int
    exhausted: Tensor
    screened: Tensor


def extreme_eigenpairs(
    product: Product | Operators,
    m: int,
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    ends: Ends = "both",
    tolerance: float = 1e-3,
    wanted: int | None = None,
    max_products: int | None = None,
    max_bytes: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
) -> ExtremeEigenpairs:
    """Smallest and largest eigenpair of each of m symmetric operators of dimension n.

    Args:
        product: maps (m, n), one vector an operator in its row, to the images (m, n), in ``dtype`` on ``device``. If
            it has a method ``restricted(rows)``, that gives the product of some of the operators, (k, n) → (k, n).
        m: number of operators.
        n: their dimension.
        dtype: of the vectors.
        device: of the vectors.
        ends: which end an operator has to reach; the other one is as good as its Krylov space makes it.
        tolerance: an operator is finished once the residuals of its ends are below ``tolerance`` · ‖A‖.
        wanted: iterate only on operators whose minimum can be among the ``wanted`` lowest of all; the others stop as
            soon as their minimum is known well enough to tell. For ``ends="min"``.
        max_products: bound on the dimension of the Krylov spaces, by default min(n, 200).
        max_bytes: bound on the Krylov bases; operators are worked off in groups for which 32 vectors each fit.
        start: a unit vector (n,) that many of the operators stretch, or one for each (m, n), if known: random starting
            vectors lean towards it. Without one they are random alone.
        seed: of the starting vectors, the same on every device.

    Autocast is off inside; TF32, a setting of the process, is the caller's to avoid.

    Raises:
        SplitWatchError: where n or max_products is below 1, or the product is not finite or not of shape (m, n).
    """
    limit = min(n, _MAX_PRODUCTS if max_products is None else max_products)
    if limit < 1:
        raise SplitWatchError(f"n and max_products must be at least 1, found n = {n}, max_products = {max_products}")
    each = n * torch.finfo(dtype).bits // 8 * min(limit, _PLANNED_BASIS)
    size = max(1, m if max_bytes is None else min(m, max_bytes // each))
    screen = Screen(m, wanted if ends == "min" else None)
    random = torch.nn.functional.normalize(torch.randn(m, n, generator=torch.Generator().manual_seed(seed)))
    leaning = None if start is None else start.expand(m, n)
    found = Ritz.empty(m, n, random[:0].to(device, dtype))
    products = 0
    with torch.autocast(torch.device(device).type, enabled=False):
        for first in range(0, m, size):
            rows = torch.arange(first, min(first + size, m))
            operators = scaled(product, m, None if len(rows) == m else rows.to(device))
            vectors = random[rows].to(device, dtype)
            if leaning is not None:
                vectors = _GENERIC * vectors + leaning[first : first + len(rows)].to(vectors)
            vectors /= vectors.norm(dim=1, keepdim=True)
            part = found.part(first, first + len(rows))
            if n <= min(_DENSE_DIMENSION, limit):
                products += _from_matrices(operators, vectors, part)
            else:
                products += lanczos(operators, vectors, _NEEDED[ends], tolerance, limit, screen, part)
    return _unscaled(found, products, tolerance)


def dense_operator(product: Product, m: int, n: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The matrices (m, n, n) of the operators, column by column, in n products; not symmetrised."""
    matrices = _dense(scaled(product, m, None), m, torch.eye(n, dtype=dtype, device=device))
    assert_finite(matrices.flatten(1))
    return matrices


def _dense(operators: Scaled, m: int, units: Tensor) -> Tensor:
    return torch.stack([operators.raw(unit.repeat(m, 1)) for unit in units], dim=2)


def _from_matrices(operators: Scaled, vectors: Tensor, found: Ritz) -> int:
    """Both ends from the whole matrices; returns the number of products."""
    m, n = vectors.shape
    raw = _dense(operators, m, torch.eye(n, dtype=vectors.dtype, device=vectors.device))
    operators.calibrate(raw.flatten(1))  # one column may vanish, the whole matrix does so only with the operator
    matrices = (raw / operators.unit[:, :, None]).double()
    found.vectors[:] = torch.linalg.eigh((matrices + matrices.mT) / 2).eigenvectors[:, :, [0, -1]].mT
    found.measure(torch.arange(m), found.vectors, (found.vectors.double() @ matrices.mT).to(vectors))
    found.exhausted[:], found.unit[:] = True, operators.unit
    return n


def _unscaled(found: Ritz, products: int, tolerance: float) -> ExtremeEigenpairs:
    scale = found.values.abs().amax(dim=1, keepdim=True)
    converged = found.residual <= tolerance * scale
    unit, like = found.unit.double(), found.vectors
    values, residual, scale = ((x * unit).to(like) for x in (found.values, found.residual, scale))
    converged, exhausted, screened = (x.to(like.device) for x in (converged, found.exhausted, found.screened))
    (low, high), (u_low, u_high) = values.unbind(1), like.unbind(1)
    return ExtremeEigenpairs(low, high, u_low, u_high, residual, converged, scale[:, 0], products, exhausted, screened)
