"""Moves that a function of the user's chose: made as they are, as far as the budgets go."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from splitwatch.growth.cost import fitting
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.search import NO_ROOM, weighed
from splitwatch.growth.widening import widenings
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, Split, SplitWatchError, Sprout


def plan_chosen(
    model: nn.Module,
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy,
    layers: tuple[HiddenLayer, ...],
) -> GrowthPlan:
    """The first of the chosen moves that the budgets allow, with what they do to the loss on both halves.

    Raises:
        SplitWatchError: the chooser returned something else than moves, or moves that do not fit the model.
    """
    assert policy.chooser is not None
    name = getattr(policy.chooser, "__name__", "chooser")
    found = policy.chooser(model, geometry, probe, policy, layers)
    chosen = [found] if isinstance(found, (Split, Sprout)) or not hasattr(found, "__iter__") else list(found)
    for move in chosen:
        if not isinstance(move, (Split, Sprout)):
            raise SplitWatchError(
                f"moves: required Split or Sprout records from {name}, found {type(move).__name__}; "
                "return a list of them, empty where nothing is to grow"
            )
    widenings(model, GrowthPlan(layers, tuple(chosen), ""))  # what does not fit is refused, not left out
    moves = fitting(model, probe, policy, layers, chosen)
    if not moves:
        return GrowthPlan(layers, (), NO_ROOM if chosen else f"growth would not help here: {name} proposes no move")
    predicted = sum(move.predicted_decrease for move in moves)
    reason = f"chosen by {name}" + (f", {len(moves)} of {len(chosen)} moves" if len(moves) < len(chosen) else "")
    return weighed(model, GrowthPlan(layers, moves, reason, predicted_decrease=predicted), probe)
