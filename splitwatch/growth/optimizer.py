"""Carry optimizer state across a change of shapes.

The optimizer object and its parameter groups stay (schedulers hold references to both); parameters are exchanged by
identity. A split scales gradients, ∂L/∂w_j = λ_j ∂L/∂w and ∂L/∂v_j = ∂L/∂v, so a state that is linear in past gradients
scales with the gain, one that is quadratic with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, RMSprop

from splitwatch.growth.surgery import Replacement, laid_out_like

Scale = Callable[[Tensor], Tensor]

LINEAR: Scale = lambda gain: gain  # noqa: E731
SQUARE: Scale = torch.square
ABSOLUTE: Scale = torch.abs
SIGN: Scale = torch.sign
NONE: Scale = torch.ones_like

STATES: dict[str, Scale] = {
    "momentum_buffer": LINEAR,
    "exp_avg": LINEAR,
    "prev": LINEAR,
    "grad_avg": LINEAR,
    "exp_avg_sq": SQUARE,
    "max_exp_avg_sq": SQUARE,
    "square_avg": SQUARE,
    "sum": SQUARE,
    "variance": SQUARE,
    "exp_inf": ABSOLUTE,
    "acc_delta": NONE,
    "step_size": NONE,
}
"""How states of the parameter's shape follow the gain of past gradients, by name; add those of your own optimizer."""

_SIZES = {SQUARE, ABSOLUTE}
"""How states follow that tell how large past gradients were."""

_NORMALISED: dict[tuple[type[Optimizer], str], Scale] = {(RMSprop, "momentum_buffer"): SIGN}
"""States that hold gradients divided by their own size."""

VALUES = {"ax"}
"""States of the parameter's shape that are values of it, such as averages; add those of your own optimizer."""

_FRESH = {"step_size": "lr", "sum": "initial_accumulator_value"}
"""States that do not begin at zero, and the setting of the parameter group that they begin at."""

_DECOUPLED = {"AdamW", "Adafactor", "Muon"}
"""Optimizers that shrink weights outside of the gradient, without a flag that says so."""


def coupled_weight_decay(optimizers: Iterable[Optimizer]) -> float:
    """The largest weight decay that optimizers add to the gradient, as an L2 penalty in the loss would."""
    coupled = (optimizer for optimizer in optimizers if type(optimizer).__name__ not in _DECOUPLED)
    groups = (group for optimizer in coupled for group in optimizer.param_groups)
    decays = (group.get("weight_decay", 0.0) for group in groups if not group.get("decoupled_weight_decay", False))
    return max((float(decay) for decay in decays), default=0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """What has to change in one optimizer, made beforehand."""

    optimizer: Optimizer
    parameters: tuple[tuple[dict[str, Any], int, Tensor, Tensor], ...]
    states: tuple[tuple[Tensor, Tensor, dict[str, Any] | None], ...]

    @property
    def restarted(self) -> tuple[Tensor, ...]:
        """The old parameters whose state has a layout that cannot be carried."""
        return tuple(old for old, _, state in self.states if state is None)

    def commit(self) -> None:
        """Exchange the parameters by identity and re-key their state."""
        for group, position, _, new in self.parameters:
            group["params"][position] = new
        for old, new, state in self.states:
            del self.optimizer.state[old]
            if state is not None:
                self.optimizer.state[new] = state
        if hasattr(self.optimizer, "_numel_cache"):  # L-BFGS flattens its parameters and remembers their number
            self.optimizer._numel_cache = None  # pyright: ignore[reportAttributeAccessIssue]


def exchange(optimizer: Optimizer, replacements: Iterable[Replacement]) -> Exchange:
    """Prepare the exchange of parameters in an optimizer; nothing is changed yet.

    State of the parameter's shape and of a known name is carried by the same index map as the parameter, numbers as
    they are. What else there is (other layouts, lists of tensors, objects, names that could mean anything) cannot be
    carried: its parameter starts afresh and is listed in ``Exchange.restarted``.
    """
    by_identity = {id(item.old): item for item in replacements}
    parameters, states = [], []
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            item = by_identity.get(id(old))
            if item is None:
                continue
            parameters.append((group, position, old, item.new))
            if old in optimizer.state:
                states.append((old, item.new, _carried(optimizer, group, optimizer.state[old], item)))
    if parameters and isinstance(optimizer, LBFGS):  # one flat history over all parameters, kept with the first
        new = {id(old): new for _, _, old, new in parameters}
        states = [(old, new.get(id(old), old), None) for old in optimizer.state]
    return Exchange(optimizer, tuple(parameters), tuple(states))


def _carried(
    optimizer: Optimizer, group: dict[str, Any], state: dict[str, Any], item: Replacement
) -> dict[str, Any] | None:
    """The state in the new shape; None if any of it cannot be carried."""
    carried = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim:
            if value.shape != item.old.shape or key not in STATES.keys() | VALUES:
                return None
            carried[key] = _carry(optimizer, group, key, value, item)
        elif value is None or isinstance(value, (Tensor, Number, str)):
            carried[key] = value
        else:
            return None
    return carried


def _carry(optimizer: Optimizer, group: dict[str, Any], key: str, value: Tensor, item: Replacement) -> Tensor:
    if key in VALUES:
        carried = item.carry_value(value)
    else:
        scale = _NORMALISED.get((type(optimizer), key)) or STATES[key]
        carry = item.carry_size if scale in _SIZES else item.carry_gradient
        carried = carry(value, scale, float(group.get(_FRESH.get(key, ""), 0.0)))
    return laid_out_like(value, carried.to(value.dtype))
