"""Layers whose width is written into the model's code are measured and left as they are; nothing ends training."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitwatch import (
    Grower,
    GrowthPlan,
    GrowthPolicy,
    Probe,
    SplitWatchError,
    UnsupportedLayerError,
    find_hidden_layers,
    grow,
    measure_geometry,
    plan_growth,
)
from splitwatch.growth.cost import duplicate

SOON = GrowthPolicy(
    window=10, tolerance=1e9, noise_ratio=1e9, max_events=1, max_neurons=1, max_overhead=None, probe_samples=32
)


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
        self.f1, self.f2 = nn.Linear(12, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = F.max_pool2d(F.gelu(self.c1(x)), 2)
        x = F.max_pool2d(F.gelu(self.c2(x)), 2)
        return self.f2(F.gelu(self.f1(x.view(-1, 12))))


class Attention(nn.Module):
    """Two heads of two, sizes written out; ``fused`` or by hand."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.f, self.g = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        q, k, v = (layer(x).view(*x.shape[:2], 2, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) / math.sqrt(2)).softmax(-1) @ v
        x = x + self.o(y.transpose(1, 2).reshape(x.shape))
        return self.g(F.gelu(self.f(x)))[:, 0]


def swish(z):
    return z * torch.sigmoid(z)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that TorchScript is old
    scripted = torch.jit.script(swish)


class Hidden(nn.Module):
    """A second reader of ``a`` that TorchScript hides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(torch.tanh(h)) + self.c(scripted(h))


class Insists(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        assert h.shape[1] == 3, "three features"
        return self.b(h)


MODELS = {
    "view": (LeNet, (1, 8, 8), "c2", "invalid for input of size"),
    "fused attention": (lambda: Attention(True), (5, 4), "v", "invalid for input of size"),
    "attention by hand": (lambda: Attention(False), (5, 4), "v", "invalid for input of size"),
    "a reader out of sight": (Hidden, (4,), "a", "shapes cannot be multiplied"),
    "an assertion": (Insists, (4,), "a", "three features"),
}


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def made(name, samples=64):
    torch.manual_seed(0)
    make, shape, left_out, error = MODELS[name]
    x = torch.randn(samples, *shape)
    return make(), (x, torch.sin(2 * x.flatten(1)[:, :2])), left_out, error


@pytest.mark.parametrize("name", MODELS)
def test_what_the_code_does_not_follow_is_left_out_and_the_rest_grows(name):
    model, batch, left_out, error = made(name)
    probe, held = Probe([batch], mse), list(model.parameters())
    before = [p.clone() for p in held]
    geometry = measure_geometry(model, probe)
    assert left_out in geometry

    plan = plan_growth(model, geometry, probe, GrowthPolicy(max_neurons=None, max_ratio=3.0))

    refusal = f"left out: {left_out}: can be measured, cannot be widened: the forward pass does not follow its width ("
    assert plan.reason.count("left out") == 1
    assert refusal in plan.reason
    assert error in plan.reason
    assert {layer.name for layer in plan.layers} == {*geometry} - {left_out}
    assert all(p is q and torch.equal(p, value) for p, q, value in zip(held, model.parameters(), before, strict=True))
    event = grow(model, plan, probe=probe)
    assert event.grown == bool(len(geometry) > 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_schedule_leaves_it_out_too(name):
    model, batch, left_out, _ = made(name)
    plan = plan_growth(model, {}, Probe([batch], mse), GrowthPolicy(moves="even", max_ratio=1.5))
    assert f"left out: {left_out}: " in plan.reason
    assert left_out not in {move.layer for move in plan.moves}


@pytest.mark.parametrize(
    ("name", "monitor_only"), [pytest.param("view", False, marks=pytest.mark.slow), ("fused attention", True)]
)
def test_training_goes_on(name, monitor_only):
    model, (x, y), left_out, _ = made(name)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    grower = Grower(model, optimizer, mse, SOON, progress=False, monitor_only=monitor_only)
    for step in range(12):
        rows = torch.arange(8) + 8 * (step % 8)
        loss = mse(model, (x[rows], y[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grower.step((x[rows], y[rows]), loss)
    told = [event.plan.reason for event in grower.events if left_out in event.geometry or event.grown]
    assert told
    assert all(f"left out: {left_out}: " in reason for reason in told)


@pytest.mark.parametrize("name", MODELS)
def test_asked_for_by_name_it_is_refused(name):
    model, batch, left_out, error = made(name)
    probe = Probe([batch], mse)
    geometry = measure_geometry(model, probe, [left_out])
    with pytest.raises(UnsupportedLayerError, match=rf"layers: {left_out}: .*does not follow its width \(.*{error}"):
        plan_growth(model, geometry, probe, GrowthPolicy(layers=[left_out]))


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_made_by_hand_is_undone(name):
    model, batch, left_out, _ = made(name)
    probe, held = Probe([batch], mse), list(model.parameters())
    (layer,) = (layer for layer in find_hidden_layers(model, probe) if layer.name == left_out)
    plan = GrowthPlan((layer,), (duplicate(model, layer, 0),), "by hand")
    with pytest.raises(SplitWatchError, match=r"follows the modules' widths, found a failure after widening"):
        grow(model, plan, probe=probe)
    assert all(p is q for p, q in zip(held, model.parameters(), strict=True))


def test_what_fails_for_want_of_memory_says_nothing_about_widths():
    model, batch, _, _ = made("an assertion")
    probe = Probe([batch], mse)
    geometry = measure_geometry(model, probe)

    def too_large(module, _inputs, output):
        if output.shape[1] > 3:
            raise torch.OutOfMemoryError("no room")

    model.a.register_forward_hook(too_large)
    with pytest.raises(torch.OutOfMemoryError):
        plan_growth(model, geometry, probe)


def test_fused_attention_has_the_geometry_of_attention_by_hand():
    """Fused kernels differentiate once; the curvature of a value projection needs them twice."""
    (fused, batch, _, _), (by_hand, _, _, _) = made("fused attention"), made("attention by hand")
    probe = Probe([batch], mse)
    found, expected = measure_geometry(fused, probe, ["v"])["v"], measure_geometry(by_hand, probe, ["v"])["v"]
    for name in ("min_eigenvalue", "max_eigenvalue", "coupling_norm", "escape_eigenvalue"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-6)
