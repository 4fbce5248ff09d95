"""Growth moves of others, as choices only: the surgery and the optimizer state are the same for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from splitwatch import GrowthPolicy, Probe, measure_geometry, plan_growth
from splitwatch.anatomy import plain_module
from splitwatch.geometry.eigen import extreme_eigenpairs
from splitwatch.geometry.measure import InnerHessian
from splitwatch.geometry.sweep import Sweep
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.pursuit import pursue, sized
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.probe import LayerTrace
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, Split, Sprout

Move = Split | Sprout


@dataclass(frozen=True)
class Site:
    """A network about to grow until its hidden layers have a width."""

    model: nn.Module
    probe: Probe
    width: int
    seed: int

    @cached_property
    def layers(self) -> tuple[HiddenLayer, ...]:
        return select_layers(find_hidden_layers(self.model, self.probe), None)

    @cached_property
    def geometry(self) -> dict[str, LayerGeometry]:
        return measure_geometry(self.model, self.probe, self.layers)

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def everywhere(choose: Callable[[Site, HiddenLayer, int], list[Move]]) -> Callable[[Site], GrowthPlan]:
    """A choice made in every hidden layer."""

    def plan(site: Site) -> GrowthPlan:
        moves = [m for layer in site.layers for m in choose(site, layer, max(site.width - layer.width, 0))]
        return GrowthPlan(site.layers, tuple(moves), choose.__name__)

    return plan


def random_new(site: Site, layer: HiddenLayer, count: int) -> list[Move]:
    """Neurons as a fresh layer has them, with outgoing weights zero."""
    c = neuron_weights(site.model, layer)[1].shape[1]
    return [Sprout(layer.name, w, torch.zeros(c)) for w in fresh(site, layer, count)]


def fresh(site: Site, layer: HiddenLayer, count: int) -> Tensor:
    """Incoming weights as PyTorch's own initialisation draws them, (count, d)."""
    parts = []
    for name in layer.producers:
        module = plain_module(site.model, name)
        inputs = module.weight[0].numel()
        drawn = torch.rand(count, inputs + (module.bias is not None), generator=site.generator)
        parts.append((2 * drawn - 1) / inputs**0.5)
    return torch.cat(parts, dim=1)


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


def two(layer: HiddenLayer, r: int, u: Tensor, c: int, coefficients=(0.5, 0.5)) -> Split:
    """Two copies whose mean, weighted by the coefficients, stays where the neuron was; the second moves by −u."""
    a, b = coefficients
    offset = torch.stack([u * b / a, -u])
    return Split(layer.name, r, coefficients, offset, torch.zeros(2, c), 0.0)


def inner(site: Site, layer: HiddenLayer):
    """Both ends of every neuron's splitting matrix."""
    curvature = next(iter(Sweep(site.model, site.probe, [layer], "all").curvatures()))
    v = curvature.outgoing
    like = {"m": len(v), "dtype": v.dtype, "device": v.device}
    return extreme_eigenpairs(InnerHessian(curvature), **like, n=curvature.d, tolerance=1e-3, seed=0)


def s2d(site: Site, layer: HiddenLayer, count: int, offset: float = 1e-2) -> list[Move]:
    """Halves at ± ε v_min of the neurons with the lowest eigenvalues (Liu, Wu & Wang 2019)."""
    found, (w, v) = inner(site, layer), neuron_weights(site.model, layer)
    lowest = found.min_value.argsort()[:count].tolist()
    return [two(layer, r, offset * w[r].norm() * found.min_vector[r].to(w), v.shape[1]) for r in lowest]


def s3d(site: Site, layer: HiddenLayer, count: int, offset: float = 1e-2, cap: float = 3.0) -> list[Move]:
    """Binary signed splits of the largest gain, −min(λ_min, −(c−1)/(c+1)·λ_max) (Wu, Ye, Lei, Liu & Liu 2020)."""
    found, (w, v) = inner(site, layer), neuron_weights(site.model, layer)
    signed = -(cap - 1) / (cap + 1) * found.max_value
    moves: list[Move] = []
    for r in torch.minimum(found.min_value, signed).argsort()[:count].tolist():
        positive = bool(found.min_value[r] <= signed[r])
        u = offset * w[r].norm() * (found.min_vector if positive else found.max_vector)[r].to(w)
        coefficients = (0.5, 0.5) if positive else ((1 + cap) / 2, (1 - cap) / 2)
        moves.append(two(layer, r, u, v.shape[1], coefficients))
    return moves


def linear_features(trace: LayerTrace):
    """(N, S, …) placeholder."""
    raise NotImplementedError


def splits_at(offset: float):
    def splits(site: Site, layer: HiddenLayer, count: int) -> list[Move]:
        return s2d(site, layer, count, offset)

    return splits


def sprouts(site: Site, layer: HiddenLayer, count: int) -> list[Move]:
    """Residual pursuit alone."""
    return list(sized(site.model, [layer], pursue_in(site, layer, count).sprouts(), site.probe))


def pursue_in(site: Site, layer: HiddenLayer, count: int):
    return pursue(site.model, layer, site.probe, count, None, max_bytes=2**30, seed=site.seed)


def half_and_half(offset: float):
    def half(site: Site, layer: HiddenLayer, count: int) -> list[Move]:
        splits = s2d(site, layer, count // 2, offset)
        return splits + sprouts(site, layer, count - len(splits))

    return half


def splitwatch(moves: str):
    def plan(site: Site) -> GrowthPlan:
        count = sum(max(site.width - layer.width, 0) for layer in site.layers)
        policy = GrowthPolicy(max_neurons=count, max_ratio=None, moves=moves)
        return plan_growth(site.model, site.geometry, site.probe, policy, layers=site.layers)

    return plan


def gradmax(site: Site, layer: HiddenLayer, count: int) -> list[Move]:
    """No incoming weights, outgoing ones along ∂²L/∂v∂w's singular vectors, as long as existing ones."""
    from splitwatch.geometry.curvature import lift, outgoing_gradient

    w, v = neuron_weights(site.model, layer)
    eye = torch.eye(w.shape[1])
    n = sum(
        t[layer.name].share * outgoing_gradient(t[layer.name], lift(t[layer.name], eye))
        for t in site.probe.traces(site.model, [layer], "all")
    )
    _, s, vh = torch.linalg.svd(n, full_matrices=False)
    rest = torch.randn(max(count - len(s), 0), len(s), generator=site.generator) * s @ vh
    out = torch.cat([vh[:count], rest])
    out = out / out.norm(dim=1, keepdim=True) * v.norm(dim=1).mean()
    return [Sprout(layer.name, torch.zeros(w.shape[1]), o) for o in out]


GROW: dict[str, Callable[[Site], GrowthPlan]] = {
    "random": everywhere(random_new),
    "Net2Wider": everywhere(net2wider),
    "S2D": everywhere(s2d),
    "S3D": everywhere(s3d),
    "GradMax": everywhere(gradmax),
    "splits .3": everywhere(splits_at(0.3)),
    "pursuit": everywhere(sprouts),
    "half .3": everywhere(half_and_half(0.3)),
    "sw mixed": splitwatch("mixed"),
    "sw splits": splitwatch("splits"),
    "sw sprouts": splitwatch("sprouts"),
}
