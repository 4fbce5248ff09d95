"""Small ReLU networks at points that are directionally stationary, or just miss it, with data exactly on their kinks.

f(x) = V ρ(W x) with squared loss. Inputs are placed on kinks; then the residual is solved for: directional stationarity
is linear in it, apart from the signs of the bends at kinks, which are prescribed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

N, D, M = 40, 4, 3
KINKS = ((0, 0, 0), (0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 0, 1), (0, 4, 0), (3, 2, 1), (6, 0, 0), (0, 1, 5))
RESIDUALS = {  # how the residual is chosen → share of the points
    "stationary": 5,
    "uncoupled": 3,  # d(u) = 0 off the kinks: candidates for minima with several outputs
    "silent": 2,  # neuron 0 has no outgoing weights
    "silent, uncoupled": 1,
    "edge": 1,  # D(u) = 0 on one whole side of every kink
    "edge, uncoupled": 1,
    "unfelt": 1,  # the residual on kink samples is across v, so that the loss does not bend there
    "unfelt, uncoupled": 1,
    "concave": 1,  # the loss bends downwards at one kink
    "outgoing": 1,  # stationary in W, not in V
    "random": 1,
}


@dataclass(frozen=True)
class Recipe:
    residual: str
    outputs: int
    kinks: tuple[int, ...]
    shared: bool
    bias: bool
    leak: float

    @classmethod
    def draw(cls, rng: torch.Generator) -> Recipe:
        def pick(options):
            return options[int(torch.randint(len(options), (1,), generator=rng))]

        residual = pick([name for name, share in RESIDUALS.items() for _ in range(share)])
        several = residual.startswith("unfelt") or residual in ("outgoing", "edge, uncoupled")
        kinks = pick(KINKS[2:] if residual.startswith(("edge", "concave", "unfelt")) else KINKS)
        shared = kinks[1] == 0 < kinks[0] and pick((True, False))
        return cls(
            residual, pick((2, 3) if several else (1, 1, 2, 3)), kinks, shared, pick((0, 1)) == 1, pick((0, 0.3))
        )


@dataclass(frozen=True)
class Net:
    """A network and its data, bias included: x (N, d), y (N, c), w (m, d), v (m, c)."""

    x: Tensor
    y: Tensor
    w: Tensor
    v: Tensor
    leak: float

    def outputs(self, w: Tensor, v: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.x @ w.mT, self.leak) @ v

    def signals(self) -> Tensor:
        """Gradients e (N, c) of the mean loss in the outputs."""
        return 2 * (self.outputs(self.w, self.v) - self.y) / self.y.numel()

    def changes(self, w: Tensor, v: Tensor) -> Tensor:
        """Changes of the loss for steps w (q, m, d) and v (q, m, c), without cancellation."""
        f, g = self.outputs(self.w, self.v), self.outputs(self.w + w, self.v + v)
        return ((g - f) * (g + f - 2 * self.y)).mean((1, 2))

    def on_kink(self) -> Tensor:
        return (self.x @ self.w.T).abs() < 1e-9

    def widened(self, model: nn.Module) -> Net:
        return Net(self.x, self.y, *weights(model), self.leak)


def weights(model: nn.Module) -> tuple[Tensor, Tensor]:
    first, _, last = model.children()
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    w = first.weight if first.bias is None else torch.cat([first.weight, first.bias[:, None]], dim=1)
    return w.detach(), last.weight.detach().T


def build(recipe: Recipe, rng: torch.Generator) -> tuple[nn.Sequential, Net] | None:
    """A network at the point that the recipe describes, if there is one."""
    path = nn.LeakyReLU(recipe.leak) if recipe.leak else nn.ReLU()
    outputs = nn.Linear(M, recipe.outputs, bias=False)
    model = nn.Sequential(nn.Linear(D, M, bias=recipe.bias), path, outputs).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
        if recipe.shared and recipe.outputs == 1:  # one residual cannot bend the loss upwards for both signs of v
            outputs.weight.abs_()
        if "silent" in recipe.residual:
            outputs.weight[:, 0] = 0
    w, v = weights(model)
    x = inputs(recipe, w, rng)
    if x is None:
        return None
    blank = Net(x, torch.zeros(N, recipe.outputs, dtype=x.dtype), w, v, recipe.leak)
    e = residuals(recipe, blank, rng)
    return None if e is None else (model, Net(x, blank.outputs(w, v) - e / 2, w, v, recipe.leak))


def inputs(recipe: Recipe, w: Tensor, rng: torch.Generator) -> Tensor | None:
    """Inputs of which ``kinks[r]`` are on the kink of neuron r; the first also on that of neuron 1 if ``shared``."""
    x = torch.randn(600, D, generator=rng, dtype=torch.float64)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if recipe.bias else x
    on: list[tuple[int, ...]] = [(r,) for r, count in enumerate(recipe.kinks) for _ in range(count)]
    on = [(0, 1), *on[1:]] if recipe.shared else on
    rows = []
    for group in on + [()] * (N - len(on)):
        moved = x.clone()
        if group:
            normals = w[list(group), :D]
            moved[:, :D] -= torch.linalg.lstsq(normals, (x @ w[list(group)].T).T).solution.T
        away = [r for r in range(M) if r not in group]
        fits = ((moved @ w[away].T).abs() > 0.1).all(1).nonzero().flatten()
        if not len(fits):
            return None
        rows.append(moved[fits[0]])
        x = x[int(fits[0]) + 1 :]
    return torch.stack(rows)


def residuals(recipe: Recipe, net: Net, rng: torch.Generator) -> Tensor | None:
    """A random residual that satisfies the recipe's linear conditions."""
    c = recipe.outputs
    free = torch.randn(N * c, generator=rng, dtype=torch.float64)
    if recipe.residual == "random":
        return free.reshape(N, c)
    rows, values = conditions(recipe, net, rng)
    matrix = torch.stack(rows).flatten(1)
    target = torch.tensor(values, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > 1e-10 * s[0]).sum())
    e = free - vh[:rank].T @ (vh[:rank] @ free) + vh[:rank].T @ ((u.T[:rank] @ target) / s[:rank])
    return e.reshape(N, c) if float((matrix @ e - target).abs().max()) < 1e-12 else None


def conditions(recipe: Recipe, net: Net, rng: torch.Generator) -> tuple[list[Tensor], list[float]]:
    """Rows (N, c) and values: D and ∂L/∂v vanish for slopes on the kinks between both sides; the bends have a sign."""
    z, on, outputs = net.x @ net.w.T, net.on_kink(), torch.eye(recipe.outputs, dtype=torch.float64)
    half, mean = (1 - recipe.leak) / 2, (1 + recipe.leak) / 2
    tall = torch.rand(N, generator=rng, dtype=torch.float64) * 0.7 + 0.3
    if recipe.residual == "concave":
        tall[0] *= -1
    rows, values = [], []
    for r, v in enumerate(net.v):
        inner = (torch.rand(N, generator=rng, dtype=torch.float64) - 0.5) * 1.6
        share = torch.where(on[:, r], inner.sign() if recipe.residual.startswith("edge") else inner, z[:, r].sign())
        slope = (mean + share * half)[:, None] * net.x
        directions = outputs if "uncoupled" in recipe.residual else v[None]
        rows += [torch.outer(s, direction) for s in slope.T for direction in directions]
        h = nn.functional.leaky_relu(z[:, r], recipe.leak)
        rows += [] if recipe.residual == "outgoing" else [torch.outer(h, direction) for direction in outputs]
        values += [0.0] * (len(rows) - len(values))
        for i in on[:, r].nonzero().flatten().tolist() if float(v.norm()) else []:
            at = torch.zeros(N, 1, dtype=torch.float64)
            at[i] = 1
            rows.append(at * v / v.norm())
            values.append(0.0 if "unfelt" in recipe.residual else float(tall[i]))
    return rows, values
