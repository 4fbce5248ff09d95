"""What a split plateau consists of: pure theory, numbers in, verdicts out.

A neuron (w, v) that becomes k copies w_j = w, v_j = λ_j v with Σ λ_j = 1 changes neither the network's function nor
its stationarity, whatever the signs of λ. Write w_j = w + Δ + u_j with Σ λ_j u_j = 0, for how the copies part, and
v_j = λ_j (v + h) + δ_j with Σ δ_j = 0. In these coordinates the wide network's Hessian is *exactly* block-diagonal:

    d²L_wide = d²L_narrow(Δ, h, …) + B(u, δ),      B(u, δ) = Σ_j [ λ_j u_jᵀ S u_j + 2 δ_jᵀ G u_j ],

S the inner Hessian (d, d), G the coupling (c, d). What a plateau consists of is read off the splitting block B. Its
inertia (numbers of positive, negative, zero eigenvalues) is, with ρ = rank G, S_Z the inner Hessian restricted to
ker G, and n₊, n₋, n₀ the numbers of positive, negative, zero coefficients,

    inertia(B) = (k−1) (ρ, ρ, c−ρ) + (n₊−1) inertia(S_Z) + n₋ inertia(−S_Z) + n₀ (0, 0, d−ρ).

Proof, sources and limits: docs/concepts/plateau.md. Fukumizu & Amari 2000 treat k = 2 with one output; Ding, Li & Sun
2026 any k with one output and squared loss; the inertia formula, for any loss, depth and number of outputs, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from splitwatch.records import PlateauVerdict, SplitWatchError

Narrow: TypeAlias = Literal[
    "minimum", "nondegenerate_minimum", "strict_saddle", "saddle", "degenerate", "undecided", "not_stationary"
]
Numbers: TypeAlias = Sequence[float] | Tensor
Inertia: TypeAlias = tuple[int, int, int]

SURE_SADDLE: Final = (1.0, 1.0, -1.0)  # a strict saddle for every nonzero inner Hessian, whatever its signs
RELATIVE_ZERO: Final = 1e-9  # numbers this much smaller than the largest of their kind count as zero
_CONCEPTS: Final = "docs/concepts/plateau.md"
_INERTIA: Final = f"inertia theorem, {_CONCEPTS}"


@dataclass(frozen=True, slots=True, eq=False)
class Modes:
    """The k−1 independent ways in which k copies move apart; float64.

    Along mode i copy j moves by u_j = ``in_pattern[i, j]`` s and δ_j = ``out_pattern[i, j]`` t, for any s (d,), t (c,).
    With |s|² + |t|² = ε² that is a step of length ε, which changes the loss by ½ (κ_i sᵀSs + 2 γ_i tᵀGs) + o(ε²).
    """

    curvature: Tensor  # κ (k-1,), ascending
    coupling: Tensor  # γ (k-1,), in (0, 1]
    in_pattern: Tensor  # (k-1, k), orthonormal rows, orthogonal to λ
    out_pattern: Tensor  # (k-1, k), unit rows that sum to zero; orthogonal to the other rows of in_pattern


def classify_split(
    inner_eigenvalues: Numbers,
    coefficients: Numbers,
    *,
    coupling_rank: int = 0,
    outputs: int = 1,
    narrow: Narrow = "minimum",
    tolerance: float | None = None,
) -> PlateauVerdict:
    """Say what the split of a neuron with the given coefficients is: minimum, saddle, or not decided at second order.

    Args:
        inner_eigenvalues: (d−ρ,), of the inner Hessian restricted to the kernel of the coupling: of the whole inner
            Hessian where the coupling is zero.
        coefficients: λ (k,), any k ≥ 2 real numbers that sum to 1.
        coupling_rank: ρ, the rank of the coupling, projected off v where the point is not quite stationary.
        outputs: c, the neuron's outgoing weights; 1 for two-class softmax, which sees one combination of its logits.
        narrow: What the narrow point is. "minimum" is any local minimum, even one with a degenerate Hessian;
            "degenerate" and "undecided" are points not known to be a minimum or a saddle.
        tolerance: Eigenvalues up to this size (their error, if measured) count as zero; default 1e-9 of the largest.

    Raises:
        SplitWatchError: If an argument is out of range, not finite, or the coefficients do not sum to 1.
    """
    weights = _coefficients(coefficients)
    eigenvalues = _vector("inner_eigenvalues", inner_eigenvalues)
    _check(eigenvalues, coupling_rank, outputs, narrow, tolerance)
    spectrum, copies = _signs(eigenvalues, tolerance), _signs(weights)
    inertia = _block_inertia(spectrum, copies, coupling_rank, outputs)
    if narrow == "not_stationary":
        kind, reason = narrow, f"the narrow point is not stationary, so no split of it is (gradients, {_CONCEPTS})"
    elif narrow == "strict_saddle":
        kind, reason = narrow, "the narrow point descends, and no split loses a descent direction (Zhang et al. 2022)"
    elif inertia[1] > 0:
        kind, reason = "strict_saddle", _why_strict(*copies[:2], coupling_rank)
    else:
        kind, reason = _without_descent(spectrum, copies, outputs, narrow)
    return PlateauVerdict(kind, reason, inertia, tuple(weights.tolist()))


def splitting_modes(coefficients: Numbers) -> Modes:
    """Diagonalise how k copies move apart: the eigenvectors of diag(λ) restricted to λ^⊥, and their duals in 1^⊥.

    For k = 2, κ = λ₁λ₂ / (λ₁² + λ₂²) and γ = 1 / √(2 (λ₁² + λ₂²)). Each row of ``in_pattern`` starts with a positive
    entry, zeros aside. With two or more zero coefficients κ = 0 is degenerate and its γ depend on the basis chosen.

    Raises:
        SplitWatchError: If the coefficients are fewer than two, not finite, or do not sum to 1.
    """
    weights = _coefficients(coefficients)
    basis, block = _parting(weights)
    curvature, rotation = torch.linalg.eigh(block)
    in_pattern = (basis @ rotation).T
    leading = (in_pattern.abs() > RELATIVE_ZERO).double().argmax(dim=1, keepdim=True)
    in_pattern = in_pattern * in_pattern.gather(1, leading).sign()
    # The dual basis in 1^⊥ of a basis N of λ^⊥ is M = N − λ (1ᵀN): NᵀM = I, and 1ᵀM = 0 because Σ λ_j = 1.
    dual = in_pattern - in_pattern.sum(dim=1, keepdim=True) * weights
    length = dual.norm(dim=1)
    return Modes(curvature, 1 / length, in_pattern, dual / length[:, None])


def splitting_block(inner_hessian: Tensor, coupling: Tensor, coefficients: Numbers) -> Tensor:
    """Splitting block B as a dense matrix, (k−1)(d+c) square, for inspection and tests; S is (d, d), G (c, d).

    [[D ⊗ S, I ⊗ Gᵀ], [I ⊗ G, 0]] with D = Nᵀ diag(λ) N, in the coordinates (x, y) of u = N x, δ = M y, where N is an
    orthonormal basis of λ^⊥ and M its dual basis in 1^⊥.
    """
    weights = _coefficients(coefficients)
    corner = torch.kron(_parting(weights)[1], inner_hessian.double())
    mixed = torch.kron(torch.eye(len(weights) - 1, dtype=torch.float64), coupling.double())
    return torch.cat([torch.cat([corner, mixed.T], 1), torch.cat([mixed, mixed.new_zeros(2 * mixed.shape[:1])], 1)])


def best_coefficients(
    min_eigenvalue: float, max_eigenvalue: float, *, copies: int = 2, cap: float = 3.0
) -> tuple[float, ...]:
    """Coefficients with Σ|λ| ≤ cap whose best step of given Euclidean length lowers the loss most, coupling aside.

    A step of length ε along mode i changes the loss by ε²/2 · κ_i · (an extreme eigenvalue of S). Under the cap C,

    - two copies: (½, ½) has the largest κ, ½, and ((1+C)/2, (1−C)/2) the smallest, −(C²−1) / (2 (C²+1)), so the
      negative coefficient wins if (C²−1) λ_max > (C²+1) |λ_min|: for C = 3, if λ_max > 1.25 |λ_min|;
    - three copies: ((1+C)/4, (1+C)/4, (1−C)/2) has the largest κ, (1+C)/4 (for C = 3 it is ``SURE_SADDLE``), and
      ((1+C)/2, (1−C)/4, (1−C)/4) the smallest, −(C−1)/4, unless C < 1+√2, where two copies have a smaller one.

    A fourth copy adds nothing, so the answer has *at most* ``copies`` coefficients: as few as reach the best decrease.

    Raises:
        SplitWatchError: If the eigenvalues are not finite and ordered, ``copies`` < 2, or ``cap`` < 1.
    """
    ordered = -math.inf < min_eigenvalue <= max_eigenvalue < math.inf
    _require(ordered, f"min_eigenvalue must not exceed max_eigenvalue; found {min_eigenvalue}, {max_eigenvalue}: swap")
    _require(copies > 1, f"copies must be at least 2; found {copies}: a split needs two")
    _require(1 <= cap < math.inf, f"cap must be at least 1, the sum of the coefficients; found {cap}: raise it")
    high, low = (1 + cap) / 2, (1 - cap) / 2
    options: list[tuple[float, ...]] = [(0.5, 0.5), (high, low), (high / 2, high / 2, low), (high, low / 2, low / 2)]
    allowed = 1 if cap == 1 else 2 if copies == 2 else 4
    extremes = torch.tensor([[min_eigenvalue], [max_eigenvalue]], dtype=torch.float64)
    return min(options[:allowed], key=lambda weights: float((splitting_modes(weights).curvature * extremes).min()))


def plateau_regions(
    min_eigenvalue: float,
    max_eigenvalue: float,
    coupling_rank: int = 0,
    narrow: Narrow = "minimum",
    *,
    outputs: int | None = None,
    tolerance: float | None = None,
) -> tuple[tuple[float, float, str], ...]:
    """Kinds along the whole line λ = (t, 1−t): (start, stop, kind), the points t = 0 and t = 1 standing by themselves.

    The kind depends on the signs of t and 1−t only, and on the spectrum through its extremes only (of the inner Hessian
    restricted to the kernel of the coupling). ``outputs`` is by default the fewest that allow the coupling's rank.
    """
    outputs = coupling_rank + 1 if outputs is None else outputs
    classify = partial(classify_split, coupling_rank=coupling_rank, outputs=outputs, narrow=narrow, tolerance=tolerance)
    spans = [(-math.inf, 0.0, -1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.5), (1.0, 1.0, 1.0), (1.0, math.inf, 2.0)]
    return tuple((start, stop, classify((min_eigenvalue, max_eigenvalue), (t, 1 - t)).kind) for start, stop, t in spans)


def _signs(values: Tensor, tolerance: float | None = None) -> Inertia:
    largest = float(values.abs().max()) if len(values) else 0.0
    zero = RELATIVE_ZERO * largest if tolerance is None else tolerance
    positive, negative = int((values > zero).sum()), int((values < -zero).sum())
    return positive, negative, len(values) - positive - negative


def _block_inertia(spectrum: Inertia, copies: Inertia, rank: int, outputs: int) -> Inertia:
    (up, down, flat), (plus, minus, none) = spectrum, copies
    modes = sum(copies) - 1
    positive = modes * rank + (plus - 1) * up + minus * down
    negative = modes * rank + (plus - 1) * down + minus * up
    return positive, negative, modes * (outputs - rank) + (plus - 1 + minus) * flat + none * sum(spectrum)


def _why_strict(plus: int, minus: int, rank: int) -> str:
    if rank:
        return f"the coupling is not zero, so some direction descends whatever the coefficients ({_INERTIA})"
    if plus > 1 and minus:
        return f"two positive and a negative coefficient descend on any nonzero inner Hessian ({_INERTIA}: sure saddle)"
    if not minus:
        return f"copies of positive coefficient descend where the inner Hessian curves downwards ({_INERTIA})"
    return f"a negative coefficient turns the inner Hessian's upward curvature into descent ({_INERTIA})"


def _without_descent(spectrum: Inertia, copies: Inertia, outputs: int, narrow: Narrow) -> tuple[str, str]:
    """Kind and reason where B is positive semidefinite; the coupling is then zero."""
    (up, down, flat), (plus, minus, none) = spectrum, copies
    if narrow == "saddle":
        return "saddle", f"lower points near the narrow one split in the same way ({_CONCEPTS}; Ding, Li & Sun 2026)"
    if not up and not down:
        return "inconclusive", f"inner Hessian and coupling vanish, so the second order says nothing ({_INERTIA})"
    if none:
        return "saddle", f"a weightless copy can take on weight of the sign that descends, at third order ({_CONCEPTS})"
    if flat:
        return "inconclusive", f"the inner Hessian is singular, so higher orders in its kernel decide ({_CONCEPTS})"
    if narrow in ("degenerate", "undecided"):
        return "inconclusive", f"parting the copies costs loss, but the narrow point itself is undecided ({_INERTIA})"
    if outputs > 1 and narrow == "minimum":
        return "inconclusive", f"several outputs need a nondegenerate narrow minimum (Morse-Bott argument, {_CONCEPTS})"
    pattern = "one positive, otherwise negative coefficients" if minus else "only positive coefficients"
    sign = "positive" if up else "negative"
    theorem = "Fukumizu & Amari 2000, Thm 3" if plus + minus == 2 else "compare Ding, Li & Sun 2026"
    source = f"Morse-Bott argument, {_CONCEPTS}" if outputs > 1 else f"{theorem}; any local minimum: {_CONCEPTS}"
    return "minimum", f"{pattern} on a {sign} definite inner Hessian: parting the copies costs loss ({source})"


def _parting(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis N of λ^⊥, (k, k−1), and Nᵀ diag(λ) N."""
    basis = torch.linalg.qr(weights[:, None], mode="complete").Q[:, 1:]
    return basis, basis.T @ (weights[:, None] * basis)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SplitWatchError(message)


def _vector(name: str, values: Numbers) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    fine = vector.ndim == 1 and bool(vector.isfinite().all())
    _require(fine, f"{name} must be finite numbers in one dimension; found {values}: check how they were made")
    return vector


def _coefficients(values: Numbers) -> Tensor:
    weights = _vector("coefficients", values)
    _require(len(weights) > 1, f"coefficients must be two or more; found {len(weights)}: give one to each copy")
    total = float(weights.sum())
    # Coefficients may come from float32; large ones of both signs cancel.
    near = abs(total - 1) <= 1e-6 + RELATIVE_ZERO * float(weights.abs().sum())
    _require(near, f"coefficients must sum to 1; found {total:g}: divide them by their sum")
    return weights


def _check(values: Tensor, rank: int, outputs: int, narrow: str, tolerance: float | None) -> None:
    kinds, found = get_args(Narrow), f"found {rank} with outputs={outputs}"
    _require(narrow in kinds, f"narrow must be one of {kinds}; found {narrow!r}: pass 'undecided' if unknown")
    _require(0 <= rank <= outputs and outputs > 0, f"coupling_rank must be 0 … outputs; {found}: pass outputs=c")
    _require(len(values) + rank > 0, "inner_eigenvalues must not be empty where coupling_rank is 0; found none: pass d")
    valid = tolerance is None or 0 <= tolerance < math.inf
    _require(valid, f"tolerance must be at least 0; found {tolerance}: leave it out for the relative default")
