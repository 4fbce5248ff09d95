"""Splits into coefficients for which a minimum stays a minimum: widened now, moved later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from torch import nn

from splitwatch.geometry.diagnose import diagnose_splits
from splitwatch.geometry.plateau import classify_split
from splitwatch.growth.cost import duplicate
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.rounds import missing, rounds, whole_rounds
from splitwatch.growth.search import NO_LAYER, NO_ROOM, Candidate, no_room, weighed, within_budget
from splitwatch.growth.splits import preferences
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, LayerGeometry, Move, PlateauVerdict

IDEAL: Final = "nondegenerate_minimum"  # what the narrow point is taken to be


def plan_preserving(
    model: nn.Module,
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy,
    layers: tuple[HiddenLayer, ...],
) -> GrowthPlan:
    """Splits without offsets of neurons whose plateau has a minimum region, into coefficients within it.

    That region is what a nondegenerate minimum of the narrow network becomes: where the narrow point is no minimum, the
    wide one is none either, but no direction in which copies part leads down. A neuron's inner Hessian has to be
    definite and its coupling zero, both up to their sampling error.
    """
    candidates: list[Candidate] = []
    refused: Counter[str] = Counter()
    for layer, r, verdict in _verdicts(model, geometry, probe, policy, layers):
        if verdict.kind == "minimum":
            move = replace(duplicate(model, layer, r, verdict.coefficients), reason=str(verdict))
            candidates.append(Candidate(move))
        else:
            refused[verdict.reason] += 1
        if policy.max_neurons is not None and len(whole_rounds(layers, _moves(candidates))) >= policy.max_neurons:
            break
    if not candidates:
        return GrowthPlan(layers, (), _why_none(refused) if policy.max_neurons != 0 else NO_ROOM)
    if not rounds(layers, _moves(candidates)):
        return GrowthPlan(layers, (), missing(layers, _moves(candidates)))
    moves = within_budget(model, layers, candidates, probe, policy)
    if not moves:
        return GrowthPlan(layers, (), no_room(layers))
    total = sum(layer.width for layer in layers)
    return weighed(model, GrowthPlan(layers, moves, f"{len(moves)} of {total} neurons split, a minimum kept"), probe)


def _moves(candidates: Sequence[Candidate]) -> list[Move]:
    return [item.move for item in candidates]


def _verdicts(
    model: nn.Module,
    geometry: Mapping[str, LayerGeometry],
    probe: Probe,
    policy: GrowthPolicy,
    layers: tuple[HiddenLayer, ...],
) -> Iterator[tuple[HiddenLayer, int, PlateauVerdict]]:
    """What a split of every neuron is, the most definite ones of a layer first; dense matrices only where needed."""
    for layer in layers:
        low, high = geometry[layer.name].min_eigenvalue, geometry[layer.name].max_eigenvalue
        for r in low.maximum(-high).argsort(descending=True, stable=True).tolist():
            ends = float(low[r]), float(high[r])
            hoped = [(c, classify_split(ends, c, narrow=IDEAL)) for c in preferences(policy)]
            wanted = [c for c, verdict in hoped if verdict.kind == "minimum"]
            found = diagnose_splits(model, probe, layer, r, wanted, IDEAL) if wanted else [v for _, v in hoped]
            if ends[0] < 0 < ends[1]:
                found = [
                    replace(found[0], reason="the inner Hessian is indefinite, and any two copies descend on that")
                ]
            yield layer, r, next((verdict for verdict in found if verdict.kind == "minimum"), found[0])


def _why_none(refused: Counter[str]) -> str:
    if not refused:
        return f"growth would not keep a minimum here, because {NO_LAYER}"
    told = "; ".join(f"{count} neuron{'s' * (count > 1)}: {reason}" for reason, count in refused.most_common())
    return f"growth would not keep a minimum here, because no neuron's plateau has a region of minima ({told})"
