"""What is left of a growing run's gain where every learning rate is tuned: the rates of benchmarks/growth.py are not.

    python benchmarks/growth_rates.py [--seeds 6] [--workers 2] [--cells CELL ...] [--write]

Every fixed width, random new neurons and splitwatch at 1, 3 and 10 times a cell's rate, and each reported at its own
best: where the mean log validation loss at the end is lowest. The fixed width is the one where that is lowest again.
Errors are the final test metric, geometric means over seeds; ratios are of the same seed. All spend the same FLOPs.
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

from growth_cells import BY_NAME, CELLS, Cell
from growth_methods import OWN
from growth_report import markdown, put_section
from growth_run import execute
from tqdm import tqdm

DOCS = Path(__file__).parent.parent / "docs"
FACTORS = (1, 3, 10)
MINE = next(iter(OWN))
GROWN = ("random", MINE)
Runs = list[dict[str, Any]]


def run(task: tuple[str, str, int, int]) -> dict[str, Any]:
    cell, method, factor, seed = task
    return execute(replace(BY_NAME[cell], rate=factor * BY_NAME[cell].rate), method, seed)


def geometric(runs: Runs, key: str) -> float:
    """A mean that is infinite where a run diverged."""
    values = [one[key] for one in runs]
    return math.exp(fmean(map(math.log, values))) if all(map(math.isfinite, values)) else math.inf


def row(cell: Cell, found: dict[tuple[str, int], Runs]) -> list[str]:
    """The best rate of every method, and how splitwatch's runs compare with the fixed widths' at theirs."""

    def loss(which: tuple[str, int]) -> float:
        return geometric(found[which], "final loss")

    def told(which: tuple[str, int]) -> str:
        return f"{geometric(found[which], 'final'):.3g} at × {which[1]}"

    fixed = [min(((f"fixed {width}", f) for f in FACTORS), key=loss) for width in cell.widths]
    best = min(fixed, key=loss)
    random, mine = (min(((method, f) for f in FACTORS), key=loss) for method in GROWN)
    errors = [[one["final"] for one in found[which]] for which in fixed]
    grown = [one["final"] for one in found[mine]]
    ratios = [a / one["final"] for a, one in zip(grown, found[best], strict=True)]
    below = sum(a < min(others) for a, *others in zip(grown, *errors, strict=True))
    shares = [f"{median(ratios):.2f}", f"{max(ratios):.2f}", f"{below} of {len(grown)}"]
    return [cell.name, f"{best[0].removeprefix('fixed ')}: {told(best)}", told(random), told(mine), *shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cells", nargs="+", choices=[*BY_NAME], default=[c.name for c in CELLS], metavar="CELL")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    cells = [BY_NAME[name] for name in args.cells if BY_NAME[name].available]
    which = [(c.name, m, f) for c in cells for m in (*(f"fixed {w}" for w in c.widths), *GROWN) for f in FACTORS]
    tasks = [(*one, seed) for one in which for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = list(tqdm(pool.map(run, tasks), total=len(tasks), unit="run"))
    found: dict[str, dict[tuple[str, int], Runs]] = {cell.name: {} for cell in cells}
    for (cell, method, factor, _), result in zip(tasks, runs, strict=True):
        found[cell].setdefault((method, factor), []).append(result)
    head = ["", "best fixed width", "random", MINE, "over the best width's: median", "largest", "below every width"]
    text = markdown(head, [row(cell, found[cell.name]) for cell in cells])
    print(text)
    if args.write:
        told = f"`python benchmarks/growth_rates.py`; {args.seeds} seeds; factor of the rate, final test metric."
        put_section(DOCS / "performance.md", "Tuned rates", f"{told}\n\n{text}")


if __name__ == "__main__":
    main()
