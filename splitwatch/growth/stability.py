"""New neurons begin no faster than the loss's curvature allows.

Adam divides its steps by the roots of second moments. Along a direction where the curvature, divided alike, is above
(2 + 2β₁) / ((1 − β₁) η), steps at the rate η swing out further each time; training comes near this limit by itself and
stays there (Cohen et al. 2022, Adaptive gradient methods at the edge of stability). New features add to the curvature
in outgoing weights at once: just after growth the loss can rise a hundredfold. Which second moments their outgoing
weights begin with is free, so those are taken that keep the curvature there below a share of the limit. They forget
this as they forget all gradients, in 1 / (1 − β₂) steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

from splitwatch.anatomy import flat
from splitwatch.geometry.eigen import extreme_eigenpairs
from splitwatch.geometry.narrow import LossCurvature
from splitwatch.growth.surgery import Replacement
from splitwatch.precision import in_full_precision
from splitwatch.probe import Probe
from splitwatch.ranks import largest_over_ranks

SHARE = 0.25
"""Of the limit; gradients' noise and the other weights need the rest."""

PRODUCTS = 4
"""So many steps of Lanczos' method find nine tenths of the largest curvature, and mostly all of it."""

KIN = (Adam, AdamW, NAdam, RAdam)
"""Optimizers with that limit; of others that keep ``exp_avg_sq`` the rate can mean anything."""


@in_full_precision
def steady(
    model: nn.Module, replacements: Iterable[Replacement], optimizers: Iterable[Optimizer], probe: Probe
) -> None:
    """Enlarge second moments of new outgoing weights until steps along them are stable.

    Nothing is done where the loss has no second derivative that could tell.

    Args:
        model: the network, grown.
        replacements: what growth put in place.
        optimizers: those of ``KIN`` are looked at.
        probe: its first batch is seen.

    Raises:
        OutOfMemoryError: what a step of the grown network needs, and half as much again, does not fit.
    """
    added = {id(item.new): item.added for item in replacements}
    weights = [weight for optimizer in optimizers for weight in _weights(optimizer, added)]
    if not weights:
        return
    try:
        excess = largest_over_ranks(_curvature(model, weights, probe)) / SHARE
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no second derivative, or one that is not finite
        return
    if excess > 1:
        for weight in weights:
            for moment in weight.moments:
                moment[weight.new] *= excess**2


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A consumer's weight, which entries are ``new``, and its second moments.

    ``lengths`` are steps per gradient; they are unstable where their product with the curvature is above one.
    """

    parameter: Tensor
    new: Tensor
    moments: tuple[Tensor, ...]
    lengths: Tensor


def _weights(optimizer: Optimizer, added: Mapping[int, Tensor]) -> Iterator[_Weight]:
    """Those with new entries of which the optimizer has second moments."""
    for group in optimizer.param_groups if isinstance(optimizer, KIN) else ():
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if id(parameter) not in added or not parameter.requires_grad or "exp_avg_sq" not in state:
                continue
            moments = tuple(state[key] for key in ("exp_avg_sq", "max_exp_avg_sq") if key in state)
            new = added[id(parameter)].to(parameter.device) & (moments[-1] > 0)
            lengths = _lengths(group, state["step"], moments[-1]) * new
            if bool(lengths.any()):
                yield _Weight(parameter, new, moments, lengths)


def _lengths(group: Mapping[str, Any], step: Any, moment: Tensor) -> Tensor:
    first, second = map(float, group["betas"])
    usual = (moment.double() / (1 - second ** float(step))).sqrt() + group["eps"]
    return float(group["lr"]) * (1 - first) / (2 + 2 * first) / usual


def _curvature(model: nn.Module, weights: Sequence[_Weight], probe: Probe) -> float:
    """The loss's largest curvature in new outgoing weights, in units of the limit."""
    first = copy(probe)
    first.fitted = probe.fitted[:1]
    loss = LossCurvature(model, first, [weight.parameter for weight in weights])
    scale = flat(weight.lengths.sqrt() for weight in weights).to(loss.dtype)
    found = extreme_eigenpairs(
        lambda vectors: scale * loss.product(scale * vectors, "fitted"),
        1,
        loss.n,
        dtype=loss.dtype,
        device=loss.device,
        ends="max",
        max_products=PRODUCTS,
    )
    return float(found.max_value)
