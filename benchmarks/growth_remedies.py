"""What helps a growing run where a wide network would have trained well anyway: remedies, one by one.

    python benchmarks/growth_remedies.py [--seeds 12] [--cells CELL ...] [--write]

Every run ends at the last width and spends the same FLOPs, growth's own cost included, as in benchmarks/growth.py. Each
number is the final test metric relative to the last width from scratch: a difference of shares of wrong answers or of
nats a byte, with the half-width of its paired 95 % interval over seeds; below zero the growing run is better. The
remedies: shrink and perturb (Ash & Adams 2020) after each growth, weights × 0.5 plus half a fresh initialisation;
learning rates that begin at a tenth and are back after 50 steps (``splitwatch.Rewarm``); all growth five times earlier;
one growth, from half of the last width, at a tenth of the budget.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from growth_cells import BY_NAME, CELLS, Cell
from growth_methods import OWN
from growth_report import interval, markdown, put_section
from growth_run import Run, execute
from tqdm import tqdm

from splitwatch import Rewarm

DOCS = Path(__file__).parent.parent / "docs"
METHOD = next(iter(OWN))


def shrink_and_perturb(run: Run) -> None:
    """All weights of the grown network halfway towards a fresh one's."""
    torch.manual_seed(1000 + run.seed)
    width = max(after for event in run.events[-1:] for _, after in event["widths"])
    fresh = run.problem.build(width)
    with torch.no_grad():
        for p, q in zip(run.model.parameters(), fresh.parameters(), strict=True):
            p.mul_(0.5).add_(q, alpha=0.5)


def rewarm(run: Run, steps: int = 50) -> None:
    Rewarm(run.optimizer, steps).begin()


def earlier(cell: Cell) -> Cell:
    return replace(cell, at=tuple(share / 5 for share in cell.at))


def once(cell: Cell) -> Cell:
    return replace(cell, widths=cell.widths[-2:], at=(0.1,))


Remedy = tuple[Callable[[Cell], Cell], Callable[[Run], None] | None]
REMEDIES: dict[str, Remedy] = {
    "as it is": (lambda cell: cell, None),
    "shrink and perturb": (lambda cell: cell, shrink_and_perturb),
    "rewarmed": (lambda cell: cell, rewarm),
    "five times earlier": (earlier, None),
    "once, at a tenth": (once, None),
    "once, shrunk": (once, shrink_and_perturb),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    names = [cell.name for cell in CELLS if not cell.regression]
    parser.add_argument("--cells", nargs="+", choices=[*BY_NAME], default=names, metavar="CELL")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    cells = [BY_NAME[name] for name in args.cells if BY_NAME[name].available]
    final: dict[tuple[str, str], list[float]] = {}
    with tqdm(total=len(cells) * args.seeds * (len(REMEDIES) + 1), unit="run") as bar:
        for cell in cells:
            for seed in range(args.seeds):
                runs: dict[str, dict[str, Any]] = {"wide": execute(cell, f"fixed {cell.widths[-1]}", seed)}
                for name, (change, after) in REMEDIES.items():
                    runs[name] = execute(change(cell), METHOD, seed, after=after)
                    bar.update()
                bar.update()
                for name, result in runs.items():
                    final.setdefault((cell.name, name), []).append(result["final"])
    rows = [["from scratch", *(f"{fmean(final[cell.name, 'wide']):.4f}" for cell in cells)]]
    for name in REMEDIES:
        pairs = [zip(final[cell.name, name], final[cell.name, "wide"], strict=True) for cell in cells]
        found = (interval([a - b for a, b in pair]) for pair in pairs)
        rows.append([name, *(f"{mean:+.4f} ± {half:.4f}" for mean, half in found)])
    text = markdown(["", *(cell.name for cell in cells)], rows)
    print(text)
    if args.write:
        head = f"`python benchmarks/growth_remedies.py`; {args.seeds} seeds"
        told = f"{head}; below zero the growing run is better than scratch.\n\n{text}"
        put_section(DOCS / "performance.md", "Remedies for the warm start", told)


if __name__ == "__main__":
    main()
