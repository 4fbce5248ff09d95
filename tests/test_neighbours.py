"""A growing run among Lightning's other callbacks, loggers and modes."""

import copy
import importlib
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from runs import PACKAGES, QUIET, SOON, loader, module_of, trainer_of
from torch import nn

from splitwatch import SplitWatch, SplitWatchError, grow

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


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["before", "after"])
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


def test_a_finder_that_runs_before_a_resumed_run_leaves_its_past(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=16, save_top_k=-1)
    first, _, _ = run(keep, steps=16, enable_checkpointing=True)
    assert first.grower.growths == 1
    finder = LearningRateFinder(num_training_steps=6, update_attr=False)
    for used in (False, True):
        watch = run(steps=4)[0] if used else SplitWatch(SOON)
        trainer = trainer_of([finder, watch], default_root_dir=tmp_path, enable_checkpointing=True)
        trainer.fit(module_of(), loader(), ckpt_path=keep.best_model_path)
        assert (watch.events[0].step, watch.events[0].grown) == (first.events[0].step, True)
        assert watch.grower.steps == 16 + trainer.global_step  # the finder has put Lightning's own count back to zero


def test_a_state_that_was_loaded_is_what_is_saved_until_it_is_taken_over():
    first, _, _ = run(steps=16)
    state, second, third = first.state_dict(), SplitWatch(SOON), SplitWatch(SOON)
    second.load_state_dict(state)
    third.load_state_dict(second.state_dict())
    assert third.state_dict() == state
    assert SplitWatch(SOON).state_dict() == {}
    run(watch=third, module=module_of(), steps=8)
    assert third.grower.steps == 24


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


class LateFinder(LearningRateFinder):
    """Looks for a learning rate when an epoch begins, not before training: a little run amid the run."""

    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


class LateSizes(BatchSizeFinder):
    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.scale_batch_size(trainer, pl_module)


class Sized(pl.LightningDataModule):
    batch_size = 64

    def train_dataloader(self):
        return loader(self.batch_size)


FINDERS = {
    "none": lambda: pl.Callback(),
    "rates": lambda: LateFinder(num_training_steps=12, update_attr=False),
    "sizes": lambda: LateSizes(init_val=64, max_trials=1, steps_per_trial=5),
}


def with_finder(name, folder):
    watch, module = SplitWatch(replace(SOON, rewarm=20, control=15)), module_of()
    trainer = trainer_of([FINDERS[name](), watch], default_root_dir=folder, enable_checkpointing=True)
    trainer.fit(module, datamodule=Sized())
    return watch, module


def test_a_finder_amid_the_run_neither_grows_nor_leaves_anything_behind(tmp_path):
    runs = {name: with_finder(name, tmp_path) for name in FINDERS}
    watch, module = runs["none"]
    assert [event.step for event in watch.events if event.comparison] == [20, 35]  # one was amid a comparison
    for name, (other, found) in runs.items():
        assert [(e.step, e.grown) for e in other.events] == [(e.step, e.grown) for e in watch.events]
        assert (other.grower.steps, other._saved) == (40, {})
        equal = [torch.equal(a, b) for a, b in zip(found.parameters(), module.parameters(), strict=True)]
        assert all(equal) or name == "sizes"  # which resets the order of the batches


def shown(callback, **settings):
    return pytest.param(callback, settings, id=type(callback()).__name__)


@pytest.mark.parametrize(
    ("callback", "settings"),
    [
        shown(RichProgressBar, enable_progress_bar=True),
        shown(TQDMProgressBar, enable_progress_bar=True),
        shown(RichModelSummary, enable_model_summary=True),
        shown(ModelSummary, enable_model_summary=True),
        shown(lambda: LearningRateMonitor("step"), logger=True),
        shown(lambda: DeviceStatsMonitor(cpu_stats=False), logger=True),
        shown(lambda: Timer("00:01:00:00")),
    ],
)
def test_what_watches_the_run_beside_it(callback, settings, tmp_path):
    if settings.pop("logger", False):
        settings["logger"] = CSVLogger(tmp_path)
    watch, _, trainer = run(callback(), log_every_n_steps=5, **settings)
    assert grown(watch)
    summary = pl.utilities.model_summary.summarize(trainer.lightning_module)
    assert summary.total_parameters == watch.events[-1].parameters[1]


def test_gradients_accumulated_by_a_schedule():
    steps = Steps()
    watch, _, _ = run(GradientAccumulationScheduler({0: 1, 2: 4, 5: 2}), steps, steps=30)
    assert grown(watch)
    assert watch.grower.steps == 30
    assert steps.widened
    assert all(batch_idx % accumulated == 0 for batch_idx, accumulated in steps.widened)


class Steps(pl.Callback):
    """Where in an epoch the network was widened: noted by the first batch that finds it wider."""

    def __init__(self):
        self.width, self.widened = 2, []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.note(trainer, pl_module)

    def on_before_backward(self, trainer, pl_module, loss):
        self.note(trainer, pl_module)

    def note(self, trainer, pl_module):
        if pl_module.net[0].out_features > self.width:
            self.width = pl_module.net[0].out_features
            self.widened.append((trainer.fit_loop.batch_idx, trainer.accumulate_grad_batches))


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


@pytest.mark.parametrize("package", PACKAGES)
def test_pruning_is_refused_where_the_network_grows(package):
    pruning = importlib.import_module(package).callbacks.ModelPruning
    with pytest.raises(SplitWatchError, match=r"callbacks: required .* found ModelPruning: .*monitor_only=True"):
        run(pruning("l1_unstructured"), package=package)
    watch = SplitWatch(SOON, monitor_only=True)
    _, module, trainer = run(pruning("l1_unstructured", amount=0.3), package=package, watch=watch)
    assert trainer.global_step == 40
    assert watch.events
    assert int((module.net[0].weight == 0).sum()) > 0


def backbone_and_head():
    """A module whose backbone is frozen at first; the optimizer has the head alone."""

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=3e-2)

    module = module_of(configure_optimizers=configure_optimizers)
    torch.manual_seed(1)
    layers = [nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)]
    module.net = nn.Sequential(*layers).double()
    module.backbone = module.net[:3]
    return module


WIDER = replace(SOON, moves="even", max_ratio=1.4, max_neurons=4, max_events=None)


def finetune(module, callbacks, steps, **settings):
    kept = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = trainer_of(callbacks, steps=steps, enable_checkpointing=kept)
    trainer.fit(module, loader(), **settings)
    return trainer


def test_a_frozen_backbone_grows_once_it_is_unfrozen(tmp_path):
    watch, module = SplitWatch(WIDER), backbone_and_head()
    first = [p.detach().clone() for p in module.backbone.parameters()]
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=3, lambda_func=double, backbone_initial_lr=1e-3)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=8)
    look = Before(24, lambda: [p.detach().clone() for p in module.backbone.parameters()])
    trainer = finetune(module, [thaw, watch, keep, look], 44)
    widened = {event.step: set(event.widths) for event in watch.events if event.grown}
    assert [widened.pop(10), widened.pop(20)] == [{"net.4"}] * 2
    assert set().union(*widened.values()) == {"net.0", "net.2", "net.4"}
    assert all(torch.equal(a, b) for a, b in zip(first, look.seen, strict=True))
    (optimizer,) = trainer.optimizers
    assert len(optimizer.param_groups) == 2
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, module.parameters()))
    again = backbone_and_head()  # resumed after it was unfrozen, Lightning itself leaves the backbone frozen
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=3, lambda_func=double, backbone_initial_lr=1e-3)
    path = next(tmp_path.glob("*step=16.ckpt"))
    finetune(again, [thaw, SplitWatch(WIDER)], 44, ckpt_path=path, weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))


def double(epoch):
    return 2.0


class Before(pl.Callback):
    """What a function returns right before a step."""

    def __init__(self, step, function):
        self.step, self.function, self.seen = step, function, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1:
            self.seen = self.function()
