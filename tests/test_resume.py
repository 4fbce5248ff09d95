"""Killed at any moment and resumed, a run ends as if it had never been interrupted, to the bit."""

import functools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import QUIET, SOON, Dealt, in_clean_process, loader, module_of, trainer_of, wave
from torch import nn
from torch.utils import _pytree as pytree

from splitwatch import Grower, GrowthPolicy, SplitWatch, load_grown, make_growable
from splitwatch.events import light, packed
from splitwatch.growth.checkpoint import read_history

STEPS = 44
POLICY = replace(SOON, max_events=3, max_neurons=1, moves="mixed")
POINTS = ("write", "decision", "surgery")
FORK = multiprocessing.get_context("fork")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Fuse:
    """Ends the process after some function calls, and counts them."""

    def __init__(self, calls=None):
        self.calls, self.burnt = calls, 0

    def __call__(self, frame, event, argument):
        self.burnt += 1
        if self.burnt == self.calls:
            die()


def end_at(point):
    """End the process within the write of the second checkpoint, after a decision, or amid the surgery."""
    if point == "surgery":
        import splitwatch.growth.surgery as module

        module.Surgery._apply = lambda self: (setattr(self.replacements[0].module, "weight", None), die())
    elif point == "decision":
        Grower.act = lambda self: die() if self.pending else None
    elif point == "write":
        shutil.move = os.replace = lambda *paths: die()


def plain(folder):
    """A plain loop with a checkpoint every four steps."""
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double(), f"{folder}/last.ckpt"
    make_growable(model)
    state = torch.load(path, weights_only=True) if os.path.exists(path) else None
    if state:
        model.load_state_dict(state["model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 15, 0.8)
    grower = Grower(model, optimizer, lambda m, b: F.mse_loss(m(b[0]), b[1]), POLICY, progress=False)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "grower": grower}
    if state:
        for name in ("optimizer", "scheduler", "grower"):
            parts[name].load_state_dict(state[name])
    x, y = wave()
    for step in range(grower.steps, STEPS):
        grower.act()  # what was decided before the checkpoint
        rows = torch.randint(512, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        scheduler.step()
        grower.observe((x[rows], y[rows]), loss)
        if grower.steps % 2 == 0:
            torch.save({name: part.state_dict() for name, part in parts.items()}, path + ".part")
            os.replace(path + ".part", path)
    return {
        "parameters": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "growths": grower.growths,
        "events": told(grower.events),
    }


def told(events):
    """Events as far as they are kept: without geometry, without times."""
    return [{**packed(light(event)), "seconds": {}, "overhead": 0.0} for event in events]


def lightning(folder):
    """The same through Lightning."""
    watch, path = SplitWatch(POLICY), f"{folder}/last.ckpt"
    keep = ModelCheckpoint(folder, "last", every_n_train_steps=2, enable_version_counter=False)
    module = module_of()
    trainer = trainer_of([watch, keep], steps=STEPS, enable_checkpointing=True)
    trainer.fit(module, Dealt(), ckpt_path=path if os.path.exists(path) else None, weights_only=True)
    (optimizer,) = trainer.optimizers
    parameters = dict(module.named_parameters())
    ended = {"parameters": parameters, "optimizer": optimizer.state_dict(), "growths": watch.grower.growths}
    return {**ended, "events": told(watch.events)}


RUNS = {"plain": plain, "lightning": lightning}


def child(name, folder, fuse, point):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    end_at(point)
    sys.setprofile(fuse)
    result = RUNS[name](folder)
    sys.setprofile(None)
    torch.save({**result, "burnt": fuse.burnt}, f"{folder}/result")
    os._exit(0)


def attempt(name, folder, fuse=None, point=None):
    """Whether a run came to its end."""
    process = FORK.Process(target=child, args=(name, str(folder), Fuse(fuse), point))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def assert_same(found, wanted):
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, (dict, list, tuple)):
        assert len(found) == len(wanted)
        keys = wanted if isinstance(wanted, dict) else range(len(wanted))
        for key in keys:
            assert_same(found[key], wanted[key])
    else:
        assert found == wanted or (found != found and wanted != wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@in_clean_process
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(name, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    assert attempt(name, straight)
    wanted = torch.load(straight / "result")
    burnt, moments, kills = wanted.pop("burnt"), random.Random(0), 0
    assert wanted["growths"] == 3
    for point in POINTS:  # where it matters most, once with what was saved before and once without
        kills += not attempt(name, killed, point=point)
    assert kills == len(POINTS)
    while kills < 20:
        kills += not attempt(name, killed, fuse=moments.randrange(1, burnt // 4))
        if (killed / "result").exists():  # through; from the beginning
            assert_same({**torch.load(killed / "result"), "burnt": 0}, {**wanted, "burnt": 0})
            shutil.rmtree(killed)
            killed.mkdir()
    assert attempt(name, killed)
    assert_same({**torch.load(killed / "result"), "burnt": 0}, {**wanted, "burnt": 0})


SHORT = pytest.mark.filterwarnings(
    *QUIET,
    "ignore:.*no pre-optimization state was saved.*:UserWarning",
    "ignore:Be aware that when using .ckpt_path.*:UserWarning",
    "ignore:The dirpath has changed.*:UserWarning",
)


def one_cycle(self):
    optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-2, total_steps=100)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def momentum(self):
    return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def two(self):
    return [torch.optim.Adam(layer.parameters(), 3e-2) for layer in (self.net[0], self.net[2])]


def by_hand(self, batch, batch_idx):
    loss = F.mse_loss(self.net(batch[0]), batch[1])
    for optimizer in self.optimizers():
        optimizer.zero_grad()
    self.manual_backward(loss)
    for optimizer in self.optimizers():
        optimizer.step()
    return loss


def run_of(optimizers, folder, path=None):
    """A run of 32 batches that grows at the tenth and the twentieth, from the beginning or from a checkpoint."""
    manual = {"training_step": by_hand} if optimizers is two else {}
    module = module_of(configure_optimizers=optimizers, **manual)
    module.automatic_optimization = not manual
    watch = SplitWatch(SOON, loss_fn=lambda module, batch: F.mse_loss(module.net(batch[0]), batch[1]))
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=8 * (1 + bool(manual)), save_top_k=-1)
    trainer = trainer_of([watch, keep], steps=32 * (1 + bool(manual)), enable_checkpointing=True)
    trainer.fit(module, loader(), ckpt_path=path, weights_only=True)
    return module, trainer


@SHORT
@pytest.mark.parametrize("optimizers", [one_cycle, momentum, two], ids=lambda function: function.__name__)
def test_a_narrow_module_resumes_to_the_bit_from_before_growth_and_after(optimizers, tmp_path):
    straight, trainer = run_of(optimizers, tmp_path)
    wanted = [optimizer.state_dict() for optimizer in trainer.optimizers]
    for step in (8, 16):
        path = tmp_path / f"step={step * len(wanted)}.ckpt"
        resumed, other = run_of(optimizers, tmp_path / "resumed", path)
        assert_same(dict(resumed.named_parameters()), dict(straight.named_parameters()))
        assert_same([optimizer.state_dict() for optimizer in other.optimizers], wanted)


@SHORT
def test_a_wide_module_goes_back_to_a_checkpoint_from_before_its_growth(tmp_path):
    def test_step(self, batch, batch_idx):
        self.log("tested", F.mse_loss(self.net(batch[0]), batch[1]))

    module, (x, y) = module_of(test_step=test_step), wave()
    keep = ModelCheckpoint(tmp_path, "{step}", monitor="loss", mode="max", every_n_train_steps=8, save_top_k=-1)
    trainer = trainer_of([SplitWatch(SOON), keep], steps=24, enable_checkpointing=True)
    trainer.fit(module, loader())
    assert module.net[0].out_features == 6
    (found,) = trainer.test(module, loader(512), ckpt_path=tmp_path / "step=8.ckpt", verbose=False)
    narrow = load_grown(lambda: module_of(), tmp_path / "step=8.ckpt")
    assert module.net[0].out_features == narrow.net[0].out_features == 2
    assert found["tested"] == pytest.approx(F.mse_loss(narrow.net(x), y).item(), rel=1e-9)
    trainer.test(module, loader(512), ckpt_path="best", verbose=False)
    assert len(module._load_state_dict_pre_hooks) == 1
    again = trainer_of([SplitWatch(SOON)], steps=24)
    again.fit(module, loader(), ckpt_path=tmp_path / "step=8.ckpt")
    assert module.net[0].out_features == 6


def rebuilt(trainer, module, path):
    """As a module does that leaves something out in ``on_save_checkpoint``."""
    module.on_save_checkpoint = lambda checkpoint: checkpoint.update(state_dict=dict(checkpoint["state_dict"]))
    trainer.save_checkpoint(path)


SAVED = {
    "checkpoint": lambda trainer, module, path: trainer.save_checkpoint(path),
    "weights only": lambda trainer, module, path: trainer.save_checkpoint(path, weights_only=True),
    "state dict": lambda trainer, module, path: torch.save(module.state_dict(), path),
    "rebuilt": rebuilt,
}


@SHORT
@pytest.mark.parametrize("how", SAVED)
def test_however_it_was_saved_a_grown_network_is_loaded(how, tmp_path):
    module = module_of()
    trainer = trainer_of([SplitWatch(SOON)], steps=24)
    trainer.fit(module, loader())
    SAVED[how](trainer, module, tmp_path / "saved")
    loaded = load_grown(lambda: module_of(), tmp_path / "saved")
    assert_same(dict(loaded.named_parameters()), dict(module.named_parameters()))
    assert read_history(tmp_path / "saved")["net.0"]["widths"] == [2, 4, 6]
    again = load_grown(lambda: module_of(), tmp_path / "saved")
    torch.save(again.state_dict(), tmp_path / "again")
    assert read_history(tmp_path / "again")["net.0"]["widths"] == [2, 4, 6]
    if how in ("checkpoint", "rebuilt"):
        resumed = module_of()
        trainer_of([SplitWatch(SOON)], steps=25).fit(resumed, loader(), ckpt_path=tmp_path / "saved")
        assert resumed.net[0].out_features == 6


def test_a_decision_and_the_probe_behind_it_survive_a_restart(tmp_path):
    """As if killed between decision and surgery, in one process."""
    x, y = wave()
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    loss_fn = lambda m, b: F.mse_loss(m(b[0]), b[1])  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    grower = Grower(model, optimizer, loss_fn, POLICY, progress=False)
    for i in range(10):
        grower.observe((x[50 * i : 50 * i + 50], y[50 * i : 50 * i + 50]), 1.0)
    assert grower.pending
    torch.save(grower.state_dict(), tmp_path / "state")
    other = Grower(model, optimizer, loss_fn, POLICY, monitor_only=True, progress=False)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert other.pending
    mine, theirs = other.act(), grower.act()
    assert [str(move) for move in mine.plan.moves] == [str(move) for move in theirs.plan.moves]
    assert mine.plan.held_out_decrease == theirs.plan.held_out_decrease


def test_events_survive_a_restart(tmp_path):
    x, y = wave()
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    policy = replace(POLICY, control=2, max_events=2)
    make = functools.partial(Grower, model, optimizer, lambda m, b: F.mse_loss(m(b[0]), b[1]), policy, progress=False)
    grower = make()
    for i in range(40):
        rows = slice(50 * (i % 10), 50 * (i % 10) + 50)
        grower.step((x[rows], y[rows]), F.mse_loss(model(x[rows]), y[rows]))
    assert [event.grown for event in grower.events].count(True) == 2
    assert any(event.comparison for event in grower.events)
    plain = {torch.Tensor, int, float, str, bool, type(None)}
    assert {*map(type, pytree.tree_leaves(grower.state_dict()))} <= plain
    torch.save(grower.state_dict(), tmp_path / "state")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert [*map(str, other.events)] == [*map(str, grower.events)]
    assert_same(other.state_dict()["events"], grower.state_dict()["events"])
    (kept, *_), (known, *_) = other.events, grower.events
    assert type(kept) is type(known)
    assert [*map(str, kept.plan.moves)] == [*map(str, known.plan.moves)] != []
    assert [*map(str, kept.outcomes)] == [*map(str, known.outcomes)] != []


def test_a_probe_that_is_too_large_or_not_plain_is_collected_afresh(monkeypatch):
    model = nn.Linear(2, 1)
    grower = Grower(model, torch.optim.SGD(model.parameters(), 0.1), lambda m, b: m(b).mean(), GrowthPolicy(window=10))
    for _ in range(10):
        grower.observe(torch.randn(8, 2), 1.0)
    state = grower.state_dict()
    assert state["collector"]["batches"]
    another = {**state, "pending": True, "collector": {**state["collector"], "rank": 1, "ranks": 2}}
    grower.load_state_dict(another)
    assert not grower.pending
    assert not grower.watcher.collector.batches
    grower.load_state_dict(state)
    assert grower.watcher.collector.batches
    monkeypatch.setattr("splitwatch.collect.STORED", 8 * 2 * 4)
    assert grower.state_dict()["collector"] == {}
    grower.watcher.pending = True
    grower.load_state_dict(grower.state_dict())
    assert not grower.pending
    assert not grower.watcher.collector.batches
