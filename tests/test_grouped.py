"""Grouped convolutions as producers and consumers, against the second derivatives of the real loss."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev

from splitwatch.geometry.dense import coupling, inner_hessian, layer_curvature
from splitwatch.geometry.measure import measure_geometry
from splitwatch.geometry.weights import neuron_weights
from splitwatch.grouped import Seats, by_channel, by_output
from splitwatch.growth.branch import branch, replicas
from splitwatch.growth.cost import duplicate
from splitwatch.growth.grow import grow, widened
from splitwatch.growth.outcomes import outcomes
from splitwatch.growth.plan import plan_growth
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.reduction import critical_reduction
from splitwatch.growth.rounds import rounds
from splitwatch.layers import find_hidden_layers
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, Split, SplitWatchError, Sprout, UnsupportedLayerError

torch.set_num_threads(1)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def linear_loss(model, batch):
    """Linear in what the last layer puts out, so that the loss's own Hessian in w_r is the inner Hessian."""
    return (model(batch[0]) * batch[1]).mean()


def two_layers(n, first, second, activation=nn.SiLU, size=5, channels=(4, 8, 4), between=(), **loss):
    """Conv → path → Conv on n axes and batches whose loss is linear in the output."""
    torch.manual_seed(0)
    conv, (i, m, o) = CONVOLUTIONS[n], channels
    model = nn.Sequential(conv(i, m, **first), *between, activation(), conv(m, o, **second)).double()
    data = [torch.randn(samples, i, *[size] * n).double() for samples in (2, 3)]
    with torch.no_grad():
        shape = model(data[0]).shape[1:]
    batches = [(x, torch.randn(len(x), *shape).double()) for x in data]
    return model.eval(), Probe(batches, linear_loss), batches


def of_the_loss(model, batches, first="0", last="2"):
    """∂²L/∂W∂W and ∂²L/∂V∂W of the probe loss, by autograd: (m, d, m, d) and (o, i/h, …, m, d)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    weight, bias = parameters[f"{first}.weight"], parameters.get(f"{first}.bias")
    columns = [weight.flatten(1)] if bias is None else [weight.flatten(1), bias[:, None]]

    def loss(w, v):
        own = {f"{first}.weight": w[:, : weight[0].numel()].reshape(weight.shape), f"{last}.weight": v}
        own |= {} if bias is None else {f"{first}.bias": w[:, -1]}
        run = lambda net, x: functional_call(net, parameters | own, (x,))  # noqa: E731
        total = sum(len(batch[0]) for batch in batches)
        return sum((run(model, x) * y).mean() * (len(x) / total) for x, y in batches)

    w, v = torch.cat(columns, 1), parameters[f"{last}.weight"]
    return jacrev(grad(loss))(w, v).detach(), jacrev(grad(loss, argnums=1))(w, v).detach()


def mixed_of_neurons(mixed, groups):
    """∂²L/∂v_r∂w_r (m, c, d), and what is left: consumer output o reads neuron r only where their groups agree."""
    outputs, inside, m = mixed.shape[0], mixed.shape[1], mixed.shape[-2]
    blocks, rest = [], mixed.clone()
    for r in range(m):
        group = r // inside
        rows = slice(group * (outputs // groups), (group + 1) * (outputs // groups))
        blocks.append(mixed[rows, r % inside, ..., r, :].flatten(0, -2))
        rest[rows, r % inside, ..., r, :] = 0
    return torch.stack(blocks), rest


def assert_close(found, expected, tolerance=1e-11):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


# dimension, producer, consumer
PLACES = {
    "1d producer": (1, {"kernel_size": 3, "groups": 2}, {"kernel_size": 2}),
    "1d consumer": (1, {"kernel_size": 3, "bias": False}, {"kernel_size": 3, "groups": 4, "padding": "same"}),
    "1d both, unlike": (1, {"kernel_size": 2, "groups": 4, "padding": 1}, {"kernel_size": 2, "groups": 2}),
    "1d circular": (1, {"kernel_size": 3, "groups": 2, "padding": 1, "padding_mode": "circular"},
                    {"kernel_size": 3, "groups": 2, "padding": 1, "padding_mode": "reflect"}),
    "2d strided producer": (2, {"kernel_size": 3, "groups": 4, "stride": 2, "padding": 1}, {"kernel_size": 1}),
    "2d dilated consumer": (2, {"kernel_size": 1}, {"kernel_size": 2, "groups": 2, "dilation": 2, "stride": (1, 2)}),
    "2d replicate": (2, {"kernel_size": (2, 1), "groups": 2, "padding": 1, "padding_mode": "replicate"},
                     {"kernel_size": 1, "groups": 4}),
    "3d both": (3, {"kernel_size": 2, "groups": 2, "padding": 1, "stride": 2}, {"kernel_size": 1, "groups": 4}),
    "3d dilated": (3, {"kernel_size": 2, "groups": 4, "dilation": 2, "bias": False}, {"kernel_size": 2, "groups": 2}),
    "depthwise producer": (2, {"kernel_size": 3, "groups": 4}, {"kernel_size": 1, "groups": 2}),
    "a group to a neuron": (1, {"kernel_size": 1}, {"kernel_size": 2, "groups": 8}),
}  # fmt: skip
"""Depthwise producers with two outputs a channel, and consumers of one channel a group, are grouped like others."""


@pytest.mark.parametrize("place", PLACES)
def test_second_derivatives_are_those_of_the_loss(place):
    n, first, second = PLACES[place]
    model, probe, batches = two_layers(n, first, second, channels=(4, 8, 16 if second.get("groups") == 8 else 4))
    hessian, mixed = of_the_loss(model, batches)
    m = len(hessian)
    at = torch.arange(m)
    assert_close(inner_hessian(model, "0", probe), hessian[at, :, at])
    blocks, rest = mixed_of_neurons(mixed, second.get("groups", 1))
    assert not bool(rest.any())  # no other outgoing weight of a neuron exists
    assert_close(coupling(model, "0", probe), blocks)
    chosen = [5, 0, 6]  # groups of unlike numbers, in no order
    assert_close(inner_hessian(model, "0", probe, chosen), hessian[chosen, :, chosen])
    assert_close(coupling(model, "0", probe, chosen), blocks[chosen])


class Neighbours(nn.Module):
    """Its second derivative is not diagonal: the route through autograd."""

    def forward(self, x):
        return x * x.roll(1, dims=-1) + torch.tanh(x)


def test_paths_through_autograd_batch_norm_and_pooling():
    for activation, between in product((Neighbours, nn.Softplus), ((), (nn.BatchNorm1d(8), nn.AvgPool1d(2)))):
        first, second = {"kernel_size": 2, "groups": 4}, {"kernel_size": 2, "groups": 2}
        model, probe, batches = two_layers(1, first, second, activation, size=7, between=between)
        last = str(2 + len(between))
        hessian, mixed = of_the_loss(model, batches, last=last)
        at = torch.arange(8)
        assert_close(inner_hessian(model, "0", probe), hessian[at, :, at])
        blocks, _ = mixed_of_neurons(mixed, 2)
        assert_close(coupling(model, "0", probe), blocks)
        assert_close(coupling(model, "0", probe, [7, 2, 3]), blocks[[7, 2, 3]])


def test_products_are_adjoint_joint_and_restricted_alike():
    model, probe, _ = two_layers(2, *PLACES["2d replicate"][1:])
    curvature = layer_curvature(model, "0", probe)
    rows = torch.tensor([6, 1, 0, 5])
    for some, k in (
        (curvature, 8),
        (curvature.restricted(rows), 4),
        (curvature.restricted(rows).restricted(rows[1:3]), 2),
    ):
        u, v = torch.randn(k, curvature.d).double(), torch.randn(k, curvature.c).double()
        assert_close((some.coupling(u) * v).sum(1), (some.coupling_adjoint(v) * u).sum(1))
        joint = some.joint(u, v, 0.5, 1.5)
        expected = torch.cat([0.5 * some.hessian(u) + 1.5 * some.coupling_adjoint(v), 1.5 * some.coupling(u)], 1)
        assert_close(joint, expected)
        quotients = some.quotients(u, v, 0.5, 1.5).mean(0)
        assert_close(quotients, (u * (0.5 * some.hessian(u) + 3 * some.coupling_adjoint(v))).sum(1))


def test_geometry_equals_dense_spectra():
    model, probe, _ = two_layers(2, {"kernel_size": 3, "groups": 2}, {"kernel_size": 2, "groups": 4})
    found = measure_geometry(model, probe, tolerance=1e-9)["0"]
    s, g = (f(model, "0", probe, half="fitted") for f in (inner_hessian, coupling))
    _, v = neuron_weights(model, find_hidden_layers(model, probe)[0])
    across = torch.eye(v.shape[1]) - torch.einsum("ri,rj->rij", *[torch.nn.functional.normalize(v, dim=1)] * 2)
    g = across @ g
    values = torch.linalg.eigvalsh(s)
    assert_close(found.min_eigenvalue, values[:, 0], 1e-8)
    assert_close(found.max_eigenvalue, values[:, -1], 1e-8)
    assert_close(found.coupling_norm, torch.linalg.matrix_norm(g, 2), 1e-6)
    zero = g.new_zeros(8, v.shape[1], v.shape[1])
    escape = torch.cat([torch.cat([s / 2, g.mT], 2), torch.cat([g, zero], 2)], 1)
    assert_close(found.escape_eigenvalue, torch.linalg.eigvalsh(escape)[:, 0], 1e-7)


def test_gradients_are_the_couplings_along_the_outgoing_weights():
    """v_rᵀ G_r = ∂L/∂w_r holds only if neuron r's outgoing weights are those that its consumer reads it with."""
    model, probe, batches = two_layers(1, *PLACES["1d both, unlike"][1:])
    _, v = neuron_weights(model, find_hidden_layers(model, probe)[0])
    total = sum(len(x) for x, _ in batches)
    loss = sum(linear_loss(model, batch) * len(batch[0]) / total for batch in batches)
    gradients = torch.autograd.grad(loss, [model[0].weight, model[0].bias])
    expected = torch.cat([gradients[0].flatten(1), gradients[1][:, None]], 1)
    assert_close(torch.einsum("rc,rcd->rd", v, coupling(model, "0", probe)), expected)


class Halves(nn.Module):
    """Two channels out of each: the halves of its positions."""

    def forward(self, x):
        return torch.tanh(x.unflatten(-1, (2, -1)).flatten(1, 2))


@pytest.mark.parametrize(("groups", "last"), [(2, 8), (8, 16)])
def test_a_neuron_of_several_channels(groups, last):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), Halves(), nn.Conv1d(8, last, 2, groups=groups)).double()
    batches = [(torch.randn(n, 2, 7).double(), torch.randn(n, last, 2).double()) for n in (2, 3)]
    probe = Probe(batches, linear_loss)
    layer = find_hidden_layers(model, probe)[0]
    assert layer.consumers[0].stride == 2
    _, mixed = of_the_loss(model, batches)
    outputs, inside = last // groups, 8 // groups
    channel = [mixed[j // inside * outputs :][:outputs, j % inside, ..., j // 2, :] for j in range(8)]
    blocks = torch.stack([torch.stack(channel[2 * r : 2 * r + 2], 1).flatten(0, -2) for r in range(4)])
    assert_close(coupling(model, layer, probe), blocks)
    assert_close(coupling(model, layer, probe, [3, 0, 1]), blocks[[3, 0, 1]])
    if groups == 8:
        assert "the groups of its consumer 2 cut through what one neuron puts out" in layer.reason
        return
    before = model(batches[0][0]).detach()
    plan = GrowthPlan((layer,), tuple(one_in_each(model, layer, 1, (0.2, 0.3, 0.5))), "")
    assert grow(model, plan, probe=probe).drift <= 1e-12
    assert model[2].weight.shape == (8, 8, 2)
    assert_close(model(batches[0][0]).detach(), before, 1e-12)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_weights_by_channel_and_back(groups):
    weight = torch.randn(6, 2, 3)
    columns = by_channel(weight, groups)
    assert columns.shape == (6 // groups, 2 * groups, 3)
    assert torch.equal(by_output(columns, groups), weight)
    for i in range(2 * groups):
        first = i // 2 * (6 // groups)
        assert torch.equal(columns[:, i], weight[first : first + 6 // groups, i % 2])


def test_seats_are_apart_in_their_groups_and_even():
    assert Seats.of(torch.arange(6), 6, 3) is None
    seats = Seats.of(torch.tensor([5, 0, 4, 1, 3]), 6, 2)
    assert seats.count == 6
    assert torch.equal(seats.index // 3, torch.tensor([1, 0, 1, 0, 1]))
    assert len(set(seats.index.tolist())) == 5
    values = torch.randn(2, 5)
    assert torch.equal(seats.pick(seats.fill(values, 1), 1), values)


# --- growing ---------------------------------------------------------------------------------------------------------


def layers_of(model, probe):
    return tuple(layer for layer in find_hidden_layers(model, probe) if layer.growable)


def one_in_each(model, layer, r=0, coefficients=(0.5, 0.5), size=0.0, seed=0):
    """A round: the r-th neuron of every group, with copies that part by random offsets."""
    generator, each = torch.Generator().manual_seed(seed), layer.width // layer.groups
    for neuron in range(r, layer.width, each):
        move = duplicate(model, layer, neuron, coefficients)
        offsets = (size * torch.randn(x.shape, generator=generator).double() for x in (move.in_offset, move.out_offset))
        yield replace(move, **dict(zip(("in_offset", "out_offset"), offsets, strict=True)))


@pytest.mark.parametrize("place", [place for place in PLACES if place != "a group to a neuron"])
def test_the_function_is_the_same_at_zero_offset(place):
    n, first, second = PLACES[place]
    for coefficients in ((0.5, 0.5), (1.5, -0.5), (0.2, 0.3, 0.5)):
        model, probe, batches = two_layers(n, first, second)
        (layer,) = layers_of(model, probe)
        plan = GrowthPlan((layer,), (*one_in_each(model, layer, 0, coefficients), *one_in_each(model, layer, 1)), "")
        before = [model(x).detach() for x, _ in batches]
        assert grow(model, plan, probe=probe).drift <= 1e-12
        assert model[0].out_channels == model[2].in_channels == 8 + len(coefficients) * layer.groups
        for (x, _), expected in zip(batches, before, strict=True):
            assert_close(model(x).detach(), expected, 1e-12)
        (again,) = layers_of(model, probe)
        assert (again.width, again.groups) == (8 + len(coefficients) * layer.groups, layer.groups)


def chain():
    """Two layers beside each of two grouped convolutions, whose groups are unlike."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.SiLU(), nn.Conv1d(4, 4, 2, groups=2), nn.SiLU(),
        nn.Conv1d(4, 8, 2, groups=4, bias=False), nn.SiLU(), nn.Conv1d(8, 2, 1),
    ).double()  # fmt: skip
    batches = [(torch.randn(n, 3, 6).double(), torch.randn(n, 2, 4).double()) for n in (9, 11, 10, 12)]
    probe = Probe(batches, lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[1]))
    return model, probe, layers_of(model, probe)


def test_copies_stand_in_their_group_and_offsets_where_their_source_is_read():
    """Rows and columns of one grouped weight change at once: entry by entry, by the definition of a grouped map."""
    model, _, layers = chain()
    assert [layer.groups for layer in layers] == [2, 4, 4]
    first, second = layers[0], layers[1]
    with torch.no_grad():
        moves = {x.name: [*one_in_each(model, x, 0, (0.7, 0.2, 0.1), 0.1)] for x in (first, second)}
    old = model[3].weight.detach().clone()  # (4, 2, 2): groups {0, 1} and {2, 3}
    plan = GrowthPlan(layers, (*moves["0"], *moves["3"]), "by hand")
    with widened(model, plan):
        new = model[3].weight.detach().clone()
    # Sources: one neuron of each of two groups in three, and every neuron, which is a group, in three.
    inputs, outputs = [0, 1, 0, 0, 2, 3, 2, 2], [r for r in range(4) for _ in range(3)]
    copy_of = lambda sources, j: sources[:j].count(sources[j])  # noqa: E731
    assert new.shape == (12, 4, 2)
    by_neuron = {name: {move.neuron: move for move in found} for name, found in moves.items()}
    for o, source in enumerate(outputs):
        group = o // 6
        row = old[source] + by_neuron["3"][source].in_offset[copy_of(outputs, o)][:4].reshape(2, 2)
        for place in range(4):
            j = group * 4 + place
            split, column = by_neuron["0"].get(inputs[j]), row[inputs[j] % 2]
            if split is not None:
                copies = copy_of(inputs, j)
                offset = split.out_offset[copies].reshape(2, 2)[source % 2]
                column = split.coefficients[copies] * column + offset
            torch.testing.assert_close(new[o, place], column, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_gradients_and_momenta_come_along(optimizer):
    """Equal copies have the gradients that autograd finds, and a step leaves the copies of one neuron equal."""
    model, probe, layers = chain()
    opt = optimizer(model.parameters(), lr=1e-2)
    for _ in range(3):
        opt.zero_grad()
        probe.loss_fn(model.eval(), probe.fitted[0]).backward()
        opt.step()
    opt.zero_grad()
    probe.loss_fn(model, probe.fitted[0]).backward()
    plan = GrowthPlan(layers, tuple(move for x in layers for move in one_in_each(model, x)), "by hand")
    grow(model, plan, opt)
    found = {name: p.grad for name, p in model.named_parameters()}
    expected = torch.autograd.grad(probe.loss_fn(model, probe.fitted[0]), [*model.parameters()])
    for (name, gradient), truth in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-12, msg=name)
    opt.step()
    wide = {layer.name: layer for layer in layers_of(model, probe)}
    for layer in layers:
        pairs = [group for group in replicas(model, wide[layer.name], 1e-12) if len(group) > 1]
        assert len(pairs) == layer.groups
        assert all(len({wide[layer.name].group(r) for r in pair}) == 1 for pair in pairs)


def test_the_outgoing_weights_of_a_consumer_with_a_group_to_a_neuron_grow_all_at_once():
    model, probe, _ = two_layers(1, *PLACES["a group to a neuron"][1:], channels=(4, 8, 16))
    (layer,) = layers_of(model, probe)
    assert layer.groups == 8
    grow(model, GrowthPlan((layer,), tuple(one_in_each(model, layer)), ""), probe=probe)
    assert model[2].weight.shape == (16, 2, 2)


@pytest.mark.parametrize("moves", ["splits", "mixed", "certified", "even", "preserve"])
def test_plans_come_in_rounds(moves):
    model, probe, layers = chain()
    geometry = measure_geometry(model, probe)
    plan = plan_growth(model, geometry, probe, GrowthPolicy(moves=moves, max_ratio=1.5))
    assert plan.moves or moves in {"certified", "preserve"}
    for layer in layers:
        added = [layer.group(move.neuron) for move in plan.moves if move.layer == layer.name]
        assert len({added.count(group) for group in range(layer.groups)}) == 1
    before = probe.loss(model, "held_out")
    parts = outcomes(model, plan, probe, geometry)
    event = grow(model, plan, probe=probe)
    assert event.realised_held_out == pytest.approx(plan.held_out_decrease, rel=1e-6, abs=1e-12)
    assert sum(part.realised for part in parts) == pytest.approx(before - probe.loss(model, "held_out"), abs=1e-12)


def test_budgets_are_kept_by_whole_rounds():
    model, probe, _ = chain()
    geometry = measure_geometry(model, probe)
    for most in range(1, 7):
        plan = plan_growth(model, geometry, probe, GrowthPolicy(moves="splits", max_neurons=most))
        added = sum(move.added for move in plan.moves)
        assert added <= most
        assert added > 0 or most == 1
        assert most > 1 or "no new neuron; beside grouped convolutions a round of them is 2 in 0" in plan.reason


def test_a_layer_that_descends_in_some_groups_only_is_left_with_the_reason():
    model, probe, layers = chain()
    geometry = measure_geometry(model, probe, layers[:1])["0"]
    risen = geometry.escape_interval.clone()
    risen[2:] = 1.0
    flat = {name: getattr(geometry, name).abs() for name in ("interval", "max_interval")}
    changed = replace(geometry, escape_interval=risen, **flat)
    plan = plan_growth(model, {"0": changed}, probe, GrowthPolicy(moves="splits", coefficients="equal"))
    assert not plan
    assert "a split descends in only 1 of the 2 groups of 0" in plan.reason


def test_moves_that_would_make_groups_unlike_are_refused():
    model, probe, (layer, *_) = chain()
    moves = [*one_in_each(model, layer)]
    for chosen in (moves[:1], [*moves, duplicate(model, layer, 1)]):
        with pytest.raises(
            SplitWatchError, match=r"as many new neurons in each of the 2 groups of 0, found \[\d, \d\]"
        ):
            grow(model, GrowthPlan((layer,), tuple(chosen), ""))
        with pytest.raises(SplitWatchError, match="as many new neurons in each"):
            policy = GrowthPolicy(moves=lambda *_, chosen=chosen: chosen)
            plan_growth(model, measure_geometry(model, probe, [layer]), probe, policy)
    sprout = Sprout("0", torch.zeros(4), torch.zeros(4))
    with pytest.raises(UnsupportedLayerError, match="a sprout in 0 has none of its 2 groups"):
        grow(model, GrowthPlan((layer,), (sprout,), ""))


def test_rounds_take_one_move_of_each_group_in_order():
    grouped, free = HiddenLayer("a", 6, groups=3), HiddenLayer("b", 4)
    zero = torch.zeros(2, 1)
    move = lambda name, r, k=2: Split(name, r, (1 / k,) * k, zero, zero, 0.0)  # noqa: E731
    order = [move("a", 1), move("a", 0), move("b", 3), move("a", 5), move("a", 2, k=3), move("a", 3), move("a", 4)]
    found = [[(x.layer, x.neuron) for x in part] for part in rounds([grouped, free], order)]
    assert found == [[("b", 3)], [("a", 1), ("a", 3), ("a", 5)]]


# --- what can be measured only ---------------------------------------------------------------------------------------


class Beside(nn.Module):
    """A grouped consumer that reads a layer and the input, side by side."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(2, 4, 2), nn.Conv1d(6, 3, 2, groups=3)

    def forward(self, x):
        return self.last(torch.cat([x[..., 1:], torch.tanh(self.first(x))], 1))


class Depthwise(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(2, 4, 1), nn.SiLU(), nn.Conv1d(4, 4, 2, groups=4), nn.SiLU(), nn.Conv1d(4, 3, 1))


@pytest.mark.parametrize(
    ("build", "name", "last", "reason"),
    [
        (Beside, "first", "last", "groups of its consumer last hold other channels beside it"),
        (Depthwise, "2", "4", "a depthwise convolution, which grows with the layer that it reads"),
    ],
)
def test_measured_but_not_grown(build, name, last, reason):
    torch.manual_seed(0)
    model = build().double()
    batches = [(torch.randn(n, 2, 5).double(), torch.randn(n, 3, 4 - (build is Beside)).double()) for n in (2, 3)]
    probe = Probe(batches, linear_loss)
    found = {layer.name: layer for layer in find_hidden_layers(model, probe)}
    layer = found[name]
    assert layer.measurable and not layer.growable
    assert reason in str(layer)
    hessian, mixed = of_the_loss(model, batches, name, last)
    at = torch.arange(4)
    assert_close(inner_hessian(model, layer, probe), hessian[at, :, at])
    if build is Beside:  # the third to sixth channel of its consumer, two to a group of one output
        blocks = torch.stack([mixed[j // 2, j % 2, :, j - 2] for j in range(2, 6)])
    else:
        blocks, _ = mixed_of_neurons(mixed, 1)
    assert_close(coupling(model, name, probe), blocks)
    assert_close(coupling(model, name, probe, [3, 0]), blocks[[3, 0]])
    assert name not in measure_geometry(model, probe)
    geometry = measure_geometry(model, probe, [name])
    plan = plan_growth(model, geometry, probe)
    assert not plan
    assert f"left out: {name}: can be measured, cannot be widened" in plan.reason
    with pytest.raises(UnsupportedLayerError, match=reason):
        plan_growth(model, geometry, probe, GrowthPolicy(layers=[name]))


def test_reduction_passes_grouped_layers_over():
    model, probe, layers = chain()
    plan = GrowthPlan(layers, tuple(move for x in layers for move in one_in_each(model, x)), "by hand")
    grow(model, plan, probe=probe)
    narrow, reduction = critical_reduction(model, layers_of(model, probe))
    assert not reduction.layers
    assert all(torch.equal(a, b) for a, b in zip(narrow.parameters(), model.parameters(), strict=True))
    (found, *_) = branch(model, layers_of(model, probe))
    assert (found.width, found.effective, found.silent) == (6, 4, 0)


def test_equal_weights_in_two_groups_make_no_replicas():
    model, _, layers = chain()
    with torch.no_grad():
        model[3].weight[2:], model[3].bias[2:] = model[3].weight[:2], model[3].bias[:2]
    assert len(replicas(model, layers[1], 1e-6)) == 4  # they read other channels
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        for tensor in (model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
            tensor[1] = tensor[0]
    assert [group for group in replicas(model, layers[0], 1e-6) if len(group) > 1] == [[0, 1]]
