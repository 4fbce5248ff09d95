"""The narrow point: verdicts against dense Hessians at points found by Newton's method, and what is never claimed."""

import copy
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, grad, jacrev

from splitwatch import Probe, SplitWatchError, classify_split, diagnosis, find_hidden_layers
from splitwatch.geometry import narrow
from splitwatch.geometry.narrow import LossCurvature, narrow_verdict
from splitwatch.geometry.penalty import weight_decay_effect


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1].argmax(1))


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU, "softplus": nn.Softplus, "sin": Sine}


def network(width=2, activation="tanh", outputs=1, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), ACTIVATIONS[activation](), nn.Linear(width, outputs))
    return model.to(dtype)


def data(outputs=1, n=60, seed=3, dtype=torch.float64, activation="tanh"):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, k, generator=generator, dtype=dtype) for k in (2, outputs))
    return x, 0.4 * y + ACTIVATIONS[activation]()(1.5 * x[:, :1] - x[:, 1:] + 0.3)


def ragged(x, y, sizes=(5, 20, 31, 4)):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


class Flat:
    """The loss on all samples as a function of the flat parameters; gradient and dense Hessian from torch.func."""

    def __init__(self, model, batch, loss_fn):
        self.model, self.names = model, [name for name, _ in model.named_parameters()]
        self.shapes = [p.shape for p in model.parameters()]

        def loss(theta):
            parts = theta.split([shape.numel() for shape in self.shapes])
            parameters = {n: p.view(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}
            return loss_fn(lambda x: functional_call(model, parameters, (x,)), batch)

        self.loss, self.gradient, self.hessian = loss, grad(loss), jacrev(grad(loss))

    @property
    def theta(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def put(self, theta):
        nn.utils.vector_to_parameters(theta, self.model.parameters())

    def newton(self, steps=60):
        """Damped only by a bound on the step: ends in stationary points of every kind, or nowhere."""
        theta = self.theta
        for _ in range(steps):
            g = self.gradient(theta)
            if g.norm() <= 1e-12:
                break
            step = torch.linalg.lstsq(self.hessian(theta), -g[:, None], driver="gelsd").solution[:, 0]
            theta = theta + step * min(1.0, 0.5 / float(step.norm()))
        self.put(theta)
        return float(self.gradient(theta).norm())

    def descend(self, steps=300):
        """L-BFGS, then Newton: honest minima."""
        optimizer = torch.optim.LBFGS(
            self.model.parameters(), max_iter=steps, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = self.loss(torch.cat([p.flatten() for p in self.model.parameters()]))
            loss.backward()
            return loss

        optimizer.step(closure)
        self.model.zero_grad()
        return self.newton(20)


def a_minimum(width=1, activation="tanh", outputs=1, loss_fn=mse):
    """A network at an honest, nondegenerate minimum, the probe, and the dense reference."""
    x, y = data(outputs, activation=activation)
    for seed in range(10):
        model = network(width, activation, outputs, seed)
        flat = Flat(model, (x, y), loss_fn)
        if flat.descend() <= 1e-10 and flat.theta.norm() < 30:
            values = torch.linalg.eigvalsh(flat.hessian(flat.theta))
            if values[0] > 1e-5 * values[-1]:
                return model, Probe(ragged(x, y), loss_fn), flat
    raise AssertionError("no minimum found")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("loss_fn", "outputs"), [(mse, 1), (mse, 2), (cross_entropy, 3)])
def test_gradient_and_spectrum_equal_the_dense_ones_on_ragged_batches(activation, loss_fn, outputs):
    x, y = data(outputs)
    model = network(3, activation, outputs)
    flat, loss = Flat(model, (x, y), loss_fn), LossCurvature(model, Probe(ragged(x, y), loss_fn))
    H = flat.hessian(flat.theta)
    assert torch.allclose(loss.gradient("all"), flat.gradient(flat.theta), atol=1e-13)
    v = torch.randn(1, len(H), dtype=torch.float64)
    assert torch.allclose(loss.product(v, "all"), v @ H, atol=1e-12)
    verdict = narrow_verdict(model, Probe(ragged(x, y), loss_fn))
    values = torch.linalg.eigvalsh(H)
    assert verdict.min_eigenvalue == pytest.approx(float(values[0]), abs=1e-12)
    assert verdict.max_eigenvalue == pytest.approx(float(values[-1]), abs=1e-12)
    assert verdict.exhausted
    assert max(verdict.residuals) < 1e-12


def test_rebuilt_graphs_and_kept_ones_agree(monkeypatch):
    model, probe, _ = a_minimum()
    kept = narrow_verdict(model, probe)
    monkeypatch.setattr(narrow, "_KEPT_BYTES", 0)
    assert str(narrow_verdict(model, probe)) == str(kept)


@pytest.mark.parametrize(
    ("activation", "loss_fn", "outputs"), [("tanh", mse, 1), ("softplus", mse, 1), ("tanh", mse, 2)]
)
def test_honest_minima_are_nondegenerate_minima(activation, loss_fn, outputs):
    model, probe, _ = a_minimum(1, activation, outputs, loss_fn)
    verdict = narrow_verdict(model, probe)
    assert verdict.kind == "nondegenerate_minimum", verdict
    assert verdict.gradient_norm <= 1e-10
    assert "nondegenerate_minimum: the gradient vanishes" in str(verdict)
    assert classify_split([1.0], (0.5, 0.5), narrow=verdict.kind).kind == "minimum"


@cache
def stationary_points():
    """Where Newton's method ends from random starts: networks, and the eigenvalues of their dense Hessians."""
    found, batch = [], data()
    for seed in range(30):
        model = network(2, "tanh", 1, seed)
        flat = Flat(model, batch, mse)
        if flat.newton() <= 1e-10 and flat.theta.norm() <= 50:
            found.append((model, torch.linalg.eigvalsh(flat.hessian(flat.theta))))
    return found


@pytest.mark.parametrize("limit", [pytest.param(256, marks=pytest.mark.slow), 0])
def test_stationary_points_of_every_kind_agree_with_the_dense_hessian(limit, monkeypatch):
    """Both halves of the probe hold the same samples, so that none can veto."""
    monkeypatch.setattr(narrow, "DENSE_LIMIT", limit)
    kinds = []
    for model, values in stationary_points():
        verdict = narrow_verdict(model, Probe([data(), data()], mse))
        kinds.append(verdict.kind)
        low = float(values[0] / values[-1])
        expected = {"strict_saddle"} if low < -1e-6 else {"nondegenerate_minimum"} if low > 1e-6 else {"degenerate"}
        grey = {"degenerate", "undecided"} if abs(low) < 1e-5 else set()
        assert verdict.kind in expected | grey, (verdict, low)
    assert kinds.count("strict_saddle") >= 5
    assert set(kinds) <= {"strict_saddle", "nondegenerate_minimum", "degenerate", "undecided"}
    assert kinds.count("undecided") <= len(kinds) // 10


def widened(model, coefficients):
    """The split of the only neuron of a network."""
    first, activation, last = model
    wide = nn.Sequential(nn.Linear(2, len(coefficients)), activation, nn.Linear(len(coefficients), last.out_features))
    wide.double()
    with torch.no_grad():
        wide[0].weight.copy_(first.weight.repeat(len(coefficients), 1))
        wide[0].bias.copy_(first.bias.repeat(len(coefficients)))
        wide[2].weight.copy_(last.weight * last.weight.new_tensor(coefficients))
        wide[2].bias.copy_(last.bias)
    return wide


@pytest.mark.parametrize("coefficients", [(0.5, 0.5), (2.0, -1.0), (1.0, 1.0, -1.0)])
def test_a_split_minimum_is_degenerate_or_a_strict_saddle(coefficients):
    narrow_model, probe, _ = a_minimum()
    model = widened(narrow_model, coefficients)
    flat = Flat(model, data(), mse)
    low = float(torch.linalg.eigvalsh(flat.hessian(flat.theta))[0])
    verdict = narrow_verdict(model, probe)
    assert verdict.kind in (("degenerate",) if low > -1e-7 else ("strict_saddle", "undecided")), verdict
    if len(coefficients) == 3:
        assert low < -1e-7


def test_a_dead_neuron_is_degenerate():
    narrow_model, probe, _ = a_minimum(1, "softplus")
    model = widened(narrow_model, (1.0, 0.3))
    with torch.no_grad():
        model[0].bias[1] = -900.0  # softplus and all its derivatives underflow to zero
    verdict = narrow_verdict(model, probe)
    assert verdict.kind == "degenerate", verdict


def test_a_network_that_still_moves_is_not_stationary():
    x, y = data(n=400)
    verdict = narrow_verdict(network(2, "tanh", 1), Probe(ragged(x, y + 3, (150, 100, 100, 50)), mse))
    assert verdict.kind == "not_stationary"
    assert verdict.gradient_norm > 2 * verdict.noise > 0
    assert classify_split([1.0], (0.5, 0.5), narrow=verdict.kind).kind == "not_stationary"


def test_noise_is_the_standard_error_of_the_mean_gradient():
    model, (x, y) = network(2), data(n=4000)
    verdict = narrow_verdict(model, Probe([(x[i : i + 50], y[i : i + 50]) for i in range(0, 4000, 50)], mse))
    flats = [Flat(model, (x[i : i + 1], y[i : i + 1]), mse) for i in range(0, 4000, 8)]
    rows = torch.stack([flat.gradient(flat.theta) for flat in flats])
    assert verdict.noise == pytest.approx(float((rows.var(0).sum() / 4000).sqrt()), rel=0.2)


def test_a_gradient_within_the_noise_is_not_held_against_the_point():
    model, _, _ = a_minimum()
    x, y = data(n=4000, seed=11)
    fresh = Probe(ragged(x, y, (1000, 1500, 700, 800)), mse)
    flat = Flat(model, data(n=200_000, seed=12), mse)
    assert flat.descend() < 1e-9
    verdict = narrow_verdict(model, fresh)
    assert 1e-5 < verdict.gradient_norm < 2 * verdict.noise
    assert verdict.kind in ("undecided", "nondegenerate_minimum"), verdict
    assert "sampling" in str(verdict) or "gradient" in verdict.reason
    moved = network(2, "tanh", 1)
    assert narrow_verdict(moved, fresh, tested=True).kind != "not_stationary"


def test_float32_says_no_more_than_float64():
    model, _, _ = a_minimum()
    x, y = data()
    verdict = narrow_verdict(copy.deepcopy(model).float(), Probe(ragged(x.float(), y.float()), mse))
    assert verdict.kind == "nondegenerate_minimum", verdict
    wide = widened(model, (0.5, 0.5)).float()
    assert narrow_verdict(wide, Probe(ragged(x.float(), y.float()), mse)).kind != "nondegenerate_minimum"


class Quadratic(nn.Module):
    """L = ½ Σ a_i θ_i² at θ = point, a the mean of the batch's rows."""

    def __init__(self, point):
        super().__init__()
        self.theta = nn.Parameter(point.clone())

    def forward(self, a):
        return 0.5 * (a @ self.theta.square()).mean()


def bowl(rows, point=None):
    batches = [torch.as_tensor(row, dtype=torch.float64).expand(2, -1) for row in rows]
    point = torch.zeros(batches[0].shape[1], dtype=torch.float64) if point is None else point
    return Quadratic(point), Probe(batches, lambda model, batch: model(batch))


def test_a_direction_that_rises_on_one_half_is_not_a_strict_saddle():
    model, probe = bowl([[1.0, -2.0], [1.0, 1.0]])
    verdict = narrow_verdict(model, probe)
    assert (verdict.kind, verdict.min_eigenvalue) == ("undecided", -0.5)
    assert "halves" in verdict.reason
    assert narrow_verdict(model, probe, half="fitted").kind == "strict_saddle"
    assert narrow_verdict(model, probe, half="held_out").kind == "nondegenerate_minimum"
    assert narrow_verdict(*bowl([[1.0, -2.0], [1.0, -0.1]])).kind == "strict_saddle"
    assert narrow_verdict(*bowl([[1.0, 0.0], [1.0, 0.0]])).kind == "degenerate"


def test_a_minimum_is_claimed_only_where_the_spectrum_is_known():
    many = torch.linspace(1, 2, 400, dtype=torch.float64)
    verdict = narrow_verdict(*bowl([many, many]))
    assert (verdict.kind, verdict.exhausted) == ("undecided", False)
    assert verdict.min_eigenvalue == pytest.approx(1, abs=1e-2)
    few = torch.tensor([1.0, 2.0, 3.0]).repeat(100)
    verdict = narrow_verdict(*bowl([few, few]))
    assert (verdict.kind, verdict.exhausted) == ("nondegenerate_minimum", True)
    many[7] = -0.5
    assert narrow_verdict(*bowl([many, many])).kind == "strict_saddle"


def test_what_has_no_second_derivative_is_undecided():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            return grad

    model, probe = bowl([[1.0, 2.0], [1.0, 2.0]])
    probe = Probe(probe.fitted + probe.held_out, lambda model, batch: Once.apply(model(batch) + 1).square())
    verdict = narrow_verdict(model, probe)
    assert verdict.kind == "undecided"
    assert "Hessian cannot be measured" in verdict.reason
    assert math.isnan(verdict.min_eigenvalue)


def test_attention_has_a_second_derivative():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 1)

        def forward(self, x):
            return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))).mean(1)

    torch.manual_seed(0)
    verdict = narrow_verdict(Attention(), Probe([(torch.randn(8, 5, 4), torch.randn(8, 1))], mse))
    assert "measured" not in verdict.reason
    assert math.isfinite(verdict.min_eigenvalue)


def test_nothing_is_disturbed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    model[0].bias.requires_grad_(False)
    x, y = data()
    mse(model, (x, y)).backward()
    before, grads = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in grads]
    versions, rng = [t._version for t in (*model.parameters(), *model.buffers())], torch.get_rng_state()
    verdict = narrow_verdict(model, Probe(ragged(x, y), mse))
    assert math.isfinite(verdict.noise)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert versions == [t._version for t in (*model.parameters(), *model.buffers())]
    for p, g, value in zip(model.parameters(), grads, values, strict=True):
        assert p.grad is g
        assert g is None or torch.equal(g, value)


def test_gradients_switched_off_by_the_caller_change_nothing():
    model, probe, _ = a_minimum()
    verdict = narrow_verdict(model, probe)
    with torch.no_grad():
        assert str(narrow_verdict(model, probe)) == str(verdict)


def test_frozen_parameters_do_not_count():
    model, probe = bowl([[1.0, 2.0], [1.0, 2.0]])
    model.extra = nn.Parameter(torch.zeros(3), requires_grad=False)
    assert narrow_verdict(model, probe).kind == "nondegenerate_minimum"
    model.extra.requires_grad_(True)  # trainable, but of no effect
    assert narrow_verdict(model, probe).kind == "degenerate"
    with pytest.raises(SplitWatchError, match="trainable"):
        narrow_verdict(model.requires_grad_(False), probe)


def test_the_narrow_point_is_looked_at_where_that_is_cheap(monkeypatch):
    asked = []
    monkeypatch.setattr(diagnosis, "narrow_verdict", lambda *a, **k: asked.append(k) or narrow_verdict(*a, **k))
    x, y = data(dtype=torch.float32, n=256)
    model, probe = network(1, dtype=torch.float32), Probe([(x, y)], mse)
    assert diagnosis.narrow_point(model, probe).kind in ("undecided", "nondegenerate_minimum", "strict_saddle")
    assert asked == [{"tested": True}]
    monkeypatch.setattr(diagnosis, "NARROW_LIMIT", 2)
    assert diagnosis.narrow_point(model, probe) is None
    assert len(asked) == 1


@pytest.mark.parametrize("coefficients", [(0.5, 0.5), (2.0, -1.0), (1.0, 1.0, -1.0), (1.0, 0.0)])
@pytest.mark.parametrize("decay", [(0.01, 0.03), (0.02, None)])
def test_weight_decay_formulas_equal_autograd_of_the_penalised_loss(coefficients, decay):
    mu, nu = decay[0], decay[0] if decay[1] is None else decay[1]

    def penalised(model, batch):
        base = model if isinstance(model, nn.Module) else None
        w = base[0].weight, base[0].bias
        return mse(model, batch) + mu / 2 * sum(p.square().sum() for p in w) + nu / 2 * base[2].weight.square().sum()

    x, y = data()
    model = network(1)
    newton_to_a_minimum(model, lambda: penalised(model, (x, y)))
    probe = Probe(ragged(x, y), mse)
    (layer,) = [layer for layer in find_hidden_layers(model, probe) if layer.growable]
    effect = weight_decay_effect(model, layer, 0, coefficients, weight_decay_in=mu, weight_decay_out=decay[1])
    wide = widened(model, coefficients)
    loss = penalised(wide, (x, y))
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(wide.parameters()))]).norm()
    assert effect.gradient_norm == pytest.approx(float(norm), rel=1e-7)
    assert effect.loss_jump == pytest.approx((loss - penalised(model, (x, y))).item(), rel=1e-9, abs=1e-14)
    assert str(effect).startswith("the penalty gives the split a gradient of norm")


def newton_to_a_minimum(model, closure):
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def evaluate():
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(evaluate)
    assert torch.cat([p.grad.flatten() for p in parameters]).norm() < 1e-10


def test_weight_decay_refuses_coefficients_that_do_not_sum_to_one_and_knows_no_effect():
    model = network(1)
    (layer, *_) = find_hidden_layers(model, Probe(ragged(*data()), mse))
    with pytest.raises(SplitWatchError, match="sum to 1"):
        weight_decay_effect(model, layer, 0, (1.0, 1.0), weight_decay_in=0.1)
    none = weight_decay_effect(model, layer, 0, (0.5, 0.5), weight_decay_in=0.0)
    assert (none.gradient_norm, none.loss_jump) == (0, 0)
    assert "stationary" in str(none)


def test_hooks_on_parameters_change_no_verdict():
    """Clipping as a hook would be part of every product with the Hessian."""
    model, probe = network(), Probe([data()], mse)
    alone, calls = narrow_verdict(model, probe), []
    hook = model[0].weight.register_hook(lambda gradient: calls.append(0) or 0.01 * gradient)
    assert str(narrow_verdict(model, probe)) == str(alone)
    assert not calls
    hook.remove()
