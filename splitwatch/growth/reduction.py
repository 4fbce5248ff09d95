"""From wide networks to narrow ones of the same function: critical reduction.

Neurons of equal incoming weights are merged, neurons that nobody reads are dropped (Zhang, Zhang & Luo 2024, Def. 4.4),
and neurons that put out a constant become part of their consumers' bias. Neurons that differ by a positive factor,
which a ReLU would also allow to merge, are left apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from splitwatch.growth.branch import Groups, checked_layers, held, replicas, silence, summed
from splitwatch.growth.checkpoint import make_growable
from splitwatch.growth.constant import contributions
from splitwatch.growth.surgery import Replacement, Surgery
from splitwatch.growth.widening import IndexMap, submodule
from splitwatch.handlers import columns, rows
from splitwatch.probe import Probe
from splitwatch.records import HiddenLayer


@dataclass(frozen=True, slots=True, eq=False)
class LayerReduction:
    """What became of one layer.

    ``merged`` are the groups of replicas that are now one neuron, ``dropped`` the neurons that nobody read, ``folded``
    those whose constant activation is now part of the consumers' bias.
    """

    layer: str
    old_width: int
    new_width: int
    merged: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]
    folded: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: HiddenLayer, groups: Groups, folded: Iterable[int] = ()) -> LayerReduction:
        """From the groups of neurons that were kept, and those that were folded."""
        folded = tuple(sorted(folded))
        dropped = set(range(layer.width)).difference(*groups, folded)
        merged = (tuple(group) for group in groups if len(group) > 1)
        return cls(layer.name, layer.width, len(groups), tuple(merged), tuple(sorted(dropped)), folded)


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
            folded = "  folded: " + ", ".join(map(str, item.folded)) if item.folded else ""
            widths = f"{item.old_width} → {item.new_width}"
            lines.append(f"  {item.layer}: {widths}  merged: {merged}  dropped: {dropped}{folded}")
        return "\n".join(lines)


def critical_reduction(
    model: nn.Module, layers: Iterable[HiddenLayer], *, tolerance: float = 1e-6, probe: Probe | None = None
) -> tuple[nn.Module, Reduction]:
    """A copy of the model without its redundant neurons, and the record of what was merged, dropped and folded.

    Neurons whose incoming weights agree are merged: the first one stays, outgoing weights are summed. Neurons without
    outgoing weights are dropped. Given a probe, neurons that read nothing are folded: what they add goes into the
    consumers' bias. One neuron per layer always stays. This is repeated until nothing changes, since a smaller layer
    may show its neighbours to be redundant.

    Args:
        model: the wide network, left as it is.
        layers: its hidden layers; those that cannot be widened are passed over, and those beside grouped convolutions,
            whose groups would have to shrink alike.
        tolerance: two neurons agree if their incoming weights (bias included, producer by producer) and the entries
            of BatchNorm, PReLU and depthwise convolutions differ by at most this relative to the larger. Outgoing
            weights count as zero up to this times the layer's largest, consumer by consumer; so do incoming weights
            without their bias, producer by producer. Exact at zero.
        probe: where a neuron that reads nothing is checked to add a constant, in eval mode; it stays where what it adds
            depends on the input (or, next to a consumer's zero padding, on the position), or a consumer has no bias.

    Raises:
        SplitWatchError: layers and model do not fit, or the tolerance is negative.

    Source: Zhang, Zhang & Luo 2024, Def. 4.4 (critical reduction); folding undoes the inactive units of Fukumizu et
    al. 2019.
    """
    given = tuple(layer for layer in checked_layers(model, layers, tolerance) if layer.groups == 1)
    work = _Reducer(copy.deepcopy(model), given, tolerance, probe)
    while any([work.merge(layer.name) or work.fold(layer.name) for layer in given]):
        pass
    make_growable(work.model).note([(layer, work.layers[layer.name].width) for layer in given])
    items = (LayerReduction.of(layer, work.kept[layer.name], work.folded[layer.name]) for layer in given)
    return work.model, Reduction(tuple(items), tolerance)


def redundancy(
    model: nn.Module, layers: Iterable[HiddenLayer], tolerance: float = 1e-6, *, probe: Probe | None = None
) -> dict[str, int]:
    """How many neurons of each hidden layer a critical reduction would save; arguments as there."""
    _, reduction = critical_reduction(model, layers, tolerance=tolerance, probe=probe)
    return {item.layer: item.old_width - item.new_width for item in reduction.layers}


class _Reducer:
    """A model that is reduced in place, where its layers are now, and which of the first neurons are left in them."""

    def __init__(self, model: nn.Module, given: tuple[HiddenLayer, ...], tolerance: float, probe: Probe | None) -> None:
        self.model, self.tolerance, self.probe = model, tolerance, probe
        self.layers = {layer.name: layer for layer in given}
        self.kept: dict[str, Groups] = {layer.name: [[r] for r in range(layer.width)] for layer in given}
        self.folded: dict[str, list[int]] = {layer.name: [] for layer in given}

    def merge(self, name: str) -> bool:
        """Merge the replicas of one layer and drop the silent, once; says whether anything changed."""
        layer = self.layers[name]
        groups = replicas(self.model, layer, self.tolerance)
        silent, loudness = silence(self.model, layer, groups, self.tolerance)
        if bool(silent.all()):
            silent[int(loudness.argmax())] = False
        return self._keep(layer, [group for group, gone in zip(groups, silent.tolist(), strict=True) if not gone])

    @torch.no_grad()
    def fold(self, name: str) -> bool:
        """Move what the constant neurons of one layer add into the consumers' bias; says whether anything changed."""
        layer = self.layers[name]
        unread = self._reading_nothing(layer)
        if self.probe is None or not unread or layer.width == 1:
            return False
        found = contributions(self.model, layer, unread, self.probe)
        constant = torch.ones(len(unread), dtype=torch.bool)
        for item in found:
            silent = (item.low == 0).all(1) & (item.high == 0).all(1)
            has_bias = submodule(self.model, item.consumer).bias is not None
            constant &= (item.constant(self.tolerance) if has_bias else silent).cpu()
        if len(unread) == layer.width:
            constant[0] = False
        gone = [r for r, yes in zip(unread, constant.tolist(), strict=True) if yes]
        for item in found:
            consumer = submodule(self.model, item.consumer)
            if gone and consumer.bias is not None:
                consumer.bias += item.value[constant.to(item.low.device)].sum(0)
        self.folded[name] += chain.from_iterable(self.kept[name][r] for r in gone)
        return self._keep(layer, [[r] for r in range(layer.width) if r not in gone])

    def _reading_nothing(self, layer: HiddenLayer) -> list[int]:
        """The neurons whose incoming weights are zero, but for the bias."""
        zero = torch.ones(layer.width, dtype=torch.bool)
        for name in layer.producers:
            size = submodule(self.model, name).weight.detach().double().flatten(1).norm(dim=1).cpu()
            zero &= size <= self.tolerance * size.max()
        return zero.nonzero().flatten().tolist()

    def _keep(self, layer: HiddenLayer, groups: Groups) -> bool:
        """Keep one neuron of each group; says whether that is a change."""
        removed, kept = layer.width - len(groups), self.kept[layer.name]
        if removed:
            _surgery(self.model, layer, groups).commit()
            self.kept[layer.name] = [sorted(chain.from_iterable(kept[r] for r in group)) for group in groups]
            self.layers[layer.name] = replace(layer, width=len(groups))
            _shift_columns(self.layers, layer, removed)
        return bool(removed)


def _surgery(model: nn.Module, layer: HiddenLayer, groups: Groups) -> Surgery:
    """The first neuron of each group, with the outgoing weights of all of them."""
    index = IndexMap(torch.tensor([group[0] for group in groups]), layer.width)
    removed, edits, sizes = layer.width - len(groups), [], []
    for name in (*layer.producers, *layer.riders):
        module = submodule(model, name)
        edits += [_replacement(module, field, tensor, index(tensor.detach())) for field, tensor in held(module)]
        sizes += [(module, size, len(groups)) for size in rows(module).sizes]
    for consumer in layer.consumers:
        module = submodule(model, consumer.name)
        places = replace(index, axis=1, start=consumer.start, stride=consumer.stride)
        for field in columns(module).tensors:
            tensor = getattr(module, field)
            blocks = summed(places.blocks(tensor.detach()), groups)
            edits.append(_replacement(module, field, tensor, places.put(tensor.detach(), blocks)))
        inputs = module.weight.shape[1] - removed * consumer.stride
        sizes += [(module, size, inputs) for size in columns(module).sizes]
    return Surgery(tuple(edits), tuple(sizes))


def _replacement(module: nn.Module, name: str, old: Tensor, new: Tensor) -> Replacement:
    parameter = isinstance(old, nn.Parameter)
    return Replacement(module, name, old, nn.Parameter(new, old.requires_grad) if parameter else new, ())


def _shift_columns(layers: dict[str, HiddenLayer], layer: HiddenLayer, removed: int) -> None:
    """Let layers that share a consumer with a reduced one know where their columns are now."""
    for gone in layer.consumers:
        for name, other in layers.items():
            moved = tuple(
                replace(c, start=c.start - removed * gone.stride) if c.name == gone.name and c.start > gone.start else c
                for c in other.consumers
            )
            layers[name] = replace(other, consumers=moved)
