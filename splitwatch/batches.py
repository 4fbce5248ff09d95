"""Batches of any structure: how many samples, which of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from enum import Enum
from math import isfinite
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from splitwatch.records import SplitWatchError

Batch = Any
"""Any structure of tensors whose first axis is the sample, and of lists with an entry per sample."""


def opened(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """What a container holds, and how to make one of its kind that holds something else; None for anything else."""
    parts, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    if len(parts) != 1 or parts[0] is not value:
        return parts, lambda new: pytree.tree_unflatten(new, spec)
    if isinstance(value, MutableMapping):
        return list(value.values()), lambda new: _with_items(value, new)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if hasattr(value, field.name)]
        return [getattr(value, name) for name in names], lambda new: _with_fields(value, names, new)
    return None


def mapped(function: Callable[[Any], Any], batch: Batch) -> Batch:
    """The batch with a function of everything that is no container, in containers of its own."""
    inside = None if isinstance(batch, Tensor) else opened(batch)
    return function(batch) if inside is None else inside[1]([mapped(function, part) for part in inside[0]])


def tensors(batch: Batch) -> Iterator[Tensor]:
    """All tensors of a batch, one after the other."""
    inside = None if isinstance(batch, Tensor) else opened(batch)
    for part in [batch] if inside is None else inside[0]:
        if inside is not None:
            yield from tensors(part)
        elif isinstance(part, Tensor):
            yield part


def kind(batch: Batch) -> Hashable:
    """What tells batches apart that a loss may treat in ways of their own: structure, keys, strings, flags, dtypes.

    Not the sizes of tensors, numbers and lists of names, which may be others in every batch.
    """
    if isinstance(batch, Tensor):
        return batch.dtype, batch.ndim
    inside = opened(batch)
    if inside is None:
        return batch if isinstance(batch, (str, bool, Enum)) else type(batch)
    parts = tuple(map(kind, inside[0]))
    if type(batch) in (list, tuple) and next(tensors(batch), None) is None:  # of names
        return type(batch)
    if isinstance(batch, list):  # of samples, as many as there are
        return frozenset(parts)
    return type(batch), tuple(batch) if isinstance(batch, Mapping) else (), parts


def batch_size(batch: Batch) -> int:
    """Number of samples in a batch: what most of its tensors have on their first axis, or lists of unlike ones entries.

    Where two numbers are as frequent, it is the one that more tensors have on their first axis, then the first one.

    Raises:
        SplitWatchError: there is no tensor to tell it from.
    """
    if isinstance(batch, Tensor) and batch.ndim:  # the usual ones, without walking through the batch
        return batch.shape[0]
    if type(batch) in (tuple, list) and batch and all(isinstance(part, Tensor) and part.ndim for part in batch):
        sizes = {part.shape[0] for part in batch}
        if len(sizes) == 1:
            return sizes.pop()
    direct: Counter[int] = Counter()
    listed: Counter[int] = Counter()
    _vote(batch, direct, listed, root=True)
    if not direct and not listed:
        raise SplitWatchError(
            "batches: required tensors whose first axis is the sample, found a batch without any tensor"
        )
    return max([*direct, *listed], key=lambda size: (direct[size] + listed[size], direct[size]))


def shares(batches: Sequence[Batch]) -> list[float]:
    """Each batch's share of all samples."""
    sizes = [batch_size(batch) for batch in batches]
    return [size / sum(sizes) for size in sizes]


def halve(batch: Batch) -> list[Batch]:
    """Every other sample, and the rest."""
    size = batch_size(batch)
    if size < 2:
        raise SplitWatchError("batches: required two samples or more (half is held out), found one; pass more")
    return cut(batch, 2)


def cut(batch: Batch, parts: int) -> list[Batch]:
    """A batch in parts of nearly equal size, as many as asked for where its samples suffice."""
    parts, size = min(parts, batch_size(batch)), batch_size(batch)
    return [batch] if parts == 1 else [select_samples(batch, torch.arange(i, size, parts)) for i in range(parts)]


class Cuts:
    """Cuts batches into parts, the same ones whenever it is asked, so that losses of several networks can be paired."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], bool] = {}

    def pieces(
        self, batches: Sequence[Batch], parts: int, losses: Callable[[Sequence[Batch]], list[float]]
    ) -> list[Batch]:
        """Every batch cut into parts of two samples or more.

        One stays whole where its parts have no finite losses and it has: a mean over valid targets is nan where a part
        has none, pairs may be torn apart, and what a model carries over from batch to batch may be of another size.
        """
        found: list[Batch] = []
        for batch in batches:
            pieces, key = cut(batch, min(parts, max(batch_size(batch) // 2, 1))), (id(batch), parts)
            if len(pieces) > 1 and key not in self._known:
                finite = self._finite(losses, pieces)
                if finite or isfinite(losses([batch])[0]):
                    self._known[key] = finite
            found += pieces if self._known.get(key, True) else [batch]
        return found

    @staticmethod
    def _finite(losses: Callable[[Sequence[Batch]], list[float]], pieces: Sequence[Batch]) -> bool:
        try:
            return all(map(isfinite, losses(pieces)))
        except (torch.OutOfMemoryError, MemoryError):  # says nothing about samples
            raise
        except Exception:
            return False


class Loan:
    """Batches for a loss that may change what it is given: in containers of their own, so that items may go.

    Tensors are copies at first, and stay so if one of them was changed in place; arrays always are.
    """

    def __init__(self) -> None:
        self._copies, self._known = True, False

    @property
    def returned(self) -> bool:
        """Whether a loss was computed of it before."""
        return self._known

    @contextmanager
    def of(self, batch: Batch) -> Iterator[Batch]:
        """What may be changed inside of the context."""
        lent = self._copy(batch)
        given = self._noted(lent)
        yield lent
        self._learn(given)

    def _copy(self, batch: Batch) -> Batch:
        return mapped(_copied if self._copies else _own, batch)

    def _noted(self, batch: Batch) -> list[tuple[Tensor, float]]:
        """All tensors that are given away, with the number of changes in place so far, as long as that is to learn."""
        return [] if self._known else [(tensor, _version(tensor)) for tensor in tensors(batch)]

    def _learn(self, given: list[tuple[Tensor, float]]) -> None:
        """Whether tensors have to be copied, from those that were given away."""
        if not self._known:
            self._known, self._copies = True, any(_version(tensor) != version for tensor, version in given)


class Keepsake(Loan):
    """A batch as it was before a training step that may change it."""

    def __init__(self) -> None:
        super().__init__()
        self._batch: Batch = None
        self._given: list[tuple[Tensor, float]] = []

    def keep(self, batch: Batch) -> None:
        """Called before the step."""
        self._batch, self._given = self._copy(batch), self._noted(batch)

    def taken(self, batch: Batch) -> Batch:
        """What was kept, or the batch that is left where nothing was; called after the step."""
        if self._batch is None:
            return batch
        self._learn(self._given)
        kept, self._batch, self._given = self._batch, None, []
        return kept


def select_samples(batch: Batch, rows: Tensor) -> Batch:
    """The batch with only some of its samples; everything that has no entry per sample is kept.

    Tensors and arrays have one per sample where their first axis is as long as the batch, lists and tuples inside the
    batch where they are. Unless these hold dictionaries, they are structure where all their tensors have that length.
    """
    size, numbers = batch_size(batch), rows.tolist()

    def select(value: Any, root: bool = False) -> Any:
        if isinstance(value, Tensor):
            return _rows(value, rows) if value.ndim and value.shape[0] == size else value
        if not root and _per_sample(value, size):
            return type(value)(value[i] for i in numbers)
        inside = opened(value)
        if inside is not None:
            return inside[1]([select(part) for part in inside[0]])
        return value[rows.numpy()] if getattr(value, "shape", ())[:1] == (size,) else value  # an array

    return select(batch, root=True)


def _vote(value: Any, direct: Counter[int], listed: Counter[int], root: bool = False) -> None:
    """Count who speaks for which number of samples; of a list of like tensors all together have one voice."""
    if isinstance(value, Tensor):
        direct.update(value.shape[:1])
        return
    heads = _heads(value) if type(value) in (tuple, list) and not root else []
    if heads and len(set(heads)) == 1 and all(isinstance(part, Tensor) for part in value):
        direct.update([heads[0]])
        return
    if not root and (len(set(heads)) > 1 or _holds_records(value)):
        listed[len(value)] += len(heads) + _holds_records(value)
    for part in (opened(value) or ([], None))[0]:
        _vote(part, direct, listed)


def _per_sample(value: Any, size: int) -> bool:
    """Whether a list or tuple inside a batch has an entry for each of its samples."""
    if type(value) not in (tuple, list) or len(value) != size:
        return False
    heads = _heads(value)
    return not heads or set(heads) != {size} or _holds_records(value)


def _holds_records(value: Any) -> bool:
    """Whether it is a list of dictionaries, as the targets of detection are: one per sample, however alike."""
    return type(value) in (tuple, list) and bool(value) and all(isinstance(part, MutableMapping) for part in value)


def _heads(value: Any) -> list[int]:
    """The lengths of the first axes of all tensors inside."""
    return [tensor.shape[0] for tensor in tensors(value) if tensor.ndim]


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    rows = rows.to(tensor.device)
    if tensor.layout is torch.strided or tensor.is_nested:
        return tensor[rows]
    return tensor.to_sparse_coo().index_select(0, rows).to_sparse(layout=tensor.layout)


def _with_items(mapping: Any, values: list[Any]) -> Any:
    new = copy(mapping)
    for key, value in zip(list(mapping), values, strict=True):
        new[key] = value
    return new


def _with_fields(value: Any, names: list[str], parts: list[Any]) -> Any:
    new = copy(value)
    for name, part in zip(names, parts, strict=True):
        object.__setattr__(new, name, part)  # frozen ones too, and without running __post_init__ again
    return new


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else _own(leaf)


def _own(leaf: Any) -> Any:
    """A copy of an array, which does not tell whether it was changed in place; a tensor itself."""
    return leaf.copy() if isinstance(leaf, numpy.ndarray) else leaf


def _version(tensor: Tensor) -> float:
    """A count of changes in place; nan, which differs from itself, where none is kept."""
    return float("nan") if tensor.is_inference() else tensor._version
