"""New neurons begin no faster than the loss's curvature allows.

Adam and its kin divide their steps by the roots of second moments. Along a direction where the curvature, divided
alike, is above a limit, for Adam (2 + 2β₁) / ((1 − β₁) η), steps at the rate η swing out further each time; training
comes near it by itself and stays there (Cohen et al. 2022, Adaptive gradient methods at the edge of stability). New
features add to the curvature in outgoing weights at once: just after growth the loss can rise a hundredfold. Which
second moments their outgoing weights begin with is free, so those are taken that keep the curvature there below a share
of the limit. They shrink like all others, in old age to a third in 1 / (1 − β₂) steps, towards what gradients then are.

Curvature comes from differences of gradients, for each of which a forward and a part of a backward pass is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from splitwatch.geometry.eigen import extreme_eigenpairs
from splitwatch.growth.surgery import Replacement
from splitwatch.precision import HALF, in_full_precision
from splitwatch.probe import Probe
from splitwatch.records import SplitWatchError

SHARE = 0.25
"""Of the limit; gradients' noise and the other weights need the rest."""

PRODUCTS = 3
"""Steps of Lanczos' method: so many find most of the largest curvature, three quarters at least in ten tasks."""

MOST = 30.0
"""By how much steps become shorter at most: where more is wanted the old weights are far beyond the limit too."""

REACH = 0.01
"""How far weights go for a difference of gradients, relative to the consumers' weights."""


_Group = Mapping[str, Any]


def _adam(group: _Group, step: float) -> tuple[float, float, float]:
    first, second = map(float, group["betas"])
    return (1 - first) / (2 + 2 * first), 1 - second**step, group["eps"]


def _nadam(group: _Group, step: float) -> tuple[float, float, float]:
    """With Nesterov's momentum, which grows with time (Dozat 2016)."""
    first, decay = float(group["betas"][0]), group["momentum_decay"]
    now, then = (first * (1 - 0.5 * 0.96 ** (time * decay)) for time in (step + 1, step + 2))
    return ((1 - now) * (1 + first) + then * (1 - first)) / (2 + 2 * first), *_adam(group, step)[1:]


def _radam(group: _Group, step: float) -> tuple[float, float, float]:
    """Rectified while few gradients were seen; before that steps are not divided (Liu et al. 2020)."""
    (stride, correction, eps), second = _adam(group, step), float(group["betas"][1])
    most = 2 / (1 - second) - 1
    seen = most - 2 * (step + 1) * second ** (step + 1) / (1 - second ** (step + 1))
    rectified = ((seen - 4) * (seen - 2) * most / ((most - 4) * (most - 2) * seen)) ** 0.5 if seen > 5 else 0.0
    return stride * rectified, correction, eps / correction**0.5


def _rmsprop(group: _Group, step: float) -> tuple[float, float, float]:
    """With heavy-ball momentum, and second moments that are not corrected; centred, it divides by something else."""
    correction = 1 - group["alpha"] ** step
    stride = 0.0 if group["centered"] else 1 / (2 + 2 * group["momentum"])
    return stride / correction**0.5, correction, group["eps"] / correction**0.5


_KINDS: dict[type[Optimizer], tuple[str, Callable[[_Group, float], tuple[float, float, float]]]] = {
    Adam: ("exp_avg_sq", _adam),
    AdamW: ("exp_avg_sq", _adam),
    NAdam: ("exp_avg_sq", _nadam),
    RAdam: ("exp_avg_sq", _radam),
    RMSprop: ("square_avg", _rmsprop),
}
"""Where an optimizer's second moments v are, and a function of a group and of how many steps were made. It returns one
over the limit at the rate 1 (0 where second moments set none), the correction c of a young v, and ε, for steps that are
divided by √(v/c) + ε. Limits are those of the linear recurrence that steps on a parabola are."""


@in_full_precision
def steady(
    model: nn.Module, replacements: Sequence[Replacement], optimizers: Iterable[Optimizer], probe: Probe
) -> None:
    """Enlarge second moments of new outgoing weights until steps along them are stable.

    Args:
        model: the network, grown.
        replacements: what growth put in place.
        optimizers: Adam, AdamW, NAdam, RAdam and RMSprop are looked at, but for ``amsgrad``, which would not forget,
            half precision, which rounds forgetting away, and a centred RMSprop. Others have other limits, or rates
            that mean something else.
        probe: its first batch is seen.
    """
    weights = [weight for optimizer in optimizers for weight in _weights(optimizer, replacements)]
    if not weights:
        return
    try:
        excess = _curvature(model, weights, probe) / SHARE
    except SplitWatchError:  # a loss that is not finite, or inference mode: others judge these
        return
    if excess > 1:
        for weight in weights:
            weight.slow_down(min(excess, MOST))


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A consumer's weight with its second moments, and which of its entries are ``new``.

    Steps are divided by √(moment / correction) + eps; ``stride`` is one over the limit.
    """

    parameter: Tensor
    moment: Tensor
    new: Tensor
    correction: float
    eps: float
    stride: float

    @property
    def sizes(self) -> Tensor:
        """How large gradients are as far as the optimizer remembers, in the weight's shape."""
        return (self.moment / self.correction).sqrt()

    @property
    def root(self) -> Tensor:
        """What steps along new entries are divided by, flat."""
        return self.sizes[self.new] + self.eps

    def slow_down(self, factor: float) -> None:
        """Make steps along new entries shorter."""
        self.moment[self.new] = (self.root * factor - self.eps).square() * self.correction


def _weights(optimizer: Optimizer, replacements: Sequence[Replacement]) -> Iterator[_Weight]:
    """Those that have new entries with second moments."""
    key, rule = next((told for kind, told in _KINDS.items() if isinstance(optimizer, kind)), ("", None))
    if rule is None:
        return
    replaced = {id(item.new): item for item in replacements}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if id(parameter) not in replaced or not parameter.requires_grad or not state.keys() >= {key, "step"}:
                continue
            moment = state[key].detach()
            new = replaced[id(parameter)].added.to(moment.device) & (moment > 0)
            if group.get("amsgrad") or moment.dtype in HALF or not (state["step"] > 0 and new.any()):
                continue
            try:
                stride, correction, eps = rule(group, float(state["step"]))
            except KeyError:  # a subclass whose steps are other ones
                continue
            if stride * group["lr"] > 0:
                yield _Weight(parameter, moment, new, correction, eps, stride * float(group["lr"]))


def _curvature(model: nn.Module, weights: Sequence[_Weight], probe: Probe) -> float:
    """The loss's largest curvature in new outgoing weights, in units of the limit.

    The optimizer may have seen another loss than the probe's: scaled, or with clipped gradients. Where these are larger
    here than it remembers, its second moments are taken to be in other units by as much.
    """
    parameters = [weight.parameter for weight in weights]
    here = probe.slope(model, parameters)
    new = torch.cat([weight.new.flatten() for weight in weights]).to(here.device)
    remembered = torch.cat([weight.sizes.flatten() for weight in weights]).to(here)
    units = max(float(here[~new].norm() / remembered[~new].norm()), 1.0)
    scale = torch.cat([(weight.stride / weight.root).sqrt() for weight in weights]).to(here)
    reach = REACH * float(torch.cat([parameter.detach().flatten() for parameter in parameters]).norm())

    def product(vectors: Tensor) -> Tensor:
        along = scale * vectors[0]
        step = reach / along.norm()
        with _moved(weights, step * along):
            there = probe.slope(model, parameters)
        return (scale * (there - here)[new] / step)[None]

    size = {"dtype": here.dtype, "device": here.device}
    found = extreme_eigenpairs(product, 1, len(scale), **size, ends="max", max_products=PRODUCTS)
    return float(found.max_value) / units


@contextmanager
def _moved(weights: Sequence[_Weight], change: Tensor) -> Iterator[None]:
    """New outgoing weights changed for the duration of a block."""
    kept = [weight.parameter.data for weight in weights]
    try:
        for weight, data, part in zip(weights, kept, change.split([int(w.new.sum()) for w in weights]), strict=True):
            weight.parameter.data = data.clone()
            weight.parameter.data[weight.new.to(data.device)] += part.to(data)
        yield
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.parameter.data = data
