"""Verdicts on escape neurons against the loss itself: samples nearby, explicit descents, and dense Hessians."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from kinked import ACTIVATIONS, D, M, N, growable, lowest_nearby, moved, mse, single, stationary
from torch import nn

from splitwatch.geometry.escape import escape_neurons
from splitwatch.growth.embedding import critical_embedding
from splitwatch.probe import Probe


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kinks", [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 0, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_scalar_output_without_escape_neuron_is_a_minimum(activation, kinks, seed):
    model, probe = stationary(activation, 1, kinks, seed)
    layer = growable(model, probe)
    found = escape_neurons(model, layer, probe)
    assert found.stationarity.kind == "stationary" and tuple(found.stationarity.kinks.tolist()) == kinks
    assert found.kind == "minimum" and set(found.verdicts) == {"none"}
    assert "Wu, Simsek & Ged" in str(found)
    assert lowest_nearby(model, probe) >= -1e-14
    for coefficients in ((0.3, 0.7), (1.5, -0.5)):  # no kink: every split keeps it a minimum
        if not any(kinks):
            wide = critical_embedding(model, layer, 0, coefficients)
            assert escape_neurons(wide, growable(wide, probe), probe).kind == "minimum"


@pytest.mark.parametrize("kinks", [(1, 0, 0), (0, 1, 0)])
def test_a_copy_of_negative_weight_descends_at_a_kink(kinks):
    """Copy j has γ_j times its original's one-sided derivatives, positive ones included."""
    model, probe = stationary("relu", 1, kinks, seed=1)
    layer, r = growable(model, probe), kinks.index(1)
    for coefficients, kind in (((0.3, 0.7), "minimum"), ((1.5, -0.5), "not_stationary")):
        wide = critical_embedding(model, layer, r, coefficients)
        assert escape_neurons(wide, growable(wide, probe), probe).kind == kind


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("kinks", [(0, 0, 0), (2, 0, 0), (0, 1, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_an_escape_neuron_without_outgoing_weights_descends(activation, outputs, kinks, seed):
    model, probe = stationary(activation, outputs, kinks, seed, silent=True)
    found = escape_neurons(model, growable(model, probe), probe)
    assert found.kind == "not_minimum" and found.verdicts[0] == "escape"
    u, j = found.direction[0], int(found.output[0])
    assert abs(float(u @ model[0].weight[0].detach())) < 1e-12 and float(u.norm()) == pytest.approx(1)
    drops = []
    for sign in (1, -1):
        outgoing = torch.zeros(M, outputs, dtype=torch.float64)
        outgoing[0, j] = sign * 1e-7
        change = probe.loss(moved(model, single(0, 1e-2 * u), outgoing), "all") - probe.loss(model, "all")
        drops.append(change)
    assert min(drops) < 0 and min(drops) == pytest.approx(-max(drops), rel=0.1)
    assert -min(drops) <= 1.01e-9 * float(found.strength[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kinks", [(0, 0, 0), (1, 0, 0), (1, 1, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_several_outputs_every_split_of_an_escape_neuron_descends(activation, kinks, seed):
    model, probe = stationary(activation, 2, kinks, seed)
    layer = growable(model, probe)
    found = escape_neurons(model, layer, probe)
    assert found.kind == "splits_escape" and "strict saddle" in found.reason
    for r in found.splits.nonzero().flatten().tolist():
        for coefficients in ((0.5, 0.5), (0.2, 0.8), (1.6, -0.6)):
            assert lowest_after_split(model, probe, layer, r, coefficients, found.direction[r]) < 0


def lowest_after_split(model, probe, layer, r, coefficients, u):
    """Copies move by λ₂ s u and −λ₁ s u and exchange outgoing weight η: the loss changes by 2ηs·d(u) + O(s² η²)."""
    x = torch.cat([b[0] for b in probe.half("all")])
    z = model[0](x).detach()[:, r]
    kinks = x[z.abs() < 1e-9]
    basis = torch.linalg.svd(torch.cat([kinks, torch.zeros(1, D, dtype=x.dtype)])).Vh[len(kinks) :].T
    u = basis @ (basis.T @ u)
    wide, changes = critical_embedding(model, layer, r, coefficients), []
    for j in range(2):
        for sign in (1, -1):
            other = copy.deepcopy(wide)
            with torch.no_grad():
                other[0].weight[r] += coefficients[1] * 3e-3 * u
                other[0].weight[M] -= coefficients[0] * 3e-3 * u
                other[2].weight[j, r] += sign * 3e-3
                other[2].weight[j, M] -= sign * 3e-3
            changes.append(probe.loss(other, "all") - probe.loss(wide, "all"))
    return min(changes)


@pytest.mark.parametrize("seed", range(4))
def test_off_the_kinks_the_dense_hessian_of_a_split_agrees(seed):
    model, probe = stationary("leaky", 2, (0, 0, 0), seed)
    layer = growable(model, probe)
    found = escape_neurons(model, layer, probe)
    for r in range(M):
        wide = critical_embedding(model, layer, r, (0.5, 0.5))
        parameters = {k: p.detach() for k, p in wide.named_parameters()}
        flat = torch.cat([p.flatten() for p in parameters.values()])
        x, y = (torch.cat(parts) for parts in zip(*probe.half("all"), strict=True))

        def loss(vector, wide=wide, parameters=parameters, x=x, y=y):
            parts = vector.split([p.numel() for p in parameters.values()])
            shaped = {k: part.reshape(p.shape) for (k, p), part in zip(parameters.items(), parts, strict=True)}
            return nn.functional.mse_loss(torch.func.functional_call(wide, shaped, x), y)

        lowest = float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[0])
        assert bool(found.splits[r]) == (lowest < -1e-9) == (found.verdicts[r] == "escape")
        if found.verdicts[r] == "escape":
            assert lowest <= -float(found.strength[r]) / math.sqrt(2) * 0.05


def test_dead_neurons_are_no_escape_neurons():
    model, probe = stationary("relu", 1, (0, 0, 0), seed=2)
    dead = copy.deepcopy(model)
    x = torch.cat([b[0] for b in probe.half("all")])
    x = torch.cat([x, torch.ones(N, 1, dtype=x.dtype)], 1)
    wide = nn.Sequential(nn.Linear(D + 1, M + 1, bias=False), nn.ReLU(), nn.Linear(M + 1, 1, bias=False)).double()
    with torch.no_grad():
        wide[0].weight.zero_()
        wide[0].weight[:M, :D] = dead[0].weight
        wide[0].weight[M, D] = -1.0
        wide[2].weight[:, :M] = dead[2].weight
    y = torch.cat([b[1] for b in probe.half("all")])
    found = escape_neurons(wide, "0", Probe([(x[:10], y[:10]), (x[10:], y[10:])], mse), neurons=[M])
    assert found.kind == "minimum" and found.neurons == (M,) and found.verdicts == ("none",)
