"""The plateau oracle's networks at 150 digits, with derivatives that are written out.

A ``Network`` is the oracle's landscape with mpmath numbers in numpy arrays of objects: the gradient by backpropagation,
the Hessian by carrying the derivative of everything in all parameters along.
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
mp.dps = 150
Array = np.ndarray  # of mpf
digits = np.frompyfunc(mp.mpf, 1, 1)
# Hessians are added up in whole numbers of 2^-BITS, which is several times faster than mpmath.
BITS = 600
whole = np.frompyfunc(lambda a: int(mp.ldexp(a, BITS)), 1, 1)
part = np.frompyfunc(lambda a: mp.ldexp(a, -BITS), 1, 1)


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

    def forward(self, x: Array) -> Array:
        """Keep the inputs x (N, i) and pre-activations z (N, o); the outputs."""
        self.inputs = x if self.bias is None else np.pad(x, ((0, 0), (0, 1)), constant_values=mp.one)
        self.x, self.z = x, x @ self.weight.T + (0 if self.bias is None else self.bias)
        y, self.slope, self.bend = np.frompyfunc(self.jet, 1, 3)(self.z)
        return y

    def backward(self, e: Array) -> tuple[Array, Array]:
        """From e = dL/dy (N, o), keep δ = dL/dz; own part of the gradient, and dL/dx (N, i)."""
        self.e, self.delta = e, e * self.slope
        parts = [(self.delta.T @ self.x).ravel(), *([] if self.bias is None else [self.delta.sum(0)])]
        return np.concatenate(parts), self.delta @ self.weight

    def push(self, dx: Array) -> Array:
        """After ``backward``: whole derivatives of x (N, i, ·) to those of z and y (N, o, p)."""
        (samples, fan_in), fan_out, x = self.x.shape, len(self.weight), whole(self.x)
        direct = np.zeros((samples, fan_out, self.size), dtype=object)
        for o in range(fan_out):
            direct[:, o, o * fan_in : (o + 1) * fan_in] = x
            if self.bias is not None:
                direct[:, o, o - fan_out] = 1 << BITS
        self.dx, self.dz = dx, np.concatenate([whole(self.weight) @ dx >> BITS, direct], 2)
        return whole(self.slope)[..., None] * self.dz >> BITS

    def pull(self, de: Array) -> tuple[Array, Array]:
        """From the whole derivative of e (N, o, P), own part of the Hessian (·, P), and that of dL/dx (N, i, P)."""
        (fan_out, fan_in), start = self.weight.shape, self.dx.shape[2]
        x, delta, ddelta = whole(self.x), whole(self.delta), de * whole(self.slope)[..., None]
        ddelta[..., : self.dz.shape[2]] += whole(self.e * self.bend)[..., None] * self.dz
        ddelta >>= BITS
        hessian, down = np.tensordot(x, ddelta, (0, 0)).swapaxes(0, 1), whole(self.weight).T @ ddelta >> BITS
        hessian[..., :start] += np.tensordot(delta, self.dx, (0, 0))
        hessian >>= BITS
        for o in range(fan_out):
            down[:, np.arange(fan_in), start + o * fan_in + np.arange(fan_in)] += delta[:, [o]]
        parts = [hessian.reshape(self.weight.size, -1), *([] if self.bias is None else [ddelta.sum(0)])]
        return np.concatenate(parts), down


@dataclass
class Network:
    """Linear layers at 150 digits on the data of a landscape."""

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

    def gradient(self) -> Array:
        """Gradient (P,)."""
        y, parts = self.X, []
        for layer in self.layers:
            y = layer.forward(y)
        odds = np.frompyfunc(mp.exp, 1, 1)(y) if self.classes else None
        self.predicted = odds / odds.sum(1, keepdims=True) if self.classes else y
        self.weight = self.Y.sum(1, keepdims=True) if self.classes else mp.one
        e = (self.weight * self.predicted - self.Y) / mp.mpf(len(y))
        for layer in reversed(self.layers):
            own, e = layer.backward(e)
            parts.append(own)
        return np.concatenate(parts[::-1])

    def hessian(self) -> Array:
        """Hessian (P, P), after ``gradient``."""
        dy, parts = np.empty((*self.X.shape, 0), dtype=object), []
        for layer in self.layers:
            dy = layer.push(dy)
        if self.classes:
            p, share = whole(self.predicted), whole(self.weight * self.predicted)
            dy = share[..., None] * (dy - (p[:, None] @ dy >> BITS)) >> BITS
        de = dy // len(dy)
        for layer in reversed(self.layers):
            own, de = layer.pull(de)
            parts.append(own)
        return part(np.concatenate(parts[::-1]))

    def derivatives(self) -> tuple[Array, Array]:
        return self.gradient(), self.hessian()

    def measured(self, index: int, r: int) -> tuple[Array, Array]:
        """Inner Hessian S (d, d) and coupling G (c, d) of a neuron by their definition, after ``gradient``."""
        layer, then = self.layers[index : index + 2]
        S = (layer.inputs.T * (layer.e[:, r] * layer.bend[:, r])) @ layer.inputs
        return S, (then.delta.T * layer.slope[:, r]) @ layer.inputs

    def point(self) -> Tensor:
        """All parameters rounded to float64, in torch's order."""
        parts = [part.ravel() for layer in self.layers for part in (layer.weight, layer.bias) if part is not None]
        return torch.as_tensor(np.concatenate(parts).astype(float))
