"""Run a model without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
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
