"""The plain loop: what it does, when, and that it leaves the run alone otherwise."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitwatch import Grower, GrowthPolicy, Probe, SplitWatchError


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def data(n=512):
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return x, torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])


def run(steps, grower_of, seed=0, width=2):
    torch.manual_seed(seed)
    x, y = data()
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = grower_of(model, optimizer)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        loss = mse(model, (x[rows], y[rows]))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if grower is not None:
            grower.step((x[rows], y[rows]), loss)
    return model, grower, torch.stack(losses)


POLICY = GrowthPolicy(window=100, max_events=1, max_overhead=None)
EARLY = replace(POLICY, window=10, tolerance=1e9, noise_ratio=1e9)
"""To this one every tenth step is a plateau, for tests that ask how a run grows, not when."""


@pytest.fixture(scope="module")
def grown():
    return run(1500, lambda m, o: Grower(m, o, mse, POLICY, progress=False))


def test_it_grows_on_the_plateau_and_the_loss_falls_further(grown):
    model, grower, losses = grown
    (event,) = [event for event in grower.events if event.grown]
    assert event.verdict.kind == "stationary"
    assert event.realised_held_out > 0
    assert model[0].out_features == model[2].in_features == event.widths["0"][1] > 2
    _, _, control = run(1500, lambda m, o: None)
    assert losses[-100:].mean() < 0.5 * control[-100:].mean()
    assert torch.equal(losses[: event.step], control[: event.step])


def test_the_event_repeats_what_the_plan_measured(grown):
    _, grower, _ = grown
    (event,) = [event for event in grower.events if event.grown]
    assert event.realised_fitted == pytest.approx(event.plan.fitted_decrease, rel=1e-4, abs=1e-8)
    assert event.realised_held_out == pytest.approx(event.plan.held_out_decrease, rel=1e-4, abs=1e-8)
    assert event.drift <= 1e-6
    assert {"gradient test", "geometry", "plan", "diagnosis", "growth"} == set(event.seconds)
    assert all(str(move) in str(event.plan) for move in event.plan.moves)
    assert "0 " in str(event) or "width of 0" in str(event)


def test_two_runs_under_one_seed_are_identical(grown):
    model, _, losses = grown
    again, _, losses_again = run(1500, lambda m, o: Grower(m, o, mse, POLICY, progress=False))
    assert torch.equal(losses, losses_again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_monitor_only_measures_and_leaves_the_run_bit_equal():
    _, grower, losses = run(40, lambda m, o: Grower(m, o, mse, EARLY, monitor_only=True, progress=False))
    _, _, control = run(40, lambda m, o: None)
    assert any(event.geometry and event.plan for event in grower.events)
    assert not any(event.grown for event in grower.events)
    assert torch.equal(losses, control)


def test_dry_run_plans_and_changes_nothing():
    model, grower, _ = run(300, lambda m, o: Grower(m, o, mse, POLICY, monitor_only=True, progress=False))
    before = copy.deepcopy(model.state_dict())
    plan = grower.dry_run()
    assert plan.reason
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_dry_run_without_batches_says_what_is_missing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    grower = Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), mse)
    with pytest.raises(SplitWatchError, match="probe"):
        grower.dry_run()


def test_budgets_bound_the_growth():
    one = replace(EARLY, max_neurons=1)
    model, grower, _ = run(40, lambda m, o: Grower(m, o, mse, one, progress=False))
    assert model[0].out_features == 3
    zero = replace(EARLY, max_neurons=0, max_events=None)
    model, grower, _ = run(40, lambda m, o: Grower(m, o, mse, zero, progress=False))
    assert model[0].out_features == 2
    assert any("budget" in event.plan.reason for event in grower.events)


def test_a_given_probe_is_used_and_sinks_hear_of_every_event():
    x, y = data()
    heard = []
    probe = Probe([(x[:256], y[:256]), (x[256:], y[256:])], mse)
    _, grower, _ = run(900, lambda m, o: Grower(m, o, mse, POLICY, probe=probe, sinks=[heard.append], progress=False))
    assert [event.step for event in heard] == [event.step for event in grower.events]
    assert heard[-1] is grower.events[-1]
    assert not grower.watcher.collector.batches


def test_losses_keep_their_values_and_no_graph():
    x, y = data()
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    grower = Grower(net, torch.optim.SGD(net.parameters(), lr=0.1), mse)
    buffer = torch.zeros((), requires_grad=True)
    for value in (3.0, 2.0, 1.0):  # as where a captured graph writes every loss to the same place
        buffer.data.fill_(value)
        grower.observe((x, y), buffer)
    assert [float(loss) for loss in grower.watcher.detector.losses] == [3, 2, 1]
    assert not any(getattr(loss, "requires_grad", False) for loss in grower.watcher.detector.losses)


def test_state_survives_a_round_trip():
    _, grower, _ = run(250, lambda m, o: Grower(m, o, mse, POLICY, progress=False))
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    other = Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), mse, POLICY)
    other.load_state_dict(grower.state_dict())
    saved, loaded = grower.state_dict(), other.state_dict()
    mine, theirs = saved.pop("collector"), loaded.pop("collector")
    assert loaded == saved
    for batch, same in zip(mine.pop("batches"), theirs.pop("batches"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
    assert mine == theirs


@pytest.mark.parametrize(
    "settings",
    [
        {"max_neurons": -1},
        {"max_ratio": float("nan")},
        {"coefficients": "best"},
        {"cap": 1.0},
        {"window": 3},
        {"probe_samples": 1},
        {"max_overhead": -0.1},
    ],
)
def test_a_policy_that_makes_no_sense_names_the_field(settings):
    with pytest.raises(SplitWatchError, match=next(iter(settings))):
        GrowthPolicy(**settings)


def test_layers_that_the_model_lacks_are_refused_before_training():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    with pytest.raises(SplitWatchError, match=r"layers: .*found 'nowhere'; choose from 0, 2"):
        Grower(model, torch.optim.SGD(model.parameters()), mse, GrowthPolicy(layers=["0", "nowhere"]))
