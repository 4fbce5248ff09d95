"""Dense inner Hessians and couplings of some neurons, for inspection, verdicts and tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from splitwatch.geometry.curvature import LayerCurvature
from splitwatch.geometry.sweep import Sweep
from splitwatch.layers import chosen_neurons, one_layer
from splitwatch.precision import in_full_precision
from splitwatch.probe import Probe
from splitwatch.records import HiddenLayer


@in_full_precision
def inner_hessian(
    model: nn.Module, layer: HiddenLayer | str, probe: Probe, neurons: Sequence[int] | None = None, half: str = "all"
) -> Tensor:
    """Dense inner Hessians S_r = E[(v_r·e) σ''(w_r·x) x xᵀ], (k, d, d), for inspection and tests.

    Args:
        model: the network, left as it was.
        layer: a hidden layer or its name.
        probe: where to measure.
        neurons: which k neurons; all m of them by default.
        half: the half of the probe to measure on: "fitted", "held_out" or "all".

    Raises:
        SplitWatchError: the loss is not finite, does not depend on the layer, or has no such layer or neurons.

    Source: Ding, Li & Sun 2026 (inner Hessian); Liu, Wu & Wang 2019 (splitting matrix).
    """
    curvature = layer_curvature(model, layer, probe, half, neurons)
    return curvature.dense(curvature.hessian)


@in_full_precision
def coupling(
    model: nn.Module, layer: HiddenLayer | str, probe: Probe, neurons: Sequence[int] | None = None, half: str = "all"
) -> Tensor:
    """Dense couplings G_r = E[e σ'(w_r·x) xᵀ], (k, c, d); arguments as for ``inner_hessian``."""
    curvature = layer_curvature(model, layer, probe, half, neurons)
    return curvature.dense(curvature.coupling)


@in_full_precision
def layer_curvature(
    model: nn.Module, layer: HiddenLayer | str, probe: Probe, half: str = "all", neurons: Sequence[int] | None = None
) -> LayerCurvature:
    """The curvature of some neurons of one hidden layer, all by default, on one half of the probe."""
    layer = one_layer(model, probe, layer)
    chosen = chosen_neurons(layer, neurons)
    (curvature,) = Sweep(model, probe, [layer], half).curvatures()
    if neurons is None:
        return curvature
    return curvature.restricted(torch.tensor(chosen, device=curvature.outgoing.device))
