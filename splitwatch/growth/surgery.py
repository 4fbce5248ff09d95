"""Apply a plan to modules: every new tensor is made first, then all are put in place, or none.

A widened layer keeps its neurons in order and puts the copies behind them, group by group, so one index map tells for
every tensor that holds an entry per neuron (weights, biases, BatchNorm statistics, gradients, optimizer state) where
its entries go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from splitwatch.grouped import by_channel, by_output
from splitwatch.growth.widening import IndexMap, Widening, as_column, biased_consumers, submodule, widenings
from splitwatch.handlers import Fields, columns, rows
from splitwatch.records import GrowthPlan, HiddenLayer
from splitwatch.undisturbed import check_whole


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """One tensor of one module and what takes its place.

    ``maps`` lead from old to new entries, each with the factors that gradients and values in a new entry have against
    its source: ∂L/∂w_j = λ_j ∂L/∂w and w_j = w for rows, ∂L/∂v_j = ∂L/∂v and v_j = λ_j v for columns.
    """

    module: nn.Module
    attribute: str
    old: Tensor
    new: Tensor
    maps: tuple[tuple[IndexMap, Tensor, Tensor], ...]

    @property
    def added(self) -> Tensor:
        """Which entries of the new tensor, as bool, are outgoing weights of new neurons."""
        added = torch.zeros(self.old.shape, dtype=torch.bool)
        for index, _, _ in self.maps:
            if index.axis == 0:
                added = index(added)
            else:
                fresh = torch.ones(len(index.source), dtype=torch.bool).index_fill(0, index.first, False)
                copied = index.blocks(added).index_select(0, index.source.clamp(min=0))
                added = index.put(added, copied | as_column(fresh, copied))
        return added

    def carry_gradient(
        self, tensor: Tensor, scale: Callable[[Tensor], Tensor] = lambda gain: gain, default: float = 0.0
    ) -> Tensor:
        """A gradient of the old shape, or what an optimizer made of past ones, in the new shape; sprouts have none."""
        for index, gradient, _ in self.maps:
            tensor = index(tensor, scale(gradient), default)
        return tensor

    def carry_size(self, tensor: Tensor, scale: Callable[[Tensor], Tensor], begin: float) -> Tensor:
        """Squares or sizes of past gradients in the new shape; those of a sprout are the others' in the mean.

        Times its factor, that is, which is zero for incoming weights: their gradients are of the size of what the
        outgoing ones become. ``begin`` is the least. Outgoing weights that begin at zero would make steps several times
        as long as all others for hundreds of steps, where an optimizer corrects for its age and not for theirs.
        """
        for index, gradient, _ in self.maps:
            factor, usual = scale(gradient), index.blocks(tensor).sqrt().mean(0).square()
            new = as_column(factor[index.source < 0], usual[None]) * usual
            tensor = index(tensor, factor, new.clamp(min=begin))
        return tensor

    def carry_value(self, tensor: Tensor) -> Tensor:
        """An average of the parameter's values of the old shape in the new shape."""
        for index, _, value in self.maps:
            tensor = index(tensor, value)
        return tensor


@dataclass(frozen=True, slots=True, eq=False)
class Surgery:
    """Everything that has to be put in place to widen a model, made beforehand."""

    replacements: tuple[Replacement, ...]
    sizes: tuple[tuple[nn.Module, str, int], ...]

    @property
    def precision(self) -> torch.dtype:
        """The coarsest type of the tensors that change."""
        types = {item.old.dtype for item in self.replacements if item.old.is_floating_point()}
        return max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)

    @property
    def undo(self) -> Surgery:
        """The surgery that brings the model back to what it is now."""
        return Surgery(
            tuple(replace(r, old=r.new, new=r.old) for r in self.replacements),
            tuple((module, name, getattr(module, name)) for module, name, _ in self.sizes),
        )

    def carry_hooks(self) -> None:
        """Have hooks of parameters that go fire on those that come; what is tried out and undone has none.

        Both hold the same dict, in which a hook's handle finds it to remove it.
        """
        for item in self.replacements:
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                if (hooks := getattr(item.old, name)) is not None:
                    setattr(item.new, name, hooks)

    def commit(self) -> None:
        """Put everything in place; undoes itself on any failure."""
        undo = self.undo
        try:
            self._apply()
        except BaseException:
            undo._apply()
            raise

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
        SplitWatchError: the plan does not fit the model, or the model is sharded.
    """
    check_whole(model)
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
    default: float | Tensor = 0.0
    then: tuple[_Edit, ...] = ()

    @property
    def added(self) -> int:
        """By how much the widened axis grows."""
        return (len(self.index.source) - self.index.old_width) * self.index.stride

    def joined(self, other: _Edit) -> _Edit:
        """Both edits of one tensor as one."""
        first, *rest = sorted((self, *self.then, other), key=lambda e: (e.index.axis, e.added > 0, -e.index.start))
        return replace(first, then=tuple(replace(edit, then=()) for edit in rest))

    def replacement(self, offsets: bool) -> Replacement:
        """The new tensor, as a parameter where the old one is."""
        old = getattr(self.module, self.attribute)
        new, seen = old.detach(), None
        for edit in (self, *self.then):
            new = edit._rows(new, offsets) if edit.index.axis == 0 else edit._columns(new, offsets, seen)
            seen = edit.index if edit.index.axis == 0 else seen
        new = laid_out_like(old, new)
        maps = tuple((edit.index, *edit._gains()) for edit in (self, *self.then))
        replacement = Replacement(self.module, self.attribute, old, new, maps)
        return replace(replacement, new=_parameter_like(replacement)) if isinstance(old, nn.Parameter) else replacement

    def _gains(self) -> tuple[Tensor, Tensor]:
        """Factors of gradients and of values."""
        ones = torch.ones_like(self.gain)
        return (self.gain, ones) if self.index.axis == 0 else (ones, self.gain)

    def _rows(self, tensor: Tensor, offsets: bool) -> Tensor:
        new = self.index(tensor, default=self.default)
        if self.offset is None:
            return new
        # A sprout's incoming weights change nothing as long as its outgoing ones are zero.
        keep = torch.ones_like(self.gain) if offsets else (self.index.source < 0).double()
        offset = self.offset.to(new).reshape(len(self.offset), *tensor.shape[1:])
        return new + offset * as_column(keep, new)

    def _columns(self, tensor: Tensor, offsets: bool, rows_before: IndexMap | None) -> Tensor:
        blocks = _shared_out(self.index, self.index.blocks(tensor), self.gain)
        if offsets and self.offset is not None:
            blocks = blocks + self._column_offsets(self.offset, tensor, rows_before).to(blocks)
        return self.index.put(tensor, blocks)

    def _column_offsets(self, offset: Tensor, tensor: Tensor, rows_before: IndexMap | None) -> Tensor:
        """Offsets of columns (new width, c) as blocks of them; every copy of a row gets those of its source."""
        groups, stride = self.index.groups, self.index.stride
        channels = (len(tensor) if rows_before is None else rows_before.old_width) // groups
        shaped = offset.reshape(len(offset), channels, stride, *tensor.shape[2:])
        if rows_before is None:
            return shaped
        old = by_output(shaped.movedim(0, 1).flatten(1, 2), groups)
        return by_channel(rows_before(old), groups).unflatten(1, (-1, stride)).movedim(1, 0)


def _edits(model: nn.Module, widening: Widening) -> Iterator[tuple[_Edit, tuple[str, ...]]]:
    """Every edit that a widening asks for, with the size attributes that follow (once a module)."""
    layer, position = widening.layer, 0
    index = IndexMap(widening.source, layer.width)
    for name in layer.producers:
        fields = rows(module := submodule(model, name))
        sizes = fields.sizes
        for attribute, tensor in _present(module, fields):
            size = tensor[0].numel()
            offset = widening.in_offset[:, position : position + size]
            yield _Edit(module, attribute, index, widening.coefficients, offset), sizes
            position, sizes = position + size, ()
    for name in layer.riders:
        fields = rows(module := submodule(model, name))
        sizes = fields.sizes
        for attribute, tensor in _present(module, fields):
            default = dict(fields.defaults).get(attribute, 0.0)
            default = default(tensor) if callable(default) else default
            yield _Edit(module, attribute, index, widening.coefficients, default=default), sizes
            sizes = ()
    position = 0
    for consumer in layer.consumers:
        fields = columns(module := submodule(model, consumer.name))
        places = IndexMap(widening.source, layer.width, 1, consumer.start, consumer.stride, consumer.groups)
        for attribute, tensor in _present(module, fields):
            size = consumer.stride * (len(tensor) // consumer.groups) * tensor.shape[2:].numel()
            offset = widening.out_offset[:, position : position + size]
            yield _Edit(module, attribute, places, widening.coefficients, offset), fields.sizes
            position += size
    if widening.biases is not None:
        yield from _bias_edits(model, widening.layer, widening.biases)


def _bias_edits(model: nn.Module, layer: HiddenLayer, changes: Tensor) -> Iterator[tuple[_Edit, tuple[str, ...]]]:
    """Changes of the consumers' biases, which keep their sizes."""
    biased = biased_consumers(model, layer)
    for module, change in zip(biased, changes.split([len(module.bias) for module in biased]), strict=True):
        still = IndexMap(torch.arange(len(change)), len(change))
        yield _Edit(module, "bias", still, torch.ones(len(change), dtype=torch.float64), change), ()


def _shared_out(index: IndexMap, blocks: Tensor, coefficients: Tensor) -> Tensor:
    """Outgoing weights λ_j v; the first copy takes what the others leave, so that the copies sum to v to rounding."""
    source, first = (where.to(blocks.device) for where in (index.source, index.first))
    copies = blocks.index_select(0, source.clamp(min=0)) * as_column(coefficients, blocks)
    copies[first] = 0
    given = torch.zeros_like(blocks).index_add_(0, source.clamp(min=0), copies)
    silent = as_column(coefficients[index.first] == 0, blocks).bool()
    copies[first] = torch.where(silent, 0, blocks - given)
    return copies


def _present(module: nn.Module, fields: Fields) -> Iterator[tuple[str, Tensor]]:
    for attribute in fields.tensors:
        tensor = getattr(module, attribute)
        if tensor is not None:
            yield attribute, tensor.detach()


def _parameter_like(replacement: Replacement) -> nn.Parameter:
    """The new values as a parameter with the old one's flags, attributes and gradient."""
    old = replacement.old
    new = nn.Parameter(replacement.new, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    if old.grad is not None:
        new.grad = laid_out_like(old.grad, replacement.carry_gradient(old.grad))
    return new


def laid_out_like(old: Tensor, new: Tensor) -> Tensor:
    """A widened tensor in the memory format of the one it came from: channels last, or else contiguous."""
    ordinary = torch.empty(old.shape, device="meta").stride()
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        axes = 4 if memory_format is torch.channels_last else 5
        if old.ndim == axes and old.stride() != ordinary and old.is_contiguous(memory_format=memory_format):
            return new.contiguous(memory_format=memory_format)
    return new.contiguous()
