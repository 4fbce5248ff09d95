"""Stationary points at 150 digits, next to those that float64 knows, and what their matrices look like."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from plateau_digits import Array, Network, digits, mp
from plateau_points import Design

# The smallest nonzero eigenvalues are about g² for couplings g ≥ 1e-12; points are known to 1e-45 and better.
ZERO, CLEAR = mp.mpf("1e-40"), mp.mpf("1e-30")
STATIONARY, ARRIVED, DESIGNED = mp.mpf("1e-48"), mp.mpf("1e-45"), mp.mpf("1e-60")
# An eigenvalue up to so many gradient norms may come from a manifold of stationary points; at isolated degenerate
# points eigenvalues are the square root of the gradient, or larger.
FLAT = 100


def norm(vector: Array) -> mp.mpf:
    return mp.norm(list(vector))


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
    """The stationary point next to the network, or None if Newton's method finds none.

    Next to a degenerate point, where the gradient grows with the power m of the distance, a step reaches only 1/m of
    the way and the next one is 1 − 1/m as long; where that shows, a step is taken m times. In curved valleys steps that
    lead back to the floor come in between.
    """
    lengths = []
    for _ in range(40):
        gradient = net.gradient()
        values, vectors = eigenvectors(net.hessian())
        scale = abs(values).max()
        steep = abs(values) > FLAT * norm(gradient)
        step = vectors[:, steep] @ ((vectors.T @ gradient)[steep] / values[steep])
        length = norm(step)
        if norm(gradient) <= STATIONARY * scale and length <= ARRIVED:
            return net
        if length > 0.1:
            return None
        slow = [length / former for former in lengths[:-3:-1] if 0.4 < length / former < 0.9]
        lengths = [] if slow else [*lengths, length]
        net = net.moved(-round(1 / (1 - slow[0])) * step if slow else -step)
    return None


def met(net: Network, design: Design) -> Network | None:
    """The network with targets that meet the design to all digits, or None if they cannot be found."""
    net.gradient()
    net = replace(net, Y=net.predicted + digits(design.change).reshape(net.Y.shape))
    for _ in range(20):
        missing = gap(net, design)
        size = abs(missing).max()
        if size <= DESIGNED:
            return net
        change = design.answer @ (missing / size).astype(float)
        net = replace(net, Y=net.Y + size * digits(change).reshape(net.Y.shape))
    return None


def gap(net: Network, design: Design) -> Array:
    """What the network's gradient, S and G lack of a design."""
    index, neuron = int(design.place[0]) // 2, design.place[1]
    gradient, (S, G), then = net.gradient(), net.measured(index, neuron), net.layers[index + 1]
    frame, spectrum, column, row = map(digits, (design.frame, design.spectrum, design.column, design.row))
    # vᵀG is a part of the gradient; behind a softmax the columns of G sum to zero.
    v, center = then.weight[:, neuron], net.classes and then is net.layers[-1]
    v, column = (v - v.mean(), column - column.mean()) if center else (v, column)
    column = column - v * (v @ column) / (v @ v) if any(column) else column
    wanted = (frame * spectrum) @ frame.T, column[:, None] * row
    return np.concatenate([-gradient, (wanted[0] - S).ravel(), (wanted[1] - G).ravel()])
