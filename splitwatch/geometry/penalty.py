"""What weight decay in the loss does to a split: exact formulas.

With a penalty μ/2 |w|² + ν/2 |v|² in the loss, k copies w_j = w, v_j = λ_j v still compute the same function, but the
penalty sees k incoming vectors and rescaled outgoing ones. Where the narrow point is stationary for the penalised loss,

    dL/dw_j = μ (1−λ_j) w,    dL/dv_j = −ν (1−λ_j) v,    ΔL = μ/2 (k−1) |w|² + ν/2 (Σ λ_j² − 1) |v|².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from splitwatch.geometry.weights import neuron_weights
from splitwatch.records import HiddenLayer, SplitWatchError


@dataclass(frozen=True, slots=True, eq=False)
class WeightDecayEffect:
    """The gradient norm and the loss change that the penalty gives to a split of a stationary point."""

    gradient_norm: float
    loss_jump: float
    coefficients: tuple[float, ...]
    reason: str

    def __str__(self) -> str:
        return self.reason


def weight_decay_effect(
    model: nn.Module,
    layer: HiddenLayer,
    neuron: int,
    coefficients: Sequence[float],
    *,
    weight_decay_in: float,
    weight_decay_out: float | None = None,
) -> WeightDecayEffect:
    """How far from stationary, and by how much dearer, a split is under an L2 penalty in the loss.

    Args:
        model: the network at a stationary point of its penalised loss.
        layer: the hidden layer.
        neuron: which of its neurons.
        coefficients: λ (k,), which sum to 1.
        weight_decay_in: μ of the penalty μ/2 |w|² on the incoming weights, their bias included.
        weight_decay_out: ν of the penalty ν/2 |v|² on the outgoing weights; the same as μ by default.

    Raises:
        SplitWatchError: The coefficients do not sum to 1.
    """
    lam = [float(value) for value in coefficients]
    if abs(sum(lam) - 1) > 1e-6:
        raise SplitWatchError(f"coefficients must sum to 1; found {sum(lam):g}: divide them by their sum")
    mu, nu = weight_decay_in, weight_decay_in if weight_decay_out is None else weight_decay_out
    w, v = (float(rows[neuron].double().norm()) for rows in neuron_weights(model, layer))
    gradient = sum((1 - value) ** 2 for value in lam) ** 0.5 * ((mu * w) ** 2 + (nu * v) ** 2) ** 0.5
    jump = mu / 2 * (len(lam) - 1) * w**2 + nu / 2 * (sum(value**2 for value in lam) - 1) * v**2
    change = "raises" if jump > 0 else "lowers"
    reason = f"the penalty gives the split a gradient of norm {gradient:.2e} and {change} the loss by {abs(jump):.2e}"
    if gradient == 0 and jump == 0:
        reason = "the penalty leaves the split stationary, at the same loss"
    return WeightDecayEffect(gradient, jump, tuple(lam), reason)
