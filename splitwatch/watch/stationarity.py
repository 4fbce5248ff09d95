"""Notice that training stands at a stationary point: cheap on every step, thorough on suspicion.

Every step costs one number. Suspicion falls on a run whose loss no longer has a significant downward trend (or one too
small to matter). It is then tested on the probe whether the mean gradient is small against the noise of a single
training batch. That is an equivalence test: too few samples end in "undecided", never in "stationary".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from splitwatch.probe import Probe
from splitwatch.records import SplitWatchError, StationarityVerdict

BLOCKS = 10
"""Block means a window is divided into; their scatter about the trend gives its error despite autocorrelation."""

_T_975 = 2.306  # Student's t, 97.5 %, BLOCKS - 2 degrees of freedom
_Z_95 = 1.645


class StationarityDetector:
    """Watches losses; tests gradients on request.

    Args:
        window: steps looked back over.
        tolerance: improvement over a window, relative to the loss scale, that counts as none.
        noise_ratio: the mean gradient counts as zero below this multiple of one training batch's gradient noise.
    """

    def __init__(self, window: int = 200, tolerance: float = 0.01, noise_ratio: float = 1.0) -> None:
        if window < BLOCKS:
            raise SplitWatchError(f"window: required at least {BLOCKS} steps, found {window}")
        self.block = window // BLOCKS
        self.tolerance, self.noise_ratio = tolerance, noise_ratio
        self.reset()

    def reset(self) -> None:
        """Forget everything seen; called after every measurement."""
        self.losses: list[Tensor] = []
        self.means: list[float] = []

    def update(self, loss: Tensor | float) -> StationarityVerdict | None:
        """Take one training loss; a verdict ("moving", "suspected" or "undecided") at the end of every block."""
        self.losses.append(torch.as_tensor(loss).detach().reshape(()))
        if len(self.losses) < self.block:
            return None
        losses = [loss.to(self.losses[-1].device) for loss in self.losses]  # those of a loaded state are on the CPU
        self.means.append(float(torch.stack(losses).double().mean()))
        self.losses = []
        return self._judge()

    def _judge(self) -> StationarityVerdict | None:
        current = self.means[-1]
        recent = torch.tensor(self.means[-BLOCKS:], dtype=torch.float64)
        if not bool(recent.isfinite().all()):
            return StationarityVerdict("undecided", "the training loss is not finite", current)
        if len(recent) < BLOCKS:
            return None
        trend, error = _trend(recent)
        scale = max(max(self.means) - min(self.means), float(recent.abs().mean()))
        small = -trend + _T_975 * error <= self.tolerance * scale
        if small or trend + _T_975 * error > 0:
            size = "too small to matter" if small else "not significant"
            return StationarityVerdict("suspected", f"the loss trend is {size}", current, trend, error)
        return StationarityVerdict("moving", "the loss still falls", current, trend, error)

    def test(self, model: nn.Module, probe: Probe, batch_size: int) -> StationarityVerdict:
        """Whether the mean gradient on the probe is small against the gradient noise of one training batch.

        The squared norm of the mean gradient is estimated without bias by the U-statistic of the batch gradients.

        Args:
            model: the network, left as it was.
            probe: its batches give the gradients.
            batch_size: samples in one training batch, which set the noise that counts.

        Raises:
            SplitWatchError: the loss is not finite.
        """
        gradients, sizes = zip(*probe.gradients(model), strict=True)
        norm, bound, floor, variance = gradient_statistics(gradients, sizes)
        noise = (variance / batch_size) ** 0.5
        limit = self.noise_ratio * noise
        kind, reason = "undecided", "the probe is too small to tell its mean gradient from zero"
        if bound <= limit:
            kind, reason = "stationary", f"the mean gradient is below {self.noise_ratio:g} × one batch's noise"
        elif floor > limit:
            kind, reason = "moving", f"the mean gradient exceeds {self.noise_ratio:g} × one batch's noise"
        recent = torch.tensor(self.means[-BLOCKS:], dtype=torch.float64)
        trend, error = _trend(recent) if len(recent) == BLOCKS else (float("nan"), float("nan"))
        loss = self.means[-1] if self.means else probe.loss(model)
        return StationarityVerdict(kind, reason, loss, trend, error, norm, bound, noise)

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, in builtins."""
        return {"losses": [float(loss) for loss in self.losses], "means": list(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.losses = [torch.tensor(loss, dtype=torch.float64) for loss in state["losses"]]
        self.means = list(state["means"])


def _trend(means: Tensor) -> tuple[float, float]:
    """Least-squares change over the whole window and its standard error."""
    n = len(means)
    t = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    slope = (t @ means) / (t @ t)
    scatter = means - means.mean() - slope * t
    error = ((scatter @ scatter) / (n - 2) / (t @ t)).sqrt()
    return float(slope * n), float(error * n)


def gradient_statistics(gradients: Sequence[Tensor], sizes: Sequence[int]) -> tuple[float, float, float, float]:
    """From batch gradients g_i over n_i samples: |E g|, its upper and lower 95 % bounds, and tr Cov of one sample.

    |E g|² is estimated by Σ_{i≠j} n_i n_j ⟨g_i, g_j⟩ / Σ_{i≠j} n_i n_j, which is unbiased for any batch sizes; its
    standard error is that of the jackknife over batches, which errs on the large side where E g = 0.
    """
    stacked = torch.stack(list(gradients)).double()
    n = torch.tensor(sizes, dtype=torch.float64, device=stacked.device)
    gram = stacked @ stacked.T
    weights = torch.outer(n, n).fill_diagonal_(0)
    square = float((weights * gram).sum() / weights.sum())
    spread = _jackknife(weights * gram, weights)
    share = n / n.sum()
    centred = gram.diagonal() - 2 * gram @ share + share @ gram @ share
    variance = float((n * centred).sum() / (len(n) - 1))
    upper, lower = max(square, 0.0) + _Z_95 * spread, square - _Z_95 * spread
    return max(square, 0.0) ** 0.5, upper**0.5, max(lower, 0.0) ** 0.5, variance


def _jackknife(terms: Tensor, weights: Tensor) -> float:
    """Standard error of Σ terms / Σ weights over pairs of batches, leaving out one batch at a time."""
    n = len(terms)
    if n < 3:
        return float("inf")
    rest, mass = (pairs.sum() - pairs.sum(0) - pairs.sum(1) for pairs in (terms, weights))
    return float(((rest / mass).var(correction=0) * (n - 1)).sqrt())
