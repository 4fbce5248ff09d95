"""What a stationary point is: the narrow network's own point, and the plateaus that splits of it would make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import nn

from splitwatch.geometry.caveats import caveats
from splitwatch.geometry.diagnose import diagnose_splits
from splitwatch.geometry.measure import EQUAL
from splitwatch.geometry.narrow import NarrowVerdict, narrow_verdict
from splitwatch.geometry.plateau import Narrow
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, PlateauVerdict, Split

NARROW_LIMIT: Final = 20_000
"""Parameters up to which the diagnosis looks at the Hessian of the whole network; beyond, it would cost too much."""


def diagnosis(
    model: nn.Module,
    probe: Probe,
    layers: Sequence[HiddenLayer],
    geometry: Mapping[str, LayerGeometry],
    plan: GrowthPlan,
    weight_decay: float,
) -> dict[str, Any]:
    """Fields of an event: what the narrow point is, what splits of it are, what keeps the theory from applying."""
    narrow = narrow_point(model, probe)
    splits = plateaus(model, probe, layers, geometry, plan, narrow.kind if narrow else "undecided")
    move = next((move for move in plan.moves if isinstance(move, Split)), None)
    point = f"{narrow.kind.replace('_', ' ')}: {narrow.reason}" if narrow else ""
    warnings = caveats(model, probe, layers, geometry, move, weight_decay)
    return {"point": point, "plateaus": splits, "caveats": warnings}


def narrow_point(model: nn.Module, probe: Probe) -> NarrowVerdict | None:
    """What the network's own point is, where that is cheap to find out."""
    cheap = sum(p.numel() for p in model.parameters() if p.requires_grad) <= NARROW_LIMIT
    return narrow_verdict(model, probe, tested=True) if cheap else None


def plateaus(
    model: nn.Module,
    probe: Probe,
    layers: Sequence[HiddenLayer],
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
