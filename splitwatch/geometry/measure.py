"""Measure the geometry of every hidden layer: fit directions on one half of the probe, verify them on the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn

from splitwatch.geometry.curvature import LayerCurvature
from splitwatch.geometry.eigen import ExtremeEigenpairs, extreme_eigenpairs
from splitwatch.geometry.plateau import splitting_modes
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.precision import in_full_precision
from splitwatch.probe import Probe
from splitwatch.records import HiddenLayer, LayerGeometry

EQUAL = (0.5, 0.5)
"""The coefficients the escape operator is measured for: among two copies they give the coupling its largest weight."""


@in_full_precision
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
        curvature = LayerCurvature.of(layer, fitted.pop(layer.name))
        check = LayerCurvature.of(layer, held_out.pop(layer.name))
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


class EscapeOperator:
    """M = [[κ S, γ Gᵀ P], [γ P G, 0]] on (u, v), with P = I − v̂ v̂ᵀ along the outgoing weights.

    P removes what G has only because the point is not quite stationary: v̂ᵀ G is the gradient in w over |v|.
    """

    def __init__(self, curvature: LayerCurvature, kappa: float, gamma: float) -> None:
        self.curvature, self.kappa, self.gamma = curvature, kappa, gamma
        self.axis = torch.nn.functional.normalize(curvature.outgoing(), dim=1, eps=0.0).nan_to_num()

    def project(self, v: Tensor) -> Tensor:
        """P v for every neuron, (m, c)."""
        return v - (v * self.axis).sum(1, keepdim=True) * self.axis

    def coupling(self, u: Tensor) -> Tensor:
        """P G u for every neuron, (m, d) → (m, c)."""
        return self.project(self.curvature.coupling(u))

    def coupling_gram(self, u: Tensor) -> Tensor:
        """(P G)ᵀ P G u for every neuron, (m, d) → (m, d)."""
        return self.curvature.coupling_adjoint(self.coupling(u))

    def __call__(self, pair: Tensor) -> Tensor:
        """M (u, v) for every neuron, (m, d + c) → (m, d + c)."""
        u, v = pair.split([self.curvature.d, self.curvature.c], dim=1)
        top = self.kappa * self.curvature.hessian(u)
        top = top + self.gamma * self.curvature.coupling_adjoint(self.project(v))
        return torch.cat([top, self.gamma * self.coupling(u)], dim=1)


def _measure(
    curvature: LayerCurvature, check: LayerCurvature, tolerance: float, confidence: float, seed: int
) -> LayerGeometry:
    def extremes(product: Callable[[Tensor], Tensor], n: int) -> ExtremeEigenpairs:
        m, like = curvature.layer.width, curvature.like
        return extreme_eigenpairs(product, m, n, dtype=like.dtype, device=like.device, tolerance=tolerance, seed=seed)

    modes = splitting_modes(EQUAL)
    kappa, gamma = float(modes.curvature[0]), float(modes.coupling[0])
    operator = EscapeOperator(curvature, kappa, gamma)
    inner = extremes(curvature.hessian, curvature.d)
    gram = extremes(operator.coupling_gram, curvature.d)
    escape = extremes(operator, curvature.d + curvature.c)
    escape_in, escape_out = escape.min_vector.split([curvature.d, curvature.c], dim=1)
    escape_out = operator.project(escape_out)
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
        stationarity_residual=curvature.coupling_adjoint(operator.axis).norm(dim=1),
    )


def mean_interval(samples: Tensor, confidence: float) -> Tensor:
    """Two-sided confidence interval of the mean of each column of (n, m) samples, (m, 2)."""
    n = len(samples)
    mean = samples.mean(0)
    error = samples.std(0) / n**0.5 if n > 1 else torch.full_like(mean, torch.inf)
    half_width = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return torch.stack([mean - half_width, mean + half_width], dim=1)
