"""A plan's moves in one layer as an index map: where the entries of every widened tensor come from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitwatch.anatomy import plain_module
from splitwatch.grouped import by_channel, by_output
from splitwatch.records import GrowthPlan, HiddenLayer, Split, SplitWatchError, Sprout, UnsupportedLayerError


@dataclass(frozen=True, slots=True, eq=False)
class IndexMap:
    """Where the entries of a widened tensor come from: entry j from ``source[j]``, -1 for a sprout.

    ``axis`` is 0 for rows, 1 for a consumer's columns, where neuron r owns ``start + r·stride … + stride``: the input
    channels of a convolution with ``groups``.
    """

    source: Tensor
    old_width: int
    axis: int = 0
    start: int = 0
    stride: int = 1
    groups: int = 1

    @property
    def first(self) -> Tensor:
        """Where the first copy of every old entry stands, (m,)."""
        held, places = self.source >= 0, torch.arange(len(self.source))
        last = torch.full((self.old_width,), len(self.source))
        return last.scatter_reduce(0, self.source[held], places[held], "amin")

    def __call__(self, tensor: Tensor, factor: Tensor | None = None, default: float | Tensor = 0.0) -> Tensor:
        """The widened tensor: copies by ``source``, times ``factor`` (new width,); sprouts have the ``default``."""
        blocks = self.blocks(tensor)
        copied = blocks.index_select(0, self.source.clamp(min=0).to(tensor.device))
        if factor is not None:
            copied = copied * as_column(factor, copied)
        copied[(self.source < 0).to(tensor.device)] = default
        return self.put(tensor, copied)

    def blocks(self, tensor: Tensor) -> Tensor:
        """The tensor seen as one block per neuron, (m, …)."""
        used = by_channel(tensor, self.groups).narrow(self.axis, self.start, self.old_width * self.stride)
        return used.unflatten(self.axis, (self.old_width, self.stride)).movedim(self.axis, 0)

    def put(self, tensor: Tensor, blocks: Tensor) -> Tensor:
        """The tensor with other blocks in the place of its own."""
        tensor, stop = by_channel(tensor, self.groups), self.start + self.old_width * self.stride
        head = tensor.narrow(self.axis, 0, self.start)
        tail = tensor.narrow(self.axis, stop, tensor.shape[self.axis] - stop)
        middle = blocks.movedim(0, self.axis).flatten(self.axis, self.axis + 1)
        return by_output(torch.cat([head, middle.to(tensor), tail], dim=self.axis), self.groups)


def as_column(factor: Tensor, like: Tensor) -> Tensor:
    """A vector with one entry a neuron, shaped to scale the first axis of another tensor."""
    return factor.to(like).reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, slots=True, eq=False)
class Widening:
    """All moves of a plan in one layer as an index map: source (-1 for sprouts), coefficients, offsets.

    Copies stand after the layer's last neuron, or after the last one of their group where it has several.
    ``biases`` is what is added to the biases of the consumers that have some, one after the other, or None.
    """

    layer: HiddenLayer
    source: Tensor
    coefficients: Tensor
    in_offset: Tensor
    out_offset: Tensor
    biases: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of neurons after growth."""
        return len(self.source)


def widenings(model: nn.Module, plan: GrowthPlan) -> tuple[Widening, ...]:
    """The plan's moves, layer by layer, checked against the model.

    Raises:
        SplitWatchError: a move names a layer the plan does not have, a neuron that does not exist or is split twice, or
            carries offsets of the wrong shape, or the groups of a layer would not grow alike.
    """
    layers = {layer.name: layer for layer in plan.layers}
    moves: dict[str, list[Split | Sprout]] = defaultdict(list)
    for move in plan.moves:
        if move.layer not in layers:
            raise SplitWatchError(
                f"plan: required moves in its own layers {[*layers]}, found {move.layer!r}; add it, or leave them out"
            )
        moves[move.layer].append(move)
    return tuple(_widening(model, layers[name], items) for name, items in moves.items())


@dataclass(frozen=True, slots=True, eq=False)
class _Neuron:
    """One neuron of the widened layer."""

    source: int
    coefficient: float
    in_offset: Tensor | None = None
    out_offset: Tensor | None = None


def _widening(model: nn.Module, layer: HiddenLayer, moves: Sequence[Split | Sprout]) -> Widening:
    d, c, biases = _sizes(model, layer)
    neurons = [_Neuron(r, 1.0) for r in range(layer.width)]
    split: set[int] = set()
    for move in moves:
        _check_move(move, layer, (d, c, biases), split)
        if isinstance(move, Sprout):
            neurons.append(_Neuron(-1, 0.0, move.incoming, move.outgoing))
            continue
        split.add(move.neuron)
        copies = zip(move.coefficients, move.in_offset, move.out_offset, strict=True)
        first, *others = (_Neuron(move.neuron, *copy) for copy in copies)
        neurons[move.neuron] = first
        neurons += others
    like = submodule(model, layer.producers[0]).weight
    in_offset = _stacked([neuron.in_offset for neuron in neurons], d, like)
    out_offset = _stacked([neuron.out_offset for neuron in neurons], c, like)
    sprouts = [move for move in moves if isinstance(move, Sprout)]
    if factors := [move.others for move in sprouts if move.others is not None]:
        left, right = zip(*factors, strict=True)
        out_offset[: layer.width] += (torch.cat(left, dim=1).double() @ torch.cat(right).double()).to(like)
    biases = [move.biases.to(like) for move in sprouts if move.biases is not None]
    order = _by_group(layer, [neuron.source for neuron in neurons])
    return Widening(
        layer,
        torch.tensor([neuron.source for neuron in neurons])[order],
        torch.tensor([neuron.coefficient for neuron in neurons], dtype=torch.float64)[order],
        in_offset[order],
        out_offset[order],
        torch.stack(biases).sum(0) if biases else None,
    )


def _stacked(offsets: Sequence[Tensor | None], size: int, like: Tensor) -> Tensor:
    """Offsets one below the other, zero where there is none; they go to the model's device in one piece."""
    stacked = torch.zeros(len(offsets), size, dtype=like.dtype)
    if given := {j: offset for j, offset in enumerate(offsets) if offset is not None}:
        stacked[[*given]] = torch.stack([offset.to("cpu", like.dtype) for offset in given.values()])
    return stacked.to(like.device)


def _by_group(layer: HiddenLayer, source: Sequence[int]) -> list[int]:
    """The order in which every group is in one piece, which is the order they are in where there is one."""
    if layer.groups == 1:
        return [*range(len(source))]
    group = [layer.group(r) for r in source]
    added = [group.count(g) - layer.width // layer.groups for g in range(layer.groups)]
    if len(set(added)) > 1:
        raise SplitWatchError(
            f"plan: required as many new neurons in each of the {layer.groups} groups of {layer.name}, found {added}; "
            "a grouped convolution has groups of one size, so add moves for the others or leave some out"
        )
    return sorted(range(len(source)), key=group.__getitem__)


def _check_move(move: Split | Sprout, layer: HiddenLayer, sizes: tuple[int, int, int], split: set[int]) -> None:
    d, c, biases = sizes
    if isinstance(move, Sprout):
        found, required = (tuple(move.incoming.shape), tuple(move.outgoing.shape)), ((d,), (c,))
        if move.others is not None:
            found += tuple(tuple(factor.shape) for factor in move.others)
            required += (layer.width, rank := len(move.others[1])), (rank, c)
        if move.biases is not None:
            found, required = (*found, tuple(move.biases.shape)), (*required, (biases,))
        if layer.depthwise:
            raise UnsupportedLayerError(f"plan: a sprout in {layer.name} has no kernel for its depthwise convolution")
        if layer.groups > 1:
            raise UnsupportedLayerError(f"plan: a sprout in {layer.name} has none of its {layer.groups} groups; split")
    else:
        k = len(move.coefficients)
        found, required = (tuple(move.in_offset.shape), tuple(move.out_offset.shape)), ((k, d), (k, c))
        if not 0 <= move.neuron < layer.width or move.neuron in split:
            raise SplitWatchError(
                f"plan: required each neuron of {layer.name} (0 … {layer.width - 1}) at most once, "
                f"found {move.neuron}; one split makes as many copies of a neuron as it has coefficients"
            )
        if k < 2 or abs(sum(move.coefficients) - 1) > 1e-9:
            raise SplitWatchError(
                f"plan: required two or more coefficients that sum to 1, found {move.coefficients}; (0.5, 0.5) fits"
            )
    if found != required:
        raise SplitWatchError(
            f"plan: required weights of shapes {required} in {layer.name}, found {found}; a neuron has {d} incoming "
            f"and {c} outgoing ones here, and its consumers {biases} biases"
        )


def _sizes(model: nn.Module, layer: HiddenLayer) -> tuple[int, int, int]:
    """Incoming and outgoing weights of a neuron and its consumers' biases; checks that the layer is as planned for."""
    d = c = 0
    for name in layer.producers:
        weight = _weight(model, name)
        if len(weight) != layer.width:
            raise SplitWatchError(
                f"plan: required {layer.width} neurons in {name}, found {len(weight)}; "
                "the model changed since the plan was made, plan again"
            )
        d += weight[0].numel() + (submodule(model, name).bias is not None)
    for consumer in layer.consumers:
        weight = _weight(model, consumer.name)
        if weight.shape[1] * consumer.groups < consumer.start + layer.width * consumer.stride:
            raise SplitWatchError(
                f"plan: required {layer.width * consumer.stride} columns from {consumer.start} on in {consumer.name}, "
                f"found {weight.shape[1] * consumer.groups}; the model changed since the plan was made, plan again"
            )
        c += consumer.stride * (len(weight) // consumer.groups) * weight.shape[2:].numel()
    return d, c, sum(len(module.bias) for module in biased_consumers(model, layer))


def biased_consumers(model: nn.Module, layer: HiddenLayer) -> list[Any]:
    """The consumers that have a bias."""
    return [module for x in layer.consumers if (module := submodule(model, x.name)).bias is not None]


def submodule(model: nn.Module, name: str) -> Any:
    """A module of the model by its dotted name."""
    try:
        return plain_module(model, name)
    except AttributeError:
        raise SplitWatchError(f"plan: required a module named {name!r} in the model, found none; plan again") from None


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = getattr(module := submodule(model, name), "weight", None)
    if not isinstance(weight, Tensor):
        raise SplitWatchError(f"plan: required weights in {name}, found {type(module).__name__} without; plan again")
    return weight
