"""Other callbacks and schedulers of a run that grows: averaged copies grow too, patience starts afresh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from splitwatch.growth.checkpoint import make_growable, stored_history, told_history
from splitwatch.growth.grow import grow
from splitwatch.lightning.packages import package_of
from splitwatch.records import GrowthPlan, SplitWatchError


class Loading:
    """The growth in the checkpoint that a Trainer is loading; does not drag the Trainer into copies of the module.

    A state dict that is rebuilt loses what it says of growth. WeightAveraging does so and keeps the module's own under
    another name; where modules do (``on_save_checkpoint``), the state of SplitWatch tells.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __call__(self) -> Mapping[str, Any]:
        """The growth by layer, empty where none is recorded."""
        checkpoint = self.trainer._checkpoint_connector._loaded_checkpoint or {}
        return stored_history(checkpoint.get("current_model_state", {})) or told_history(checkpoint)

    def __deepcopy__(self, _memo: Any) -> Loading:
        return self

    def __reduce__(self) -> tuple:
        return partial, (dict,)


def check_neighbours(trainer: Any, *, grows: bool) -> None:
    """Refuse a callback that a network which ``grows`` would be at odds with.

    Raises:
        SplitWatchError: ModelPruning is there.
    """
    pruning = package_of(trainer).callbacks.ModelPruning
    for callback in trainer.callbacks:
        if grows and isinstance(callback, pruning):
            raise SplitWatchError(
                f"callbacks: required none that prunes a network which grows, found {type(callback).__name__}: its "
                "masks and its copies of the first weights keep the widths they were made with, and masked layers "
                "cannot be widened; prune in a run of its own, from a checkpoint of the grown network, or use "
                "SplitWatch(monitor_only=True)"
            )


def averaged_copies(trainer: Any) -> Iterator[nn.Module]:
    """The copies of the module that SWA, WeightAveraging and their kin keep."""
    for callback in trainer.callbacks:
        copy = getattr(callback, "_average_model", None)
        if isinstance(copy, nn.Module):
            yield getattr(copy, "module", copy)


def make_all_growable(trainer: Any, module: nn.Module) -> None:
    """Let the module and its copies load checkpoints of another width."""
    for each in (module, *averaged_copies(trainer)):
        make_growable(each).elsewhere = Loading(trainer)


def grow_along(trainer: Any, plan: GrowthPlan) -> None:
    """Widen the averaged copies by the same plan, and start anew what counts steps without improvement."""
    for copy in averaged_copies(trainer):
        grow(copy, plan)
    early_stopping = package_of(trainer).callbacks.EarlyStopping
    for callback in trainer.callbacks:
        if isinstance(callback, early_stopping):
            callback.wait_count = 0  # the best score stays
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.num_bad_epochs = 0
