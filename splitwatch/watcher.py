"""When a measurement is due: losses judged in windows, a probe collected on the way, a budget of time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from splitwatch.batches import Batch, batch_size
from splitwatch.budget import GEOMETRY, TEST, Budget
from splitwatch.collect import ProbeCollector
from splitwatch.growth.policy import GrowthPolicy, imported
from splitwatch.probe import LossFunction, Probe
from splitwatch.ranks import everywhere, is_first, rank_count, summed_number
from splitwatch.records import SplitWatchError, StationarityVerdict
from splitwatch.watch.stationarity import BLOCKS, StationarityDetector

_COUNTS = ("steps", "batch_size")


class Watcher:
    """Takes note of training steps; ``pending`` says that a measurement is due.

    Args:
        policy: windows, tolerances, the probe's size and what monitoring may cost.
        loss_fn: the loss of a probe of collected batches.
        probe: fixed batches, where none are to be collected.
        growing: whether the run may grow.
    """

    def __init__(self, policy: GrowthPolicy, loss_fn: LossFunction, probe: Probe | None, *, growing: bool) -> None:
        own = None if policy.detector is None else imported("detector", policy.detector)
        self.detector = StationarityDetector(policy.window, policy.tolerance, policy.noise_ratio, own)
        self.collector = ProbeCollector(-(-policy.probe_samples // rank_count()))
        self.budget = Budget(policy.max_overhead, growing=growing)
        self.loss_fn, self.fixed_probe = loss_fn, probe
        self.verdict: StationarityVerdict | None = None
        self.steps = self.batch_size = 0
        self.pending = False

    def note(self, loss: Tensor | float) -> bool:
        """Count a step and keep its loss, all that most steps cost; returns whether its batch is to be looked at."""
        self.steps += 1
        return self.detector.note(loss) or self._collects

    @property
    def patience(self) -> int:
        """Steps to the next one whose batch is to be looked at."""
        return 1 if self._collects else self.detector.patience - len(self.detector.losses)

    @property
    def _collects(self) -> bool:
        """Whether every batch is wanted."""
        return not self._ready or not self.batch_size

    @property
    def _ready(self) -> bool:
        return self.fixed_probe is not None or self.collector.ready

    def look(self, batch: Batch, *, wanted: bool, fit: bool) -> None:
        """Do what is to be done with a step's batch; between two looks one clock runs, that of training.

        Args:
            batch: of the last step that was noted.
            wanted: whether anything would follow from a stationary point.
            fit: whether the batch may stand in a probe: not where its loss was not finite, and the step left out.
        """
        self.budget.enter()
        if self.fixed_probe is None and fit:
            self.collector.add(batch)
        self.batch_size = max(self.batch_size, batch_size(batch))
        if self.detector.complete and (verdict := self.detector.judge()):
            self.verdict = verdict
            suspected = wanted and verdict.kind == "suspected"
            self.pending = suspected and self._due()
            if suspected and self.budget.share is not None:  # while it has to wait anyway, it looks once a window
                self.detector.patience = self.detector.block * (1 if self.pending else BLOCKS)
        self.budget.leave()

    def _due(self) -> bool:
        """Whether every rank has a probe and there is time for what comes next."""
        return everywhere(self._ready and self._allowed(GEOMETRY if self.budget.saving else TEST))

    def _allowed(self, kind: str) -> bool:
        """Whether the budget allows a measurement; the clock of rank 0 decides."""
        samples = self.collector.samples if self.fixed_probe is None else self.fixed_probe.samples()
        return not is_first() or self.budget.allows(kind, samples / (self.batch_size * self.steps))

    def probe(self) -> Probe:
        """The batches to measure on.

        Raises:
            SplitWatchError: none was given and too few batches were seen to make one.
        """
        if self.fixed_probe is not None:
            return self.fixed_probe
        if not self.collector.batches:
            raise SplitWatchError("probe: required training batches, found none; call step first or pass a probe")
        return self.collector.probe(self.loss_fn)

    def test(self, model: nn.Module, probe: Probe) -> StationarityVerdict:
        """Whether the mean gradient on the probe is small against the noise of a training batch."""
        return self.detector.test(model, probe, int(summed_number(self.batch_size)))

    def stopped(self, verdict: StationarityVerdict) -> str:
        """Why a measurement ends with the gradient test, if it does."""
        stationary = verdict.kind == "stationary"
        self.budget.saving = stationary and not everywhere(self._allowed(GEOMETRY))
        if self.budget.saving:
            return "at a stationary point, but max_overhead does not allow to measure its geometry yet"
        return "" if stationary else f"not at a stationary point ({verdict.kind})"

    def restart(self, verdict: StationarityVerdict | None) -> None:
        """Watch afresh after a measurement, with the verdict it came to, if it came to one."""
        self.verdict = verdict or self.verdict
        self.detector.reset()
        self.collector.clear()

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart; a probe in the making too, unless it is large."""
        counts = {key: getattr(self, key) for key in (*_COUNTS, "pending")}
        return counts | {part: getattr(self, part).state_dict() for part in ("detector", "budget", "collector")}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a saved state; what was decided is done where the probe was saved too, or is given."""
        for key in _COUNTS:
            setattr(self, key, state[key])
        self.collector.load_state_dict(state.get("collector", {}), device)
        self.pending = bool(state["pending"]) and (self.fixed_probe is not None or bool(self.collector.batches))
        self.detector.load_state_dict(state["detector"])
        self.budget.load_state_dict(state["budget"])
