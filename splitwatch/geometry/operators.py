"""Many symmetric operators applied at once, each at its own scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from splitwatch.records import SplitWatchError


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
