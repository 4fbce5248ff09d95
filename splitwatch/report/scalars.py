"""The numbers of an event by TensorBoard tag, for any logger."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Final

from splitwatch.events import GrowthEvent
from splitwatch.records import LayerGeometry

ROOT: Final = "splitwatch"
CERTAINTY: Final = {"moving": 0.0, "suspected": 0.5, "undecided": 0.5, "stationary": 1.0}


def event_scalars(event: GrowthEvent) -> dict[str, float]:
    """The numbers of an event by tag; those that are not known (nan) are left out.

    Eigenvalues are the extremes over a layer's neurons, ``min_eigenvalue_low``, ``_median`` and ``_high`` the 5 %, 50 %
    and 95 % quantiles of the lower ends; ``growth/realised_decrease`` is held out, ``growth/realised_fitted`` is not;
    ``overhead`` is the share of training time that monitoring took so far; ``control/difference`` is by how much the
    held-out loss is lower than that of a copy that did not grow; ``calibration/realised_over_predicted`` is the median
    over the moves, beside the shares of moves within a factor of two of the prediction and of those that decrease the
    loss at all; silent new neurons, of which nothing is predicted, are in none of the three.
    """
    plan, scalars = event.plan, dict[str, float]()
    if event.verdict is not None:
        fields = ("trend", "trend_error", "gradient_norm", "gradient_bound", "noise")
        scalars |= {f"stationarity/{name}": getattr(event.verdict, name) for name in fields}
        scalars["stationarity/stationary"] = CERTAINTY.get(event.verdict.kind, math.nan)
    for name, geometry in event.geometry.items():
        scalars |= {f"geometry/{name}/{key}": value for key, value in summary(geometry).items()}
    if plan:
        scalars["growth/predicted_decrease"] = plan.predicted_decrease
    scalars["growth/realised_decrease"] = event.realised_held_out
    scalars["growth/realised_fitted"] = event.realised_fitted
    scalars["growth/drift"] = event.drift
    if event.seconds:
        scalars["growth/seconds"] = sum(event.seconds.values())
    scalars["overhead"] = event.overhead
    told = [item for item in event.outcomes if item.predicted > 0]
    if told:
        ratios = [item.realised / item.predicted for item in told]
        scalars["calibration/realised_over_predicted"] = median(ratios)
        scalars["calibration/within_factor_two"] = fmean(0.5 <= ratio <= 2 for ratio in ratios)
        scalars["calibration/decreasing"] = fmean(item.realised > 0 for item in told)
    if event.comparison is not None:
        found = event.comparison
        scalars |= {"control/difference": found.difference, "control/error": found.error}
        scalars |= {"control/loss_with_growth": found.grown, "control/loss_without": found.control}
        scalars["control/training_with_growth"] = found.grown_training
        scalars["control/training_without"] = found.control_training
    known = {f"{ROOT}/{tag}": value for tag, value in scalars.items() if not math.isnan(value)}
    return known | size_scalars(event)


def size_scalars(event: GrowthEvent, *, before: bool = False) -> dict[str, float]:
    """Widths and parameters after an event, or ``before`` it: logged one step earlier, they make growth a step."""
    which = 0 if before else 1
    widths = {f"{ROOT}/width/{name}": float(sizes[which]) for name, sizes in event.widths.items()}
    return widths | {f"{ROOT}/growth/parameters": float(event.parameters[which])}


def summary(geometry: LayerGeometry) -> dict[str, float]:
    """A layer's geometry in a few numbers."""
    lower = geometry.min_eigenvalue.detach().double().cpu()
    quantiles = lower.quantile(lower.new_tensor([0.05, 0.5, 0.95])).tolist()
    return {
        **{f"share_{name}": value for name, value in geometry.shares.items()},
        **dict(zip(("min_eigenvalue_low", "min_eigenvalue_median", "min_eigenvalue_high"), quantiles, strict=True)),
        "min_eigenvalue": float(lower.min()),
        "max_eigenvalue": float(geometry.max_eigenvalue.max()),
        "coupling": float(geometry.coupling_norm.median()),
        "escape": float(geometry.escape_eigenvalue.min()),
    }
