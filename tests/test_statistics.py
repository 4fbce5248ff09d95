"""BatchNorm statistics after growth: those of the new neurons' own pre-activations, the function as planned."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from zoo import ZOO, mse

from splitwatch import GrowthPlan, Probe, Split, Sprout, find_hidden_layers, grow
from splitwatch.growth.grow import widened


def scene(affine=True, sizes=(9, 6, 4, 7)):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)
    ).double()
    batches = [(torch.randn(n, 2, 6, 6).double() + 0.3, torch.randn(n, 2).double()) for n in sizes]
    for x, _ in batches:
        model(x)
    if affine:
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    probe = Probe(batches, mse)
    (layer,) = (layer for layer in find_hidden_layers(model, probe) if layer.growable)
    u, v = torch.randn(2, 19).double(), torch.randn(2, 32).double()
    u[:, -1] = torch.tensor([0.5, -0.5])
    moves = (
        Split(layer.name, 1, (0.5, 0.5), u - u.mean(0), v - v.mean(0), 0.1),
        Split(layer.name, 2, (0.5, 0.5), 0 * u, v - v.mean(0), 0.1),
        Sprout(layer.name, u[0], v[0], 0.1),
    )
    return model, probe, GrowthPlan((layer,), moves, "by hand")


MOVED, STILL = [1, 4, 6], [0, 2, 3, 5]


@pytest.mark.parametrize("affine", [True, False])
def test_moved_channels_have_statistics_of_their_own_and_the_others_keep_theirs(affine):
    model, probe, plan = scene(affine)
    old = copy.deepcopy(model[1].state_dict())
    with widened(model, plan):
        seen = [model[0](x) for x, _ in probe.half("all")]
    event = grow(model, plan, probe=probe)
    z = torch.cat(seen).detach().movedim(1, 0).flatten(1)
    torch.testing.assert_close(model[1].running_mean[MOVED], z[MOVED].mean(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model[1].running_var[MOVED], z[MOVED].var(1), rtol=1e-12, atol=1e-14)
    for name in ("running_mean", "running_var", *(("weight", "bias") if affine else ())):
        new, kept = model[1].state_dict()[name], old[name]
        assert torch.equal(new[STILL], kept[[0, 2, 3, 2]]), name
    assert model[1].num_batches_tracked == old["num_batches_tracked"]
    assert event.grown


def test_eval_mode_computes_what_was_planned_and_training_mode_the_same():
    model, probe, plan = scene(sizes=(60, 60))
    x = torch.cat([batch[0] for batch in probe.half("all")])
    with widened(model, plan), torch.no_grad():
        planned = model.eval()(x)
        model.train()
    grow(model, plan, probe=probe)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), planned, rtol=1e-10, atol=1e-12)
        model[1].weight.requires_grad_(False)
        hidden = nn.functional.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, training=True)
        expected = model[1](model[0](x))
    n = x[:, 0, :4, :4].numel()
    scale = (n / (n - 1)) ** 0.5  # the batch's own variance is the biased one
    torch.testing.assert_close(
        (hidden - model[1].bias[:, None, None])[:, MOVED] / scale,
        (expected - model[1].bias[:, None, None])[:, MOVED],
        rtol=1e-6,
        atol=1e-6,
    )


def test_a_sprouts_features_are_of_the_size_of_normalised_ones():
    """Whatever scale existing pre-activations have: γ' is their spread against the root mean of running variances."""
    model, probe, plan = scene()
    with torch.no_grad():
        model[0].weight *= 50
        model[1].running_var *= 2500
    usual = model[1].running_var.mean()
    sprout = replace(plan.moves[-1], incoming=50 * plan.moves[-1].incoming)
    grow(model, replace(plan, moves=(sprout,)), probe=probe)
    gamma = float(model[1].weight[-1].detach())
    assert gamma == pytest.approx(float((model[1].running_var[-1] / usual).sqrt()), rel=1e-4)
    assert 0.1 < gamma < 10


@pytest.mark.parametrize("name", ["conv+bn", "residual blocks", "inverted bottleneck"])
def test_the_realised_decrease_is_that_of_the_plan(name):
    model, probe = ZOO[name].make()
    layers = tuple(layer for layer in find_hidden_layers(model, probe) if layer.growable)
    moves = []
    for layer in layers:
        d = sum(p[0].numel() for part in layer.producers for p in model.get_submodule(part).parameters())
        consumers = [model.get_submodule(c.name).weight for c in layer.consumers]
        c = sum(w.shape[0] * w[0, 0].numel() for w in consumers)
        u = 0.3 * torch.randn(2, d).double()
        moves.append(Split(layer.name, 0, (0.5, 0.5), u - u.mean(0), torch.zeros(2, c).double(), 0.0))
    plan = GrowthPlan(layers, tuple(moves), "by hand")
    before = probe.loss(model, "held_out")
    with widened(model, plan):
        after = probe.loss(model, "held_out")
    buffers = [b.clone() for b in model.buffers()]
    event = grow(model, plan, probe=probe)
    assert event.realised_held_out == pytest.approx(before - after, rel=1e-9)
    assert len(buffers) == len(list(model.buffers()))
