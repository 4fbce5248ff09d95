"""What watching costs: the convolutional example trained with and without splitwatch, in turns, in one process.

python benchmarks/monitoring.py [--steps 5000] [--repeats 5] [--seed 0]

Two equal networks see the same batches, a step the one and a step the other, which goes first alternating, so that both
meet the same state of the machine. Their times are summed over windows of the detector, each of which holds everything
that monitoring does. The cost is the median over windows of monitored / plain − 1, with a bootstrap interval. Two
networks that are both plain, timed in the same way, show what the machine alone does to such a figure.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.tensorboard import SummaryWriter

from splitwatch import Grower, GrowthPolicy
from splitwatch.report.board import TensorBoardSink

DRAWS = 4000
WINDOW = 200


def load_example():
    path = Path(__file__).parent.parent / "examples" / "convnet.py"
    spec = importlib.util.spec_from_file_location("convnet", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Run:
    """A network in training, watched or not."""

    def __init__(self, example, seed: int, logdir: str | None) -> None:
        torch.manual_seed(seed)
        self.model, self.loss_fn, self.grower = example.build(), example.loss_fn, None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        if logdir is not None:
            sinks = [TensorBoardSink(SummaryWriter(logdir))]
            policy = GrowthPolicy(max_events=2, max_ratio=1.5)
            self.grower = Grower(self.model, self.optimizer, self.loss_fn, policy, monitor_only=True, sinks=sinks)

    def train(self, batch) -> np.ndarray:
        """CPU and wall seconds of one step."""
        start, grower = clocks(), self.grower
        self.optimizer.zero_grad()
        loss = self.loss_fn(self.model, batch)
        loss.backward()
        self.optimizer.step()
        if grower is not None:
            grower.step(batch, loss)
        return clocks() - start


def clocks() -> np.ndarray:
    """CPU and wall time in seconds."""
    return np.array([time.process_time(), time.perf_counter()])


def paired(first: Run, second: Run, data, steps: int, seed: int) -> np.ndarray:
    """Seconds of every window but the first, which warms up, (windows, run, clock)."""
    generator = torch.Generator().manual_seed(seed)
    found = np.zeros((1 + steps // WINDOW, 2, 2))
    for step in range(len(found) * WINDOW):
        chosen = torch.randint(len(data[0]), (128,), generator=generator)
        batch = data[0][chosen], data[1][chosen]
        for which in (0, 1) if step % 2 else (1, 0):
            found[step // WINDOW, which] += (first, second)[which].train(batch)
    return found[1:]


def overhead(seconds: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Median of first / second − 1 over windows, (windows, run), and its 95 % bootstrap interval."""
    ratios = seconds[:, 0] / seconds[:, 1] - 1
    draws = np.median(np.random.default_rng(seed).choice(ratios, (DRAWS, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def show(name: str, seconds: np.ndarray) -> None:
    for index, clock in enumerate(("CPU", "wall")):
        middle, low, high = overhead(seconds[:, :, index])
        total = seconds[:, 0, index].sum() / seconds[:, 1, index].sum() - 1
        print(f"{name}, {clock}: {middle:+.2%} (95 % interval {low:+.2%} to {high:+.2%}); totals {total:+.2%}")


def main(arguments: list[str] | None = None) -> tuple[float, float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 5000), ("repeats", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    example, (images, labels) = load_example(), load_digits(return_X_y=True)
    data = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    watched, plain = [], []
    for seed in range(options.seed, options.seed + options.repeats):
        with tempfile.TemporaryDirectory() as logdir:
            runs = Run(example, seed, logdir), Run(example, seed, None)
            watched.append(paired(*runs, data, options.steps, seed))
        plain.append(paired(Run(example, seed, None), Run(example, seed, None), data, options.steps, seed))
        assert all(torch.equal(a, b) for a, b in zip(*(run.model.parameters() for run in runs), strict=True))
        print(f"seed {seed}: {len(runs[0].grower.events)} measurements")
    print(f"torch {torch.__version__}, one thread, {options.repeats} × {options.steps} steps of", end=" ")
    print(f"{np.median(np.concatenate(plain)[:, :, 0]) / WINDOW * 1e3:.2f} ms of CPU")
    show("monitored against plain", np.concatenate(watched))
    show("plain against plain", np.concatenate(plain))
    return overhead(np.concatenate(watched)[:, :, 0])


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    main()
