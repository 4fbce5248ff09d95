"""Null growth: dead neurons leave the loss trajectory as it was, whatever trains the network.

python tests/test_null_growth.py prints the whole matrix.
"""

import itertools
import warnings
from functools import cache

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from runs import QUIET, loader, module_of, trainer_of
from torch import nn, optim
from torch.optim import lr_scheduler as schedules

from splitwatch import GrowthPlan, Probe, Sprout, find_hidden_layers, grow
from splitwatch.geometry.dense import layer_curvature

pytestmark = pytest.mark.filterwarnings(*QUIET)
BOUND = 1e-6
STEPS = 8  # before growth, and after it

OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, 0.05),
    "SGD nesterov": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD foreach": lambda p: optim.SGD(p, 0.05, momentum=0.9, dampening=0.1, foreach=True),
    "SGD fused": lambda p: optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "Adam": lambda p: optim.Adam(p, 0.01, weight_decay=0.01),
    "Adam tensor lr": lambda p: optim.Adam(p, torch.tensor(0.01), foreach=False),
    "Adam foreach": lambda p: optim.Adam(p, 0.01, foreach=True),
    "Adam fused": lambda p: optim.Adam(p, 0.01, fused=True),
    "Adam amsgrad": lambda p: optim.Adam(p, 0.01, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1),
    "AdamW fused amsgrad": lambda p: optim.AdamW(p, 0.01, amsgrad=True, fused=True),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01),
    "RMSprop centered": lambda p: optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, 0.05),
    "Adagrad fused": lambda p: optim.Adagrad(p, 0.05, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p, 1.0),
    "Adamax": lambda p: optim.Adamax(p, 0.01),
    "NAdam": lambda p: optim.NAdam(p, 0.01, decoupled_weight_decay=True, weight_decay=0.01),
    "RAdam": lambda p: optim.RAdam(p, 0.01),
    "Rprop": lambda p: optim.Rprop(p, 0.01),
    "ASGD": lambda p: optim.ASGD(p, 0.05),
}
"""Adafactor and Muon normalise by shape, so no growth is null to them; SparseAdam takes sparse gradients only."""


def has_momentum(optimizer):
    return bool({"momentum", "betas"} & optimizer.defaults.keys())


def sequential(optimizer):
    parts = [schedules.ConstantLR(optimizer, 0.5, 3), schedules.ExponentialLR(optimizer, 0.9)]
    return schedules.SequentialLR(optimizer, parts, [6])


SCHEDULERS = {
    "none": lambda o: None,
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + 0.1 * step)),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: schedules.StepLR(o, 5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [4, 11], 0.3),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.3, 10),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, 1.0, 12),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 5),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 4), schedules.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": sequential,
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-3, 1e-2, step_size_up=4, cycle_momentum=has_momentum(o)),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.02, total_steps=40, cycle_momentum=has_momentum(o)),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=5),
}
PRECISIONS = ("float32", "float64", "bf16 autocast", "fp16 scaled")
ACCUMULATIONS = (1, 3)
COMPILERS = ("", "eager", "aot_eager")
AXES = (tuple(OPTIMIZERS), tuple(SCHEDULERS), PRECISIONS, ACCUMULATIONS, COMPILERS)


@cache
def covering():
    """Combinations in which any two values of different axes meet, compiled ones only as often as that needs."""
    met, rows, rests = set(), [], list(itertools.product(*AXES[2:]))
    for i, first in enumerate(itertools.product(*AXES[:2])):
        turned = rests[5 * i % len(rests) :] + rests[: 5 * i % len(rests)]  # the first of equals is another each time
        best = max(turned, key=lambda rest: (len(pairs(first + rest) - met), not rest[2]))
        met |= pairs(first + best)
        rows.append(first + best)
    return rows


def pairs(row):
    return set(itertools.combinations(enumerate(row), 2))


def network(dtype):
    torch.manual_seed(1)
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 2)
    return nn.Sequential(*layers).to(dtype)


def mse(model, batch):
    return F.mse_loss(model(batch[0]).float(), batch[1])


@cache
def dead_neurons():
    """One in every layer."""
    model = network(torch.float64)
    probe = Probe([(torch.randn(4, 3).double(), torch.randn(4, 2)) for _ in range(2)], mse)
    layers = tuple(layer for layer in find_hidden_layers(model, probe) if layer.growable)
    sizes = [(layer, layer_curvature(model, layer, probe)) for layer in layers]
    moves = [Sprout(layer.name, torch.zeros(size.d), torch.zeros(size.c)) for layer, size in sizes]
    return GrowthPlan(layers, tuple(moves), "dead neurons")


def trajectory(row, widen):
    """The losses of a run, widened in the middle or not."""
    optimizer_name, scheduler_name, precision, accumulation, compiler = row
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = network(dtype)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    scheduler = SCHEDULERS[scheduler_name](optimizer)
    run = torch.compile(model, backend=compiler) if compiler else model
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16 scaled")
    half = {"bf16 autocast": torch.bfloat16, "fp16 scaled": torch.float16}.get(precision)
    generator, losses = torch.Generator().manual_seed(2), []
    for step in range(2 * STEPS):
        if widen and step == STEPS:
            assert grow(model, dead_neurons(), optimizer).restarted == ()
        optimizer.zero_grad()
        for _ in range(accumulation):
            batch = (torch.randn(8, n, generator=generator).to(dtype) for n in (3, 2))
            x, y = batch
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = F.mse_loss(run(x).to(dtype), y)
            scaler.scale(loss / accumulation).backward()
            losses.append(float(loss))
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step(*[losses[-1]] if scheduler_name == "ReduceLROnPlateau" else [])
    return torch.tensor(losses, dtype=torch.float64)


def deviation(row):
    """The largest relative difference between the two runs."""
    if row[-1]:
        torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls its own step with an epoch; so does dynamo, of fields gone
        straight, widened = trajectory(row, False), trajectory(row, True)
    assert straight[-1] != straight[0]
    return float(((straight - widened).abs() / straight).max())


def matrix(rows):
    """A printed row of the table for every combination; the deviations."""
    found = {}
    for row in rows:
        found[row] = deviation(row)
        print("{:20} {:28} {:14} {:2} {:10}".format(*row), f"{found[row]:.1e}", flush=True)
    return found


def assert_null(found):
    assert {row: value for row, value in found.items() if not value <= BOUND} == {}


def some():
    """Every optimizer and every scheduler several times, and two runs with each compiler."""
    spread = {row: AXES[0].index(row[0]) + AXES[1].index(row[1]) for row in covering()}
    chosen = [row for row, place in spread.items() if place % 4 == 0 and not row[-1]]
    chosen += [row for name in COMPILERS[1:] for row in [row for row in spread if row[-1] == name][:2]]
    for axis in range(2):
        left = set(AXES[axis]) - {row[axis] for row in chosen}
        chosen += [next(row for row in spread if row[axis] == name) for name in sorted(left)]
    return chosen


@pytest.mark.slow
def test_dead_neurons_leave_training_as_it_was():
    rows = some()
    assert len(rows) >= 60
    for axis, values in enumerate(AXES):
        assert {row[axis] for row in rows} == set(values)
    assert_null(matrix(rows))


@pytest.mark.slow
def test_dead_neurons_leave_training_as_it_was_where_any_two_settings_meet():
    rows = covering()
    met = set().union(*(pairs(row) for row in rows))
    wanted = itertools.combinations(enumerate(AXES), 2)
    assert len(met) == sum(len(a) * len(b) for (_, a), (_, b) in wanted)
    assert_null(matrix(rows))


def test_lbfgs_restarts_and_nothing_else_happens():
    """Its history cannot be carried, so dead neurons are to it what a restart is."""
    runs = []
    for widen in (False, True):
        model, generator = network(torch.float64), torch.Generator().manual_seed(2)
        batch = tuple(torch.randn(8, n, generator=generator).double() for n in (3, 2))
        optimizer, losses = optim.LBFGS(model.parameters(), 0.1, max_iter=4), []

        def closure(model=model, batch=batch, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.mse_loss(model(batch[0]), batch[1])
            loss.backward()
            return loss

        for step in range(12):
            if step == 6 and widen:
                grow(model, dead_neurons(), optimizer)
            elif step == 6:
                optimizer.state.clear()
            losses.append(float(optimizer.step(closure).detach()))
        runs.append(torch.tensor(losses, dtype=torch.float64))
    assert float(((runs[0] - runs[1]).abs() / runs[0]).max()) <= BOUND


TRAINERS = [
    {"precision": "64-true", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    {"precision": "bf16-mixed"},
    {"precision": "32-true", "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
]


@pytest.mark.parametrize("settings", TRAINERS, ids=lambda settings: settings["precision"])
def test_dead_neurons_leave_a_trainers_run_as_it_was(settings):
    runs = []
    for widen in (False, True):
        losses, module = [], module_of()
        if settings["precision"] != "64-true":
            module.float()
            module.training_step = lambda batch, i, net=module.net: F.mse_loss(
                net(batch[0].float()).float(), batch[1].float()
            )
        trainer = trainer_of([Widen(losses, widen)], steps=12, **settings)
        trainer.fit(module, loader())
        assert module.net[0].out_features == 2 + widen
        runs.append(torch.tensor(losses, dtype=torch.float64))
    assert float(((runs[0] - runs[1]).abs() / runs[0]).max()) <= BOUND


class Widen(pl.Callback):
    """Dead neurons before the step in the middle."""

    def __init__(self, losses, widen):
        self.losses, self.widen = losses, widen

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.widen and trainer.global_step == 6 and pl_module.net[0].out_features == 2:
            probe = Probe(
                [tuple(part.to(pl_module.dtype) for part in batch)], lambda m, b: F.mse_loss(m.net(b[0]), b[1])
            )
            (layer,) = (layer for layer in find_hidden_layers(pl_module, probe) if layer.growable)
            plan = GrowthPlan((layer,), (Sprout(layer.name, torch.zeros(3), torch.zeros(1)),), "a dead neuron")
            grow(pl_module, plan, trainer.optimizers)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = matrix(covering())
    print(f"{len(found)} combinations, largest deviation {max(found.values()):.1e}")
