"""Whether one growing run takes the place of a whole sweep of widths, where nothing is regressed.

    python benchmarks/growth_sweep.py [--seeds 36] [--workers 2] [--cells CELL ...] [--write]    # stops and resumes

Every fixed width spends the budget of benchmarks/growth.py. Growing runs spend the same, or a share of what all widths
spend together (``SHARE``), growth's own cost included. Errors are the final test metric, means over seeds
with their standard errors; more seeds than elsewhere, because shares of wrong answers among some hundred images differ
much from one to the next. A growing run reaches the sweep's best where its mean is within one standard error of it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from growth import DOCS, run_rest, stored
from growth_cells import BY_NAME, CELLS, Cell
from growth_methods import DUE, OWN
from growth_report import interval, markdown, put_section
from growth_run import execute

SHARE = 0.6
"""Of what all fixed widths of a cell spend together: the budget of longer runs."""
MINE = next(iter(OWN))
LONGER = f" at {SHARE:.0%}"
GROWN = [f"{name}{more}" for more in ("", LONGER) for name in (MINE, f"{MINE}, {DUE}")]
Finals = dict[int, float]


def fixed(cell: Cell) -> list[str]:
    return [f"fixed {width}" for width in cell.widths]


def one(cell: str, which: str, seed: int) -> dict[str, Any]:
    """What is kept of one run."""
    task, method = BY_NAME[cell], which.removesuffix(LONGER)
    steps = task.steps if method == which else round(SHARE * len(task.widths) * task.steps)
    result = execute(replace(task, steps=steps), method, seed)
    return {"method": which} | {kept: result[kept] for kept in ("cell", "seed", "final")}


def row(cell: Cell, found: dict[str, Finals]) -> list[str]:
    """The best width, what growing runs end at, bold where they reach it, and what that is beyond the last width."""
    best = min(fixed(cell), key=lambda name: fmean(found[name].values()))
    mean, error = centre(found[best])
    told = [cell.name, f"{1 / len(cell.widths):.0%}", f"{best.split()[1]}: {mean:.4f} ± {error:.4f}"]
    for name in GROWN:
        value, own = centre(found[name])
        text = f"{value:.4f} ± {own:.4f}"
        told.append(f"**{text}**" if value <= mean + error else text)
    wide = found[fixed(cell)[-1]]
    pairs = (interval([run - wide[seed] for seed, run in found[name].items()]) for name in GROWN[:2])
    return [*told, *(f"{mean:+.4f} ± {half:.4f}" for mean, half in pairs)]


def centre(runs: Finals) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    values = [*runs.values()]
    return fmean(values), stdev(values) / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=36, help="two at least")
    parser.add_argument("--workers", type=int, default=1)
    names = [cell.name for cell in CELLS if not cell.regression]
    parser.add_argument("--cells", nargs="+", choices=[*BY_NAME], default=names, metavar="CELL")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--results", type=Path, default=DOCS / "results" / "growth_sweep.jsonl")
    args = parser.parse_args()
    cells = [BY_NAME[name] for name in args.cells if BY_NAME[name].available]
    which = [(cell.name, name) for cell in cells for name in [*fixed(cell), *GROWN]]
    run_rest([(*pair, seed) for seed in range(args.seeds) for pair in which], args.results, args.workers, one)
    found: dict[str, dict[str, Finals]] = defaultdict(lambda: defaultdict(dict))
    for result in stored(args.results):
        if result["seed"] < args.seeds:
            found[result["cell"]][result["method"]][result["seed"]] = result["final"]
    head = ["", "a width's share", "best width", *GROWN, *(f"{name} − last width" for name in GROWN[:2])]
    print(text := markdown(head, [row(cell, found[cell.name]) for cell in cells]))
    if args.write:
        about = (
            f"`python benchmarks/growth_sweep.py`; {args.seeds} seeds; final test metric ± standard error, bold where "
            "a growing run reaches the best width's within that one's, at one width's share of the sweep's FLOPs and "
            f"at {SHARE:.0%}; differences from the last width with 95 % intervals."
        )
        put_section(DOCS / "performance.md", "One run for a sweep", f"{about}\n\n{text}")


if __name__ == "__main__":
    main()
