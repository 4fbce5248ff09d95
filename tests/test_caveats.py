"""Every caveat names its effect and its size, and only where it applies."""

import pytest
import torch
from torch import nn

from splitwatch import Grower, GrowthPolicy, Probe, measure_geometry, plan_growth
from splitwatch.geometry.caveats import caveats
from splitwatch.geometry.penalty import weight_decay_effect
from splitwatch.growth.optimizer import coupled_weight_decay
from splitwatch.layers import find_hidden_layers


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def measured(*between, samples=400):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(samples, 3)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
    probe = Probe([(x[::2], y[::2]), (x[1::2], y[1::2])], mse)
    layers = [layer for layer in find_hidden_layers(model, probe) if layer.growable]
    return model, probe, layers, measure_geometry(model, probe, layers)


def test_a_random_network_is_not_stationary_and_the_share_is_stated():
    model, probe, layers, geometry = measured()
    words = " ".join(caveats(model, probe, layers, geometry))
    item = geometry["0"]
    share = (item.stationarity_residual / (item.stationarity_residual + item.coupling_norm)).median()
    assert f"{float(share):.0%} of the coupling is gradient" in words
    assert "BatchNorm" not in words
    assert "dropout" not in words
    assert "weight decay" not in words


def test_a_tiny_probe_is_named_with_its_size():
    model, probe, layers, geometry = measured(samples=8)
    assert "8 samples" in " ".join(caveats(model, probe, layers, geometry))


def test_batch_norm_and_dropout_are_named():
    words = " ".join(caveats(*measured(nn.BatchNorm1d(4), nn.Dropout(0.3))))
    assert "BatchNorm" in words
    assert "0.3" in words


def test_weight_decay_is_quantified_for_the_planned_split():
    model, probe, layers, geometry = measured()
    move = plan_growth(model, geometry, probe, GrowthPolicy(max_neurons=1, moves="splits")).moves[0]
    effect = weight_decay_effect(model, layers[0], move.neuron, move.coefficients, weight_decay_in=0.01)
    assert effect.reason in " ".join(caveats(model, probe, layers, geometry, move, 0.01))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.02), 0.02),
        (lambda p: torch.optim.Adam(p, weight_decay=0.03), 0.03),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.04), 0.0),
        (lambda p: torch.optim.NAdam(p, weight_decay=0.05, decoupled_weight_decay=True), 0.0),
        (lambda p: torch.optim.SGD(p, 0.1), 0.0),
    ],
)
def test_only_decay_in_the_gradient_counts(make, expected):
    assert coupled_weight_decay([make(nn.Linear(2, 2).parameters())]) == expected


def test_an_event_carries_its_caveats():
    model, probe, _, _ = measured(nn.Dropout(0.25))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.01)
    policy = GrowthPolicy(window=10, noise_ratio=1e6, max_overhead=None)
    grower = Grower(model, optimizer, mse, policy, monitor_only=True, probe=probe, progress=False)
    for _ in range(20):
        grower.step(probe.fitted[0], 1.0)
    event = grower.events[0]
    assert any("dropout" in item for item in event.caveats)
    assert "weight decay 0.01" in str(event)
