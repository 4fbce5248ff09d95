"""The plateau oracle's second look, at 60 digits: what float64 leaves open between zero and nonzero.

A ``Network`` is the oracle's landscape with mpmath numbers in numpy arrays of objects. Its derivatives are written out:
the gradient by backpropagation, the Hessian by carrying the derivative of everything in all parameters along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from mpmath import MPContext
from plateau_points import Landscape, Sine
from torch import Tensor, nn

mp = MPContext()
mp.dps = 60
# The smallest nonzero eigenvalues are about g² for couplings g ≥ 1e-12; symmetries leave 1e-50, rounding 1e-58.
ZERO, CLEAR, STATIONARY = mp.mpf("1e-40"), mp.mpf("1e-30"), mp.mpf("1e-48")
# Next to a point known to 1e-16, eigenvalues up to this size may come from a manifold of stationary points.
FLAT = 1e-14
Array = np.ndarray  # of mpf
digits = np.frompyfunc(mp.mpf, 1, 1)


def tanh(a: mp.mpf) -> tuple[mp.mpf, ...]:
    t = mp.tanh(a)
    return t, 1 - t**2, -2 * t * (1 - t**2)


def gelu(a: mp.mpf) -> tuple[mp.mpf, ...]:
    below, density = mp.erfc(-a / mp.sqrt(2)) / 2, mp.exp(-(a**2) / 2) / mp.sqrt(2 * mp.pi)
    return a * below, below + a * density, (2 - a**2) * density


def softplus(a: mp.mpf) -> tuple[mp.mpf, ...]:
    if a > 20:  # as torch has it
        return a, mp.one, mp.zero
    s = 1 / (1 + mp.exp(-a))
    return mp.log1p(mp.exp(a)), s, s * (1 - s)


def sine(a: mp.mpf) -> tuple[mp.mpf, ...]:
    return mp.sin(a), mp.cos(a), -mp.sin(a)


def identity(a: mp.mpf) -> tuple[mp.mpf, ...]:
    return a, mp.one, mp.zero


JETS = {nn.Tanh: tanh, nn.GELU: gelu, nn.Softplus: softplus, Sine: sine}


@dataclass
class Layer:
    """A linear map (o, i) and what comes after it; the maps have P parameters in all, p of them up to this one."""

    weight: Array  # (o, i)
    bias: Array | None  # (o,)
    jet: Callable  # activation with its first two derivatives

    @property
    def size(self) -> int:
        return self.weight.size + (0 if self.bias is None else self.bias.size)

    def forward(self, x: Array, dx: Array) -> None:
        """Keep the inputs x (N, i), pre-activations z (N, o), outputs y, and their derivatives (N, ·, p)."""
        (samples, fan_in), fan_out = x.shape, len(self.weight)
        self.inputs = x if self.bias is None else np.pad(x, ((0, 0), (0, 1)), constant_values=mp.one)
        self.x, self.dx, self.z = x, dx, x @ self.weight.T + (0 if self.bias is None else self.bias)
        direct = np.full((samples, fan_out, self.size), mp.zero)
        for o in range(fan_out):
            direct[:, o, o * fan_in : (o + 1) * fan_in] = x
            if self.bias is not None:
                direct[:, o, o - fan_out] = mp.one
        self.dz = np.concatenate([self.weight @ dx, direct], 2)
        self.y, self.slope, self.bend = np.frompyfunc(self.jet, 1, 3)(self.z)
        self.dy = self.slope[..., None] * self.dz

    def backward(self, e: Array, de: Array) -> tuple[Array, Array]:
        """From dL/dy (N, o) and its derivative (N, o, P), keep dL/dz; own parts of the gradient and Hessian (·, P)."""
        self.e, self.delta, p = e, e * self.slope, self.dz.shape[2]
        self.ddelta = de * self.slope[..., None]
        self.ddelta[..., :p] += (e * self.bend)[..., None] * self.dz
        gradient, hessian = self.delta.T @ self.x, np.tensordot(self.x, self.ddelta, (0, 0)).swapaxes(0, 1)
        hessian[..., : self.dx.shape[2]] += np.tensordot(self.delta, self.dx, (0, 0))
        if self.bias is None:
            return gradient.ravel(), hessian.reshape(gradient.size, -1)
        parts = hessian.reshape(gradient.size, -1), self.ddelta.sum(0)
        return np.concatenate([gradient.ravel(), self.delta.sum(0)]), np.concatenate(parts)

    def pull(self) -> tuple[Array, Array]:
        """dL/dx (N, i) and its derivative (N, i, P)."""
        fan_out, fan_in = self.weight.shape
        down, start = self.weight.T @ self.ddelta, self.dx.shape[2]
        for o in range(fan_out):
            own = start + o * fan_in + np.arange(fan_in)
            down[:, np.arange(fan_in), own] += self.delta[:, [o]]
        return self.delta @ self.weight, down


@dataclass
class Network:
    """Linear layers at 60 digits on the data of a landscape."""

    layers: list[Layer]
    X: Array  # (N, inputs)
    Y: Array  # (N, outputs)
    classes: bool

    @classmethod
    def of(cls, land: Landscape) -> Network:
        exact = lambda t: digits(t.detach().numpy())  # noqa: E731
        modules = [*land.model, None]
        layers = [
            Layer(
                exact(linear.weight), None if linear.bias is None else exact(linear.bias), JETS.get(type(act), identity)
            )
            for linear, act in zip(modules[::2], modules[1::2], strict=True)
        ]
        return cls(layers, exact(land.X), exact(land.Y), land.classes)

    def moved(self, step: Array) -> Network:
        """The network whose parameters, in torch's order, are larger by ``step`` (P,)."""
        layers, rest = [], step
        for layer in self.layers:
            own, rest = rest[: layer.size], rest[layer.size :]
            weight, bias = own[: layer.weight.size].reshape(layer.weight.shape), own[layer.weight.size :]
            bias = None if layer.bias is None else layer.bias + bias
            layers.append(replace(layer, weight=layer.weight + weight, bias=bias))
        return replace(self, layers=layers)

    def embedded(self, index: int, r: int, coefficients: Sequence[float]) -> Network:
        """Neuron r of hidden layer ``index`` replaced by copies of weights λ_j v, in ``critical_embedding``'s order."""
        first, then = self.layers[index : index + 2]
        share = digits(np.array(coefficients)) / sum(map(mp.mpf, coefficients))
        origin = [*range(len(first.weight)), *[r] * (len(share) - 1)]
        factor = np.full(len(origin), mp.one)
        factor[[r, *range(len(first.weight), len(origin))]] = share
        bias = None if first.bias is None else first.bias[origin]
        pair = [
            replace(first, weight=first.weight[origin], bias=bias),
            replace(then, weight=then.weight[:, origin] * factor),
        ]
        return replace(self, layers=[*self.layers[:index], *pair, *self.layers[index + 2 :]])

    def derivatives(self) -> tuple[Array, Array]:
        """Gradient (P,) and Hessian (P, P)."""
        y, dy = self.X, np.empty((*self.X.shape, 0), dtype=object)
        for layer in self.layers:
            layer.forward(y, dy)
            y, dy = layer.y, layer.dy
        e, de = self._loss(y, dy)
        parts = []
        for layer in reversed(self.layers):
            parts.append(layer.backward(e, de))
            e, de = layer.pull()
        gradients, hessians = zip(*reversed(parts), strict=True)
        return np.concatenate(gradients), np.concatenate(hessians)

    def _loss(self, y: Array, dy: Array) -> tuple[Array, Array]:
        if not self.classes:
            return (y - self.Y) / len(y), dy / len(y)
        weight, odds = self.Y.sum(1, keepdims=True) / len(y), np.frompyfunc(mp.exp, 1, 1)(y)
        p = odds / odds.sum(1, keepdims=True)
        spread = p[..., None] * (dy - (p[:, None] @ dy))
        return weight * p - self.Y / len(y), weight[..., None] * spread

    def measured(self, index: int, r: int) -> tuple[Array, Array]:
        """Inner Hessian S (d, d) and coupling G (c, d) of a neuron by their definition, after ``derivatives``."""
        layer, then = self.layers[index : index + 2]
        S = (layer.inputs.T * (layer.e[:, r] * layer.bend[:, r])) @ layer.inputs
        return S, (then.delta.T * layer.slope[:, r]) @ layer.inputs

    def point(self) -> Tensor:
        """All parameters rounded to float64, in torch's order."""
        parts = [part.ravel() for layer in self.layers for part in (layer.weight, layer.bias) if part is not None]
        return torch.as_tensor(np.concatenate(parts).astype(float))


def eigenvalues(matrix: Array) -> Array:
    return np.array(list(mp.eigsy(mp.matrix(matrix.tolist()), eigvals_only=True)), dtype=object)


def eigenvectors(matrix: Array) -> tuple[Array, Array]:
    values, vectors = mp.eigsy(mp.matrix(matrix.tolist()))
    return np.array(list(values), dtype=object), np.array(vectors.tolist(), dtype=object)


def singular(matrix: Array) -> tuple[Array, Array]:
    """Singular values (min(c, d),), descending, and right singular vectors, the rows of a (d, d) matrix."""
    _, values, rows = mp.svd_r(mp.matrix(matrix.tolist()), full_matrices=True)
    return np.array(list(values), dtype=object), np.array(rows.tolist(), dtype=object)


def polished(net: Network) -> Network | None:
    """The stationary point next to the network, or None if Newton finds none."""
    for _ in range(12):
        gradient, hessian = net.derivatives()
        values, vectors = eigenvectors(hessian)
        scale = abs(values).max()
        if mp.norm(list(gradient)) <= STATIONARY * scale:
            return net
        steep = abs(values) > FLAT * scale
        step = vectors[:, steep] @ ((vectors.T @ gradient)[steep] / values[steep])
        if mp.norm(list(step)) > 0.1:
            return None
        net = net.moved(-step)
    return None
