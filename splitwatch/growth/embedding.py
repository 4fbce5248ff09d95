"""Between narrow and wide networks of one function: critical embedding and critical reduction.

A neuron (w, v) that becomes k copies (w, λ_j v) with Σ λ_j = 1 leaves the network's function as it was, and every
stationary point stationary (Fukumizu & Amari 2000, Thm 1). The way back merges neurons of equal incoming weights and
drops neurons that nobody reads (Zhang, Zhang & Luo 2024, Def. 4.3 and 4.4). Both give new models back; neurons that
differ by a positive factor, which a ReLU would also allow to merge, are left apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from splitwatch.geometry.weights import incoming_weights, neuron_weights
from splitwatch.growth.checkpoint import make_growable, remember
from splitwatch.growth.handlers import columns, rows
from splitwatch.growth.surgery import Replacement, Surgery, prepare
from splitwatch.growth.widening import IndexMap, submodule
from splitwatch.layers import select_layers
from splitwatch.records import GrowthPlan, HiddenLayer, Split, SplitWatchError

Groups = list[list[int]]


@dataclass(frozen=True, slots=True, eq=False)
class LayerReduction:
    """What became of one layer: ``merged`` are the groups of replicas that are now one neuron, ``dropped`` is gone."""

    layer: str
    old_width: int
    new_width: int
    merged: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]

    @classmethod
    def of(cls, layer: HiddenLayer, groups: Groups) -> LayerReduction:
        """From the groups of neurons that were kept."""
        dropped = set(range(layer.width)).difference(*groups)
        merged = (tuple(group) for group in groups if len(group) > 1)
        return cls(layer.name, layer.width, len(groups), tuple(merged), tuple(sorted(dropped)))


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """What a critical reduction found, layer by layer, and how equal neurons had to be to be merged."""

    layers: tuple[LayerReduction, ...]
    tolerance: float

    def __str__(self) -> str:
        lines = [f"critical reduction at relative tolerance {self.tolerance:g}"]
        for item in self.layers:
            merged = ", ".join("=".join(map(str, group)) for group in item.merged) or "none"
            dropped = ", ".join(map(str, item.dropped)) or "none"
            lines.append(f"  {item.layer}: {item.old_width} → {item.new_width}  merged: {merged}  dropped: {dropped}")
        return "\n".join(lines)


def critical_embedding(model: nn.Module, layer: HiddenLayer, neuron: int, coefficients: Sequence[float]) -> nn.Module:
    """A copy of the model in which one neuron is replaced by k copies with outgoing weights λ_j v.

    Args:
        model: the narrow network, left as it is.
        layer: one of its hidden layers.
        neuron: which neuron; the first copy stands in its place, the others after the layer's last neuron.
        coefficients: λ (k,), any real numbers that sum to 1, zeros and negative ones included.

    Raises:
        SplitWatchError: the coefficients do not sum to 1, or layer and model do not fit.
        UnsupportedLayerError: the layer cannot be widened.

    Source: Fukumizu & Amari 2000, Thm 1; unit replication in Zhang, Zhang & Luo 2024, Def. 4.3.
    """
    (layer,) = select_layers([layer], [layer.name])
    weights = tuple(float(value) for value in coefficients)
    wide = copy.deepcopy(model)
    offsets = [torch.zeros(len(weights), values.shape[1]) for values in neuron_weights(wide, layer)]
    move = Split(layer.name, neuron, weights, *offsets, predicted_decrease=0.0, reason="critical embedding")
    plan = GrowthPlan((layer,), (move,), "critical embedding")
    prepare(wide, plan).commit()
    remember(wide, plan)
    return wide


def critical_reduction(
    model: nn.Module, layers: Iterable[HiddenLayer], *, tolerance: float = 1e-6
) -> tuple[nn.Module, Reduction]:
    """A copy of the model without its redundant neurons, and the record of what was merged and dropped.

    Neurons whose incoming weights agree are merged: the first one stays, outgoing weights are summed. Neurons without
    outgoing weights are dropped; one neuron per layer always stays. This is repeated until nothing changes, since a
    smaller layer may show its neighbours to be redundant.

    Args:
        model: the wide network, left as it is.
        layers: its hidden layers; those that cannot be widened are passed over.
        tolerance: two neurons agree if their incoming weights (bias included, producer by producer) and the entries
            of BatchNorm, PReLU and depthwise convolutions differ by at most this relative to the larger. Outgoing
            weights count as zero up to this times the layer's largest, consumer by consumer. Exact at zero.

    Raises:
        SplitWatchError: layers and model do not fit, or the tolerance is negative.

    Source: Zhang, Zhang & Luo 2024, Def. 4.4 (critical reduction).
    """
    if not tolerance >= 0:
        raise SplitWatchError(f"tolerance: required a number ≥ 0, found {tolerance}; 1e-6 is the default")
    given = select_layers(layers, None)
    narrow = copy.deepcopy(model)
    for layer in given:
        found = len(submodule(narrow, layer.name).weight)
        if found != layer.width:
            raise SplitWatchError(
                f"layers: required {layer.width} neurons in {layer.name}, found {found}; find them again"
            )
    current = {layer.name: layer for layer in given}
    kept = {layer.name: [[r] for r in range(layer.width)] for layer in given}
    while any([_reduce(narrow, name, current, kept, tolerance) for name in current]):
        pass
    _remember_widths(narrow, [(layer, current[layer.name].width) for layer in given])
    return narrow, Reduction(tuple(LayerReduction.of(layer, kept[layer.name]) for layer in given), tolerance)


def redundancy(model: nn.Module, layers: Iterable[HiddenLayer], tolerance: float = 1e-6) -> dict[str, int]:
    """How many neurons of each hidden layer a critical reduction would save; arguments as there."""
    _, reduction = critical_reduction(model, layers, tolerance=tolerance)
    return {item.layer: item.old_width - item.new_width for item in reduction.layers}


def _reduce(model: nn.Module, name: str, layers: dict[str, HiddenLayer], kept: dict[str, Groups], tol: float) -> bool:
    """Reduce one layer in place, once; says whether anything changed."""
    layer = layers[name]
    groups = _replicas(model, layer, tol)
    silent = _silent(model, layer, groups, tol)
    groups = [group for group, gone in zip(groups, silent, strict=True) if not gone]
    if removed := layer.width - len(groups):
        _surgery(model, layer, groups).commit()
        kept[name] = [sorted(chain.from_iterable(kept[name][r] for r in group)) for group in groups]
        layers[name] = replace(layer, width=len(groups))
        _shift_columns(layers, layer, removed)
    return bool(removed)


def _replicas(model: nn.Module, layer: HiddenLayer, tol: float) -> Groups:
    """Groups of neurons that agree with the first one of their group; every neuron is in one of them."""
    equal = torch.ones(layer.width, layer.width, dtype=torch.bool)
    for values in _identity(model, layer):
        size = values.norm(dim=1)
        apart = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
        equal &= apart <= tol * torch.maximum(size[:, None], size)
    groups: dict[int, list[int]] = {}
    for r, row in enumerate(equal.tolist()):
        first = next((s for s in groups if row[s]), r)
        groups.setdefault(first, []).append(r)
    return list(groups.values())


def _silent(model: nn.Module, layer: HiddenLayer, groups: Groups, tol: float) -> list[bool]:
    """Which groups no consumer hears; never all of them."""
    silent = torch.ones(len(groups), dtype=torch.bool)
    loudness = torch.zeros(len(groups), dtype=torch.float64)
    for blocks in _outgoing(model, layer):
        total = _summed(blocks, groups).double().flatten(1).norm(dim=1).cpu()
        silent &= total <= tol * blocks.double().flatten(1).norm(dim=1).max().cpu()
        loudness = torch.maximum(loudness, total)
    if bool(silent.all()):
        silent[int(loudness.argmax())] = False
    return silent.tolist()


def _surgery(model: nn.Module, layer: HiddenLayer, groups: Groups) -> Surgery:
    """The first neuron of each group, with the outgoing weights of all of them."""
    index = IndexMap(torch.tensor([group[0] for group in groups]), layer.width)
    removed, edits, sizes = layer.width - len(groups), [], []
    for name in (*layer.producers, *layer.riders):
        module = submodule(model, name)
        edits += [_replacement(module, field, tensor, index(tensor.detach())) for field, tensor in _held(module)]
        sizes += [(module, size, len(groups)) for size in rows(module).sizes]
    for consumer in layer.consumers:
        module = submodule(model, consumer.name)
        places = replace(index, axis=1, start=consumer.start, stride=consumer.stride)
        for field in columns(module).tensors:
            tensor = getattr(module, field)
            blocks = _summed(places.blocks(tensor.detach()), groups)
            edits.append(_replacement(module, field, tensor, places.put(tensor.detach(), blocks)))
        inputs = module.weight.shape[1] - removed * consumer.stride
        sizes += [(module, size, inputs) for size in columns(module).sizes]
    return Surgery(tuple(edits), tuple(sizes))


def _replacement(module: nn.Module, name: str, old: Tensor, new: Tensor) -> Replacement:
    parameter = isinstance(old, nn.Parameter)
    return Replacement(module, name, old, nn.Parameter(new, old.requires_grad) if parameter else new, ())


def _held(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a module that have one entry per neuron."""
    tensors = [(name, getattr(module, name)) for name in rows(module).tensors]
    return [(name, tensor) for name, tensor in tensors if tensor is not None]


def _summed(blocks: Tensor, groups: Groups) -> Tensor:
    return torch.stack([blocks[group].sum(0) for group in groups])


def _shift_columns(layers: dict[str, HiddenLayer], layer: HiddenLayer, removed: int) -> None:
    """Let layers that share a consumer with a reduced one know where their columns are now."""
    for gone in layer.consumers:
        for name, other in layers.items():
            moved = tuple(
                replace(c, start=c.start - removed * gone.stride) if c.name == gone.name and c.start > gone.start else c
                for c in other.consumers
            )
            layers[name] = replace(other, consumers=moved)


def _identity(model: nn.Module, layer: HiddenLayer) -> list[Tensor]:
    """Everything that makes a neuron's activation what it is, part by part, one row a neuron."""
    producers = [submodule(model, name) for name in layer.producers]
    parts = [incoming_weights([module.weight], [module.bias]) for module in producers]
    riders = [tensor for name in layer.riders for _, tensor in _held(submodule(model, name))]
    return [part.detach().reshape(layer.width, -1).double().cpu() for part in (*parts, *riders)]


def _outgoing(model: nn.Module, layer: HiddenLayer) -> list[Tensor]:
    """Views of the consumers' weights, one block a neuron."""
    unchanged = IndexMap(torch.arange(layer.width), layer.width, axis=1)
    return [
        replace(unchanged, start=c.start, stride=c.stride).blocks(submodule(model, c.name).weight.detach())
        for c in layer.consumers
    ]


def _remember_widths(model: nn.Module, widths: Iterable[tuple[HiddenLayer, int]]) -> None:
    """Let the reduced model's checkpoints be loaded by models of any width."""
    history = make_growable(model)
    for layer, width in widths:
        if width != layer.width:
            entry = history.layers.setdefault(layer.name, {"widths": [layer.width]})
            entry["producers"], entry["riders"] = list(layer.producers), list(layer.riders)
            entry["consumers"] = [[c.name, c.start, c.stride] for c in layer.consumers]
            entry["widths"] = [*entry["widths"], width]
