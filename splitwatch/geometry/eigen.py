"""Extreme eigenpairs of many symmetric operators at once, from products alone; never sees a model.

Lanczos with full reorthogonalisation, one starting vector an operator, all in step (Golub & Van Loan, Matrix
Computations, ch. 10). No epsilon is absolute. In the shapes m counts the operators, n their dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from splitwatch.records import SplitWatchError

Product = Callable[[Tensor], Tensor]
_DENSE_DIMENSION = 24  # up to here n products and a dense eigh cost no more than iterating, and leave nothing unproved
_MAX_PRODUCTS = 200
_FIRST_CHECK = 4
_SAFETY = 0.9  # stop a little below the tolerance, so that rounding does not lift the true residual above it


@dataclass(frozen=True, slots=True, eq=False)
class ExtremeEigenpairs:
    """The smallest and the largest eigenpair of m symmetric operators.

    ``min_value``, ``max_value`` (m,) are the Rayleigh quotients of the unit vectors ``min_vector``, ``max_vector``
    (m, n), ``residual`` (m, 2) the true norms |A u − θ u| of (min, max), ``scale`` (m,) the largest |θ|, close to ‖A‖.
    ``converged`` (m, 2) says where residual ≤ tolerance · scale: an eigenvalue is that near, not always the extreme
    one; λ_min ≤ min_value ≤ max_value ≤ λ_max always holds. ``exhausted`` (m,) marks operators whose Krylov space is
    invariant or full: from a generic start their values are extreme up to rounding. ``products`` counts applications.
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


def extreme_eigenpairs(
    product: Product,
    m: int,
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    tolerance: float = 1e-3,
    max_products: int | None = None,
    seed: int = 0,
) -> ExtremeEigenpairs:
    """Smallest and largest eigenpair of each of m symmetric operators of dimension n.

    ``product`` maps (m, n), one vector an operator in its row, to the images (m, n), in ``dtype`` on ``device``. An
    operator is finished once both residuals are below ``tolerance`` · ‖A‖. ``max_products`` bounds the dimension of the
    Krylov spaces, by default min(n, 200); two more products measure the true residuals. ``seed`` fixes the starting
    vectors, the same on every device. Autocast is off inside; TF32, a setting of the process, is the caller's to avoid.

    Raises:
        SplitWatchError: where n or max_products is below 1, or the product is not finite or not of shape (m, n).
    """
    limit = min(n, _MAX_PRODUCTS if max_products is None else max_products)
    if limit < 1:
        raise SplitWatchError(f"n and max_products must be at least 1, found n = {n}, max_products = {max_products}")
    scaled = _Scaled(product)
    exhausted = torch.ones(m, dtype=torch.bool)
    with torch.autocast(torch.device(device).type, enabled=False):
        if m == 0:
            vectors = images = torch.zeros(0, 2, n, dtype=dtype, device=device)
        elif n <= min(_DENSE_DIMENSION, limit):
            vectors, images = _dense(scaled, m, n, dtype, device)
        else:
            start = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            start = (start / start.norm(dim=1, keepdim=True)).to(device, dtype)
            vectors, exhausted = _lanczos(scaled, start, tolerance, limit)
            images = torch.stack([scaled(end) for end in vectors.unbind(1)], dim=1)
    return _measured(vectors, images, exhausted, scaled, tolerance)


def dense_operator(product: Product, m: int, n: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The matrices (m, n, n) of the operators, column by column, in n products; not symmetrised."""
    return torch.stack([_checked(product, e.repeat(m, 1)) for e in torch.eye(n, dtype=dtype, device=device)], dim=2)


def _checked(product: Product, vectors: Tensor) -> Tensor:
    images = product(vectors).detach()
    if images.shape != vectors.shape:
        raise SplitWatchError(f"product must return the shape {tuple(vectors.shape)}, found {tuple(images.shape)}")
    broken = (~images.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        found = f"found inf or nan in {len(broken)} of {len(images)} operators (first rows: {broken[:8]})"
        raise SplitWatchError(f"product must be finite, {found}; look for overflow, or a loss that is not finite")
    return images.to(vectors.dtype)


class _Scaled:
    """The operators divided by a power of two near their own size: exact, and no square in here under- or overflows."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.products = 0
        self.unit = torch.ones(1, 1)  # (m, 1) once known

    def __call__(self, vectors: Tensor) -> Tensor:
        images = _checked(self.product, vectors)
        if self.products == 0:
            self.calibrate(images)
        self.products += 1
        return images / self.unit

    def calibrate(self, images: Tensor) -> None:
        largest = images.abs().amax(dim=1, keepdim=True)
        power = largest / (2 * torch.frexp(largest).mantissa)
        self.unit = torch.where(largest > 0, power.clamp(min=torch.finfo(images.dtype).tiny), 1.0)


def _dense(scaled: _Scaled, m: int, n: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Unit vectors of both ends (m, 2, n) and their images, from the whole matrices."""
    raw = dense_operator(scaled.product, m, n, dtype=dtype, device=device)
    scaled.products = n
    scaled.calibrate(raw.flatten(1))  # one column may vanish, the whole matrix does so only with the operator
    matrices = (raw / scaled.unit[:, :, None]).cpu().double()
    vectors = torch.linalg.eigh((matrices + matrices.mT) / 2).eigenvectors[:, :, [0, -1]].mT.to(device, dtype)
    return vectors, vectors.cpu().double() @ matrices.mT  # the images of what is returned, its rounding included


def _lanczos(scaled: _Scaled, vectors: Tensor, tolerance: float, limit: int) -> tuple[Tensor, Tensor]:
    """Unit Ritz vectors of both ends (m, 2, n) from the starting vectors (m, n), and which rows are exhausted (m,)."""
    m, n = vectors.shape
    precision = 10 * torch.finfo(vectors.dtype).eps * n**0.5
    ritz = _Ritz(m, limit, max(_SAFETY * tolerance, precision))
    basis, size, check = vectors.new_zeros(m, min(8, limit), n), vectors.new_zeros(m), _FIRST_CHECK
    for j in range(1, limit + 1):
        if j > basis.shape[1]:
            basis = torch.cat([basis, torch.zeros_like(basis)[:, : limit - basis.shape[1]]], dim=1)
        basis[:, j - 1] = vectors
        images = scaled(vectors)
        size = torch.maximum(size, images.norm(dim=1))
        alpha = (vectors * images).sum(dim=1)
        images = _orthogonalised(images, basis[:, :j])
        beta = images.norm(dim=1)
        invariant = (beta <= precision * size) | (j == n)
        due = j in (check, limit)
        ritz.extend(j, alpha.cpu(), beta.cpu(), invariant.cpu(), due)
        if not ritz.live.any():
            break
        check += max(2, j // 5) if due else 0
        # Finished rows go on as zeros: that costs no branch, and nothing reads what they append.
        vectors = torch.where(ritz.live.to(beta.device)[:, None], images / beta[:, None], 0)
    ends = ritz.coefficients.to(basis)[:, :, : basis.shape[1]] @ basis
    return ends / ends.norm(dim=2, keepdim=True), ritz.exhausted


def _orthogonalised(images: Tensor, basis: Tensor) -> Tensor:
    """Images (m, n) less their parts in the basis (m, j, n)."""
    for _ in range(2):  # once is not enough where most of an image cancels; twice is
        images = images - ((basis @ images[:, :, None]).mT @ basis)[:, 0]
    return images


class _Ritz:
    """The tridiagonal projections of the operators, and the two extreme Ritz pairs of each; float64 on the CPU."""

    def __init__(self, m: int, limit: int, threshold: float) -> None:
        self.alpha, self.beta = torch.zeros(2, m, limit, dtype=torch.float64)
        self.coefficients = torch.zeros(m, 2, limit, dtype=torch.float64)  # of the Ritz vectors in the basis
        self.live, self.exhausted, self.passed = torch.full((m,), True), *torch.full((2, m), False)
        self.threshold = threshold

    def extend(self, j: int, alpha: Tensor, beta: Tensor, invariant: Tensor, due: bool) -> None:
        """Append step j, and finish the rows that became invariant or, where a check is due, that have converged."""
        self.alpha[:, j - 1], self.beta[:, j - 1] = alpha, beta
        self.exhausted |= self.live & invariant
        # An invariant row is solved at once, at its own size, so no matrix ever holds entries of a dead direction.
        rows = (self.live & (invariant | due)).nonzero().flatten()
        lower = torch.diag_embed(self.beta[rows, : j - 1], offset=-1)  # all that eigh reads, beside the diagonal
        values, vectors = torch.linalg.eigh(torch.diag_embed(self.alpha[rows, :j]) + lower)
        ends = vectors[:, :, [0, -1]].mT
        residual = self.beta[rows, j - 1, None] * ends[:, :, -1].abs()
        reached = (residual <= self.threshold * values.abs().amax(dim=1, keepdim=True)).all(dim=1)
        self.coefficients[rows, :, :j] = ends
        # A residual proves that an eigenvalue is near, not that it is the extreme one: a row has to pass twice, with
        # the steps in between left to turn up something lower or higher.
        self.live[rows] = ~(reached & self.passed[rows] | invariant[rows])
        self.passed[rows] = reached


def _measured(u: Tensor, images: Tensor, exhausted: Tensor, scaled: _Scaled, tolerance: float) -> ExtremeEigenpairs:
    """Rayleigh quotients and true residuals of unit vectors (m, 2, n) with known images, in float64, then unscaled."""
    vectors, images, unit = u.cpu().double(), images.cpu().double(), scaled.unit.cpu().double()
    theta = (vectors * images).sum(dim=2)
    residual = (images - theta[:, :, None] * vectors).norm(dim=2)
    scale = theta.abs().amax(dim=1, keepdim=True)
    converged, exhausted = (residual <= tolerance * scale).to(u.device), exhausted.to(u.device)
    theta, residual, scale = ((x * unit).to(u) for x in (theta, residual, scale))
    (low, high), (u_low, u_high) = theta.unbind(1), u.unbind(1)
    return ExtremeEigenpairs(low, high, u_low, u_high, residual, converged, scale[:, 0], scaled.products, exhausted)
