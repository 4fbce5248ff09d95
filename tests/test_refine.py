"""Finite splits beside new neurons: directions against a dense Hessian, decreases against the loss, when none."""

from dataclasses import replace

import pytest
import torch
from test_growth import growable
from torch import nn
from zoo import ZOO, mse

from splitwatch import GrowthPolicy, Probe, plan_growth
from splitwatch.growth.grow import grow, widened
from splitwatch.growth.refine import REACHES, halves, refined
from splitwatch.growth.search import stretch
from splitwatch.records import GrowthPlan, Split, Sprout

ROOM = 2**30


def tanh(width=6, n=200):
    """A trained layer and a probe of two batches a half."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()
    x = torch.randn(4 * n, 3, dtype=torch.float64)
    y = torch.stack([x[:, 0] + 0.3 * x[:, 1] ** 2, x[:, 1] * x[:, 2]], dim=1).tanh()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        mse(model, (x, y)).backward()
        optimizer.step()
    return model, Probe(list(zip(x.split(n), y.split(n), strict=True)), mse)


def dense_lowest(model, probe):
    """Lowest eigenpairs of every neuron's inner Hessian, from autograd in the neuron's weights with e frozen."""
    first, last = model[0], model[2]
    x, y = (torch.cat(parts) for parts in zip(*probe.fitted, strict=True))
    e = 2 * (model(x) - y).detach() / y.numel()
    values, vectors = [], []
    for r in range(first.out_features):

        def through(w, r=r):
            return ((e @ last.weight[:, r].detach()) * torch.tanh(x @ w[:3] + w[3])).sum()

        w = torch.cat([first.weight[r], first.bias[r : r + 1]]).detach()
        value, vector = torch.linalg.eigh(torch.autograd.functional.hessian(through, w))
        values.append(value[0])
        vectors.append(vector[:, 0])
    return torch.stack(values), torch.stack(vectors)


def test_directions_and_decreases_are_those_of_a_dense_inner_hessian():
    model, probe = tanh()
    values, vectors = dense_lowest(model, probe)
    splits = halves(model, {growable(model, probe)[0]: 6}, probe, ROOM)
    assert [move.neuron for move in splits] == sorted(
        (values < 0).nonzero().flatten().tolist(), key=lambda r: -splits_gain(model, values, r)
    )
    for move in splits:
        w = torch.cat([model[0].weight[move.neuron], model[0].bias[[move.neuron]]]).detach()
        u = move.in_offset[0] / w.norm()
        assert torch.equal(move.in_offset[1], -move.in_offset[0])
        assert abs(float(u @ vectors[move.neuron])) > 0.98  # solved for to 10 %
        assert move.predicted_decrease == pytest.approx(splits_gain(model, values, move.neuron), rel=0.02)


def splits_gain(model, values, r):
    w = torch.cat([model[0].weight[r], model[0].bias[r : r + 1]])
    return float(-0.5 * values[r] * w.detach().square().sum())


def test_the_decrease_is_second_order_where_copies_part_a_little():
    model, probe = tanh()
    layers = growable(model, probe)
    for move in halves(model, {layers[0]: 6}, probe, ROOM):
        plan, before = GrowthPlan(layers, (stretch(move, 2.0**-6),), ""), probe.loss(model, "fitted")
        with widened(model, plan):
            assert before - probe.loss(model, "fitted") == pytest.approx(2.0**-12 * move.predicted_decrease, rel=0.05)


def test_what_they_bring_together_is_measured_on_the_held_out_half():
    model, probe = tanh()
    layers = growable(model, probe)
    plan = refined(model, GrowthPlan(layers, (), ""), halves(model, {layers[0]: 6}, probe, ROOM), probe)
    assert plan.offset in REACHES
    before = probe.loss(model, "held_out")
    with widened(model, plan):
        gain = before - probe.loss(model, "held_out")
    assert sum(move.predicted_decrease for move in plan.moves) == pytest.approx(gain)
    assert plan.held_out_decrease == pytest.approx(gain)
    for reach in REACHES:
        other = replace(plan, moves=tuple(stretch(move, reach / plan.offset) for move in plan.moves))
        with widened(model, other):
            assert probe.loss(model, "held_out") >= before - gain


def test_none_where_the_held_out_half_does_not_agree():
    model, probe = tanh()
    layers, empty = growable(model, probe), GrowthPlan(growable(model, probe), (), "")
    splits = halves(model, {layers[0]: 6}, probe, ROOM)
    probe.held_out = tuple((x, model(x).detach()) for x, _ in probe.held_out)  # no decrease is possible
    assert refined(model, empty, splits, probe) is empty
    assert refined(model, empty, [], probe) is empty


def test_none_next_to_activations_without_curvature():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(4, 50, 3, dtype=torch.float64)
    probe = Probe([(part, part[:, :2].sin()) for part in x], mse)
    assert halves(model, {growable(model, probe)[0]: 6}, probe, ROOM) == []


@pytest.mark.parametrize("name", ["mlp", "conv+bn", "gated"])
def test_every_kind_of_layer_is_split_where_it_curves_down(name):
    model, probe = ZOO[name].make()
    for layer in growable(model, probe):
        for move in halves(model, {layer: layer.width}, probe, ROOM):
            plan, before = GrowthPlan((layer,), (stretch(move, 2.0**-7),), ""), probe.loss(model, "fitted")
            with widened(model, plan):
                assert probe.loss(model, "fitted") < before


def test_even_gives_them_half_of_the_places_without_a_confirmed_neuron():
    model, probe = tanh()
    plan = plan_growth(model, {}, probe, GrowthPolicy(moves="even", max_ratio=3.0))
    splits = [move for move in plan.moves if isinstance(move, Split)]
    confirmed = [move for move in plan.moves if isinstance(move, Sprout) and move.outgoing.abs().max() > 0]
    assert len(plan.moves) == 12
    assert len(splits) == len(halves(model, {plan.layers[0]: (12 - len(confirmed)) // 2}, probe, ROOM)) > 0
    event = grow(model, plan, probe=probe)
    assert event.widths == {"0": (6, 18)}
    assert event.realised_held_out == pytest.approx(plan.held_out_decrease)  # of splits and new neurons together
