"""What the Lightning callback costs where nothing is measured: the convolutional example, steps with and without it.

python benchmarks/overhead.py [--steps 6000] [--repeats 3] [--seed 0]

One Trainer takes the callback into its list for one step and out of it for another, which comes first alternating, so
that both kinds of step meet the same memory and the same state of the machine. A step is the time from one batch to the
next, all of Lightning's loop included. ``max_overhead=0`` keeps the callback from measuring; it collects its probe and
judges the losses as ever. Windows, medians and intervals are those of ``benchmarks/monitoring.py``. One empty hook
shows what Lightning takes for calling one at all, lists that stay empty what the machine does to such a figure.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from monitoring import WINDOW, load_example, overhead, show
from sklearn.datasets import load_digits
from torch import Tensor

from splitwatch import GrowthPolicy, SplitWatch


class Digits(pl.LightningModule):
    def __init__(self, example) -> None:
        super().__init__()
        self.net, self.loss_fn = example.build(), example.loss_fn

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)


class Timed(torch.utils.data.IterableDataset):
    """Batches; changes a Trainer before each and times the step that follows, (windows, changed or not, clock)."""

    def __init__(self, data: tuple[Tensor, Tensor], steps: int, seed: int) -> None:
        self.data, self.seed = data, seed
        self.seconds = np.zeros((1 + steps // WINDOW, 2, 2))
        self.change: Callable[[bool], None] = lambda inside: None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for turn in range(2 * WINDOW * len(self.seconds)):
            rows = torch.randint(len(self.data[0]), (128,), generator=generator)
            batch, out = (self.data[0][rows], self.data[1][rows]), (turn + turn // 2) % 2
            self.change(not out)
            start = clocks()
            yield batch
            self.seconds[turn // (2 * WINDOW), out] += clocks() - start


def clocks() -> np.ndarray:
    """CPU and wall time in seconds."""
    return np.array([time.process_time(), time.perf_counter()])


class OneHook(pl.Callback):
    """An empty one; Lightning passes over hooks that are None."""

    on_before_zero_grad = on_before_backward = on_after_backward = None
    on_before_optimizer_step = on_train_batch_start = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass


def paired(example, data, steps: int, seed: int, both: tuple[list[pl.Callback], list[pl.Callback]]) -> np.ndarray:
    """Seconds of every window but the first, which warms up, (windows, with the first or second ones, clock)."""
    torch.manual_seed(seed)
    module, batches = Digits(example), Timed(data, steps, seed)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[*both[0], *both[1]], **dict.fromkeys(quiet, False))
    others = [other for other in trainer.callbacks if other not in both[0] + both[1]]
    batches.change = lambda first: setattr(trainer, "callbacks", others + both[0] if first else others + both[1])
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return batches.seconds[1:]


def main(arguments: list[str] | None = None) -> tuple[float, float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 6000), ("repeats", 3), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "splitwatch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    example, (images, labels) = load_example(), load_digits(return_X_y=True)
    data = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    found: dict[str, list[np.ndarray]] = {}
    for seed in range(options.seed, options.seed + options.repeats):
        watches = [SplitWatch(GrowthPolicy(max_overhead=0.0), monitor_only=True) for _ in range(2)]
        for name, both in {
            "SplitWatch against none": ([watches[0]], []),
            "SplitWatch against one empty hook": ([watches[1]], [OneHook()]),
            "one empty hook against none": ([OneHook()], []),
            "none against none": ([], []),
        }.items():
            found.setdefault(name, []).append(paired(example, data, options.steps, seed, both))
        assert all(watch.grower and watch.grower.watcher.collector.ready and not watch.events for watch in watches)
    tables = {name: np.concatenate(items) for name, items in found.items()}
    milliseconds = np.median(tables["none against none"][:, :, 0]) / WINDOW * 1e3
    print(f"torch {torch.__version__}, Lightning {pl.__version__}, one thread,", end=" ")
    print(f"{options.repeats} × {options.steps} steps of {milliseconds:.2f} ms of CPU")
    for name, seconds in tables.items():
        show(name, seconds)
    return overhead(tables["SplitWatch against one empty hook"][:, :, 0])


if __name__ == "__main__":
    main()
