"""What single neurons add to the outputs of their consumers, and whether that is the same for every input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitwatch.anatomy import Anatomy
from splitwatch.growth.widening import submodule
from splitwatch.linear_map import LinearMap
from splitwatch.probe import Probe
from splitwatch.records import Consumer, HiddenLayer
from splitwatch.undisturbed import undisturbed


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """What n neurons add to one consumer's o outputs: the bounds over samples and positions, both (n, o).

    ``scale`` (n,) is the size of the terms they are summed from, which rounding errors are to be compared with.
    """

    consumer: str
    low: Tensor
    high: Tensor
    scale: Tensor

    @property
    def value(self) -> Tensor:
        """The middle between the bounds, (n, o)."""
        return (self.low + self.high) / 2

    def constant(self, tolerance: float = 0.0) -> Tensor:
        """Whether the bounds agree to rounding, or to a tolerance relative to ``scale``, (n,) bool."""
        bound = max(tolerance, 64 * torch.finfo(self.low.dtype).eps)
        return (self.high - self.low).amax(1) <= bound * self.scale


def contributions(
    model: nn.Module, layer: HiddenLayer, neurons: Sequence[int], probe: Probe
) -> tuple[Contribution, ...]:
    """Per consumer, what each of some neurons adds to it on the probe, in eval mode.

    Zero padding of a consumer counts as input: next to it even a constant activation adds something else.
    """
    parts: dict[Consumer, list[Contribution]] = {consumer: [] for consumer in layer.consumers}
    for batch in probe.half("all"):
        with undisturbed(model):
            anatomy = Anatomy(model, probe.record(model, batch)[0])
            for consumer, found in parts.items():
                weight = submodule(model, consumer.name).weight.detach()
                for call in anatomy.calls.get(consumer.name, []):
                    found.append(_contribution(consumer, LinearMap.of(call), weight, neurons))
    return tuple(_joined(found) for found in parts.values())


def _contribution(consumer: Consumer, linear: LinearMap, weight: Tensor, neurons: Sequence[int]) -> Contribution:
    sizes, low, high, scale = linear.at(linear.input.abs()), [], [], []
    for neuron in neurons:
        start = consumer.start + neuron * consumer.stride
        alone = torch.zeros_like(weight)
        alone[:, start : start + consumer.stride] = weight[:, start : start + consumer.stride]
        added = linear(alone).movedim(linear.channel_axis, -1).flatten(0, -2)
        low.append(added.amin(0))
        high.append(added.amax(0))
        scale.append(sizes(alone.abs()).max())
    return Contribution(consumer.name, torch.stack(low), torch.stack(high), torch.stack(scale))


def _joined(parts: Sequence[Contribution]) -> Contribution:
    """The bounds over several batches."""
    low, high, scale = (torch.stack([getattr(part, name) for part in parts]) for name in ("low", "high", "scale"))
    return Contribution(parts[0].consumer, low.amin(0), high.amax(0), scale.amax(0))
