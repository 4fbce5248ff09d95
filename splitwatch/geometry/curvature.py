"""Inner Hessians and couplings of all neurons of a hidden layer at once.

With everything downstream of the consumers frozen to first order, the loss depends on the layer through
φ = Σ ⟨e, V h(z)⟩ with z = W x: the consumers' output gradients e, their weights V, the path h. φ is a sum over neurons,
so one product with a stacked (m, d) matrix is every neuron's S_r u_r:

    S u = Xᵀ (∂²φ/∂z² · X u)        inner Hessian, (m, d) → (m, d)
    G u = ∂⟨e, V ḣ⟩/∂V,  ḣ = h'(z) · X u    coupling, (m, d) → (m, c)

∂²φ/∂z² comes from autograd, whatever the activation. Where it is diagonal (every elementwise path, also with BatchNorm
in eval mode, dropout or pooling after it) it is taken once; that it is diagonal is tested, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitwatch.geometry.weights import extract_columns, insert_columns, outgoing_weights
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.precision import full_precision
from splitwatch.probe import LayerTrace, Probe
from splitwatch.records import HiddenLayer, SplitWatchError

Blocks = list[list[Tensor]]


class InnerCurvature:
    """φ of one hidden layer on one batch: its curvature and its mixed derivatives.

    Vectors of incoming weights are (m, d): the producers' weights flattened row by row, each followed by its bias.
    Vectors of outgoing weights are (m, c): the consumers' weight columns, flattened per neuron.
    """

    def __init__(self, trace: LayerTrace) -> None:
        self.trace = trace
        with torch.enable_grad():
            self.z = tuple(z.detach().requires_grad_() for z in trace.pre_activations())
            self.h = trace.path(*self.z)
            signals = zip(trace.consumers, trace.readers, trace.signals, strict=True)
            seeds = [consumer.input_gradient(reader, signal) for consumer, reader, signal in signals]
            self.slope = torch.autograd.grad(self.h, self.z, seeds, create_graph=True, materialize_grads=True)
            # d⟨ν, h⟩/dz is linear in ν; differentiating it in ν once more gives forward derivatives of h.
            self.nu = tuple(torch.zeros_like(h, requires_grad=True) for h in self.h)
            self.pullback = torch.autograd.grad(self.h, self.z, self.nu, create_graph=True, materialize_grads=True)
        self.diagonal = self._diagonal()

    # --- in the space of pre-activations -------------------------------------------------------------------------

    def bend(self, t: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """∂²φ/∂z² · t."""
        if self.diagonal is not None:
            columns = range(len(self.z))
            return tuple(sum((row[q] * t[q] for q in columns), torch.zeros_like(t[0])) for row in self.diagonal)
        return self._bend(t)

    def _bend(self, t: Sequence[Tensor]) -> tuple[Tensor, ...]:
        pairs = [(slope, v) for slope, v in zip(self.slope, t, strict=True) if slope.requires_grad]
        if not pairs:  # a piecewise linear path
            return tuple(torch.zeros_like(z) for z in self.z)
        slopes, directions = zip(*pairs, strict=True)
        return torch.autograd.grad(slopes, self.z, directions, retain_graph=True, materialize_grads=True)

    def _diagonal(self) -> Blocks | None:
        """∂²φ/∂z_p∂z_q as one number an element, or None where elements interact.

        For a diagonal H and any signs s, s ∘ H s is the diagonal; for any other H two draws of s disagree.
        """
        if len({z.shape for z in self.z}) > 1:
            return None
        first, second = (self._signed_blocks(seed) for seed in (0, 1))
        scale = max(float(block.abs().amax()) for row in first for block in row)
        tolerance = 1e3 * torch.finfo(self.z[0].dtype).eps * scale
        pairs = ((a, b) for rows in zip(first, second, strict=True) for a, b in zip(*rows, strict=True))
        return first if all(float((a - b).abs().amax()) <= tolerance for a, b in pairs) else None

    def _signed_blocks(self, seed: int) -> Blocks:
        generator = torch.Generator().manual_seed(seed)
        z = self.z[0]
        signs = (torch.randint(0, 2, z.shape, generator=generator) * 2 - 1).to(z)
        unit = [[signs if p == q else torch.zeros_like(z) for p in range(len(self.z))] for q in range(len(self.z))]
        columns = [self._bend(t) for t in unit]
        return [[columns[q][p] * signs for q in range(len(self.z))] for p in range(len(self.z))]

    def push(self, t: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """ḣ = h'(z) · t."""
        pairs = [(pull, v) for pull, v in zip(self.pullback, t, strict=True) if pull.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(h) for h in self.h)
        pulls, directions = zip(*pairs, strict=True)
        return torch.autograd.grad(pulls, self.nu, directions, retain_graph=True, materialize_grads=True)

    def pull(self, cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """h'(z)ᵀ · cotangents."""
        return torch.autograd.grad(self.h, self.z, cotangents, retain_graph=True, materialize_grads=True)

    # --- between weights and pre-activations ---------------------------------------------------------------------

    def lift(self, u: Tensor) -> tuple[Tensor, ...]:
        """Incoming directions (m, d) → their effect on the pre-activations."""
        maps, parts = self.trace.producers, []
        for producer, part in zip(maps, u.split(self.in_sizes, dim=1), strict=True):
            weight = part[:, : producer.weight_shape[1:].numel()].reshape(producer.weight_shape)
            parts.append(producer(weight, part[:, -1].contiguous() if producer.has_bias else None))
        return tuple(parts)

    def drop(self, t: Sequence[Tensor]) -> Tensor:
        """The adjoint of ``lift``: pre-activations → (m, d)."""
        columns = []
        for producer, signal in zip(self.trace.producers, t, strict=True):
            columns.append(producer.weight_gradient(signal).flatten(1))
            if producer.has_bias:
                columns.append(producer.bias_gradient(signal)[:, None])
        return torch.cat(columns, dim=1)

    def spread(self, v: Tensor) -> tuple[Tensor, ...]:
        """Outgoing directions (m, c) → the cotangents they put on the consumers' inputs."""
        parts = v.split(self.out_sizes, dim=1)
        items = zip(self.trace.layer.consumers, self.trace.consumers, self.trace.signals, parts, strict=True)
        return tuple(
            consumer.input_gradient(insert_columns(part, consumer.weight_shape, where.start, where.stride), signal)
            for where, consumer, signal, part in items
        )

    def collect(self, h: Sequence[Tensor]) -> Tensor:
        """The adjoint of ``spread``: gradients ⟨e, V h⟩ in the outgoing weights, (m, c)."""
        items = zip(self.trace.layer.consumers, self.trace.consumers, self.trace.signals, h, strict=True)
        m = self.trace.layer.width
        parts = [
            extract_columns(consumer.at(value).weight_gradient(signal), m, where.start, where.stride)
            for where, consumer, signal, value in items
        ]
        return torch.cat(parts, dim=1)

    @property
    def in_sizes(self) -> list[int]:
        """Incoming weights of one neuron, by producer."""
        return [p.weight_shape[1:].numel() + p.has_bias for p in self.trace.producers]

    @property
    def out_sizes(self) -> list[int]:
        """Outgoing weights of one neuron, by consumer."""
        consumers = zip(self.trace.layer.consumers, self.trace.consumers, strict=True)
        return [c.stride * m.weight_shape[0] * m.weight_shape[2:].numel() for c, m in consumers]

    # --- the products --------------------------------------------------------------------------------------------

    def hessian(self, u: Tensor) -> Tensor:
        """S_r u_r for every neuron, (m, d) → (m, d)."""
        return self.drop(self.bend(self.lift(u)))

    def coupling(self, u: Tensor) -> Tensor:
        """G_r u_r for every neuron, (m, d) → (m, c)."""
        return self.collect(self.push(self.lift(u)))

    def coupling_adjoint(self, v: Tensor) -> Tensor:
        """G_rᵀ v_r for every neuron, (m, c) → (m, d)."""
        return self.drop(self.pull(self.spread(v)))

    def quotients(self, u: Tensor, v: Tensor | None = None, kappa: float = 1.0, gamma: float = 0.0) -> Tensor:
        """Per-sample values of κ uᵀS u + 2γ vᵀG u, (samples, m); their mean is the batch's value."""
        t = self.lift(u)
        value = [kappa * a * b for a, b in zip(t, self.bend(t), strict=True)]
        if v is not None:
            value += [2 * gamma * a * b for a, b in zip(t, self.pull(self.spread(v)), strict=True)]
        return sum((self._per_sample(q) for q in value), t[0].new_zeros(())) * self.trace.size

    def _per_sample(self, q: Tensor) -> Tensor:
        axis = self.trace.producers[0].channel_axis
        rows, size = q.movedim(axis, -1), self.trace.size
        grouped = rows.reshape(size, -1, rows.shape[-1]) if rows.shape[0] % size == 0 else rows.flatten(0, -2)[:, None]
        return grouped.sum(1) * (grouped.shape[0] / size)


@dataclass(frozen=True, slots=True, eq=False)
class LayerCurvature:
    """The curvature of one hidden layer, summed over the batches of one half of a probe."""

    layer: HiddenLayer
    parts: tuple[InnerCurvature, ...]

    @classmethod
    @full_precision()
    def of(cls, layer: HiddenLayer, traces: Sequence[LayerTrace]) -> LayerCurvature:
        """The curvature from what the layer sees on each batch."""
        return cls(layer, tuple(InnerCurvature(trace) for trace in traces))

    @property
    def d(self) -> int:
        """Incoming weights of one neuron."""
        return sum(self.parts[0].in_sizes)

    @property
    def c(self) -> int:
        """Outgoing weights of one neuron."""
        return sum(self.parts[0].out_sizes)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device that the products have."""
        return self.parts[0].z[0]

    def outgoing(self) -> Tensor:
        """The outgoing weights v, (m, c)."""
        return outgoing_weights(self.layer, self.parts[0].trace.readers)

    def hessian(self, u: Tensor) -> Tensor:
        """S_r u_r for every neuron, (m, d) → (m, d)."""
        return self._sum(lambda part: part.hessian(u))

    def coupling(self, u: Tensor) -> Tensor:
        """G_r u_r for every neuron, (m, d) → (m, c)."""
        return self._sum(lambda part: part.coupling(u))

    def coupling_adjoint(self, v: Tensor) -> Tensor:
        """G_rᵀ v_r for every neuron, (m, c) → (m, d)."""
        return self._sum(lambda part: part.coupling_adjoint(v))

    @full_precision()
    def quotients(self, u: Tensor, v: Tensor | None = None, kappa: float = 1.0, gamma: float = 0.0) -> Tensor:
        """Per-sample values of κ uᵀS u + 2γ vᵀG u over the whole half, (samples, m)."""
        return torch.cat([part.quotients(u, v, kappa, gamma) for part in self.parts])

    def dense(self, product: Callable[[Tensor], Tensor], neurons: Sequence[int] | None = None) -> Tensor:
        """The matrices of a product for k neurons (all by default), column by column in d products, (k, …, d)."""
        m, d = self.layer.width, self.d
        chosen = list(range(m)) if neurons is None else list(neurons)
        if any(not 0 <= r < m for r in chosen):
            raise SplitWatchError(f"neurons: required indices from 0 to {m - 1}, found {chosen}")
        units = torch.eye(d, dtype=self.like.dtype, device=self.like.device)
        return torch.stack([product(unit.expand(m, d).contiguous())[chosen] for unit in units], dim=-1)

    @full_precision()
    def _sum(self, product: Callable[[InnerCurvature], Tensor]) -> Tensor:
        total = self.parts[0].trace.share * product(self.parts[0])
        for part in self.parts[1:]:
            total = total + part.trace.share * product(part)
        return total


def inner_hessian(
    model: nn.Module, layer: HiddenLayer | str, probe: Probe, neurons: Sequence[int] | None = None, half: str = "all"
) -> Tensor:
    """Dense inner Hessians S_r = E[(v_r·e) σ''(w_r·x) x xᵀ], (k, d, d), for inspection and tests.

    Args:
        model: the network, left as it was.
        layer: a hidden layer or its name.
        probe: where to measure.
        neurons: which k neurons; all m of them by default.
        half: the half of the probe to measure on: "fitted", "held_out" or "all".

    Source: Ding, Li & Sun 2026 (inner Hessian); Liu, Wu & Wang 2019 (splitting matrix).
    """
    curvature = layer_curvature(model, layer, probe, half)
    return curvature.dense(curvature.hessian, neurons)


def coupling(
    model: nn.Module, layer: HiddenLayer | str, probe: Probe, neurons: Sequence[int] | None = None, half: str = "all"
) -> Tensor:
    """Dense couplings G_r = E[e σ'(w_r·x) xᵀ], (k, c, d); arguments as for ``inner_hessian``."""
    curvature = layer_curvature(model, layer, probe, half)
    return curvature.dense(curvature.coupling, neurons)


def layer_curvature(model: nn.Module, layer: HiddenLayer | str, probe: Probe, half: str = "all") -> LayerCurvature:
    """The curvature of one hidden layer on one half of the probe."""
    if isinstance(layer, str):
        (layer,) = select_layers(find_hidden_layers(model, probe), [layer])
    return LayerCurvature.of(layer, probe.capture(model, [layer], half)[layer.name])
