"""Apply a plan to modules: every new tensor is made first, then all are put in place, or none.

A widened layer keeps its neurons where they were and appends the copies, so one index map tells for every tensor that
holds an entry per neuron (weights, biases, BatchNorm statistics, gradients, optimizer state) where its entries go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from splitwatch.records import GrowthPlan, HiddenLayer, Split, SplitWatchError, Sprout, UnsupportedLayerError


@dataclass(frozen=True, slots=True, eq=False)
class Fields:
    """The tensors of a module with one entry per neuron along an axis, the sizes that follow, defaults for sprouts."""

    tensors: tuple[str, ...]
    sizes: tuple[str, ...]
    defaults: tuple[tuple[str, float], ...] = ()


@singledispatch
def rows(module: nn.Module) -> Fields:
    """What a module holds per neuron along its first axis; register a handler to widen a further type.

    Raises:
        UnsupportedLayerError: no handler is registered.
    """
    raise UnsupportedLayerError(
        f"{type(module).__name__}: required a module type with a handler, found none; "
        "register one with splitwatch.growth.surgery.rows.register"
    )


@singledispatch
def columns(module: nn.Module) -> Fields:
    """What a consumer holds per neuron along its second axis; register a handler to widen a further type.

    Raises:
        UnsupportedLayerError: no handler is registered.
    """
    raise UnsupportedLayerError(
        f"{type(module).__name__}: required a consumer type with a handler, found none; "
        "register one with splitwatch.growth.surgery.columns.register"
    )


@rows.register
def _(module: nn.Linear) -> Fields:
    return Fields(("weight", "bias"), ("out_features",))


@rows.register
def _(module: _ConvNd) -> Fields:
    depthwise = module.groups > 1
    sizes = ("in_channels", "out_channels", "groups") if depthwise else ("out_channels",)
    return Fields(("weight", "bias"), sizes)


@rows.register
def _(module: _BatchNorm) -> Fields:
    defaults = (("weight", 1.0), ("running_var", 1.0))
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


@dataclass(frozen=True, slots=True, eq=False)
class IndexMap:
    """Where the entries of a widened tensor come from: entry j from ``source[j]``, -1 for a sprout.

    ``axis`` is 0 for rows, 1 for a consumer's columns, where neuron r owns ``start + r·stride … + stride``.
    """

    source: Tensor
    old_width: int
    axis: int = 0
    start: int = 0
    stride: int = 1

    def __call__(self, tensor: Tensor, factor: Tensor | None = None, default: float = 0.0) -> Tensor:
        """The widened tensor: entries are copied by ``source``, times ``factor`` (new width,) where given."""
        blocks = self.blocks(tensor)
        copied = blocks.index_select(0, self.source.clamp(min=0).to(tensor.device))
        copied[(self.source < 0).to(tensor.device)] = default
        if factor is not None:
            copied = copied * _column(factor, copied)
        return self.put(tensor, copied)

    def blocks(self, tensor: Tensor) -> Tensor:
        """The tensor seen as one block per neuron, (m, …)."""
        used = tensor.narrow(self.axis, self.start, self.old_width * self.stride)
        return used.unflatten(self.axis, (self.old_width, self.stride)).movedim(self.axis, 0)

    def put(self, tensor: Tensor, blocks: Tensor) -> Tensor:
        """The tensor with other blocks in the place of its own."""
        stop = self.start + self.old_width * self.stride
        head = tensor.narrow(self.axis, 0, self.start)
        tail = tensor.narrow(self.axis, stop, tensor.shape[self.axis] - stop)
        middle = blocks.movedim(0, self.axis).flatten(self.axis, self.axis + 1)
        return torch.cat([head, middle.to(tensor), tail], dim=self.axis)


def _column(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like).reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """One tensor of one module and what takes its place.

    ``maps`` lead from old to new entries, each with the factor that gradients in a new entry have against its source.
    """

    module: nn.Module
    attribute: str
    old: Tensor
    new: Tensor
    maps: tuple[tuple[IndexMap, Tensor], ...]

    def carry(self, tensor: Tensor, power: int = 0) -> Tensor:
        """A tensor of the old shape (a gradient, an optimizer state) in the new one, scaled by gain ** power."""
        for index, gain in self.maps:
            tensor = index(tensor, gain**power)
        return tensor


@dataclass(frozen=True, slots=True, eq=False)
class Widening:
    """All moves of a plan in one layer as an index map: source (-1 for sprouts), coefficients, offsets."""

    layer: HiddenLayer
    source: Tensor
    coefficients: Tensor
    in_offset: Tensor
    out_offset: Tensor

    @property
    def width(self) -> int:
        """Number of neurons after growth."""
        return len(self.source)


@dataclass(frozen=True, slots=True, eq=False)
class Surgery:
    """Everything that has to be put in place to widen a model, made beforehand."""

    replacements: tuple[Replacement, ...]
    sizes: tuple[tuple[nn.Module, str, int], ...]

    def commit(self) -> Surgery:
        """Put everything in place; returns the surgery that undoes it, and undoes itself on any failure."""
        undo = Surgery(
            tuple(replace(r, old=r.new, new=r.old) for r in self.replacements),
            tuple((module, name, getattr(module, name)) for module, name, _ in self.sizes),
        )
        try:
            self._apply()
        except BaseException:
            undo._apply()
            raise
        return undo

    def _apply(self) -> None:
        for item in self.replacements:
            setattr(item.module, item.attribute, item.new)
        for module, name, value in self.sizes:
            setattr(module, name, value)


def prepare(model: nn.Module, plan: GrowthPlan, *, offsets: bool = True) -> Surgery:
    """Make every tensor of the widened model; the model itself is not touched.

    Args:
        model: the network.
        plan: what to do.
        offsets: whether copies get their offsets and sprouts their outgoing weights, or the function stays as it is.

    Raises:
        SplitWatchError: the plan does not fit the model.
    """
    edits: dict[tuple[int, str], _Edit] = {}
    sizes: list[tuple[nn.Module, str, int]] = []
    for widening in widenings(model, plan):
        for edit, names in _edits(model, widening):
            key = id(edit.module), edit.attribute
            edits[key] = edits[key].joined(edit) if key in edits else edit
            sizes += [(edit.module, name, edit.added) for name in names]
    grown: dict[tuple[int, str], tuple[nn.Module, str, int]] = {}
    for module, name, added in sizes:
        _, _, value = grown.get((id(module), name), (module, name, getattr(module, name)))
        grown[id(module), name] = (module, name, value + added)
    return Surgery(tuple(edit.replacement(offsets) for edit in edits.values()), tuple(grown.values()))


def widenings(model: nn.Module, plan: GrowthPlan) -> tuple[Widening, ...]:
    """The plan's moves, layer by layer, checked against the model.

    Raises:
        SplitWatchError: a move names a layer the plan does not have, a neuron that does not exist or is split twice, or
            carries offsets of the wrong shape.
    """
    layers = {layer.name: layer for layer in plan.layers}
    moves: dict[str, list[Split | Sprout]] = defaultdict(list)
    for move in plan.moves:
        if move.layer not in layers:
            raise SplitWatchError(f"plan: required moves in its own layers {sorted(layers)}, found one in {move.layer!r}")
        moves[move.layer].append(move)
    return tuple(_widening(model, layers[name], items) for name, items in moves.items())


def _widening(model: nn.Module, layer: HiddenLayer, moves: Sequence[Split | Sprout]) -> Widening:
    d, c = _sizes(model, layer)
    like = model.get_submodule(layer.producers[0]).weight
    base = {"dtype": torch.float64, "device": "cpu"}
    source = list(range(layer.width))
    coefficients = [1.0] * layer.width
    in_offset, out_offset = ([torch.zeros(n, **base)] * layer.width for n in (d, c))
    split: set[int] = set()
    for move in moves:
        _check_move(move, layer, d, c, split)
        if isinstance(move, Sprout):
            source.append(-1)
            coefficients.append(0.0)
            in_offset.append(move.incoming.to(**base))
            out_offset.append(move.outgoing.to(**base))
            continue
        split.add(move.neuron)
        for j, coefficient in enumerate(move.coefficients):
            place = move.neuron if j == 0 else len(source)
            for values, value in (
                (source, move.neuron),
                (coefficients, coefficient),
                (in_offset, move.in_offset[j].to(**base)),
                (out_offset, move.out_offset[j].to(**base)),
            ):
                values[place : place + 1] = [value]
    return Widening(
        layer,
        torch.tensor(source),
        torch.tensor(coefficients, dtype=torch.float64),
        torch.stack(in_offset).to(like),
        torch.stack(out_offset).to(like),
    )


def _check_move(move: Split | Sprout, layer: HiddenLayer, d: int, c: int, split: set[int]) -> None:
    if isinstance(move, Sprout):
        found, required = (tuple(move.incoming.shape), tuple(move.outgoing.shape)), ((d,), (c,))
        depthwise = any("conv" in operation for operation in layer.operations)
        if depthwise:
            raise UnsupportedLayerError(f"plan: a sprout in {layer.name} has no kernel for the depthwise convolution there")
    else:
        k = len(move.coefficients)
        found, required = (tuple(move.in_offset.shape), tuple(move.out_offset.shape)), ((k, d), (k, c))
        if not 0 <= move.neuron < layer.width or move.neuron in split:
            raise SplitWatchError(
                f"plan: required each neuron of {layer.name} (0 … {layer.width - 1}) at most once, found {move.neuron}"
            )
        if k < 2 or abs(sum(move.coefficients) - 1) > 1e-9:
            raise SplitWatchError(f"plan: required two or more coefficients that sum to 1, found {move.coefficients}")
    if found != required:
        raise SplitWatchError(f"plan: required weights of shapes {required} in {layer.name}, found {found}")


def _sizes(model: nn.Module, layer: HiddenLayer) -> tuple[int, int]:
    """Incoming and outgoing weights of one neuron, after checking that the layer is as the plan found it."""
    d = c = 0
    for name in layer.producers:
        module = _submodule(model, name)
        if module.weight.shape[0] != layer.width:
            raise SplitWatchError(
                f"plan: required {layer.width} neurons in {name}, found {module.weight.shape[0]}; "
                "the model changed since the plan was made, plan again"
            )
        d += module.weight[0].numel() + (module.bias is not None)
    for consumer in layer.consumers:
        weight = _submodule(model, consumer.name).weight
        if weight.shape[1] < consumer.start + layer.width * consumer.stride:
            raise SplitWatchError(
                f"plan: required {layer.width * consumer.stride} columns from {consumer.start} on in {consumer.name}, "
                f"found {weight.shape[1]}; the model changed since the plan was made, plan again"
            )
        c += consumer.stride * weight.shape[0] * weight.shape[2:].numel()
    return d, c


def _submodule(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SplitWatchError(f"plan: required a module named {name!r} in the model, found none; plan again") from None


@dataclass(frozen=True, slots=True, eq=False)
class _Edit:
    """What happens to one tensor: its rows are widened first, then its columns, from the last block to the first.

    In this order offsets of a row spread over the copies of the columns it reads, and offsets of a column reach every
    copy of the row that reads it. ``offset`` is (new width, …) for rows, (new width, c) for columns.
    """

    module: nn.Module
    attribute: str
    index: IndexMap
    gain: Tensor
    offset: Tensor | None = None
    default: float = 0.0
    then: tuple[_Edit, ...] = ()

    @property
    def added(self) -> int:
        """By how much the widened axis grows."""
        return (len(self.index.source) - self.index.old_width) * self.index.stride

    def joined(self, other: _Edit) -> _Edit:
        """Both edits of one tensor as one."""
        first, *rest = sorted((self, *self.then, other), key=lambda edit: (edit.index.axis, -edit.index.start))
        return replace(first, then=tuple(replace(edit, then=()) for edit in rest))

    def replacement(self, offsets: bool) -> Replacement:
        """The new tensor, as a parameter where the old one is."""
        old = getattr(self.module, self.attribute)
        new, seen = old.detach(), None
        for edit in (self, *self.then):
            new = edit._rows(new, offsets) if edit.index.axis == 0 else edit._columns(new, offsets, seen)
            seen = edit.index if edit.index.axis == 0 else seen
        maps = tuple((edit.index, edit._gradient_gain()) for edit in (self, *self.then))
        replacement = Replacement(self.module, self.attribute, old, new, maps)
        return replace(replacement, new=_parameter_like(replacement)) if isinstance(old, nn.Parameter) else replacement

    def _gradient_gain(self) -> Tensor:
        """∂L/∂w_j = λ_j ∂L/∂w for rows, ∂L/∂v_j = ∂L/∂v for columns."""
        return self.gain if self.index.axis == 0 else torch.ones_like(self.gain)

    def _rows(self, tensor: Tensor, offsets: bool) -> Tensor:
        new = self.index(tensor, default=self.default)
        if self.offset is None:
            return new
        # A sprout's incoming weights change nothing as long as its outgoing ones are zero.
        keep = torch.ones_like(self.gain) if offsets else (self.index.source < 0).double()
        offset = self.offset.to(new).reshape(len(self.offset), *tensor.shape[1:])
        return new + offset * _column(keep, new)

    def _columns(self, tensor: Tensor, offsets: bool, rows_before: IndexMap | None) -> Tensor:
        blocks = _shared_out(self.index.blocks(tensor), self.index.source, self.gain)
        if offsets and self.offset is not None:
            channels = len(tensor) if rows_before is None else rows_before.old_width
            shaped = self.offset.reshape(len(self.offset), channels, self.index.stride, *tensor.shape[2:])
            if rows_before is not None:
                shaped = replace(rows_before, axis=0)(shaped.movedim(1, 0)).movedim(0, 1)
            blocks = blocks + shaped.to(blocks)
        return self.index.put(tensor, blocks)


def _edits(model: nn.Module, widening: Widening) -> Iterator[tuple[_Edit, tuple[str, ...]]]:
    """Every edit that a widening asks for, with the size attributes that follow (once a module)."""
    layer, position = widening.layer, 0
    index = IndexMap(widening.source, layer.width)
    for name in layer.producers:
        fields = rows(module := _submodule(model, name))
        sizes = fields.sizes
        for attribute, tensor in _present(module, fields):
            size = tensor[0].numel()
            offset = widening.in_offset[:, position : position + size]
            yield _Edit(module, attribute, index, widening.coefficients, offset), sizes
            position, sizes = position + size, ()
    for name in layer.riders:
        fields = rows(module := _submodule(model, name))
        sizes = fields.sizes
        for attribute, _ in _present(module, fields):
            default = dict(fields.defaults).get(attribute, 0.0)
            yield _Edit(module, attribute, index, widening.coefficients, default=default), sizes
            sizes = ()
    position = 0
    for consumer in layer.consumers:
        fields = columns(module := _submodule(model, consumer.name))
        places = IndexMap(widening.source, layer.width, 1, consumer.start, consumer.stride)
        for attribute, tensor in _present(module, fields):
            size = consumer.stride * len(tensor) * tensor.shape[2:].numel()
            offset = widening.out_offset[:, position : position + size]
            yield _Edit(module, attribute, places, widening.coefficients, offset), fields.sizes
            position += size


def _shared_out(blocks: Tensor, source: Tensor, coefficients: Tensor) -> Tensor:
    """Outgoing weights λ_j v; the first copy takes what the others leave, so that the copies sum to v to rounding."""
    m, source = len(blocks), source.to(blocks.device)
    copies = blocks.index_select(0, source.clamp(min=0)) * _column(coefficients, blocks)
    appended, owners = copies[m:], source[m:]
    given = torch.zeros_like(blocks).index_add_(0, owners.clamp(min=0), appended)
    return torch.cat([blocks - given, appended])


def _present(module: nn.Module, fields: Fields) -> Iterator[tuple[str, Tensor]]:
    for attribute in fields.tensors:
        tensor = getattr(module, attribute)
        if tensor is not None:
            yield attribute, tensor.detach()


def _parameter_like(replacement: Replacement) -> nn.Parameter:
    """The new values as a parameter with the old one's flags, attributes and gradient."""
    old = replacement.old
    new = nn.Parameter(replacement.new, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    if old.grad is not None:
        new.grad = replacement.carry(old.grad, power=1)
    return new
