"""What growth consists of under each policy, against dense Hessians, brute search and counts by hand."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_growth import dense_hessian, growable, inner_spectra, mse, scalar_net
from test_growth import split as split_at_zero
from test_pursuit import deep, settled
from torch import nn
from zoo import ZOO, in_turn

from splitwatch import (
    Grower,
    GrowthPolicy,
    Probe,
    Split,
    SplitWatchError,
    Sprout,
    count_flops,
    grow,
    measure_geometry,
    plan_growth,
)
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth import candidates, cost, even, pursuit, search
from splitwatch.growth.candidates import ASCENT
from splitwatch.growth.cost import duplicate, prices
from splitwatch.growth.even import SILENT, _counts, _splits
from splitwatch.growth.grow import count_parameters, widened
from splitwatch.growth.plan import split_candidates
from splitwatch.growth.policy import MOVES
from splitwatch.growth.seedbed import Seedbed
from splitwatch.report.page import event_markdown
from splitwatch.report.scalars import event_scalars

torch.set_num_threads(1)


def repeated(batch, times=16):
    """A probe of the same samples many times over: what is a minimum on all is one on both halves."""
    many = tuple(part.repeat(times, 1) for part in batch)
    return Probe([many, many], mse)


def definite_minimum(sign, activation=nn.Softplus):
    """A strict minimum of a network of one neuron and one output, its inner Hessian definite of a given sign.

    The residuals are ± σ'' |x|² as far as that is orthogonal to all slopes of the output, which drives the trace of
    S = E[(v·e) σ'' x xᵀ] to that sign, and small, so that the Gauss-Newton part makes the point a strict minimum.
    """
    for seed in range(100):
        model = scalar_net(1, activation, seed)
        x = torch.randn(20, 2, dtype=torch.float64)
        with torch.no_grad():
            model[0].weight *= 2
            model[2].weight.fill_(0.58)  # of whose products with 1/v² rounding leaves something
        a = (x @ model[0].weight[0].detach()).requires_grad_()
        value = activation()(a)
        (slope,) = torch.autograd.grad(value.sum(), a, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), a)
        slopes = torch.cat([value[:, None], slope[:, None] * x], dim=1).detach()
        aim = (bend * x.square().sum(1))[:, None]
        residual = aim - slopes @ torch.linalg.lstsq(slopes, aim).solution
        batch = x, model(x).detach() - 0.3 * sign * residual / residual.norm()
        if float((sign * inner_spectra(model, batch)).min()) > 2e-3 and float(spectrum(model, batch)[0]) > 1e-3:
            assert float(dense_hessian(model, batch)[1].norm()) <= 1e-14
            return model, batch
    raise AssertionError("no such minimum among these seeds")


def spectrum(model, batch):
    return torch.linalg.eigvalsh(dense_hessian(model, batch)[0])


def lowest_nearby(model, probe, coefficients, tries=200):
    """Brute search: the lowest loss among random small moves of all weights of the network split at one point."""
    wide = split_at_zero(model, probe, 0, coefficients)
    start = nn.utils.parameters_to_vector(wide.parameters()).detach()
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(tries):
        step = torch.randn(len(start), dtype=torch.float64, generator=generator)
        nn.utils.vector_to_parameters(start + 1e-2 * step / step.norm(), wide.parameters())
        losses.append(probe.loss(wide, "fitted"))
    return min(losses)


# --- certified -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
def test_certified_leaves_a_minimum_that_positive_splits_cannot(activation):
    model, batch = definite_minimum(1, activation)
    probe = repeated(batch)
    geometry, before = measure_geometry(model, probe), probe.loss(model)
    for positive in ((0.5, 0.5), (0.2, 0.3, 0.5), (0.9, 0.1)):
        values = spectrum(split_at_zero(model, probe, 0, positive), batch)
        assert float(values[0]) >= -1e-10 * float(values[-1])
        assert lowest_nearby(model, probe, positive) >= before - 1e-14
    equal = GrowthPolicy(moves="certified", coefficients="equal", max_ratio=None)
    assert not plan_growth(model, geometry, probe, equal)

    plan = plan_growth(model, geometry, probe, GrowthPolicy(moves="certified", max_ratio=None))
    (move,) = plan.moves
    assert min(move.coefficients) < 0
    assert "strict_saddle" in move.reason
    values = spectrum(split_at_zero(model, probe, 0, move.coefficients), batch)
    assert float(values[0]) < -1e-4 * float(values[-1])
    event = grow(model, plan, probe=probe)
    assert event.drift <= 1e-12
    assert probe.loss(model) < before


def test_certified_leaves_a_minimum_with_a_negative_definite_inner_hessian():
    model, batch = definite_minimum(-1)
    probe = repeated(batch)
    geometry, before = measure_geometry(model, probe), probe.loss(model)
    values = spectrum(split_at_zero(model, probe, 0, (2.0, -1.0)), batch)
    assert float(values[0]) >= -1e-10 * float(values[-1])
    signed = GrowthPolicy(moves="certified", coefficients="signed", max_ratio=None)
    assert not plan_growth(model, geometry, probe, signed)
    plan = plan_growth(model, geometry, probe, GrowthPolicy(moves="certified", max_ratio=None))
    assert [move.coefficients for move in plan.moves] == [(0.5, 0.5)]
    values = spectrum(split_at_zero(model, probe, 0, (0.5, 0.5)), batch)
    assert float(values[0]) < -1e-4 * float(values[-1])
    assert grow(model, plan, probe=probe).drift <= 1e-12
    assert probe.loss(model) < before


def test_what_descends_without_being_certified_is_told():
    """Equal copies would descend, signed ones would not: the reason is about the former."""
    model, batch = definite_minimum(-1)
    probe = repeated(batch)
    measured = measure_geometry(model, probe)["0"]
    wide = {name: torch.tensor([[-9.0, 9.0]]).double() for name in ("interval", "max_interval", "escape_interval")}
    policy = GrowthPolicy(moves="certified", max_ratio=None)
    plan = plan_growth(model, {"0": replace(measured, **wide)}, probe, policy)
    assert "growth would not be certified here: 1 of 1 neurons descend on the fitted half" in plan.reason


@pytest.mark.parametrize("outputs", [1, 2])
def test_chance_is_certified_as_seldom_as_promised(outputs):
    """Where targets are outputs plus noise, S and G are zero but for sampling: nothing there is to be certified."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, outputs)).double()
    x = torch.randn(4000, 4, dtype=torch.float64)
    y = model(x).detach() + torch.randn(4000, outputs, dtype=torch.float64)
    probe = Probe([(x[:2000], y[:2000]), (x[2000:], y[2000:])], mse)
    geometry, layers = measure_geometry(model, probe), growable(model, probe)
    shares = {}
    for moves in ("splits", "certified"):
        policy = GrowthPolicy(moves=moves, coefficients="equal")
        found = split_candidates(model, layers, geometry, policy)
        shares[moves] = sum(item.confirmed for item in found) / len(found)
    print(shares)
    assert shares["splits"] > 0.2
    assert shares["certified"] <= 0.15  # neurons share samples, and either of two directions may be certified by chance


@pytest.mark.parametrize("name", ZOO)
def test_certified_moves_descend_beyond_their_errors(name):
    model, probe = ZOO[name].make(samples=24)
    geometry, layers = measure_geometry(model, probe), growable(model, probe)
    plan = plan_growth(model, geometry, probe, GrowthPolicy(moves="certified"))
    assert all(isinstance(move, Split) and "strict_saddle" in move.reason for move in plan.moves)
    sure = split_candidates(model, layers, geometry, GrowthPolicy(moves="certified"))
    likely = split_candidates(model, layers, geometry, GrowthPolicy(moves="splits", coefficients="equal"))
    certain = {(item.move.layer, item.move.neuron) for item in sure if item.confirmed}
    if all(item.move.coefficients == (0.5, 0.5) for item in sure):
        assert certain <= {(item.move.layer, item.move.neuron) for item in likely if item.confirmed}
    for item in sure:
        found, r, parts = geometry[item.move.layer], item.move.neuron, item.move.out_offset.abs().max() > 0
        if item.confirmed and parts:
            assert found.escape_interval[r, 1] < 0
            assert found.escape_eigenvalue[r] + found.escape_residual[r] < 0
        elif item.confirmed and min(item.move.coefficients) > 0:
            assert found.interval[r, 1] < 0
        elif item.confirmed:
            assert found.max_interval[r, 0] > 0
    if not plan:
        assert "growth would not" in plan.reason


# --- preserve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_preserve_keeps_function_and_minimality(sign):
    model, batch = definite_minimum(sign)
    probe = repeated(batch)
    before, outputs = probe.loss(model), model(batch[0])
    plan = plan_growth(model, measure_geometry(model, probe), probe, GrowthPolicy(moves="preserve", max_ratio=None))
    (move,) = plan.moves
    assert (min(move.coefficients) > 0) == (sign == 1)
    assert move.reason.startswith("minimum: ")
    assert not move.in_offset.any()
    assert not move.out_offset.any()
    event = grow(model, plan, probe=probe)
    assert event.drift <= 1e-12
    assert probe.loss(model) == pytest.approx(before, rel=1e-12)
    torch.testing.assert_close(model(batch[0]), outputs, rtol=1e-12, atol=1e-12)
    hessian, gradient, _ = dense_hessian(model, batch)
    values = torch.linalg.eigvalsh(hessian)
    assert float(gradient.norm()) <= 1e-9
    assert float(values[0]) >= -1e-10 * float(values[-1])


def test_preserve_is_refused_where_the_coefficients_asked_for_leave_the_minimum():
    model, batch = definite_minimum(1)
    probe = repeated(batch)
    policy = GrowthPolicy(moves="preserve", coefficients=(2.0, -1.0))
    plan = plan_growth(model, measure_geometry(model, probe), probe, policy)
    assert not plan
    assert "no neuron's plateau has a region of minima" in plan.reason
    assert "a negative coefficient turns" in plan.reason


def test_preserve_is_refused_where_the_inner_hessian_is_indefinite():
    model, _, probe, _ = deep()
    plan = plan_growth(model, measure_geometry(model, probe), probe, GrowthPolicy(moves="preserve"))
    assert not plan
    assert "growth would not keep a minimum here, because" in plan.reason
    assert "indefinite" in plan.reason


def test_preserve_is_refused_where_the_coupling_is_not_zero():
    """The second output reads the same neuron: its error couples, though the first one's inner Hessian is definite."""
    model, batch = definite_minimum(1)
    wide = nn.Sequential(model[0], model[1], nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        wide[2].weight.copy_(torch.cat([model[2].weight, 0 * model[2].weight]))
    y = torch.cat([batch[1], 0.3 * batch[0][:, :1] ** 2], dim=1)
    probe = repeated((batch[0], y))
    plan = plan_growth(wide, measure_geometry(wide, probe), probe, GrowthPolicy(moves="preserve", max_ratio=None))
    assert not plan
    assert "the coupling is not zero" in plan.reason


# --- even ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.5, 3.5])
@pytest.mark.parametrize("name", ["mlp", "conv+bn", "gated", "inverted bottleneck"])
def test_even_widens_every_layer_by_the_ratio(name, ratio):
    model, probe = ZOO[name].make()
    plan = plan_growth(model, measure_geometry(model, probe), probe, GrowthPolicy(moves="even", max_ratio=ratio))
    assert f"every layer by the ratio {ratio:g}" in plan.reason
    before = probe.loss(model)
    event = grow(model, plan, probe=probe)
    assert {a for a, _ in event.widths.values()}
    for old, new in event.widths.values():
        assert new == int(old * ratio + 0.5)
    assert event.realised_fitted == pytest.approx(plan.fitted_decrease, rel=1e-9)
    assert event.realised_held_out == pytest.approx(plan.held_out_decrease, rel=1e-9, abs=1e-12 * before)
    if "copies part by the least" in plan.reason or "no outgoing weights yet" in plan.reason:
        assert probe.loss(model) == pytest.approx(before, rel=1e-3)  # the function is kept, but for the least offset
    else:
        assert plan.held_out_decrease > 0


@pytest.mark.parametrize("name", ["mlp", "conv+bn", "inverted bottleneck"])
def test_even_needs_no_geometry(name):
    model, probe = ZOO[name].make()
    plan = plan_growth(model, {}, probe, GrowthPolicy(moves="even", max_ratio=2.0))
    kinds = {type(move) for move in plan.moves}
    assert kinds == {Split} if name == "inverted bottleneck" else kinds == {Sprout}
    growing = [layer for layer in growable(model, probe) if layer.growable]
    assert grow(model, plan, probe=probe).widths == {x.name: (x.width, 2 * x.width) for x in growing}


@pytest.mark.parametrize(("parts", "taken"), [((0.25, 0.1), 0.25), ((30.0, 0.25), 0.25), ((30.0, 20.0), 0.0)])
def test_even_takes_the_first_part_of_the_solved_step_that_lowers_the_held_out_loss(monkeypatch, parts, taken):
    monkeypatch.setattr(even, "PARTS", parts)
    model, probe = settled(n=400)
    before = probe.loss(model, "held_out")
    plan = plan_growth(model, {}, probe, GrowthPolicy(moves="even"))
    assert plan.step == taken
    with widened(model, plan):
        assert before - probe.loss(model, "held_out") == pytest.approx(plan.held_out_decrease, rel=1e-9)
    assert (plan.held_out_decrease > 0) == (SILENT not in plan.reason) == bool(taken)


def test_nothing_more_is_spent_where_a_first_look_confirms_no_new_neuron(monkeypatch):
    """Of two layers, one feeds a consumer whose loss is noise: only the other is searched on."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(2))
    x = torch.randn(2000, 3, dtype=torch.float64)
    data = x, x[:, :1] * x[:, 1:2], torch.randn(2000, 1, dtype=torch.float64)
    probe = Probe(zip(*(part.split(500) for part in data), strict=True), two_losses)
    improved, improve = [], even.improve
    monkeypatch.setattr(even, "improve", lambda *args, **named: improved.append(args[2]) or improve(*args, **named))
    plan = plan_growth(model, {}, probe, GrowthPolicy(moves="even"))
    assert [seen.layer.name for seen in improved] == ["0.0"]
    assert Counter(move.layer for move in plan.moves) == {"0.0": 4, "1.0": 4}
    assert plan.held_out_decrease > 0
    for move in plan.moves:
        if move.layer == "1.0":
            assert not move.outgoing.any()
            assert "at a first look the held-out half confirms no new neuron" in move.reason


def two_losses(model, batch):
    x, *targets = batch
    return sum(F.mse_loss(part(x), y) for part, y in zip(model, targets, strict=True))


def test_even_has_a_plan_where_nothing_is_to_be_gained():
    """On the held-out half the network is perfect, so no move can pay there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(2, 40, 3, dtype=torch.float64)
    y = [model(x[0]).detach() + torch.randn(40, 2, dtype=torch.float64), model(x[1]).detach()]
    probe = Probe(list(zip(x, y, strict=True)), mse)
    geometry = measure_geometry(model, probe)
    assert not plan_growth(model, geometry, probe, GrowthPolicy(max_ratio=3))
    plan = plan_growth(model, geometry, probe, GrowthPolicy(moves="even"))
    assert sum(move.added for move in plan.moves) == 4
    assert "no outgoing weights yet: none pay on the held-out half" in plan.reason
    assert grow(model, plan, probe=probe).widths == {"0": (4, 8)}
    assert probe.loss(model, "held_out") < 1e-4


def test_even_looks_at_the_weights_as_often_in_wide_layers_as_in_narrow_ones(monkeypatch):
    calls = []
    monkeypatch.setattr(cost, "neuron_weights", lambda *args: calls.append(1) or neuron_weights(*args))
    counted = []
    for width in (4, 64):
        model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()
        probe = Probe([(torch.randn(4, 3).double(), torch.randn(4, 2).double()) for _ in range(2)], mse)
        policy = GrowthPolicy(moves="even", max_parameters=count_parameters(model) + 6 * (width // 2))
        counts, ratio = _counts(model, probe, policy, growable(model, probe))
        assert (counts, ratio) == ({"0": width // 2}, pytest.approx(1.5, abs=0.2))
        counted.append(len(calls))
        calls.clear()
    assert counted[0] == counted[1] <= 2 * 7


@pytest.mark.parametrize("moves", [*MOVES, lambda model, geometry, probe, policy, layers: [layers[0]]])
def test_an_empty_list_of_layers_lets_none_grow(moves):
    model, probe = ZOO["mlp"].make(samples=8)
    geometry = measure_geometry(model, probe, growable(model, probe)[:1])
    for measured in ({}, geometry):
        plan = plan_growth(model, measured, probe, GrowthPolicy(moves=moves, layers=[]))
        assert (plan.moves, plan.reason) == ((), "the policy names no layer that may grow")


def test_copies_side_by_side_are_what_was_predicted():
    """Three and more copies of a neuron: their second-order decrease is that of the loss."""
    model, _, probe, _ = deep()
    geometry, layers = measure_geometry(model, probe), growable(model, probe)
    plan = replace(
        plan_of(layers), moves=tuple(_splits(model, layers[0], geometry, probe, {layers[0].name: 20}, 2**28))
    )
    assert sum(move.added for move in plan.moves) == 20
    move = next(move for move in plan.moves if isinstance(move, Split) and len(move.coefficients) > 2)
    assert len({tuple(row) for row in move.in_offset.tolist()}) == len(move.coefficients)
    alone, before, falls, size = replace(plan, moves=(move,)), probe.loss(model, "fitted"), [], 2.0**-6
    for sign in (1, -1):
        with widened(model, replace(alone, moves=(search.stretch(move, sign * size),))):
            falls.append(before - probe.loss(model, "fitted"))
    assert sum(falls) / 2 == pytest.approx(move.predicted_decrease * size**2, rel=0.05)


# --- a chooser of the user's own -------------------------------------------------------------------------------------


def lowest_curvature(model, geometry, probe, policy, layers):
    """Duplicates the neurons of lowest curvature."""
    order = geometry[layers[0].name].min_eigenvalue.argsort().tolist()
    return [duplicate(model, layers[0], r) for r in order]


def nothing(model, geometry, probe, policy, layers):
    return []


def nonsense(model, geometry, probe, policy, layers):
    return ["0"]


@pytest.mark.parametrize("moves", [lowest_curvature, "test_policies:lowest_curvature"])
def test_a_chooser_is_followed_within_the_budgets(moves):
    model, _, probe, _ = deep()
    geometry = measure_geometry(model, probe)
    plan = plan_growth(model, geometry, probe, GrowthPolicy(moves=moves, max_neurons=3, max_ratio=None))
    assert [move.neuron for move in plan.moves] == geometry["0"].min_eigenvalue.argsort()[:3].tolist()
    assert plan.reason == "chosen by lowest_curvature, 3 of 4 moves"
    assert abs(plan.fitted_decrease) <= 1e-14
    assert grow(model, plan, probe=probe).grown
    assert not plan_growth(model, measure_geometry(model, probe), probe, GrowthPolicy(moves=moves, max_neurons=0))


def test_choosers_that_return_nothing_or_nonsense():
    model, _, probe, _ = deep()
    geometry = measure_geometry(model, probe)
    plan = plan_growth(model, geometry, probe, GrowthPolicy(moves=nothing))
    assert plan.reason == "growth would not help here: nothing proposes no move"
    with pytest.raises(SplitWatchError, match="moves: required Split or Sprout records from nonsense, found str"):
        plan_growth(model, geometry, probe, GrowthPolicy(moves=nonsense))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"moves": "leaps"}, r'moves: required "mixed", .* "even", "module:function" or a function, found .leaps.'),
        ({"moves": "no_such_module:f"}, r"moves: required a function that can be imported, found 'no_such_module:f'"),
        ({"moves": "math:no_such_name"}, r"required a function that can be imported"),
        ({"moves": "math:pi"}, r"moves: required a function, found float at 'math:pi'"),
        ({"moves": ["mixed"]}, r"moves: required"),
        ({"detector": "flat"}, r"detector: required a function that can be imported, found 'flat'"),
        ({"detector": "math:pi"}, r"detector: required a function, found float at 'math:pi'"),
        ({"moves": "even", "max_ratio": None}, r'max_ratio: required a number with moves="even", found None'),
        ({"per": "layer"}, r'per: required "parameter", "neuron" or "flop", found .layer.'),
        ({"max_flops": -1}, r"max_flops: required a number ≥ 0 or None, found -1"),
        ({"max_neurons": "8"}, r"max_neurons: required a whole number ≥ 0 or None, found '8'"),
        ({"max_neurons": 1.5}, r"max_neurons: required a whole number ≥ 0 or None, found 1.5"),
        ({"window": float("nan")}, r"window: required a whole number ≥ 10, found nan"),
        ({"window": None}, r"window: required a whole number ≥ 10, found None"),
        ({"max_bytes": float("nan")}, r"max_bytes: required a number ≥ 1, found nan"),
        ({"rewarm": True}, r"rewarm: required a whole number ≥ 1 or None, found True"),
        ({"cap": float("inf")}, r"cap: required a finite"),
        ({"layers": "net.0"}, r"layers: required a list of dotted names or None, found 'net.0'; write \['net.0'\]"),
        ({"layers": ["0", "0"]}, r"layers: required every name once"),
        ({"coefficients": (0.5, 0.6)}, r"coefficients must sum to 1; found 1.1"),
        ({"coefficients": []}, r"coefficients must be two or more"),
        ({"coefficients": 0.5}, r'coefficients: required "auto", "equal", "signed" or numbers, found 0.5'),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, match):
    with pytest.raises(SplitWatchError, match=match):
        GrowthPolicy(**settings)


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_operations_are_those_counted_by_hand():
    """Two a weight forward, two for its gradient, two for its input's, which the first layer's needs not."""
    model, _, probe, _ = deep()
    first, others = 3 * 4, 4 * 5 + 5 * 2
    assert count_flops(model, probe) == 4 * first + 6 * others
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 36, 2)).double()
    x = torch.randn(10, 2, 6, 6, dtype=torch.float64)
    images = Probe([(x, torch.randn(10, 2, dtype=torch.float64))], mse)
    assert count_flops(conv, images) == 4 * (2 * 9 * 3 * 36) + 6 * (3 * 36 * 2)


@pytest.mark.parametrize("name", ZOO)
def test_prices_are_what_one_more_neuron_costs(name):
    model, probe = ZOO[name].make(samples=4)
    layers = growable(model, probe)
    found = prices(model, probe, GrowthPolicy(per="flop"), layers)
    for layer in layers:
        wide = copy.deepcopy(model)
        neurons = range(0, layer.width, layer.width // layer.groups) if layer.groups > 1 else [0]
        grow(wide, replace(plan_of(layers), moves=tuple(duplicate(model, layer, r) for r in neurons)))
        assert found[layer.name].neuron == 1
        parameters, flops = count_parameters(wide) - count_parameters(model), count_flops(wide, probe)
        assert found[layer.name].parameter * len(neurons) == parameters > 0
        assert found[layer.name].flop * len(neurons) == flops - count_flops(model, probe) > 0


def plan_of(layers):
    return search.GrowthPlan(tuple(layers), (), "by hand")


BUDGETED = in_turn(["splits", "mixed", "even", lowest_curvature], [1.0, 1.6], ["mlp", "conv+bn"], quick=2)


@pytest.mark.parametrize(("moves", "share", "name"), BUDGETED)
def test_a_budget_of_operations_is_never_exceeded(name, share, moves):
    model, probe = ZOO[name].make()
    limit = share * count_flops(model, probe)
    policy = GrowthPolicy(moves=moves, max_flops=limit, per="flop")
    plan = plan_growth(model, measure_geometry(model, probe), probe, policy)
    grow(model, plan, probe=probe)
    assert count_flops(model, probe) <= limit
    assert bool(plan) or share < 1.6 or "would not help" in plan.reason or "budget" in plan.reason


def test_moves_compete_by_what_the_policy_counts():
    model, _, probe, _ = deep()
    geometry, layers = measure_geometry(model, probe), growable(model, probe)
    for per in ("neuron", "parameter", "flop"):
        policy = GrowthPolicy(moves="splits", per=per, max_neurons=3, max_ratio=None)
        items = [item for item in split_candidates(model, layers, geometry, policy) if item.confirmed]
        price = {"0": {"neuron": 1, "parameter": 4 + 5, "flop": 4 * 3 + 6 * 5}}
        price["2"] = {"neuron": 1, "parameter": 5 + 2, "flop": 6 * 4 + 6 * 2}
        items.sort(key=lambda item: -item.move.predicted_decrease / price[item.move.layer][per])
        chosen = search.within_budget(model, layers, items[::-1], probe, policy)
        assert [(m.layer, m.neuron) for m in chosen] == [(x.move.layer, x.move.neuron) for x in items[:3]]


@pytest.mark.parametrize("moves", [*MOVES, nothing, lowest_curvature])
def test_a_grower_follows_every_policy_and_reports_it(moves):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(64, 3, dtype=torch.float64)
    batch = x, torch.sin(2 * x[:, :1])
    policy = GrowthPolicy(moves=moves, window=10, noise_ratio=1e9, tolerance=1e9, max_overhead=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    grower = Grower(model, optimizer, mse, policy, probe=Probe([batch], mse), progress=False)
    events = [event for _ in range(12) if (event := grower.step(batch, mse(model, batch).detach()))]
    assert len(events) == 1
    event = events[0]
    assert event.grown == bool(event.plan)
    assert event.grown or "growth would not" in event.plan.reason
    assert "**Decision:**" in event_markdown(event)
    assert all(value == value for key, value in event_scalars(event).items() if "realised" in key and event.grown)
    if event.grown and callable(moves):
        assert event.drift <= 1e-12


# --- the line search, and what ascent measures -----------------------------------------------------------------------


@pytest.mark.parametrize("reach", [0.01, 0.3, 1.0, 100.0, 1e4])
def test_a_line_search_walks_from_the_middle_to_where_all_sizes_lead(reach):
    model, probe = ZOO["mlp"].make()
    layers, whole = growable(model, probe), search.OFFSETS
    items = split_candidates(model, layers, measure_geometry(model, probe), GrowthPolicy(moves="splits"))
    plan = replace(plan_of(layers), moves=(search.stretch(items[0].move, reach),))
    found, before = search.searched(model, plan, probe), probe.loss(model, "fitted")

    def fall(size):
        with widened(model, replace(plan, moves=(search.stretch(plan.moves[0], size),))):
            return before - probe.loss(model, "fitted")

    sizes = [size for size, _ in found.line_search]
    assert sizes == sorted(set(sizes))
    assert set(sizes) <= {2.0**power for power in range(-10, 7)}
    assert dict(found.line_search)[found.offset] == found.fitted_decrease
    assert found.fitted_decrease == pytest.approx(fall(found.offset), rel=1e-12)
    assert found.fitted_decrease >= max(fall(size) for size in whole)
    assert found.offset in whole or found.offset <= search.FARTHEST


@pytest.mark.parametrize(("peak", "most"), [(2.0**-4, 3), (2.0**-3, 4), (2.0**-9, 8), (0.0, 14)])
def test_a_line_search_tries_no_more_than_it_has_to(monkeypatch, peak, most):
    """Sizes tried for a decrease that is largest at one size, and where none pays."""
    model, probe = ZOO["mlp"].make()
    start, sizes = probe.loss(model, "fitted"), []

    def loss(model, half, finite=True):
        size = sizes[-1]
        return start - (2 * peak * size - size**2 if peak else -size)

    monkeypatch.setattr(probe, "loss", loss)
    at = lambda size: sizes.append(size) or plan_of(growable(model, ZOO["mlp"].make()[1]))  # noqa: E731
    best, fall, tried = search._best(model, at, search.OFFSETS, 2.0**-4, probe, start)
    assert len(sizes) == len(tried) <= most
    assert best == peak or (not peak and fall < 0)


def test_ascent_runs_each_place_once(monkeypatch):
    model, probe = ZOO["mlp"].make()
    layer, calls = growable(model, probe)[0], []
    moments = Seedbed._moments
    monkeypatch.setattr(
        Seedbed, "_moments", lambda *arguments, **named: calls.append(1) or moments(*arguments, **named)
    )
    monkeypatch.setattr(candidates, "flattest", lambda bed, w: w)
    pursuit.pursue(model, {layer: 2}, probe, {}, max_bytes=2**28)
    assert len(calls) == ASCENT + 3


@pytest.mark.parametrize(("room", "most", "asked"), [(100, 6, 1), (4, 4, 4), (0, 0, 4)])
def test_budgets_that_are_not_reached_are_asked_once(monkeypatch, room, most, asked):
    model, probe = ZOO["mlp"].make()
    layers, looks = growable(model, probe), []
    layer, counted = layers[0], cost.size_with
    moves = cost.duplicates(model, layer, dict.fromkeys(range(6), (0.5, 0.5)))
    monkeypatch.setattr(cost, "size_with", lambda *given: looks.append(len(given[-1])) or counted(*given))
    found = cost.fitting(model, probe, GrowthPolicy(max_neurons=room), layers, moves)
    assert found == tuple(moves[:most])
    assert len(looks) <= asked
