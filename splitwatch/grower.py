"""The conductor for plain PyTorch loops: watch, measure, plan, grow, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import isfinite
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from splitwatch.arguments import as_sinks, check_given
from splitwatch.batches import Batch
from splitwatch.budget import GEOMETRY, TEST, Stages
from splitwatch.control import Control, control_for
from splitwatch.diagnosis import diagnosis
from splitwatch.events import GrowthEvent, light, packed, unpacked
from splitwatch.geometry.measure import measure_geometry
from splitwatch.growth.grow import grow, not_grown
from splitwatch.growth.optimizer import coupled_weight_decay
from splitwatch.growth.outcomes import outcomes
from splitwatch.growth.plan import plan_growth
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.replicas import bare, bare_optimizers, follow
from splitwatch.growth.shards import check_shards, whole
from splitwatch.layers import check_names, find_hidden_layers, select_layers
from splitwatch.probe import LossFunction, Probe
from splitwatch.ranks import is_first
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, SplitWatchError, UnfitPlanError
from splitwatch.rewarm import Rewarm
from splitwatch.watch.stationarity import as_now
from splitwatch.watcher import Watcher

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
        check_given(policy, probe, loss_fn)
        self.model, self.replica = bare(model)
        self.policy = policy or GrowthPolicy()
        check_names(self.model, self.policy.layers)
        self.monitor_only, self.sinks, self.progress = monitor_only, as_sinks(sinks), progress
        check_shards(self.model, grows=not monitor_only, control=bool(self.policy.control))
        self.watcher = Watcher(self.policy, loss_fn, probe, growing=not monitor_only)
        self.events: list[GrowthEvent] = []
        self.growths = 0
        self.training_loss = training_loss or loss_fn
        self.control: Control | None = None
        self.optimizers: list[Optimizer] = []
        self.rewarm: list[Rewarm] = []
        self.use(optimizer)

    def use(self, optimizer: Optimizer | Iterable[Optimizer]) -> None:
        """Go on with other optimizers than before, where a later phase of training makes its own.

        Raises:
            SplitWatchError: there is none, or one that growth cannot carry along.
        """
        given = bare_optimizers(optimizer)
        if not given and not self.monitor_only:
            raise SplitWatchError("optimizer: required one or more, found none; pass those that train the model")
        if [*map(id, given)] != [*map(id, self.optimizers)]:
            self.optimizers = given
            self.rewarm = [Rewarm(o, self.policy.rewarm) for o in given if self.policy.rewarm]

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
        return self.watcher.note(loss) or self.control is not None

    @property
    def patience(self) -> int:
        """Steps to the next one whose batch is to be looked at."""
        return 1 if self.control is not None else self.watcher.patience

    @property
    def steps(self) -> int:
        """Training steps so far."""
        return self.watcher.steps

    @property
    def pending(self) -> bool:
        """Whether a measurement is due."""
        return self.watcher.pending

    def look(self, batch: Batch, loss: Tensor | float) -> None:
        """Do what is to be done with the batch of the last step."""
        limit = self.policy.max_events
        wanted = limit is None or self.growths < limit
        self.watcher.look(batch, wanted=wanted, fit=isfinite(float(as_now(loss))))
        if self.control is not None:
            self._follow(self.control, batch, loss)

    def _follow(self, control: Control, batch: Batch, loss: Tensor | float) -> None:
        """Let the copy that did not grow make its step too, which counts neither as training nor as monitoring."""
        self.watcher.budget.enter()
        if not control.follow(batch, loss):
            self._drop_control()
        elif control.done:
            self._compare()
        self.watcher.budget.leave(charged=False)

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
        budget, kind, charged = self.watcher.budget, "", True
        self.watcher.pending = False
        budget.enter()
        try:
            with whole(self.model, () if self.monitor_only else self.optimizers):
                event = self._measure()
            kind, charged = GEOMETRY if GEOMETRY in event.seconds else TEST, not event.grown
            event = replace(event, step=self.steps, overhead=budget.overhead(charged=charged))
            self._take(event)
        finally:
            budget.leave(kind, charged=charged)
        return event

    def _take(self, event: GrowthEvent) -> None:
        """Remember an event, begin to watch afresh, tell the sinks."""
        self.growths += event.grown
        self.watcher.restart(event.verdict)
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
        probe = self.watcher.probe()
        with whole(self.model):
            layers, geometry = self._geometry(probe)
            return plan_growth(self.model, geometry, probe, self.policy, layers=layers)

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart, in builtins and tensors: a probe in the making too, unless it is large.

        Events are kept without geometry. Each process saves its own. A control goes on only where it is still there.
        """
        state = self.watcher.state_dict() | {"growths": self.growths}
        state["control"] = 0 if self.control is None else len(self.control.losses)
        state["rewarm"] = [item.state_dict()["done"] for item in self.rewarm]
        state["events"] = [packed(light(event)) for event in self.events]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; what was decided is done where the probe was saved too, or is given."""
        self.watcher.load_state_dict(state, next(self.model.parameters()).device)
        self.growths = state["growths"]
        self.events[:] = map(unpacked, state.get("events", ()))
        for item, done in zip(self.rewarm, state.get("rewarm", ()), strict=False):
            item.load_state_dict({"done": done})
        if (done := state.get("control", 0)) != (0 if self.control is None else len(self.control.losses)):
            self._drop_control()  # the one that is there, if any, is of another moment
            _logger.warning("a control is dropped: its copy, %d steps after growth, was not saved", done)

    def _geometry(self, probe: Probe) -> tuple[tuple[HiddenLayer, ...], dict[str, LayerGeometry]]:
        layers, given = select_layers(find_hidden_layers(self.model, probe), self.policy.layers), self.policy
        return layers, measure_geometry(self.model, probe, layers, wanted=given.max_neurons, max_bytes=given.max_bytes)

    def _measure(self) -> GrowthEvent:
        probe, stages = self.watcher.probe(), Stages(self.progress and is_first())
        try:
            with stages(TEST):
                verdict = self.watcher.test(self.model, probe)
            if reason := self.watcher.stopped(verdict):
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

    def _grown(self, plan: GrowthPlan, probe: Probe, stages: Stages, geometry: dict[str, LayerGeometry]) -> GrowthEvent:
        if plan and not self.monitor_only:
            self._compare()  # with what was not grown the last time
            steps = self.policy.control
            if steps:
                self.control = control_for(self.model, self.optimizers, self.training_loss, probe, steps)
            try:
                with stages("growth"):
                    parts = outcomes(self.model, plan, probe, geometry)
                    event = replace(grow(self.model, plan, self.optimizers, probe=probe), outcomes=parts)
            except UnfitPlanError as error:
                self._drop_control()
                _logger.warning("not grown: %s", error)
                return not_grown(self.model, replace(plan, moves=(), reason=f"not grown: {error}"))
            except BaseException:
                self._drop_control()
                raise
            if self.replica is not None:
                follow(self.replica)
            for item in self.rewarm:
                item.begin()
            return event
        return not_grown(self.model, plan)
