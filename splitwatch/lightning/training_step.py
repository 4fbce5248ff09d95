"""A LightningModule's ``training_step`` as a loss of a module and a batch, with nothing logged."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from splitwatch.batches import Batch
from splitwatch.lightning.packages import package_of
from splitwatch.probe import LossFunction
from splitwatch.records import SplitWatchError

if TYPE_CHECKING:
    import pytorch_lightning as pl


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


def check_training_step(module: pl.LightningModule) -> None:
    """Refuse modules whose ``training_step`` cannot be called with a batch alone."""
    needed = "loss_fn: required {}, found None; pass SplitWatch(loss_fn=lambda module, batch: ...)"
    if not module.automatic_optimization:
        raise SplitWatchError(
            needed.format("for manual optimization, where training_step takes optimizer steps itself")
        )
    if "dataloader_iter" in _positional(module.training_step)[0]:
        raise SplitWatchError(needed.format("where training_step takes dataloader_iter, not a batch"))


def check_control(trainer: pl.Trainer, module: pl.LightningModule) -> None:
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


def training_loss(trainer: pl.Trainer) -> LossFunction:
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
