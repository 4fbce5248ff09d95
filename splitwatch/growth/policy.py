"""What may grow, how much, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitwatch.geometry.sweep import MAX_BYTES
from splitwatch.records import SplitWatchError


@dataclass(frozen=True)
class GrowthPolicy:
    """Budgets and schedule of growth; every field can stand in a YAML file.

    Args:
        layers: names of the hidden layers that may grow; all that can be widened by default.
        max_neurons: new neurons in one event.
        max_parameters: parameters of the network after growth.
        max_ratio: parameters after one event over parameters before it.
        max_events: growth events in one run.
        coefficients: "auto" splits equally, and by signed coefficients where equal ones let no neuron descend; "equal",
            "signed"; or the coefficients themselves, k numbers that sum to 1.
        moves: "splits" of neurons; "sprouts", new neurons found by residual pursuit; or "mixed", splits, as many
            sprouts, or half of each, whichever decreases the loss most on the held-out half. Several processes agree on
            splits only so far.
        cap: bound on Σ|λ| of signed coefficients; long negative coefficients lead to ever sharper regions.
        window: training steps the detector looks back over; also the least distance between two measurements.
        tolerance: improvement over a window, relative to the loss scale, that still counts as none.
        noise_ratio: a mean gradient counts as zero below this multiple of one training batch's gradient noise.
        probe_samples: training samples the probe collects when none is given, on all processes together.
        max_overhead: seconds that monitoring may take to a second of training, by the clock; None sets no limit. A
            measurement is postponed until what was spent and what it is expected to cost fit, so the steps at which a
            run is measured depend on timing: pass None where they have to be reproducible, and for small networks,
            where a measurement takes as long as thousands of steps. A measurement that ends in growth does not count,
            and a run that may grow is held back only after a minute of measurements that came to nothing.
        max_bytes: memory that a measurement may keep beside the model's own forward and backward pass on one batch, and
            half of it again for the solver's vectors; what does not fit is computed again instead.
    """

    layers: Sequence[str] | None = None
    max_neurons: int | None = None
    max_parameters: int | None = None
    max_ratio: float | None = 2.0
    max_events: int | None = None
    coefficients: str | Sequence[float] = "auto"
    moves: str = "mixed"
    cap: float = 3.0
    window: int = 200
    tolerance: float = 0.01
    noise_ratio: float = 1.0
    probe_samples: int = 4096
    max_overhead: float | None = 0.01
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        limits = (
            "max_neurons",
            "max_parameters",
            "max_ratio",
            "max_events",
            "tolerance",
            "noise_ratio",
            "max_overhead",
        )
        for name in limits:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise SplitWatchError(f"{name}: required a number ≥ 0 or None, found {value}")
        if isinstance(self.coefficients, str) and self.coefficients not in {"auto", "equal", "signed"}:
            raise SplitWatchError(
                f'coefficients: required "auto", "equal", "signed" or numbers, found {self.coefficients!r}'
            )
        if self.moves not in {"splits", "sprouts", "mixed"}:
            raise SplitWatchError(f'moves: required "splits", "sprouts" or "mixed", found {self.moves!r}')
        if not self.cap > 1:
            raise SplitWatchError(f"cap: required Σ|λ| > 1 (1 leaves no negative coefficient), found {self.cap}")
        for name, least in (("window", 10), ("probe_samples", 2), ("max_bytes", 1)):
            if getattr(self, name) < least:
                raise SplitWatchError(f"{name}: required at least {least}, found {getattr(self, name)}")
