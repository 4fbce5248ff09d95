"""Do predictions rank moves? Single splits and single new neurons at plateaus, predicted against realised.

At each plateau (every cell's narrow network of benchmarks/growth.py, trained three times as long as its first stage)
the 20 best neurons propose a split at an offset of its own from a line search, and 40 random candidates of residual
pursuit propose a sprout, on a probe of the default size. What is predicted is what the held-out half says. Every move
is made alone; what it decreases is measured on fresh batches, twice as many. So are the moves of the plan that the
default policy makes there, each with the share of the plan's decrease that ``outcomes`` gives it.

    python benchmarks/growth_candidates.py [seeds] [cell …]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from statistics import median

import torch
from growth_cells import BY_NAME, CELLS, Cell
from growth_run import Run, mean
from scipy.stats import spearmanr

from splitwatch import GrowthPolicy, Probe, measure_geometry, plan_growth
from splitwatch.growth.candidates import candidates
from splitwatch.growth.grow import widened
from splitwatch.growth.outcomes import outcomes
from splitwatch.growth.promise import promises
from splitwatch.growth.pursuit import Seedlings, sized
from splitwatch.growth.search import searched, stretch, weighed
from splitwatch.growth.seedbed import Seedbed
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.precision import full_precision
from splitwatch.records import GrowthPlan, HiddenLayer, Move, Split, Sprout

SPROUTS, SPLITS = 40, 20
Pairs = list[tuple[float, float]]
BYTES = 2**30


def sprouts(run: Run, layer: HiddenLayer, probe: Probe, count: int) -> Iterator[Sprout]:
    """Random candidates, each at the lowest point of its own parabola, with what the held-out half says of it."""
    with full_precision():
        bed = Seedbed(run.model, layer, probe, count, BYTES)
        w = candidates(bed, None, run.seed)
        found = bed.measure(w)
    for i in range(count):
        at = torch.tensor([i])
        alone = Seedlings(layer, 1, bed.readers, w[at], found.of(at), found.scores[at], w[:0])
        for one in promises(run.model, [layer], sized(run.model, [layer], alone.sprouts(), probe), probe):
            yield replace(one.sprout, predicted_decrease=one.decrease(1.0))


def splits(run: Run, layers: tuple[HiddenLayer, ...], probe: Probe) -> Iterator[Move]:
    """The best split of every neuron that has one, where its own line search puts it, with its held-out decrease."""
    geometry = measure_geometry(run.model, probe, layers)
    plan = plan_growth(run.model, geometry, probe, GrowthPolicy(moves="splits", max_ratio=None), layers=layers)
    for move in plan.moves[:SPLITS]:
        if isinstance(move, Split):
            alone = replace(plan, moves=(stretch(move, 1 / plan.offset),))
            found = weighed(run.model, searched(run.model, alone, probe), probe)
            yield from (replace(one, predicted_decrease=found.held_out_decrease) for one in found.moves)


def kept(pairs: Pairs) -> tuple[float, float]:
    """Shares that decrease the loss and that come within a factor of two."""
    close = sum(0.5 <= realised / predicted <= 2 for predicted, realised in pairs if predicted > 0)
    return sum(realised > 0 for _, realised in pairs) / max(len(pairs), 1), close / max(len(pairs), 1)


def planned(run: Run, layers: tuple[HiddenLayer, ...], probe: Probe, fresh: list) -> Pairs:
    """What the moves of the default policy's plan are predicted to decrease, and what they do on fresh batches."""
    geometry = measure_geometry(run.model, probe, layers)
    plan = plan_growth(run.model, geometry, probe, layers=layers)
    found = outcomes(run.model, plan, Probe(fresh, run.problem.loss), geometry)
    return [(one.predicted, one.realised) for one in found]


def plateau(cell: Cell, seed: int) -> tuple[Pairs, Pairs]:
    """Predicted and realised decreases: of candidates made alone, and of the default policy's moves."""
    run = Run(cell, cell.problem(cell.activation, seed), cell.widths[0], seed)
    run.until(3 * cell.at[0])
    seen = GrowthPolicy().probe_samples // len(run.batch[0])
    probe = Probe(list(islice(run.problem.batches, seen)), run.problem.loss)
    fresh = list(islice(run.problem.batches, 2 * seen))
    layers = select_layers(find_hidden_layers(run.model, probe), None)
    moves = [move for layer in layers for move in sprouts(run, layer, probe, SPROUTS // len(layers))]
    moves += splits(run, layers, probe)
    before, realised = mean(run.problem.loss, run.model, fresh), []
    for move in moves:
        with widened(run.model, GrowthPlan(layers, (move,), "")):
            realised.append(before - mean(run.problem.loss, run.model, fresh))
    alone = list(zip([move.predicted_decrease for move in moves], realised, strict=True))
    return alone, planned(run, layers, probe, fresh)


def main(seeds: int, cells: list[Cell]) -> None:
    torch.set_num_threads(1)
    print(
        "| plateau | moves | rank correlation | decrease | within a factor of two | default plan | decrease | within |"
    )
    print("| --- " * 8 + "|")
    ranks, plans = [], []
    for cell in cells:
        for seed in range(seeds):
            alone, plan = plateau(cell, seed)
            ranks.append(float(spearmanr(alone).statistic))
            plans += plan
            shares = [f"{share:.0%}" for share in (*kept(alone), *(kept(plan) if plan else ()))]
            row = [
                f"{cell.name}, {seed}",
                len(alone),
                f"{ranks[-1]:.2f}",
                *shares[:2],
                len(plan) or "none",
                *shares[2:],
            ]
            print("|", *(f"{item} |" for item in row), *["|"] * (8 - len(row)), flush=True)
    print(f"\nmedian rank correlation of {len(ranks)} plateaus: {median(ranks):.2f}, lowest {min(ranks):.2f}")
    positive, close = kept(plans)
    print(f"default plans: of {len(plans)} moves {positive:.0%} decrease the loss, {close:.0%} within a factor of two")


if __name__ == "__main__":
    names = sys.argv[2:]
    wanted = [BY_NAME[name] for name in names] if names else [cell for cell in CELLS if cell.available]
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2, wanted)
