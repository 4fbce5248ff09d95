"""How what the consumers read responds to a layer's pre-activations on one batch: φ'' and h', whatever the activation.

φ = Σ ⟨e, V h(z)⟩, with the consumers' output gradients e, their weights V and the path h. Both derivatives come from
autograd. Where one is diagonal (elementwise paths; for φ'' also with BatchNorm in eval mode, dropout or pooling after
the activation) it is taken once, one number an element, and the graph is let go. That it is diagonal is tested: for a
diagonal D and any signs s, s ∘ D s is the diagonal; for any other matrix two draws of s disagree.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from splitwatch.trace import LayerTrace

Blocks = tuple[tuple[Tensor | None, ...], ...]

GRAPH = 6
"""Tensors that a path's graph holds for each of its ends, about."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which derivatives of a path are diagonal: the second ones of φ, the first ones of h."""

    bend: bool
    slope: bool


class Graph:
    """h(z) and φ'(z) with the autograd graphs that differentiate them once more."""

    def __init__(self, trace: LayerTrace) -> None:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention differentiates once
            self.z = tuple(z.detach().requires_grad_() for z in trace.pre_activations())
            # What a consumer reads detached has the slope zero.
            self.h = tuple(h if h.requires_grad else h.detach().requires_grad_() for h in trace.path(*self.z))
            signals = zip(trace.consumers, trace.readers, trace.signals, strict=True)
            seeds = [consumer.input_gradient(reader, signal) for consumer, reader, signal in signals]
            self.slope = torch.autograd.grad(self.h, self.z, seeds, create_graph=True, materialize_grads=True)
            # d⟨ν, h⟩/dz is linear in ν; differentiating it in ν once more gives forward derivatives of h.
            self.nu = tuple(torch.zeros_like(h, requires_grad=True) for h in self.h)
            self.pullback = torch.autograd.grad(self.h, self.z, self.nu, create_graph=True, materialize_grads=True)

    def bend(self, t: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """∂²φ/∂z² · t."""
        return _differentiate(self.slope, self.z, t)

    def push(self, t: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """h'(z) · t."""
        return _differentiate(self.pullback, self.nu, t)

    def pull(self, cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """h'(z)ᵀ · cotangents."""
        return torch.autograd.grad(self.h, self.z, cotangents, retain_graph=True, materialize_grads=True)

    def pattern(self) -> Pattern:
        """Which derivatives are diagonal, from two draws of signs each."""
        bend = len({z.shape for z in self.z}) == 1 and _agree(*(self._bends(_signs(self.z[0], i)) for i in (0, 1)))
        alike = all(z.shape == self.z[0].shape and h.numel() == z.numel() for z in self.z for h in self.h)
        return Pattern(bend, alike and _agree(*(self._slopes(_signs(self.z[0], i)) for i in (0, 1))))

    def bends(self) -> Blocks:
        """The diagonals ∂²φ/∂z_p∂z_q, None where they vanish."""
        return _sparse(self._bends(torch.ones_like(self.z[0])))

    def slopes(self) -> Blocks:
        """The diagonals ∂h_k/∂z_p in the shape of z, None where they vanish."""
        return _sparse(self._slopes(torch.ones_like(self.z[0])))

    def _bends(self, signs: Tensor) -> list[list[Tensor]]:
        zero, count = torch.zeros_like(signs), range(len(self.z))
        columns = [self.bend([signs if p == q else zero for p in count]) for q in count]
        return [[columns[q][p].mul(signs) for q in count] for p in count]

    def _slopes(self, signs: Tensor) -> list[list[Tensor]]:
        rows = [
            self.pull([signs.reshape(h.shape) if i == k else torch.zeros_like(h) for i, h in enumerate(self.h)])
            for k in range(len(self.h))
        ]
        return [[block.mul(signs) for block in row] for row in rows]


def _differentiate(slopes: Sequence[Tensor], inputs: Sequence[Tensor], t: Sequence[Tensor]) -> tuple[Tensor, ...]:
    pairs = [(slope, v) for slope, v in zip(slopes, t, strict=True) if slope.requires_grad]
    if not pairs:  # a piecewise linear path
        return tuple(torch.zeros_like(x) for x in inputs)
    outputs, directions = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, directions, retain_graph=True, materialize_grads=True)


def _signs(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return (torch.randint(0, 2, like.shape, generator=generator, device=like.device) * 2 - 1).to(like)


def _agree(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    scale = max(_largest(block) for row in first for block in row)
    tolerance = 1e3 * torch.finfo(first[0][0].dtype).eps * scale
    pairs = ((a, b) for rows in zip(first, second, strict=True) for a, b in zip(*rows, strict=True))
    return all(_largest(a - b) <= tolerance for a, b in pairs)


def _largest(x: Tensor) -> float:
    """The largest magnitude, zero of nothing."""
    return float(x.abs().amax()) if x.numel() else 0.0


def _sparse(blocks: list[list[Tensor]]) -> Blocks:
    return tuple(tuple(block.detach() if bool(block.any()) else None for block in row) for row in blocks)


class Response:
    """φ'' and h' of k neurons of a layer on one batch; tensors are shaped like pre-activations with k channels.

    What ``push`` returns and ``pull`` takes is shaped like what the consumers read, with only the k neurons in it where
    ``narrow``; otherwise the path mixes positions and they hold all neurons, zeros for the others.
    """

    def __init__(self, trace: LayerTrace, pattern: Pattern | None = None) -> None:
        graph = Graph(trace)
        self.pattern = pattern or graph.pattern()
        self.axis, self.rows = trace.producers[0].channel_axis, None
        self.reads = [(h.shape, c.channel_axis) for h, c in zip(graph.h, trace.consumers, strict=True)]
        self.shapes, self.like = [z.shape for z in graph.z], graph.z[0].new_empty(0)  # a slice would keep all of z
        self.bends = graph.bends() if self.pattern.bend else None
        self.slopes = graph.slopes() if self.pattern.slope else None
        self.graph = None if self.narrow and self.pattern.bend else graph

    @property
    def narrow(self) -> bool:
        """Whether what the consumers read is held for the k neurons only."""
        return self.slopes is not None

    @property
    def nbytes(self) -> int:
        """What is kept in memory; of a graph a guess."""
        held = [x for blocks in (self.bends, self.slopes) for row in blocks or () for x in row if x is not None]
        graph = 0 if self.graph is None else GRAPH * sum(x.nbytes for x in (*self.graph.z, *self.graph.h))
        return sum(x.nbytes for x in held) + graph

    def restricted(self, rows: Tensor) -> Response:
        """The same for some of the k neurons."""
        part = copy.copy(self)
        part.rows = rows if self.rows is None else self.rows[rows]
        part.bends, part.slopes = (_select(blocks, self.axis, rows) for blocks in (self.bends, self.slopes))
        return part

    def signs(self) -> Tensor:
        """For which of k neurons φ'' ⪰ 0 everywhere, and for which φ'' ⪯ 0, (k, 2) bool; False where it cannot be told.

        A single producer's φ'' that is diagonal tells; Xᵀ φ'' X has the same sign then (Gram form).
        """
        blocks = [block for row in self.bends or () for block in row if block is not None]
        if self.bends is None or (blocks and len(self.bends) > 1):
            return torch.zeros(self.count, 2, dtype=torch.bool, device=self.like.device)
        if not blocks:
            return torch.ones(self.count, 2, dtype=torch.bool, device=self.like.device)
        rows = blocks[0].movedim(self.axis, 0).flatten(1)
        return torch.stack([rows.amin(1) >= 0, rows.amax(1) <= 0], dim=1)

    @property
    def count(self) -> int:
        """Number of neurons k."""
        return self.shapes[0][self.axis] if self.rows is None else len(self.rows)

    def bend(self, t: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """∂²φ/∂z² · t."""
        if self.bends is not None:
            return tuple(_combined(row, t) for row in self.bends)
        return self._chosen(self._graph.bend(self._padded(t)))

    def push(self, t: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """ḣ = h'(z) · t."""
        if self.slopes is None:
            return self._graph.push(self._padded(t))
        return tuple(
            _combined(row, t).reshape(_resized(shape, axis, t[0].shape[self.axis] / self.shapes[0][self.axis]))
            for row, (shape, axis) in zip(self.slopes, self.reads, strict=True)
        )

    def pull(self, cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """h'(z)ᵀ · cotangents."""
        if self.slopes is None:
            return self._chosen(self._graph.pull(cotangents))
        shape, axis = self.reads[0]
        shape = _resized(self.shapes[0], self.axis, cotangents[0].shape[axis] / shape[axis])
        aligned = [nu.reshape(shape) for nu in cotangents]
        return tuple(_combined(column, aligned) for column in zip(*self.slopes, strict=True))

    @property
    def _graph(self) -> Graph:
        assert self.graph is not None
        return self.graph

    def _padded(self, t: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.rows is None:
            return t
        return [
            x.new_zeros(shape).index_copy_(self.axis, self.rows, x) for x, shape in zip(t, self.shapes, strict=True)
        ]

    def _chosen(self, t: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return t if self.rows is None else tuple(x.index_select(self.axis, self.rows) for x in t)


def _combined(blocks: Sequence[Tensor | None], t: Sequence[Tensor]) -> Tensor:
    """Σ_i blocks_i ∘ t_i."""
    terms = [block * x for block, x in zip(blocks, t, strict=True) if block is not None]
    return reduce(Tensor.add_, terms) if terms else torch.zeros_like(t[0])


def _resized(shape: torch.Size, axis: int, share: float) -> list[int]:
    sizes = list(shape)
    sizes[axis] = round(sizes[axis] * share)
    return sizes


def _select(blocks: Blocks | None, axis: int, rows: Tensor) -> Blocks | None:
    if blocks is None:
        return None
    return tuple(tuple(None if b is None else b.index_select(axis, rows) for b in row) for row in blocks)
