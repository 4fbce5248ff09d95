"""Moves in rounds: beside grouped convolutions every group of a layer's neurons has to grow by as many.

A round is the smallest part of a plan that can be made by itself: one move, or one in each group of its layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeVar

from splitwatch.records import HiddenLayer, Move, Split

AnyMove = TypeVar("AnyMove", bound=Move)


def rounds(layers: Iterable[HiddenLayer], moves: Iterable[AnyMove]) -> list[tuple[AnyMove, ...]]:
    """Moves by rounds, each where its last member stood; members without partners in the other groups are left out.

    The first moves of all groups make the first round of a layer, the second ones the second.
    """
    by_name = {layer.name: layer for layer in layers}
    waiting: dict[tuple[str, int], list[list[AnyMove]]] = defaultdict(list)
    found: list[tuple[AnyMove, ...]] = []
    for move in moves:
        layer = by_name[move.layer]
        if layer.groups == 1 or not isinstance(move, Split):
            found.append((move,))
            continue
        queues = waiting[layer.name, move.added]
        queues += [[] for _ in range(layer.groups - len(queues))]
        queues[layer.group(move.neuron)].append(move)
        if all(queues):
            found.append(tuple(queue.pop(0) for queue in queues))
    return found


def whole_rounds(layers: Iterable[HiddenLayer], moves: Iterable[AnyMove]) -> tuple[AnyMove, ...]:
    """The moves that belong to whole rounds, round by round."""
    return tuple(chain.from_iterable(rounds(layers, moves)))


def missing(layers: Sequence[HiddenLayer], moves: Iterable[Move]) -> str:
    """Why the moves, of which there are some, make no whole round."""
    held: dict[str, set[int]] = defaultdict(set)
    for move in moves:
        if isinstance(move, Split):
            held[move.layer].add(move.neuron)
    told = [
        f"{len({x.group(r) for r in held[x.name]})} of the {x.groups} groups of {x.name}"
        for x in layers
        if x.name in held
    ]
    return (
        "growth would not help here: beside a grouped convolution every group has to grow by as many neurons, and a "
        f"split descends in only {', '.join(told)}"
    )
