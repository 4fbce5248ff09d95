"""SplitWatch: the Lightning callback, a thin adapter from hooks to the ``Grower``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from splitwatch.batches import Batch, Keepsake
from splitwatch.events import GrowthEvent
from splitwatch.grower import Grower, Sink
from splitwatch.growth.checkpoint import KEY, recall
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.lightning.neighbours import check_neighbours, grow_along, make_all_growable
from splitwatch.lightning.packages import CALLBACKS, package_of
from splitwatch.lightning.strategies import check_strategy, follow_growth
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
        self.policy, self.monitor_only, self.loss_fn = policy or GrowthPolicy(), monitor_only, loss_fn
        self.sinks, self.probe = list(sinks), probe
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
            _check_training_step(pl_module)
        if stage == "fit" and self.policy.control:
            _check_control(trainer, pl_module)

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
            training_loss=_training_loss(trainer),
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
        """Let the grower know of the last steps."""
        self._hand_over()

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
        step, scalars = trainer.fit_loop.epoch_loop._batches_that_stepped, event_scalars(event)
        if not trainer.barebones:
            trainer.lightning_module.log_dict(scalars, logger=False, on_step=True, on_epoch=False)
        for logger in trainer.loggers:
            if event.grown:
                logger.log_metrics(size_scalars(event, before=True), step=step - 1)
            logger.log_metrics(scalars, step=step)
            writer = writer_of(logger) if trainer.is_global_zero else None
            if writer is not None:
                self._boards.setdefault(id(logger), TensorBoardSink(writer, scalars=False))(event, step)


def training_step_loss(module: nn.Module, batch: Batch) -> Tensor:
    """The loss that ``training_step`` returns for a batch, its logging muted.

    Raises:
        SplitWatchError: it returned no loss.
    """
    step: Any = module.training_step
    with _muted(module):
        output = step(batch, 0) if _takes_index(step) else step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        raise SplitWatchError("training_step: required a loss for every probe batch, found None; pass loss_fn instead")
    return loss


def _positional(step: Any) -> tuple[list[str], bool]:
    """Names of what ``training_step`` takes by position after ``self``, and whether it takes any number."""
    found = inspect.getfullargspec(getattr(step, "__wrapped__", step))
    return found.args[1:], found.varargs is not None


def _takes_index(step: Any) -> bool:
    """Whether ``training_step`` is called with an index behind the batch; Lightning decides in the same way."""
    names, any_number = _positional(step)
    return any_number or len(names) > 1 or "batch_idx" in names


def _check_training_step(module: pl.LightningModule) -> None:
    """Refuse modules whose ``training_step`` cannot be called with a batch alone."""
    needed = "loss_fn: required {}, found None; pass SplitWatch(loss_fn=lambda module, batch: ...)"
    if not module.automatic_optimization:
        raise SplitWatchError(
            needed.format("for manual optimization, where training_step takes optimizer steps itself")
        )
    if "dataloader_iter" in _positional(module.training_step)[0]:
        raise SplitWatchError(needed.format("where training_step takes dataloader_iter, not a batch"))


def _check_control(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse a control where its steps would not be those of the run."""
    steps = "a step of the control is one gradient of one batch"
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    for name, good, found in (
        ("automatic_optimization", True, module.automatic_optimization),
        ("accumulate_grad_batches", 1, trainer.accumulate_grad_batches),
        ("gradient_clip_val", "None or 0", trainer.gradient_clip_val or "None or 0"),
        ("precision", "no gradient scaler", "one" if scaler else "no gradient scaler"),
    ):
        if found != good:
            raise SplitWatchError(
                f"control: required {name} {good}, found {found}; {steps}: leave control out of the policy"
            )


def _training_loss(trainer: pl.Trainer) -> LossFunction:
    """``training_step`` as the Trainer calls it, its logging muted."""

    def loss(module: Any, batch: Batch) -> Tensor:
        if module._trainer is None:  # a copy has none
            module.trainer = trainer
        with trainer.precision_plugin.train_step_context():
            return training_step_loss(module, batch)

    return loss


@contextmanager
def _muted(module: nn.Module) -> Iterator[None]:
    """Logging calls of the module do nothing inside, nor do the loggers it finds at its Trainer."""
    names = ("log", "log_dict")
    trainer: Any = getattr(module, "_trainer", None)
    loggers = getattr(trainer, "loggers", [])
    for name in names:
        module.__dict__[name] = lambda *args, **kwargs: None
    try:
        if loggers:
            dummy = package_of(trainer).loggers.logger.DummyLogger
            trainer.loggers = [dummy() for _ in loggers]
        yield
    finally:
        for name in names:
            del module.__dict__[name]
        if loggers:
            trainer.loggers = loggers
