"""What a ReLU-like layer sees, neuron by neuron, with data points on the kink kept apart.

ρ(z) = α⁺ z for z ≥ 0, α⁻ z for z < 0. Where a neuron's pre-activation is zero on a data point the loss has one-sided
derivatives only. With e_i the gradient of the mean loss in what the consumers put out, moving w_r along u changes the
slope of the loss in v_r, and the loss itself, at the rates

    d(u) = Σ_i e_i ρ'(z_i; x_i·u) = G̃ u + Σ_kinks β_i |x_i·u|  (c,),      D(u) = v_r · d(u),

G̃ = Σ e_i ᾱ_i x_iᵀ with the mean slope ᾱ on kinks, β_i = e_i (α⁺ − α⁻) / 2. Slopes are observed, not looked up: the
recorded path is replayed at ±1 and must be positively homogeneous everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitwatch.geometry.weights import incoming_weights, outgoing_weights
from splitwatch.layers import chosen_neurons, one_layer
from splitwatch.precision import in_full_precision
from splitwatch.probe import Probe
from splitwatch.records import HiddenLayer, UnsupportedLayerError
from splitwatch.trace import LayerTrace


@dataclass(frozen=True, slots=True, eq=False)
class PiecewiseNeuron:
    """First-order data of one neuron, float64: w (d,), v (c,), G̃ and G without kinks (c, d), ∂L/∂v (c,).

    ``kinks`` (n, d) are the inputs on the kink, ``bend`` (n, c) their β. Rates of change up to ``zero`` count as zero;
    ``silent`` is a neuron without outgoing weights to that precision, ``reach`` is |v|, never below it.
    """

    incoming: Tensor
    outgoing: Tensor
    smooth: Tensor
    coupling: Tensor
    gradient: Tensor
    kinks: Tensor
    bend: Tensor
    zero: float
    silent: bool
    reach: float

    def rates(self, directions: Tensor) -> Tensor:
        """d(u) for directions (q, d), as (q, c)."""
        return directions @ self.smooth.T + (directions @ self.kinks.T).abs() @ self.bend

    def slopes(self, directions: Tensor) -> Tensor:
        """D(u), the one-sided derivatives of the loss, for directions (q, d), as (q,)."""
        return self.rates(directions) @ self.outgoing

    def across(self, rates: Tensor) -> Tensor:
        """The part of rates (…, c) across v: the part that a stationary point may have."""
        unit = torch.zeros_like(self.outgoing) if self.silent else self.outgoing / self.outgoing.norm()
        return rates - (rates @ unit)[..., None] * unit

    @property
    def flat(self) -> float:
        """Slopes of the loss up to this count as zero."""
        return self.zero * self.reach


@dataclass(frozen=True, slots=True, eq=False)
class PiecewiseLayer:
    """The neurons chosen from one ReLU-like layer; ``outputs`` is c."""

    name: str
    chosen: tuple[int, ...]
    outputs: int
    neurons: tuple[PiecewiseNeuron, ...]


@in_full_precision
def piecewise_layer(
    model: nn.Module,
    layer: HiddenLayer | str,
    probe: Probe,
    half: str = "all",
    neurons: Sequence[int] | None = None,
    tolerance: float | None = None,
) -> PiecewiseLayer:
    """Measure a Linear → ReLU-like → Linear layer; arguments as for ``directional_stationarity``.

    Raises:
        UnsupportedLayerError: the layer is of another kind.
        SplitWatchError: a neuron does not exist.
    """
    layer = one_layer(model, probe, layer)
    chosen = tuple(chosen_neurons(layer, neurons))
    seen = _Seen.of(probe.capture(model, [layer], half)[layer.name])
    share = 8 * seen.eps**0.5 if tolerance is None else tolerance
    measured = tuple(seen.neuron(r, share) for r in chosen)
    return PiecewiseLayer(layer.name, chosen, seen.outgoing.shape[1], measured)


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """All N samples of a half: x (N, d), z (N, m), and per consumer e (N, c), α⁺ and α⁻ (N, m)."""

    x: Tensor
    z: Tensor
    readers: tuple[tuple[Tensor, Tensor, Tensor], ...]
    incoming: Tensor
    outgoing: Tensor
    eps: float

    @classmethod
    def of(cls, traces: Sequence[LayerTrace]) -> _Seen:
        first, z = traces[0], [trace.pre_activations()[0] for trace in traces]
        consumers = zip(*[_readers(trace) for trace in traces], strict=True)
        return cls(
            x=_joined([_inputs(trace) for trace in traces]),
            z=_joined(z),
            readers=tuple(
                (_joined(e), _joined(up), _joined(down)) for e, up, down in (zip(*c, strict=True) for c in consumers)
            ),
            incoming=_joined([incoming_weights(first.weights, first.biases)]),
            outgoing=_joined([outgoing_weights(first.layer, first.readers)]),
            eps=torch.finfo(z[0].dtype).eps,
        )

    def neuron(self, r: int, tolerance: float) -> PiecewiseNeuron:
        z, size, w, v = self.z[:, r], self.x.norm(dim=1), self.incoming[r], self.outgoing[r]
        slopes = [(e, up[:, r], down[:, r]) for e, up, down in self.readers]
        bent = torch.stack([(up - down).abs() > 64 * self.eps * up.abs() for _, up, down in slopes]).any(0)
        kink = (z.abs() <= 4 * (len(w) + 1) * self.eps * w.norm() * size) & bent & (size > 0)
        steep = torch.cat([e * torch.maximum(up.abs(), down.abs())[:, None] for e, up, down in slopes], dim=1)
        bend = torch.cat([e * ((up - down) / 2)[:, None] for e, up, down in slopes], dim=1)
        mean = torch.cat([e * ((up + down) / 2)[:, None] for e, up, down in slopes], dim=1)
        pull = mean + bend * torch.where(kink, 0, torch.where(z >= 0, 1.0, -1.0).to(z))[:, None]
        largest = float(self.outgoing.norm(dim=1).max())
        return PiecewiseNeuron(
            incoming=w,
            outgoing=v,
            smooth=pull.T @ self.x,
            coupling=pull[~kink].T @ self.x[~kink],
            gradient=pull.T @ torch.where(kink, 0, z),
            kinks=self.x[kink],
            bend=bend[kink],
            zero=tolerance * float((steep.norm(dim=1) * size).sum()),
            silent=float(v.norm()) <= tolerance * largest,
            reach=max(float(v.norm()), tolerance * largest),
        )


def _readers(trace: LayerTrace) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Signals e and slopes α⁺, α⁻ for every consumer of one batch.

    Raises:
        UnsupportedLayerError: the layer is not Linear → elementwise path with its one kink at zero → Linear.
    """
    layer, z = trace.layer, trace.pre_activations()[0]
    plain = len(trace.producers) == 1 and all(m.conv is None for m in (*trace.producers, *trace.consumers))
    if not plain or any(c.stride != 1 for c in layer.consumers):
        raise UnsupportedLayerError(f"layer: required one Linear → path → Linear, found {layer}")
    up, down = _read(trace, torch.ones_like(z)), [-h for h in _read(trace, -torch.ones_like(z))]
    for at in (z, *_draws(z)):
        for h, high, low in zip(_read(trace, at), up, down, strict=True):
            if h.shape != z.shape or not _close(h, torch.where(at >= 0, high, low) * at):
                required = "a piecewise linear path with its one kink at zero (ReLU, LeakyReLU, PReLU)"
                raise UnsupportedLayerError(f"layer: required {required}, found {layer}")
    return [(e * trace.share, high, low) for e, high, low in zip(trace.signals, up, down, strict=True)]


@torch.no_grad()
def _read(trace: LayerTrace, at: Tensor) -> list[Tensor]:
    """What each consumer reads of the neurons, given their pre-activations."""
    values = zip(trace.layer.consumers, trace.path(at), strict=True)
    return [h.narrow(-1, c.start, trace.layer.width) for c, h in values]


def _draws(z: Tensor) -> list[Tensor]:
    """Numbers of every size, half of them negative."""
    generator = torch.Generator().manual_seed(0)
    sizes = [10 ** torch.empty(z.shape).uniform_(-3, 3, generator=generator) for _ in range(2)]
    return [(size * sign).to(z) for size, sign in zip(sizes, (1, -1), strict=True)]


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 64 * torch.finfo(a.dtype).eps * b.abs()).all())


def _inputs(trace: LayerTrace) -> Tensor:
    x = trace.producers[0].input
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if trace.producers[0].has_bias else x


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten(0, -2) for part in parts]).double().cpu()
