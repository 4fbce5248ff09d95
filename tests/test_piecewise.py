"""One-sided derivatives of ReLU-like layers against finite steps of the loss, kinks on data points included."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinked import ACTIVATIONS, D, M, N, data, derivative, growable, mse, network, probe_of, single
from torch import nn

from splitwatch.geometry.dense import coupling
from splitwatch.geometry.escape import directional_stationarity, escape_neurons, one_sided_derivatives
from splitwatch.probe import Probe
from splitwatch.records import SplitWatchError, UnsupportedLayerError


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.slow), True])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), kinks=st.tuples(*[st.integers(0, 7)] * M))
def test_one_sided_derivatives_are_those_of_the_loss(activation, bias, seed, kinks):
    model = network(activation, bias=bias, seed=seed)
    probe = probe_of(model, data(model, kinks))
    layer = growable(model, probe)
    d = D + bias
    directions = torch.nn.functional.normalize(torch.randn(M, 6, d, dtype=torch.float64), dim=-1)
    values = one_sided_derivatives(model, layer, probe, directions)
    for r in range(M):
        for q in range(6):
            expected = derivative(model, probe, single(r, directions[r, q]))
            assert float(values[r, q]) == pytest.approx(expected, abs=1e-9)
    found = directional_stationarity(model, layer, probe)
    assert tuple(found.kinks.tolist()) == kinks
    assert found.kind == "not_stationary"
    assert_bounds(found, model, layer, probe, d)


def assert_bounds(found, model, layer, probe, d):
    """The upper bound is attained, no direction that a search finds beats the lower one, and mostly they meet."""
    lower, upper = found.derivative.T
    assert bool((lower <= upper + 1e-12).all())
    attained = one_sided_derivatives(model, layer, probe, found.direction[:, None])[:, 0]
    torch.testing.assert_close(attained.clamp(max=0), upper, rtol=0, atol=1e-12)
    u = torch.nn.functional.normalize(torch.randn(M, 400, d, dtype=torch.float64), dim=-1)
    values = one_sided_derivatives(model, layer, probe, u)
    for width in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003):  # a search around the best direction so far
        best = u[torch.arange(M), values.argmin(1)][:, None]
        u = torch.nn.functional.normalize(torch.cat([best, best + width * torch.randn_like(u)], 1), dim=-1)
        values = one_sided_derivatives(model, layer, probe, u)
    assert bool((values.amin(1) >= lower - 1e-12).all())
    assert bool((upper - lower <= 1e-9)[found.kinks <= 6].all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_off_the_kinks_the_coupling_is_the_smooth_one(activation):
    model = network(activation, bias=True)
    probe = probe_of(model, data(model, (0, 0, 0)))
    layer = growable(model, probe)
    for half in ("fitted", "held_out", "all"):
        found = directional_stationarity(model, layer, probe, half=half)
        dense = coupling(model, layer, probe, half=half)
        torch.testing.assert_close(found.coupling, dense, rtol=1e-12, atol=1e-15)
        steepest = torch.einsum("mc,mcd->md", model[2].weight.detach().T, dense).norm(dim=1)
        torch.testing.assert_close(found.derivative, -steepest[:, None].expand(M, 2), rtol=1e-12, atol=1e-15)


class TwoReaders(nn.Module):
    """Sequences, a layer that reaches two consumers at different scales and places."""

    def __init__(self):
        super().__init__()
        self.a, self.first, self.second = nn.Linear(3, 4), nn.Linear(7, 2), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.first(torch.cat([x, h], -1)) + self.second(0.5 * h)


def test_sequences_and_several_consumers():
    torch.manual_seed(0)
    model = TwoReaders().double()
    x, y = torch.randn(12, 5, 3, dtype=torch.float64), torch.randn(12, 5, 2, dtype=torch.float64)
    probe = Probe([(x[:5], y[:5]), (x[5:], y[5:])], mse)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = directional_stationarity(model, "a", probe)
    layer = growable(model, probe)
    torch.testing.assert_close(found.coupling, coupling(model, layer, probe), rtol=1e-12, atol=1e-15)
    directions = torch.randn(4, 1, 4, dtype=torch.float64)
    values = one_sided_derivatives(model, layer, probe, directions)[:, 0]
    for r in range(4):
        losses = []
        for step in (1e-6, -1e-6):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.a.weight[r] += step * directions[r, 0, :3]
                other.a.bias[r] += step * directions[r, 0, 3]
            losses.append(probe.loss(other, "all"))
        assert float(values[r]) == pytest.approx((losses[0] - losses[1]) / 2e-6, abs=1e-8)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_neither_many_kinks_nor_zero_weights_are_guessed_at():
    """w = 0 puts every data point on the kink: whatever is said is consistent with the sampled derivatives."""
    for seed in range(6):
        model = network("relu", 1, seed=seed)
        x = data(model, (0, 0, 0))
        with torch.no_grad():
            model[0].weight[0] = 0
        probe = probe_of(model, x)
        found = directional_stationarity(model, "0", probe, neurons=[0])
        assert found.kinks.tolist() == [N]
        u = torch.nn.functional.normalize(torch.randn(M, 20000, D, dtype=torch.float64), dim=-1)
        lowest = float(one_sided_derivatives(model, "0", probe, u)[0].min())
        lower, upper = found.derivative[0].tolist()
        assert lower <= lowest and (upper >= 0 or found.kind == "not_stationary")
        if lowest < -1e-6:
            assert found.kind != "stationary"


@pytest.mark.parametrize(
    "activation", [nn.GELU, nn.Tanh, nn.ReLU6, nn.Softplus, nn.Hardswish, lambda: nn.Hardshrink(0.2)]
)
def test_other_activations_are_refused(activation):
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2)).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    with pytest.raises(UnsupportedLayerError, match="one kink at zero"):
        escape_neurons(model, "0", Probe([(x, y)], mse))


def test_other_layers_are_refused():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)).double()
    x, y = torch.randn(10, 2, 5, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    with pytest.raises(UnsupportedLayerError, match="Linear → path → Linear"):
        directional_stationarity(model, "0", Probe([(x, y)], mse))
    mlp = network()
    with pytest.raises(SplitWatchError, match="0 to 2"):
        escape_neurons(mlp, "0", probe_of(mlp, data(mlp, (0, 0, 0))), neurons=[3])
