"""Measure the geometry of every hidden layer: fit directions on one half of the probe, verify them on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor, nn

from splitwatch.geometry.curvature import LayerCurvature, parts_of
from splitwatch.geometry.eigen import extreme_eigenpairs
from splitwatch.geometry.plateau import splitting_modes
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.metrics import column_moments, standard_error
from splitwatch.probe import Probe
from splitwatch.records import HiddenLayer, LayerGeometry

EQUAL = (0.5, 0.5)
"""The coefficients the escape operator is measured for: among two copies they give the coupling its largest weight."""


def measure_geometry(
    model: nn.Module,
    probe: Probe,
    layers: Sequence[str] | Sequence[HiddenLayer] | None = None,
    *,
    tolerance: float = 1e-3,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, LayerGeometry]:
    """Both ends of every neuron's inner Hessian, its coupling and its best escape, by layer.

    Args:
        model: the network; it is left as it was, to the bit.
        probe: where to measure; one half is fitted on, the other verifies.
        layers: names (or records) of hidden layers; all that can be widened by default.
        tolerance: residual of an eigenpair relative to the operator's norm at which it is accepted.
        confidence: of the two-sided held-out intervals, normal approximation over samples.
        seed: of the solver's start vectors.

    Raises:
        SplitWatchError: the loss is not finite, does not depend on a layer, or a name does not exist.
    """
    chosen = resolve_layers(model, probe, layers)
    fitted, held_out = (probe.capture(model, chosen, half) for half in ("fitted", "held_out"))
    measured = {}
    for layer in chosen:
        curvature = LayerCurvature.of(layer, parts_of(fitted.pop(layer.name)))
        check = LayerCurvature.of(layer, parts_of(held_out.pop(layer.name)))
        measured[layer.name] = _measure(curvature, check, tolerance, confidence, seed)
    return measured


def resolve_layers(
    model: nn.Module, probe: Probe, layers: Sequence[str] | Sequence[HiddenLayer] | None
) -> tuple[HiddenLayer, ...]:
    """The hidden layers meant by a ``layers`` argument."""
    if layers is not None and all(isinstance(layer, HiddenLayer) for layer in layers):
        return tuple(layer for layer in layers if isinstance(layer, HiddenLayer))
    names = None if layers is None else [layer if isinstance(layer, str) else layer.name for layer in layers]
    return select_layers(find_hidden_layers(model, probe), names)


@dataclass(frozen=True, slots=True)
class InnerHessian:
    """S of k neurons, (k, d) → (k, d)."""

    curvature: LayerCurvature

    def __call__(self, u: Tensor) -> Tensor:
        """S u."""
        return self.curvature.hessian(u)

    def restricted(self, rows: Tensor) -> InnerHessian:
        """The same for some of the neurons."""
        return InnerHessian(self.curvature.restricted(rows))


@dataclass(frozen=True, slots=True)
class Across:
    """P = I − v̂ v̂ᵀ on outgoing directions (k, c), for unit vectors v̂ along the outgoing weights.

    P removes what G has only because the point is not quite stationary: v̂ᵀ G is the gradient in w over |v|.
    """

    axis: Tensor

    @classmethod
    def of(cls, curvature: LayerCurvature) -> Across:
        """The projection for the neurons of a layer; where v = 0 it is the identity."""
        return cls(torch.nn.functional.normalize(curvature.outgoing, dim=1, eps=0.0).nan_to_num())

    def __call__(self, v: Tensor) -> Tensor:
        """P v."""
        return v.addcmul(self.axis, (v * self.axis).sum(1, keepdim=True), value=-1)


@dataclass(frozen=True, slots=True)
class CouplingGram:
    """(P G)ᵀ P G of k neurons, (k, d) → (k, d)."""

    curvature: LayerCurvature
    across: Across

    def __call__(self, u: Tensor) -> Tensor:
        """(P G)ᵀ P G u."""
        return self.curvature.coupling_adjoint(self.across(self.curvature.coupling(u)))

    def restricted(self, rows: Tensor) -> CouplingGram:
        """The same for some of the neurons."""
        return CouplingGram(self.curvature.restricted(rows), Across(self.across.axis[rows]))


@dataclass(frozen=True, slots=True)
class EscapeOperator:
    """M = [[κ S, γ Gᵀ P], [γ P G, 0]] of k neurons on (u, v), (k, d + c) → (k, d + c)."""

    curvature: LayerCurvature
    across: Across
    kappa: float
    gamma: float

    def __call__(self, pair: Tensor) -> Tensor:
        """M (u, v)."""
        u, v = pair.split([self.curvature.d, self.curvature.c], dim=1)
        top, bottom = self.curvature.joint(u, self.across(v), self.kappa, self.gamma)
        return torch.cat([top, self.across(bottom)], dim=1)

    def restricted(self, rows: Tensor) -> EscapeOperator:
        """The same for some of the neurons."""
        return replace(self, curvature=self.curvature.restricted(rows), across=Across(self.across.axis[rows]))


def _measure(
    curvature: LayerCurvature, check: LayerCurvature, tolerance: float, confidence: float, seed: int
) -> LayerGeometry:
    v, d, c, across = curvature.outgoing, curvature.d, curvature.c, Across.of(curvature)
    solve = partial(extreme_eigenpairs, m=len(v), dtype=v.dtype, device=v.device, tolerance=tolerance, seed=seed)
    modes = splitting_modes(EQUAL)
    kappa, gamma = float(modes.curvature[0]), float(modes.coupling[0])
    start = curvature.mean_input()
    inner = solve(InnerHessian(curvature), n=d, start=start)
    gram = solve(CouplingGram(curvature, across), n=d, ends="max", start=start)
    operator, start = EscapeOperator(curvature, across, kappa, gamma), torch.cat([start, start.new_zeros(c)])
    escape = solve(operator, n=d + c, ends="min", start=start)
    escape_in, escape_out = escape.min_vector.split([d, c], dim=1)
    escape_out = across(escape_out)
    return LayerGeometry(
        layer=curvature.layer.name,
        min_eigenvalue=inner.min_value,
        max_eigenvalue=inner.max_value,
        min_vector=inner.min_vector,
        max_vector=inner.max_vector,
        residual=inner.residual,
        coupling_norm=gram.max_value.clamp(min=0).sqrt(),
        escape_eigenvalue=escape.min_value,
        escape_in=escape_in,
        escape_out=escape_out,
        escape_residual=escape.residual[:, 0],
        interval=mean_interval(check.quotients(inner.min_vector), confidence),
        max_interval=mean_interval(check.quotients(inner.max_vector), confidence),
        escape_interval=mean_interval(check.quotients(escape_in, escape_out, kappa, gamma), confidence),
        stationarity_residual=curvature.coupling_adjoint(across.axis).norm(dim=1),
    )


def mean_interval(samples: Tensor, confidence: float) -> Tensor:
    """Two-sided confidence interval of the mean of each column of (n, m) samples, (m, 2)."""
    n, mean, squares = column_moments(samples)
    error = NormalDist().inv_cdf(0.5 + confidence / 2) * standard_error(n, squares)
    return torch.stack([mean - error, mean + error], dim=1)
