"""Incoming and outgoing weights as one row a neuron: (m, d) and (m, c)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from splitwatch.anatomy import plain_module
from splitwatch.grouped import by_channel
from splitwatch.precision import upcast
from splitwatch.records import HiddenLayer


def extract_columns(weight: Tensor, m: int, start: int, stride: int) -> Tensor:
    """The columns of a consumer's weight that read m neurons, as (m, c).

    A grouped convolution's weight is to be given by input channel (``grouped.by_channel``).
    """
    block = weight.narrow(1, start, m * stride).unflatten(1, (m, stride))
    return block.movedim(1, 0).flatten(1)


def insert_columns(v: Tensor, weight_shape: torch.Size, start: int, stride: int) -> Tensor:
    """The adjoint of ``extract_columns``: (m, c) → a weight that is zero elsewhere."""
    m = len(v)
    columns = v.reshape(m, weight_shape[0], stride, *weight_shape[2:]).movedim(0, 1).flatten(1, 2)
    if columns.shape == weight_shape:
        return columns
    weight = v.new_zeros(weight_shape)
    weight.narrow(1, start, m * stride).copy_(columns)
    return weight


def incoming_weights(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """The producers' weights and biases as one row a neuron, (m, d)."""
    columns: list[Tensor] = []
    for weight, bias in zip(weights, biases, strict=True):
        columns += [weight.flatten(1)] if bias is None else [weight.flatten(1), bias[:, None]]
    return torch.cat(columns, dim=1)


def outgoing_weights(layer: HiddenLayer, readers: Sequence[Tensor]) -> Tensor:
    """The consumers' weights, given by input channel, as one row a neuron, (m, c)."""
    pairs = zip(layer.consumers, readers, strict=True)
    return torch.cat([extract_columns(weight, layer.width, c.start, c.stride) for c, weight in pairs], dim=1)


def neuron_weights(model: nn.Module, layer: HiddenLayer) -> tuple[Tensor, Tensor]:
    """Incoming weights w (m, d) and outgoing weights v (m, c) of a hidden layer, detached, float32 at least."""
    producers: list[Any] = [plain_module(model, name) for name in layer.producers]
    consumers: list[Any] = [plain_module(model, consumer.name) for consumer in layer.consumers]
    readers = [
        by_channel(upcast(module.weight.detach()), c.groups)
        for c, module in zip(layer.consumers, consumers, strict=True)
    ]
    biases = [None if module.bias is None else upcast(module.bias.detach()) for module in producers]
    weights = [upcast(module.weight.detach()) for module in producers]
    return incoming_weights(weights, biases), outgoing_weights(layer, readers)
