"""Growth moves of others, as choices only: surgery and optimizer state are the same for all of them.

    Net2Wider   Chen, Goodfellow & Shlens 2016: function-preserving copies of random neurons, with noise
    S2D         Liu, Wu & Wang 2019: halves at ± ε v_min of the splitting matrix
    S3D         Wu, Ye, Lei, Lee & Liu 2020: signed halves too, where λ_max promises more
    GradMax     Evci et al. 2022: silent incoming weights, outgoing ones of largest gradient norm
    TINY        Verbockhaven et al. 2024: the best rank-k answer to what existing weights cannot express, line search
    Firefly     Wu, Liu, Stone & Liu 2020: splits and new neurons trained briefly, ranked by integrated gradient

A choice takes (site, layer, count) and returns moves. All neurons of the whole probe are looked at.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from growth_site import Move, Site, fresh
from torch import Tensor

from splitwatch.anatomy import plain_module
from splitwatch.geometry.eigen import extreme_eigenpairs
from splitwatch.geometry.ends import lift, outgoing_gradient
from splitwatch.geometry.measure import InnerHessian
from splitwatch.geometry.sweep import Sweep
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.grow import widened
from splitwatch.linear_map import LinearMap
from splitwatch.records import GrowthPlan, HiddenLayer, Split, Sprout
from splitwatch.trace import LayerTrace

KINK = 1e-3
"""How far from zero GradMax's neurons start where ReLU has its kink, relative to existing incoming weights."""
AMPLITUDES = [0.0, *(2.0**power for power in range(-10, 11))]
"""What TINY's line search tries."""


def net2wider(site: Site, layer: HiddenLayer, count: int, noise: float = 1e-2) -> list[Move]:
    """Copies of random neurons, their outgoing weights shared equally; noise relative to the weights' size."""
    w, v = neuron_weights(site.model, layer)
    drawn = torch.randint(len(w), (count,), generator=site.generator)
    moves: list[Move] = []
    for r in drawn.unique().tolist():
        k = int((drawn == r).sum()) + 1
        offset = torch.randn(k, w.shape[1], generator=site.generator) * noise * w.square().mean().sqrt()
        offset[0] = 0
        moves.append(Split(layer.name, r, (1 / k,) * k, offset, torch.zeros(k, v.shape[1]), 0.0))
    return moves


def halves(layer: HiddenLayer, r: int, u: Tensor, c: int, coefficients: tuple[float, float] = (0.5, 0.5)) -> Split:
    """Two copies, the second moved by −u, the first so that their mean by the coefficients stays where it was."""
    a, b = coefficients
    return Split(layer.name, r, coefficients, torch.stack([u * b / a, -u]), torch.zeros(2, c), 0.0)


def splitting_matrices(site: Site, layer: HiddenLayer, ends: str):
    """Extreme eigenpairs of every neuron's splitting matrix, which is its inner Hessian."""
    curvature = next(iter(Sweep(site.model, site.probe, [layer], "all").curvatures()))
    v = curvature.outgoing
    like = {"m": len(v), "n": curvature.d, "dtype": v.dtype, "device": v.device}
    return extreme_eigenpairs(InnerHessian(curvature), **like, tolerance=1e-2, ends=ends, seed=site.seed)


def s2d(site: Site, layer: HiddenLayer, count: int, offset: float = 1e-2) -> list[Move]:
    """Halves at ± ε v_min of the neurons with the lowest eigenvalues."""
    found, (w, v) = splitting_matrices(site, layer, "min"), neuron_weights(site.model, layer)
    lowest = found.min_value.argsort()[:count].tolist()
    return [halves(layer, r, offset * w[r].norm() * found.min_vector[r].to(w), v.shape[1]) for r in lowest]


def s3d(site: Site, layer: HiddenLayer, count: int, offset: float = 1e-2, cap: float = 3.0) -> list[Move]:
    """Binary signed splits of the largest gain, −min(λ_min, −(c−1)/(c+1)·λ_max)."""
    found, (w, v) = splitting_matrices(site, layer, "both"), neuron_weights(site.model, layer)
    signed = -(cap - 1) / (cap + 1) * found.max_value
    moves: list[Move] = []
    for r in torch.minimum(found.min_value, signed).argsort()[:count].tolist():
        equal = bool(found.min_value[r] <= signed[r])
        u = offset * w[r].norm() * (found.min_vector if equal else found.max_vector)[r].to(w)
        moves.append(halves(layer, r, u, v.shape[1], (0.5, 0.5) if equal else ((1 + cap) / 2, (1 - cap) / 2)))
    return moves


def gradmax(site: Site, layer: HiddenLayer, count: int) -> list[Move]:
    """Incoming weights zero; outgoing ones along the singular vectors of E[s xᵀ], as long as existing ones.

    There are no more of those than outputs or inputs; what is missing mixes them at random by their singular values.
    The paper takes ReLU'(0) for 1, PyTorch for 0, so that neurons of ReLU would never learn: they start just above 0,
    or next to it where there is no bias.
    """
    w, v = neuron_weights(site.model, layer)
    slope = sum(t.share * slopes(t) for t in traced(site, layer))
    _, values, along = torch.linalg.svd(torch.as_tensor(slope), full_matrices=False)
    mixed = torch.randn(max(count - len(values), 0), len(values), generator=site.generator).to(values) * values @ along
    outgoing = F.normalize(torch.cat([along[:count], mixed]), dim=1) * v.norm(dim=1).mean()
    incoming = torch.zeros(count, w.shape[1])
    if any("relu" in operation.lower() for operation in layer.operations):
        incoming += KINK * w.norm(dim=1).mean() * F.normalize(above_zero(site, layer, count), dim=1)
    return [Sprout(layer.name, row, v) for row, v in zip(incoming, outgoing, strict=True)]


def above_zero(site: Site, layer: HiddenLayer, count: int) -> Tensor:
    """Incoming weights that are a bias alone, random ones where there is none."""
    w = fresh(site, layer, count)
    if all(plain_module(site.model, name).bias is not None for name in layer.producers):
        w[:, :-1], w[:, -1] = 0, 1
    return w


def traced(site: Site, layer: HiddenLayer) -> list[LayerTrace]:
    return [traces[layer.name] for traces in site.probe.traces(site.model, [layer], "all")]


def slopes(trace: LayerTrace) -> Tensor:
    """E[x sᵀ] (d, c): what a new neuron that is linear in its input would see, s the loss's slope downstream."""
    return outgoing_gradient(trace, linear_features(trace))


def linear_features(trace: LayerTrace) -> list[Tensor]:
    """What consumers would read of neurons that each pass on one input, biases included."""
    d = sum(p.weight_shape[1:].numel() + p.has_bias for p in trace.producers)
    features = lift(trace, torch.eye(d).to(trace.signals[0]))
    flat = trace.producers[0].conv is not None and trace.consumers[0].conv is None
    return [x.flatten(1) for x in features] if flat else list(features)


def tiny(site: Site, layer: HiddenLayer, count: int) -> list[Move]:
    """√λ S^−½ u in, −√λ v out, for the largest singular triples of S^−½ E[x s⊥ᵀ]; one amplitude by line search.

    s⊥ is what is left of s after the best change of the existing outgoing weights, S = E[x xᵀ]. There are at most as
    many neurons as outputs or inputs.
    """
    traces = residual(traced(site, layer))
    w = neuron_weights(site.model, layer)[0]
    eye = torch.eye(w.shape[1]).to(w)
    rows = torch.cat([_rows(lift(t, eye)[0], t.producers[0]) for t in traces]).double()
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    keep = values > torch.finfo(torch.float32).eps * len(values) * values[-1]
    root = vectors[:, keep] / values[keep].sqrt()
    slope = torch.as_tensor(sum(t.share * slopes(t) for t in traces)).double()
    u, size, vh = torch.linalg.svd(root.T @ slope, full_matrices=False)
    incoming = (root @ u * size.sqrt()).T[:count].to(w)
    outgoing = (-size.sqrt()[:, None] * vh)[:count].to(w)

    def at(gamma: float) -> list[Move]:
        pairs = zip(incoming * gamma**0.5, outgoing * gamma**0.5, strict=True)
        return [Sprout(layer.name, w, v) for w, v in pairs]

    best = min(AMPLITUDES, key=lambda gamma: widened_loss(site, layer, at(gamma)))
    return [] if best == 0 else at(best)  # an amplitude of zero would leave neurons that never learn


def widened_loss(site: Site, layer: HiddenLayer, moves: list[Move]) -> float:
    with widened(site.model, GrowthPlan((layer,), tuple(moves), "")):
        loss = site.probe.loss(site.model, "all", finite=False)
    return loss if loss == loss else float("inf")


def residual(traces: list[LayerTrace]) -> list[LayerTrace]:
    """The traces with signals less what the consumer's existing weights and bias can do about them."""
    consumers = [t.consumers[0] for t in traces]
    features = [_patches(c).double() for c in consumers]
    signals = [_rows(t.signals[0], c).double() for t, c in zip(traces, consumers, strict=True)]
    known = torch.linalg.lstsq(torch.cat(features), torch.cat(signals), driver="gelsd").solution
    found = []
    for trace, consumer, x, s in zip(traces, consumers, features, signals, strict=True):
        signal, axis = trace.signals[0], consumer.channel_axis
        left = (s - x @ known).reshape(signal.movedim(axis, -1).shape).movedim(-1, axis)
        found.append(replace(trace, signals=(left.to(signal),)))
    return found


def _rows(x: Tensor, where: LinearMap) -> Tensor:
    return x.movedim(where.channel_axis, -1).flatten(0, -2)


def _patches(consumer: LinearMap) -> Tensor:
    """What the outputs of a consumer read, one row each, with a one where it has a bias."""
    x = consumer.input
    if consumer.conv is not None:
        stride, padding, dilation = consumer.conv
        columns = F.unfold(x, consumer.weight_shape[2:], dilation, padding, stride)
        x = columns.transpose(1, 2)
    x = x.flatten(0, -2)
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if consumer.has_bias else x
