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
from runs import SOON, in_clean_process, module_of, trainer_of, wave
from torch import nn
from torch.utils import _pytree as pytree

from splitwatch import Grower, GrowthPolicy, SplitWatch, make_growable
from splitwatch.events import light, packed

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


class Dealt:
    """A loader that knows where it stands, so that a run can be resumed within an epoch."""

    position = 0

    def __len__(self):
        return 8

    def __iter__(self):
        x, y = wave()
        for i in range(self.position, 8):
            self.position = (i + 1) % 8
            yield x[64 * i : 64 * i + 64], y[64 * i : 64 * i + 64]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


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
    assert not grower.collector.batches
    grower.load_state_dict(state)
    assert grower.collector.batches
    monkeypatch.setattr("splitwatch.collect.STORED", 8 * 2 * 4)
    assert grower.state_dict()["collector"] == {}
    grower.pending = True
    grower.load_state_dict(grower.state_dict())
    assert not grower.pending
    assert not grower.collector.batches
