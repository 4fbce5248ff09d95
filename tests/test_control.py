"""The copy that did not grow: what it does is the run without growth, and the run with growth does not notice it."""

import copy
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import in_turn

from splitwatch import Grower, GrowthPolicy, Probe, SplitWatchError
from splitwatch.control import Control
from splitwatch.events import Comparison
from splitwatch.ranks import paired_error
from splitwatch.report.page import event_markdown
from splitwatch.report.scalars import event_scalars

STEPS, AT = 40, 12


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def data():
    x = torch.rand(512, 2, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return x, torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])


def network(dropout=0.1):
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(dropout), nn.Linear(3, 1))


OPTIMIZERS = {
    "adamw": lambda m: [torch.optim.AdamW(m.parameters(), lr=1e-2)],
    "fused": lambda m: [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True)],
    "sgd, two": lambda m: [torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9) for p in (m[:3], m[3:])],
    "rmsprop": lambda m: [torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.5, weight_decay=1e-3)],
    "tensor rate": lambda m: [torch.optim.Adam(m.parameters(), lr=torch.tensor(1e-2))],
    "cycled": lambda m: [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)],
}


def schedulers(name, optimizers):
    if name == "cycled":
        return [torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=STEPS) for o in optimizers]
    return [torch.optim.lr_scheduler.StepLR(o, 5, 0.8) for o in optimizers]


def train(name, grows, control=None, early=False):
    """A run in which growth comes at a fixed step, or never."""
    torch.manual_seed(0)
    model, (x, y) = network(), data()
    optimizers = OPTIMIZERS[name](model)
    rates = schedulers(name, optimizers)
    policy = GrowthPolicy(window=10**6, noise_ratio=1e6, max_neurons=2, max_overhead=None, control=control)
    probe = Probe([(x[:256], y[:256]), (x[256:], y[256:])], mse)
    grower = Grower(model, optimizers, mse, policy, probe=probe, progress=False)
    generator, losses = torch.Generator().manual_seed(0), []
    for i in range(STEPS):
        rows = torch.randint(len(x), (64,), generator=generator)
        model.zero_grad()
        loss = mse(model, (x[rows], y[rows]))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if early:
            [rate.step() for rate in rates]
        losses.append(loss.detach())
        grower.watcher.pending = grows and i == AT
        grower.step((x[rows], y[rows]), loss)
        if not early:
            [rate.step() for rate in rates]
    return model, grower, torch.stack(losses), probe


@pytest.mark.parametrize(("name", "early"), in_turn(OPTIMIZERS, [False, True]))
def test_the_copy_does_what_the_run_without_growth_does_and_the_run_with_growth_does_not_notice(name, early):
    _, _, control, _ = train(name, False, early=early)
    alone, _, losses, _ = train(name, True, early=early)
    model, grower, beside, _ = train(name, True, control=20, early=early)
    assert torch.equal(beside, losses)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), alone.state_dict().values(), strict=True))
    growth, compared = grower.events
    assert growth.grown
    assert compared.step == growth.step + 20
    found = compared.comparison
    assert found.steps == 20
    assert found.control_training == pytest.approx(float(control[AT + 1 : AT + 21].double().mean()), rel=1e-12)
    assert found.grown_training == pytest.approx(float(losses[AT + 1 : AT + 21].double().mean()), rel=1e-12)
    assert grower.control is None


def test_the_comparison_is_that_of_the_two_networks_on_the_held_out_half():
    torch.manual_seed(0)
    model, (x, y) = network(0.0), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe([(x[:200], y[:200]), (x[200:], y[200:])], mse)
    control = Control(model, [optimizer], mse, probe, 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model[4].bias += 0.1
    control.step((x[:50], y[:50]), 1.0)
    with torch.no_grad():
        error = [(m.eval()(x[200:]) - y[200:]).square().double().mean(1) for m in (model, control.model)]
    found = control.compare(model)
    assert found.grown == pytest.approx(float(error[0].mean()), rel=1e-5)
    assert found.control == pytest.approx(float(error[1].mean()), rel=1e-5)
    assert found.difference == pytest.approx(found.control - found.grown)
    parts = torch.stack([(error[1] - error[0])[i::8].mean() for i in range(8)])
    assert found.error == pytest.approx(float(parts.std() / 8**0.5), rel=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(other[0].parameters(), model[0].parameters(), strict=True))


def test_paired_error_is_that_of_the_mean():
    values = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert paired_error(values, torch.full((6,), 1 / 6).double()) == pytest.approx(float(values.std() / 6**0.5))
    assert paired_error(values[:1], torch.ones(1).double()) != paired_error(values[:1], torch.ones(1).double())


@pytest.mark.parametrize(("grown", "paid"), [(0.1, True), (0.3, False), (0.2001, None)])
def test_a_comparison_says_whether_growth_paid(grown, paid):
    found = Comparison(10, grown, 0.2, 0.01, 0.4, 0.5)
    assert found.paid is paid
    words = {True: "growth paid", False: "did not pay", None: "no difference"}
    assert words[paid] in str(found)


def test_the_event_tells_it_to_people_and_to_boards():
    _, grower, _, _ = train("adamw", True, control=5)
    event = grower.events[-1]
    assert "compared: " in str(event)
    assert str(event.comparison) == event.plan.reason
    assert "after 5 steps the held-out loss" in event_markdown(event)
    assert event_scalars(event)["splitwatch/control/difference"] == event.comparison.difference


def test_the_copy_is_forgotten_afterwards_and_at_resume(caplog):
    torch.manual_seed(0)
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = GrowthPolicy(noise_ratio=1e6, max_neurons=2, max_overhead=None, control=2)
    grower = Grower(model, optimizer, mse, policy, probe=Probe([(x, y)], mse), progress=False)
    grower.observe((x, y), 1.0)
    grower.watcher.pending = True
    assert grower.act().grown
    copied = weakref.ref(grower.control.model)
    grower.step((x, y), 1.0)
    state = grower.state_dict()
    assert state["control"] == 1
    assert grower.step((x, y), 1.0).comparison is not None
    assert copied() is None
    assert not optimizer._optimizer_step_pre_hooks
    with caplog.at_level(logging.WARNING, "splitwatch"):
        grower.load_state_dict(state)
    assert "control is dropped" in caplog.text
    assert grower.state_dict()["control"] == 0


def test_the_next_growth_ends_a_control_early():
    torch.manual_seed(0)
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = GrowthPolicy(noise_ratio=1e6, max_neurons=1, max_overhead=None, control=100)
    grower = Grower(model, optimizer, mse, policy, probe=Probe([(x, y)], mse), progress=False)
    for _ in range(2):
        grower.observe((x, y), 1.0)
        grower.watcher.pending = True
        assert grower.act().grown
    assert [event.grown for event in grower.events] == [True, False, True]
    assert grower.events[1].comparison.steps == 1


def test_what_cannot_be_copied_is_said_and_growth_goes_on(caplog):
    torch.manual_seed(0)
    model, (x, y) = network(), data()
    optimizer = torch.optim.LBFGS(model.parameters())
    policy = GrowthPolicy(noise_ratio=1e6, max_neurons=1, max_overhead=None, control=100)
    grower = Grower(model, optimizer, mse, policy, probe=Probe([(x, y)], mse), progress=False)
    grower.observe((x, y), 1.0)
    grower.watcher.pending = True
    with caplog.at_level(logging.WARNING, "splitwatch"):
        assert grower.act().grown
    assert "L-BFGS" in caplog.text
    assert grower.control is None


def test_a_parameter_group_that_is_added_ends_a_control_with_a_warning(caplog):
    torch.manual_seed(0)
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    policy = GrowthPolicy(noise_ratio=1e6, max_neurons=1, max_overhead=None, control=100)
    grower = Grower(model, optimizer, mse, policy, probe=Probe([(x, y)], mse), progress=False)
    grower.observe((x, y), 1.0)
    grower.watcher.pending = True
    assert grower.act().grown
    optimizer.add_param_group({"params": list(model[0].parameters())})
    mse(model, (x, y)).backward()
    optimizer.step()
    with caplog.at_level(logging.WARNING, "splitwatch"):
        grower.step((x, y), 1.0)
    assert "the control is dropped: it could not be trained" in caplog.text
    assert grower.control is None
    assert not optimizer._optimizer_step_pre_hooks


def test_a_control_of_no_steps_is_refused():
    with pytest.raises(SplitWatchError, match="control"):
        GrowthPolicy(control=0)
