"""From narrow networks to wide ones of the same function: critical embedding. The way back is ``reduction``.

Three ways to add neurons (w, v) and leave the function alone (Fukumizu et al. 2019), each giving a new model back:

* unit replication: a neuron becomes k copies (w, λ_j v) with Σ λ_j = 1; stationary points stay stationary;
* inactive propagation: v = 0 and any w; every gradient stays as it was and ∂L/∂w = 0, but ∂L/∂v = E[e σ(w·x)];
* inactive units: w = 0 but for a bias β and any v, whose constant σ(β) v the consumers' bias takes back; every gradient
  stays as it was and ∂L/∂v = σ(β) ∂L/∂b, but ∂L/∂w = E[v·e σ'(β) x].

So of the latter two alone neither keeps a point stationary in general; v = 0 and w = 0 but for a bias does, where the
consumers' biases are stationary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.checkpoint import remember
from splitwatch.growth.constant import contributions
from splitwatch.growth.reduction import LayerReduction, Reduction, critical_reduction, redundancy
from splitwatch.growth.surgery import prepare
from splitwatch.growth.widening import submodule
from splitwatch.layers import select_layers
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, HiddenLayer, Split, SplitWatchError, Sprout

__all__ = [
    "LayerReduction",
    "Reduction",
    "critical_embedding",
    "critical_reduction",
    "inactive_propagation",
    "inactive_units",
    "redundancy",
    "unit_replication",
]


def critical_embedding(model: nn.Module, layer: HiddenLayer, neuron: int, coefficients: Sequence[float]) -> nn.Module:
    """A copy of the model in which one neuron is replaced by k copies with outgoing weights λ_j v.

    Args:
        model: the narrow network, left as it is.
        layer: one of its hidden layers.
        neuron: which neuron; the first copy stands in its place, the others after the layer's last neuron. Beside
            grouped convolutions one neuron alone cannot be replaced, see ``unit_replication``.
        coefficients: λ (k,), any real numbers that sum to 1, zeros and negative ones included.

    Raises:
        SplitWatchError: the coefficients do not sum to 1, or layer and model do not fit.
        UnsupportedLayerError: the layer cannot be widened.

    Source: Fukumizu & Amari 2000, Thm 1; unit replication in Zhang, Zhang & Luo 2024, Def. 4.3.
    """
    return unit_replication(model, layer, [neuron], [coefficients])


def unit_replication(
    model: nn.Module, layer: HiddenLayer, neurons: Sequence[int], coefficients: Sequence[Sequence[float]] | Tensor
) -> nn.Module:
    """A copy of the model in which several neurons of a layer are replaced by copies at once.

    Args:
        model: the narrow network, left as it is.
        layer: one of its hidden layers.
        neurons: n different neurons; the first copy of each stands in its place, the others after the layer's last
            neuron, in the order of the rows. Beside grouped convolutions they stand after the last one of their group,
            and groups have to grow alike.
        coefficients: one row of λ per neuron, (n, k) or rows of different lengths; each row is a point of the affine
            hyperplane Σ_j λ_j = 1, zeros and negative entries included.

    Raises:
        SplitWatchError: rows and neurons do not match, a row does not sum to 1, or layer and model do not fit.
        UnsupportedLayerError: the layer cannot be widened.

    Source: Zhang, Zhang & Luo 2024, Def. 4.3 (critical embedding).
    """
    if len(coefficients) != len(neurons):
        raise SplitWatchError(
            f"coefficients: required one row per neuron ({len(neurons)}), found {len(coefficients)} rows"
        )
    moves = []
    for neuron, row in zip(neurons, coefficients, strict=True):
        weights = tuple(float(value) for value in row)
        offsets = [torch.zeros(len(weights), values.shape[1]) for values in _weights(model, layer)]
        moves.append(Split(layer.name, neuron, weights, *offsets, predicted_decrease=0.0, reason="unit replication"))
    return _embedded(model, layer, moves)


def inactive_propagation(model: nn.Module, layer: HiddenLayer, incoming: Tensor) -> nn.Module:
    """A copy of the model with new neurons of given incoming and zero outgoing weights, after the layer's last one.

    Args:
        model: the narrow network, left as it is.
        layer: one of its hidden layers.
        incoming: w (k, d), the bias of each producer that has one after its weights.

    Raises:
        SplitWatchError: the weights have another shape, or layer and model do not fit.
        UnsupportedLayerError: the layer cannot be widened, has a depthwise convolution, which has no kernel for a new
            neuron, or stands beside a grouped one, where a new neuron has no group.

    Source: Fukumizu et al. 2019 (inactive propagation); zero-output neurons in Zhang, Zhang & Luo 2024.
    """
    _, v = _weights(model, layer)
    return _embedded(model, layer, [Sprout(layer.name, w, w.new_zeros(v.shape[1])) for w in incoming])


def inactive_units(
    model: nn.Module, layer: HiddenLayer, biases: Sequence[float] | Tensor, outgoing: Tensor, probe: Probe
) -> nn.Module:
    """A copy of the model with new neurons that read nothing; the consumers' bias takes back what they add.

    Args:
        model: the narrow network, left as it is.
        layer: one of its hidden layers.
        biases: β (k,), of every producer of the layer that has a bias; the other incoming weights are zero.
        outgoing: v (k, c), consumer by consumer, as in ``geometry.weights.outgoing_weights``.
        probe: where what the neurons add is measured, in eval mode, and checked to be constant.

    Raises:
        SplitWatchError: what a neuron adds depends on the input or, next to a consumer's zero padding, on the position;
            a consumer has no bias to take it back; shapes or layer and model do not fit.
        UnsupportedLayerError: as in ``inactive_propagation``.

    Source: Fukumizu et al. 2019 (inactive units), there for σ(β) = 0; a constant σ(β) is what the bias makes of it.
    """
    if len(biases) != len(outgoing):
        raise SplitWatchError(f"biases: required one per row of outgoing ({len(outgoing)}), found {len(biases)}")
    where = _bias_places(model, layer)
    moves = [Sprout(layer.name, where * float(b), v) for b, v in zip(biases, outgoing, strict=True)]
    wide = _embedded(model, layer, moves)
    grown = HiddenLayer(layer.name, layer.width + len(moves), layer.producers, layer.consumers)
    for item in contributions(wide, grown, range(layer.width, grown.width), probe):
        bias = submodule(wide, item.consumer).bias
        if not bool(item.constant().all()):
            spread = float((item.high - item.low).max())
            raise SplitWatchError(
                f"layer: required a path to {item.consumer} on which neurons of {layer.name} that read nothing add the "
                f"same everywhere, found a range of {spread:.2e} on the probe; look for zero padding in the consumer, "
                "pooling with padding, or a gate that depends on the input"
            )
        if bias is None and bool((item.value != 0).any()):
            raise SplitWatchError(
                f"layer: required a bias in {item.consumer} to take back what constant neurons of {layer.name} add, "
                "found none; use inactive_propagation"
            )
        if bias is not None:
            with torch.no_grad():
                bias -= item.value.sum(0)
    return wide


def _bias_places(model: nn.Module, layer: HiddenLayer) -> Tensor:
    """Incoming weights (d,) that are one at the biases and zero elsewhere."""
    (layer,) = select_layers([layer], [layer.name])
    producers = [submodule(model, name) for name in layer.producers]
    parts = [
        torch.tensor([0.0] * module.weight[0].numel() + [1.0] * (module.bias is not None), dtype=torch.float64)
        for module in producers
    ]
    return torch.cat(parts)


def _weights(model: nn.Module, layer: HiddenLayer) -> tuple[Tensor, Tensor]:
    (layer,) = select_layers([layer], [layer.name])
    return neuron_weights(model, layer)


def _embedded(model: nn.Module, layer: HiddenLayer, moves: Sequence[Split | Sprout]) -> nn.Module:
    """A copy of the model, widened by moves that leave its function as it is."""
    (layer,) = select_layers([layer], [layer.name])
    wide = copy.deepcopy(model)
    plan = GrowthPlan((layer,), tuple(moves), "critical embedding")
    prepare(wide, plan).commit()
    remember(wide, plan)
    return wide
