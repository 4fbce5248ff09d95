"""Going through a probe for the curvature of many layers: kept in memory where that fits, captured anew where not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf

from torch import nn

from splitwatch.geometry.curvature import InnerCurvature, LayerCurvature
from splitwatch.geometry.response import Pattern
from splitwatch.probe import Probe
from splitwatch.ranks import largest_over_ranks, share_of
from splitwatch.records import HiddenLayer, SplitWatchError
from splitwatch.trace import LayerTrace

MAX_BYTES = 2**31
"""Default bound on what a measurement keeps in memory beside the model's own forward and backward pass."""

_TEMPORARIES = 8  # tensors as large as a layer's pre-activations that are in use while its path is differentiated


@dataclass(frozen=True, slots=True, eq=False)
class Recaptured:
    """A layer's curvature on each batch of a half, captured whenever it is gone through: a training pass a product."""

    sweep: Sweep
    layer: HiddenLayer

    def __iter__(self) -> Iterator[InnerCurvature]:
        return (parts[self.layer.name] for parts in self.sweep.batches([self.layer]))


class Sweep:
    """The curvatures of hidden layers on one half of a probe, several at a time where memory allows.

    Args:
        model: the network, left as it was.
        probe: where to measure.
        layers: the hidden layers.
        half: "fitted", "held_out" or "all".
        max_bytes: what may be kept in memory at a time. Layers go together as far as they fit; one that does not fit
            by itself is captured anew for every product. A batch whose capture would take more than that is captured
            piece by piece. Where several processes measure together, the one with most to keep decides for all.
    """

    def __init__(
        self, model: nn.Module, probe: Probe, layers: Sequence[HiddenLayer], half: str, max_bytes: int = MAX_BYTES
    ) -> None:
        self.model, self.probe, self.layers, self.half, self.max_bytes = model, probe, layers, half, max_bytes
        self.samples = probe.samples(half)
        self.weight = share_of(self.samples)
        self.sizes: dict[str, int] = {}
        if not 1 <= max_bytes < inf:
            raise SplitWatchError(f"max_bytes: required 1 byte or more, found {max_bytes}; {MAX_BYTES} is usual")
        self.patterns: dict[str, Pattern] = {}
        total, largest = probe.footprint(model, half)
        self.pieces = -(-(total + _TEMPORARIES * largest) // max_bytes)

    def batches(self, layers: Sequence[HiddenLayer] | None = None) -> Iterator[dict[str, InnerCurvature]]:
        """The curvatures by layer, of all layers by default, on one batch after the other."""
        layers = self.layers if layers is None else layers
        for traces in self.probe.traces(self.model, layers, self.half, self.pieces):
            yield {name: self._part(name, traces.pop(name)) for name in list(traces)}

    def curvatures(self) -> Iterator[LayerCurvature]:
        """Every layer's curvature on the whole half, one after the other; let go of one before taking the next."""
        if not self.layers:
            return
        batches = self.batches()
        first = next(batches)
        self.sizes = {
            name: int(largest_over_ranks(part.nbytes * self.samples // part.trace.size)) for name, part in first.items()
        }
        if self._fits(self.layers):
            yield from self._kept(self.layers, chain([first], batches))
            return
        del first, batches
        for group in self._groups():
            if self._fits(group):
                yield from self._kept(group, self.batches(group))
            else:
                yield from self._recaptured(group)

    def _part(self, name: str, trace: LayerTrace) -> InnerCurvature:
        part = InnerCurvature(trace, self.patterns.get(name))
        if all(shape.numel() for shape in part.response.shapes):  # a batch without samples tells nothing
            self.patterns[name] = part.response.pattern
        return part

    def _fits(self, group: Sequence[HiddenLayer]) -> bool:
        return sum(self.sizes[layer.name] for layer in group) <= self.max_bytes

    def _groups(self) -> Iterator[list[HiddenLayer]]:
        group: list[HiddenLayer] = []
        for layer in self.layers:
            if group and not self._fits([*group, layer]):
                yield group
                group = []
            group = [*group, layer]
        if group:
            yield group

    def _kept(
        self, group: Sequence[HiddenLayer], batches: Iterable[dict[str, InnerCurvature]]
    ) -> Iterator[LayerCurvature]:
        parts: dict[str, list[InnerCurvature]] = {layer.name: [] for layer in group}
        for batch in batches:
            for name, part in batch.items():
                parts[name].append(part)
        for layer in group:
            yield LayerCurvature.of(layer, tuple(parts.pop(layer.name)), self.weight)

    def _recaptured(self, group: Sequence[HiddenLayer]) -> Iterator[LayerCurvature]:
        for layer in group:
            yield LayerCurvature.of(layer, Recaptured(self, layer), self.weight)
