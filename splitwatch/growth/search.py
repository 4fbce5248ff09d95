"""Moves at finite size: what the budgets allow, and how far to go, by line search on the fitted half."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from splitwatch.growth.grow import count_parameters, widened
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, Split, Sprout

OFFSETS = tuple(2.0**power for power in range(-9, 2))
"""Offsets of splits tried in the line search, relative to the norm of a neuron's weights."""

STEPS = tuple(2.0**power for power in range(-4, 2))
"""Multiples of the sprouts' outgoing weights tried in the line search."""

NO_ROOM = "the budget allows no new neuron"


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A move at offset 1 (a split neuron's own weight norm), its predicted decrease there, its cost in parameters.

    ``confirmed`` says whether a split descends on the fitted half beyond rounding, and on the held-out half too.
    """

    move: Split | Sprout
    cost: int
    confirmed: bool = True

    @property
    def score(self) -> float:
        """Predicted decrease per parameter."""
        return self.move.predicted_decrease / self.cost


def parameter_limit(model: nn.Module, policy: GrowthPolicy) -> float:
    """How many parameters the model may have after an event."""
    ratio = None if policy.max_ratio is None else policy.max_ratio * count_parameters(model)
    return min((limit for limit in (policy.max_parameters, ratio) if limit is not None), default=float("inf"))


def within_budget(
    model: nn.Module, layers: tuple[HiddenLayer, ...], candidates: Sequence[Candidate], policy: GrowthPolicy
) -> tuple[Split | Sprout, ...]:
    """The best candidates that the budgets allow, by predicted decrease per parameter."""
    limit = parameter_limit(model, policy)
    room, neurons = limit - count_parameters(model), float("inf") if policy.max_neurons is None else policy.max_neurons
    chosen: list[Split | Sprout] = []
    for item in sorted(candidates, key=lambda item: -item.score):
        if item.cost <= room and item.move.added <= neurons:
            chosen.append(item.move)
            room, neurons = room - item.cost, neurons - item.move.added
    return fitting(model, layers, chosen, limit)


def fitting(
    model: nn.Module, layers: tuple[HiddenLayer, ...], moves: Sequence[Split | Sprout], limit: float
) -> tuple[Split | Sprout, ...]:
    """As many of the first moves as keep within so many parameters: neighbours that grow together cost more."""

    def exceeds(count: int) -> bool:
        with widened(model, GrowthPlan(layers, tuple(moves[:count]), "")):
            return count_parameters(model) > limit

    return tuple(moves[: bisect_left(range(1, len(moves) + 1), True, key=exceeds)])


def stretch(move: Split, factor: float) -> Split:
    """A split with its offsets times a factor and its second-order decrease times the square."""
    return replace(
        move,
        in_offset=move.in_offset * factor,
        out_offset=move.out_offset * factor,
        predicted_decrease=move.predicted_decrease * factor**2,
    )


def scale(move: Sprout, step: float) -> Sprout:
    """A sprout with what it adds to outgoing weights and biases times a step; its prediction is left as it is."""
    changes = {name: getattr(move, name) for name in ("outgoing", "others", "biases")}
    return replace(move, **{name: value * step for name, value in changes.items() if value is not None})


def advance(move: Sprout, step: float) -> Sprout:
    """A sprout at a multiple of its step.

    Its prediction follows a parabola up to the top, at one; of a longer step the parabola has nothing more to promise.
    """
    part = min(step, 1.0)
    return replace(scale(move, step), predicted_decrease=move.predicted_decrease * part * (2 - part))


def searched(model: nn.Module, plan: GrowthPlan, probe: Probe) -> GrowthPlan:
    """The plan at the offset of its splits, then at the step of its sprouts, that decreases the fitted loss most.

    Its ``fitted_decrease`` may be zero or negative; the caller looks at the held-out half.
    """
    splits = tuple(move for move in plan.moves if isinstance(move, Split))
    sprouts = tuple(move for move in plan.moves if isinstance(move, Sprout))
    start, found = probe.loss(model, "fitted"), replace(plan, moves=())
    if splits:
        signs = (1.0, -1.0) if any(_sign_matters(move) for move in splits) else (1.0,)
        sizes = [sign * size for size in OFFSETS for sign in signs]
        at = {offset: replace(plan, moves=tuple(stretch(move, offset) for move in splits)) for offset in sizes}
        offset, fitted, tried = _best(model, at, probe, start)
        found = replace(at[offset], offset=offset, fitted_decrease=fitted, line_search=tried)
    if sprouts:
        moves = {step: (*found.moves, *(advance(move, step) for move in sprouts)) for step in STEPS}
        step, fitted, tried = _best(model, {s: replace(found, moves=m) for s, m in moves.items()}, probe, start)
        found = replace(found, moves=moves[step], step=step, fitted_decrease=fitted, step_search=tried)
    return replace(found, predicted_decrease=sum(move.predicted_decrease for move in found.moves))


def confirmed_plan(model: nn.Module, plan: GrowthPlan, probe: Probe) -> GrowthPlan:
    """A plan that was searched with its decrease on the held-out half, or an empty one where it does not pay."""
    if not plan.fitted_decrease > 0:
        return rejected(plan, "growth would not help here: no offset decreases the loss")
    with widened(model, plan):
        after = probe.loss(model, "held_out", finite=False)
    held_out = probe.loss(model, "held_out") - after
    if not held_out > 0:
        return rejected(
            plan, "growth would not help here: the decrease on the fitted half does not survive on the held-out half"
        )
    return replace(plan, held_out_decrease=held_out)


def rejected(plan: GrowthPlan, reason: str) -> GrowthPlan:
    """An empty plan that still tells what was tried."""
    return GrowthPlan(plan.layers, (), reason, line_search=plan.line_search, step_search=plan.step_search)


def _best(
    model: nn.Module, plans: dict[float, GrowthPlan], probe: Probe, start: float
) -> tuple[float, float, tuple[tuple[float, float], ...]]:
    """The size whose plan decreases the fitted loss most, by how much, and everything that was tried."""
    tried = []
    for size, plan in plans.items():
        with widened(model, plan):
            tried.append((size, start - probe.loss(model, "fitted", finite=False)))
    size, fitted = max(tried, key=lambda item: item[1])
    return size, fitted, tuple(tried)


def _sign_matters(move: Split) -> bool:
    """Exchanging two equal copies reverses their offsets; with other coefficients the third order differs."""
    return len(set(move.coefficients)) > 1
