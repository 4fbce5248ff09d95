"""Rewarming: the steps are those of rates written out by hand, whatever the scheduler, and nobody else sees them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from splitwatch import Grower, GrowthPolicy, Probe, Rewarm, SplitWatchError

SCHEDULERS = {
    "none": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1.0),
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=40, cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}
OPTIMIZERS = {
    "sgd": lambda p, lr=0.1: torch.optim.SGD(p, lr, momentum=0.9),
    "adamw": lambda p, lr=0.1: torch.optim.AdamW(p, lr),
    "foreach": lambda p, lr=0.1: torch.optim.Adam(p, lr, foreach=True),
    "fused": lambda p, lr=0.1: torch.optim.AdamW(p, lr, fused=True),
    "tensor rate": lambda p, lr=0.1: torch.optim.Adam(p, torch.tensor(lr)),
}


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def train(model, optimizer, scheduler, steps, factor=lambda i: 1.0, before=lambda i: None):
    """Steps by hand: the rate of the scheduler times a factor, put back afterwards."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
    rates = []
    for i in range(steps):
        before(i)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        rate = optimizer.param_groups[0]["lr"]
        if factor(i) != 1:
            optimizer.param_groups[0]["lr"] = rate * factor(i)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] is not None
        if factor(i) != 1:
            optimizer.param_groups[0]["lr"] = rate
        rates.append(float(rate))
        scheduler.step(*([float(loss.detach())] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return rates


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_steps_are_those_of_rates_by_hand_and_schedulers_never_see_them(optimizer, scheduler):
    if (optimizer, scheduler) == ("tensor rate", "one cycle"):
        pytest.skip("torch fills the tensor in place")
    mine, hand = network(), network()
    one, two = OPTIMIZERS[optimizer](mine.parameters()), OPTIMIZERS[optimizer](hand.parameters())
    rewarm = Rewarm(one, 6, start=0.25)
    begin = {4: rewarm.begin, 20: rewarm.begin}
    rates = train(mine, one, SCHEDULERS[scheduler](one), 30, before=lambda i: begin.get(i, lambda: None)())

    def factor(i):
        since = i - (20 if i >= 20 else 4)
        return 0.25 + 0.75 * since / 6 if 0 <= since < 6 else 1.0

    assert rates == train(hand, two, SCHEDULERS[scheduler](two), 30, factor)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), hand.parameters(), strict=True))
    assert len(one._optimizer_step_pre_hooks) == len(one._optimizer_step_post_hooks) == 1  # idle, for the next growth


def test_a_saved_run_goes_on_where_it_was():
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    rewarm = Rewarm(optimizer, 10)
    rewarm.begin()
    train(model, optimizer, SCHEDULERS["none"](optimizer), 4)
    other = copy.deepcopy(model)
    resumed = OPTIMIZERS["adamw"](other.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == 0.1
    again = Rewarm(resumed, 10)
    again.load_state_dict(rewarm.state_dict())
    assert again.factor == rewarm.factor == pytest.approx(0.1 + 0.9 * 0.4)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, SCHEDULERS["none"](o), 9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("begun", [False, True])
def test_an_idle_one_stays_idle_under_more_steps(begun):
    saved, loaded = (Rewarm(OPTIMIZERS["sgd"](network().parameters()), steps) for steps in (2, 400))
    if begun:
        saved.begin()
        train(network(), saved.optimizer, SCHEDULERS["none"](saved.optimizer), 2)
    loaded.begin()  # of a state that is put back amid a run
    loaded.load_state_dict(saved.state_dict())
    assert loaded.factor == 1.0
    assert not loaded.optimizer._optimizer_step_pre_hooks


def test_a_run_that_never_grew_is_resumed_at_full_rates():
    def grower(steps):
        model = network()
        policy = GrowthPolicy(rewarm=steps)
        return Grower(model, OPTIMIZERS["sgd"](model.parameters()), lambda model, batch: model(batch).mean(), policy)

    saved, other = grower(200).state_dict(), grower(400)
    other.load_state_dict(saved)
    assert other.rewarm[0].factor == 1.0
    other.load_state_dict({**saved, "rewarm": [100]})  # as it was saved before, where it was not idle
    assert other.rewarm[0].factor == pytest.approx(0.1 + 0.9 / 4)


def test_a_step_that_fails_leaves_no_scaled_rate_for_the_next():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    rewarm = Rewarm(optimizer, 10, start=0.5)
    rewarm.begin()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1
    train(model, optimizer, SCHEDULERS["none"](optimizer), 1)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_hooks_that_come_later_are_called_after_the_last_rewarmed_step_too():
    optimizer, calls = OPTIMIZERS["sgd"](network().parameters()), []
    rewarm = Rewarm(optimizer, 3)
    rewarm.begin()
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        register(lambda *arguments: calls.append(optimizer.param_groups[0]["lr"]))
    for _ in range(5):
        optimizer.step()
    assert calls == pytest.approx([0.01, 0.1, 0.04, 0.1, 0.07, 0.1, 0.1, 0.1, 0.1, 0.1])
    rewarm.begin()
    assert len(optimizer._optimizer_step_pre_hooks) == 2


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 3, "start": 1.5}])
def test_what_makes_no_sense_is_refused(settings):
    with pytest.raises(SplitWatchError, match="steps, start"):
        Rewarm(OPTIMIZERS["sgd"](network().parameters()), **settings)
    with pytest.raises(SplitWatchError, match="rewarm"):
        GrowthPolicy(rewarm=0)


def test_the_grower_rewarms_after_growth_and_the_control_does_not():
    def mse(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    torch.manual_seed(0)
    x = torch.rand(256, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1])
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = GrowthPolicy(noise_ratio=1e6, max_neurons=2, max_overhead=None, control=5, rewarm=4)
    grower = Grower(model, optimizer, mse, policy, probe=Probe([(x, y)], mse), progress=False)
    grower.observe((x, y), 1.0)
    grower.watcher.pending = True
    assert grower.act().grown
    assert grower.rewarm[0].factor == pytest.approx(0.1)
    for expected in (0.1, 0.1 + 0.9 / 4, 0.55, 0.1 + 0.9 * 0.75, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = mse(model, (x, y))
        loss.backward()
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old - 0.1 * expected * p.grad)
        if grower.control is not None:
            assert grower.control.settings[0][0]["lr"] == 0.1
        state = grower.state_dict()
        grower.step((x, y), loss)
    assert state["rewarm"] == [None]
    other = Grower(model, optimizer, mse, policy, progress=False)
    other.load_state_dict({**grower.state_dict(), "rewarm": [2]})
    assert other.rewarm[0].factor == pytest.approx(0.55)
