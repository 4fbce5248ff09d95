"""Notice that training stands at a stationary point: cheap on every step, thorough on suspicion.

Every step costs one number. Suspicion falls on a run whose loss no longer has a significant downward trend (or one too
small to matter). It is then tested on the probe whether the mean gradient is small against the noise of a single
training batch. That is an equivalence test: too few samples end in "undecided", never in "stationary".
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from splitwatch.metrics import GradientNoise
from splitwatch.probe import Probe
from splitwatch.ranks import mean_over_ranks
from splitwatch.records import SplitWatchError, StationarityVerdict

BLOCKS = 10
"""Block means a window is divided into; their scatter about the trend gives its error despite autocorrelation."""

_T_975 = 2.306  # Student's t, 97.5 %, BLOCKS - 2 degrees of freedom


class StationarityDetector:
    """Watches losses; tests gradients on request.

    Where several processes train together, each gives its own losses and probe, and all get the verdict on all of them;
    every rank has to call ``update`` and ``test`` as often as the others.

    Args:
        window: steps looked back over.
        tolerance: improvement over a window, relative to the loss scale, that counts as none.
        noise_ratio: the mean gradient counts as zero below this multiple of one training batch's gradient noise.
        suspects: judges the mean losses of the last ten blocks in place of their trend and ``tolerance``.
    """

    def __init__(
        self,
        window: int = 200,
        tolerance: float = 0.01,
        noise_ratio: float = 1.0,
        suspects: Callable[[tuple[float, ...]], bool] | None = None,
    ) -> None:
        if not (isinstance(window, Integral) and window >= BLOCKS):
            raise SplitWatchError(f"window: required a whole number of steps ≥ {BLOCKS}, found {window}; 200 is usual")
        self.block = window // BLOCKS
        self.tolerance, self.noise_ratio, self.suspects = tolerance, noise_ratio, suspects
        self.reset()

    def reset(self) -> None:
        """Forget everything seen; called after every measurement."""
        self.losses: list[Tensor | float] = []
        self.means: list[float] = []  # of the last blocks
        self.range = (math.inf, -math.inf)  # of all block means
        self.patience = self.block  # steps that are judged together

    def update(self, loss: Tensor | float) -> StationarityVerdict | None:
        """Take one training loss; a verdict ("moving", "suspected" or "undecided") at the end of every block."""
        return self.judge() if self.note(as_now(loss)) else None

    def note(self, loss: Tensor | float) -> bool:
        """Keep one training loss (``as_now``), all that most steps cost; returns whether it is time to judge them.

        A tensor's number is fetched with the others of its block: later, and on a device without waiting.
        """
        self.losses.append(loss)
        return self.complete

    @property
    def complete(self) -> bool:
        """Whether ``patience`` steps are to be judged."""
        return len(self.losses) >= self.patience

    def judge(self) -> StationarityVerdict | None:
        """The verdict at the end of the last complete block, once there are enough of them."""
        losses, verdict = _numbers(self.losses), None
        while len(losses) >= self.block:
            mean, losses = mean_over_ranks(_mean_of_most(losses[: self.block])), losses[self.block :]
            self.means = [*self.means[1 - BLOCKS :], mean]
            if math.isfinite(mean):
                self.range = (min(self.range[0], mean), max(self.range[1], mean))
            if len(losses) < self.block:
                verdict = self._judge()
        self.losses = [*losses]
        return verdict

    def _judge(self) -> StationarityVerdict | None:
        recent, current = self.means, self.means[-1]
        if not all(map(math.isfinite, recent)):
            return StationarityVerdict("undecided", "the training loss is not finite", current)
        if len(recent) < BLOCKS:
            return None
        trend, error = _trend(recent)
        if self.suspects is not None:
            kind, sees = ("suspected", "a") if self.suspects(tuple(recent)) else ("moving", "no")
            return StationarityVerdict(kind, f"your detector sees {sees} standstill", current, trend, error)
        scale = max(self.range[1] - self.range[0], _mean([abs(value) for value in recent]))
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
            batch_size: samples in one training batch, of all ranks together; they set the noise that counts.

        Raises:
            SplitWatchError: the loss is not finite.
        """
        measured = GradientNoise()
        for gradient, size in probe.gradients(model):
            measured.update(gradient, size)
        norm, bound, floor, variance = map(float, measured.compute().values())
        noise = (variance / batch_size) ** 0.5
        limit = self.noise_ratio * noise
        kind, reason = "undecided", "the probe is too small to tell its mean gradient from zero"
        if bound <= limit:
            kind, reason = "stationary", f"the mean gradient is below {self.noise_ratio:g} × one batch's noise"
        elif floor > limit:
            kind, reason = "moving", f"the mean gradient exceeds {self.noise_ratio:g} × one batch's noise"
        trend, error = _trend(self.means) if len(self.means) == BLOCKS else (math.nan, math.nan)
        loss = self.means[-1] if self.means else probe.loss(model)
        return StationarityVerdict(kind, reason, loss, trend, error, norm, bound, noise)

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, in builtins."""
        return {"losses": _numbers(self.losses), "means": list(self.means), "range": self.range}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.losses, self.means, self.range = list(state["losses"]), list(state["means"]), tuple(state["range"])


def as_now(loss: Tensor | float) -> Tensor | float:
    """A loss that keeps its value, where the next step writes into the same memory, and nothing of its graph."""
    if not isinstance(loss, Tensor):
        return loss
    return loss.item() if loss.is_cpu else loss.detach().clone()


def _numbers(losses: Sequence[Tensor | float]) -> list[float]:
    """The losses as numbers; those on a device are fetched together."""
    if not losses or not isinstance(losses[-1], Tensor) or losses[-1].is_cpu:
        return [loss.item() if isinstance(loss, Tensor) else float(loss) for loss in losses]
    fetched = iter(torch.stack([loss.reshape(()) for loss in losses if isinstance(loss, Tensor)]).tolist())
    return [next(fetched) if isinstance(loss, Tensor) else float(loss) for loss in losses]


def _mean_of_most(losses: Sequence[float]) -> float:
    """The mean of those that are finite, if most are: a few others are steps that training leaves out."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return _mean(finite if 2 * len(finite) > len(losses) else losses)


def _mean(values: Sequence[float]) -> float:
    """Exactly rounded, so that it does not depend on where a run was interrupted; nan if not all are finite."""
    return math.fsum(value / len(values) for value in values) if all(map(math.isfinite, values)) else math.nan


def _trend(means: Sequence[float]) -> tuple[float, float]:
    """Least-squares change over the whole window and its standard error."""
    n, mean = len(means), _mean(means)
    spread = n * (n * n - 1) / 12
    times, values = [t - (n - 1) / 2 for t in range(n)], [value - mean for value in means]
    slope = sum(map(operator.mul, times, values)) / spread
    scatter = [value - slope * t for t, value in zip(times, values, strict=True)]
    return slope * n, math.sqrt(sum(value * value for value in scatter) / (n - 2) / spread) * n
