"""Small networks f(x) = Σ_r v_r ρ(w_r·x) with data exactly on the kinks, at points stationary to rounding.

Targets are chosen so that the residual satisfies the (in)equalities of directional stationarity. The loss is quadratic
within an activation pattern, so one-sided differences of three points give its one-sided derivatives exactly.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.probe import Probe

N, D, M = 24, 4, 3


class Abs(nn.Module):
    def forward(self, x):
        return x.abs()


ACTIVATIONS = {"relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.3), "prelu": lambda: nn.PReLU(M), "abs": Abs}


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def network(activation="relu", outputs=2, bias=False, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(D, M, bias=bias), ACTIVATIONS[activation](), nn.Linear(M, outputs, bias=False)
    ).double()
    with torch.no_grad():
        for p in model[0].parameters():
            p.copy_(torch.randn_like(p))
        model[2].weight.copy_(torch.randn_like(model[2].weight))
    return model


def data(model, kinks):
    """Inputs, the first ``kinks[r]`` of them on the kink of neuron r, all others well away from any."""
    w, b = model[0].weight.detach(), model[0].bias

    def apart(x, own=None):
        z = model[0](x).detach()
        return (z.abs() > 0.1).all(1) if own is None else (z[:, [q for q in range(M) if q != own]].abs() > 0.1).all(1)

    x = torch.randn(600, D, dtype=torch.float64)
    rows = [x[apart(x)][: N - sum(kinks)]]
    for r, count in enumerate(kinks):
        shift = x @ w[r] + (0.0 if b is None else b.detach()[r])
        on = x - shift[:, None] * w[r] / (w[r] @ w[r])
        rows.append(on[apart(on, r)][:count])
    x = torch.cat(rows[::-1])
    assert len(x) == N
    return x


def probe_of(model, x, signals=None):
    """A probe whose loss has the given gradients in the outputs (random ones by default), in two uneven batches."""
    f = model(x).detach()
    e = torch.randn_like(f) / f.numel() if signals is None else signals
    y = f - e * f.numel() / 2
    return Probe([(x[:10], y[:10]), (x[10:], y[10:])], mse)


def growable(model, probe):
    return select_layers(find_hidden_layers(model, probe), None)[0]


def moved(model, incoming, outgoing=None):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight += incoming[:, :D]
        if other[0].bias is not None:
            other[0].bias += incoming[:, D]
        if outgoing is not None:
            other[2].weight += outgoing.T
    return other


def derivative(model, probe, incoming, step=1e-3):
    """The one-sided derivative of a loss that is quadratic for small steps."""
    zero, half, full = (probe.loss(moved(model, s * incoming), "all") for s in (0.0, step / 2, step))
    return (4 * half - full - 3 * zero) / step


def single(r, u):
    rows = torch.zeros(M, len(u), dtype=torch.float64)
    rows[r] = u
    return rows


def slopes(model, x, r):
    """ρ' of neuron r on every input, both sides."""
    z = model[0](x).detach()
    up, down = (model[1](s * torch.ones_like(z)).detach() * s for s in (1.0, -1.0))
    return up[:, r], down[:, r]


def stationary(activation, outputs, kinks, seed, silent=False):
    """A model and probe at a directional stationary point: linear conditions on the residual, signs by search."""
    model = network(activation, outputs, seed=seed)
    if silent:
        with torch.no_grad():
            model[2].weight[:, 0] = 0
    x = data(model, kinks)
    z, v = model[0](x).detach(), model[2].weight.detach()
    on_kink = z.abs() < 1e-9
    rows = []
    for r in range(M):
        up, down = slopes(model, x, r)
        mean = torch.where(on_kink[:, r], (up + down) / 2, torch.where(z[:, r] > 0, up, down))
        rows += [torch.outer(mean * x[:, a], v[:, r]).flatten() for a in range(D)]  # v·G̃ = 0
        for j in range(outputs):  # ∂L/∂v = 0
            row = torch.zeros(N, outputs, dtype=x.dtype)
            row[:, j] = model[1](z).detach()[:, r]
            rows.append(row.flatten())
    A = torch.stack(rows)
    kernel = torch.linalg.svd(A).Vh[torch.linalg.matrix_rank(A) :]
    height = torch.zeros(N, N * outputs, dtype=x.dtype)
    for i, r in on_kink.nonzero().tolist():
        up, down = slopes(model, x, r)
        height[i, i * outputs : (i + 1) * outputs] = v[:, r] * (up - down)[i] / 2
    height = height[on_kink.any(1)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4000):
        e = kernel.T @ torch.randn(len(kernel), generator=generator, dtype=x.dtype)
        if bool((height @ e >= 0).all()):
            return model, probe_of(model, x, e.reshape(N, outputs) / (N * outputs))
    pytest.skip("no residual with the right signs found")


def lowest_nearby(model, probe, samples=4000, seed=0):
    """The lowest loss change of random perturbations of all weights, of every size."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.cat(parts) for parts in zip(*probe.half("all"), strict=True))
    w, v = model[0].weight.detach(), model[2].weight.detach()
    q, s = samples, 10 ** torch.empty(samples, 1, 1, dtype=w.dtype).uniform_(-5, -2.5, generator=generator)
    ratio = 10 ** torch.empty(samples, 1, 1, dtype=w.dtype).uniform_(-2, 2, generator=generator)
    keep = (torch.rand(q, M, 1, generator=generator) < 0.6).to(w.dtype)
    W = w + s * ratio.clamp(max=1) * keep * torch.randn(q, M, D, generator=generator, dtype=w.dtype)
    V = v + s / ratio.clamp(min=1) * torch.randn(q, *v.shape, generator=generator, dtype=w.dtype)
    f = model[1](torch.einsum("nd,qmd->qnm", x, W).flatten(0, 1)).detach().unflatten(0, (q, -1)) @ V.transpose(1, 2)
    return float(((f - y) ** 2).mean((1, 2)).min()) - probe.loss(model, "all")
