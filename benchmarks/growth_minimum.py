"""Who leaves a minimum by one more neuron: scalar outputs, inner Hessians that are definite, of either sign.

The narrow networks are designed (``plateau_points``) so that training has nothing left to do: strict minima, at which
S of every neuron is definite, all of the same sign. Each is widened by one neuron, by the certified policy and by other
splits. "curvature" is the lowest eigenvalue of the wide network's dense Hessian where the copies still coincide,
relative to the largest. Then gradient descent, which never raises the loss, goes on from where the method has put
the copies, and the minimum counts as left if the loss ends below it by more than a millionth of it.

    python benchmarks/growth_minimum.py --points 10 --seed 0
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from growth_peers import net2wider, s2d, s3d
from growth_site import Site, everywhere
from plateau_points import ACTIVATIONS, Landscape, designed
from rich.console import Console
from rich.table import Table
from torch.func import grad_and_value
from tqdm import tqdm

from splitwatch import GrowthPolicy, Probe, grow, measure_geometry, plan_growth
from splitwatch.records import GrowthPlan, Split

STEPS, CLEAR, LOWER = 10_000, 1e-4, 1e-6
COPIES = 4096
"""How often a probe repeats the samples, so that sampling leaves no doubt of what the certified policy asks about.

What is a minimum on all of them is one on each half of the probe.
"""


def certified(site: Site) -> GrowthPlan:
    geometry = measure_geometry(site.model, site.probe)
    policy = GrowthPolicy(moves="certified", max_ratio=None, max_neurons=1)
    return plan_growth(site.model, geometry, site.probe, policy, layers=site.layers)


METHODS: dict[str, Callable[[Site], GrowthPlan]] = {
    "certified": certified,
    "S2D": everywhere(s2d),
    "S3D": everywhere(s3d),
    "Net2Wider": everywhere(net2wider),
}


@dataclass
class Outcome:
    """One minimum widened by one method; losses are relative to the minimum's."""

    coefficients: tuple[float, ...]
    curvature: float
    at_growth: float
    final: float


def minimum(rng: np.random.Generator, sign: int, activation: str) -> Landscape | None:
    """A strict minimum whose inner Hessians are definite and of a sign, or None."""
    land = designed(rng, "scalar", activation)
    if land is None:
        return None
    values = torch.linalg.eigvalsh(land.hessian(land.point))
    if float(values[0]) < CLEAR * float(values[-1]):
        return None
    geometry = measure_geometry(land.model, probe_of(land, 1))["0"]
    lowest = torch.minimum(sign * geometry.min_eigenvalue, sign * geometry.max_eigenvalue).min()
    return land if float(lowest) > CLEAR * float(values[-1]) else None


def probe_of(land: Landscape, copies: int = COPIES) -> Probe:
    batch = land.X.repeat(copies, 1), land.Y.repeat(copies, 1)
    return Probe([batch, batch], land.loss_fn)


def coinciding(plan: GrowthPlan) -> GrowthPlan:
    """The same splits before the copies part."""
    moves = [move for move in plan.moves if isinstance(move, Split)]
    still = [replace(m, in_offset=0 * m.in_offset, out_offset=0 * m.out_offset) for m in moves]
    return replace(plan, moves=tuple(still))


def outcome(land: Landscape, method: str, seed: int) -> Outcome | None:
    """None where the method makes no move."""
    probe, width = probe_of(land), land.model[0].out_features + 1
    site = Site(land.model, probe, width, seed, 10**9)
    if not (plan := METHODS[method](site)):
        return None
    before = float(land.value(land.point))
    plateau, wide = (widened(land, some, probe) for some in (coinciding(plan), plan))
    values = torch.linalg.eigvalsh(plateau.hessian(plateau.point))
    losses = [float(x) / before for x in (wide.value(wide.point), descended(wide, 1 / float(values[-1])))]
    return Outcome(plan.moves[0].coefficients, float(values[0] / values[-1]), *losses)


def widened(land: Landscape, plan: GrowthPlan, probe: Probe) -> Landscape:
    model = deepcopy(land.model)
    grow(model, plan, probe=probe)
    return replace(land, model=model)


def descended(land: Landscape, rate: float) -> float:
    """The loss that gradient descent ends at; a step that would raise it is tried again at half the rate."""
    point, loss = land.point, land.value(land.point)
    gradient = land.gradient(point)
    for _ in range(STEPS):
        trial = point - rate * gradient
        slope, value = grad_and_value(land.value)(trial)
        if value <= loss:
            point, loss, gradient = trial, value, slope
        else:
            rate /= 2
    return float(loss)


def table(found: dict[tuple[int, str], list[Outcome | None]]) -> Table:
    columns = ("inner Hessians", "method", "coefficients", "curvature", "loss at growth", "final loss", "left")
    out = Table(*columns, title="Minima of scalar networks, widened by one neuron", title_justify="left")
    for (sign, method), every in found.items():
        made = [one for one in every if one is not None]
        left = sum(one.final < 1 - LOWER for one in made)
        splits = {tuple(round(c, 2) for c in one.coefficients) for one in made}
        out.add_row(
            "positive" if sign > 0 else "negative",
            method,
            ", ".join(str(c) for c in sorted(splits)),
            f"{min(one.curvature for one in made):+.0e} … {max(one.curvature for one in made):+.0e}" if made else "",
            f"{median(one.at_growth for one in made):.4f}" if made else "",
            f"{median(one.final for one in made):.4f}" if made else "",
            f"{left} of {len(every)}",
            end_section=method == [*METHODS][-1],
        )
    return out


def main(argv: Sequence[str] | None = None) -> dict[tuple[int, str], list[Outcome | None]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=10, help="minima of each sign")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng, names = np.random.default_rng(args.seed), [*ACTIVATIONS]
    found: dict[tuple[int, str], list[Outcome | None]] = {(s, m): [] for s in (1, -1) for m in METHODS}
    with tqdm(total=2 * args.points, unit="minimum") as bar:
        for sign in (1, -1):
            tries = 0
            while len(found[sign, "S2D"]) < args.points:
                tries += 1
                if (land := minimum(rng, sign, names[tries % len(names)])) is None:
                    continue
                for method in METHODS:
                    found[sign, method].append(outcome(land, method, args.seed + tries))
                bar.update()
    Console(width=140).print(table(found))
    return found


if __name__ == "__main__":
    main()
