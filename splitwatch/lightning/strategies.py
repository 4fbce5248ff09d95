"""Several processes: which strategies a growing network can be trained with, and how DDP follows its growth.

Under ``ModelParallelStrategy`` the module shards itself, in ``configure_model``; how is looked at when training starts.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from splitwatch.growth.checkpoint import is_growable
from splitwatch.growth.replicas import follow
from splitwatch.records import SplitWatchError

SHARDED = {
    "DeepSpeedStrategy": "hands parameters and optimizer to an engine that keeps flat copies of them",
    "FSDPStrategy": "flattens parameters and shards them over the processes",
    "XLAFSDPStrategy": "flattens parameters and shards them over the processes",
}
"""Strategies by the names of their classes, which may not be installed, and what they do to parameters."""

FOLLOWED = {"DDPStrategy", "ModelParallelStrategy"}
"""Strategies of several processes that follow a network's growth."""


def check_strategy(trainer: Any, module: nn.Module, *, grows: bool) -> None:
    """Refuse before training starts what could not be measured, or could not follow a network that ``grows``.

    Raises:
        SplitWatchError: the strategy shards parameters, or the grown network could not come back from its processes.
    """
    strategy = trainer.strategy
    kinds = {kind.__name__ for kind in type(strategy).__mro__}
    name = type(strategy).__name__
    cure = 'use strategy="ddp", or splitwatch\'s checkpoints of a grown run to go on with this strategy without growth'
    for kind in kinds & SHARDED.keys():
        raise SplitWatchError(
            f"strategy: required one that holds every parameter whole on each process, such as DDP, found {name}, "
            f"which {SHARDED[kind]}; {cure}"
        )
    if trainer.world_size > 1 and not kinds & FOLLOWED:
        raise SplitWatchError(
            f"strategy: required DDP or ModelParallelStrategy for {trainer.world_size} processes, found {name}; {cure}"
        )
    if grows and getattr(strategy, "_model_averaging_period", None) is not None:
        raise SplitWatchError(
            "model_averaging_period: required None, found a period: between two averages the processes hold different "
            "networks, which would grow apart; leave it out"
        )
    returns = type(getattr(strategy, "launcher", None)).__name__ == "_MultiProcessingLauncher"
    if returns and grows and not is_growable(module):
        raise SplitWatchError(
            "model: required a growable one where processes are spawned or forked, since the main process loads what "
            "they trained, found one that is not; call splitwatch.make_growable(model) before fit"
        )


def follow_growth(trainer: Any) -> None:
    """Let DDP, where there is one, average the gradients of the new parameters; every rank has to call it."""
    strategy = trainer.strategy
    if isinstance(strategy.model, DistributedDataParallel):
        follow(strategy.model)
        strategy._pl_static_graph_delay_done = False
