"""Learning-rate rewarming: after growth the steps of an optimizer begin small and grow back to what its scheduler says.

Old and new neurons are rows of one parameter and share its learning rate, so the whole optimizer warms up. The rate is
multiplied only while the optimizer makes its step: schedulers, many of which compute a rate from the one before, and
loggers see theirs. Decoupled weight decay is scaled with it, as with any learning rate.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, Final

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from splitwatch.records import SplitWatchError

START: Final = 0.1
"""The first factor, unless told otherwise."""


class Rewarm:
    """Scales the steps of an optimizer after ``begin``: the k-th (k = 0, 1, …) by start + (1 − start) k / steps.

        rewarm = Rewarm(optimizer, 200)
        grow(model, plan, optimizer)
        rewarm.begin()

    Any optimizer that has learning rates, any scheduler or none. Where ``GrowthPolicy(rewarm=…)`` says so, ``Grower``
    and ``SplitWatch`` do this themselves.

    Args:
        optimizer: its groups and state are left alone.
        steps: from the first one to the first that is not scaled any more.
        start: the factor of the first step.

    Raises:
        SplitWatchError: no steps, a factor outside of [0, 1], or an optimizer without learning rates.
    """

    def __init__(self, optimizer: Optimizer, steps: int, start: float = START) -> None:
        if not (isinstance(steps, Integral) and steps >= 1 and 0 <= start <= 1):
            raise SplitWatchError(
                f"steps, start: required whole steps ≥ 1 and 0 ≤ start ≤ 1, found {steps} and {start}; "
                "a hundred steps from a tenth are usual"
            )
        if not all("lr" in group for group in optimizer.param_groups):
            raise SplitWatchError("optimizer: required a learning rate in every group, found none; do not rewarm")
        self.optimizer, self.steps, self.start = optimizer, steps, start
        self.done = steps
        self._hooks: list[RemovableHandle] = []
        self._rates: list[Any] = []

    @property
    def factor(self) -> float:
        """What the learning rates of the next step are multiplied by."""
        return self.start + (1 - self.start) * min(self.done / self.steps, 1.0)

    def begin(self, done: int = 0) -> None:
        """Growth happened; ``done`` steps ago, where a saved run continues."""
        self._end()
        self.done = done
        if done < self.steps:  # hooks of others that were there before see the rates as they are
            one = self.optimizer
            self._hooks = [one.register_step_pre_hook(self._scale), one.register_step_post_hook(self._put_back)]
            self._hooks.append(one.register_state_dict_pre_hook(self._restore))

    def state_dict(self) -> dict[str, int | None]:
        """How far it is; None where it is idle, whatever ``steps`` are when it is loaded."""
        return {"done": self.done if self.done < self.steps else None}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Continue where it was."""
        done = state["done"]
        self.begin(self.steps if done is None else done)

    def _scale(self, *_: Any) -> None:
        self._restore()  # should the step before have failed, as before a checkpoint
        if self.done >= self.steps:  # hooks stay until the next growth: none may go while the optimizer calls them
            return
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor

    def _put_back(self, *_: Any) -> None:
        self._restore()
        self.done = min(self.done + 1, self.steps)

    def _restore(self, *_: Any) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []

    def _end(self) -> None:
        self._restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
