"""What each move of a plan did: against the quadratic expansion where the loss is quadratic, and in sum."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from splitwatch import Grower, GrowthPolicy, Probe, find_hidden_layers, measure_geometry, plan_growth
from splitwatch.growth.grow import widened
from splitwatch.growth.outcomes import PARTS, certified, outcomes
from splitwatch.records import GrowthPlan, Split, Sprout


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def scene(width=3, outputs=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs)).double()
    x, y = torch.randn(48, 3).double(), torch.randn(48, outputs).double()
    probe = Probe([(x[i : i + 12], y[i : i + 12]) for i in range(0, 48, 12)], mse)
    (layer,) = (layer for layer in find_hidden_layers(model, probe) if layer.growable)
    return model, probe, layer


def sprouts(layer, count, outputs=2):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    some = (
        Sprout(layer.name, draw(4), draw(outputs), 0.01, "", (draw(layer.width, 1), draw(1, outputs)), draw(outputs))
        for _ in range(count)
    )
    return GrowthPlan((layer,), tuple(some), "by hand")


def parameters(model, plan, *, offsets=True):
    with widened(model, plan, offsets=offsets):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_of_a_quadratic_loss_each_move_gets_its_own_part():
    """−gᵀδ_i − ½ δ_iᵀHΔ by autograd over all parameters; the output is linear in what sprouts change."""
    model, probe, layer = scene()
    plan = sprouts(layer, 3)
    found = outcomes(model, plan, probe)
    silent = [replace(m, outgoing=0 * m.outgoing, others=None, biases=None) for m in plan.moves]
    base = parameters(model, replace(plan, moves=tuple(silent)))
    deltas = []
    for i, move in enumerate(plan.moves):
        alone = replace(plan, moves=(*silent[:i], move, *silent[i + 1 :]))
        deltas.append({name: p - base[name] for name, p in parameters(model, alone).items()})
    with widened(model, plan):
        x = torch.cat([b[0] for b in probe.held_out])
        y = torch.cat([b[1] for b in probe.held_out])
        leaves = {name: p.clone().requires_grad_() for name, p in base.items()}
        loss = F.mse_loss(functional_call(model, leaves, x), y)
    slope = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    total = [sum(d[name] for d in deltas) for name in leaves]
    along = torch.autograd.grad(sum((g * t).sum() for g, t in zip(slope, total, strict=True)), list(leaves.values()))
    for delta, outcome in zip(deltas, found, strict=True):
        parts = zip(slope, along, leaves, strict=True)
        exact = -sum(float(((g + 0.5 * h).detach() * delta[n]).sum()) for g, h, n in parts)
        assert outcome.realised == pytest.approx(exact, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("count", [1, 2, PARTS, PARTS + 5, 40])
def test_the_parts_sum_to_the_whole_and_are_few(count):
    model, probe, layer = scene(outputs=2)
    plan = sprouts(layer, count)
    before = [p.clone() for p in model.parameters()]
    found = outcomes(model, plan, probe)
    with widened(model, plan):
        after = probe.loss(model, "held_out")
    assert sum(x.realised for x in found) == pytest.approx(probe.loss(model, "held_out") - after, rel=1e-9)
    assert sum(x.predicted for x in found) == pytest.approx(0.01 * count)
    assert sum(x.moves for x in found) == count
    assert len(found) <= PARTS
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert outcomes(model, replace(plan, moves=()), probe) == ()


def test_no_loss_is_spent_on_silent_moves_which_count_as_moves(monkeypatch):
    model, probe, layer = scene()
    plan, losses = sprouts(layer, 14), []
    silent = [replace(move, outgoing=0 * move.outgoing, others=None, predicted_decrease=0.0) for move in plan.moves]
    silent = [replace(move, biases=0 * move.biases) for move in silent]
    loud = outcomes(model, replace(plan, moves=plan.moves[:3]), probe)
    loss = probe.loss
    monkeypatch.setattr(probe, "loss", lambda *args, **named: losses.append(1) or loss(*args, **named))
    found = outcomes(model, replace(plan, moves=(*silent[:6], *plan.moves[:3], *silent[6:])), probe)
    assert len(losses) == 6
    assert [(x.kind, x.moves, x.predicted, x.realised) for x in found[3:]] == [("sprout", 14, 0.0, 0.0)]
    assert [x.realised for x in found[:3]] == [x.realised for x in loud]
    losses.clear()
    assert [x.moves for x in outcomes(model, replace(plan, moves=tuple(silent)), probe)] == [14]
    assert not losses


def test_a_split_is_certified_by_the_held_out_interval_that_it_follows():
    model, probe, _ = scene()
    geometry = measure_geometry(model, probe)
    measured = geometry["0"]
    for low, high, sure in ((-2.0, -1.0, True), (-2.0, 1.0, False)):
        interval = torch.tensor([[low, high]]).expand(3, 2).double()
        known = {"0": replace(measured, escape_interval=interval, interval=interval, max_interval=-interval.flip(1))}
        known["0"] = replace(known["0"], max_interval=interval) if not sure else known["0"]
        for out in (torch.ones(2, 2), torch.zeros(2, 2)):
            move = Split("0", 1, (0.5, 0.5), torch.ones(2, 4), out, 0.1)
            assert certified(move, known) is sure
    assert not certified(Sprout("0", torch.ones(4), torch.ones(2)), geometry)
    assert not certified(Split("1", 1, (0.5, 0.5), torch.ones(2, 4), torch.ones(2, 2), 0.1), geometry)


def test_the_grower_tells_it_with_every_growth():
    torch.manual_seed(0)
    model, probe, _ = scene()
    policy = GrowthPolicy(noise_ratio=1e6, max_neurons=4, max_overhead=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = Grower(model, optimizer, mse, policy, probe=probe, progress=False)
    expected = plan_growth(model, measure_geometry(model, probe, wanted=4), probe, policy)
    grower.observe(probe.fitted[0], 1.0)
    grower.watcher.pending = True
    event = grower.act()
    assert event.grown
    assert sum(x.moves for x in event.outcomes) == len(event.plan.moves) == len(expected.moves)
    assert sum(x.realised for x in event.outcomes) == pytest.approx(event.realised_held_out, rel=1e-9)
    assert all(str(item) in str(event) for item in event.outcomes)
