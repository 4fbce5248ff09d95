"""Watch a training run, notice stationary points, measure the geometry there, widen the network off them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitwatch.events import Comparison, GrowthEvent, Outcome
from splitwatch.geometry.dense import coupling, inner_hessian
from splitwatch.geometry.escape import directional_stationarity, escape_neurons
from splitwatch.geometry.measure import measure_geometry
from splitwatch.geometry.narrow import narrow_verdict
from splitwatch.geometry.plateau import classify_split
from splitwatch.grower import Grower
from splitwatch.growth.checkpoint import load_grown, make_growable
from splitwatch.growth.cost import count_flops
from splitwatch.growth.embedding import critical_embedding, critical_reduction
from splitwatch.growth.grow import grow
from splitwatch.growth.plan import plan_growth
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.layers import find_hidden_layers
from splitwatch.metrics import GradientNoise, HeldOutQuotient, ProbeLoss
from splitwatch.probe import Probe
from splitwatch.records import (
    GrowthPlan,
    HiddenLayer,
    LayerGeometry,
    PlateauVerdict,
    Split,
    SplitWatchError,
    Sprout,
    StationarityVerdict,
    UnsupportedLayerError,
)
from splitwatch.rewarm import Rewarm
from splitwatch.watch.stationarity import StationarityDetector

if TYPE_CHECKING:
    from splitwatch.lightning.callback import SplitWatch
    from splitwatch.report.board import log_event, log_geometry

__version__ = "0.1.0"

_LAZY = {
    "SplitWatch": "splitwatch.lightning.callback",
    "log_event": "splitwatch.report.board",
    "log_geometry": "splitwatch.report.board",
}

__all__ = [
    "Comparison",
    "GradientNoise",
    "Grower",
    "GrowthEvent",
    "GrowthPlan",
    "GrowthPolicy",
    "HeldOutQuotient",
    "HiddenLayer",
    "LayerGeometry",
    "Outcome",
    "PlateauVerdict",
    "Probe",
    "ProbeLoss",
    "Rewarm",
    "Split",
    "SplitWatch",
    "SplitWatchError",
    "Sprout",
    "StationarityDetector",
    "StationarityVerdict",
    "UnsupportedLayerError",
    "classify_split",
    "count_flops",
    "coupling",
    "critical_embedding",
    "critical_reduction",
    "directional_stationarity",
    "escape_neurons",
    "find_hidden_layers",
    "grow",
    "inner_hessian",
    "load_grown",
    "log_event",
    "log_geometry",
    "make_growable",
    "measure_geometry",
    "narrow_verdict",
    "plan_growth",
]


def __getattr__(name: str) -> Any:
    """Lightning, TensorBoard and matplotlib are imported when first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'splitwatch' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
