"""SplitWatch: the Lightning callback, a thin adapter from hooks to the ``Grower``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from splitwatch.arguments import as_sinks, check_given
from splitwatch.batches import Batch, Keepsake
from splitwatch.events import GrowthEvent
from splitwatch.grower import Grower, Sink
from splitwatch.growth.checkpoint import KEY, recall
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.lightning.neighbours import check_neighbours, grow_along, make_all_growable
from splitwatch.lightning.packages import CALLBACKS
from splitwatch.lightning.strategies import check_strategy, follow_growth
from splitwatch.lightning.training_step import check_control, check_training_step, training_loss, training_step_loss
from splitwatch.probe import LossFunction, Probe
from splitwatch.ranks import gathered, rank_count
from splitwatch.records import SplitWatchError
from splitwatch.report.board import TensorBoardSink
from splitwatch.report.loggers import writer_of
from splitwatch.report.scalars import event_scalars, size_scalars

if TYPE_CHECKING:
    import pytorch_lightning as pl

    Callback = pl.Callback
else:
    Callback = type("Callback", CALLBACKS, {"__module__": __name__})

_OWN = ("collector", "detector", "batch_size")
"""What differs between the growers of several processes."""


class SplitWatch(Callback):
    """Watches a Lightning run and widens the LightningModule where that helps; the module needs no change.

    Args:
        policy: budgets and schedule.
        monitor_only: measure and report, never grow.
        loss_fn: ``loss_fn(module, batch)`` returns the scalar mean loss; by default ``training_step`` is called, in
            eval mode and with its logging muted. Needed for manual optimization.
        sinks: called with every event, besides the Trainer's loggers.
        probe: fixed batches to measure on; by default they are collected from the training batches.

    The measurement is decided on at the end of a step and carried out before the next one begins, never between two
    accumulated batches. Lightning's own x-axis is used for everything that is logged.
    """

    state_key = "SplitWatch"  # pyright: ignore[reportAssignmentType]
    """Where its state is found in a checkpoint, also that of a subclass."""

    # Lightning calls and times every hook of every callback, also the empty ones, several times in a step; it passes
    # over those that are None.
    on_before_zero_grad = on_before_backward = None  # pyright: ignore[reportAssignmentType]
    on_after_backward = on_before_optimizer_step = None  # pyright: ignore[reportAssignmentType]
    on_train_batch_start = None  # pyright: ignore[reportAssignmentType] (while there is something to do, it is _act)

    def __init__(
        self,
        policy: GrowthPolicy | None = None,
        monitor_only: bool = False,
        loss_fn: LossFunction | None = None,
        sinks: Iterable[Sink] = (),
        probe: Probe | None = None,
    ) -> None:
        check_given(policy, probe, loss_fn or training_step_loss)
        self.policy, self.monitor_only, self.loss_fn = policy or GrowthPolicy(), monitor_only, loss_fn
        self.sinks, self.probe = as_sinks(sinks), probe
        self.grower: Grower | None = None
        self._saved: dict[str, Any] = {}
        self._step, self._losses, self._enough, self._given = -1, [], 1, Keepsake()
        self._boards: dict[int, TensorBoardSink] = {}

    @property
    def events(self) -> list[GrowthEvent]:
        """Everything that was measured so far in this run."""
        return [] if self.grower is None else self.grower.events

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let checkpoints of another width load; refuse what cannot work before training starts."""
        if stage == "fit":
            check_strategy(trainer, pl_module, grows=not self.monitor_only)
            check_neighbours(trainer, grows=not self.monitor_only)
        make_all_growable(trainer, pl_module)
        if stage == "fit" and self.loss_fn is None:
            check_training_step(pl_module)
        if stage == "fit" and self.policy.control:
            check_control(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch, or go on where the same Trainer fits the same module for longer."""
        if self.grower is not None and self.grower.model is pl_module and trainer.global_step and not self._saved:
            self._saved = self.state_dict()
        self.grower = Grower(
            pl_module,
            trainer.optimizers,
            self.loss_fn or training_step_loss,
            self.policy,
            monitor_only=self.monitor_only,
            sinks=[lambda event: self._log(trainer, event), *self.sinks],
            probe=self.probe,
            progress=trainer.progress_bar_callback is not None,
            training_loss=training_loss(trainer),
        )
        self._continue(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count steps from here, where no gradients are accumulated yet."""
        self._hand_over()
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Keep the loss of a step; most steps cost no more."""
        self._losses.append(outputs.get("loss") if outputs else None)
        if len(self._losses) >= self._enough:
            self._look(trainer, pl_module, self._given.taken(batch))
        elif len(self._losses) + 1 < self._enough:
            return
        self._arm()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the grower know of the last steps; loggers get the sizes once more, for charts that reach the end."""
        self._hand_over()
        grown = [event for event in self.events if event.grown]
        sizes = {tag: size for event in grown for tag, size in size_scalars(event).items()}
        for logger in trainer.loggers if sizes else ():
            logger.log_metrics(sizes, step=_step_of(trainer))

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> None:
        """Take note of all steps so far and look at the last, unless gradients are still being accumulated."""
        single = not module.automatic_optimization or trainer.accumulate_grad_batches > 1
        if self.grower is None or (single and trainer.global_step == self._step):
            self._losses.clear()
            return
        self._step, loss = trainer.global_step, self._losses[-1]
        if self._hand_over():
            self.grower.look(batch, loss)
        elif loss is None and not self.grower.steps:
            raise SplitWatchError("training_step: required a returned loss to watch, found None; return the loss")
        self._enough = 1 if single else self.grower.patience

    def _hand_over(self) -> bool:
        """Give the losses kept to the grower; returns whether the last one's batch is to be looked at."""
        due, losses = False, self._losses
        self._losses, self._enough = [], 1
        self._arm()
        for loss in losses:  # a module may choose to skip a batch: then it is None
            due = self.grower is not None and loss is not None and self.grower.note(loss)
        return due

    def _arm(self) -> None:
        """Have Lightning call a hook before the next step, if there is anything to do in it."""
        looks = len(self._losses) + 1 >= self._enough
        due = self.grower is not None and (looks or self.grower.pending or self._saved)
        self.on_train_batch_start: Any = self._act if due else None

    def _act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Measure and grow before the step begins, which may change its batch."""
        self._given.keep(batch)
        if self._saved:  # a finder, run between two epochs, has put everything back to where it began
            self._continue(trainer)
        if self.grower is None or batch_idx % trainer.accumulate_grad_batches:
            return
        self.grower.use(trainer.optimizers)  # a callback may have made others
        event = self.grower.act()
        self._enough = 1
        self._arm()
        if event is not None and event.grown:
            grow_along(trainer, event.plan)
            follow_growth(trainer)

    def _continue(self, trainer: pl.Trainer) -> None:
        """Take over a state that was loaded, if there is one, and count steps from here."""
        if self.grower is not None and self._saved:
            owned = self._saved.get("ranks", [])
            own = owned[trainer.global_rank] if len(owned) == trainer.world_size else {}
            self.grower.load_state_dict(self._saved | own)
        self._saved, self._step = {}, trainer.global_step
        self._losses, self._enough = [], 1
        self._arm()

    def state_dict(self) -> dict[str, Any]:
        """The grower's state, in builtins, with what each process has of its own; called on all, as Lightning does.

        What grew is in it too, for state dicts that lose their metadata. A state that was loaded and not taken over yet
        is handed on: a finder that runs before a resumed run saves and loads the callback's state once more.
        """
        if self.grower is None or self._saved:
            return dict(self._saved)
        self._hand_over()
        state = {**self.grower.state_dict(), KEY: recall(self.grower.model) or {}}
        own = {} if rank_count() == 1 else {"collector": {}, "ranks": gathered({key: state[key] for key in _OWN})}
        return state | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, or goes on."""
        self._saved = state_dict
        self._arm()

    def _log(self, trainer: pl.Trainer, event: GrowthEvent) -> None:
        """Scalars to other callbacks and every logger, figures and texts to loggers that can show them."""
        step, scalars = _step_of(trainer), event_scalars(event)
        if not trainer.barebones:
            trainer.lightning_module.log_dict(scalars, logger=False, on_step=True, on_epoch=False)
        for logger in trainer.loggers:
            if event.grown:
                logger.log_metrics(size_scalars(event, before=True), step=step - 1)
            logger.log_metrics(scalars, step=step)
            writer = writer_of(logger) if trainer.is_global_zero else None
            if writer is not None:
                self._boards.setdefault(id(logger), TensorBoardSink(writer, scalars=False))(event, step)


def _step_of(trainer: pl.Trainer) -> int:
    """The x-axis of what Lightning logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
