"""Running statistics as torchmetrics: updated batch by batch, merged, and reduced over ranks, in float64.

Each can stand alone in a ``MetricCollection`` or in ``self.log``. Every rank that takes part needs at least one update.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from splitwatch.records import SplitWatchError

GROUPS = 16
"""Sums of gradients that a ``GradientNoise`` keeps."""

_Z_95 = 1.645


class GradientNoise(Metric):
    """Size of the mean gradient E g with 95 % bounds, and the variance of one sample's gradient.

    From batch gradients g_i over n_i samples, |E g|² is estimated by Σ_{i≠j} n_i n_j ⟨g_i, g_j⟩ / Σ_{i≠j} n_i n_j,
    which is unbiased for any batch sizes and needs sums only. Its standard error is that of the jackknife, which leaves
    out one group of batches at a time and errs on the large side where E g = 0; it needs what every group adds up to.
    So at most ``groups`` vectors are kept, the i-th batch in group i mod ``groups``: up to that number each batch is
    left out by itself, beyond it the error rests on ``groups`` larger parts.

    Kept: groups × P numbers of 8 bytes on the gradients' device, for P parameters. While the value is computed over R
    ranks, R × groups × P, where each rank's groups count as groups of their own.

    Args:
        groups: vectors kept, at least 3; fewer need less memory and make the error less certain.

    Raises:
        SplitWatchError: fewer groups than that.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    sums: list[Tensor]
    moments: list[Tensor]

    def __init__(self, groups: int = GROUPS, **settings: object) -> None:
        super().__init__(**settings)
        if groups < 3:
            raise SplitWatchError(f"groups: required at least 3 for a standard error, found {groups}; pass more")
        self.groups = groups
        self.add_state("sums", [], dist_reduce_fx="cat")  # of each group: Σ n_i g_i, (1, P)
        self.add_state("moments", [], dist_reduce_fx="cat")  # and (Σ 1, Σ n_i, Σ n_i², Σ n_i |g_i|², Σ n_i² |g_i|²)

    def update(self, gradient: Tensor, size: int) -> None:
        """Take the gradient (P,) of a batch's mean loss, and the batch's number of samples.

        Raises:
            SplitWatchError: the gradient is not flat, or the size not positive.
        """
        if gradient.ndim != 1:
            raise SplitWatchError(f"gradient: required shape (P,), found {tuple(gradient.shape)}; flatten it")
        if size < 1:
            raise SplitWatchError(f"size: required a number of samples ≥ 1, found {size}; leave empty batches out")
        exact = gradient.detach().double()
        powers = exact.new_tensor([1, size, size**2])
        moments = torch.cat([powers, (exact @ exact) * powers[1:]])[None]
        if len(self.sums) < self.groups:
            self.sums.append(exact[None] * size)
            self.moments.append(moments)
        else:
            place = (self.update_count - 1) % len(self.sums)
            self.sums[place] = self.sums[place].add(exact, alpha=size)
            self.moments[place] = self.moments[place] + moments

    def forward(self, gradient: Tensor, size: int) -> None:
        """Update; one batch alone has no statistics."""
        self.update(gradient, size)

    def compute(self) -> dict[str, Tensor]:
        """``gradient_norm``, ``gradient_bound`` (upper) and ``gradient_floor`` (lower) of |E g|, ``gradient_variance``.

        The variance is tr Cov of one sample's gradient. With two batches the bounds are infinite and zero, with one
        nothing is known (nan).

        Raises:
            SplitWatchError: nothing was taken.
        """
        if not len(self.sums):
            raise SplitWatchError("gradient: required at least one update, found none; call update first")
        sums, moments = dim_zero_cat(self.sums), dim_zero_cat(self.moments)
        batches, n, n2, one, two = moments.sum(0)
        total = sums.sum(0)
        square = total @ total
        estimate = (square - two) / (n**2 - n2)
        own = torch.stack([row @ row for row in sums])
        left = square - 2 * sums @ total + own - (two - moments[:, 4])
        left = left / ((n - moments[:, 1]) ** 2 - (n2 - moments[:, 2]))
        k = len(sums)
        spread = (left.var(correction=0) * (k - 1)).sqrt() if k > 2 else torch.full_like(square, torch.inf)
        return {
            "gradient_norm": estimate.clamp(min=0).sqrt(),
            "gradient_bound": (estimate.clamp(min=0) + _Z_95 * spread).sqrt(),
            "gradient_floor": (estimate - _Z_95 * spread).clamp(min=0).sqrt(),
            "gradient_variance": ((one - square / n) / (batches - 1)).clamp(min=0),
        }


class ProbeLoss(Metric):
    """Mean loss per sample, from the mean losses of batches of any sizes; two numbers are kept."""

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    loss: Tensor
    samples: Tensor

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        for name in ("loss", "samples"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor | float, size: int) -> None:
        """Take the mean loss of a batch, and the batch's number of samples."""
        self.loss = self.loss + torch.as_tensor(loss).detach().double() * size
        self.samples = self.samples + size

    def compute(self) -> Tensor:
        """The mean loss per sample, (); nan where there are no samples."""
        return self.loss / self.samples


class HeldOutQuotient(Metric):
    """Mean and confidence bounds of each neuron's values over samples, such as held-out Rayleigh quotients.

    Normal approximation over samples. Kept: the number of samples, m means and m sums of squares about them, merged
    without cancellation (Chan, Golub & LeVeque 1983).

    Args:
        confidence: of the interval, or of each bound by itself.
        two_sided: whether the two bounds make an interval of that confidence, or each has it by itself.

    Raises:
        SplitWatchError: a confidence outside of (0, 1).
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    moments: list[Tensor]

    def __init__(self, confidence: float = 0.95, two_sided: bool = True, **settings: object) -> None:
        super().__init__(**settings)
        if not 0 < confidence < 1:
            raise SplitWatchError(f"confidence: required a number between 0 and 1, found {confidence}; try 0.95")
        self.quantile = NormalDist().inv_cdf(0.5 + confidence / 2 if two_sided else confidence)
        self.add_state("moments", [], dist_reduce_fx="cat")  # (1, 3, m): samples, mean, squares about it

    def update(self, values: Tensor) -> None:
        """Take the values (n, m) of n samples for m neurons.

        Raises:
            SplitWatchError: values of another shape.
        """
        if values.ndim != 2:
            raise SplitWatchError(
                f"values: required shape (samples, neurons), found {tuple(values.shape)}; reshape them"
            )
        if len(values):
            self.moments = [_merged(torch.cat([*self.moments, column_moments(values.detach().double())[None]]))[None]]

    def compute(self) -> dict[str, Tensor]:
        """``mean``, ``lower`` and ``upper`` bound, each (m,), () for one neuron; those of a single sample are infinite.

        Raises:
            SplitWatchError: nothing was taken.
        """
        if not len(self.moments):
            raise SplitWatchError("values: required at least one sample, found none; call update first")
        n, mean, squares = _merged(dim_zero_cat(self.moments))
        error = self.quantile * standard_error(n, squares)
        return {"mean": mean, "lower": mean - error, "upper": mean + error}


def standard_error(n: Tensor, squares: Tensor) -> Tensor:
    """Standard error of a mean over n samples with that sum of squares about it; infinite for one sample."""
    return torch.where(n > 1, (squares / (n - 1).clamp(min=1) / n).sqrt(), torch.inf)


def column_moments(values: Tensor) -> Tensor:
    """Number, mean, and sum of squares about it, of each column of (n, m) values, (3, m)."""
    mean = values.mean(0)
    return torch.stack([torch.full_like(mean, len(values)), mean, (values - mean).square().sum(0)])


def _merged(moments: Tensor) -> Tensor:
    """The moments (3, m) of all samples from the moments (r, 3, m) of r disjoint sets of them."""
    n, mean, squares = moments.unbind(1)
    total = n.sum(0)
    centre = (n * mean).sum(0) / total
    return torch.stack([total, centre, squares.sum(0) + (n * (mean - centre).square()).sum(0)])
