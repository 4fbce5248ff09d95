"""What people's own code does around a network, found by attaching to it: nothing of it ends training or misleads."""

import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitwatch import (
    Grower,
    GrowthPlan,
    GrowthPolicy,
    Probe,
    Rewarm,
    Split,
    SplitWatch,
    SplitWatchError,
    StationarityDetector,
    find_hidden_layers,
    grow,
    inner_hessian,
    make_growable,
    measure_geometry,
    narrow_verdict,
    plan_growth,
)
from splitwatch.anatomy import flat
from splitwatch.batches import kind
from splitwatch.control import Control
from splitwatch.geometry.narrow import LossCurvature
from splitwatch.layers import KINDS

SOON = {"window": 10, "tolerance": 1e9, "noise_ratio": 1e9, "max_events": 1, "max_overhead": None, "probe_samples": 64}


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def data(n=128, dtype=torch.float32):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x, torch.sin(2 * x[:, :1]) * x[:, 1:2]


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def trained(model, loss_fn=mse, steps=12, batch=None, **policy):
    """Losses of a run that may grow after ten steps, and its events."""
    x, y = batch or data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    grower, losses = Grower(model, optimizer, loss_fn, GrowthPolicy(**(SOON | policy)), progress=False), []
    for step in range(steps):
        rows = torch.arange(16) + 16 * (step % 8)
        optimizer.zero_grad()
        loss = loss_fn(model, (x[rows], y[rows]))
        loss.backward()
        optimizer.step()
        grower.step((x[rows], y[rows]), loss)
        losses.append(float(loss.detach()))
    return losses, grower.events


# --- logging ---------------------------------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Adversarial(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out, self.domain = nn.Linear(6, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.out(h) + 0.1 * self.domain(Reversed.apply(h))


@pytest.mark.parametrize("view", [torch.squeeze, torch.t, lambda x: x[0]])
def test_views_for_a_log_change_nothing(view):
    """A view taken under no_grad says that it requires a gradient, and has no place in the graph."""

    def logging(model, batch):
        out = model(batch[0])
        with torch.no_grad():
            model.seen = float(sum(view(part).detach().norm() for part in (out, model[0].weight)))
        return F.mse_loss(out, batch[1])

    (losses, events), (plain, _) = trained(mlp(), logging), trained(mlp())
    assert events[-1].grown
    assert losses == plain


def test_a_reversed_gradient_grows():
    _, events = trained(Adversarial(), moves="even")
    assert events[-1].widths["a"][1] > 4


# --- layouts and numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moves", ["mixed", pytest.param("even", marks=pytest.mark.slow)])
def test_channels_last_grows(moves):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 3, 3), nn.GELU()
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(128, 3, 6, 6).to(memory_format=torch.channels_last)
    _, events = trained(model, batch=(x, x[:, :1, 0, 0] * x[:, 1:2, 0, 0]), moves=moves)
    assert events
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


class Spectral(nn.Module):
    """A complex weight in front of a hidden layer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.complex(torch.randn(6, 3, dtype=dtype), torch.randn(6, 3, dtype=dtype)) / 3)
        self.net = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)

    def forward(self, x):
        z = x.to(self.w.dtype) @ self.w
        return self.net(torch.cat([z.real, z.imag], dim=1))


def test_complex_weights_elsewhere_are_two_numbers_each():
    _, events = trained(Spectral())
    assert events[-1].grown
    model, (x, y) = Spectral(torch.float64), data(dtype=torch.float64)
    curvature = LossCurvature(model, Probe([(x[:64], y[:64]), (x[64:], y[64:])], mse))
    parameters = dict(model.named_parameters())

    def loss(row):
        parts = row.split([p.numel() * (1 + p.is_complex()) for p in parameters.values()])
        shaped = {
            name: torch.complex(*part.view(*p.shape, 2).unbind(-1)) if p.is_complex() else part.view_as(p)
            for (name, p), part in zip(parameters.items(), parts, strict=True)
        }
        return F.mse_loss(torch.func.functional_call(model, shaped, (x,)), y)

    point = flat(model.parameters()).detach()
    hessian = torch.autograd.functional.hessian(loss, point)
    products = torch.cat([curvature.product(row[None], "all") for row in torch.eye(len(point)).double()])
    torch.testing.assert_close(products, hessian, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(curvature.gradient("all"), torch.autograd.functional.jacobian(loss, point))


# --- heads -----------------------------------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    def __init__(self, detached):
        super().__init__()
        self.detached = detached
        self.a, self.policy, self.value = nn.Linear(6, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.policy(h), self.value(h.detach() if self.detached else h)


def both_losses(model, batch, value=1.0):
    scores, values = model(batch[0])
    return F.cross_entropy(scores, (batch[1][:, 0] > 0).long()) + value * F.mse_loss(values, batch[1])


def actor_loss(model, batch):
    return both_losses(model, batch, 0.0)


@pytest.mark.parametrize("moves", ["mixed", "certified", "even"])
def test_a_reader_that_sees_the_layer_detached(moves):
    _, events = trained(ActorCritic(True), both_losses, moves=moves)
    assert events


def test_what_reads_detached_bends_nothing():
    torch.manual_seed(0)
    model, batch = ActorCritic(True).double(), data(dtype=torch.float64)
    halves = [tuple(part[:64] for part in batch), tuple(part[64:] for part in batch)]
    seen, alone = (inner_hessian(model, "a", Probe(halves, loss)) for loss in (both_losses, actor_loss))
    torch.testing.assert_close(seen, alone, rtol=1e-10, atol=1e-14)


class Deep(nn.Module):
    """A head that only training uses reads the hidden layer too, out of the loss's sight in eval mode."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out, self.aux = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        out = self.out(torch.tanh(self.norm(self.b(h))))
        return out + 0.1 * self.aux(h) if self.training else out


def test_a_head_of_training_alone_keeps_the_layer_as_wide_as_it_is():
    torch.manual_seed(0)
    model = Deep()
    _, events = trained(model)
    assert "a: can be measured, cannot be widened: the forward pass does not follow its width" in events[-1].plan.reason
    assert events[-1].widths["b"][1] > 4
    plain = Deep()
    probe = Probe([data()], mse)
    before = [value.clone() for value in plain.state_dict().values()]
    plan_growth(plain, measure_geometry(plain, probe), probe)
    assert all(map(torch.equal, before, plain.state_dict().values()))


class MeanField(nn.Module):
    def __init__(self, scaled):
        super().__init__()
        self.scaled, self.a, self.b = scaled, nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h) / (h.shape[1] / 4 if self.scaled else 1)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_function_that_changes_with_its_width_is_left_alone(scaled):
    torch.manual_seed(0)
    model, probe = MeanField(scaled), Probe([data()], mse)
    plan = plan_growth(model, {}, probe, GrowthPolicy(moves="even"))
    assert bool(plan) != scaled
    assert ("the loss changes from" in plan.reason) == scaled


def test_rounding_of_a_perfect_fit_is_no_change_of_the_function():
    torch.manual_seed(0)
    model, (x, _) = mlp(), data()
    probe = Probe([(x, model(x).detach() + 1e-6)], mse)
    assert plan_growth(model, {}, probe, GrowthPolicy(moves="even")).moves


class ByHand(nn.Module):
    """Uses its consumer's weight without calling it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x):
        return F.linear(torch.tanh(self.a(x)), self.b.weight, self.b.bias)


def test_a_consumer_whose_weight_is_used_by_hand_grows():
    torch.manual_seed(0)
    model, probe = ByHand(), Probe([data()], mse)
    plan = plan_growth(model, measure_geometry(model, probe), probe)
    event = grow(model, plan, probe=probe)
    assert event.grown
    assert event.drift <= 1e-6


# --- gradients in the loss -------------------------------------------------------------------------------------------


def penalised(model, batch):
    x = batch[0].clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.mse_loss(out, batch[1]) + 0.1 * (slope.norm(dim=1) - 1).square().mean()


def watched(model, batch):
    loss = mse(model, batch)
    if loss.requires_grad:
        model.slope = float(torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0].norm())
    return loss


def test_layers_that_the_loss_differentiates_are_refused_with_the_reason():
    """Their weights are read on the way back too; the inner Hessian of one forward pass has even the wrong sign."""
    _, events = trained(mlp(), penalised)
    layers = find_hidden_layers(mlp(), Probe([data()], penalised))
    assert events[-1].verdict.gradient_norm > 0
    assert not any(layer.growable or layer.measurable for layer in layers)
    assert "differentiated within the loss (torch.autograd.grad)" in layers[0].reason


def test_gradients_that_are_only_logged_do_no_harm():
    _, events = trained(mlp(), watched)
    assert events[-1].grown


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sometimes", "arrays"])
def test_whatever_a_loss_does_to_its_batches_the_probe_stays(kind):
    images = [100 * torch.rand(8, 6) if i % 2 else torch.rand(8, 6) for i in range(4)]
    batches = [{"x": x.numpy().copy() if kind == "arrays" else x.clone(), "y": x[:, :1] / 100} for x in images]

    def loss_fn(model, batch):
        x = batch["x"]
        if kind == "arrays":
            x *= 0.5
        elif x.max() > 50:
            x.div_(100)
        return F.mse_loss(model(torch.as_tensor(x)), batch["y"])

    probe = Probe(batches, loss_fn)
    before = [torch.as_tensor(batch["x"]).clone() for batch in probe.half("all")]
    first = [probe.loss(mlp()) for _ in range(3)]
    assert first[0] == first[1] == first[2]
    assert all(map(torch.equal, before, [torch.as_tensor(batch["x"]) for batch in probe.half("all")]))


def test_a_step_that_is_left_out_for_its_loss_is_not_measured_on():
    x, y = data()
    x = x.clone()
    x[20] = torch.nan  # until the step that it spoils is over
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    policy = GrowthPolicy(**(SOON | {"detector": lambda losses: True}))
    grower = Grower(model, optimizer, mse, policy, progress=False)
    for step in range(24):
        rows = torch.arange(16) + 16 * ((step + 1) % 8)
        optimizer.zero_grad()
        loss = mse(model, (x[rows], y[rows]))
        if loss.isfinite():
            loss.backward()
            optimizer.step()
        grower.step((x[rows], y[rows]), loss)
        x = x.nan_to_num(0)
    assert grower.events


def test_empty_batches_are_passed_over():
    model = mlp()
    grower = Grower(model, torch.optim.SGD(model.parameters(), 0.1), mse, GrowthPolicy(**SOON), progress=False)
    (x, y) = data()
    for rows in (0, 16, 0):
        grower.step((x[:rows], y[:rows]), 1.0)
    assert grower.watcher.collector.samples == 16


# --- what is passed in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": 3}, "layers: required a list of dotted names"),
        ({"detector": 3}, "detector: required a function that can be imported, found 3"),
        ({"coefficients": None}, "coefficients: required"),
        ({"coefficients": ("a", "b")}, "coefficients: required .* numbers"),
        ({"per": ["flop"]}, "per: required"),
    ],
)
def test_policies_name_the_field(settings, words):
    with pytest.raises(SplitWatchError, match=words):
        GrowthPolicy(**settings)


def test_other_arguments_are_named_too():
    model, probe = mlp(), Probe([data()], mse)
    with pytest.raises(
        SplitWatchError, match=r"layers: required dotted names .* hold weights, found '1'; choose from 0"
    ):
        Grower(model, torch.optim.SGD(model.parameters(), 0.1), mse, GrowthPolicy(layers=["1"]))
    with pytest.raises(SplitWatchError, match=r"optimizer: required optimizers of torch\.optim, found 'net'"):
        Grower(model, {"net": torch.optim.SGD(model.parameters(), 0.1)}, mse)
    with pytest.raises(SplitWatchError, match=r"half: required one of fitted, held_out, all, found 'heldout'"):
        probe.loss(model, "heldout")
    with pytest.raises(SplitWatchError, match=r"geometry: required the measurements of some layers, found none"):
        plan_growth(model, {}, probe)


def test_coefficients_from_float32_sum_to_one():
    model, probe = mlp(), Probe([data()], mse)
    thirds = torch.full((3,), 1 / 3).tolist()
    plan = plan_growth(model, measure_geometry(model, probe), probe, GrowthPolicy(coefficients=thirds, moves="splits"))
    assert all(sum(move.coefficients) == pytest.approx(1, abs=1e-15) for move in plan.moves)
    assert plan.moves


def test_a_growth_that_fails_leaves_no_hooks_of_its_control(monkeypatch):
    def fails(*arguments, **named):
        raise SplitWatchError("not now")

    monkeypatch.setattr("splitwatch.grower.grow", fails)
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    grower = Grower(model, optimizer, mse, GrowthPolicy(**SOON, control=5), probe=Probe([(x, y)], mse), progress=False)
    before = len(optimizer._optimizer_step_pre_hooks)
    with pytest.raises(SplitWatchError, match="not now"):
        for _ in range(12):
            loss = mse(model, (x, y))
            loss.backward()
            optimizer.step()
            grower.step((x, y), loss)
    assert len(optimizer._optimizer_step_pre_hooks) == before
    assert grower.control is None


# --- several tasks ---------------------------------------------------------------------------------------------------


class Tasks(nn.Module):
    """A trunk of two layers and a head for each of two tasks, one of them with a hidden layer of its own."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh())
        self.a = nn.Linear(5, 1)
        self.b = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x, task):
        return getattr(self, task)(self.trunk(x))


def task_loss(model, batch):
    return F.mse_loss(model(batch["x"], batch["task"]), batch["y"])


def task_batches(count):
    torch.manual_seed(1)
    for i in range(count):
        x = torch.randn(16, 3)
        yield {"task": "ab"[i % 4 // 2], "x": x, "y": x.prod(1, keepdim=True)}


def test_layers_that_not_all_batches_use_alike_are_left_out():
    torch.manual_seed(0)
    model = Tasks()
    found = {layer.name: layer for layer in find_hidden_layers(model, Probe(task_batches(8), task_loss))}
    assert found["trunk.0"].growable
    assert found["trunk.2"].reason.endswith("in some of them trunk.2: 5 neurons: trunk.2 → tanh → b.0")
    assert not found["b.0"].growable
    assert find_hidden_layers(model, Probe([*task_batches(2)], task_loss))[1].growable


@pytest.mark.parametrize("moves", ["even", "mixed"])
def test_several_tasks_can_be_grown_together(moves):
    torch.manual_seed(0)
    model, batches = Tasks(), [*task_batches(8)]
    probe = Probe(batches, task_loss)
    geometry = measure_geometry(model, probe)
    assert [*geometry] == ["trunk.0"]
    plan = plan_growth(model, geometry, probe, GrowthPolicy(moves=moves, max_ratio=2.0))
    assert {move.layer for move in plan.moves} == {"trunk.0"}
    grow(model, plan, probe=probe)
    assert model.trunk[0].out_features > 4
    assert all(task_loss(model, batch).isfinite() for batch in batches)


def test_batches_with_names_are_not_all_looked_at():
    model, (x, y), seen = mlp(), data(), []
    batches = [{"x": x[i : i + 2], "y": y[i : i + 2], "file": f"{i}.png"} for i in range(0, 128, 2)]
    probe = Probe(batches, lambda m, b: seen.append(b["file"]) or F.mse_loss(m(b["x"]), b["y"]))
    assert find_hidden_layers(model, probe)[0].growable
    assert len(seen) == KINDS


def test_kinds_of_batches_are_told_apart_by_what_a_loss_may_choose_by():
    x = torch.zeros(2, 3)
    same = [(x, x[:1]), (x.new_ones(7, 4), x)], [{"x": x, "n": 3, "id": ["p"]}, {"x": x, "n": 4, "id": ["q", "r"]}]
    for first, second in same:
        assert kind(first) == kind(second)
    unlike = [(x, x), (x, x.long())], [{"x": x}, {"y": x}], [("a", x), ("b", x)], [(x, True), (x, False)], [x, x[0]]
    for first, second in unlike:
        assert kind(first) != kind(second)
    boxes = [[{"box": x}], [{"box": x}, {"box": x[:1]}]]
    assert kind(boxes[0]) == kind(boxes[1])


@pytest.mark.parametrize(("first", "name"), [("a", "trunk.2"), ("b", "trunk.2"), ("b", "b.0")])
def test_tasks_that_no_batch_tells_of_are_asked_for(first, name):
    def loss(model, batch):
        return task_loss(model, batch | {"task": "ab"[int(batch["task"])]})

    batches = [batch | {"task": torch.tensor((batch["task"] == "a") == (first == "b"))} for batch in task_batches(8)]
    with pytest.raises(SplitWatchError, match=rf"layer {name} alike, .* by a string or by their keys"):
        measure_geometry(Tasks(), Probe(batches, loss), [name])


def test_a_gradient_under_inference_mode_is_refused():
    model, probe = mlp(), Probe([data()], mse)
    with torch.inference_mode(), pytest.raises(SplitWatchError, match=r"found torch\.inference_mode"):
        next(probe.gradients(model))
    with pytest.raises(SplitWatchError, match="found a constant"):
        next(Probe([data()], lambda *args: mse(*args).detach()).gradients(model))


def test_a_loss_that_takes_gradients_is_tried_without_a_graph_once():
    modes = []

    def penalised(model, batch):
        modes.append(torch.is_grad_enabled())
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return mse(model, batch) + slope.square().mean()

    model, (x, y) = mlp(), data()
    probe = Probe([(x[:64], y[:64]), (x[64:], y[64:])], penalised)
    assert probe.loss(model) == probe.loss(model)
    assert modes == [False, True, True, True, True]


# --- losses that write -----------------------------------------------------------------------------------------------


class Momentum(nn.Module):
    """A network beside an encoder that follows it, a step whenever the loss is computed, as for BYOL."""

    def __init__(self, hidden_write):
        super().__init__()
        self.net, self.target = mlp(), mlp().requires_grad_(False)
        self.hidden_write = hidden_write

    def forward(self, x):
        with torch.no_grad():
            for own, other in zip(self.target.parameters(), self.net.parameters(), strict=True):
                (own.data if self.hidden_write else own).mul_(0.9).add_(other, alpha=0.1)
            for layer in self.net[::2]:
                layer.weight.mul_(0.99)
        return self.net(x) - self.target(x)


@pytest.mark.parametrize("hidden_write", [False, True])
def test_parameters_that_the_loss_writes_to_are_put_back(hidden_write):
    torch.manual_seed(0)
    model, (x, y) = Momentum(hidden_write), data()
    probe = Probe([(x[:64], y[:64]), (x[64:], y[64:])], mse)
    with torch.no_grad():
        model.target[0].weight += 1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    find_hidden_layers(model, probe)  # nested, and the very first
    probe.loss(model)
    next(probe.gradients(model))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_hooks_on_parameters_neither_see_nor_change_what_is_measured():
    model, (x, y) = mlp(), data()
    probe, seen = Probe([(x[:64], y[:64]), (x[64:], y[64:])], mse), []
    (expected, _), *_ = probe.gradients(model)
    for p in model.parameters():
        p.register_hook(lambda g: seen.append(1) or 0 * g)
    (found, _), *_ = probe.gradients(model)
    assert torch.equal(found, expected)
    assert not seen
    mse(model, (x, y)).backward()
    assert len(seen) == len([*model.parameters()])
    assert not any(p.grad.any() for p in model.parameters())


def test_what_modules_hold_inside_of_what_they_hold_is_put_back():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.generator, self.logs = mlp(), torch.Generator().manual_seed(0), [[], []]

        def forward(self, x):
            self.logs[0].append(1)
            return self.net(x + torch.randn(x.shape, generator=self.generator))

    model, probe = Draws(), Probe([data()], mse)
    before = model.generator.get_state()
    probe.loss(model)
    assert torch.equal(model.generator.get_state(), before)
    assert model.logs == [[], []]


# --- batches that have to stay as they are ---------------------------------------------------------------------------


def fives(model, batch):
    """A loss of every five samples together."""
    out = model(batch[0])
    return out.reshape(-1, 5).var(dim=1).mean() + F.mse_loss(out, batch[1])


def test_batches_whose_parts_the_loss_does_not_take_stay_whole():
    model, (x, y) = mlp(), data()
    probe = Probe(zip(x[:120].split(10), y[:120].split(10), strict=True), fives)
    assert len(probe.losses(model, "fitted", at_least=4 * len(probe.fitted))[0]) == len(probe.fitted)
    assert sum(1 for _ in probe.gradients(model, at_least=100)) == len(probe.half("all"))
    assert measure_geometry(model, probe, find_hidden_layers(model, probe))


def test_where_the_loss_does_not_take_parts_the_error_tells_the_cure():
    model, (x, y) = mlp(), data()
    probe = Probe([(x[:15], y[:15])], fives)
    with pytest.raises(RuntimeError, match="shape") as raised:
        probe.loss(model)
    if sys.version_info >= (3, 11):
        assert "pass probe=Probe(batches, loss_fn) of two batches or more" in raised.value.__notes__[0]


def test_no_part_is_a_single_sample():
    model, (x, y) = mlp(), data()
    sizes = []
    probe = Probe([(x[:7], y[:7]), (x[7:10], y[7:10])], lambda m, b: sizes.append(len(b[0])) or mse(m, b))
    probe.losses(model, "all", at_least=20)
    assert min(sizes) >= 2


# --- what ended training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [TypeError, KeyError, ArithmeticError])
def test_any_exception_of_a_wider_network_leaves_its_layer_as_it_is(error):
    class Checked(nn.Sequential):
        def forward(self, x):
            h = self[1](self[0](x))
            if h.shape[-1] != 8:
                raise error("8 features")
            return self[2](h)

    model, (x, y) = Checked(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), data()
    plan = plan_growth(model, {}, Probe([(x, y)], mse), GrowthPolicy(moves="even"))
    assert not plan
    assert "no hidden layer can be widened" in plan.reason


@pytest.mark.parametrize("make", [lambda: nn.Embedding(9, 6, sparse=True), lambda: nn.EmbeddingBag(9, 6, sparse=True)])
def test_sparse_gradients_are_measured(make):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randint(9, (64, 3)), torch.randn(64, 1)
    model(x)
    probe = Probe(zip(x.split(16), y.split(16), strict=True), mse)
    gradient, _ = next(probe.gradients(model))
    assert gradient.numel() == sum(p.numel() for p in model.parameters())
    assert narrow_verdict(model, probe).kind
    grower = Grower(model, torch.optim.SGD(model.parameters(), 0.1), mse, GrowthPolicy(**SOON), progress=False)
    for _ in range(30):
        for batch in zip(x.split(16), y.split(16), strict=True):
            loss = mse(model, batch)
            grower.step(batch, loss)
    assert grower.events


def test_a_plan_that_the_network_does_not_follow_is_an_event(caplog):
    """Weights that are kept positive do not take signed coefficients, which only the plan has."""

    class Monotone(nn.Sequential):
        def forward(self, x):
            self[2].weight.data.clamp_(min=0)
            return super().forward(x)

    torch.manual_seed(0)
    model, (x, y) = Monotone(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), data()
    model[2].weight.data.abs_()
    policy = GrowthPolicy(**SOON, moves=signed)
    grower = Grower(model, torch.optim.SGD(model.parameters(), 1e-3), mse, policy, progress=False)
    with caplog.at_level(logging.WARNING, "splitwatch"):
        events = [event for _ in range(15) if (event := grower.step((x, y), mse(model, (x, y)).detach()))]
    assert not any(event.grown for event in events)
    assert events[0].plan.reason.startswith("not grown: plan: required outputs that change by at most")
    assert "not grown: plan" in caplog.text
    assert model[0].out_features == 4


def signed(model, geometry, probe, policy, layers):
    """A split whose second copy has a negative outgoing weight."""
    return [Split(layers[0].name, 0, (2.0, -1.0), torch.zeros(2, 7), torch.zeros(2, 1), 0.0)]


def test_a_few_losses_that_are_not_finite_do_not_end_watching():
    detector = StationarityDetector(100)
    verdicts = [detector.update(float("nan") if i % 7 == 3 else 1.0 + 1e-3 * (i % 5)) for i in range(300)]
    assert [v.kind for v in verdicts if v][-1] == "suspected"
    verdicts = [detector.update(float("nan") if i % 3 else 1.0) for i in range(300)]
    assert [v.kind for v in verdicts if v][-1] == "undecided"


# --- checkpoints, optimizers, controls -------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(4, 8), (8, 4)])
def test_an_optimizer_made_before_a_checkpoint_of_another_width_is_loaded_trains_on(widths):
    there, here = mlp(), mlp()
    for model, width in zip((there, here), widths[::-1], strict=True):
        probe = Probe([data()], mse)
        make_growable(model)
        if width == 8:
            grow(model, plan_growth(model, {}, probe, GrowthPolicy(moves="even")), probe=probe)
    optimizer = torch.optim.SGD(here.parameters(), 0.1)
    mse(here, data()).backward()
    here.load_state_dict(there.state_dict())
    assert here[0].out_features == there[0].out_features == widths[1]
    assert here[0].weight.grad is None
    before = [p.detach().clone() for p in here.parameters()]
    mse(here, data()).backward()
    optimizer.step()
    assert not any(map(torch.equal, here.parameters(), before))


def test_a_control_whose_loss_ignores_the_copy_is_dropped(caplog):
    torch.manual_seed(0)
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fixed = lambda _, batch: F.mse_loss(model(batch[0]), batch[1])  # noqa: E731
    probe = Probe([(x[:64], y[:64]), (x[64:], y[64:])], fixed)
    control = Control(model, [optimizer], fixed, probe, 5)
    before = [p.detach().clone() for p in model.parameters()]
    with caplog.at_level(logging.WARNING, "splitwatch"):
        assert not control.follow((x, y), fixed(model, (x, y)))
    assert "has to use the model that it is given" in caplog.text
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), before))


# --- several phases --------------------------------------------------------------------------------------------------


def test_an_optimizer_of_a_later_phase_is_grown_along():
    model, batch = mlp(), data()
    grower = Grower(model, torch.optim.SGD(model.parameters(), 1e-3), mse, GrowthPolicy(**SOON), progress=False)
    later = torch.optim.Adam(model.parameters(), 1e-3)
    grower.use(later)
    while not grower.growths:
        grower.step(batch, mse(model, batch).detach())
    assert {*map(id, later.param_groups[0]["params"])} == {*map(id, model.parameters())}
    with pytest.raises(SplitWatchError, match="optimizer: required one or more, found none"):
        grower.use([])
    assert Grower(model, [], mse, monitor_only=True).state_dict()["rewarm"] == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, p: measure_geometry(m, p, "0"), r"layers: required a list .* write \['0'\]"),
        (lambda m, p: measure_geometry(m, p, max_bytes=0), "max_bytes: required 1 byte or more, found 0"),
        (lambda m, p: GrowthPolicy(max_bytes=float("inf")), "max_bytes: required a finite number, found inf"),
        (lambda m, p: inner_hessian(m, "0", p, neurons=[]), "neurons: required indices from 0 to 3 of 0, found"),
        (lambda m, p: inner_hessian(m, "0", p, neurons=[0.5]), "neurons: required indices"),
        (
            lambda m, p: inner_hessian(m, find_hidden_layers(m, p)[1], p),
            "layers: 2: cannot be widened: an output layer",
        ),
        (lambda m, p: grow(m, GrowthPlan((), (), ""), "adam"), r"optimizer: required optimizers of torch\.optim"),
        (lambda m, p: Grower(m, [], None), r"loss_fn: required a function of the model and a batch, found None"),
        (lambda m, p: Grower(m, [], nn.MSELoss()), r"loss_fn: .* found a MSELoss; pass lambda model, batch"),
        (lambda m, p: Grower(m, [], mse, {}), r"policy: required a GrowthPolicy, found \{\}"),
        (lambda m, p: Grower(m, [], mse, probe=[data()]), r"probe: .* found a list; pass Probe\(batches, loss_fn\)"),
        (lambda m, p: Grower(m, [], mse, sinks=print), "sinks: required functions of an event, in a list"),
        (lambda m, p: SplitWatch(GrowthPolicy), "policy: required a GrowthPolicy, found <class"),
        (lambda m, p: SplitWatch(sinks=[None]), r"sinks: required functions of an event, in a list, found \[None\]"),
        (lambda m, p: StationarityDetector(15.5), "window: required a whole number of steps"),
        (lambda m, p: Rewarm(torch.optim.SGD(m.parameters(), 0.1), float("nan")), "steps, start: required whole"),
    ],
)
def test_odd_arguments_are_refused_by_name(call, words):
    with pytest.raises(SplitWatchError, match=words):
        call(mlp(), Probe([data()], mse))
