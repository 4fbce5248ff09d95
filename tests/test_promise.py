"""Promises of new neurons: slopes against finite differences of the held-out loss, errors by hand, who keeps silent."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from test_growth import growable
from torch import nn
from zoo import SINGLY, ZOO, mse

from splitwatch import GrowthPolicy, Probe, plan_growth
from splitwatch.growth.grow import widened
from splitwatch.growth.mixture import holds_sprouts
from splitwatch.growth.promise import FALSE, Promise, _discovered, apart, promises
from splitwatch.growth.search import scale
from splitwatch.ranks import mean_with_error
from splitwatch.records import Consumer, GrowthPlan, HiddenLayer, Sprout


def ragged(probe):
    """The same samples with a held-out half of two unlike batches."""
    ((x, y),) = probe.held_out[:1]
    probe.held_out = ((x[:2], y[:2]), (x[2:], y[2:]))
    return probe


def random_sprout(model, layer, probe, seed):
    """A neuron with random weights everywhere that a sprout may change."""
    generator = torch.Generator().manual_seed(seed)
    trace = next(iter(probe.traces(model, [layer], "fitted")))[layer.name]
    maps = list(zip(layer.consumers, trace.consumers, strict=True))
    d = sum(p.weight_shape[1:].numel() + p.has_bias for p in trace.producers)
    c = sum(where.stride * m.weight_shape[0] * m.weight_shape[2:].numel() for where, m in maps)
    biases = sum(m.weight_shape[0] for _, m in maps if m.has_bias)
    w, v, left, right, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (d, c, (layer.width, 2), (2, c), biases)
    )
    return Sprout(layer.name, w, v, 1.0, "", (left, right), b)


@pytest.mark.parametrize("name", SINGLY)
def test_a_promise_is_the_slope_of_the_held_out_loss(name):
    model, probe = ZOO[name].make(samples=10)
    probe = ragged(probe)
    for layer in filter(holds_sprouts, growable(model, probe)):
        moves = [random_sprout(model, layer, probe, seed) for seed in (0, 1)]
        for one, move in zip(promises(model, [layer], moves, probe), moves, strict=True):

            def loss(step, move=move, layer=layer):
                with widened(model, GrowthPlan((layer,), (scale(move, step),), "")):
                    return probe.loss(model, "held_out")

            h = 1e-5
            assert one.slope == pytest.approx((loss(h) - loss(-h)) / (2 * h), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", SINGLY)
def test_promises_are_the_same_for_all_layers_at_once(name):
    model, probe = ZOO[name].make(samples=10)
    layers = list(filter(holds_sprouts, growable(model, probe)))
    moves = [random_sprout(model, layer, probe, seed) for layer in layers for seed in (0, 1)]
    together = promises(model, layers, moves, probe)
    assert [one.sprout for one in together] == moves
    for layer in layers:
        mine = [move for move in moves if move.layer == layer.name]
        for alone in promises(model, [layer], mine, probe):
            one = next(one for one in together if one.sprout is alone.sprout)
            assert one.slope == pytest.approx(alone.slope, rel=1e-9)
            assert one.error == pytest.approx(alone.error, rel=1e-9, nan_ok=True)


def test_layers_that_share_a_module_are_not_asked_together():
    chain = [HiddenLayer(str(i), 4, (str(i),), (Consumer(str(i + 1), 0, 1),)) for i in range(5)]
    beside = HiddenLayer("5", 4, ("5",), (Consumer("6", 0, 1),))
    named = [[layer.name for layer in group] for group in apart([*chain, beside])]
    assert named == [["0", "2", "4"], ["1", "3", "5"]]


def test_the_error_is_that_of_the_parts_by_their_samples():
    values, weights = torch.tensor([[1.0], [2.0], [6.0]]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    mean, error = mean_with_error(values, weights)
    assert float(mean) == 3.75
    assert float(error) ** 2 == pytest.approx((0.25 * 2.75**2 + 0.25 * 1.75**2 + 0.5 * 2.25**2) / 2)
    assert mean_with_error(values[:1], torch.ones(1).double())[1].isnan().all()


def test_errors_cover_fresh_data():
    """Of slopes on many probes of one population, few lie farther from its slope than two standard errors."""
    torch.manual_seed(0)
    model, population = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.randn(2**14, 4)
    x, y = population[:, :3].double(), population[:, 3:].double()
    whole = Probe([(x[:4], y[:4]), (x, y)], mse)
    (layer,) = growable(model, whole)
    move = random_sprout(model, layer, whole, 3)
    truth, far = promises(model, [layer], [move], whole)[0].slope, 0
    for rows in torch.randperm(2**14, generator=torch.Generator().manual_seed(1)).split(64)[:100]:
        one = promises(model, [layer], [move], Probe([(x[:4], y[:4]), (x[rows], y[rows])], mse))[0]
        far += abs(one.slope - truth) > 2 * one.error
    assert 0.01 < far / 100 < 0.18  # Student's t with 7 degrees of freedom: 0.086


def test_unkept_promises_leave_a_silent_neuron():
    move = Sprout("0", torch.ones(2), torch.ones(1), 0.5, "", (torch.ones(3, 1), torch.ones(1, 1)), torch.ones(1))
    kept, broken = Promise(move, -1.0, 0.1, True), Promise(move, -1.0, 0.9, False)
    assert kept.at(0.5).predicted_decrease == 0.5 - 0.25 * 0.5
    assert torch.equal(kept.at(0.5).outgoing, torch.full((1,), 0.5))
    assert kept.scaled(2.0).at(0.25).predicted_decrease == 0.25 * 2.0 - 0.25**2 * 1.0
    silent = broken.at(1.0)
    assert silent.predicted_decrease == 0
    assert "silent" in silent.reason
    assert not silent.outgoing.any() and silent.others is None and silent.biases is None
    assert torch.equal(silent.incoming, move.incoming)


def test_few_of_those_discovered_are_chance():
    """Of 80 slopes that are noise and 20 that are not, the false share among the chosen is held in the mean."""
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(200):
        t = stats.t.ppf(torch.rand(100, generator=generator, dtype=torch.float64).numpy(), 7)
        t[:20] -= 6
        chosen = _discovered(stats.t.cdf(t, 7).tolist())
        shares.append(sum(chosen[20:]) / max(sum(chosen), 1))
        assert sum(chosen[:20]) > 5
    assert sum(shares) / 200 < 1.2 * FALSE
    assert not any(_discovered([1.0, float("nan"), 0.5]))
    assert _discovered([]) == []


def test_noise_is_given_no_outgoing_weights():
    """Targets that have nothing to do with the inputs: neurons come as scheduled, almost all of them silent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    batches = [(torch.randn(64, 4).double(), torch.randn(64, 1).double()) for _ in range(8)]
    plan = plan_growth(model, {}, Probe(batches, mse), GrowthPolicy(moves="even", max_ratio=4.0))
    silent = [move for move in plan.moves if not move.outgoing.any()]
    assert len(plan.moves) == 18
    assert len(silent) == 18
    assert all(replace(move, reason="").predicted_decrease == 0 for move in silent)
