"""Which channel every element on a path depends on, found by exchanging channels and looking what changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from splitwatch.anatomy import Anatomy, Slice
from splitwatch.linear_map import LinearCall
from splitwatch.records import Consumer, UnsupportedLayerError
from splitwatch.tape import Call, Path, Value, evaluate, is_floating


class ChannelCodes:
    """The channel that each element of each value on a path depends on (-1: none).

    Every channel is numbered in binary. For each bit the path is replayed with the channels exchanged whose bit is one,
    then with the others: elements that change in the first replay only have that bit in their code, elements that
    change in both depend on more than one channel.

    Raises:
        UnsupportedLayerError: an operation mixes channels; its message says which.
    """

    def __init__(self, anatomy: Anatomy, where: Slice) -> None:
        self.anatomy, self.where = anatomy, where
        widths = {call.weight.shape[0] for call in where.producers}
        if len(widths) > 1:
            raise UnsupportedLayerError(f"producers of different widths {sorted(widths)} meet on its path")
        replay = _Replay(Path(anatomy.tape, where.path, where.starts, where.ends), where.producers)
        codes = {v: torch.zeros(t.shape, dtype=torch.int32, device=t.device) for v, t in replay.base.items()}
        touched = {v: torch.zeros_like(code, dtype=torch.bool) for v, code in codes.items()}
        for bit in range(max(1, (where.width - 1).bit_length())):
            ones, zeros = replay.changed(bit, 1), replay.changed(bit, 0)
            self._refuse_mixing({v: ones[v] & zeros[v] for v in codes})
            for v, code in codes.items():
                code += ones[v].int() << bit
                touched[v] |= ones[v] | zeros[v]
        self.codes = {v: torch.where(touched[v], code, -1) for v, code in codes.items()}

    def columns(self, call: LinearCall) -> list[int]:
        """For every channel of a consumer's input the channel of the layer it carries (-1: none)."""
        return self.codes[call.input].movedim(call.channel_axis, 0).flatten(1).amax(1).tolist()

    def _refuse_mixing(self, mixed: dict[Value, Tensor]) -> None:
        for i in self.where.path:
            call = self.anatomy.tape.calls[i]
            if any(bool(mixed[v].any()) for v in call.results if v in mixed):
                raise UnsupportedLayerError(f"{self.anatomy.describe(call)} on its path mixes the channels")

    @torch.no_grad()
    def bound_leaves(self, call: Call) -> list[int]:
        """The constant leaves of a call that hold one entry per channel, found by changing single entries."""
        call = detached(call)
        inner = {i for i, v in call.inputs.items() if v in self.codes}
        fixed = {i: _normal(call.leaves[i]) for i in inner if is_floating(call.leaves[i])}
        outer = [i for i in call.inputs if i not in inner and is_floating(call.leaves[i])]
        return [i for i in outer if self._touched_channels(call, i, fixed) == 1 and call.leaves[i].ndim]

    def _touched_channels(self, call: Call, leaf: int, fixed: dict[int, Tensor]) -> int:
        """How many channels one entry of a constant reaches (none where the call only puts it beside them).

        Entries of channels that are silent (a zero weight of BatchNorm) reach nothing, so several are tried, and a
        slope is seen on one side of zero only.
        """
        constant = call.leaves[leaf].detach()
        for place in self._places(call, constant.numel()):
            changed = constant.clone(memory_format=torch.contiguous_format)
            changed.view(-1)[place] += 1 + changed.abs().amax()
            reached: set[int] = set()
            for values in (fixed, {i: -value for i, value in fixed.items()}):
                reached |= self._reached(evaluate(call, values), evaluate(call, values | {leaf: changed}))
            if reached:
                return len(reached)
        return 0

    def _reached(self, before: dict[Value, Tensor], after: dict[Value, Tensor]) -> set[int]:
        """The channels of elements that differ."""
        reached: set[int] = set()
        for v in (v for v in before if v in self.codes and before[v].shape == self.codes[v].shape):
            reached.update(self.codes[v][(before[v] != after[v]) & (self.codes[v] >= 0)].unique().tolist())
        return reached

    def _places(self, call: Call, count: int, most: int = 16) -> list[int]:
        """Entries of a constant: one that meets element by element, where no ReLU cuts the path off, and others."""
        middle = count // 2
        places = sorted({middle, *range(0, count, -(-count // most))}, key=lambda place: abs(place - middle))
        for code in (self.codes[v].flatten() for v in call.results if v in self.codes):
            coded = (code >= 0).nonzero()
            if len(code) == count and len(coded):
                return [int(coded[len(coded) // 2]), *places]
        return places


class _Replay:
    """Replays a path on two draws of the pre-activations, exchanged on half of the channels."""

    def __init__(self, path: Path, producers: Sequence[LinearCall]) -> None:
        self.path = path
        self.draws = [_random_pair(call) for call in producers]
        self.axes = [call.channel_axis for call in producers]
        with torch.no_grad():
            self.base = path.trace(*(a for a, _ in self.draws))

    @torch.no_grad()
    def changed(self, bit: int, side: int) -> dict[Value, Tensor]:
        """Which elements change when the channels whose ``bit`` equals ``side`` are exchanged."""
        starts = [self._exchange(a, b, axis, bit, side) for (a, b), axis in zip(self.draws, self.axes, strict=True)]
        values = self.path.trace(*starts)
        return {v: (t != self.base[v]) & ~(t.isnan() & self.base[v].isnan()) for v, t in values.items()}

    @staticmethod
    def _exchange(a: Tensor, b: Tensor, axis: int, bit: int, side: int) -> Tensor:
        members = (torch.arange(a.shape[axis], device=a.device) >> bit) & 1 == side
        return torch.where(members.reshape(-1, *[1] * (-axis - 1)), b, a)


def detached(call: Call) -> Call:
    """A recorded call without the autograd graph of its tensors."""
    leaves = tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves)
    return Call(call.function, leaves, call.spec, call.inputs, call.outputs, call.mutated)


def pre_activation(call: LinearCall) -> Tensor:
    """A producer's output, computed again: the recorded one may have been changed in place."""
    values = evaluate(detached(call.call), {})
    return values[call.output]


def _normal(like: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device).to(like)


def _random_pair(call: LinearCall) -> tuple[Tensor, Tensor]:
    """Two draws of a producer's output, of its own size and of opposite signs: a ReLU would hide two negative ones."""
    z = pre_activation(call)
    scale = z.std() if z.numel() > 1 and bool(z.std() > 0) else z.new_ones(())
    first, second = _normal(z, 2 * call.index) * scale, _normal(z, 2 * call.index + 1) * scale
    return first, torch.where(first > 0, -second.abs(), second.abs())


def block(name: str, columns: list[int], width: int) -> Consumer:
    """The contiguous block of a consumer's columns that reads the neurons in order.

    Raises:
        UnsupportedLayerError: there is none.
    """
    members = [j for j, channel in enumerate(columns) if channel >= 0]
    if not members:
        raise UnsupportedLayerError(f"what its consumer {name} reads does not depend on it")
    stride = max(Counter(columns[j] for j in members).values())
    start = members[0] - (columns[members[0]] * stride)
    expected = {start + r * stride + p: r for r in range(width) for p in range(stride)}
    if width * stride > len(columns) - start:
        raise UnsupportedLayerError(f"its consumer {name} reads some of the neurons only")
    if start < 0 or any(columns[j] != expected.get(j) for j in members):
        raise UnsupportedLayerError(f"its consumer {name} reads the neurons in an order that cannot be widened")
    return Consumer(name, start, stride)
