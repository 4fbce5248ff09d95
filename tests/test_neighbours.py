"""A growing run among Lightning's other callbacks, loggers and modes."""

import copy
import importlib

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from runs import PACKAGES, QUIET, SOON, loader, module_of, trainer_of

from splitwatch import SplitWatch, grow

pytestmark = pytest.mark.filterwarnings(
    *QUIET, "ignore:Be aware that when using `ckpt_path`:UserWarning", "ignore:.*barebones.*:UserWarning"
)  # fmt: skip


def run(*callbacks, module=None, package="pytorch_lightning", watch=None, **settings):
    watch, module = watch or SplitWatch(SOON), module or module_of(package)
    trainer = trainer_of([*callbacks, watch], package, **settings)
    trainer.fit(module, loader())
    return watch, module, trainer


def grown(watch):
    return [event.grown for event in watch.events] == [True, True]


@pytest.mark.parametrize("package", PACKAGES)
def test_patience_starts_anew_and_the_best_score_stays(package):
    callbacks = importlib.import_module(package).callbacks

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-2)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.plateau, "monitor": "loss"}}

    seen = []
    module = module_of(package, configure_optimizers=configure_optimizers)
    stopping = callbacks.EarlyStopping("loss", patience=1000)

    def before(event):
        stopping.wait_count, stopping.best_score = 7, torch.tensor(0.25)
        module.plateau.num_bad_epochs, module.plateau.best = 5, 0.25

    def after(trainer, *_):
        counts, scores = (
            (stopping.wait_count, module.plateau.num_bad_epochs),
            (stopping.best_score, module.plateau.best),
        )
        seen.append((*counts, *map(float, scores)))

    look = type("Look", (importlib.import_module(package).Callback,), {"on_before_zero_grad": after})
    watch = SplitWatch(SOON, sinks=[before])
    run(stopping, look(), module=module, package=package, watch=watch)
    assert grown(watch)
    assert seen.count((0, 0, 0.25, 0.25)) > 2
    assert (7, 5, 0.25, 0.25) not in seen


class Trace(pl.Callback):
    """The averaged model before and after growth."""

    def __init__(self, averaging):
        self.averaging, self.copies = averaging, []

    def sink(self, event):
        self.copies = self.copies or [copy.deepcopy(self.model())]

    def on_before_zero_grad(self, *_):
        if len(self.copies) == 1:
            self.copies.append(copy.deepcopy(self.model()))

    def model(self):
        return getattr(self.averaging._average_model, "module", self.averaging._average_model)


def averagings():
    return {
        "average": WeightAveraging(),
        "ema": EMAWeightAveraging(decay=0.9),
        "swa": StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=2),
    }


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", averagings())
def test_averaged_copies_grow_along_and_are_what_the_run_ends_with(name, first, tmp_path):
    averaging = averagings()[name]
    trace = Trace(averaging)
    watch = SplitWatch(SOON, sinks=[trace.sink])
    keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=12, save_top_k=-1)
    callbacks = [averaging, watch, trace, keep] if first else [watch, averaging, trace, keep]
    module = module_of()
    trainer = trainer_of(callbacks, steps=64, max_epochs=8, enable_checkpointing=True)
    trainer.fit(module, loader())
    assert grown(watch)
    width = module.net[0].out_features
    assert trace.model().net[0].out_features == width > 2
    narrow, wide = trace.copies
    grow(narrow, watch.events[0].plan)
    assert narrow.net[0].out_features == 4
    assert all(torch.equal(a, b) for a, b in zip(narrow.parameters(), wide.parameters(), strict=True))
    assert torch.isfinite(module.net(torch.randn(50, 2).double())).all()
    resumed = module_of()
    again = averagings()[name]
    order = [again, SplitWatch(SOON)] if first else [SplitWatch(SOON), again]
    other = trainer_of([*order, ModelCheckpoint(tmp_path / "other")], steps=70, max_epochs=9, enable_checkpointing=True)
    other.fit(resumed, loader(), ckpt_path=keep.best_model_path)
    assert resumed.net[0].out_features == width


def test_finders_run_before_it_and_it_grows_after_them(tmp_path):
    finder = LearningRateFinder(num_training_steps=12)
    watch, _, _ = run(finder, default_root_dir=tmp_path, enable_checkpointing=True, steps=60)
    assert grown(watch)


def test_the_batch_size_finder_runs_before_it(tmp_path):
    class Data(pl.LightningDataModule):
        batch_size = 16

        def train_dataloader(self):
            return loader(self.batch_size)

    watch, module = SplitWatch(SOON), module_of()
    finder = BatchSizeFinder(init_val=32, max_trials=1, steps_per_trial=1)
    trainer = trainer_of([finder, watch], default_root_dir=tmp_path, enable_checkpointing=True, steps=60)
    trainer.fit(module, datamodule=Data())
    assert any(event.grown for event in watch.events)


@pytest.mark.parametrize("callback", [RichProgressBar, RichModelSummary, ModelSummary])
def test_what_shows_the_run_shows_it(callback):
    settings = {"enable_progress_bar": True} if callback is RichProgressBar else {"enable_model_summary": True}
    watch, _, trainer = run(callback(), **settings)
    assert grown(watch)
    summary = pl.utilities.model_summary.summarize(trainer.lightning_module)
    assert summary.total_parameters == watch.events[-1].parameters[1]


def test_barebones_and_fast_dev_run():
    module, watch = module_of(), SplitWatch(SOON)
    trainer = pl.Trainer(barebones=True, max_steps=40, max_epochs=-1, accelerator="cpu", callbacks=[watch])
    trainer.fit(module, loader())
    assert grown(watch)
    watch, _, trainer = run(fast_dev_run=True)
    assert trainer.global_step == 1
    assert watch.events == []


class Numbers(Logger):
    """A logger whose experiment can show neither histograms nor texts, as most hosted ones."""

    name, version, experiment = "numbers", "0", object()

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_every_logger_gets_what_it_can_show(tmp_path):
    numbers, board = Numbers(), TensorBoardLogger(tmp_path, name="", version="board")
    watch, _, _ = run(
        LearningRateMonitor("step"), logger=[numbers, CSVLogger(tmp_path, name="csv"), board], log_every_n_steps=5
    )
    assert grown(watch)
    assert any("splitwatch/width/net.0" in row for row in numbers.rows)
    assert "splitwatch/width/net.0" in next(tmp_path.glob("csv/*/metrics.csv")).read_text()


def test_early_stopping_ends_a_growing_run_as_any_other():
    stopping = EarlyStopping("loss", patience=1, mode="max", check_on_train_epoch_end=True)
    watch, _, trainer = run(stopping, steps=100)
    assert trainer.global_step < 100
    assert any(event.grown for event in watch.events)
