"""What wraps a network that several processes train: the bare network below, and how the wrapper follows its growth.

``DistributedDataParallel`` averages the gradients of the parameters it found when it was made. With new parameters it
either fails at the next step or, with ``find_unused_parameters``, goes on and lets the ranks drift apart silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from splitwatch.records import SplitWatchError


def bare(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The network inside of what Fabric and DistributedDataParallel put around it, and the latter where it is there.

    Raises:
        SplitWatchError: the wrapper cannot follow a growing network.
    """
    found: Any = model
    replica = None
    while True:
        if isinstance(found, DistributedDataParallel):
            replica, found = found, found.module
        elif hasattr(found, "_fabric_module_initialized"):
            found = found._forward_module
        else:
            break
    if replica is not None:
        _check(replica)
    return found, replica


def bare_optimizers(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers themselves, not Fabric's wrappers.

    Raises:
        SplitWatchError: a rank holds only part of an optimizer's state, or something else is no optimizer.
    """
    given: list[Any] = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for optimizer in given:
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise SplitWatchError(
                "optimizer: required one whose state each process holds whole, found ZeroRedundancyOptimizer, which "
                "shards it by the parameters it was made with; use the optimizer that it wraps"
            )
    found = [getattr(optimizer, "optimizer", optimizer) for optimizer in given]
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise SplitWatchError(
                f"optimizer: required optimizers of torch.optim, found {optimizer!r} ({type(optimizer).__name__}); "
                "pass one, or a list of them"
            )
    return found


def _check(replica: DistributedDataParallel) -> None:
    stateful = [hook for hook, state in replica._comm_hooks if not isinstance(state, (ProcessGroup, type(None)))]
    if replica.mixed_precision is not None or replica._delay_all_reduce_params or stateful:
        found = "a communication hook with state" if stateful else "mixed_precision or delayed reduction"
        raise SplitWatchError(
            f"model: required a DistributedDataParallel that can be made anew when the network grows, found {found}; "
            "make it without, and use torch.autocast for mixed precision"
        )


def follow(replica: DistributedDataParallel) -> None:
    """Let the wrapper average the gradients of the network's present parameters; every rank has to call it.

    The wrapper stays the object it was, with all of its settings; what is made anew is the reducer inside.
    """
    replica._remove_autograd_hooks()
    parameters, sparse = replica._build_params_for_reducer()
    names = replica._build_debug_param_to_name_mapping(parameters)
    hooks, replica._comm_hooks = replica._comm_hooks, []
    replica._ddp_init_helper(parameters, sparse, names, replica.static_graph)
    replica._has_rebuilt_buckets = False
    for hook, state in hooks:
        replica.register_comm_hook(state, hook)
    if replica.static_graph:
        replica.static_graph = False  # or it would think that this was done already
        replica._set_static_graph()
