"""Two hundred measurements in a row leave memory as it was and the training run as it would have been."""

import gc
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitwatch import Grower, GrowthPolicy, Probe

MEASUREMENTS, SETTLED, TRACED = 200, 50, 30
PAGE = 4096
POLICY = GrowthPolicy(window=10, tolerance=1e9, noise_ratio=1e9, max_overhead=None)  # every tenth step, always


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 2), nn.Tanh(), nn.Linear(2, 2))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 2, 2),
        nn.BatchNorm2d(2),
        nn.SiLU(inplace=True),
        nn.Dropout(0.2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2, 2),
    )


def train(build, measurements, after=lambda measurement: None, monitored=True):
    """Losses, parameters, buffers and momenta of a run; what to do after each measurement."""
    torch.manual_seed(0)
    x = torch.randn(64, 1, 3, 3)
    y = (x.flatten(1).square().sum(1) > 9).long()
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    probe = Probe([(x[:16], y[:16]), (x[16:32], y[16:32])], cross_entropy)
    grower = Grower(model, optimizer, cross_entropy, POLICY, monitor_only=True, probe=probe, progress=False)
    losses = torch.zeros(10 * measurements)
    for step in range(10 * measurements):
        rows = torch.randint(64, (8,))
        optimizer.zero_grad()
        loss = cross_entropy(model, (x[rows], y[rows]))
        loss.backward()
        optimizer.step()
        losses[step] = loss.item()
        if monitored and (event := grower.step((x[rows], y[rows]), loss)):
            assert event.geometry
            assert step % 10 == 9
            del event
            after(step // 10 + 1)
            del grower.events[:-1]  # the record of the run, without tensors, is meant to grow
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    return losses, [*model.parameters(), *model.buffers(), *momenta], torch.get_rng_state()


class Ledger:
    """What is in memory after each measurement; tracing is slow, so it is left to the last ones."""

    def __init__(self):
        self.traced, self.resident, self.blocks, self.tensors = [], [], [], []

    def __call__(self, measurement):
        if measurement == MEASUREMENTS - TRACED:
            tracemalloc.start()
        if measurement % 10 == 0 and measurement >= SETTLED:
            gc.collect()
            self.blocks.append(sys.getallocatedblocks())
            self.tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
            if not tracemalloc.is_tracing():
                self.resident.append(PAGE * int(Path("/proc/self/statm").read_text().split()[1]))
        if measurement > MEASUREMENTS - TRACED // 3:
            gc.collect()
            self.traced.append(tracemalloc.get_traced_memory()[0])


def slope(values, every=1):
    """Of a linear fit: growth a measurement."""
    return np.polyfit(every * np.arange(len(values)), values, 1)[0]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the resident memory from")
@pytest.mark.slow
@pytest.mark.parametrize("build", [mlp, conv])
def test_measurements_leave_nothing_in_memory(build):
    ledger = Ledger()
    gc.collect()
    gc.freeze()  # what others made is not looked through
    try:
        train(build, MEASUREMENTS, ledger)
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert slope(ledger.tensors, 10) < 0.05  # how many there are hangs on the moves that were planned last
    assert slope(ledger.blocks, 10) < 10
    assert slope(ledger.traced) < 1000
    assert slope(ledger.resident, 10) < 10_000


@pytest.mark.parametrize("build", [mlp, pytest.param(conv, marks=pytest.mark.slow)])
def test_training_goes_on_to_the_bit_as_if_nothing_had_been_measured(build):
    losses, tensors, generator = train(build, 6)
    wanted, wanted_tensors, wanted_generator = train(build, 6, monitored=False)
    assert torch.equal(losses, wanted)
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted_tensors, strict=True))
    assert torch.equal(generator, wanted_generator)
