"""Carry optimizer state across a change of shapes.

The optimizer object and its parameter groups stay (schedulers hold references to both); parameters are exchanged by
identity. A split scales gradients, ∂L/∂w_j = λ_j ∂L/∂w and ∂L/∂v_j = ∂L/∂v, so a state that is linear in past gradients
scales with the gain, one that is quadratic with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    "exp_inf": ABSOLUTE,
}
"""How a state follows the gain of past gradients; states not listed do not."""

_NORMALISED: dict[tuple[type[Optimizer], str], Scale] = {(RMSprop, "momentum_buffer"): SIGN}
"""States that hold gradients divided by their own size."""

_VALUES = {"ax"}
"""States that average the parameter itself."""


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

    State of the parameter's shape is carried by the same index map as the parameter, scalars as they are; a parameter
    whose state has another layout starts afresh and is listed in ``Exchange.restarted``.
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
                states.append((old, item.new, _carried(optimizer, optimizer.state[old], item)))
    if parameters and isinstance(optimizer, LBFGS):  # one flat history over all parameters, kept with the first
        new = {id(old): new for _, _, old, new in parameters}
        states = [(old, new.get(id(old), old), None) for old in optimizer.state]
    return Exchange(optimizer, tuple(parameters), tuple(states))


def _carried(optimizer: Optimizer, state: dict[str, Any], item: Replacement) -> dict[str, Any] | None:
    carried = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim and value.shape == item.old.shape:
            carried[key] = _carry(optimizer, key, value, item)
        elif isinstance(value, Tensor) and value.numel() > 1:
            return None
        else:
            carried[key] = value
    return carried


def _carry(optimizer: Optimizer, key: str, value: Tensor, item: Replacement) -> Tensor:
    if key in _VALUES:
        carried = item.carry_value(value)
    else:
        scale = _NORMALISED.get((type(optimizer), key)) or STATES.get(key, NONE)
        carried = item.carry_gradient(value, scale)
    return laid_out_like(value, carried.to(value.dtype))
