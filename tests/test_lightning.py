"""The Lightning front door: same numbers as the plain loop, nothing else changed, everything logged."""

import csv
import random
import warnings
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.profilers import SimpleProfiler
from runs import SOON, USUAL, loader, module_of, trainer_of, wave
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from splitwatch import Grower, GrowthPolicy, SplitWatch, SplitWatchError, load_grown
from splitwatch.watch.stationarity import StationarityDetector

pytestmark = pytest.mark.filterwarnings(*USUAL, "ignore:.*returned .None.*:UserWarning")

POLICY = GrowthPolicy(window=100, max_events=1, max_overhead=None)
STEPS = 900
EARLY = replace(POLICY, window=10, tolerance=1e9, noise_ratio=1e9)
"""To this one every tenth step is a plateau, for tests that ask how a run grows, not when."""


def make_data():
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(512, 2, generator=generator) * 2 - 1
    return x, torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])


class Wave(pl.LightningModule):
    def __init__(self, width=2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
        self.error = torchmetrics.MeanSquaredError()

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        self.error(out, batch[1])
        loss = F.mse_loss(out, batch[1])
        self.log("train_loss", loss)
        self.log("error", self.error, on_step=False, on_epoch=True)
        return {"loss": loss}

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10_000)]


def fit(callbacks, logger=False, module=None, steps=STEPS, accelerator="cpu", **settings):
    torch.manual_seed(0)
    module = Wave() if module is None else module
    with warnings.catch_warnings():
        trainer = pl.Trainer(
            max_steps=steps, max_epochs=-1, accelerator=accelerator, callbacks=callbacks, logger=logger,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10,
            **settings,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(*make_data()), batch_size=64))
    return module, trainer


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("runs")
    watch = SplitWatch(POLICY)
    loggers = [TensorBoardLogger(logdir, name="", version="run"), CSVLogger(logdir, name="csv")]
    module, trainer = fit([watch], loggers)
    return module, trainer, watch, logdir


def test_one_added_line_widens_an_unchanged_module(grown):
    module, trainer, watch, _ = grown
    (event,) = [event for event in watch.events if event.grown]
    assert module.net[0].out_features == module.net[2].in_features == event.widths["net.0"][1] > 2
    owned = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert owned == {id(p) for p in module.parameters()}


def test_the_plain_loop_gives_the_same_numbers_to_the_bit(grown):
    module, _, watch, _ = grown
    torch.manual_seed(0)
    plain = Wave()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    loss_fn = lambda model, batch: F.mse_loss(model.net(batch[0]), batch[1])  # noqa: E731
    grower = Grower(plain, optimizer, loss_fn, POLICY, progress=False)
    loader, step = DataLoader(TensorDataset(*make_data()), batch_size=64), 0
    while step < STEPS:
        for batch in loader:
            loss = loss_fn(plain, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == STEPS:  # Lightning would act before the next step, and there is none
                break
            grower.step(batch, loss)
    (mine,), (theirs,) = ([event for event in events if event.grown] for events in (watch.events, grower.events))
    assert mine.step == theirs.step
    assert mine.realised_held_out == theirs.realised_held_out
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_everything_is_in_tensorboard_on_lightnings_own_axis(grown):
    _, _, watch, logdir = grown
    board = EventAccumulator(str(logdir / "run"), size_guidance={"histograms": 0, "images": 0, "tensors": 0})
    board.Reload()
    tags = board.Tags()
    (event,) = [event for event in watch.events if event.grown]
    assert {"splitwatch/width/net.0", "splitwatch/growth/parameters", "train_loss"} <= set(tags["scalars"])
    steps = [scalar.step for scalar in board.Scalars("splitwatch/width/net.0")]
    assert steps[:2] == [event.step - 1, event.step] and steps[2:] == [STEPS]  # before, after, and at the end
    sizes = [scalar.value for scalar in board.Scalars("splitwatch/growth/parameters")]
    assert sizes == [*event.parameters, event.parameters[1]]
    assert any("eigenvalue" in tag for tag in tags["histograms"])
    assert tags["images"]


def test_a_csv_logger_gets_the_scalars(grown):
    *_, logdir = grown
    header = next(logdir.glob("csv/*/metrics.csv")).read_text().splitlines()[0]
    assert "splitwatch/growth/parameters" in header


def test_monitor_only_never_grows_and_leaves_the_run_and_its_logs_bit_equal():
    watch = SplitWatch(EARLY, monitor_only=True)
    watched, trainer = fit([watch], steps=30)
    alone, control = fit([], steps=30)
    assert any(event.geometry for event in watch.events)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
    assert {k: v for k, v in trainer.callback_metrics.items() if "splitwatch" not in k} == control.callback_metrics
    assert watched.training == alone.training


def test_a_control_trains_beside_the_run_which_does_not_notice(grown):
    module, _, watch, _ = grown
    policy = replace(POLICY, control=30)
    other = SplitWatch(policy)
    beside, _ = fit([other])
    assert all(torch.equal(a, b) for a, b in zip(beside.parameters(), module.parameters(), strict=True))
    (event,) = [event for event in other.events if event.comparison is not None]
    (growth,) = [event for event in watch.events if event.grown]
    assert event.comparison.steps == 30
    assert event.step == growth.step + 30
    assert event.comparison.paid


@pytest.mark.parametrize("setting", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 1.0}])
def test_a_control_that_could_not_follow_is_refused_by_name(setting):
    with pytest.raises(SplitWatchError, match=f"control: required {next(iter(setting))}"):
        fit([SplitWatch(replace(POLICY, control=30))], steps=1, **setting)


def test_a_control_beside_manual_optimization_is_refused_by_name():
    module = module_of(training_step=manual_step, configure_optimizers=two_optimizers)
    module.automatic_optimization = False
    watch = SplitWatch(replace(SOON, control=5), loss_fn=lambda module, batch: module.net(batch[0]).mean())
    with pytest.raises(SplitWatchError, match="control: required automatic_optimization True, found False"):
        trainer_of([watch]).fit(module, loader())


def test_a_control_beside_a_gradient_scaler_is_refused_by_name():
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(SplitWatchError, match="control: required precision no gradient scaler, found one"):
        fit([SplitWatch(replace(POLICY, control=30))], steps=1, plugins=[plugin])


def test_growth_waits_for_accumulated_gradients():
    watch = SplitWatch(EARLY)
    _, trainer = fit([watch], steps=50, accumulate_grad_batches=3)
    assert trainer.global_step == watch.grower.steps == 50
    assert any(event.grown for event in watch.events)
    assert all(event.step <= 50 for event in watch.events)


class Hooks(pl.Callback):
    """In which hook the network was found wider, or a measurement decided on, and what it was about."""

    def __init__(self, watch):
        self.watch, self.width, self.pending, self.widened, self.decided = watch, 2, False, [], []

    def look(self, hook, trainer, pl_module):
        pending = self.watch.grower is not None and self.watch.grower.pending
        if pl_module.net[0].out_features != self.width:
            self.widened.append((hook, trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches))
        if pending and not self.pending:
            self.decided.append((hook, (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches))
        self.width, self.pending = pl_module.net[0].out_features, pending


def _looking(hook):
    return lambda self, trainer, pl_module, *_: self.look(hook, trainer, pl_module)


HOOKS = [name for name in vars(pl.Callback) if name.startswith("on_") and "checkpoint" not in name]
for _hook in HOOKS:
    setattr(Hooks, _hook, _looking(_hook))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_is_decided_when_a_step_ends_and_done_before_the_next_begins(accumulated):
    watch = SplitWatch(SOON)
    hooks = Hooks(watch)
    trainer_of([watch, hooks], accumulate_grad_batches=accumulated).fit(module_of(), loader())
    assert {"on_before_backward", "on_before_optimizer_step", "on_train_epoch_end"} < set(HOOKS)
    assert set(hooks.decided) == {("on_train_batch_end", 0)}
    assert hooks.widened == [("on_train_batch_start", 0)] * 2


def test_a_checkpoint_has_the_score_of_the_network_it_holds(tmp_path):
    data = wave()

    def validation_step(self, batch, batch_idx):
        self.log("val", F.mse_loss(self.net(batch[0]), batch[1]))

    keep = ModelCheckpoint(tmp_path, monitor="val", save_top_k=-1)
    module = module_of(validation_step=validation_step)
    trainer = trainer_of([SplitWatch(SOON), keep], enable_checkpointing=True, max_epochs=5)
    trainer.fit(module, loader(), DataLoader(TensorDataset(*data), batch_size=512))
    widths = []
    for path, score in keep.best_k_models.items():
        held = load_grown(lambda **_: module_of(), path)
        widths.append(held.net[0].out_features)
        assert F.mse_loss(held.net(data[0]), data[1]).item() == pytest.approx(float(score), rel=1e-9)
    assert len(set(widths)) == 3


def test_other_callbacks_see_its_scalars():
    stopping = EarlyStopping(
        "splitwatch/width/net.0", mode="max", stopping_threshold=3, patience=100, strict=False, verbose=False
    )
    watch = SplitWatch(SOON)
    trainer = trainer_of([watch, stopping], steps=100)
    trainer.fit(module_of(), loader())
    assert trainer.global_step == 16  # grown at step 10, in the second epoch of eight
    assert trainer.callback_metrics["splitwatch/width/net.0"] == 4


def test_names_that_a_trainer_gives_its_callbacks_are_left_to_it():
    assert {"log", "log_dict"}.isdisjoint(vars(SplitWatch))
    watch = SplitWatch(SOON)
    module = module_of()
    trainer_of([watch], steps=1).fit(module, loader())
    assert watch.log == module.log


def two_optimizers(self):
    return [torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9) for layer in (self.net[0], self.net[2])]


def manual_step(self, batch, batch_idx):
    loss = F.mse_loss(self.net(batch[0]), batch[1])
    optimizers = self.optimizers()
    for optimizer in optimizers:
        optimizer.zero_grad()
    self.manual_backward(loss)
    for optimizer in optimizers:
        optimizer.step()
    self.log("loss", loss)
    return loss


def test_the_x_axis_is_that_of_the_other_scalars_where_steps_count_twice(tmp_path):
    module = module_of(training_step=manual_step, configure_optimizers=two_optimizers)
    module.automatic_optimization = False
    watch = SplitWatch(SOON, loss_fn=lambda module, batch: F.mse_loss(module.net(batch[0]), batch[1]))
    trainer = trainer_of([watch], steps=60, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(module, loader())
    assert trainer.global_step == 60
    assert watch.grower.steps == 30
    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).read_text().splitlines()))
    steps = {key: [int(row["step"]) for row in rows if row[key]] for key in rows[0]}
    assert steps["loss"] == list(range(30))
    assert steps["splitwatch/growth/realised_decrease"] == [10, 20]


def test_manual_optimization_needs_a_loss_function_and_says_so():
    class Manual(Wave):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(SplitWatchError, match="loss_fn"):
        fit([SplitWatch(POLICY)], module=Manual(), steps=1)


def test_a_training_step_that_returns_no_loss_is_named():
    class Silent(Wave):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(SplitWatchError, match="training_step"):
        fit([SplitWatch(POLICY)], module=Silent(), steps=5)


def test_a_training_step_that_returns_no_loss_of_a_probe_batch_is_named():
    class Fickle(Wave):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if self.training else None

    with pytest.raises(SplitWatchError, match="training_step: required a loss for every probe batch, found None; pass"):
        trainer_of([SplitWatch(SOON)]).fit(Fickle().double(), loader())


def test_a_training_step_without_an_index_is_called_without_one():
    def training_step(self, batch):
        return F.mse_loss(self.net(batch[0]), batch[1])

    watch = SplitWatch(SOON)
    trainer_of([watch]).fit(module_of(training_step=training_step), loader())
    assert [event.grown for event in watch.events] == [True, True]


def any_arguments(self, *args):
    batch, _ = args
    return F.mse_loss(self.net(batch[0]), batch[1])


def batch_and_settings(self, batch, **settings):
    return F.mse_loss(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("step", [any_arguments, batch_and_settings])
def test_a_training_step_is_called_with_what_lightning_calls_it_with(step):
    watch = SplitWatch(EARLY)
    fit([watch], module=type("Free", (Wave,), {"training_step": step})(), steps=21)
    assert watch.events


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_training_step_that_takes_an_iterator_needs_a_loss_function_and_says_so():
    def step(self, dataloader_iter):
        return any_arguments(self, next(dataloader_iter)[0], 0)

    module = type("Iterating", (Wave,), {"training_step": step})()
    with pytest.raises(SplitWatchError, match="loss_fn: required where training_step takes dataloader_iter, not a"):
        fit([SplitWatch(EARLY)], module=module, steps=21)


class Notes(Wave):
    """Writes to its logger itself, keeps its losses and draws from Python's generator."""

    def __init__(self):
        super().__init__()
        self.losses, self.means = [], []

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self.net(batch[0] + 0.1 * random.random()), batch[1])
        for logger in self.loggers:
            logger.experiment.add_scalar("noted", loss, self.global_step)
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        self.means.append((len(self.losses), float(torch.stack(self.losses).mean())))
        self.losses.clear()


def test_what_a_module_writes_keeps_and_draws_is_that_of_the_run_alone(tmp_path):
    found = []
    for name, callbacks in (("alone", []), ("watched", [SplitWatch(EARLY, monitor_only=True)])):
        random.seed(0)
        torch.manual_seed(0)
        module, trainer = fit(callbacks, TensorBoardLogger(tmp_path, name=name, version=0), Notes(), steps=24)
        events = EventAccumulator(trainer.logger.log_dir).Reload()
        found.append((module.means, [(event.step, event.value) for event in events.Scalars("noted")]))
    assert callbacks[0].events and len(found[0][1]) == 24
    assert found[0] == found[1]


def test_a_batch_that_the_module_skips_is_skipped():
    class Skipping(Wave):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 4 != 2 else None

    watch = SplitWatch(POLICY)
    fit([watch], module=Skipping(), steps=40)
    assert 0 < watch.grower.steps < 40


def popped(batch):
    return batch.pop("x"), batch.pop("y")


def scaled(batch):
    return batch["x"].mul_(0.5).mul_(2), batch["y"].neg_().neg_()


def shifted(batch):
    return batch["x"].sub_(1).clone() + 1, batch["y"]


@pytest.mark.parametrize("taken", [popped, *(pytest.param(one, marks=pytest.mark.slow) for one in (scaled, shifted))])
def test_a_batch_that_the_step_changes_is_measured_as_it_was(taken):
    """The steps before a look may be any number: an epoch has eight, and a block of losses ten."""

    class Changing(Wave):
        def training_step(self, batch, batch_idx):
            return super().training_step(taken(batch), batch_idx)

    def fitted(kind, collate):
        torch.manual_seed(0)
        watch, module = SplitWatch(EARLY), kind()
        trainer_of([watch], steps=60).fit(module, DataLoader(TensorDataset(*make_data()), 64, collate_fn=collate))
        return watch.events, module.state_dict()

    plain, expected = fitted(Wave, None)
    events, found = fitted(
        Changing, lambda pairs: {key: torch.stack(part) for key, *part in zip("xy", *pairs, strict=True)}
    )
    assert [event.step for event in events] == [event.step for event in plain] and events[0].grown
    assert [event.plan.predicted_decrease for event in events] == [event.plan.predicted_decrease for event in plain]
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class Noted(Wave):
    """Keeps its losses."""

    losses: list

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        self.losses.append(out["loss"].item())
        return out


class Saving(pl.Callback):
    """Asks for the state of a run in the middle of a block of losses."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in (33, 150, 177):
            trainer.callbacks[0].state_dict()


def test_every_loss_reaches_the_grower_once_and_in_order(monkeypatch):
    seen, note = [], StationarityDetector.note
    monkeypatch.setattr(StationarityDetector, "note", lambda self, loss: seen.append(float(loss)) or note(self, loss))
    watch, module = SplitWatch(replace(POLICY, max_overhead=0.0), monitor_only=True), Noted()
    module.losses = []
    fit([watch, Saving()], module=module, steps=250)
    assert seen == module.losses
    assert watch.grower.steps == 250


def test_a_subclass_goes_on_with_the_state_of_a_checkpoint(grown, tmp_path):
    class Own(SplitWatch):
        pass

    path, watch = tmp_path / "grown.ckpt", Own(POLICY)
    grown[1].save_checkpoint(path)
    fit_from(path, watch)
    assert watch.grower.steps == STEPS + 10


def test_a_grown_checkpoint_loads_into_the_narrow_module(grown, tmp_path):
    module, trainer, _, _ = grown
    path = tmp_path / "grown.ckpt"
    trainer.save_checkpoint(path)
    loaded = load_grown(Wave, path)
    x, _ = make_data()
    assert torch.equal(loaded.net(x), module.net(x))
    resumed, _ = fit_from(path)
    assert resumed.net[0].out_features == module.net[0].out_features


def fit_from(path, watch=None):
    torch.manual_seed(0)
    module = Wave()
    trainer = pl.Trainer(
        max_steps=STEPS + 10, max_epochs=-1, accelerator="cpu", callbacks=[watch or SplitWatch(POLICY)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*make_data()), batch_size=64), ckpt_path=path)
    return module, trainer


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"])
def test_every_precision_is_measured_in_full(precision):
    watch = SplitWatch(EARLY)
    module, _ = fit([watch], module=Half() if precision == "16-true" else None, steps=50, precision=precision)
    grown = [event for event in watch.events if event.grown]
    assert len(grown) == 1
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}.get(
        precision, torch.float32
    )
    assert {p.dtype for p in module.net.parameters()} == {dtype}
    measured = {found.min_eigenvalue.dtype for found in grown[0].geometry.values()}
    assert measured == {torch.float64 if dtype is torch.float64 else torch.float32}
    assert grown[0].drift <= 1e-6


class Half(Wave):
    """float16 has no room for Adam's default epsilon."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Silent(Wave):
    """Nothing but the loss: the compiler cannot look through Lightning's logging."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor.*", "ignore::DeprecationWarning")
@pytest.mark.parametrize("part", ["module", "net"])
def test_a_compiled_module_grows(part):
    watch, module = SplitWatch(EARLY), Silent()
    if part == "net":
        module.net = torch.compile(module.net, backend="eager")
    fit([watch], module=module if part == "net" else torch.compile(module, backend="eager"), steps=50)
    assert [set(event.widths) for event in watch.events if event.grown] == [{"net.0"}]
    assert module.net.get_submodule("0").out_features > 2


def test_a_grad_scalers_factor_never_reaches_the_detector():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10_000)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    watch = SplitWatch(EARLY)
    fit([watch], steps=50, plugins=[plugin])
    assert scaler.get_scale() > 1
    assert watch.grower is not None
    events = [event for event in watch.events if event.verdict is not None]
    assert events
    assert all(event.verdict.loss < 1 for event in events)
    assert all(event.drift <= 1e-6 for event in events if event.grown)


def test_on_most_steps_lightning_calls_one_hook(monkeypatch):
    """Each hook that Lightning calls costs it some microseconds, whatever is in it: one more where it looks."""
    looked, look = [], SplitWatch._look
    monkeypatch.setattr(SplitWatch, "_look", lambda self, *args: looked.append(1) or look(self, *args))
    watch, profiler = SplitWatch(replace(SOON, window=40, probe_samples=64)), SimpleProfiler()
    trainer_of([watch], steps=120, profiler=profiler).fit(module_of(), loader(4))
    name = "[Callback]SplitWatch.on_train_batch"
    called = {hook: len(times) for hook, times in profiler.recorded_durations.items() if "SplitWatch" in hook}
    assert called[f"{name}_end"] == 120
    assert len(watch.events) == 2 and called[f"{name}_start"] == len(looked) < 100
    assert max(count for hook, count in called.items() if not hook.startswith(name)) <= 5  # epochs


# --- what goes on, and what is exchanged -----------------------------------------------------------------------------


def test_fitting_for_longer_goes_on_where_the_run_was():
    watch, module = SplitWatch(EARLY), Wave()
    module, trainer = fit([watch], module=module, steps=200)
    width = module.net[0].out_features
    assert [event.grown for event in watch.events].count(True) == 1
    trainer.fit_loop.epoch_loop.max_steps = 400
    trainer.fit(module, DataLoader(TensorDataset(*make_data()), batch_size=64))
    assert trainer.global_step == 400
    assert watch.grower.steps == 400
    assert [event.grown for event in watch.events].count(True) == 1
    assert module.net[0].out_features == width > 2


class NewOptimizer(pl.Callback):
    """Another optimizer from the fifth step on."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), lr=1e-2)]


def test_an_optimizer_that_a_callback_made_is_grown_along():
    watch = SplitWatch(EARLY)
    module, trainer = fit([watch, NewOptimizer()], steps=150)
    assert any(event.grown for event in watch.events)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert {*map(id, optimizer.param_groups[0]["params"])} == {*map(id, module.parameters())}
