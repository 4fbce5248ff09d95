"""Grouped convolutions: their weights by input channel, and any choice of channels made even among the groups.

A convolution with g groups reads each of its i inputs with the o/g outputs of that input's group only. Its weight
(o, i/g, …) holds the rows of one output; ``by_channel`` (o/g, i, …) holds the columns of one input, as the weight of a
map without groups does. A product with some of the channels needs as many in every group: ``Seats`` fills up with
zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def by_channel(weight: Tensor, groups: int) -> Tensor:
    """A weight (o, i/g, …) with one column per input channel, (o/g, i, …)."""
    return weight if groups == 1 else weight.unflatten(0, (groups, -1)).movedim(0, 1).flatten(1, 2)


def by_output(weight: Tensor, groups: int) -> Tensor:
    """The inverse of ``by_channel``: (o/g, i, …) → (o, i/g, …)."""
    return weight if groups == 1 else weight.unflatten(1, (groups, -1)).movedim(1, 0).flatten(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Seats:
    """Where k channels stand among ``count``, of which every group has as many: ``index`` (k,)."""

    index: Tensor
    count: int

    @classmethod
    def of(cls, channels: Tensor, total: int, groups: int) -> Seats | None:
        """Seats for some of ``total`` channels; None where they are all of them in order, or one group has all."""
        if groups == 1 or (len(channels) == total and bool((channels.diff() == 1).all())):
            return None
        group = channels // (total // groups)
        sizes = group.bincount(minlength=groups)
        order = group.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[group[order]]
        most = int(sizes.max())
        return cls(group * most + rank, groups * most)

    def fill(self, values: Tensor, axis: int) -> Tensor:
        """Values of the k channels, and zeros for the others, along an axis."""
        shape = list(values.shape)
        shape[axis] = self.count
        return values.new_zeros(shape).index_copy_(axis, self.index, values)

    def pick(self, values: Tensor, axis: int) -> Tensor:
        """The k channels of what was computed for all."""
        return values.index_select(axis, self.index)
