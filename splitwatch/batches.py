"""Batches of any structure: how many samples, which of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from splitwatch.records import SplitWatchError

Batch = Any
"""Any structure of tensors whose first axis is the sample."""


def batch_size(batch: Batch) -> int:
    """Number of samples in a batch: the length of the first axis of its first tensor."""
    head = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(head, Tensor) and head.ndim:  # what comes first in any case, without walking through the batch
        return head.shape[0]
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise SplitWatchError("batches: required tensors whose first axis is the sample, found a batch without any tensor")


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


def in_pieces(batches: Sequence[Batch], parts: int) -> list[Batch]:
    """Every batch cut into parts, as far as its samples allow."""
    return [piece for batch in batches for piece in cut(batch, parts)]


def select_samples(batch: Batch, rows: Tensor) -> Batch:
    """The batch with only some of its samples; everything that is not a per-sample tensor is kept."""
    size = batch_size(batch)

    def select(leaf: Any) -> Any:
        per_sample = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == size
        return leaf[rows.to(leaf.device)] if per_sample else leaf

    return pytree.tree_map(select, batch)
