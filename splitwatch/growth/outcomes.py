"""What came of single moves: the realised decrease of a plan, shared out among its moves.

Moves are applied one after the other, in the plan's order and in the opposite one, and each is given the mean of what
it added in both. The parts sum to the decrease of the whole plan, and where the loss is quadratic in the moves they are
exactly each move's own part −gᵀδ_i − ½ δ_iᵀHΔ of it, which is what predictions are of. A move alone would be another
question: sprouts of one layer have outgoing weights that are solved for together. Silent ones, which nothing reads yet,
add nothing, so no loss is spent on them: those of a layer are one outcome of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby, pairwise
from operator import attrgetter
from typing import Final

from torch import nn

from splitwatch.events import Outcome
from splitwatch.growth.grow import widened
from splitwatch.growth.rounds import rounds
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, LayerGeometry, Move, Split

PARTS: Final = 8
"""Outcomes of one event, beside silent ones, unless more layers move: twice as many losses of the held-out half is what
they cost. Where there are more moves, like ones of a layer share an outcome."""


def outcomes(
    model: nn.Module, plan: GrowthPlan, probe: Probe, geometry: Mapping[str, LayerGeometry] | None = None
) -> tuple[Outcome, ...]:
    """What each move of a plan is predicted to do and what it does on the held-out half; the model is left as it was.

    Args:
        model: the network, not grown yet.
        plan: the moves.
        probe: its held-out half decides.
        geometry: tells which splits are certified, none without it.
    """
    still = sorted((move for move in plan.moves if _silent(move)), key=attrgetter("layer"))
    silent = [_outcome([*part], 0.0, {}) for _, part in groupby(still, key=attrgetter("layer"))]
    parts = _parts(rounds(plan.layers, [move for move in plan.moves if not _silent(move)]), geometry or {})
    return (*_measured(model, plan, parts, probe, geometry or {}), *silent)


def _measured(
    model: nn.Module,
    plan: GrowthPlan,
    parts: Sequence[tuple[Move, ...]],
    probe: Probe,
    geometry: Mapping[str, LayerGeometry],
) -> Iterator[Outcome]:
    """What the parts of a plan do, forwards and backwards."""
    if not parts:
        return
    start = probe.loss(model, "held_out")
    whole = _loss(model, plan, parts, probe)
    there = [start, *(_loss(model, plan, parts[:i], probe) for i in range(1, len(parts))), whole]
    back = [whole, *(_loss(model, plan, parts[i:], probe) for i in range(1, len(parts))), start]
    gains = zip(pairwise(there), pairwise(back), strict=True)
    realised = [((a - b) + (d - c)) / 2 for (a, b), (c, d) in gains]
    yield from (_outcome(part, gain, geometry) for part, gain in zip(parts, realised, strict=True))


def _silent(move: Move) -> bool:
    """Whether a move is a new neuron that changes nothing of what the network computes."""
    if isinstance(move, Split):
        return False
    changes = (move.outgoing, *(move.others or ())[1:], move.biases)
    return not any(bool(change.any()) for change in changes if change is not None)


def certified(move: Move, geometry: Mapping[str, LayerGeometry]) -> bool:
    """Whether the held-out interval of the curvature that a split follows lies on the descending side."""
    measured = geometry.get(move.layer)
    if measured is None or not isinstance(move, Split):
        return False
    if bool(move.out_offset.abs().max() > 0):
        return bool(measured.escape_interval[move.neuron, 1] < 0)
    return bool((measured.negative | measured.positive)[move.neuron])


def _parts(moves: Sequence[tuple[Move, ...]], geometry: Mapping[str, LayerGeometry]) -> list[tuple[Move, ...]]:
    """Rounds of moves one by one, or like ones of a layer in at most so many parts."""
    if len(moves) <= PARTS:
        return [*moves]

    def like(part: tuple[Move, ...]) -> tuple[str, str, bool]:
        return type(part[0]).__name__, part[0].layer, all(certified(move, geometry) for move in part)

    runs = [tuple(run) for _, run in groupby(sorted(moves, key=like), key=like)]
    share = max(1, -(-len(moves) // max(1, PARTS - len(runs))))
    return [tuple(chain(*run[i : i + share])) for run in runs for i in range(0, len(run), share)]


def _loss(model: nn.Module, plan: GrowthPlan, parts: Sequence[Sequence[Move]], probe: Probe) -> float:
    with widened(model, replace(plan, moves=tuple(move for part in parts for move in part))):
        return probe.loss(model, "held_out", finite=False)


def _outcome(part: Sequence[Move], realised: float, geometry: Mapping[str, LayerGeometry]) -> Outcome:
    first, predicted = part[0], sum(move.predicted_decrease for move in part)
    kind = "split" if isinstance(first, Split) else "sprout"
    return Outcome(first.layer, kind, predicted, realised, len(part), all(certified(move, geometry) for move in part))
