"""The verdicts of ``splitwatch.geometry.escape`` against brute force, on networks with data points on their kinks.

Networks f(x) = V ρ(W x) with squared loss, ρ a ReLU or a leaky ReLU. Inputs are placed on kinks, then the residual is
solved for, so that the point is directionally stationary (or, for some, just misses it). Two oracles judge each point:

* linear programs: the signs of x_i·u on the kink samples of a neuron cut its directions u into cells. Within a cell the
  first-order change D(u) of the loss is linear; its minimum over the cell, within a box, says whether it descends, and
  the largest slope d(u) in the outgoing weights where D(u) = 0 says whether the neuron is an escape neuron;
* sampling: the actual loss at many points nearby, in all weights at once and along tangents of the kinks; and the same
  after the neuron has been split.

Neither sees what the verdict is made from. Exit status 1 if any verdict disagrees with any of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from escape_points import D, M, Net, Recipe, build
from escape_searches import FIRST_ORDER, ROUNDING, Programs, after_split, everywhere, programs
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from splitwatch.geometry.escape import EscapeNeurons, escape_neurons
from splitwatch.growth.embedding import critical_embedding
from splitwatch.layers import find_hidden_layers
from splitwatch.probe import Probe

SPLITS = ((0.5, 0.5), (0.2, 0.8), (1.6, -0.6))


@dataclass
class Case:
    """One point: what the verdict says and what the oracles find."""

    recipe: Recipe
    net: Net
    found: EscapeNeurons
    programs: list[Programs]
    nearby: float
    coefficients: tuple[float, float]
    split: list[float]
    halved: list[float]
    wrong: list[str] = field(default_factory=list)

    def claim(self, holds: bool, what: str) -> None:
        self.wrong += [] if holds else [what]

    @property
    def stationary(self) -> bool:
        """By the linear programs."""
        return min(p.descent for p in self.programs) >= -FIRST_ORDER

    @property
    def escapes(self) -> list[bool]:
        """By the linear programs."""
        return [p.escape > FIRST_ORDER for p in self.programs]


def examine(recipe: Recipe, model: nn.Sequential, net: Net, rng: torch.Generator, widen: bool) -> Case:
    """Ask for the verdict and, without it, the oracles; ``widen``: split every neuron into halves, too."""

    def mse(network, batch):
        return nn.functional.mse_loss(network(batch[0]), batch[1])

    probe = Probe([(net.x[:10, :D], net.y[:10]), (net.x[10:, :D], net.y[10:])], mse)
    layer = find_hidden_layers(model, probe)[0]
    coefficients = SPLITS[int(torch.randint(len(SPLITS), (1,), generator=rng))]
    solved = [programs(net, r) for r in range(M)]
    leads = [p.lead for p in solved]
    split, halved = [], []
    for r in range(M):
        wide = net.widened(critical_embedding(model, layer, r, coefficients))
        split.append(after_split(wide, r, coefficients, rng, leads[r]))
        if widen:
            wide = net.widened(critical_embedding(model, layer, r, SPLITS[0]))
            halved.append(min(after_split(wide, r, SPLITS[0], rng, leads[r]), everywhere(wide, rng)))
    found, nearby = escape_neurons(model, layer, probe), everywhere(net, rng, leads)
    case = Case(recipe, net, found, solved, nearby, coefficients, split, halved)
    judge(case)
    return case


def judge(case: Case) -> None:
    """Hold every claim of the verdict against the oracles."""
    found, kind = case.found, case.found.kind
    for r, (p, stands) in enumerate(zip(case.programs, found.stationarity.verdicts, strict=True)):
        case.claim(stands != "stationary" or p.descent >= -FIRST_ORDER, f"neuron {r} descends at first order")
        case.claim(stands != "not_stationary" or descends(case.net, r, p), f"neuron {r} does not descend")
        if case.stationary:
            case.claim(found.verdicts[r] != "none" or not case.escapes[r], f"neuron {r} is an escape neuron")
            case.claim(found.verdicts[r] != "escape" or case.escapes[r], f"neuron {r} is not an escape neuron")
    case.claim((kind == "not_stationary") == (not case.stationary), "first-order descent or not")
    if kind == "minimum":
        case.claim(not any(case.escapes), "there are escape neurons")
        case.claim(case.nearby >= -ROUNDING, "a lower loss nearby")
    elif kind == "not_minimum":
        case.claim(any(case.escapes), "no escape neuron")
        case.claim(case.nearby < -ROUNDING, "no lower loss nearby")
    elif kind == "splits_escape":
        case.claim(any(case.escapes), "no escape neuron")
    judge_splits(case)


def judge_splits(case: Case) -> None:
    """Every split of an escape neuron descends; splits of a minimum with positive coefficients stay minima."""
    for which, changes in ((case.coefficients, case.split), (SPLITS[0], case.halved)):
        for r, change in enumerate(changes):
            escapes = case.stationary and case.found.verdicts[r] == "escape"
            case.claim(not escapes or change < -ROUNDING, f"split {which} of neuron {r} does not descend")
            stays = case.found.kind == "minimum" and min(which) > 0
            case.claim(not stays or change >= -ROUNDING, f"split {which} of neuron {r} descends")


def descends(net: Net, r: int, p: Programs) -> bool:
    """Whether the actual loss falls along the programs' direction as they say."""
    if p.descent >= -FIRST_ORDER:
        return False
    size = 1e-6
    w, v = torch.zeros(1, *net.w.shape).double(), torch.zeros(1, *net.v.shape).double()
    w[0, r], v[0, r] = size * p.w, size * p.v
    reach = float((net.signals().norm(dim=1) * net.x.norm(dim=1)).sum())
    change = float(net.changes(w, v))
    return change < -ROUNDING and abs(change / (size * reach * p.descent) - 1) < 0.05


def run(points: int, seed: int, widened: int = 5) -> list[Case]:
    """Cases until ``points`` of them are directionally stationary; every ``widened``-th is split into halves, too."""
    cases, stationary, at = [], 0, 0
    with tqdm(total=points, desc="stationary points") as bar:
        while stationary < points:
            rng = torch.Generator().manual_seed(1_000_003 * seed + at)
            at, recipe = at + 1, Recipe.draw(rng)
            if (built := build(recipe, rng)) is None:
                continue
            cases.append(examine(recipe, *built, rng, widen=len(cases) % widened == 0))
            stationary += cases[-1].stationary
            bar.update(int(cases[-1].stationary))
    return cases


def verdicts(cases: list[Case]) -> Table:
    table = Table(title="Verdicts of escape_neurons against linear programs and sampling")
    heads = ("verdict", "outputs", "points", "kinks on data", "LP: descent", "LP: escape neuron", "sampled: lower")
    for head in (*heads, "split, λ > 0", "split, λ < 0", "disagree"):
        table.add_column(head, justify="left" if head in heads[:2] else "right")
    keys = sorted({(case.found.kind, case.recipe.outputs > 1) for case in cases})
    for kind, several in keys:
        rows = [case for case in cases if (case.found.kind, case.recipe.outputs > 1) == (kind, several)]
        table.add_row(kind, "several" if several else "one", *map(str, counts(rows)))
    table.add_section()
    table.add_row("all", "", *map(str, counts(cases)))
    return table


def counts(rows: list[Case]) -> tuple[int | str, ...]:
    return (
        len(rows),
        sum(bool(case.net.on_kink().any()) for case in rows),
        sum(not case.stationary for case in rows),
        sum(case.stationary and any(case.escapes) for case in rows),
        sum(case.nearby < -ROUNDING for case in rows),
        share(case for case in rows if min(case.coefficients) > 0),
        share(case for case in rows if min(case.coefficients) < 0),
        sum(bool(case.wrong) for case in rows),
    )


def share(rows: Iterable[Case]) -> str:
    """How many have a neuron whose split descends, of how many."""
    lower = [min(case.split) < -ROUNDING for case in rows]
    return f"{sum(lower)}/{len(lower)}"


def widening(cases: list[Case]) -> Table:
    table = Table(title="After a split (½, ½)")
    for head in ("neuron, by LP", "verdict", "splits", "descend"):
        table.add_column(head, justify="right" if head in ("splits", "descend") else "left")
    found = Counter[tuple[bool, str, bool]]()
    for case in cases:
        for r, change in enumerate(case.halved) if case.stationary else ():
            found[case.escapes[r], case.found.kind, change < -ROUNDING] += 1
    for escape, kind in sorted({key[:2] for key in found}):
        down, flat = found[escape, kind, True], found[escape, kind, False]
        table.add_row("escape neuron" if escape else "no escape neuron", kind, str(down + flat), str(down))
    return table


def undecided(cases: list[Case]) -> Counter[str]:
    """What the oracles say of the points and neurons that the verdict left undecided."""
    found = Counter[str]()
    for case in cases:
        name = f"“{case.recipe.residual}”"
        if case.found.kind == "undecided":
            truth = "escape neurons" if any(case.escapes) else "no escape neuron"
            truth = truth if case.stationary else "first-order descent"
            lower = "a lower loss" if case.nearby < -ROUNDING else "no lower loss"
            found[f"points {name}; stationarity {case.found.stationarity.kind}; LP: {truth}; sampled: {lower}"] += 1
        for verdict, escape in zip(case.found.verdicts, case.escapes, strict=True) if case.stationary else ():
            if verdict == "undecided":
                found[f"neurons {name}; LP: {'an' if escape else 'no'} escape neuron"] += 1
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--points", type=int, default=500, help="directional stationary points at least")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start, console = time.perf_counter(), Console(width=150)
    cases = run(options.points, options.seed)
    stationary, wrong = sum(case.stationary for case in cases), [case for case in cases if case.wrong]
    console.print(verdicts(cases), widening(cases), sep="\n")
    for reason, count in undecided(cases).most_common():
        console.print(f"undecided, {count}: {reason}")
    for case in wrong:
        console.print(f"disagrees: {case.found.kind}, {case.recipe}: {'; '.join(case.wrong)}")
    took = time.perf_counter() - start
    console.print(f"{stationary} stationary points, {len(cases)} in all, {len(wrong)} disagreements, {took:.0f} s")
    return 1 if wrong or stationary < options.points else 0


if __name__ == "__main__":
    sys.exit(main())
