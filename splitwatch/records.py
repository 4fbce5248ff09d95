"""The frozen records that flow between the rooms, and the errors.

Records hold names, numbers and tensors only, never modules, so that they can be printed, saved and sent between
processes. In the shapes below m counts the neurons of a hidden layer, d the incoming weights of one neuron (its bias
included), c the outgoing weights of one neuron, k the copies of one split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


class SplitWatchError(RuntimeError):
    """Something splitwatch cannot do; the message names the argument, what was required, what was found, the cure."""


class UnsupportedLayerError(SplitWatchError):
    """A layer that cannot be widened, with the reason."""


class UnfitPlanError(SplitWatchError):
    """A plan that the network does not follow: its code fails or its function changes; it was left as it was."""


def table(title: str, rows: Mapping[str, object]) -> str:
    """A title and named values below it, for people."""
    width = max(map(len, rows), default=0)
    return "\n".join([title, *(f"  {key:<{width}}  {value}" for key, value in rows.items())])


@dataclass(frozen=True, slots=True, eq=False)
class Consumer:
    """A module that reads a hidden layer: columns ``start … start + m·stride`` of its input, ``stride`` to a neuron.

    ``groups`` are those of a grouped convolution, whose outputs each read the columns of one group.
    """

    name: str
    start: int
    stride: int
    groups: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class HiddenLayer:
    """A set of m neurons: producer(s) → per-channel path → consumer(s), or the reason why it cannot be widened.

    ``producers`` and ``consumers`` are dotted module names, ``riders`` the modules on the path that hold one entry per
    neuron (BatchNorm, PReLU, depthwise convolutions), ``operations`` the path in words. ``reason`` is empty for a layer
    that can be widened. A gated layer has two producers; it carries the name of the first one called. Beside grouped
    convolutions the neurons stand in ``groups`` of equal size, one after the other, and each has to grow by as many.
    """

    name: str
    width: int
    producers: tuple[str, ...] = ()
    consumers: tuple[Consumer, ...] = ()
    riders: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    reason: str = ""
    groups: int = 1

    @property
    def growable(self) -> bool:
        """Whether the layer can be widened."""
        return not self.reason

    @property
    def measurable(self) -> bool:
        """Whether the layer's geometry can be measured, which some layers allow that cannot be widened."""
        return bool(self.consumers)

    @property
    def depthwise(self) -> bool:
        """Whether a depthwise convolution stands on the path, which has a kernel for every neuron."""
        return any("conv" in operation.partition(" (")[0] for operation in self.operations)

    def group(self, neuron: int) -> int:
        """The group that a neuron stands in."""
        return neuron * self.groups // self.width

    def __str__(self) -> str:
        if self.reason:
            but = "can be measured, " if self.measurable else ""
            return f"{self.name}: {but}cannot be widened: {self.reason}"
        path = " → ".join([" + ".join(self.producers), *self.operations, ", ".join(c.name for c in self.consumers)])
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.name}: {self.width} neurons{groups}: {path}"


@dataclass(frozen=True, slots=True, eq=False)
class StationarityVerdict:
    """What the detector says: ``kind`` is "moving", "suspected", "stationary" or "undecided".

    ``gradient_norm`` is the unbiased estimate of |E g| on the probe, ``gradient_bound`` its upper confidence bound,
    ``noise`` the standard deviation of one training batch's gradient; all three are nan until the gradient was tested.
    ``trend`` is the loss change expected over the next window, ``trend_error`` its standard error.
    """

    kind: str
    reason: str
    loss: float
    trend: float = float("nan")
    trend_error: float = float("nan")
    gradient_norm: float = float("nan")
    gradient_bound: float = float("nan")
    noise: float = float("nan")

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


@dataclass(frozen=True, slots=True, eq=False)
class LayerGeometry:
    """Curvature of all m neurons of a hidden layer, fitted on one half of the probe, verified on the other.

    Of every neuron, with d incoming weights (a bias included) and c outgoing ones: the extreme eigenvalues of its inner
    Hessian (m,) with unit eigenvectors (m, d), ``coupling_norm`` (m,) and the lowest eigenvalue of the escape operator
    (m,) with ``escape_in`` (m, d) and ``escape_out`` (m, c), in units of the loss per squared unit of the weights.
    ``interval``, ``max_interval`` and ``escape_interval`` (m, 2) are lower and upper held-out confidence bounds, each
    one-sided, of the Rayleigh quotients along ``min_vector``, ``max_vector`` and the escape direction. They take
    samples for independent; all positions of an image or a sequence are one sample. ``residual`` (m, 2) holds the
    true residual norms of the two extreme eigenpairs of the inner Hessian, ``escape_residual`` (m,) that of the
    escape operator for the coefficients (½, ½), whose unit eigenvector is (``escape_in``, ``escape_out``).
    ``stationarity_residual`` (m,) is |grad_w L| / |v|, the part of the coupling that a stationary point does not
    have. ``proven`` (m, 2) says whose S ⪰ 0 and whose S ⪯ 0 on the fitted half by the sign of all curvatures in it;
    no eigenvalue that was found proves that. ``screened`` (m,) marks neurons whose escape is known to 10 % only,
    enough to see that others are lower.
    """

    layer: str
    min_eigenvalue: Tensor
    max_eigenvalue: Tensor
    min_vector: Tensor
    max_vector: Tensor
    residual: Tensor
    coupling_norm: Tensor
    escape_eigenvalue: Tensor
    escape_in: Tensor
    escape_out: Tensor
    escape_residual: Tensor
    interval: Tensor
    max_interval: Tensor
    escape_interval: Tensor
    stationarity_residual: Tensor
    proven: Tensor
    screened: Tensor

    @property
    def negative(self) -> Tensor:
        """Neurons with a direction of negative curvature, confirmed on held-out data, (m,) bool."""
        return self.interval[:, 1] < 0

    @property
    def positive(self) -> Tensor:
        """Neurons with a direction of positive curvature, confirmed on held-out data, (m,) bool."""
        return self.max_interval[:, 0] > 0

    @property
    def shares(self) -> dict[str, float]:
        """Share of neurons whose confirmed directions are only negative, of both signs, only positive, or neither."""
        both, neither = self.negative & self.positive, ~(self.negative | self.positive)
        classes = {
            "negative": self.negative & ~both,
            "indefinite": both,
            "positive": self.positive & ~both,
            "undecided": neither,
        }
        return {name: float(members.double().mean()) for name, members in classes.items()}

    def __str__(self) -> str:
        rows = {
            "smallest eigenvalue": f"{float(self.min_eigenvalue.min()):+.3e}",
            "largest eigenvalue": f"{float(self.max_eigenvalue.max()):+.3e}",
            "coupling norm (median)": f"{float(self.coupling_norm.median()):.3e}",
            "best escape": f"{float(self.escape_eigenvalue.min()):+.3e}",
            "inner Hessians": ", ".join(f"{value:.0%} {name}" for name, value in self.shares.items()),
        }
        for column, sign in enumerate("⪰⪯"):
            if bool(self.proven[:, column].any()):
                rows[f"proven S {sign} 0"] = f"{int(self.proven[:, column].sum())} neurons"
        if bool(self.screened.any()):
            rows["escape known to 10 % only"] = f"{int(self.screened.sum())} neurons, none of them among the lowest"
        return table(f"{self.layer}: {len(self.min_eigenvalue)} neurons", rows)


@dataclass(frozen=True, slots=True, eq=False)
class PlateauVerdict:
    """What a split into k copies is, at second order, and by which theorem.

    ``kind`` is "minimum", "strict_saddle", "saddle", "inconclusive" or "not_stationary"; ``inertia`` counts the
    positive, negative and zero eigenvalues of the splitting block B; ``reason`` is one sentence.
    """

    kind: str
    reason: str
    inertia: tuple[int, int, int]
    coefficients: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Neuron ``neuron`` becomes k copies: w_j = w + in_offset_j, v_j = λ_j v + out_offset_j.

    ``coefficients`` λ sum to 1; ``in_offset`` is (k, d), ``out_offset`` (k, c). ``predicted_decrease`` is second order.
    """

    layer: str
    neuron: int
    coefficients: tuple[float, ...]
    in_offset: Tensor
    out_offset: Tensor
    predicted_decrease: float
    reason: str = ""

    @property
    def added(self) -> int:
        """Number of neurons the move adds."""
        return len(self.coefficients) - 1

    def __str__(self) -> str:
        coefficients = ", ".join(f"{value:g}" for value in self.coefficients)
        return f"split {self.layer}[{self.neuron}] into ({coefficients}): {self.reason}"


@dataclass(frozen=True, slots=True, eq=False)
class Sprout:
    """A new neuron (a copy with coefficient zero): ``incoming`` (d,) and ``outgoing`` (c,) weights are free.

    The product of the factors ``others``, (m, r) and (r, c), is added to existing outgoing weights, ``biases`` to the
    consumers' biases, in order.
    """

    layer: str
    incoming: Tensor
    outgoing: Tensor
    predicted_decrease: float = 0.0
    reason: str = ""
    others: tuple[Tensor, Tensor] | None = None
    biases: Tensor | None = None
    added: ClassVar[int] = 1

    def __str__(self) -> str:
        return f"sprout in {self.layer}: {self.reason}"


Move = Split | Sprout


@dataclass(frozen=True, slots=True, eq=False)
class GrowthPlan:
    """Moves to make, and what was measured of them on both halves of the probe before anything was changed.

    ``predicted_decrease`` is second order; ``fitted_decrease`` and ``held_out_decrease`` are differences of the probe
    loss at the chosen finite size: ``offset`` relative to each split neuron's weights, ``step`` in multiples of what a
    quadratic model asks of sprouts. ``line_search`` and ``step_search`` list (size, decrease on the fitted half).
    """

    layers: tuple[HiddenLayer, ...]
    moves: tuple[Move, ...]
    reason: str
    offset: float = 0.0
    predicted_decrease: float = 0.0
    fitted_decrease: float = 0.0
    held_out_decrease: float = 0.0
    line_search: tuple[tuple[float, float], ...] = ()
    step: float = 0.0
    step_search: tuple[tuple[float, float], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.moves)

    def __str__(self) -> str:
        sizes = (("offset / weight norm", self.offset), ("step of the sprouts", self.step))
        rows = {name: f"{size:g}" for name, size in sizes if size}
        decreases = self.predicted_decrease, self.fitted_decrease, self.held_out_decrease
        names = "predicted decrease (second order)", "decrease on the fitted half", "decrease on the held-out half"
        rows |= {name: f"{value:.4e}" for name, value in zip(names, decreases, strict=True)}
        added = sum(move.added for move in self.moves)
        head = table(f"{added} new neurons: {self.reason}", rows if self.moves else {})
        return "\n".join([head, *(f"  · {move.predicted_decrease:9.2e}  {move}" for move in self.moves)])
