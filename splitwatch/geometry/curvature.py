"""Inner Hessians and couplings of all neurons of a hidden layer at once.

With everything downstream of the consumers frozen to first order, the loss depends on the layer through
φ = Σ ⟨e, V h(z)⟩ with z = W x: the consumers' output gradients e, their weights V, the path h. φ is a sum over neurons,
so one product with a stacked (k, d) matrix is the S_r u_r of k neurons:

    S u = Xᵀ (∂²φ/∂z² · X u)        inner Hessian, (k, d) → (k, d)
    G u = ∂⟨e, V ḣ⟩/∂V,  ḣ = h'(z) · X u    coupling, (k, d) → (k, c)

Between weights and pre-activations everything is in closed form (``linear_map``); what lies between pre-activations and
consumers is a number an element wherever it can be, and autograd's otherwise (``geometry.response``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splitwatch.geometry.ends import channels, incoming_sizes, lift, outgoing_gradient, producer_seats, reader_seats
from splitwatch.geometry.response import Pattern, Response
from splitwatch.geometry.weights import insert_columns, outgoing_weights
from splitwatch.ranks import summed
from splitwatch.records import HiddenLayer
from splitwatch.trace import LayerTrace


class InnerCurvature:
    """φ of the m neurons of one hidden layer, or of k of them, on one batch: its curvature and its mixed derivatives.

    Vectors of incoming weights are (k, d): the producers' weights flattened row by row, each followed by its bias.
    Vectors of outgoing weights are (k, c): the consumers' weight columns, flattened per neuron.
    """

    def __init__(self, trace: LayerTrace, pattern: Pattern | None = None) -> None:
        hollow = tuple(consumer.hollow() for consumer in trace.consumers)
        self._respond(replace(trace, consumers=hollow), Response(trace, pattern))

    def restricted(self, rows: Tensor) -> InnerCurvature:
        """The same for some of the k neurons, given by their indices."""
        part = copy.copy(self)
        part._respond(self.trace, self.response.restricted(rows))
        return part

    def _respond(self, trace: LayerTrace, response: Response) -> None:
        """Take these k neurons, with their seats among the outputs of producers and the inputs of consumers."""
        self.trace, self.response = trace, response
        self.seats = producer_seats(trace, response.rows)
        self.reads = reader_seats(trace, response.rows if response.narrow else None)

    # --- between weights and pre-activations ---------------------------------------------------------------------

    def lift(self, u: Tensor) -> tuple[Tensor, ...]:
        """Incoming directions (m, d) → their effect on the pre-activations."""
        return lift(self.trace, u, self.seats)

    def drop(self, t: Sequence[Tensor]) -> Tensor:
        """The adjoint of ``lift``: pre-activations → (m, d)."""
        return torch.cat(self._columns(t), dim=1)

    def _columns(self, t: Sequence[Tensor]) -> list[Tensor]:
        columns = []
        for producer, signal, seats in zip(self.trace.producers, t, self.seats, strict=True):
            columns.append(producer.weight_gradient(signal, seats).flatten(1))
            if producer.has_bias:
                columns.append(producer.bias_gradient(signal)[:, None])
        return columns

    def total_input(self) -> Tensor:
        """What a gradient of one everywhere in the pre-activations would be in the neurons' weights.

        (k, d), or (1, d) where no producer has groups: then all neurons read the same.
        """
        alike = all(p.groups == 1 for p in self.trace.producers)
        k = 1 if alike else self.response.count
        one = [torch.ones_like(t) for t in self.lift(self.trace.weights[0].new_zeros(k, sum(self.in_sizes)))]
        return self.drop(one)

    @property
    def nbytes(self) -> int:
        """What is kept in memory for this."""
        maps = (*self.trace.producers, *self.trace.signals)
        seen = [x if isinstance(x, Tensor) else x.input for x in maps]
        return sum(x.nbytes for x in seen) + self.response.nbytes

    def spread(self, v: Tensor) -> tuple[Tensor, ...]:
        """Outgoing directions (k, c) → the cotangents they put on the consumers' inputs."""
        if self._scattered is not None:
            v = v.new_zeros(self.trace.layer.width, v.shape[1]).index_copy_(0, self._scattered, v)
        items = zip(self.trace.layer.consumers, self.trace.consumers, self.trace.signals, self.reads, strict=True)
        cotangents, narrow = [], self.response.narrow
        for (where, consumer, signal, seats), part in zip(items, v.split(self.out_sizes, dim=1), strict=True):
            outputs, inputs, *kernel = consumer.columns_shape
            start, inputs = (0, len(v) * where.stride) if narrow else (where.start, inputs)
            columns = insert_columns(part, torch.Size([outputs, inputs, *kernel]), start, where.stride)
            cotangents.append(consumer.input_gradient(columns, signal, seats if narrow else None))
        return tuple(cotangents)

    def collect(self, h: Sequence[Tensor]) -> Tensor:
        """The adjoint of ``spread``: gradients ⟨e, V h⟩ in the outgoing weights, (k, c)."""
        blocks = h if self.response.narrow else channels(self.trace, h, 0, self.trace.layer.width)
        columns = outgoing_gradient(self.trace, blocks, self.reads)
        return columns if self._scattered is None else columns[self._scattered]

    @property
    def _scattered(self) -> Tensor | None:
        """Where the k neurons stand among all m, if what the consumers read is held for all."""
        return None if self.response.narrow else self.response.rows

    @property
    def in_sizes(self) -> list[int]:
        """Incoming weights of one neuron, by producer."""
        return incoming_sizes(self.trace)

    @property
    def out_sizes(self) -> list[int]:
        """Outgoing weights of one neuron, by consumer."""
        consumers = zip(self.trace.layer.consumers, self.trace.consumers, strict=True)
        return [c.stride * m.columns_shape[0] * m.columns_shape[2:].numel() for c, m in consumers]

    # --- the products --------------------------------------------------------------------------------------------

    def hessian(self, u: Tensor) -> Tensor:
        """S_r u_r for every neuron, (k, d) → (k, d)."""
        return self.drop(self.response.bend(self.lift(u)))

    def coupling(self, u: Tensor) -> Tensor:
        """G_r u_r for every neuron, (k, d) → (k, c)."""
        return self.collect(self.response.push(self.lift(u)))

    def coupling_adjoint(self, v: Tensor) -> Tensor:
        """G_rᵀ v_r for every neuron, (k, c) → (k, d)."""
        return self.drop(self.response.pull(self.spread(v)))

    def joint(self, u: Tensor, v: Tensor, kappa: float, gamma: float) -> Tensor:
        """κ S u + γ Gᵀ v and γ G u side by side, (k, d + c), for less than S u, Gᵀ v and G u by themselves."""
        t = self.lift(u)
        pairs = zip(self.response.bend(t), self.response.pull(self.spread(v)), strict=True)
        top = self._columns([(kappa * bent).add_(pulled, alpha=gamma) for bent, pulled in pairs])
        return torch.cat([*top, self.collect(self.response.push(t)).mul_(gamma)], dim=1)

    def quotients(self, u: Tensor, v: Tensor | None = None, kappa: float = 1.0, gamma: float = 0.0) -> Tensor:
        """Per-sample values of κ uᵀS u + 2γ vᵀG u, (samples, k); their mean is the batch's value."""
        t = self.lift(u)
        value = [kappa * a * b for a, b in zip(t, self.response.bend(t), strict=True)]
        if v is not None:
            value += [2 * gamma * a * b for a, b in zip(t, self.response.pull(self.spread(v)), strict=True)]
        return sum((self._per_sample(q) for q in value), t[0].new_zeros(())) * self.trace.size

    def _per_sample(self, q: Tensor) -> Tensor:
        axis = self.trace.producers[0].channel_axis
        rows, size = q.movedim(axis, -1), self.trace.size
        grouped = rows.reshape(size, -1, rows.shape[-1]) if rows.shape[0] % size == 0 else rows.flatten(0, -2)[:, None]
        return grouped.sum(1) * (grouped.shape[0] / size)


@dataclass(frozen=True, slots=True, eq=False)
class LayerCurvature:
    """The curvature of k neurons of a hidden layer (all m at first) on one half of a probe.

    ``parts`` is gone through once a product. ``d`` and ``c`` count one neuron's incoming and outgoing weights,
    ``outgoing`` (k, c) are the latter; the products have its dtype and are on its device. ``weight`` is this process's
    share of the samples, which the products sum over all processes of a distributed run.
    """

    layer: HiddenLayer
    parts: Iterable[InnerCurvature]
    outgoing: Tensor
    d: int
    weight: float = 1.0

    @classmethod
    def of(cls, layer: HiddenLayer, parts: Iterable[InnerCurvature], weight: float = 1.0) -> LayerCurvature:
        """The curvature from what the layer sees on each batch."""
        first = next(iter(parts))
        return cls(layer, parts, outgoing_weights(layer, first.trace.readers), sum(first.in_sizes), weight)

    @property
    def c(self) -> int:
        """Outgoing weights of one neuron."""
        return self.outgoing.shape[1]

    def restricted(self, rows: Tensor) -> LayerCurvature:
        """The curvature of some of the k neurons, given by their indices."""
        return replace(self, parts=_restricted(self.parts, rows), outgoing=self.outgoing[rows])

    def hessian(self, u: Tensor) -> Tensor:
        """S_r u_r for every neuron, (k, d) → (k, d)."""
        return self._mean(lambda part: part.hessian(u))

    def coupling(self, u: Tensor) -> Tensor:
        """G_r u_r for every neuron, (k, d) → (k, c)."""
        return self._mean(lambda part: part.coupling(u))

    def coupling_adjoint(self, v: Tensor) -> Tensor:
        """G_rᵀ v_r for every neuron, (k, c) → (k, d)."""
        return self._mean(lambda part: part.coupling_adjoint(v))

    def joint(self, u: Tensor, v: Tensor, kappa: float, gamma: float) -> Tensor:
        """κ S u + γ Gᵀ v and γ G u side by side, (k, d + c), for every neuron."""
        return self._mean(lambda part: part.joint(u, v, kappa, gamma))

    def mean_input(self) -> Tensor:
        """The direction of the mean input of a neuron, which its curvature often stretches most, (k, d) or (1, d)."""
        return torch.nn.functional.normalize(self._mean(lambda part: part.total_input()), dim=1)

    def proven(self) -> Tensor:
        """Whose S ⪰ 0 and whose S ⪯ 0 by the sign of φ'' at every sample, (k, 2) bool; most often nothing is proven."""
        doubts = torch.zeros(len(self.outgoing), 2, device=self.outgoing.device)
        for part in self.parts:
            doubts += ~part.response.signs()
        return summed(doubts) == 0

    def quotients(self, u: Tensor, v: Tensor | None = None, kappa: float = 1.0, gamma: float = 0.0) -> Tensor:
        """Per-sample values of κ uᵀS u + 2γ vᵀG u over this process's half, (samples, k)."""
        return torch.cat([part.quotients(u, v, kappa, gamma) for part in self.parts])

    def dense(self, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The matrices of a product for the k neurons, column by column in d products, (k, …, d)."""
        units = torch.eye(self.d, dtype=self.outgoing.dtype, device=self.outgoing.device)
        return torch.stack([product(unit.expand(len(self.outgoing), -1).contiguous()) for unit in units], dim=-1)

    def _mean(self, product: Callable[[InnerCurvature], Tensor]) -> Tensor:
        total = None
        for part in self.parts:
            value, share = product(part), part.trace.share * self.weight
            total = value.mul_(share) if total is None else total.add_(value, alpha=share)
        assert total is not None
        return summed(total)


@dataclass(frozen=True, slots=True, eq=False)
class _Restricted:
    """Parts that are not kept, each restricted to some neurons as it comes."""

    parts: Iterable[InnerCurvature]
    rows: Tensor

    def __iter__(self) -> Iterator[InnerCurvature]:
        return (part.restricted(self.rows) for part in self.parts)


def _restricted(parts: Iterable[InnerCurvature], rows: Tensor) -> Iterable[InnerCurvature]:
    return tuple(part.restricted(rows) for part in parts) if isinstance(parts, tuple) else _Restricted(parts, rows)
