"""How much of the training time monitoring may take, by the clock.

The clock is ``time.perf_counter``. Training time runs from the end of one look at the run to the begin of the next, so
that everything the user does in between counts, and neither the time before the first step nor that between a saved run
and its resumption does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final

from tqdm import tqdm

TEST: Final = "gradient test"
GEOMETRY: Final = "geometry"
"""The two kinds of measurement: the test alone, and all that is done at a stationary point, the test included."""

PASSES, TESTS = 10, 40
"""What is expected before anything was measured: a test takes 10 times as long as training on the probe's samples, all
that is done at a stationary point 40 times as long as the test."""

CREDIT: Final = 60.0
"""Seconds of monitoring that a run which may grow has beyond its share, so that small networks grow at once."""

_logger = logging.getLogger("splitwatch")


class Budget:
    """Accounts of the time spent training and monitoring.

    A run that only monitors may begin a measurement where what was spent and what it is expected to cost stay within
    the share. One that may grow may begin as long as what was spent is within the share and the credit: it overdraws by
    one measurement at most, and a measurement that ends in growth is paid by the growth and not charged.

    Args:
        share: seconds of monitoring to a second of training; None sets no limit.
        growing: whether the run may grow.
    """

    def __init__(self, share: float | None, *, growing: bool) -> None:
        self.share, self.growing = share, growing
        self.training = self.spent = 0.0
        self.costs: dict[str, float] = {}
        self.saving = False  # for the geometry of a stationary point that was found
        self._told = False
        self._entered: float | None = None
        self._left: float | None = None

    def enter(self) -> None:
        """Monitoring begins."""
        now = self._entered = perf_counter()
        if self._left is not None:
            self.training += now - self._left
            self._left = None

    def leave(self, kind: str = "", *, charged: bool = True) -> None:
        """Monitoring ends; what it cost is remembered as the cost of that ``kind``, and spent if it is ``charged``."""
        now = self._left = perf_counter()
        cost = 0.0 if self._entered is None else now - self._entered
        self._entered = None
        if charged:
            self.spent += cost
        if kind:
            self.costs[kind] = cost

    @property
    def inside(self) -> float:
        """Seconds since monitoring began, zero outside of it."""
        return 0.0 if self._entered is None else perf_counter() - self._entered

    def overhead(self, *, charged: bool = True) -> float:
        """Seconds of monitoring to a second of training so far; nan before there was any training.

        What goes on counts if it is going to be ``charged``.
        """
        spent = self.spent + (self.inside if charged else 0.0)
        return spent / self.training if self.training else float("nan")

    def allows(self, kind: str, probe: float) -> bool:
        """Whether a measurement may begin, or one that has begun may go on to be one of that ``kind``.

        The first time that it may not, a warning is logged. ``probe`` is the number of samples in the probe relative to
        all that were trained on, for the estimate of what was never measured.
        """
        if self.share is None:
            return True
        expected, limit = self.expected(kind, probe), self.share * self.training
        begun = max(expected, self.inside)
        fits = self.spent <= limit + CREDIT if self.growing else self.spent + begun <= limit
        if not fits and not self._told:
            self._told = True
            wait = f"measuring ({kind}, about {expected:.2g} s) waits until max_overhead={self.share:g} affords it"
            _logger.warning("%s; max_overhead=None measures at once", wait)
        return fits

    def expected(self, kind: str, probe: float) -> float:
        """Seconds that a measurement takes: like the last of its kind, or estimated."""
        if kind == TEST:
            return self.costs.get(TEST, PASSES * probe * self.training)
        return self.costs.get(GEOMETRY, TESTS * self.costs.get(TEST, self.inside))  # which is asked after a first test

    def state_dict(self) -> dict[str, Any]:
        """The accounts, in builtins."""
        return {key: getattr(self, key) for key in ("training", "spent", "saving")} | {"costs": dict(self.costs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved accounts."""
        self.training, self.spent, self.saving = state["training"], state["spent"], state["saving"]
        self.costs = dict(state["costs"])


class Stages:
    """Times named stages and shows them on a progress bar."""

    def __init__(self, progress: bool) -> None:
        self.seconds: dict[str, float] = {}
        self.bar = tqdm(total=5, desc="splitwatch", leave=False, disable=None if progress else True)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One stage."""
        self.bar.set_postfix_str(name)
        start = perf_counter()
        yield
        self.seconds[name] = perf_counter() - start
        self.bar.update()

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()
