"""Moves at finite size: what the budgets allow, and how far to go, by line search on the fitted half."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import TypeVar

from torch import Tensor, nn

from splitwatch.growth.cost import fitting, limits, prices, size
from splitwatch.growth.grow import widened
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.rounds import rounds
from splitwatch.probe import Probe
from splitwatch.ranks import share_of, summed_number
from splitwatch.records import GrowthPlan, HiddenLayer, Move, Split, Sprout

Name = TypeVar("Name", bound=Hashable)

OFFSETS = tuple(2.0**power for power in range(-9, 2))
"""Offsets of splits tried in the line search, relative to the norm of a neuron's weights."""

STEPS = tuple(2.0**power for power in range(-4, 2))
"""Multiples of the sprouts' outgoing weights tried in the line search."""

FARTHEST = 32.0
"""How far a line search goes on while it does not pass its best size."""

NO_LAYER = "no hidden layer can be widened"
NO_ROOM = "the budget allows no new neuron"


def no_room(layers: Sequence[HiddenLayer]) -> str:
    """Why there is no move where the budgets hold none of the candidates."""
    grouped = [f"{layer.groups} in {layer.name}" for layer in layers if layer.groups > 1]
    return NO_ROOM + (f"; beside grouped convolutions a round of them is {', '.join(grouped)}" if grouped else "")


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A move at offset 1 (a split neuron's own weight norm) with its predicted decrease there.

    ``confirmed`` says whether a split descends on the fitted half beyond rounding, and on the held-out half too.
    """

    move: Move
    confirmed: bool = True


def within_budget(
    model: nn.Module,
    layers: tuple[HiddenLayer, ...],
    candidates: Sequence[Candidate],
    probe: Probe,
    policy: GrowthPolicy,
) -> tuple[Move, ...]:
    """The best candidates that the budgets allow, by predicted decrease per neuron, parameter or operation."""
    price = prices(model, probe, policy, layers)

    def score(*moves: Move) -> float:
        cost = getattr(price[moves[0].layer], policy.per) * sum(move.added for move in moves)
        return sum(move.predicted_decrease for move in moves) / cost

    room = limits(model, policy).less(size(model, probe, policy))
    chosen: list[Move] = []
    best_first = sorted((item.move for item in candidates), key=lambda move: -score(move))
    for part in sorted(rounds(layers, best_first), key=lambda part: -score(*part)):
        left = room.less(price[part[0].layer], sum(move.added for move in part))
        if not left.overdrawn:
            chosen += part
            room = left
    return fitting(model, probe, policy, layers, chosen)


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
    others, biases = move.others, move.biases
    return replace(
        move,
        outgoing=move.outgoing * step,
        others=None if others is None or not step else (others[0], others[1] * step),
        biases=None if biases is None or not step else biases * step,
    )


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

        def parted(offset: float) -> GrowthPlan:
            return replace(plan, moves=tuple(stretch(move, offset) for move in splits))

        sizes = [sign * size for size in OFFSETS for sign in signs]
        offset, fitted, tried = _best(model, parted, sizes, OFFSETS[len(OFFSETS) // 2], probe, start)
        found = replace(parted(offset), offset=offset, fitted_decrease=fitted, line_search=tried)
    if sprouts:
        before = found

        def advanced(step: float) -> GrowthPlan:
            return replace(before, moves=(*before.moves, *(advance(move, step) for move in sprouts)))

        step, fitted, tried = _best(model, advanced, STEPS, 1.0, probe, start)
        found = replace(advanced(step), step=step, fitted_decrease=fitted, step_search=tried)
    return replace(found, predicted_decrease=sum(move.predicted_decrease for move in found.moves))


def confirmed_plan(model: nn.Module, plan: GrowthPlan, probe: Probe) -> GrowthPlan:
    """A plan that was searched with its decrease on the held-out half, or an empty one where it does not pay."""
    if not plan.fitted_decrease > 0:
        return rejected(plan, "growth would not help here: no offset decreases the loss")
    plan = on_held_out(model, plan, probe)
    if not plan.held_out_decrease > 0:
        return rejected(
            plan, "growth would not help here: the decrease on the fitted half does not survive on the held-out half"
        )
    return plan


def on_held_out(model: nn.Module, plan: GrowthPlan, probe: Probe) -> GrowthPlan:
    """A plan with its decrease on the held-out half."""
    with widened(model, plan):
        after = probe.loss(model, "held_out", finite=False)
    return replace(plan, held_out_decrease=probe.loss(model, "held_out") - after)


def held_out_gains(
    model: nn.Module, plans: Mapping[Name, GrowthPlan], probe: Probe, beside: GrowthPlan
) -> tuple[dict[Name, float], dict[Name, Tensor], Tensor]:
    """What plans decrease the held-out loss by beyond another one: over all ranks, of parts (parts,), their weights."""
    with widened(model, beside):
        start, shares = probe.losses(model, "held_out", finite=not beside.moves)
    weights, gains = shares * share_of(probe.samples("held_out")), {}
    for name, plan in plans.items():
        with widened(model, plan):
            gains[name] = start - probe.losses(model, "held_out", finite=False)[0]
    return {name: summed_number(float(weights @ gain)) for name, gain in gains.items()}, gains, weights


def weighed(model: nn.Module, plan: GrowthPlan, probe: Probe) -> GrowthPlan:
    """A plan that is made as it is, with what it does to the loss on both halves."""
    before = [probe.loss(model, half) for half in ("fitted", "held_out")]
    with widened(model, plan):
        after = [probe.loss(model, half, finite=False) for half in ("fitted", "held_out")]
    return replace(plan, fitted_decrease=before[0] - after[0], held_out_decrease=before[1] - after[1])


def rejected(plan: GrowthPlan, reason: str) -> GrowthPlan:
    """An empty plan that still tells what was tried."""
    return GrowthPlan(plan.layers, (), reason, line_search=plan.line_search, step_search=plan.step_search)


def _best(
    model: nn.Module,
    at: Callable[[float], GrowthPlan],
    sizes: Sequence[float],
    middle: float,
    probe: Probe,
    start: float,
) -> tuple[float, float, tuple[tuple[float, float], ...]]:
    """The size whose plan decreases the fitted loss most, by how much, and what was tried, by size.

    From a size in the middle it goes on, by halves or doubles, while the decrease grows. Only where nothing pays on
    that way all ``sizes`` are tried: far away the loss may rise on either side, while a small step would descend.
    """
    tried: dict[float, float] = {}

    def decrease(size: float) -> float:
        if size not in tried:
            with widened(model, at(size)):
                tried[size] = start - probe.loss(model, "fitted", finite=False)
        return tried[size] if isfinite(tried[size]) else -inf

    least, most = min(map(abs, sizes)), max(FARTHEST, *sizes)
    size = max((size for size in sizes if abs(size) == middle), key=decrease)
    factor = max((0.5, 2.0), key=lambda factor: decrease(size * factor))
    while least <= abs(size * factor) <= most and decrease(size * factor) > decrease(size):
        size *= factor
    if not decrease(size) > 0:
        size = max(sizes, key=decrease)
    return size, tried[size], tuple(sorted(tried.items()))


def _sign_matters(move: Split) -> bool:
    """Exchanging two equal copies reverses their offsets; with other coefficients the third order differs."""
    return len(set(move.coefficients)) > 1
