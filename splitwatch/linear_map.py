"""Linear and convolution calls as maps that are linear in their weight, with both adjoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitwatch.grouped import Seats, by_channel, by_output
from splitwatch.records import UnsupportedLayerError
from splitwatch.tape import Call, Tape, Value

_CONVOLUTIONS: dict[Callable[..., Any], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True, slots=True, eq=False)
class LinearCall:
    """A call y = weight · input (+ bias) on the tape, with the value numbers of its input and output."""

    call: Call
    index: int
    input: Value
    output: Value
    arguments: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """The weight as it was passed."""
        return self.arguments["weight"]

    @property
    def spatial(self) -> int:
        """Number of spatial axes: 0 for a linear map."""
        return _CONVOLUTIONS.get(self.call.function, 0)

    @property
    def channel_axis(self) -> int:
        """Where input and output carry their channels, counted from the end."""
        return -1 - self.spatial

    @property
    def groups(self) -> int:
        """Groups of channels that do not meet: 1 for a linear map."""
        return self.arguments["groups"]


def linear_call(tape: Tape, index: int) -> LinearCall | None:
    """The call at ``index`` seen as a linear map, or None if it is something else."""
    call = tape.calls[index]
    if call.function is not F.linear and call.function not in _CONVOLUTIONS:
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    args, kwargs = call.arguments()
    arguments = _DEFAULTS | dict(zip(names, args, strict=False)) | kwargs
    position = next(i for i, leaf in enumerate(call.leaves) if leaf is arguments["input"])
    return LinearCall(call, index, call.inputs[position], call.outputs[0], arguments)


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """y = W · x + b at one fixed input x; ``conv`` is None or (stride, padding, dilation).

    A map with ``groups`` can be asked for some of its outputs or inputs; ``seats`` then say which (``grouped``).
    """

    input: Tensor
    weight_shape: torch.Size
    has_bias: bool
    conv: tuple[list[int], list[int], list[int]] | None = None
    groups: int = 1

    @classmethod
    def of(cls, call: LinearCall) -> LinearMap:
        """The map a recorded call computed, at the input it saw."""
        x, weight = call.arguments["input"].detach(), call.weight
        settings = _convolution_settings(call) if call.spatial else None
        return cls(x, weight.shape, call.arguments["bias"] is not None, settings, call.groups)

    @property
    def channel_axis(self) -> int:
        """Where input and output carry their channels, counted from the end."""
        return 1 - len(self.weight_shape)

    @property
    def columns_shape(self) -> torch.Size:
        """The weight's shape by input channel: (outputs that read one, inputs, kernel …)."""
        outputs, inputs, *kernel = self.weight_shape
        return torch.Size([outputs // self.groups, inputs * self.groups, *kernel])

    def at(self, x: Tensor) -> LinearMap:
        """The same map at another input, which may have another number of channels."""
        outputs, _, *kernel = self.weight_shape
        shape = torch.Size([outputs, x.shape[self.channel_axis] // self.groups, *kernel])
        return LinearMap(x, shape, self.has_bias, self.conv, self.groups)

    def hollow(self) -> LinearMap:
        """The same map without the values of its input, in no memory; ``input_gradient`` asks for their shape alone."""
        return replace(self, input=self.input.new_empty(1).expand(self.input.shape))

    def __call__(self, weight: Tensor, bias: Tensor | None = None, seats: Seats | None = None) -> Tensor:
        """Y = weight · x + bias, of all outputs or of those that sit on ``seats``."""
        if self.conv is None:
            return F.linear(self.input, weight, bias)
        if seats is not None:
            weight, bias = seats.fill(weight, 0), None if bias is None else seats.fill(bias, 0)
        stride, padding, dilation = self.conv
        still = [0] * len(stride)
        y = torch.convolution(self.input, weight, bias, stride, padding, dilation, False, still, self.groups)
        return y if seats is None else seats.pick(y, y.ndim + self.channel_axis)

    def weight_gradient(self, signal: Tensor, seats: Seats | None = None) -> Tensor:
        """The gradient of ⟨signal, y⟩ in the weight: ``weight_shape``, with as many rows as the signal has channels."""
        if self.conv is None:
            return signal.flatten(0, -2).T @ self.input.flatten(0, -2)
        if seats is not None:
            signal = seats.fill(signal, signal.ndim + self.channel_axis)
        rows = signal.shape[self.channel_axis]
        shape_only = self.input.new_empty(1).expand(rows, *self.weight_shape[1:])
        gradient = self._backward(signal, shape_only, (False, True, False))[1]
        return gradient if seats is None else seats.pick(gradient, 0)

    def column_gradient(self, block: Tensor, signal: Tensor, seats: Seats | None = None) -> Tensor:
        """The gradient of ⟨signal, y⟩ in the weights that read some input channels whose values are ``block``.

        By input channel, as ``columns_shape`` is.
        """
        if seats is not None:
            block = seats.fill(block, block.ndim + self.channel_axis)
        columns = by_channel(self.at(block).weight_gradient(signal), self.groups)
        return columns if seats is None else seats.pick(columns, 1)

    def bias_gradient(self, signal: Tensor) -> Tensor:
        """The gradient of ⟨signal, y⟩ in the bias, shape (channels,)."""
        axis = signal.ndim + self.channel_axis
        return signal.sum([i for i in range(signal.ndim) if i != axis])

    def input_gradient(self, columns: Tensor, signal: Tensor, seats: Seats | None = None) -> Tensor:
        """The gradient of ⟨signal, y⟩ in the input, which gets as many channels as the weight has ``columns``.

        The weight is given by input channel, as ``columns_shape`` is.
        """
        if self.conv is None:
            return signal @ columns
        if seats is not None:
            columns = seats.fill(columns, 1)
        shape = list(self.input.shape)
        shape[self.channel_axis] = columns.shape[1]
        like = self.input.new_empty(1).expand(shape)
        gradient = self._backward(signal, by_output(columns, self.groups), (True, False, False), like)[0]
        return gradient if seats is None else seats.pick(gradient, gradient.ndim + self.channel_axis)

    def _backward(self, signal: Tensor, weight: Tensor, mask: tuple[bool, bool, bool], x: Tensor | None = None) -> Any:
        assert self.conv is not None
        stride, padding, dilation = self.conv
        output_padding = [0] * len(stride)
        x = self.input if x is None else x
        return torch.ops.aten.convolution_backward(
            signal, x, weight, None, stride, padding, dilation, False, output_padding, self.groups, mask
        )


def _convolution_settings(call: LinearCall) -> tuple[list[int], list[int], list[int]]:
    n, kernel = call.spatial, call.weight.shape[2:]
    stride, dilation = (_as_list(call.arguments[key], n) for key in ("stride", "dilation"))
    padding = call.arguments["padding"]
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            raise UnsupportedLayerError("padding='same' with an even kernel pads one side more; use explicit padding")
        padding = [t // 2 for t in total]
    return stride, _as_list(padding, n), dilation


def _as_list(value: int | tuple[int, ...] | list[int], n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else [*value] * (n if len(value) == 1 else 1)


SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose weights splitwatch can widen."""
