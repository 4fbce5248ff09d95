"""BatchNorm statistics of new neurons: those of their own pre-activations, without changing what the network computes.

A copy begins with its source's running mean μ and variance σ², a sprout with 0 and the mean of the variances, which
scales it about as if it were normalised; all that is predicted and tried out, in eval mode, rests on them. In training
mode BatchNorm uses the copy's own statistics at once, in eval mode after some hundred steps. So both are measured on
the probe, μ' and σ'², and put in place together with

    γ' = γ √(σ'² + ε) / √(σ² + ε),    β' = β + γ (μ' − μ) / √(σ² + ε),

which leaves γ (z − μ) / √(σ² + ε) + β what it was, and makes training mode compute the same. Without γ and β there is
no such choice: then training mode's function, which is the one that is going to be trained, wins. Where several
processes keep running statistics each of their own, μ and σ² are the means over them: weights stay the same on all.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from splitwatch.growth.widening import submodule, widenings
from splitwatch.probe import Probe
from splitwatch.ranks import rank_count, summed
from splitwatch.records import GrowthPlan


def moved_channels(model: nn.Module, plan: GrowthPlan) -> dict[str, Tensor]:
    """The channels of every BatchNorm whose incoming weights a plan moves, by the module's name, before it is done."""
    found: dict[str, Tensor] = {}
    for widening in widenings(model, plan):
        moved = (widening.source < 0) | (widening.in_offset.abs().amax(1) > 0).cpu()
        for name in widening.layer.riders:
            module = submodule(model, name)
            if isinstance(module, _BatchNorm) and module.running_mean is not None and bool(moved.any()):
                found[name] = moved.nonzero()[:, 0]
    return found


def renew_statistics(model: nn.Module, channels: Mapping[str, Tensor], probe: Probe) -> None:
    """Measure the running statistics of some channels on the whole probe, each sample and position counting alike.

    All other entries, and the number of batches seen, stay as they are.

    Args:
        model: the network, grown.
        channels: of BatchNorm modules, by name.
        probe: in eval mode, as everywhere.
    """
    if not channels:
        return
    modules: dict[str, Any] = {name: submodule(model, name) for name in channels}
    sums = {name: torch.zeros(3, len(where), dtype=torch.float64) for name, where in channels.items()}
    before = {name: _running(modules[name], where) for name, where in channels.items()}

    def add(name: str, _: Any, inputs: tuple[Tensor, ...]) -> None:
        where = channels[name].to(inputs[0].device)
        seen = inputs[0].detach().index_select(1, where).movedim(1, -1).flatten(0, -2).double()
        seen = seen - before[name][0]
        sums[name] += torch.stack([torch.ones_like(seen).sum(0), seen.sum(0), seen.square().sum(0)]).cpu()

    hooks = []
    try:
        hooks.extend(module.register_forward_pre_hook(partial(add, name)) for name, module in modules.items())
        probe.loss(model, finite=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, module in modules.items():
        n, first, second = summed(sums[name].to(module.running_mean.device))
        moments = torch.stack([first / n, (second - first.square() / n) / (n - 1)])
        _put(module, channels[name].to(n.device), before[name], moments)


def _running(module: Any, where: Tensor) -> Tensor:
    """Running means and variances of some channels, averaged over ranks, (2, channels)."""
    where = where.to(module.running_mean.device)
    return summed(torch.stack([module.running_mean[where], module.running_var[where]]).double()) / rank_count()


@torch.no_grad()
def _put(module: Any, where: Tensor, before: Tensor, moments: Tensor) -> None:
    """New statistics of some channels, with the weights that make up for them: the mean's shift, and the variance."""
    sure = moments.isfinite().all(0)  # one sample alone has no variance
    where, (mean, spread), (shift, variance) = where[sure], before[:, sure], moments[:, sure]
    old = (spread + module.eps).sqrt()
    if module.weight is not None:
        weight = module.weight[where].double()
        module.weight[where] = (weight * (variance + module.eps).sqrt() / old).to(module.weight)
        module.bias[where] += (weight * shift / old).to(module.bias)
    module.running_mean[where] = (mean + shift).to(module.running_mean)
    module.running_var[where] = variance.to(module.running_var)
