"""Run a model without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from splitwatch.precision import full_precision
from splitwatch.records import SplitWatchError


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, full precision and nothing compiled inside; everything outside is as before, to the bit.

    RNG state, modes, buffers, metric states and precision flags are put back.

    Raises:
        SplitWatchError: the parameters are on several devices, or hold no values.
    """
    check_parameters(model)
    with full_precision(model), torch.compiler.set_stance("force_eager"), _restored(model):
        yield


def check_parameters(model: nn.Module) -> None:
    """Refuse models that cannot be run as they are.

    Raises:
        SplitWatchError: the parameters are on several devices, hold no values, or are shards.
    """
    check_whole(model)
    where: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise SplitWatchError(
                f"model: required parameters with values, found {name} uninitialised; run the model on a batch first"
            )
        where.setdefault(str(parameter.device), name)
    if "meta" in where:
        raise SplitWatchError(
            f"model: required parameters with values, found {where['meta']} on the meta device; "
            "use model.to_empty(device=...) and load or initialise them first"
        )
    if len(where) > 1:
        found = ", ".join(f"{device} ({name})" for device, name in sorted(where.items()))
        raise SplitWatchError(
            f"model: required parameters on one device, found {found}; move the model to one with model.to(device)"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only its part of a tensor, as a ``DTensor``; that class is slow to import."""
    return hasattr(tensor, "full_tensor")


def check_whole(model: nn.Module) -> None:
    """Refuse models of which each process holds only a part.

    Raises:
        SplitWatchError: a parameter is a shard.
    """
    shard = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if shard is not None:
        raise SplitWatchError(
            f"model: required parameters that are whole, found {shard} sharded over processes; let Grower or "
            "SplitWatch measure and grow it, which gather it first"
        )


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; RNG state, modes, buffers and metric states outside are as before, to the bit."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    metrics = {module: _metric_state(module) for module in model.modules() if isinstance(module, Metric)}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for metric, state in metrics.items():
                vars(metric).update(state)
            with torch.no_grad():
                for buffer, version, value in buffers:
                    if buffer._version != version:
                        buffer.copy_(value)


def _metric_state(metric: Metric) -> dict[str, Any]:
    """Everything a metric's update and compute may change, copied."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        return list(value) if isinstance(value, list) else value

    fixed = {"_parameters", "_buffers", "_modules"}
    return {key: copied(value) for key, value in metric.__dict__.items() if key not in fixed}
