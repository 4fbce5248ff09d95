"""The theory of plateaus against dense linear algebra and against real networks.

Three truths that know nothing of the module: the quadratic form of a split written down copy by copy and restricted to
its constraints; the dense Hessian of a wide network, by torch.func; and the loss itself, by descent.
Networks here are f(x) = Σ_r v_r σ(w_r·x) with the loss ½ mean |f − y|², in float64. Their stationary points are
designed: y is chosen so that the residual satisfies linear equations (zero gradient, prescribed S and G), which makes
the point stationary to rounding; a small residual lets the Gauss-Newton term win, which makes it a strict minimum.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import null_space
from scipy.optimize import minimize

from splitwatch.geometry.plateau import (
    SURE_SADDLE,
    best_coefficients,
    classify_split,
    plateau_regions,
    splitting_block,
    splitting_modes,
)
from splitwatch.records import SplitWatchError

PATTERNS = [
    (0.5, 0.5),
    (0.3, 0.7),
    (2.0, -1.0),
    (1.0, 0.0),
    (0.2, 0.3, 0.5),
    SURE_SADDLE,
    (2.0, -0.5, -0.5),
    (0.4, 0.6, 0.0),
    (1.7, -0.7, 0.0),
    (1.0, 0.0, 0.0),
    (0.25, 0.25, 0.25, 0.25),
    (1.0, 1.0, -0.5, -0.5),
    (2.5, -0.5, -0.4, -0.6),
    (0.8, 0.7, -0.5, 0.0),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices here are tiny: threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inertia(matrix, relative=1e-9):
    values = np.linalg.eigvalsh(np.asarray(matrix))
    zero = relative * np.abs(values).max(initial=0.0)
    return int((values > zero).sum()), int((values < -zero).sum()), int((abs(values) <= zero).sum())


def add(first, second):
    return tuple(a + b for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------------------------------------- linear algebra


def copywise_form(S, G, weights):
    """Σ_j [λ_j u_jᵀSu_j + 2 δ_jᵀGu_j], written for all copies, restricted to Σ λ_j u_j = 0 and Σ δ_j = 0."""
    (c, d), k = G.shape, len(weights)
    mixed = np.kron(np.eye(k), G)
    full = np.block([[np.kron(np.diag(weights), S), mixed.T], [mixed, np.zeros((k * c, k * c))]])
    constraints = np.zeros((d + c, k * (d + c)))
    constraints[:d, : k * d] = np.kron(np.asarray(weights)[None], np.eye(d))
    constraints[d:, k * d :] = np.kron(np.ones((1, k)), np.eye(c))
    free = null_space(constraints)
    return free.T @ full @ free


def designed_pair(rng, rank, spectrum, c):
    """S and G with the given rank and the given spectrum of S on ker G; elsewhere S is arbitrary."""
    d = rank + len(spectrum)
    frame = np.linalg.qr(rng.normal(size=(d, d)))[0]
    S = np.diag(np.concatenate([np.zeros(rank), spectrum]))
    S[:rank] = rng.normal(size=(rank, d))
    S[:, :rank] = S[:rank].T
    S[:rank, :rank] = S[:rank, :rank] + S[:rank, :rank].T
    left, right = np.linalg.qr(rng.normal(size=(c, c)))[0][:, :rank], frame[:, :rank].T
    return frame @ S @ frame.T, left @ np.diag(1 + rng.random(rank)) @ right


# Sizes are kept apart from zero, so that float64 tells a sign from a zero.
signed = st.integers(-3, 3).map(lambda n: n * 0.7)


@st.composite
def coefficient_vectors(draw):
    raw = draw(st.lists(st.integers(-4, 4), min_size=2, max_size=4).filter(lambda values: sum(values) != 0))
    return tuple(value / sum(raw) for value in raw)


@settings(max_examples=150, deadline=None)
@given(coefficient_vectors(), st.lists(signed, max_size=3), st.integers(0, 2), st.integers(0, 1), st.integers(0, 999))
def test_inertia_of_the_block_is_the_formula(weights, spectrum, rank, spare, seed):
    if not spectrum and not rank:
        spectrum = [0.7]
    c = max(rank + spare, 1)
    S, G = designed_pair(np.random.default_rng(seed), rank, spectrum, c)
    verdict = classify_split(spectrum, weights, coupling_rank=rank, outputs=c)
    form = copywise_form(S, G, weights)
    assert verdict.inertia == inertia(splitting_block(torch.tensor(S), torch.tensor(G), weights))
    assert verdict.inertia == inertia(form)
    assert sum(verdict.inertia) == len(form)
    assert (verdict.kind == "strict_saddle") == (verdict.inertia[1] > 0)


@settings(max_examples=50, deadline=None)
@given(coefficient_vectors(), st.integers(0, 999))
def test_block_is_the_form_in_dual_coordinates(weights, seed):
    rng = np.random.default_rng(seed)
    S, G = designed_pair(rng, 1, [1.0, -0.5], 2)
    block = splitting_block(torch.tensor(S), torch.tensor(G), weights).numpy()
    # Dual bases turn together: any orthonormal basis of λ^⊥ gives the same spectrum.
    basis = null_space(np.asarray(weights)[None])
    dual = np.linalg.inv(np.vstack([basis.T, np.ones(len(weights))]))[:, :-1]
    mixed = np.kron(np.eye(len(weights) - 1), G)
    corner = np.kron(basis.T @ np.diag(weights) @ basis, S)
    ours = np.block([[corner, mixed.T], [mixed, np.zeros((len(mixed), len(mixed)))]])
    np.testing.assert_allclose(basis.T @ dual, np.eye(len(weights) - 1), atol=1e-12)
    np.testing.assert_allclose(np.linalg.eigvalsh(block), np.linalg.eigvalsh(ours), atol=1e-10)


# -------------------------------------------------------------------------------------------------- real networks


def tanh_derivatives(a):
    t = torch.tanh(a)
    return 1 - t**2, -2 * t * (1 - t**2)


def softplus_derivatives(a):
    p = torch.sigmoid(a)
    return p, p * (1 - p)


ACTIVATIONS = {
    "tanh": (torch.tanh, tanh_derivatives),
    "softplus": (lambda a: torch.logaddexp(a, torch.zeros_like(a)), softplus_derivatives),
}


@dataclass
class Case:
    """A narrow network (W (m, d), V (m, c)) on data X, Y; S, G of its last neuron by hand-written derivatives."""

    activation: str
    W: torch.Tensor
    V: torch.Tensor
    X: torch.Tensor
    Y: torch.Tensor

    def loss(self, W, V):
        out = ACTIVATIONS[self.activation][0](self.X @ W.T) @ V
        return 0.5 * ((out - self.Y) ** 2).sum(1).mean()

    def hessian(self, W, V):
        size = W.numel()
        point = torch.cat([W.reshape(-1), V.reshape(-1)])
        flat = lambda p: self.loss(p[:size].view_as(W), p[size:].view_as(V))  # noqa: E731
        return torch.func.jacrev(torch.func.grad(flat))(point).numpy(), torch.func.grad(flat)(point).numpy()

    def splitting(self):
        residual = (ACTIVATIONS[self.activation][0](self.X @ self.W.T) @ self.V - self.Y) / len(self.X)
        first, second = ACTIVATIONS[self.activation][1](self.X @ self.W[-1])
        S = torch.einsum("n,ni,nj->ij", (residual @ self.V[-1]) * second, self.X, self.X)
        return S, torch.einsum("nc,n,ni->ci", residual, first, self.X)

    def split(self, weights, in_offset: torch.Tensor | float = 0.0, out_offset: torch.Tensor | float = 0.0):
        k = len(weights)
        copies = torch.tensor(weights, dtype=torch.float64)[:, None]
        W = torch.cat([self.W[:-1], self.W[-1:].expand(k, -1) + in_offset])
        return W, torch.cat([self.V[:-1], copies * self.V[-1:] + out_offset])


def design(activation, spectrum, c, rank=0, *, seed=0, scale=0.02):
    """A stationary point of two neurons: G of the last has the given rank, S on ker G the spectrum times ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    d = rank + len(spectrum)
    n = 8 * (d + c) * (d + 1)
    X, W, V = draw(n, d), draw(2, d), draw(2, c)
    # vᵀG = 0 at a stationary point: G maps to the outputs orthogonal to v.
    S, G = designed_pair(np.random.default_rng(seed), rank, spectrum, max(c - 1, 1))
    G = null_space(V[1:].numpy()) @ G if c > 1 else G
    # Zero gradient in V and W, then S and G of the last neuron: all linear in the residual (n, c).
    act, derivatives = ACTIVATIONS[activation]
    hidden, (first, second), units = act(X @ W.T), derivatives(X @ W.T), torch.eye(c, dtype=torch.float64)
    pairs, inputs = [(i, j) for i in range(d) for j in range(i + 1)], range(d)
    rows = [torch.outer(hidden[:, r], unit) for r in (0, 1) for unit in units]
    rows += [torch.outer(first[:, 0] * X[:, i], V[0]) for i in inputs]
    wanted = [0.0] * len(rows) + [S[pair] for pair in pairs] + [*G.reshape(-1)]
    rows += [torch.outer(second[:, 1] * X[:, i] * X[:, j], V[1]) for i, j in pairs]
    rows += [torch.outer(first[:, 1] * X[:, i], unit) for unit in units for i in inputs]
    system = torch.stack(rows).reshape(len(rows), -1).numpy() / n
    residual = np.linalg.lstsq(system, scale * np.array(wanted), rcond=None)[0].reshape(n, c)
    return Case(activation, W, V, X, hidden @ V - torch.tensor(residual))


@functools.cache
def strict_minimum(activation, spectrum, c, rank=0):
    """A designed point that is a strict minimum: the smaller the residual, the more Gauss-Newton rules."""
    for seed, scale in itertools.product(range(60), (0.05, 0.01)):
        case = design(activation, spectrum, c, rank, seed=seed, scale=scale)
        hessian, gradient = case.hessian(case.W, case.V)
        if np.linalg.eigvalsh(hessian)[0] > 1e-3 and np.abs(gradient).max() < 1e-13:
            return case
    raise AssertionError("no strict minimum designed")


CASES = [
    ("tanh", (1.0, 2.0), 1, 0),
    ("softplus", (-1.0, -1.5), 1, 0),
    ("tanh", (-1.0, 2.0), 1, 0),
    ("softplus", (0.0, 1.0), 1, 0),
    ("softplus", (1.0, 2.0), 2, 0),
    ("tanh", (-1.0, -2.0), 2, 0),
    ("tanh", (1.0, 2.0), 2, 1),
    ("softplus", (-1.0,), 3, 2),
]


@pytest.mark.parametrize(("activation", "spectrum", "c", "rank"), CASES)
def test_hessian_of_a_wide_network_has_the_predicted_inertia(activation, spectrum, c, rank):
    case = strict_minimum(activation, spectrum, c, rank)
    narrow = inertia(case.hessian(case.W, case.V)[0])
    assert narrow == (len(case.W) * (case.X.shape[1] + c), 0, 0)
    for weights in PATTERNS:
        verdict = classify_split(spectrum, weights, coupling_rank=rank, outputs=c, narrow="nondegenerate_minimum")
        hessian, gradient = case.hessian(*case.split(weights))
        assert np.abs(gradient).max() < 1e-12
        assert inertia(hessian) == add(narrow, verdict.inertia), weights
        # Strict saddles, and only they, show in the wide Hessian.
        assert (verdict.kind == "strict_saddle") == (np.linalg.eigvalsh(hessian)[0] < -1e-8)


def test_saddles_keep_their_inertia_as_well():
    found = 0
    for seed in range(6):
        case = design("tanh", (1.0, -1.0), 1, seed=seed, scale=5.0)
        hessian, gradient = case.hessian(case.W, case.V)
        narrow = inertia(hessian)
        assert np.abs(gradient).max() < 1e-9
        found += narrow[1] > 0
        for weights in PATTERNS[::3]:
            verdict = classify_split((1.0, -1.0), weights, narrow="strict_saddle")
            assert inertia(case.hessian(*case.split(weights))[0]) == add(narrow, verdict.inertia)
            assert verdict.kind == "strict_saddle"
    assert found == 6, "a large residual makes a saddle of the narrow point"


@pytest.mark.parametrize("weights", PATTERNS)
def test_congruence_holds_at_any_point(weights):
    generator = torch.Generator().manual_seed(len(weights))
    m, d, c, k = 2, 3, 2, len(weights)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    case = Case("softplus", draw(m, d), draw(m, c), draw(20, d), draw(20, c))
    wide = case.hessian(*case.split(weights))[0]
    narrow = case.hessian(case.W, case.V)[0]
    basis = null_space(np.asarray(weights)[None])
    dual = np.linalg.inv(np.vstack([basis.T, np.ones(k)]))[:, :-1]
    # One column of blocks for each of narrow W, narrow V, u, δ; rows are wide W and wide V. A shared move of the last
    # neuron reaches every incoming vector in full and every outgoing one in the ratio λ.
    top = np.eye(m + k - 1, m - 1)
    below = lambda pattern: np.vstack([np.zeros((m - 1, pattern.shape[1])), pattern])  # noqa: E731
    blocks_in = [np.hstack([top, below(np.ones((k, 1)))]), below(basis)]
    blocks_out = [np.hstack([top, below(np.asarray(weights)[:, None])]), below(dual)]
    (w, u), (v, delta) = (
        [np.kron(b, np.eye(size)) for b in blocks] for blocks, size in ((blocks_in, d), (blocks_out, c))
    )
    gap = lambda rows, like: np.zeros((len(rows), like.shape[1]))  # noqa: E731
    change = np.block([[w, gap(w, v), u, gap(w, delta)], [gap(v, w), v, gap(v, u), delta]])
    assert abs(np.linalg.det(change)) > 1e-6, "a change of variables"
    turned, size = change.T @ wide @ change, len(narrow)
    scale = np.abs(turned).max()
    np.testing.assert_allclose(turned[:size, :size], narrow, atol=1e-12 * scale)
    np.testing.assert_allclose(turned[size:, :size], 0, atol=1e-12 * scale)
    S, G = case.splitting()
    np.testing.assert_allclose(
        np.linalg.eigvalsh(turned[size:, size:]), np.linalg.eigvalsh(splitting_block(S, G, weights)), atol=1e-12 * scale
    )


@pytest.mark.parametrize("weights", [(0.5, 0.5), (2.0, -1.0), SURE_SADDLE, (0.8, 0.7, -0.5, 0.0)])
def test_a_step_along_a_mode_changes_the_loss_as_predicted(weights):
    case = strict_minimum("softplus", (1.0, 2.0), 2, 1)
    S, G = case.splitting()
    modes = splitting_modes(weights)
    generator = torch.Generator().manual_seed(0)
    for i in range(len(weights) - 1):
        s, t = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (3, 2))
        length = 1e-3 / math.sqrt(s @ s + t @ t)
        s, t = s * length, t * length
        moves = [torch.outer(modes.in_pattern[i], s), torch.outer(modes.out_pattern[i], t)]
        assert sum(float((move**2).sum()) for move in moves) == pytest.approx(1e-6)
        base = case.loss(*case.split(weights))
        # The mean of a step and its opposite has no third-order term.
        there, back = (case.loss(*case.split(weights, sign * moves[0], sign * moves[1])) for sign in (1, -1))
        predicted = 0.5 * (modes.curvature[i] * (s @ S @ s) + 2 * modes.coupling[i] * (t @ G @ s))
        assert float((there + back) / 2 - base) == pytest.approx(float(predicted), rel=0.01, abs=2e-11)


# ------------------------------------------------------------------------------------- minima and saddles, by descent


def lowest_in_a_box(case, weights, radius, seed):
    """Lowest loss reached by L-BFGS from a random start, never further than ``radius`` from the split."""
    W, V = case.split(weights)
    centre = np.concatenate([W.reshape(-1).numpy(), V.reshape(-1).numpy()])
    start = centre + radius * np.random.default_rng(seed).uniform(-1, 1, len(centre))

    def value_and_gradient(point):
        p = torch.tensor(point, requires_grad=True)
        value = case.loss(p[: W.numel()].view_as(W), p[W.numel() :].view_as(V))
        value.backward()
        assert p.grad is not None
        return value.item(), p.grad.numpy()

    options = {"maxfun": 200, "ftol": 1e-16, "gtol": 1e-12}
    found = minimize(
        value_and_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        options=options,
        bounds=np.stack([centre - radius, centre + radius], 1),
    )
    return found.fun - value_and_gradient(centre)[0]


@pytest.mark.parametrize(
    ("spectrum", "weights", "c", "kind"),
    [
        ((1.0, 2.0), (0.4, 0.6), 1, "minimum"),
        ((1.0, 2.0), (0.2, 0.3, 0.5), 1, "minimum"),
        ((-1.0, -2.0), (2.0, -1.0), 1, "minimum"),
        ((-1.0, -2.0), (2.0, -0.5, -0.5), 1, "minimum"),
        ((1.0, 2.0), (0.4, 0.6), 2, "minimum"),
        ((1.0, 2.0), (2.0, -1.0), 1, "strict_saddle"),
        ((-1.0, -2.0), (0.4, 0.6), 1, "strict_saddle"),
        ((-1.0, 2.0), (0.4, 0.6), 1, "strict_saddle"),
        ((1.0, 2.0), SURE_SADDLE, 1, "strict_saddle"),
        ((1.0, 2.0), (1.0, 0.0), 1, "saddle"),
        ((-1.0, 2.0), (0.0, 1.0), 1, "saddle"),
        ((-1.0, -2.0), (1.0, 0.0), 2, "saddle"),
    ],
)
def test_the_loss_itself_agrees(spectrum, weights, c, kind):
    narrow = "nondegenerate_minimum"
    assert classify_split(spectrum, weights, outputs=c, narrow=narrow).kind == kind
    case = strict_minimum("tanh", spectrum, c)
    descends = any(lowest_in_a_box(case, weights, 0.05, seed) < -1e-10 for seed in range(2))
    assert descends == (kind != "minimum")


# ------------------------------------------------------------------------------------------------ the table, by row

TABLE = [
    # eigenvalues on ker G, coefficients, rank, outputs, narrow, kind, what the reason must say
    ((1.0, 2.0), (0.5, 0.5), 1, 2, "minimum", "strict_saddle", "coupling"),
    ((), (0.5, 0.5), 2, 3, "minimum", "strict_saddle", "coupling"),
    ((1.0,), (1.0, 0.0), 1, 2, "minimum", "strict_saddle", "coupling"),
    ((1.0, 2.0), (0.5, 0.5), 0, 1, "minimum", "minimum", "Fukumizu & Amari 2000, Thm 3"),
    ((1.0, 2.0), (0.2, 0.3, 0.5), 0, 1, "minimum", "minimum", "Ding, Li & Sun 2026"),
    ((1.0, 2.0), (0.5, 0.5), 0, 2, "nondegenerate_minimum", "minimum", "Morse-Bott"),
    ((1.0, 2.0), (0.5, 0.5), 0, 2, "minimum", "inconclusive", "Morse-Bott"),
    ((1.0, 2.0), (2.0, -1.0), 0, 1, "minimum", "strict_saddle", "negative coefficient"),
    ((-1.0, -2.0), (2.0, -1.0), 0, 1, "minimum", "minimum", "negative definite"),
    ((-1.0, -2.0), (2.0, -0.5, -0.5), 0, 1, "minimum", "minimum", "negative definite"),
    ((-1.0, -2.0), (0.5, 0.5), 0, 1, "minimum", "strict_saddle", "downwards"),
    ((-1.0, -2.0), (1.0, 1.0, -1.0), 0, 1, "minimum", "strict_saddle", "sure saddle"),
    ((-1.0, 2.0), (0.5, 0.5), 0, 1, "minimum", "strict_saddle", "downwards"),
    ((-1.0, 2.0), (2.0, -1.0), 0, 1, "minimum", "strict_saddle", "upward"),
    ((0.0, 2.0), SURE_SADDLE, 0, 1, "minimum", "strict_saddle", "sure saddle"),
    ((1.0, 2.0), (1.0, 0.0), 0, 1, "minimum", "saddle", "third order"),
    ((-1.0, 2.0), (1.0, 0.0, 0.0), 0, 1, "minimum", "saddle", "third order"),
    ((1.0, 2.0), (0.5, 0.5, 0.0), 0, 1, "minimum", "saddle", "third order"),
    ((-1.0, -2.0), (2.0, -1.0, 0.0), 0, 2, "minimum", "saddle", "third order"),
    ((-1.0, 2.0), (0.5, 0.5, 0.0), 0, 1, "minimum", "strict_saddle", "downwards"),
    ((0.0, 2.0), (0.5, 0.5), 0, 1, "minimum", "inconclusive", "singular"),
    ((0.0, -2.0), (2.0, -1.0), 0, 1, "minimum", "inconclusive", "singular"),
    ((0.0, -2.0), (0.5, 0.5), 0, 1, "minimum", "strict_saddle", "downwards"),
    ((0.0, 0.0), (0.5, 0.5), 0, 1, "minimum", "inconclusive", "vanish"),
    ((0.0, 0.0), (1.0, 0.0), 0, 1, "minimum", "inconclusive", "vanish"),
    ((1.0, 2.0), (0.5, 0.5), 0, 1, "strict_saddle", "strict_saddle", "Zhang et al. 2022"),
    ((1.0, 2.0), (1.0, 0.0), 0, 1, "strict_saddle", "strict_saddle", "Zhang et al. 2022"),
    ((1.0, 2.0), (0.5, 0.5), 0, 1, "saddle", "saddle", "lower points"),
    ((1.0, 2.0), (2.0, -1.0), 0, 1, "saddle", "strict_saddle", "negative coefficient"),
    ((0.0, 0.0), (0.5, 0.5), 0, 1, "saddle", "saddle", "lower points"),
    ((1.0, 2.0), (0.5, 0.5), 0, 1, "degenerate", "inconclusive", "undecided"),
    ((1.0, 2.0), (0.5, 0.5), 0, 1, "undecided", "inconclusive", "undecided"),
    ((1.0, 2.0), (2.0, -1.0), 0, 1, "undecided", "strict_saddle", "negative coefficient"),
    ((1.0, 2.0), (1.0, 0.0), 0, 1, "degenerate", "saddle", "third order"),
    ((1.0, 2.0), (2.0, -1.0), 0, 1, "not_stationary", "not_stationary", "not stationary"),
]


@pytest.mark.parametrize(("spectrum", "weights", "rank", "outputs", "narrow", "kind", "says"), TABLE)
def test_every_row_of_the_table(spectrum, weights, rank, outputs, narrow, kind, says):
    verdict = classify_split(spectrum, weights, coupling_rank=rank, outputs=outputs, narrow=narrow)
    assert verdict.kind == kind
    assert says in verdict.reason
    assert verdict.reason.endswith(")"), "ends by naming its theorem"
    assert verdict.coefficients == weights


def test_zero_is_relative():
    for scale in (1e-12, 1.0, 1e12):
        assert classify_split((scale, 2 * scale), (0.5, 0.5)).kind == "minimum"
        assert classify_split((1e-11 * scale, scale), (0.5, 0.5)).kind == "inconclusive"
    assert classify_split((0.1, 1.0), (0.5, 0.5), tolerance=0.2).kind == "inconclusive"
    assert classify_split((1.0, 2.0), (1.0 - 1e-12, 1e-12)).kind == "saddle"
    assert classify_split(torch.tensor([1.0, 2.0]), torch.tensor([1 / 3] * 3)).kind == "minimum"


@pytest.mark.parametrize(
    ("extremes", "rank", "narrow", "kinds"),
    [
        ((1.0, 2.0), 0, "minimum", ("strict_saddle", "saddle", "minimum", "saddle", "strict_saddle")),
        ((-2.0, -1.0), 0, "minimum", ("minimum", "saddle", "strict_saddle", "saddle", "minimum")),
        ((-1.0, 1.0), 0, "minimum", ("strict_saddle", "saddle", "strict_saddle", "saddle", "strict_saddle")),
        ((0.0, 1.0), 0, "minimum", ("strict_saddle", "saddle", "inconclusive", "saddle", "strict_saddle")),
        ((0.0, 0.0), 0, "minimum", ("inconclusive",) * 5),
        ((1.0, 2.0), 2, "minimum", ("strict_saddle",) * 5),
        ((1.0, 2.0), 0, "not_stationary", ("not_stationary",) * 5),
    ],
)
def test_regions_of_a_two_copy_plateau(extremes, rank, narrow, kinds):
    regions = plateau_regions(extremes[0], extremes[1], rank, narrow)
    assert tuple(region[2] for region in regions) == kinds
    assert [region[:2] for region in regions] == [(-math.inf, 0), (0, 0), (0, 1), (1, 1), (1, math.inf)]
    for t in (-7.0, -0.01, 0.0, 0.3, 0.99, 1.0, 1.01, 40.0):
        here = next(kind for start, stop, kind in regions if start < t < stop or start == t == stop)
        assert here == classify_split(extremes, (t, 1 - t), coupling_rank=rank, outputs=rank + 1, narrow=narrow).kind


# ---------------------------------------------------------------------------------------------- modes and coefficients


@settings(max_examples=100, deadline=None)
@given(coefficient_vectors())
def test_modes_are_dual_and_diagonalise_the_form(weights):
    modes = splitting_modes(weights)
    n, m, kappa, gamma = (x.numpy() for x in (modes.in_pattern, modes.out_pattern, modes.curvature, modes.coupling))
    identity, close = np.eye(len(weights) - 1), functools.partial(np.testing.assert_allclose, atol=1e-11)
    close(n @ n.T, identity)
    close(n @ np.asarray(weights), 0)
    close(m.sum(1), 0)
    close(np.linalg.norm(m, axis=1), 1)
    close(n @ m.T, np.diag(gamma))
    close(n @ np.diag(weights) @ n.T, np.diag(kappa))
    assert (gamma > 0).all()
    assert (gamma <= 1 + 1e-12).all()
    assert (np.diff(kappa) >= 0).all()
    assert all(row[np.abs(row) > 1e-9][0] > 0 for row in n)


@pytest.mark.parametrize("t", [-3.0, -0.5, 0.0, 0.2, 0.5, 1.0, 2.5])
def test_two_copies_have_closed_forms(t):
    a, b = t, 1 - t
    modes = splitting_modes((a, b))
    assert float(modes.curvature) == pytest.approx(a * b / (a**2 + b**2))
    assert float(modes.coupling) == pytest.approx(1 / math.sqrt(2 * (a**2 + b**2)))
    assert abs(modes.in_pattern[0, 0] * a + modes.in_pattern[0, 1] * b) < 1e-12


@pytest.mark.parametrize(
    ("weights", "curvature"),
    [
        (SURE_SADDLE, (-1 / 3, 1.0)),
        ((2.0, -1.0), (-0.4,)),
        ((1.5, -0.5), (-0.3,)),
        ((2.0, -0.5, -0.5), (-0.5, -2 / 9)),
        ((1 / 3, 1 / 3, 1 / 3), (1 / 3, 1 / 3)),
        ((0.5, 0.5, 0.0), (0.0, 0.5)),
        ((1.0, 1.0, -0.5, -0.5), (-0.5, -0.2, 1.0)),
    ],
)
def test_known_curvatures(weights, curvature):
    assert splitting_modes(weights).curvature.tolist() == pytest.approx(curvature, abs=1e-12)


def best_change(weights, low, high):
    """Lowest of κ·λ over all modes, for many coefficient vectors (g, k) at once, without a basis of λ^⊥."""
    k = weights.shape[1]
    away = np.eye(k) - weights[:, :, None] * weights[:, None, :] / (weights**2).sum(1)[:, None, None]
    kappa = np.linalg.eigvalsh(away @ (weights[:, :, None] * away))  # one more eigenvalue, 0, along λ: never the lowest
    return np.minimum(kappa * low, kappa * high).min(1)


def allowed_grid(copies, cap, points):
    axis = np.linspace((1 - cap) / 2, (1 + cap) / 2, points)
    free = np.array(list(itertools.product(axis, repeat=copies - 1)))
    weights = np.concatenate([free, 1 - free.sum(1, keepdims=True)], 1)
    return weights[np.abs(weights).sum(1) <= cap + 1e-9]


@pytest.mark.parametrize(("copies", "points"), [(2, 2001), (3, 81), (4, 25)])
@pytest.mark.parametrize("cap", [1.0, 1.5, 2.4, 3.0, 5.0])
def test_best_coefficients_beat_every_other_choice(copies, points, cap):
    grid = allowed_grid(copies, cap, points)
    for low, high in [(-1.0, 2.0), (-2.0, 1.0), (0.0, 1.0), (-1.0, 0.0), (-3.0, -1.0), (-1.0, 1.3), (-1.0, 1.2)]:
        best = best_coefficients(low, high, copies=copies, cap=cap)
        assert sum(best) == pytest.approx(1)
        assert sum(map(abs, best)) <= cap + 1e-9
        assert len(best) <= copies
        assert best_change(np.array([best]), low, high)[0] <= best_change(grid, low, high).min() + 1e-9


def test_best_coefficients_by_name():
    assert best_coefficients(-1.0, 1.2) == (0.5, 0.5)
    assert best_coefficients(-1.0, 1.3) == (2.0, -1.0)
    assert best_coefficients(-1.0, 1.0, copies=3) == SURE_SADDLE
    assert best_coefficients(0.0, 1.0, copies=3) == (2.0, -0.5, -0.5)
    assert best_coefficients(0.0, 1.0, copies=3, cap=1.5) == (1.25, -0.25), "a third copy would not help"
    assert best_coefficients(0.0, 0.0, copies=3) == (0.5, 0.5), "nothing to gain"
    assert best_coefficients(-1.0, 1.0, cap=1.0, copies=3) == (0.5, 0.5), "no negative weight allowed"
    assert best_coefficients(1.0, 2.0, cap=1.0) == (0.5, 0.5), "never a copy without weight"


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([1.0], (0.5, 0.6)), {}, ("coefficients", "sum to 1", "1.1", "divide")),
        (([1.0], (1e6, -1e6 + 2)), {}, ("coefficients", "sum to 1")),
        (([1.0], (1.0,)), {}, ("coefficients", "two or more", "found 1")),
        (([1.0], (math.nan, 1.0)), {}, ("coefficients", "finite", "nan")),
        (([math.inf], (0.5, 0.5)), {}, ("inner_eigenvalues", "finite", "inf")),
        (([[1.0]], (0.5, 0.5)), {}, ("inner_eigenvalues", "one dimension")),
        (([], (0.5, 0.5)), {}, ("inner_eigenvalues", "empty")),
        (([1.0], (0.5, 0.5)), {"narrow": "maximum"}, ("narrow", "'maximum'", "nondegenerate_minimum")),
        (([1.0], (0.5, 0.5)), {"coupling_rank": 2}, ("coupling_rank", "found 2", "outputs=1")),
        (([1.0], (0.5, 0.5)), {"coupling_rank": -1}, ("coupling_rank", "found -1")),
        (([1.0], (0.5, 0.5)), {"tolerance": math.nan}, ("tolerance", "found nan")),
    ],
)
def test_errors_name_argument_requirement_and_cure(arguments, options, words):
    with pytest.raises(SplitWatchError) as error:
        classify_split(*arguments, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("arguments", "options", "word"),
    [
        ((1.0, 0.0), {}, "min_eigenvalue"),
        ((math.nan, 0.0), {}, "min_eigenvalue"),
        ((0.0, 1.0), {"copies": 1}, "copies"),
        ((0.0, 1.0), {"cap": 0.5}, "cap"),
    ],
)
def test_best_coefficients_refuses_nonsense(arguments, options, word):
    with pytest.raises(SplitWatchError, match=word):
        best_coefficients(*arguments, **options)
