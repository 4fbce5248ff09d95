"""Peak memory of measuring a wide transformer layer against that of a training step, each in a process of its own.

python benchmarks/curvature_memory.py measure 1024 4096 1 64 268435456
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from curvature_clock import Clock, Row, cpu_seconds
from curvature_nets import transformer
from curvature_solve import Layers

BOUND = 1.5
MAX_BYTES = 11 * 2**25
LENGTH = 128


def memory(clock: Clock) -> list[Row]:
    """Rows for one block of 1024-4096-1024 on 8 k tokens."""
    width, hidden, sequences = (64, 256, 16) if clock.quick else (1024, 4096, 64)
    size = (width, hidden, 1, sequences)
    max_bytes = 2**20 if clock.quick else MAX_BYTES
    run = measured if clock.quick else _apart
    step, measuring = run("step", *size, max_bytes), run("measure", *size, max_bytes)
    name = f"transformer {width}-{hidden}-{width}, one block, {sequences * LENGTH} tokens"
    ratio, cost = measuring[0] / max(step[0], 1), measuring[1] / step[1]
    return [
        Row(f"{name}: step", f"{step[1]:.3g} s, peak {step[0] / 2**20:.0f} MiB"),
        Row("both ends of the layer, from capture on", f"{cost:.3g} steps, peak {measuring[0] / 2**20:.0f} MiB"),
        clock.at_most(
            "peak memory against a step's", ratio, BOUND, "×", f" with max_bytes = {max_bytes / 2**20:g} MiB"
        ),
    ]


def _apart(*arguments: str | int) -> tuple[int, float]:
    """Peak bytes and CPU seconds of this file, run with some arguments."""
    command = [sys.executable, __file__, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(found.stderr)
    peak, seconds = found.stdout.split()
    return int(peak), float(seconds)


def measured(
    what: str | int, width: int, hidden: int, blocks: int, sequences: int, max_bytes: int
) -> tuple[int, float]:
    """Peak bytes beyond those held before, and CPU seconds."""
    case = transformer(width, hidden, blocks, sequences, LENGTH)
    found = Layers(case)
    before = reset_peak()
    seconds = cpu_seconds(case.step if what == "step" else lambda: found.spectra(max_bytes))
    return peak() - before, seconds


def reset_peak() -> int:
    """Resident bytes now; what was the peak so far is forgotten where the system allows."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Highest resident bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*measured(sys.argv[1], *map(int, sys.argv[2:])))
