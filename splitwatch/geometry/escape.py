"""ReLU-like activations: directional stationarity and escape neurons (Wu, Simsek & Ged 2025).

In the words of ``piecewise``: moving w along u changes the loss at the rate D(u) = v·d(u), its slope in v at the rate
d(u). Both are exact for small u. A point is stationary if ∂L/∂v = 0 and D ≥ 0. An escape neuron has a direction u
across w with D(u) = 0 and d(u) ≠ 0: no first-order cost for moving there, and a slope in v to gain from.
Everything here is first order in the layer's own weights; what lies downstream is taken as autograd differentiates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitwatch.geometry.kinks import Descent, Escape, search_escape, steepest_descent
from splitwatch.geometry.piecewise import PiecewiseLayer, PiecewiseNeuron, piecewise_layer
from splitwatch.probe import Probe
from splitwatch.records import HiddenLayer

_SOURCE = "Wu, Simsek & Ged 2025"
_INERTIA = "inertia theorem, docs/concepts/plateau.md"


@dataclass(frozen=True, slots=True, eq=False)
class DirectionalStationarity:
    """Whether any one-sided derivative of the loss in the weights of k neurons is negative.

    ``derivative`` (k, 2) bounds the smallest one-sided derivative in w over the unit ball; ``direction`` (k, d) attains
    the upper bound. ``coupling`` (k, c, d) is G without the kink samples, ``kinks`` (k,) their number, and
    ``outgoing_gradient`` (k, c) is ∂L/∂v. ``verdicts`` and ``kind`` are "stationary", "not_stationary", "undecided".
    """

    layer: str
    neurons: tuple[int, ...]
    kinks: Tensor
    coupling: Tensor
    outgoing_gradient: Tensor
    derivative: Tensor
    direction: Tensor
    verdicts: tuple[str, ...]
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.kind}: {self.reason}"


@dataclass(frozen=True, slots=True, eq=False)
class EscapeNeurons:
    """Which of k neurons are escape neurons ("escape", "none", "undecided" in ``verdicts``), and what follows.

    Along the unit vector ``direction`` (k, d), across w, D = 0 and the slopes in v change at the rate ``strength``
    (k,), most in outgoing weight ``output`` (k,); zeros and -1 where none was found. ``kind`` is "not_stationary",
    "not_minimum", "splits_escape", "minimum", "undecided".
    """

    layer: str
    neurons: tuple[int, ...]
    verdicts: tuple[str, ...]
    direction: Tensor
    output: Tensor
    strength: Tensor
    stationarity: DirectionalStationarity
    kind: str
    reason: str

    @property
    def splits(self) -> Tensor:
        """The neurons (k,) of a stationary point of which every split curves downwards.

        Copies that exchange outgoing weight η stay where they were, and along η the slope d(u) opens at no first-order
        cost: moving one of them by s u changes the loss by s η·d(u) + O(s²), whatever kinks u crosses.
        """
        return torch.tensor([verdict == "escape" for verdict in self.verdicts])

    def __str__(self) -> str:
        return f"{self.layer}: {self.kind}: {self.reason}"


def directional_stationarity(
    model: nn.Module,
    layer: HiddenLayer | str,
    probe: Probe,
    *,
    half: str = "all",
    neurons: Sequence[int] | None = None,
    tolerance: float | None = None,
) -> DirectionalStationarity:
    """Test whether a piecewise linear layer's weights are a directional stationary point of the probe loss.

    Args:
        model: the network, left as it was.
        layer: Linear → ReLU-like → Linear, or its name.
        probe: where to measure.
        half: the half of the probe to measure on: "fitted", "held_out" or "all".
        neurons: which k neurons; all m of them by default. The verdict speaks of their weights only.
        tolerance: rates count as zero up to this share of Σ_i |e_i| |ρ'| |x_i|; by default 8 √eps of the dtype.

    Raises:
        UnsupportedLayerError: the layer is not Linear → elementwise path with its one kink at zero → Linear.

    Source: Wu, Simsek & Ged 2025, Def. 3.3.
    """
    data = piecewise_layer(model, layer, probe, half, neurons, tolerance)
    return _stationarity(data, [steepest_descent(neuron) for neuron in data.neurons])


def escape_neurons(
    model: nn.Module,
    layer: HiddenLayer | str,
    probe: Probe,
    *,
    half: str = "all",
    neurons: Sequence[int] | None = None,
    tolerance: float | None = None,
) -> EscapeNeurons:
    """Find the escape neurons of a piecewise linear layer, and say what they make of the point and of its splits.

    "minimum" is a local minimum in the weights of these neurons, for a loss convex in what the consumers put out, such
    as that of a network with one hidden layer. Arguments and ``Raises`` as for ``directional_stationarity``.

    Source: Wu, Simsek & Ged 2025 (no escape neuron: minimum; scalar output: escape neuron: none); several outputs: B.
    """
    data = piecewise_layer(model, layer, probe, half, neurons, tolerance)
    steepest = [steepest_descent(neuron) for neuron in data.neurons]
    found = _stationarity(data, steepest)
    searches = [search_escape(neuron, s.strict) for neuron, s in zip(data.neurons, steepest, strict=True)]
    kind, reason = _conclude(data, found, searches)
    return EscapeNeurons(
        layer=data.name,
        neurons=data.chosen,
        verdicts=tuple(search.verdict for search in searches),
        direction=torch.stack([search.direction for search in searches]),
        output=torch.tensor([search.output for search in searches]),
        strength=torch.tensor([search.strength for search in searches], dtype=torch.float64),
        stationarity=found,
        kind=kind,
        reason=reason,
    )


def one_sided_derivatives(
    model: nn.Module, layer: HiddenLayer | str, probe: Probe, directions: Tensor, *, half: str = "all"
) -> Tensor:
    """One-sided derivatives D_r(u) of the probe loss in w_r along directions (m, q, d), as (m, q)."""
    neurons = piecewise_layer(model, layer, probe, half).neurons
    return torch.stack([n.slopes(u) for n, u in zip(neurons, directions.double().cpu(), strict=True)])


def _stationarity(data: PiecewiseLayer, steepest: Sequence[Descent]) -> DirectionalStationarity:
    verdicts = tuple(_stands(neuron, s) for neuron, s in zip(data.neurons, steepest, strict=True))
    kind = next((k for k in ("not_stationary", "undecided") if k in verdicts), "stationary")
    reason = {
        "stationary": "no direction in the weights of a neuron descends at first order",
        "not_stationary": f"the loss descends at first order in the weights of {verdicts.count(kind)} neurons",
        "undecided": f"data points on the kinks of {verdicts.count(kind)} neurons leave the steepest descent undecided",
    }[kind]
    return DirectionalStationarity(
        layer=data.name,
        neurons=data.chosen,
        kinks=torch.tensor([len(neuron.kinks) for neuron in data.neurons]),
        coupling=torch.stack([neuron.coupling for neuron in data.neurons]),
        outgoing_gradient=torch.stack([neuron.gradient for neuron in data.neurons]),
        derivative=torch.tensor([(s.lower, s.upper) for s in steepest], dtype=torch.float64),
        direction=torch.stack([s.direction for s in steepest]),
        verdicts=verdicts,
        kind=kind,
        reason=f"{reason} ({_SOURCE}, Def. 3.3)",
    )


def _stands(neuron: PiecewiseNeuron, steepest: Descent) -> str:
    outgoing = float(neuron.gradient.norm()) > neuron.zero * float(neuron.incoming.norm())
    if outgoing or steepest.upper < -neuron.flat:
        return "not_stationary"
    return "stationary" if steepest.lower >= -neuron.flat else "undecided"


def _conclude(data: PiecewiseLayer, found: DirectionalStationarity, searches: Sequence[Escape]) -> tuple[str, str]:
    escapes = [(r, n, s) for r, n, s in zip(data.chosen, data.neurons, searches, strict=True) if s.verdict == "escape"]
    if found.kind == "not_stationary":
        return found.kind, found.reason
    if silent := [r for r, neuron, _ in escapes if neuron.silent]:
        return "not_minimum", f"escape neurons {silent} have no outgoing weights: small ones lower the loss ({_SOURCE})"
    if found.kind == "undecided":
        return found.kind, found.reason
    if escapes:
        split = [r for r, _, _ in escapes]
        return (
            "splits_escape",
            f"every split of the escape neurons {split} curves downwards: strict saddle ({_INERTIA})",
        )
    if all(search.verdict == "none" for search in searches):
        what = "stationary and without escape neurons: a local minimum, if the loss is convex in the consumers' outputs"
        return "minimum", f"{what} ({_SOURCE})"
    return "undecided", f"data points on kinks leave open whether there are escape neurons that descend ({_SOURCE})"
