"""The demonstration: a narrow network on scikit-learn's digits, stuck, diagnosed, widened, freed.

The same run is made three times under the same seed: with splitwatch, without growth, and with naive duplication (as
many neurons as splitwatch adds, halves with a little noise, at the same step).
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from splitwatch.events import GrowthEvent
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.grow import grow
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.lightning.callback import SplitWatch
from splitwatch.records import GrowthPlan, Split, SplitWatchError

BATCH = 128
NOISE = 1e-2
"""Noise of naive duplication relative to the weights' standard deviation, as usual in function-preserving widening."""


@dataclass(frozen=True, slots=True)
class Score:
    """Loss on the training set, loss and accuracy on the validation set."""

    train_loss: float
    loss: float
    accuracy: float


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """1,437 training and 360 validation images of 8 × 8 pixels, in a fixed random order."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images / 16.0, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])


class Digits(pl.LightningModule):
    """A multilayer perceptron with one narrow hidden layer; knows nothing of splitwatch."""

    def __init__(self, width: int = 4, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of a batch."""
        logits = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as anybody would."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=0.1)


class Moment(pl.Callback):
    """Scores the model at the first step that is ``due``."""

    def __init__(self, data: tuple[TensorDataset, TensorDataset], due: Callable[[pl.Trainer], bool]) -> None:
        self.data, self.due, self.score = data, due, None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the score once."""
        if self.score is None and self.due(trainer):
            self.score = score(pl_module, self.data)


class Duplicate(pl.Callback):
    """Naive duplication at the same step: halves of the outgoing weights, a little noise.

    The neurons that splitwatch splits; where it adds new ones, as many of the first others.
    """

    def __init__(self, step: int, plan: GrowthPlan) -> None:
        self.step, self.plan = step, plan

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Duplicate at the given step."""
        if trainer.global_step == self.step:
            moves = duplications(pl_module, self.plan)
            grow(pl_module, replace(self.plan, moves=moves), trainer.optimizers)


def duplications(module: nn.Module, plan: GrowthPlan) -> tuple[Split, ...]:
    """A duplication for every move of a plan, as far as there are neurons."""
    generator, moves = torch.Generator().manual_seed(0), []
    for layer in plan.layers:
        chosen = [move for move in plan.moves if move.layer == layer.name]
        split = [move.neuron for move in chosen if isinstance(move, Split)]
        others = [r for r in range(layer.width) if r not in split]
        producer, (incoming, outgoing) = module.get_submodule(layer.producers[0]), neuron_weights(module, layer)
        deviation = float(producer.get_parameter("weight").detach().std())
        for neuron in (split + others)[: len(chosen)]:
            noise = torch.randn(incoming.shape[1], generator=generator) * deviation * NOISE
            offsets = torch.stack([torch.zeros_like(noise), noise])
            moves.append(Split(layer.name, neuron, (0.5, 0.5), offsets, torch.zeros(2, outgoing.shape[1]), 0.0))
    return tuple(moves)


@torch.no_grad()
def score(module: Digits, data: tuple[TensorDataset, TensorDataset]) -> Score:
    """Score a network on both data sets."""
    (x, y), (x_val, y_val) = (part.tensors for part in data)
    logits = module.net(x_val)
    accuracy = (logits.argmax(1) == y_val).float().mean()
    return Score(*(float(v) for v in (F.cross_entropy(module.net(x), y), F.cross_entropy(logits, y_val), accuracy)))


def train(
    name: str, data: tuple[TensorDataset, TensorDataset], steps: int, logdir: Path, seed: int, callbacks: Sequence[Any]
) -> Digits:
    """One run of the demonstration."""
    pl.seed_everything(seed, verbose=False)
    module = Digits()
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=TensorBoardLogger(logdir, name="", version=name, default_hp_metric=False),
        check_val_every_n_epoch=10,
        log_every_n_steps=12,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        # The data are in memory, so loading them in other processes would only cost time.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        trainer.fit(module, DataLoader(data[0], BATCH, shuffle=True), DataLoader(data[1], len(data[1])))
    return module


def run(logdir: str | Path = "runs/demo", seed: int = 0, steps: int = 4200) -> dict[str, Score]:
    """Run the demonstration and print what happened.

    Args:
        logdir: where TensorBoard's files go.
        seed: of the whole demonstration.
        steps: training steps of each of the three runs.

    Returns:
        The scores by row of the table that is printed.

    Raises:
        SplitWatchError: no stationary point was found within the steps.
    """
    start, console, logdir = time.perf_counter(), Console(soft_wrap=True, highlight=False), Path(logdir)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    data = load_digits()
    console.print(f"A network with 4 hidden tanh neurons learns 1,437 handwritten digits ({steps} steps a run).")
    watcher = SplitWatch(GrowthPolicy(max_events=1, window=300, max_overhead=None))
    at = Moment(data, lambda trainer: any(event.grown for event in watcher.events))
    console.print("[bold]1/3[/bold] with splitwatch")
    widened = train("splitwatch", data, steps, logdir, seed, [watcher, at])
    event = _growth(watcher)
    _tell(console, event)
    before = Moment(data, lambda trainer: trainer.global_step == event.step)
    console.print("[bold]2/3[/bold] the same run without growth")
    control = train("no_growth", data, steps, logdir, seed, [before])
    console.print("[bold]3/3[/bold] the same run with naive duplication of as many neurons at the same step")
    duplicated = train("duplication", data, steps, logdir, seed, [Duplicate(event.step, event.plan)])
    after = f"{steps - event.step} steps later"
    scores = {
        "before growth": before.score,
        "at growth": at.score,
        f"{after}: no growth": score(control, data),
        f"{after}: naive duplication": score(duplicated, data),
        f"{after}: splitwatch": score(widened, data),
    }
    console.print(_table(scores))
    console.print(f"{time.perf_counter() - start:.0f} s. See it all:")
    command = f"tensorboard --logdir {logdir} --load_fast=false --samples_per_plugin images=200,text=200"
    console.print(f"  {command}")
    return scores


def _growth(watcher: SplitWatch) -> GrowthEvent:
    for event in watcher.events:
        if event.grown:
            return event
    raise SplitWatchError(
        f"steps: required enough to reach a plateau and grow, found {len(watcher.events)} measurements without growth; "
        "pass more steps"
    )


def _tell(console: Console, event: GrowthEvent) -> None:
    """What was decided, and why."""
    console.print(str(event), markup=False)
    for name, geometry in event.geometry.items():
        console.print(f"  geometry of {name}: " + ", ".join(f"{v:.0%} {k}" for k, v in geometry.shares.items() if v))
    for name, verdict in event.plateaus.items():
        console.print(f"  {name}: {verdict}", markup=False)
    console.print(str(event.plan), markup=False)


def _table(scores: Mapping[str, Score]) -> Table:
    table = Table(title="Digits")
    for heading in ("", "training loss", "validation loss", "validation accuracy"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in scores.items():
        style = "bold" if "splitwatch" in name else None
        table.add_row(name, f"{row.train_loss:.4f}", f"{row.loss:.4f}", f"{row.accuracy:.1%}", style=style)
    return table
