"""What breaks the theory here, and by how much: sentences for the reader of an event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from splitwatch.geometry.penalty import weight_decay_effect
from splitwatch.probe import Probe
from splitwatch.ranks import summed_number
from splitwatch.records import HiddenLayer, LayerGeometry, Split

_DROPOUT = nn.modules.dropout._DropoutNd
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def caveats(
    model: nn.Module,
    probe: Probe,
    layers: Sequence[HiddenLayer],
    geometry: Mapping[str, LayerGeometry],
    move: Split | None = None,
    weight_decay: float = 0.0,
) -> tuple[str, ...]:
    """What keeps the measured point from being what the theory speaks of, with the size of the effect.

    Args:
        model: the network.
        probe: where the geometry was measured.
        layers: the hidden layers that were measured.
        geometry: their geometry.
        move: the split that is planned first, if any.
        weight_decay: μ of an L2 penalty μ/2 |θ|² that training adds to the gradient (decoupled decay does not count).
    """
    measured = [item for item in (_off_stationarity(geometry), _finite_probe(probe, geometry)) if item]
    return (*measured, *_weight_decay(model, layers, move, weight_decay), *_training_mode(model))


def _off_stationarity(geometry: Mapping[str, LayerGeometry]) -> str:
    """|grad_w L| / |v| against the coupling across v: zero at a stationary point."""
    shares = [
        item.stationarity_residual / (item.stationarity_residual + item.coupling_norm).clamp(min=torch.finfo().tiny)
        for item in geometry.values()
    ]
    share = float(torch.cat([part.detach().double().cpu() for part in shares]).median()) if shares else 0.0
    if share < 0.01:
        return ""
    return f"not quite stationary: in the median neuron {share:.0%} of the coupling is gradient, which is left out"


def _finite_probe(probe: Probe, geometry: Mapping[str, LayerGeometry]) -> str:
    neurons = sum(len(item.min_eigenvalue) for item in geometry.values())
    undecided = sum(item.shares["undecided"] * len(item.min_eigenvalue) for item in geometry.values())
    if undecided < 0.5 * neurons or not neurons:
        return ""
    samples = int(summed_number(probe.samples()))
    bounds = torch.cat([item.interval.double().cpu() for item in geometry.values()])
    mean, width = bounds.mean(1).abs(), (bounds[:, 1] - bounds[:, 0]) / 2
    needed = float((samples * (width / mean).square())[width > mean].median())  # the bounds close in as 1 / √samples
    advice = f"; about {float(f'{needed:.1g}'):,.0f} would tell in half of them" if needed < 1e9 else ""
    return (
        f"finite probe: {samples} samples leave the curvature's sign open in {undecided / neurons:.0%} of the "
        f"neurons{advice}"
    )


def _weight_decay(
    model: nn.Module, layers: Sequence[HiddenLayer], move: Split | None, weight_decay: float
) -> Iterator[str]:
    layer = next((layer for layer in layers if move is not None and layer.name == move.layer), None)
    if weight_decay and move is not None and layer is not None:
        effect = weight_decay_effect(model, layer, move.neuron, move.coefficients, weight_decay_in=weight_decay)
        yield f"weight decay {weight_decay:g} in the gradient: {effect.reason} (split of {move.layer}[{move.neuron}])"


def _training_mode(model: nn.Module) -> Iterator[str]:
    modules = list(model.modules())
    if any(isinstance(module, _BATCH_NORM) for module in modules):
        yield "BatchNorm is measured in eval mode; in training, copies that part have statistics of their own"
    rates = [module.p for module in modules if isinstance(module, _DROPOUT) and module.p]
    if rates:
        yield f"dropout (p up to {max(rates):g}) is measured switched off; in training it parts even equal copies"
