"""Both ends of a layer in closed form: weights and pre-activations, what consumers read and outgoing weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitwatch.geometry.weights import extract_columns
from splitwatch.grouped import Seats
from splitwatch.linear_map import LinearMap
from splitwatch.records import Consumer
from splitwatch.trace import LayerTrace


def channels(trace: LayerTrace, h: Sequence[Tensor], first: int, count: int) -> list[Tensor]:
    """The channels of some neurons in what the consumers read."""
    readers = zip(h, trace.layer.consumers, trace.consumers, strict=True)
    return [x.narrow(m.channel_axis, c.start + first * c.stride, count * c.stride) for x, c, m in readers]


def producer_seats(trace: LayerTrace, rows: Tensor | None = None) -> tuple[Seats | None, ...]:
    """Where some neurons, all by default, sit among the outputs of each producer."""
    return tuple(_seats(producer, rows, trace.layer.width) for producer in trace.producers)


def reader_seats(trace: LayerTrace, rows: Tensor | None = None) -> tuple[Seats | None, ...]:
    """Where the channels of some neurons, of all by default, sit among the inputs of each consumer."""
    readers = zip(trace.layer.consumers, trace.consumers, strict=True)
    return tuple(_seats(m, rows, trace.layer.width, c) for c, m in readers)


def _seats(linear: LinearMap, rows: Tensor | None, m: int, reads: Consumer | None = None) -> Seats | None:
    """The seats of some of m neurons among the outputs of a map, or among its inputs where it is a consumer."""
    if linear.groups == 1:
        return None
    rows = torch.arange(m, device=linear.input.device) if rows is None else rows
    if reads is None:
        return Seats.of(rows, linear.weight_shape[0], linear.groups)
    channels = (reads.start + rows[:, None] * reads.stride + torch.arange(reads.stride, device=rows.device)).flatten()
    return Seats.of(channels, linear.columns_shape[1], linear.groups)


def outgoing_gradient(
    trace: LayerTrace, blocks: Sequence[Tensor], reads: Sequence[Seats | None] | None = None
) -> Tensor:
    """∂L/∂v (k, c) of one batch's mean loss for neurons whose ``channels`` are these, whatever made them.

    ``reads`` are their ``reader_seats`` where a consumer has groups.
    """
    parts = []
    seats = reads or (None,) * len(blocks)
    readers = zip(blocks, trace.layer.consumers, trace.consumers, trace.signals, seats, strict=True)
    for block, where, consumer, signal, places in readers:
        gradient = consumer.column_gradient(block, signal, places)
        parts.append(extract_columns(gradient, gradient.shape[1] // where.stride, 0, where.stride))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def incoming_sizes(trace: LayerTrace) -> list[int]:
    """Incoming weights of one neuron, by producer."""
    return [p.weight_shape[1:].numel() + p.has_bias for p in trace.producers]


def lift(trace: LayerTrace, u: Tensor, seats: Sequence[Seats | None] | None = None) -> tuple[Tensor, ...]:
    """Incoming directions (k, d) of any number of neurons → their effect on the pre-activations, k channels each.

    ``seats`` say where the neurons sit among the outputs of each producer that has groups.
    """
    parts, seats = [], seats or (None,) * len(trace.producers)
    for producer, places, part in zip(trace.producers, seats, u.split(incoming_sizes(trace), dim=1), strict=True):
        weight = part[:, : producer.weight_shape[1:].numel()].reshape(len(u), *producer.weight_shape[1:])
        parts.append(producer(weight, part[:, -1].contiguous() if producer.has_bias else None, places))
    return tuple(parts)
