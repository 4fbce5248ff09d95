"""What is left of a growing run's gain where every learning rate is tuned: the rates of benchmarks/growth.py are not.

    python benchmarks/growth_rates.py [--seeds 6] [--workers 2] [--cells CELL ...] [--write]    # stops and resumes

Every fixed width, random new neurons, splitwatch, and splitwatch with rates that begin at a tenth after growth and are
back after 200 steps, at 1, 3 and 10 times a cell's rate; each is reported at its own best, where the mean log
validation loss at the end is lowest. The fixed width is the one where that is lowest again. Errors are the final test
metric, geometric means over seeds; ratios are of the same seed. All spend the same FLOPs.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from growth import DOCS, key, store, stored
from growth_cells import BY_NAME, CELLS, Cell
from growth_methods import OWN
from growth_report import markdown, put_section
from growth_run import Run, execute
from tqdm import tqdm

from splitwatch import Rewarm

FACTORS = (1, 3, 10)
MINE = next(iter(OWN))
REWARMED = f"{MINE}, rewarmed"
GROWN = ("random", MINE, REWARMED)
KEPT = ("cell", "seed", "final", "final loss", "area")
Runs = list[dict[str, Any]]
Which = tuple[str, int]
"""A method and the factor of its rate."""


def rewarm(run: Run) -> None:
    Rewarm(run.optimizer, 200).begin()


def run(task: tuple[str, Which, int]) -> dict[str, Any]:
    """What is kept of one run."""
    name, (method, factor), seed = task
    cell = replace(BY_NAME[name], rate=factor * BY_NAME[name].rate)
    own, after = (MINE, rewarm) if method == REWARMED else (method, None)
    result = execute(cell, own, seed, after=after)
    return {"method": told((method, factor))} | {kept: result[kept] for kept in KEPT}


def told(which: Which) -> str:
    return f"{which[0]} × {which[1]}"


def geometric(runs: Runs, of: str) -> float:
    """A mean that is infinite where a run diverged."""
    values = [one[of] for one in runs]
    return math.exp(fmean(map(math.log, values))) if all(map(math.isfinite, values)) else math.inf


def row(cell: Cell, found: dict[Which, Runs]) -> list[str]:
    """The best rate of every method, and how splitwatch's runs compare with the fixed widths' at theirs."""

    def loss(which: Which) -> float:
        return geometric(found[which], "final loss")

    def best(method: str) -> Which:
        return min(((method, factor) for factor in FACTORS), key=loss)

    def error(which: Which) -> str:
        return f"{geometric(found[which], 'final'):.3g} at × {which[1]}"

    def against(which: Which) -> str:
        runs = [one["final"] for one in found[which]]
        ratios = [a / one["final"] for a, one in zip(runs, found[one_width], strict=True)]
        below = sum(a < min(others) for a, *others in zip(runs, *errors, strict=True))
        return f"{median(ratios):.2f}, {below} of {len(runs)}"

    fixed = [best(f"fixed {width}") for width in cell.widths]
    one_width, grown = min(fixed, key=loss), [best(method) for method in GROWN]
    errors = [[one["final"] for one in found[which]] for which in fixed]
    width = one_width[0].removeprefix("fixed ")
    return [cell.name, f"{width}: {error(one_width)}", *map(error, grown), *map(against, grown)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cells", nargs="+", choices=[*BY_NAME], default=[c.name for c in CELLS], metavar="CELL")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--results", type=Path, default=DOCS / "results" / "growth_rates.jsonl")
    args = parser.parse_args()
    cells = [BY_NAME[name] for name in args.cells if BY_NAME[name].available]
    which = {c: [(m, f) for m in (*(f"fixed {w}" for w in c.widths), *GROWN) for f in FACTORS] for c in cells}
    tasks = [(cell.name, one, seed) for seed in range(args.seeds) for cell in cells for one in which[cell]]
    done = {key(result) for result in stored(args.results)}
    todo = [task for task in tasks if (task[0], told(task[1]), task[2]) not in done]
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in tqdm(pool.map(run, todo), total=len(todo), unit="run"):
            store(args.results, [result])
    runs = [result for result in stored(args.results) if result["seed"] < args.seeds]
    rows = []
    for cell in cells:
        mine = [result for result in runs if result["cell"] == cell.name]
        rows.append(row(cell, {one: [r for r in mine if r["method"] == told(one)] for one in which[cell]}))
    head = ["", "best fixed width", *GROWN, *(f"{method}: over the best width, below every" for method in GROWN)]
    print(text := markdown(head, rows))
    if args.write:
        about = f"`python benchmarks/growth_rates.py`; {args.seeds} seeds; factor of the rate, final test metric."
        put_section(DOCS / "performance.md", "Tuned rates", f"{about}\n\n{text}")


if __name__ == "__main__":
    main()
