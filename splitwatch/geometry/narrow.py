"""What the narrow point itself is: minimum, strict saddle, degenerate, not stationary, or not decided.

A negative Rayleigh quotient of the Hessian proves a direction of descent. A positive definite Hessian proves a minimum,
but a small residual proves only that *an* eigenvalue is near: that the smallest one was found is known where the whole
Hessian was formed, or where the Krylov space has nothing left. A gradient that is zero to rounding marks a network
trained to the end on the probe itself, and the verdict is one on the probe's loss. Otherwise the probe is a sample, and
what its sampling error could turn around is not claimed. The loss is taken to be twice differentiable at the point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from splitwatch.anatomy import flat
from splitwatch.batches import Batch, shares
from splitwatch.geometry.eigen import dense_operator, extreme_eigenpairs
from splitwatch.geometry.elementwise import CurvedOnce
from splitwatch.geometry.plateau import RELATIVE_ZERO, Narrow
from splitwatch.precision import in_full_precision
from splitwatch.probe import Probe
from splitwatch.ranks import share_of, summed, summed_number
from splitwatch.records import SplitWatchError
from splitwatch.undisturbed import undisturbed

DENSE_LIMIT = 256  # trainable parameters up to which the whole Hessian is formed: nothing is left unproved
_KEPT_BYTES = 2**29  # graphs are kept from product to product while the values in them fit in here
_EXACT = 1e-8  # |g| below this share of ‖H‖ |θ| is zero: a step of that relative size along the steepest curvature
_DRIFT = 100.0  # eigenvalues this near a stationary point may be off by that many times |g| / |θ|
_NEWTON = 0.01  # a minimum has to lie within this share of |θ|, for the Hessian measured to be that of the minimum
_Z = 2.0  # standard errors


@dataclass(frozen=True, slots=True, eq=False)
class NarrowVerdict:
    """What a point is, and the numbers it rests on.

    ``kind`` ("nondegenerate_minimum", "strict_saddle", "degenerate", "not_stationary" or "undecided") is what
    ``classify_split`` takes. ``residuals`` belong to the (smallest, largest) eigenvalue of the Hessian; ``exhausted``
    says that these are proved to be the extreme ones. ``noise`` is the standard error of the probe's mean gradient.
    """

    kind: Narrow
    reason: str
    min_eigenvalue: float
    max_eigenvalue: float
    residuals: tuple[float, float]
    gradient_norm: float
    noise: float
    exhausted: bool

    def __str__(self) -> str:
        low, high = self.residuals
        spectrum = f"{self.min_eigenvalue:+.2e} (± {low:.0e}) … {self.max_eigenvalue:+.2e} (± {high:.0e})"
        gradient = f"gradient {self.gradient_norm:.1e}, its noise {self.noise:.1e}"
        return f"{self.kind}: {self.reason}; eigenvalues {spectrum}; {gradient}"


@in_full_precision
def narrow_verdict(
    model: nn.Module, probe: Probe, *, tolerance: float = 1e-3, seed: int = 0, half: str = "all", tested: bool = False
) -> NarrowVerdict:
    """Say what the point is at which a network stands, from its gradient and the ends of its Hessian's spectrum.

    Args:
        model: the network, left as it was, to the bit; only trainable parameters count.
        probe: where to measure, in eval mode.
        tolerance: residual of an eigenpair relative to ‖H‖ at which Lanczos stops (above ``DENSE_LIMIT`` parameters).
        seed: of Lanczos' start vector.
        half: of the probe. With "all" a descending direction has to descend on both halves.
        tested: a test elsewhere found the mean gradient as good as zero; the noise here does not speak against it.

    Raises:
        SplitWatchError: Nothing is trainable, or the loss is not a finite scalar.
    """
    loss = LossCurvature(model, probe)
    gradient, size = float(loss.gradient(half).norm()), loss.size
    noise = _noise(model, Probe(probe.half(half), probe.loss_fn))
    try:
        ends = loss.ends(partial(loss.product, half=half), (tolerance, seed))
    except RuntimeError as error:  # no second derivative, or one that is not finite
        reason = f"the Hessian cannot be measured ({str(error).splitlines()[0]})"
        nan = float("nan")
        return NarrowVerdict("undecided", reason, nan, nan, (nan, nan), gradient, noise, False)
    rounding = max(torch.finfo(p.dtype).eps for p in loss.parameters)
    exact = gradient <= max(_EXACT, 100 * rounding) * ends.scale * size
    if exact or tested or gradient <= _Z * noise:
        zero = max(RELATIVE_ZERO, 1e3 * rounding) * ends.scale + (_DRIFT * gradient / size if exact and gradient else 0)
        reach = gradient if exact else gradient + _Z * noise
        kind, reason = _judge(loss, ends, half, exact, zero, reach, (tolerance, seed))
    else:
        kind, reason = "not_stationary", f"the gradient, {gradient:.1e}, is more than sampling explains"
    return NarrowVerdict(kind, reason, ends.low, ends.high, ends.residuals, gradient, noise, ends.exhausted)


class _Ends(NamedTuple):
    """Both ends of a spectrum; ``vector`` (n,) belongs to the lower, ``scale`` is the operator's norm."""

    low: float
    high: float
    residuals: tuple[float, float]
    vector: Tensor
    exhausted: bool
    scale: float


class LossCurvature:
    """Gradient and Hessian of the probe's mean loss in the trainable parameters, flat, each batch by its samples.

    Where several processes train together, of the mean loss over the probes of all.
    """

    def __init__(self, model: nn.Module, probe: Probe) -> None:
        self.model, self.probe = model, probe
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise SplitWatchError("model: required trainable parameters, found none; set requires_grad on some")
        row = flat(self.parameters).detach()
        self.n, self.dtype, self.device, self.size = len(row), row.dtype, row.device, float(row.double().norm())
        self.kept: dict[int, tuple[Tensor, ...]] = {}  # slopes with their graphs, by the batch's identity
        self.room, self.once = _KEPT_BYTES, False
        self.weights = {half: share_of(probe.samples(half)) for half in ("fitted", "held_out", "all")}

    def gradient(self, half: str) -> Tensor:
        """The gradient on a half, (n,), in float64."""
        return self._mean(half, flat, torch.float64)

    def product(self, vectors: Tensor, half: str) -> Tensor:
        """The Hessian on a half times a vector, (1, n) → (1, n)."""
        seed = vectors[0].to(self.device, self.dtype)
        parts = _like(self.parameters, seed)

        def along(slopes: Sequence[Tensor]) -> Tensor:
            pairs = [(s, part) for s, part in zip(slopes, parts, strict=True) if s.requires_grad]
            if not pairs:  # linear in the parameters
                return torch.zeros_like(seed)
            if self.once:
                raise RuntimeError("an operation in the loss can be differentiated only once")
            outputs, directions = zip(*pairs, strict=True)
            grads = torch.autograd.grad(outputs, self.parameters, directions, retain_graph=True, materialize_grads=True)
            return flat(grads)

        return self._mean(half, along, self.dtype)[None].to(vectors)

    def ends(self, product: Callable[[Tensor], Tensor], solver: tuple[float, int]) -> _Ends:
        """Both ends of an operator's spectrum; ``solver`` is Lanczos' tolerance and seed."""
        space = {"dtype": self.dtype, "device": self.device}
        if self.n <= DENSE_LIMIT:
            matrix = dense_operator(product, 1, self.n, **space)[0].cpu().double()
            values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
            residuals = (matrix @ vectors - values * vectors).norm(dim=0)[[0, -1]].tolist()
            low, high, vector, exhausted = float(values[0]), float(values[-1]), vectors[:, 0].to(self.device), True
        else:
            found = extreme_eigenpairs(product, 1, self.n, tolerance=solver[0], seed=solver[1], **space)
            low, high, exhausted = float(found.min_value), float(found.max_value), bool(found.exhausted)
            residuals, vector = found.residual[0].tolist(), found.min_vector[0]
        return _Ends(low, high, (residuals[0], residuals[1]), vector, exhausted, max(abs(low), abs(high)))

    def _mean(self, half: str, of: Callable[[Sequence[Tensor]], Tensor], dtype: torch.dtype) -> Tensor:
        batches = self.probe.half(half)
        total = None
        for batch, share in zip(batches, shares(batches), strict=True):
            with undisturbed(self.model):  # hooks on parameters would change what is differentiated
                value = of(self._slopes(batch)).detach().to(dtype)
            factor = share * self.weights[half]
            if total is not None:
                total.add_(value, alpha=factor)
            else:
                total = value if factor == 1 else value * factor
        assert total is not None
        return summed(total)

    def _slopes(self, batch: Batch) -> tuple[Tensor, ...]:
        """One batch's gradient with the graph that leads to it, kept while there is room."""
        if id(batch) in self.kept:
            return self.kept[id(batch)]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), CurvedOnce():  # fused attention differentiates once
            tape, loss = self.probe.record(self.model, batch)
            slopes = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
        self.once |= _is_cut(slopes)
        cost = 4 * sum(value.nbytes for value in tape.tensors)
        if cost <= self.room:
            self.room -= cost
            self.kept[id(batch)] = slopes
        return slopes


def _is_cut(slopes: Iterable[Tensor]) -> bool:
    """Whether the gradient passed an operation without second derivative, which autograd would leave out silently."""
    seen, left = set(), [slope.grad_fn for slope in slopes]
    while left:
        if (node := left.pop()) is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return any("autograd::Error" in node.name() for node in seen)


def _like(tensors: Sequence[Tensor], row: Tensor) -> list[Tensor]:
    """The same numbers in the shapes of the tensors."""
    parts = row.split([t.numel() * (1 + t.is_complex()) for t in tensors])
    pairs = zip(tensors, parts, strict=True)
    return [torch.complex(*x.view(*t.shape, 2).unbind(-1)) if t.is_complex() else x.view_as(t) for t, x in pairs]


def _judge(
    loss: LossCurvature, ends: _Ends, half: str, exact: bool, zero: float, reach: float, solver: tuple[float, int]
) -> tuple[Narrow, str]:
    """Kind and reason at a stationary point; ``zero`` bounds what rounding does to eigenvalues, ``reach`` |∇L|."""
    low, error = ends.low, ends.residuals[0]
    note = "" if exact else ", as far as the probe's sampling error tells"
    if low + error < -zero:
        if half != "all" or _descends(loss, ends.vector, exact, zero, solver):
            return "strict_saddle", f"the loss curves downwards along some direction{note}"
        return "undecided", "the loss curves downwards on the whole probe, but not on both its halves"
    if low < -zero:
        return "undecided", "the smallest curvature found is negative, but within its residual of zero"
    if not ends.exhausted:
        return "undecided", "no negative direction was found, which does not prove that there is none"
    if low - error <= zero:
        if exact:
            return "degenerate", "the Hessian's smallest eigenvalue is zero to rounding, so higher orders decide"
        return "undecided", "the smallest curvature cannot be told from zero"
    floor = low - error
    if not exact and half == "all":  # half the norm of the difference of the halves' Hessians estimates the error
        floor -= loss.ends(lambda v: (loss.product(v, "fitted") - loss.product(v, "held_out")) / 2, solver).scale
    elif not exact:
        floor = -float("inf")
    if floor <= 0:
        return "undecided", "every curvature measured is positive, but the probe's sampling error could hide others"
    if reach > _NEWTON * floor * loss.size:
        return "undecided", "every curvature is positive, but the gradient is too large for a minimum to be near"
    return "nondegenerate_minimum", f"the gradient vanishes and every curvature is positive{note}"


def _descends(loss: LossCurvature, vector: Tensor, exact: bool, zero: float, solver: tuple[float, int]) -> bool:
    """Whether a direction descends on both halves; on a sample also whether one found on one half does on the other."""

    def falls(direction: Tensor, half: str) -> bool:
        return float(direction.double() @ loss.product(direction[None].double(), half)[0]) < -zero

    if not (falls(vector, "fitted") and falls(vector, "held_out")):
        return False
    return exact or falls(loss.ends(partial(loss.product, half="fitted"), solver).vector, "held_out")


def _noise(model: nn.Module, probe: Probe) -> float:
    """Standard error of the probe's mean gradient: √(tr Cov / samples), from the scatter of its parts."""
    gradients, sizes = zip(*probe.gradients(model), strict=True)
    stacked, n = torch.stack(gradients).double(), torch.tensor(sizes, device=gradients[0].device).double()
    samples, parts = summed_number(sum(sizes)), summed_number(len(sizes))
    scatter = (stacked - summed(n @ stacked) / samples).square().sum(dim=1)
    return (summed_number(float(n @ scatter)) / (parts - 1) / samples) ** 0.5
