"""Rows of the curvature benchmark and the clock behind them: CPU time, interleaved, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table; ``holds`` is None where nothing is claimed."""

    what: str
    measured: str
    bound: str = "–"
    holds: bool | None = None


@dataclass(frozen=True)
class Clock:
    """How often work is timed, and whether bounds on times are judged: a quick run is too short for that."""

    quick: bool

    @property
    def repeats(self) -> int:
        return 1 if self.quick else 5

    def medians(self, work: Mapping[str, Work], times: int = 1) -> dict[str, float]:
        """CPU seconds of each piece of work, taken in turns, ``times`` as many as usual, after one untimed turn."""
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(0 if self.quick else -1, times * self.repeats):
            for name, function in work.items():
                took = cpu_seconds(function)
                if turn >= 0:
                    seconds[name].append(took)
        return {name: median(values) for name, values in seconds.items()}

    def at_most(self, what: str, value: float, bound: float, unit: str, note: str = "") -> Row:
        return Row(what, f"{value:.3g} {unit}{note}", f"≤ {bound:g}", None if self.quick else value <= bound)

    def at_least(self, what: str, value: float, bound: float, unit: str, note: str = "") -> Row:
        return Row(what, f"{value:.3g} {unit}{note}", f"≥ {bound:g}", None if self.quick else value >= bound)

    def within(self, what: str, value: float, low: float, high: float, note: str = "") -> Row:
        holds = None if self.quick else low <= value <= high
        return Row(what, f"{value:.2f}{note}", f"{low:g} to {high:g}", holds)


def cpu_seconds(function: Work) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
