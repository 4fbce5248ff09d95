"""What can be widened: hidden layers = producer(s) → per-channel path → consumer(s), found in unmodified models.

The loss is recorded on a tape and searched for them (``discovery``), once for every kind of batch. What cannot be
widened is reported with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from itertools import islice
from numbers import Integral
from typing import TYPE_CHECKING

from torch import nn

from splitwatch.anatomy import holds_weights, plain_modules
from splitwatch.batches import Batch, kind
from splitwatch.discovery import Discovery
from splitwatch.records import HiddenLayer, SplitWatchError, UnsupportedLayerError
from splitwatch.undisturbed import undisturbed

if TYPE_CHECKING:
    from splitwatch.probe import Probe


KINDS = 16
"""Kinds of batches that are looked at; of more, as where every batch has a name, the first ones."""


def find_hidden_layers(model: nn.Module, probe: Probe) -> tuple[HiddenLayer, ...]:
    """Every parametrised layer, as a hidden layer that can be widened or with the reason why not, such as no use of it.

    Args:
        model: any module; it is run once for every kind of batch, in eval mode, and left as it was.
        probe: its first batch is the one that is traced, and the first of every other kind, as tasks have their own.

    Raises:
        SplitWatchError: the loss is not finite or does not depend on any parameter.
    """
    kinds: dict[object, Batch] = {}
    for batch in probe.half("all"):
        kinds.setdefault(kind(batch), batch)
    first, *others = (_traced(model, probe, batch) for batch in islice(kinds.values(), KINDS))
    for other in others:
        first = {name: _agreed(layer, other.get(name)) for name, layer in first.items()}
    return tuple(first.values())


def _traced(model: nn.Module, probe: Probe, batch: Batch) -> dict[str, HiddenLayer]:
    """What the loss of one batch shows, by name."""
    with undisturbed(model):
        tape, loss = probe.record(model, batch)
        return {layer.name: layer for layer in Discovery(model, tape, loss).layers()}


def _agreed(layer: HiddenLayer, other: HiddenLayer | None) -> HiddenLayer:
    """A layer that batches of another kind use in the same way; with that as the reason, one that they do not."""
    alike = other is not None and astuple(other) == astuple(layer)
    if alike or not (layer.measurable or (other is not None and other.measurable)):
        return layer
    found = f"{other or 'it is part of another layer'}"
    return HiddenLayer(layer.name, layer.width, reason=f"not all batches use it alike, in some of them {found}")


def select_layers(
    layers: Iterable[HiddenLayer], names: Sequence[str] | None, *, to_measure: bool = False
) -> tuple[HiddenLayer, ...]:
    """The growable layers, or exactly those named, which only have to be measurable if that is what is done.

    Raises:
        SplitWatchError: a name does not exist.
        UnsupportedLayerError: a named layer cannot be widened (or measured).
    """
    by_name = {layer.name: layer for layer in layers}
    if names is None:
        return tuple(layer for layer in by_name.values() if layer.growable)
    for name in names:
        if name not in by_name:
            raise SplitWatchError(
                f"layers: required the dotted name of a layer the loss uses, found {name!r}; "
                f"choose from {', '.join(by_name) or 'none'}"
            )
        if not (by_name[name].growable or (to_measure and by_name[name].measurable)):
            raise UnsupportedLayerError(f"layers: {by_name[name]}")
    return tuple(by_name[name] for name in names)


def one_layer(model: nn.Module, probe: Probe, layer: HiddenLayer | str) -> HiddenLayer:
    """A layer to be measured, by its record or its name; errors as for ``select_layers``."""
    known = find_hidden_layers(model, probe) if isinstance(layer, str) else [layer]
    return select_layers(known, [layer if isinstance(layer, str) else layer.name], to_measure=True)[0]


def chosen_neurons(layer: HiddenLayer, neurons: Sequence[int] | None) -> list[int]:
    """The neurons meant, all by default.

    Raises:
        SplitWatchError: none is named, or one that the layer does not have.
    """
    chosen = list(range(layer.width) if neurons is None else neurons)
    if not chosen or not all(isinstance(r, Integral) and 0 <= r < layer.width for r in chosen):
        raise SplitWatchError(
            f"neurons: required indices from 0 to {layer.width - 1} of {layer.name}, found {chosen}; None means all"
        )
    return chosen


def check_names(model: nn.Module, names: Sequence[str] | None) -> None:
    """Refuse names of layers that a model does not have, which is known before the loss is.

    Raises:
        SplitWatchError: a name does not exist.
    """
    known = {name: module for name, module in plain_modules(model) if holds_weights(module)}
    if missing := [name for name in names or () if name not in known]:
        weighty = ", ".join(known)
        raise SplitWatchError(
            f"layers: required dotted names of the model's modules that hold weights, found {missing[0]!r}; "
            f"choose from {weighty or 'none'}"
        )
