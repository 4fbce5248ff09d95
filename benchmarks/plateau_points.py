"""Stationary points of tiny float64 networks for the plateau oracle: trained ones, and designed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.linalg import null_space
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jacrev, vmap
from torch.nn import functional as F

STATIONARY = 1e-10
FAMILIES = ("scalar", "multi-output", "2 classes", "3 classes", "deep")
CLASSES = {"positive": (1, 1), "negative": (-1, -1), "indefinite": (1, -1), "semidefinite": (0, 1), "zero": (0, 0)}


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


ACTIVATIONS = {"tanh": nn.Tanh, "GELU": nn.GELU, "softplus": nn.Softplus, "sin": Sine}


@dataclass
class Design:
    """S = frame · diag(spectrum) · frameᵀ and G = column · rowᵀ prescribed for a neuron at a stationary point."""

    place: tuple[str, int]  # module and neuron
    frame: np.ndarray  # (d, d)
    spectrum: np.ndarray  # (d,)
    column: np.ndarray  # (c,)
    row: np.ndarray  # (d,)
    change: np.ndarray  # from outputs (or probabilities) to targets (N·outputs,), in float64
    answer: np.ndarray  # changes of the targets (N·outputs, P + d² + c·d) per change of gradient, S, and G

    @property
    def inner(self) -> np.ndarray:
        """S (d, d)."""
        return self.frame * self.spectrum @ self.frame.T


@dataclass
class Landscape:
    """The mean loss of Linear modules and activations in sequence, as a function of its flat parameters."""

    model: nn.Sequential
    X: Tensor
    Y: Tensor
    classes: bool  # cross-entropy, Y probabilities; otherwise half the squared error
    origin: str
    design: Design | None = None

    def loss_fn(self, model: Callable, batch: tuple[Tensor, Tensor]) -> Tensor:
        out, target = model(batch[0]), batch[1]
        return F.cross_entropy(out, target) if self.classes else 0.5 * (out - target).square().sum(1).mean()

    @property
    def point(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach().clone()

    def outputs(self, point: Tensor) -> Tensor:
        named = dict(self.model.named_parameters())
        parts = zip(named.items(), point.split([p.numel() for p in named.values()]), strict=True)
        return functional_call(self.model, {key: part.view_as(p) for (key, p), part in parts}, (self.X,))

    def value(self, point: Tensor) -> Tensor:
        return self.loss_fn(lambda _: self.outputs(point), (self.X, self.Y))

    def gradient(self, point: Tensor) -> Tensor:
        return grad(self.value)(point)

    def hessian(self, point: Tensor) -> Tensor:
        return jacrev(grad(self.value))(point)

    def lowest(self, start: Tensor, steps: int, radius: float = np.inf) -> tuple[Tensor, float]:
        """Where L-BFGS gets from a start, never leaving a box around the point, and the loss there."""

        def evaluate(values: np.ndarray) -> tuple[float, np.ndarray]:
            gradient, value = grad_and_value(self.value)(torch.as_tensor(values))
            return float(value), gradient.numpy()

        bounds = [(p - radius, p + radius) for p in self.point.tolist()]
        options = {"maxiter": steps, "ftol": 1e-16, "gtol": 1e-12}
        found = minimize(evaluate, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return torch.as_tensor(found.x), float(found.fun)


def build(rng: np.random.Generator, family: str, activation: str, bias: bool) -> Landscape:
    pick = lambda low, high: int(rng.integers(low, high + 1))  # noqa: E731
    outputs = {"scalar": 1, "multi-output": pick(2, 3), "2 classes": 2, "3 classes": 3, "deep": pick(1, 2)}[family]
    sizes = [2, 2, pick(1, 2), outputs] if family == "deep" else [pick(2, 3), pick(1, 3), outputs]
    modules: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        modules += [nn.Linear(fan_in, fan_out, bias=bias).double(), ACTIVATIONS[activation]()]
    model = nn.Sequential(*modules[:-1])
    for p in model.parameters():
        p.data = torch.as_tensor(rng.normal(size=tuple(p.shape)))
    classes = family.endswith("classes") or (outputs == 2 and family == "deep" and rng.random() < 0.5)
    X = torch.as_tensor(rng.normal(size=(40, sizes[0])))
    return Landscape(model, X, torch.zeros(40, outputs, dtype=torch.float64), classes, family)


def trained(rng: np.random.Generator, family: str, activation: str) -> Landscape | None:
    """A point that a search from a random start ended at, or None if it failed or ran off to infinity."""
    land = build(rng, family, activation, bias=bool(rng.random() < 0.6))
    teacher = np.tanh(land.X.numpy() @ rng.normal(size=(land.X.shape[1], land.Y.shape[1])))
    noisy = torch.as_tensor(1.5 * teacher + 0.7 * rng.normal(size=teacher.shape))
    land.Y = F.one_hot(noisy.argmax(1), noisy.shape[1]).double() if land.classes else noisy
    point, _ = land.lowest(land.point, int(rng.choice([1, 10, 150])))
    damping, gradient, hessian = 1e-2, land.gradient(point), land.hessian(point)
    for _ in range(100):
        if float(gradient.norm()) < 1e-15 or damping > 1e4:
            break
        values, vectors = torch.linalg.eigh(hessian)
        shrunk = values / (values**2 + damping * values.abs().max() ** 2)
        trial = point - vectors @ (shrunk * (vectors.T @ gradient))
        if (new := land.gradient(trial)).norm() < gradient.norm():
            point, gradient, hessian, damping = trial, new, land.hessian(trial), max(damping / 10, 1e-22)
        else:
            damping *= 10
    nn.utils.vector_to_parameters(point, land.model.parameters())
    # Far out a small gradient is no stationary point: there the Hessian is as small.
    steep = float(torch.linalg.matrix_norm(hessian, 2))
    return land if float(gradient.norm()) <= 1e-15 * steep * len(point) and float(point.abs().max()) < 20 else None


def designed(rng: np.random.Generator, family: str, activation: str) -> Landscape | None:
    """A random point with targets that make it stationary, with prescribed S and G of one neuron."""
    # S[bias, bias] = −v·(gradient in v) = 0 for the sine: its S is definite only where there is no bias.
    land = build(rng, family, activation, bias=activation != "sin" and bool(rng.random() < 0.6))
    index = 2 * int(rng.integers(len(land.model) // 2))
    r = int(rng.integers(land.model[index].out_features))
    forms = equations(land, index, r)
    count, d, v = len(forms[0]), len(forms[1]), land.model[index + 2].weight[:, r].detach().numpy()
    signs = CLASSES[rng.choice(list(CLASSES), p=[0.3, 0.3, 0.2, 0.1, 0.1])]
    frame, spectrum = np.linalg.qr(rng.normal(size=(d, d)))[0], rng.uniform(0.5, 2, d) * np.resize(signs, d)
    softmax = land.classes and index + 3 == len(land.model)
    free, column, row = null_space(np.stack([v, np.ones(len(v))][: 1 + softmax])), np.zeros(len(v)), np.zeros(d)
    if free.shape[1] and rng.random() < 0.3:
        column, row = free[:, 0], rng.normal(size=d)
    inner, mixed = frame * spectrum @ frame.T, np.outer(column, row)
    wanted = np.concatenate([np.zeros(count), inner.reshape(-1), mixed.reshape(-1)])
    effect = effects(land, forms)
    answer = np.linalg.pinv(effect, rcond=1e-12)
    change = answer @ wanted
    if np.abs(effect @ change - wanted).max() > 1e-11:
        return None
    out = land.model(land.X).detach()
    scale = float(rng.choice([0.02, 0.1, 0.5])) / max(float(np.sqrt(np.mean(change**2))), 1e-12)
    land.Y = (out.softmax(1) if land.classes else out) + scale * torch.as_tensor(change).view_as(out)
    land.design = Design((str(index), r), frame, scale * spectrum, scale * column, row, scale * change, answer)
    return None if land.classes and float(land.Y.min()) < 0 else land


def effects(land: Landscape, forms: tuple[Tensor, ...]) -> np.ndarray:
    """What changes of the targets (N·outputs,) do to means of linear forms; those of probabilities sum to zero."""
    (samples, outputs), classes = land.Y.shape, land.classes
    tangent = np.kron(np.eye(samples), np.eye(outputs) - classes / outputs)
    return -torch.cat([form.reshape(-1, land.Y.numel()) for form in forms]).numpy() @ tangent / samples


def equations(land: Landscape, index: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient (P, n, c), S (d, d, n, c), G (·, d, n, c) of a neuron as linear forms of the output residual."""
    linear, act, rest = land.model[index], land.model[index + 1], land.model[index + 3 :]
    with torch.no_grad():
        x = land.model[:index](land.X)
        a, read = linear(x)[:, r], land.model[index : index + 3](x)
        inputs = x if linear.bias is None else F.pad(x, (0, 1), value=1.0)
        through = vmap(jacrev(rest))(read)
        bend = vmap(grad(grad(act)))(a) * (through @ land.model[index + 2].weight[:, r]).T
        inner = torch.einsum("cn,ni,nj->ijnc", bend, inputs, inputs)
        mixed = torch.einsum("nca,n,ni->ainc", through, vmap(grad(act))(a), inputs)
        return jacrev(land.outputs)(land.point).movedim(-1, 0), inner, mixed
