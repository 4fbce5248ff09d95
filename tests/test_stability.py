"""New outgoing weights begin with second moments that keep their steps stable, and with the carried ones elsewhere."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitwatch import GrowthPlan, Probe, Split, Sprout, find_hidden_layers, grow
from splitwatch.growth import stability
from splitwatch.growth.surgery import prepare

OLD, NEW, OUT = 4, 12, 2
HIGH = 0.3
"""A learning rate that the old neurons bear."""
LASTING = 1 - 1e-10
"""A factor of second moments that keeps them what they are."""


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def data(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=1)


def trained(rate, make=torch.optim.Adam, factor=1.0, steps=100, **settings):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, OLD), nn.Softplus(), nn.Linear(OLD, OUT)).double()
    optimizer = make(model.parameters(), rate, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        (factor * mse(model, data())).backward()
        optimizer.step()
    return model, optimizer


def sprouted(model, probe):
    """Sprouts and a split, as a plan; their outgoing weights are what a plan would give them, small."""
    layer, _ = find_hidden_layers(model, probe)
    generator = torch.Generator().manual_seed(2)
    w, v = torch.randn(NEW, 4, generator=generator), 0.01 * torch.randn(NEW, OUT, generator=generator)
    sprouts = [Sprout(layer.name, *pair) for pair in zip(w.double(), v.double(), strict=True)]
    u = 0.01 * torch.randn(2, 4, generator=generator).double()
    split = Split(layer.name, 1, (0.5, 0.5), u - u.mean(0), torch.zeros(2, OUT, dtype=torch.float64), 0.1)
    return GrowthPlan((layer,), (split, *sprouts), "")


def limits_share(model, optimizer):
    """The largest eigenvalue of the preconditioned Hessian in new outgoing weights over the limit, in closed form.

    The mean squared error of outputs V φ has the Hessian 2/(n · outputs) φᵀφ in each row of V.
    """
    weight, (group,) = model[2].weight, optimizer.param_groups
    features = model[1](model[0](data()[0]))[:, OLD:].detach()
    hessian = 2 / (len(features) * OUT) * features.T @ features
    state, (key, rule) = optimizer.state[weight], stability._KINDS[type(optimizer)]
    stride, correction, eps = rule(group, float(state["step"]))
    size = ((state[key] / correction).sqrt() + eps)[:, OLD:]
    largest = max(torch.linalg.eigvalsh(hessian / (row.sqrt()[:, None] * row.sqrt())).max() for row in size)
    return float(largest) * group["lr"] * stride


def grown(rate, probed=True, **settings):
    model, optimizer = trained(rate, **settings)
    probe = Probe([data(), data(seed=1)], mse)
    plan = sprouted(model, probe)
    grow(model, plan, optimizer, probe=probe if probed else None)
    return model, optimizer


@pytest.mark.parametrize(
    ("make", "rate", "settings"),
    [
        (torch.optim.Adam, HIGH, {}),
        (torch.optim.AdamW, HIGH, {"betas": (0.8, 0.99)}),
        (torch.optim.Adam, HIGH, {"eps": 0.1}),
        (torch.optim.NAdam, 0.05, {}),
        (torch.optim.RAdam, HIGH, {}),
        (torch.optim.RMSprop, HIGH, {"momentum": 0.9}),
    ],
)
@pytest.mark.parametrize(("products", "within"), [(stability.PRODUCTS, 0.25), (NEW * OUT, 1e-3)])
def test_at_a_high_rate_new_outgoing_weights_have_a_share_of_the_limit(
    make, rate, settings, products, within, monkeypatch
):
    """Nearly after a few products, exactly after as many as there are weights."""
    monkeypatch.setattr(stability, "PRODUCTS", products)
    carried, steadied = (grown(rate, probed, make=make, steps=300, **settings) for probed in (False, True))
    assert limits_share(*carried) > 2 * stability.SHARE
    assert limits_share(*steadied) == pytest.approx(stability.SHARE, rel=within)


def test_only_new_outgoing_weights_begin_slower():
    carried, steadied = (grown(HIGH, probed) for probed in (False, True))
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        before, after = (o.state[m.get_parameter(name)]["exp_avg_sq"] for m, o in (carried, steadied))
        if name == "2.weight":
            factor = after[:, OLD:] / before[:, OLD:]
            assert factor.min() > 2
            assert torch.allclose(factor, factor.max(), rtol=1e-5)
            before, after = before[:, :OLD], after[:, :OLD]
        assert torch.equal(before, after)


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_what_is_stable_is_left_as_it_was_carried(rate):
    carried, steadied = (grown(rate, probed) for probed in (False, True))
    assert limits_share(*carried) < stability.SHARE
    for one, other in zip(carried[1].state.values(), steadied[1].state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


KIN = [
    (torch.optim.Adam, {"betas": (0.0, LASTING)}),
    (torch.optim.Adam, {"betas": (0.5, LASTING)}),
    (torch.optim.Adam, {"betas": (0.9, LASTING)}),
    (torch.optim.NAdam, {"betas": (0.9, LASTING)}),
    (torch.optim.NAdam, {"betas": (0.5, LASTING), "momentum_decay": 0.0}),
    (torch.optim.RAdam, {"betas": (0.9, LASTING)}),
    (torch.optim.RMSprop, {"alpha": LASTING}),
    (torch.optim.RMSprop, {"alpha": LASTING, "momentum": 0.9}),
]


def on_a_line(make, step, moment=0.04, eps=0.0, **settings):
    """One parameter at 1 whose optimizer has made so many steps, and what is told of its limit."""
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = make([x], 0.01, eps=eps, **settings)
    key, rule = stability._KINDS[make]
    for name in ("exp_avg", "momentum_buffer"):
        optimizer.state[x][name] = torch.zeros_like(x)
    optimizer.state[x] |= {"step": torch.tensor(float(step)), "mu_product": torch.tensor(0.0)}
    optimizer.state[x][key] = torch.full_like(x, moment).detach()
    return x, optimizer, key, rule(optimizer.param_groups[0], float(step))


@pytest.mark.parametrize(("make", "settings"), KIN)
@pytest.mark.parametrize("share", [0.95, 1.05])
def test_steps_are_stable_below_the_limit_and_not_above(make, settings, share):
    """On a parabola, with second moments that stay what they are."""
    x, optimizer, key, (stride, correction, _) = on_a_line(make, 1e12, **settings)
    assert correction == 1
    curvature = share / (0.01 * stride) * 0.04**0.5
    for _ in range(2000):
        optimizer.state[x][key].fill_(0.04)
        x.grad = curvature * x.detach()
        optimizer.step()
    assert (abs(x.item()) < 1) == (share < 1)


@pytest.mark.parametrize("step", [3, 10, 1000])
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.Adam, {"betas": (0.0, 0.99)}),
        (torch.optim.NAdam, {"betas": (0.0, 0.99)}),
        (torch.optim.RAdam, {"betas": (0.0, 0.99)}),
        (torch.optim.RMSprop, {}),
    ],
)
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_strides_are_those_of_the_moment(make, settings, step, eps):
    """Without a memory of gradients a step is twice the stride, times the gradient over what divides it."""
    x, optimizer, key, _ = on_a_line(make, step, eps=eps, **settings)
    rule = stability._KINDS[make][1]
    stride, (_, correction, floor) = (rule(optimizer.param_groups[0], float(t)) for t in (step, step + 1))
    if make is torch.optim.RMSprop:  # its stride is in units of moments as old as they are when the step is made
        stride = rule(optimizer.param_groups[0], step + 1.0)
    x.grad = torch.full_like(x, 0.2)
    optimizer.step()
    moved, root = 1 - x.item(), (optimizer.state[x][key].item() / correction) ** 0.5 + floor
    assert (stride[0] == 0) == (make is torch.optim.RAdam and step == 3)
    if stride[0]:
        assert moved == pytest.approx(0.01 * 2 * stride[0] * 0.2 / root, rel=1e-9)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RMSprop])
def test_the_loss_does_not_jump_after_growth(make):
    def worst(probed):
        model, optimizer = grown(HIGH, probed, make=make)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = mse(model, data())
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
        return max(losses) / losses[0]

    assert worst(True) < 0.5 * worst(False)


class Prodigious(torch.optim.Optimizer):
    """Adam whose rate is a factor of one that it finds by itself."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "d": 1e-6})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("step", torch.tensor(0.0)).add_(1)
                state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(p.grad.square(), 0.001)
                p -= group["lr"] * group["d"] * p.grad / state["exp_avg_sq"].sqrt()


class SignedRMSprop(torch.optim.RMSprop):
    """With settings and steps of its own."""

    def __init__(self, params, lr):
        torch.optim.Optimizer.__init__(self, params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("step", torch.tensor(0.0)).add_(1)
            state.setdefault("square_avg", torch.zeros_like(p)).lerp_(p.grad.square(), 0.01)
            p -= 1e-3 * self.param_groups[0]["lr"] * p.grad.sign()


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.Adagrad, {}),
        (Prodigious, {}),
        (SignedRMSprop, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.Adam, {"amsgrad": True}),
    ],
)
def test_other_optimizers_keep_what_was_carried(make, settings):
    carried, steadied = (grown(HIGH, probed, make=make, **settings) for probed in (False, True))
    for one, other in zip(carried[1].state.values(), steadied[1].state.values(), strict=True):
        assert all(one[key] is None or torch.equal(one[key], other[key]) for key in one)


def test_a_young_rmsprop_is_not_taken_for_one_with_another_loss():
    """Its second moments are not corrected for their age, and small after few steps."""
    model, optimizer = trained(1e-6, torch.optim.RMSprop, steps=3)
    optimizer.param_groups[0]["lr"] = 0.01
    probe = Probe([data(), data(seed=1)], mse)
    grow(model, sprouted(model, probe), optimizer, probe=probe)
    assert limits_share(model, optimizer) == pytest.approx(stability.SHARE, rel=0.25)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop])
def test_optimizers_that_begin_to_count_anew_grow(make):
    model, optimizer = trained(HIGH, make)
    for state in optimizer.state.values():
        state["step"].zero_()
    probe = Probe([data(), data(seed=1)], mse)
    assert grow(model, sprouted(model, probe), optimizer, probe=probe).grown


class Once(torch.autograd.Function):
    """An identity without second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


def test_a_loss_that_is_differentiated_only_once_is_no_special_case():
    once, twice = (
        Probe([data(), data(seed=1)], loss) for loss in (lambda m, b: mse(lambda x: Once.apply(m(x)), b), mse)
    )
    found = []
    for probe in (once, twice):
        model, optimizer = trained(HIGH)
        grow(model, sprouted(model, probe), optimizer, probe=probe)
        found.append(optimizer.state[model[2].weight]["exp_avg_sq"])
    assert torch.equal(*found)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_new_outgoing_weights_are_not_stopped_where_training_scales_the_loss(factor):
    """Adam's steps are the same then; its second moments are in other units than the probe's curvature."""
    plain, scaled = grown(HIGH), grown(HIGH, factor=factor)
    found = []
    for model, optimizer in (plain, scaled):
        moment = optimizer.state[model[2].weight]["exp_avg_sq"]
        found.append(float(moment[:, OLD:].mean() / moment[:, :OLD].mean()))
    assert found[1] < 20 * found[0]  # 10,000 times without a look at the gradients' sizes


def test_growth_is_undone_where_memory_runs_out(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(stability, "_curvature", full)
    model, optimizer = trained(HIGH)
    before, state = [*model.parameters()], copy.deepcopy(optimizer.state_dict())
    probe = Probe([data(), data(seed=1)], mse)
    with pytest.raises(torch.OutOfMemoryError):
        grow(model, sprouted(model, probe), optimizer, probe=probe)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_added_entries_are_columns_of_new_neurons():
    """In a layer between two that grow: columns by its producer's moves, rows by its own."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    probe = Probe([(torch.randn(8, 2), torch.randn(8, 1))], mse)
    first, second, _ = find_hidden_layers(model, probe)
    moves = (Sprout(first.name, torch.randn(3), torch.randn(2)), Sprout(second.name, torch.randn(4), torch.randn(1)))
    plan = GrowthPlan((first, second), moves, "")
    (between,) = (item for item in prepare(model, plan).replacements if item.old is model[2].weight)
    assert between.added.tolist() == [[False] * 3 + [True]] * 3
    split = Split(first.name, 0, (0.5, 0.5), torch.zeros(2, 3), torch.zeros(2, 2), 0.0)
    (between,) = (x for x in prepare(model, replace(plan, moves=(split,))).replacements if x.old is model[2].weight)
    assert between.added.tolist() == [[False] * 3 + [True]] * 2


def test_new_outgoing_weights_are_slowed_down_no_more_than_is_told(monkeypatch):
    monkeypatch.setattr(stability, "_curvature", lambda *_: 1e6)
    carried, steadied = (grown(HIGH, probed) for probed in (False, True))
    before, after = (o.state[m[2].weight]["exp_avg_sq"][:, OLD:] for m, o in (carried, steadied))
    torch.testing.assert_close(after, stability.MOST**2 * before, rtol=1e-4, atol=0.0)
