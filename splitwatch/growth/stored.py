"""How redundant the neurons in a checkpoint file are, from the tensors and the growth it records, without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from splitwatch.anatomy import plain_name
from splitwatch.growth.checkpoint import by_layer, read_state, stored_histories, told_history
from splitwatch.growth.reduction import redundancy
from splitwatch.records import Consumer, HiddenLayer

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_FIELDS = ("weight", "bias", "running_mean", "running_var")


def stored_redundancy(path: str | os.PathLike[str], tolerance: float = 1e-6) -> dict[str, int | None]:
    """How many neurons of each layer that has grown are redundant; None where the file does not tell.

    It does not tell where the file lacks some of a layer's tensors, nor beside grouped convolutions. Constant neurons
    are not counted, since finding them takes a probe.

    Args:
        path: a Lightning checkpoint or a saved state dict.
        tolerance: as in ``critical_reduction``.

    Raises:
        SplitWatchError: the file holds no state dict, or the tolerance is negative.
    """
    state, checkpoint = read_state(path)
    parts = stored_histories(state) or {"": told_history(checkpoint)}
    return by_layer({prefix: _redundant(state, prefix, history, tolerance) for prefix, history in parts.items()})


def _redundant(
    state: Mapping[str, Tensor], prefix: str, history: Mapping[str, Mapping[str, Any]], tolerance: float
) -> dict[str, int | None]:
    """The same of one module that grew by itself."""
    tensors = {plain_name(name.removeprefix(f"{prefix}.")): tensor for name, tensor in state.items()}
    told = [name for name, entry in history.items() if _is_told(entry, tensors)]
    found = redundancy(
        _stand_in([history[name] for name in told], tensors),
        [_layer(name, history[name], tensors) for name in told],
        tolerance,
    )
    return {name: found.get(name) for name in history}


def _is_told(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    names = (*entry["producers"], *entry["riders"], *(name for name, _, _ in entry["consumers"]))
    return all(f"{name}.weight" in tensors for name in names)


def _layer(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> HiddenLayer:
    consumers = tuple(Consumer(*consumer) for consumer in entry["consumers"])
    width = len(tensors[f"{entry['producers'][0]}.weight"])
    producers, riders = tuple(entry["producers"]), tuple(entry["riders"])
    return HiddenLayer(name, width, producers, consumers, riders, groups=entry.get("groups", 1))


def _stand_in(entries: list[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module tree that holds the tensors of some layers under their names; it cannot be run."""
    root = nn.Module()
    riders = {name for entry in entries for name in entry["riders"]}
    linear = {name for entry in entries for name in (*entry["producers"], *(c[0] for c in entry["consumers"]))}
    for name in sorted(riders | linear, key=lambda name: name.count(".")):  # parents before what they contain
        *parents, leaf = name.split(".")
        place = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(leaf, _module(name, tensors, rider=name in riders))
    return root


def _module(name: str, tensors: Mapping[str, Tensor], rider: bool) -> nn.Module:
    """A module of the kind that has tensors of these shapes."""
    weight = tensors[f"{name}.weight"]
    if weight.ndim == 1:
        module = nn.BatchNorm1d(1) if f"{name}.bias" in tensors else nn.PReLU(1)
    else:
        module = _CONVOLUTIONS[weight.ndim](1, 1, 1) if weight.ndim in _CONVOLUTIONS else nn.Linear(1, 1)
    if rider and isinstance(module, nn.modules.conv._ConvNd):
        module.groups = len(weight)
    for field in _FIELDS:
        value = tensors.get(f"{name}.{field}")
        if value is not None and field in module._parameters:
            value = nn.Parameter(value, requires_grad=False)
        if hasattr(module, field):
            setattr(module, field, value)
    return module
