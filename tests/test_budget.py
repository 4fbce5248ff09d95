"""The budget of monitoring under a clock that the test turns."""

import logging

import pytest
import torch
from torch import nn

from splitwatch import Grower, GrowthPolicy, Probe
from splitwatch.budget import CREDIT, GEOMETRY, TEST, Budget
from splitwatch.report.page import event_markdown
from splitwatch.report.scalars import event_scalars


class Clock:
    """Stands still but where it is told to go on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def turn(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("splitwatch.budget.perf_counter", clock)
    return clock


def watched(clock, cost=0.02, noise_ratio=1e9, sinks=(), **settings):
    """A grower of a network whose every loss on the probe takes ``cost`` seconds; stationary under this noise ratio."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    x = torch.randn(64, 2)

    def loss_fn(model, batch):
        clock.turn(cost)
        return (model(batch) - batch[:, :1].sin()).square().mean()

    monitor_only = settings.pop("monitor_only", True)
    policy = GrowthPolicy(window=20, noise_ratio=noise_ratio, **settings)
    optimizer, probe = torch.optim.SGD(model.parameters(), 0.1), Probe(x.split(8), loss_fn)
    return Grower(
        model, optimizer, loss_fn, policy, monitor_only=monitor_only, probe=probe, sinks=sinks, progress=False
    )


def train(grower, clock, steps, seconds=0.1):
    """Steps that take some seconds each and change nothing; the realised share after each."""
    batch, shares = torch.zeros(8, 2), []
    for _ in range(steps):
        clock.turn(seconds)
        grower.step(batch, 1.0)
        shares.append(grower.watcher.budget.overhead())
    return shares


@pytest.mark.parametrize(("share", "steps"), [pytest.param(0.01, 30_000, marks=pytest.mark.slow), (0.1, 3000)])
def test_the_realised_share_stays_within_the_budget_and_measurements_come(clock, share, steps):
    grower = watched(clock, max_overhead=share, sinks=[lambda event: clock.turn(0.1)])
    shares = train(grower, clock, steps)
    assert max(shares[1:]) <= share
    assert any(event.geometry for event in grower.events)
    assert shares[-1] >= 0.1 * share  # and what there is is used


def test_no_limit_measures_as_soon_as_there_is_suspicion(clock):
    grower = watched(clock, max_overhead=None)
    train(grower, clock, 100)
    assert [event.step for event in grower.events] == [20, 40, 60, 80, 100]
    assert all(GEOMETRY in event.seconds for event in grower.events)


def test_a_share_of_zero_never_measures(clock):
    grower = watched(clock, max_overhead=0)
    train(grower, clock, 2000)
    assert not grower.events


def test_while_it_saves_up_for_the_geometry_no_test_spends_the_savings(clock):
    heard = []
    grower = watched(clock, cost=0.1, max_overhead=0.1, sinks=[heard.append])
    train(grower, clock, 12_000)
    first, second = heard[:2]
    assert not first.geometry
    assert "max_overhead" in first.plan.reason
    assert first.verdict.kind == "stationary"
    assert second.geometry
    assert second.step > 2 * first.step


def test_a_moving_run_is_tested_at_the_pace_of_the_test(clock):
    grower = watched(clock, noise_ratio=0.0, max_overhead=0.01)
    train(grower, clock, 20_000)
    assert not any(event.geometry for event in grower.events)
    cost = grower.watcher.budget.costs[TEST]
    assert set(grower.watcher.budget.costs) == {TEST}
    assert len(grower.events) == pytest.approx(0.01 * 0.1 * 20_000 / cost, rel=0.1)


def test_postponing_is_told_once(clock, caplog):
    grower = watched(clock, max_overhead=0.001)
    with caplog.at_level(logging.WARNING, "splitwatch"):
        train(grower, clock, 400)
    (record,) = caplog.records
    assert "max_overhead=0.001" in record.getMessage()


def test_the_share_is_reported(clock):
    heard = []
    grower = watched(clock, max_overhead=None, sinks=[heard.append])
    train(grower, clock, 40, seconds=5.0)
    event = heard[-1]
    assert event.overhead == pytest.approx(grower.watcher.budget.spent / grower.watcher.budget.training)
    assert event_scalars(event)["splitwatch/overhead"] == event.overhead
    assert f"{event.overhead:.2%} of training time" in event_markdown(event)
    assert f"{event.overhead:.2%} of training time" in str(event)


def test_the_accounts_survive_a_restart_and_the_pause_does_not_count(clock):
    grower = watched(clock, max_overhead=0.01)
    train(grower, clock, 15_000)
    saved = grower.state_dict()
    clock.turn(1e6)
    resumed = watched(clock, max_overhead=0.01)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved
    train(resumed, clock, 1)
    assert resumed.watcher.budget.training == pytest.approx(grower.watcher.budget.training, abs=1.0)
    assert resumed.watcher.budget.costs == grower.watcher.budget.costs


def test_a_run_that_may_grow_measures_at_once_and_growth_is_not_charged(clock):
    grower = watched(clock, cost=1.0, monitor_only=False, max_events=1)
    train(grower, clock, 40)
    (event,) = grower.events
    assert event.grown
    assert event.step == 20
    assert grower.watcher.budget.spent == event.overhead == 0


def test_a_run_that_may_grow_but_does_not_is_held_back_after_its_credit(clock):
    grower = watched(clock, cost=0.5, monitor_only=False, max_neurons=0, max_overhead=0.01)
    train(grower, clock, 10_000)
    largest = max(grower.watcher.budget.costs.values())
    assert len(grower.events) > 1
    assert grower.watcher.budget.spent <= 0.01 * grower.watcher.budget.training + CREDIT + largest


def test_steps_of_30_ms_pay_for_a_measurement_of_200_steps_once_in_20_000(clock):
    grower = watched(clock, cost=0.0, max_overhead=0.01, sinks=[lambda event: event.geometry and clock.turn(6.0)])
    grower.watcher.budget.costs = {TEST: 0.0, GEOMETRY: 6.0}
    train(grower, clock, 45_000, seconds=0.03)
    measured = [event.step for event in grower.events if GEOMETRY in event.seconds]
    assert len(measured) == 2
    assert 15_000 <= measured[1] - measured[0] <= 25_000


def test_while_it_waits_it_looks_once_a_window(clock, monkeypatch):
    grower = watched(clock, max_overhead=1e-6)
    looks, judge = [], grower.watcher.detector.judge
    monkeypatch.setattr(grower.watcher.detector, "judge", lambda: looks.append(grower.steps) or judge())
    train(grower, clock, 100)
    assert looks == [*range(2, 21, 2), 40, 60, 80, 100]
    assert len(grower.watcher.detector.means) == 10


def test_only_the_last_geometry_is_kept_and_sinks_hear_of_all(clock):
    heard = []
    grower = watched(clock, max_overhead=None, sinks=[heard.append])
    train(grower, clock, 100)
    assert all(event.geometry for event in heard)
    assert [bool(event.geometry) for event in grower.events] == [False] * 4 + [True]
    assert any(event.plan for event in heard)
    for old, told in zip(grower.events[:-1], heard[:-1], strict=True):
        assert not old.plan.moves
        assert old.plan.reason == told.plan.reason
        assert (old.step, old.verdict, old.plateaus) == (told.step, told.verdict, told.plateaus)


def test_what_was_carried_out_stays_in_the_record(clock):
    grower = watched(clock, monitor_only=False, max_overhead=None, max_ratio=1.5)
    train(grower, clock, 80)
    assert len(grower.events) > 1
    grown = [event for event in grower.events if event.grown]
    assert len(grown) >= 1
    assert all(event.plan.moves for event in grown)
    assert sum(bool(event.geometry) for event in grower.events) == 1


def test_a_failure_while_measuring_is_paid_for(clock):
    accounts = Budget(0.01, growing=False)
    accounts.enter()
    clock.turn(2.0)
    accounts.leave()
    clock.turn(10.0)
    accounts.enter()
    accounts.leave()
    assert (accounts.spent, accounts.training, accounts.costs) == (2.0, 10.0, {})
