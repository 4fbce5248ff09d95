"""Measure the geometry of every hidden layer: fit directions on one half of the probe, verify them on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from splitwatch.geometry.curvature import LayerCurvature
from splitwatch.geometry.eigen import extreme_eigenpairs
from splitwatch.geometry.plateau import splitting_modes
from splitwatch.geometry.sweep import MAX_BYTES, Sweep
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.metrics import HeldOutQuotient
from splitwatch.precision import in_full_precision
from splitwatch.probe import Probe
from splitwatch.records import HiddenLayer, LayerGeometry, SplitWatchError

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
    wanted: int | None = None,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> dict[str, LayerGeometry]:
    """Both ends of every neuron's inner Hessian, its coupling and its best escape, by layer.

    Args:
        model: the network; it is left as it was, to the bit.
        probe: where to measure; one half is fitted on, the other verifies.
        layers: names (or records) of hidden layers; all that can be widened by default.
        tolerance: residual of an eigenpair relative to the operator's norm at which it is accepted.
        confidence: of each held-out bound, one-sided, normal approximation over samples.
        wanted: how many neurons of a layer a decision can take; escapes of the others are left at 10 % as soon as it
            is clear that they are not among the lowest. By default all are iterated to ``tolerance``.
        max_bytes: bound on what is kept in memory beside the model's own forward and backward pass on one batch, and
            half of it again on the solver's vectors.
        seed: of the solver's start vectors.

    Raises:
        SplitWatchError: the loss is not finite, does not depend on a layer, or a name does not exist.
    """
    chosen = resolve_layers(model, probe, layers)
    fits = {}
    for curvature in Sweep(model, probe, chosen, "fitted", max_bytes).curvatures():
        fits[curvature.layer.name] = _fit(curvature, tolerance, wanted, max_bytes, seed)
        del curvature  # before the next one is made
    checks = _check(Sweep(model, probe, chosen, "held_out", max_bytes), fits, confidence)
    return {name: LayerGeometry(name, **fit, **checks[name]) for name, fit in fits.items()}


def resolve_layers(
    model: nn.Module, probe: Probe, layers: Sequence[str] | Sequence[HiddenLayer] | None
) -> tuple[HiddenLayer, ...]:
    """The hidden layers meant by a ``layers`` argument; of records from ``find_hidden_layers``, the growable ones."""
    if isinstance(layers, str):
        raise SplitWatchError(f"layers: required a list of layers or their names, found {layers!r}; write [{layers!r}]")
    if layers is not None and all(isinstance(layer, HiddenLayer) for layer in layers):
        records = [layer for layer in layers if isinstance(layer, HiddenLayer)]
        return select_layers(records, None) or select_layers(
            records, [layer.name for layer in records], to_measure=True
        )
    names = None if layers is None else [layer if isinstance(layer, str) else layer.name for layer in layers]
    return select_layers(find_hidden_layers(model, probe), names, to_measure=True)


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
        images = self.curvature.joint(u, self.across(v), self.kappa, self.gamma)
        images[:, self.curvature.d :] = self.across(images[:, self.curvature.d :])
        return images

    def start(self, u: Tensor) -> Tensor:
        """A guess at the lowest eigenvectors from those of S, (k, d) → (k, d + c): v parts as γ G u says."""
        v = -self.across(self.curvature.coupling(u))
        return torch.cat([u, torch.nn.functional.normalize(v, eps=0.0).nan_to_num()], dim=1) / 2**0.5

    def restricted(self, rows: Tensor) -> EscapeOperator:
        """The same for some of the neurons."""
        return replace(self, curvature=self.curvature.restricted(rows), across=Across(self.across.axis[rows]))


def _fit(
    curvature: LayerCurvature, tolerance: float, wanted: int | None, max_bytes: int, seed: int
) -> dict[str, Tensor]:
    """What the fitted half says of a layer, by the names of ``LayerGeometry``."""
    v, d, c, across = curvature.outgoing, curvature.d, curvature.c, Across.of(curvature)
    like = {"m": len(v), "dtype": v.dtype, "device": v.device}
    solve = partial(extreme_eigenpairs, **like, tolerance=tolerance, max_bytes=max_bytes // 2, seed=seed)
    start = curvature.mean_input()
    inner = solve(InnerHessian(curvature), n=d, start=start)
    gram = solve(CouplingGram(curvature, across), n=d, ends="max", start=start)
    operator = EscapeOperator(curvature, across, *escape_weights())
    wanted = wanted if curvature.layer.groups == 1 else None  # a round takes the lowest of every group
    escape = solve(operator, n=d + c, ends="min", start=operator.start(inner.min_vector), wanted=wanted)
    escape_in, escape_out = escape.min_vector.split([d, c], dim=1)
    return {
        "min_eigenvalue": inner.min_value,
        "max_eigenvalue": inner.max_value,
        "min_vector": inner.min_vector,
        "max_vector": inner.max_vector,
        "residual": inner.residual,
        "coupling_norm": gram.max_value.clamp(min=0).sqrt(),
        "escape_eigenvalue": escape.min_value,
        "escape_in": escape_in,
        "escape_out": across(escape_out),
        "escape_residual": escape.residual[:, 0],
        "stationarity_residual": curvature.coupling_adjoint(across.axis).norm(dim=1),
        "proven": curvature.proven(),
        "screened": escape.screened,
    }


def _check(sweep: Sweep, fits: Mapping[str, Mapping[str, Tensor]], confidence: float) -> dict[str, dict[str, Tensor]]:
    """Held-out confidence bounds of the fitted directions' Rayleigh quotients, in one pass through the batches."""
    names = ("interval", "max_interval", "escape_interval")
    metrics = {(layer, name): HeldOutQuotient(confidence, two_sided=False) for layer in fits for name in names}
    for parts in sweep.batches():
        for layer in list(parts):
            part, fit = parts.pop(layer), fits[layer]
            metrics[layer, "interval"].update(part.quotients(fit["min_vector"]))
            metrics[layer, "max_interval"].update(part.quotients(fit["max_vector"]))
            escape = part.quotients(fit["escape_in"], fit["escape_out"], *escape_weights())
            metrics[layer, "escape_interval"].update(escape)
    return {
        layer: {name: _interval(metrics[layer, name]).to(fit["residual"]) for name in names}
        for layer, fit in fits.items()
    }


def escape_weights() -> tuple[float, float]:
    """κ and γ of the mode in which two equal copies part."""
    modes = splitting_modes(EQUAL)
    return float(modes.curvature[0]), float(modes.coupling[0])


def _interval(metric: HeldOutQuotient) -> Tensor:
    found = metric.compute()
    return torch.stack([found["lower"].reshape(-1), found["upper"].reshape(-1)], dim=1)  # torchmetrics squeezes (1,)
