"""What is left of a growing run's gain where every learning rate is tuned: the rates of benchmarks/growth.py are not.

    python benchmarks/growth_rates.py [--seeds 6] [--workers 2] [--cells CELL ...] [--write]    # stops and resumes

Every fixed width, random new neurons, splitwatch, splitwatch when its detector says so, and splitwatch with rates that
begin at a tenth after growth and are back after 200 steps, at 1, 3 and 10 times a cell's rate; each is reported at its
own best, where the mean log validation loss at the end is lowest. The fixed width is the one where that is lowest
again. Errors are the final test metric, geometric means over seeds; ratios are of the same seed. All spend the same
FLOPs.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from growth import DOCS, run_rest, stored
from growth_cells import BY_NAME, CELLS, Cell
from growth_methods import DUE, OWN
from growth_remedies import rewarm
from growth_report import markdown, put_section
from growth_run import execute

FACTORS = (1, 3, 10)
MINE = next(iter(OWN))
REWARMED = f"{MINE}, rewarmed"
GROWN = ("random", MINE, f"{MINE}, {DUE}", REWARMED)
KEPT = ("cell", "seed", "final", "final loss", "area")
Runs = list[dict[str, Any]]


def methods(cell: Cell) -> list[str]:
    return [*(f"fixed {width}" for width in cell.widths), *GROWN]


def at_rates(method: str) -> list[str]:
    """What a method is called in the results, by the factor of its rate."""
    return [f"{method} × {factor}" for factor in FACTORS]


def one(cell: str, which: str, seed: int) -> dict[str, Any]:
    """What is kept of one run."""
    method, factor = which.split(" × ")
    changed = replace(BY_NAME[cell], rate=int(factor) * BY_NAME[cell].rate)
    own, after = (MINE, partial(rewarm, steps=200)) if method == REWARMED else (method, None)
    result = execute(changed, own, seed, after=after)
    return {"method": which} | {kept: result[kept] for kept in KEPT}


def mean(runs: Runs, of: str) -> float:
    """Geometric, and infinite where a run diverged."""
    values = [run[of] for run in runs]
    return geometric_mean(values) if all(map(isfinite, values)) else inf


def row(cell: Cell, found: dict[str, Runs]) -> list[str]:
    """The best rate of every method, and how growing runs compare with the fixed widths' at theirs."""

    def loss(which: str) -> float:
        return mean(found[which], "final loss")

    def told(which: str) -> str:
        return f"{mean(found[which], 'final'):.3g} at × {which.split(' × ')[1]}"

    def errors(which: str) -> list[float]:
        return [run["final"] for run in found[which]]

    best = [min(at_rates(method), key=loss) for method in methods(cell)]
    fixed, grown = best[: len(cell.widths)], best[len(cell.widths) :]
    width = min(fixed, key=loss)
    lowest = [min(seed) for seed in zip(*map(errors, fixed), strict=True)]

    def against(which: str) -> str:
        ratios = [a / b for a, b in zip(errors(which), errors(width), strict=True)]
        below = sum(a < b for a, b in zip(errors(which), lowest, strict=True))
        return f"{told(which)}: {median(ratios):.2f}, {below} of {len(ratios)}"

    return [cell.name, f"{width.split()[1]}: {told(width)}", *map(against, grown)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cells", nargs="+", choices=[*BY_NAME], default=[c.name for c in CELLS], metavar="CELL")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--results", type=Path, default=DOCS / "results" / "growth_rates.jsonl")
    args = parser.parse_args()
    cells = [BY_NAME[name] for name in args.cells if BY_NAME[name].available]
    which = [(cell.name, label) for cell in cells for method in methods(cell) for label in at_rates(method)]
    run_rest([(*pair, seed) for seed in range(args.seeds) for pair in which], args.results, args.workers, one)
    found: dict[str, dict[str, Runs]] = defaultdict(lambda: defaultdict(list))
    for result in sorted(stored(args.results), key=lambda result: result["seed"]):
        if result["seed"] < args.seeds:
            found[result["cell"]][result["method"]].append(result)
    print(text := markdown(["", "best fixed width", *GROWN], [row(cell, found[cell.name]) for cell in cells]))
    if args.write:
        about = (
            f"`python benchmarks/growth_rates.py`; {args.seeds} seeds; final test metric at the factor of the rate, "
            "of growing runs with its median ratio to the best fixed width's and how many are below every width."
        )
        put_section(DOCS / "performance.md", "Tuned rates", f"{about}\n\n{text}")


if __name__ == "__main__":
    main()
