"""Carry optimizer state across a change of shapes.

The optimizer object and its parameter groups stay (schedulers hold references to both); parameters are exchanged by
identity. A split scales gradients, ∂L/∂w_j = λ_j ∂L/∂w and ∂L/∂v_j = ∂L/∂v, so a state that is linear in past gradients
scales with the gain, one that is quadratic with its square.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from splitwatch.growth.surgery import Replacement

GRADIENT_POWER = {
    "momentum_buffer": 1,
    "exp_avg": 1,
    "prev": 1,
    "grad_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
}
"""How often past gradients enter a state; states not listed are carried unscaled."""

_ABSOLUTE = {"exp_inf": 1}
"""States that hold absolute values of gradients."""


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

    def rollback(self, states: dict[Tensor, Any]) -> None:
        """Put back the old parameters, and the states as they were before the commit."""
        for group, position, old, _ in self.parameters:
            group["params"][position] = old
        self.optimizer.state.clear()
        self.optimizer.state.update(states)


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
                states.append((old, item.new, _carried(optimizer.state[old], item)))
    return Exchange(optimizer, tuple(parameters), tuple(states))


def _carried(state: dict[str, Any], item: Replacement) -> dict[str, Any] | None:
    carried = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim and value.shape == item.old.shape:
            carried[key] = _carry(key, value, item)
        elif isinstance(value, Tensor) and value.numel() > 1:
            return None
        else:
            carried[key] = value
    return carried


def _carry(key: str, value: Tensor, item: Replacement) -> Tensor:
    carried = item.carry(value, GRADIENT_POWER.get(key, _ABSOLUTE.get(key, 0)))
    carried = carried.abs() if key in _ABSOLUTE else carried
    return carried.to(dtype=value.dtype, memory_format=torch.preserve_format)
