"""What a stationary point is: the narrow network's own point, and the plateaus that splits of it would make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from torch import nn

from splitwatch.geometry.diagnose import diagnose_splits
from splitwatch.geometry.measure import EQUAL
from splitwatch.geometry.narrow import NarrowVerdict, narrow_verdict
from splitwatch.geometry.plateau import Narrow
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, PlateauVerdict, Split

NARROW_LIMIT: Final = 20_000
"""Parameters up to which the diagnosis looks at the Hessian of the whole network; beyond, it would cost too much."""


def narrow_point(model: nn.Module, probe: Probe) -> NarrowVerdict | None:
    """What the network's own point is, where that is cheap to find out."""
    cheap = sum(p.numel() for p in model.parameters() if p.requires_grad) <= NARROW_LIMIT
    return narrow_verdict(model, probe, tested=True) if cheap else None


def plateaus(
    model: nn.Module,
    probe: Probe,
    layers: Iterable[HiddenLayer],
    geometry: Mapping[str, LayerGeometry],
    plan: GrowthPlan,
    narrow: Narrow,
) -> dict[str, PlateauVerdict]:
    """Verdicts on the neuron of each layer that moves first: duplicated, and split as planned."""
    first = {move.layer: move for move in reversed(plan.moves) if isinstance(move, Split)}
    verdicts: dict[str, PlateauVerdict] = {}
    for layer in layers:
        move = first.get(layer.name)
        neuron = int(geometry[layer.name].escape_eigenvalue.argmin()) if move is None else move.neuron
        wanted = {"duplicated": EQUAL} | ({} if move is None else {"as planned": move.coefficients})
        found = diagnose_splits(model, probe, layer, neuron, wanted.values(), narrow)
        verdicts |= {f"{layer.name}[{neuron}] {how}": v for how, v in zip(wanted, found, strict=True)}
    return verdicts
