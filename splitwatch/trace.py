"""What one hidden layer sees of one batch: its linear maps, its path, the loss's gradients behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitwatch.anatomy import Anatomy, Slice
from splitwatch.grouped import by_channel
from splitwatch.linear_map import LinearMap
from splitwatch.records import HiddenLayer, SplitWatchError
from splitwatch.tape import Path, Tape


@dataclass(frozen=True, slots=True, eq=False)
class LayerTrace:
    """What one hidden layer sees on one batch: the per-neuron pieces of the loss with everything downstream frozen.

    ``producers`` and ``consumers`` are linear maps at the inputs they saw, ``weights`` and ``biases`` the producers'
    parameters, ``readers`` the consumers' weights by input channel, ``signals`` the gradients of the batch's mean loss
    in the consumers' outputs. ``share`` is the batch's share of its half's samples.
    """

    layer: HiddenLayer
    producers: tuple[LinearMap, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    path: Path
    consumers: tuple[LinearMap, ...]
    readers: tuple[Tensor, ...]
    signals: tuple[Tensor, ...]
    size: int
    share: float

    def pre_activations(self) -> tuple[Tensor, ...]:
        """The producers' outputs."""
        return tuple(p(w, b) for p, w, b in zip(self.producers, self.weights, self.biases, strict=True))


def trace(anatomy: Anatomy, layer: HiddenLayer, loss: Tensor, size: int, share: float) -> LayerTrace:
    """A layer's trace on a recorded batch of ``size`` samples, which are a ``share`` of their half's.

    Raises:
        SplitWatchError: the loss of this batch does not use the layer as others do, or does not depend on it.
    """
    if (where := _found(anatomy, layer)) is None:
        raise SplitWatchError(
            f"loss_fn: required losses that use layer {layer.name} alike, found a batch whose loss does not; "
            "leave it out of layers, or tell batches apart by a string or by their keys (several tasks)"
        )
    signals = _signals(anatomy.tape, [call.output for call in where.consumers], loss)
    if all(signal is None for signal in signals):
        raise SplitWatchError(
            f"loss_fn: the loss does not depend on layer {layer.name}; "
            "leave it out of layers, or check that nothing between the layer and the loss is detached"
        )
    return LayerTrace(
        layer=layer,
        producers=tuple(LinearMap.of(call) for call in where.producers),
        weights=tuple(call.weight.detach() for call in where.producers),
        biases=tuple(_detached(call.arguments["bias"]) for call in where.producers),
        path=Path(anatomy.tape, where.path, where.starts, where.ends),
        consumers=tuple(LinearMap.of(call) for call in where.consumers),
        readers=tuple(by_channel(call.weight.detach(), call.groups) for call in where.consumers),
        signals=tuple(
            torch.zeros_like(anatomy.tape.tensors[call.output]) if signal is None else signal.detach()
            for call, signal in zip(where.consumers, signals, strict=True)
        ),
        size=size,
        share=share,
    )


def _found(anatomy: Anatomy, layer: HiddenLayer) -> Slice | None:
    """Where a layer is in a recorded loss; None if that does not use it, or for other consumers."""
    if not all(anatomy.calls.get(name) for name in layer.producers):
        return None
    where, _ = anatomy.slice([anatomy.calls[name][0] for name in layer.producers])
    owners = [anatomy.owner(call.weight) for call in where.consumers]
    return where if [owner and owner[0] for owner in owners] == [x.name for x in layer.consumers] else None


def _signals(tape: Tape, outputs: Sequence[int], loss: Tensor) -> list[Tensor | None]:
    """Gradients of the loss in values of the tape as they were first put out; None for those it does not depend on."""
    edges = {value: tape.edges[value] for value in outputs if value in tape.edges}
    gradients = torch.autograd.grad([loss], list(edges.values()), retain_graph=True, allow_unused=True)
    return [dict(zip(edges, gradients, strict=True)).get(value) for value in outputs]


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
