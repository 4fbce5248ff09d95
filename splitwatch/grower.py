"""The conductor for plain PyTorch loops: watch, measure, plan, grow, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from splitwatch.batches import Batch, batch_size
from splitwatch.budget import GEOMETRY, TEST, Budget, Stages
from splitwatch.collect import ProbeCollector
from splitwatch.control import Control, control_for
from splitwatch.diagnosis import diagnosis
from splitwatch.events import GrowthEvent, light, packed, unpacked
from splitwatch.geometry.measure import measure_geometry
from splitwatch.growth.grow import grow, not_grown
from splitwatch.growth.optimizer import coupled_weight_decay
from splitwatch.growth.outcomes import outcomes
from splitwatch.growth.plan import plan_growth
from splitwatch.growth.policy import GrowthPolicy, imported
from splitwatch.growth.replicas import bare, bare_optimizers, follow
from splitwatch.growth.shards import check_shards, whole
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.probe import LossFunction, Probe
from splitwatch.ranks import everywhere, is_first, rank_count, summed_number
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, SplitWatchError, StationarityVerdict
from splitwatch.rewarm import Rewarm
from splitwatch.watch.stationarity import BLOCKS, StationarityDetector, as_now

Sink = Callable[[GrowthEvent], object]

_logger = logging.getLogger("splitwatch")


class Grower:
    """Watches a training loop and widens the network where that helps.

        grower = Grower(model, optimizer, loss_fn)
        for batch in loader:
            ...  # the training step as it was
            grower.step(batch, loss)

    Args:
        model: the network; its modules stay, their parameters are replaced when it grows. What Fabric,
            DistributedDataParallel or fully_shard put around it follows; ``loss_fn`` is given the bare network.
        optimizer: the optimizer, or all of them.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss of a batch, not scaled; it may open autocast.
        policy: budgets and schedule.
        monitor_only: measure and report, never grow.
        sinks: called with every event.
        probe: fixed batches to measure on; by default they are collected from the training batches.
        progress: show a progress bar while measuring (on a terminal).
        training_loss: what training minimises, where that is not ``loss_fn``; a control is trained on it.

    ``events`` keeps what was measured; only the last event with geometry keeps its tensors, of those before it only the
    plans that were carried out do. Sinks get every event whole. Where several processes train together, each calls
    ``step`` on its own batches; what is decided rests on sums over all, so parameters stay the same on each.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        loss_fn: LossFunction,
        policy: GrowthPolicy | None = None,
        *,
        monitor_only: bool = False,
        sinks: Iterable[Sink] = (),
        probe: Probe | None = None,
        progress: bool = True,
        training_loss: LossFunction | None = None,
    ) -> None:
        self.model, self.replica = bare(model)
        self.optimizers = bare_optimizers(optimizer)
        self.loss_fn, self.policy = loss_fn, (given := policy or GrowthPolicy())
        self.monitor_only, self.sinks, self.progress = monitor_only, list(sinks), progress
        check_shards(self.model, grows=not monitor_only, control=bool(given.control))
        own = None if given.detector is None else imported("detector", given.detector)
        self.detector = StationarityDetector(given.window, given.tolerance, given.noise_ratio, own)
        self.collector = ProbeCollector(-(-self.policy.probe_samples // rank_count()))
        self.fixed_probe = probe
        self.verdict: StationarityVerdict | None = None
        self.events: list[GrowthEvent] = []
        self.steps = self.growths = self.batch_size = 0
        self.budget = Budget(self.policy.max_overhead, growing=not monitor_only)
        self.pending = False
        self.training_loss = training_loss or loss_fn
        self.control: Control | None = None
        self.rewarm = [Rewarm(o, self.policy.rewarm) for o in self.optimizers if self.policy.rewarm]

    def step(self, batch: Batch, loss: Tensor | float) -> GrowthEvent | None:
        """Take note of one training step, after ``optimizer.step()``; measure and grow where it is time to.

        With a ``GradScaler`` this comes after ``scaler.update()``, and ``loss`` is the loss itself, not the scaled one.

        Returns:
            What happened, or None where nothing was measured.
        """
        before = len(self.events)
        if self.observe(batch, loss):
            self.act()
        return self.events[-1] if len(self.events) > before else None

    def observe(self, batch: Batch, loss: Tensor | float) -> bool:
        """Take note of one training step; returns whether a measurement is due."""
        if self.note(as_now(loss)):
            self.look(batch, loss)
        return self.pending

    def note(self, loss: Tensor | float) -> bool:
        """Count a step and keep its loss, all that most steps cost; returns whether its batch is to be looked at."""
        self.steps += 1
        return self.detector.note(loss) or self._follows

    @property
    def patience(self) -> int:
        """Steps to the next one whose batch is to be looked at."""
        return 1 if self._follows else self.detector.patience - len(self.detector.losses)

    @property
    def _follows(self) -> bool:
        """Whether every batch is wanted."""
        collecting = self.fixed_probe is None and not self.collector.ready
        return collecting or self.control is not None or not self.batch_size

    def look(self, batch: Batch, loss: Tensor | float) -> None:
        """Do what is to be done with a step's batch; between two looks one clock runs, that of training."""
        self.budget.enter()
        if self.fixed_probe is None:
            self.collector.add(batch)
        self.batch_size = max(self.batch_size, batch_size(batch))
        if self.detector.complete and (verdict := self.detector.judge()):
            self.verdict = verdict
            limit = self.policy.max_events
            suspected = verdict.kind == "suspected" and (limit is None or self.growths < limit)
            self.pending = suspected and self._due()
            if suspected and self.budget.share is not None:  # while it has to wait anyway, it looks once a window
                self.detector.patience = self.detector.block * (1 if self.pending else BLOCKS)
        self.budget.leave()
        if self.control is not None:
            self._follow(self.control, batch, loss)

    def _follow(self, control: Control, batch: Batch, loss: Tensor | float) -> None:
        """Let the copy that did not grow make its step too, which counts neither as training nor as monitoring."""
        self.budget.enter()
        if not control.follow(batch, loss):
            self._drop_control()
        elif control.done:
            self._compare()
        self.budget.leave(charged=False)

    def _compare(self) -> None:
        """End the control with an event that tells whether growth paid."""
        if self.control is not None and self.control.losses:
            comparison = self.control.compare(self.model)
            event = not_grown(self.model, GrowthPlan((), (), str(comparison)))
            self._tell(replace(event, comparison=comparison, step=self.steps))
        self._drop_control()

    def _drop_control(self) -> None:
        if self.control is not None:
            self.control.close()
        self.control = None

    def act(self) -> GrowthEvent | None:
        """Do the measurement that is due, if any, and grow where it says so."""
        if not self.pending:
            return None
        self.pending, kind, charged = False, "", True
        self.budget.enter()
        try:
            with whole(self.model, () if self.monitor_only else self.optimizers):
                event = self._measure()
            kind, charged = GEOMETRY if GEOMETRY in event.seconds else TEST, not event.grown
            event = replace(event, step=self.steps, overhead=self.budget.overhead(charged=charged))
            self._take(event)
        finally:
            self.budget.leave(kind, charged=charged)
        return event

    def _take(self, event: GrowthEvent) -> None:
        """Remember an event, begin to watch afresh, tell the sinks."""
        self.verdict = event.verdict or self.verdict
        self.growths += event.grown
        self.detector.reset()
        self.collector.clear()
        self._tell(event)

    def _tell(self, event: GrowthEvent) -> None:
        self.events[:] = [light(old) if event.geometry else old for old in self.events] + [event]
        for sink in self.sinks:
            sink(event)

    def dry_run(self) -> GrowthPlan:
        """What growth would do now, whatever the detector says; nothing is changed.

        Raises:
            SplitWatchError: no probe was given and too few batches were seen to make one.
        """
        probe = self._probe()
        with whole(self.model):
            layers, geometry = self._geometry(probe)
            return plan_growth(self.model, geometry, probe, self.policy, layers=layers)

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart, in builtins and tensors: a probe in the making too, unless it is large.

        Events are kept without geometry. Each process saves its own. A control goes on only where it is still there.
        """
        counts = {key: getattr(self, key) for key in ("steps", "growths", "batch_size", "pending")}
        counts["control"] = 0 if self.control is None else len(self.control.losses)
        counts["rewarm"] = [item.done for item in self.rewarm]
        counts["events"] = [packed(light(event)) for event in self.events]
        parts = ("detector", "budget", "collector")
        return counts | {part: getattr(self, part).state_dict() for part in parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; what was decided is done where the probe was saved too, or is given."""
        for key in ("steps", "growths", "batch_size"):
            setattr(self, key, state[key])
        self.events[:] = map(unpacked, state.get("events", ()))
        self.collector.load_state_dict(state.get("collector", {}), next(self.model.parameters()).device)
        self.pending = bool(state["pending"]) and (self.fixed_probe is not None or bool(self.collector.batches))
        for item, done in zip(self.rewarm, state.get("rewarm", ()), strict=False):
            item.begin(done)
        if (done := state.get("control", 0)) != (0 if self.control is None else len(self.control.losses)):
            self._drop_control()  # the one that is there, if any, is of another moment
            _logger.warning("a control is dropped: its copy, %d steps after growth, was not saved", done)
        self.detector.load_state_dict(state["detector"])
        self.budget.load_state_dict(state["budget"])

    def _due(self) -> bool:
        """Whether every rank has a probe and there is time for what comes next."""
        ready = self.fixed_probe is not None or self.collector.ready
        return everywhere(ready and self._allowed(GEOMETRY if self.budget.saving else TEST))

    def _allowed(self, kind: str) -> bool:
        """Whether the budget allows a measurement; the clock of rank 0 decides."""
        samples = self.collector.samples if self.fixed_probe is None else self.fixed_probe.samples()
        return not is_first() or self.budget.allows(kind, samples / (self.batch_size * self.steps))

    def _probe(self) -> Probe:
        if self.fixed_probe is not None:
            return self.fixed_probe
        if not self.collector.batches:
            raise SplitWatchError("probe: required training batches, found none; call step first or pass a probe")
        return self.collector.probe(self.loss_fn)

    def _geometry(self, probe: Probe) -> tuple[tuple[HiddenLayer, ...], dict[str, LayerGeometry]]:
        layers, given = select_layers(find_hidden_layers(self.model, probe), self.policy.layers), self.policy
        return layers, measure_geometry(self.model, probe, layers, wanted=given.max_neurons, max_bytes=given.max_bytes)

    def _measure(self) -> GrowthEvent:
        probe, stages = self._probe(), Stages(self.progress and is_first())
        try:
            with stages(TEST):
                verdict = self.detector.test(self.model, probe, int(summed_number(self.batch_size)))
            if reason := self._stopped(verdict):
                event = not_grown(self.model, GrowthPlan((), (), reason))
                return replace(event, verdict=verdict, seconds=stages.seconds)
            with stages(GEOMETRY):
                layers, geometry = self._geometry(probe)
            with stages("plan"):
                plan = plan_growth(self.model, geometry, probe, self.policy, layers=layers)
            with stages("diagnosis"):
                decay = coupled_weight_decay(self.optimizers)
                found = diagnosis(self.model, probe, layers, geometry, plan, decay)
            event = self._grown(plan, probe, stages, geometry)
        finally:
            stages.close()
        found |= {"verdict": verdict, "geometry": geometry}
        return replace(event, **found, seconds=stages.seconds)

    def _stopped(self, verdict: StationarityVerdict) -> str:
        """Why a measurement ends with the gradient test, if it does."""
        stationary = verdict.kind == "stationary"
        self.budget.saving = stationary and not everywhere(self._allowed(GEOMETRY))
        if self.budget.saving:
            return "at a stationary point, but max_overhead does not allow to measure its geometry yet"
        return "" if stationary else f"not at a stationary point ({verdict.kind})"

    def _grown(self, plan: GrowthPlan, probe: Probe, stages: Stages, geometry: dict[str, LayerGeometry]) -> GrowthEvent:
        if plan and not self.monitor_only:
            self._compare()  # with what was not grown the last time
            steps = self.policy.control
            control = steps and control_for(self.model, self.optimizers, self.training_loss, probe, steps)
            with stages("growth"):
                parts = outcomes(self.model, plan, probe, geometry)
                event = replace(grow(self.model, plan, self.optimizers, probe=probe), outcomes=parts)
            if self.replica is not None:
                follow(self.replica)
            for item in self.rewarm:
                item.begin()
            self.control = control or None
            return event
        return not_grown(self.model, plan)
