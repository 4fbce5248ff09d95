"""Per module type, which tensors hold an entry per neuron: the place to teach splitwatch a further layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from splitwatch.records import UnsupportedLayerError


@dataclass(frozen=True, slots=True, eq=False)
class Fields:
    """The tensors of a module with one entry per neuron along an axis, the sizes that follow, defaults for sprouts.

    A default is a number (zero where none is given), or what makes one of the existing entries.
    """

    tensors: tuple[str, ...]
    sizes: tuple[str, ...]
    defaults: tuple[tuple[str, float | Callable[[Tensor], Tensor]], ...] = ()


@singledispatch
def rows(module: nn.Module) -> Fields:
    """What a module holds per neuron along its first axis; register a handler to widen a further type.

    Raises:
        UnsupportedLayerError: no handler is registered.
    """
    raise UnsupportedLayerError(
        f"{type(module).__name__}: required a module type with a handler, found none; "
        "register one with splitwatch.handlers.rows.register"
    )


@singledispatch
def columns(module: nn.Module) -> Fields:
    """What a consumer holds per neuron along its second axis; register a handler to widen a further type.

    Raises:
        UnsupportedLayerError: no handler is registered.
    """
    raise UnsupportedLayerError(
        f"{type(module).__name__}: required a consumer type with a handler, found none; "
        "register one with splitwatch.handlers.columns.register"
    )


def has_rows(module: nn.Module) -> bool:
    """Whether a handler is registered for what a module holds per neuron along its first axis."""
    return rows.dispatch(type(module)) is not rows.dispatch(object)


@rows.register
def _(module: nn.Linear) -> Fields:
    return Fields(("weight", "bias"), ("out_features",))


@rows.register
def _(module: _ConvNd) -> Fields:
    depthwise = module.weight.shape[1] == 1 and module.groups == len(module.weight) > 1
    sizes = ("in_channels", "out_channels", "groups") if depthwise else ("out_channels",)
    return Fields(("weight", "bias"), sizes)


@rows.register
def _(module: _BatchNorm) -> Fields:
    defaults = (("weight", 1.0), ("running_var", Tensor.mean))
    return Fields(("weight", "bias", "running_mean", "running_var"), ("num_features",), defaults)


@rows.register
def _(module: nn.PReLU) -> Fields:
    return Fields(("weight",), ("num_parameters",), (("weight", 0.25),))


@columns.register
def _(module: nn.Linear) -> Fields:
    return Fields(("weight",), ("in_features",))


@columns.register
def _(module: _ConvNd) -> Fields:
    return Fields(("weight",), ("in_channels",))
