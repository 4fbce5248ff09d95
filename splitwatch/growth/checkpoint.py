"""Let checkpoints cross widths: a narrow model loads a wide checkpoint, and the reverse.

A grown model carries its growth in the metadata of its state dict, which survives ``torch.save`` and
``weights_only=True``. A pre-hook on loading resizes exactly the tensors that growth could have changed; any other
mismatch is the user's and raises torch's own error.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from splitwatch.anatomy import plain_module, plain_name
from splitwatch.handlers import columns, rows
from splitwatch.records import GrowthPlan, HiddenLayer, SplitWatchError
from splitwatch.undisturbed import is_sharded

KEY = "splitwatch"
"""Under which growth is recorded, in the metadata of a state dict and in the state of a callback."""


class GrowthHistory:
    """Hook of a growable model: writes what grew into state dicts, resizes the model to those it loads.

    ``layers`` maps layer name to producers, riders, consumers with start and stride, and the widths it has had. Where a
    state dict has lost its metadata, ``elsewhere()`` is asked for them.
    """

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, Any]] = {}
        self.elsewhere: Callable[[], Mapping[str, Any]] = dict

    def add(self, plan: GrowthPlan) -> None:
        """Note what a plan widened."""
        added = Counter[str]()
        for move in plan.moves:
            added[move.layer] += move.added
        self.note([(layer, layer.width + added[layer.name]) for layer in plan.layers])

    def note(self, widths: Iterable[tuple[HiddenLayer, int]]) -> None:
        """Note the new widths of layers, given as they were; what was noted before is replaced, not changed."""
        layers, inserted = deepcopy(self.layers), list[tuple[str, int, int]]()
        for layer, width in widths:
            if width != layer.width:
                entry = layers.setdefault(layer.name, {"widths": [layer.width]})
                entry["producers"], entry["riders"] = list(layer.producers), list(layer.riders)
                entry["consumers"] = [[c.name, c.start, c.stride] for c in layer.consumers]
                entry["groups"] = layer.groups
                entry["widths"] = [*entry["widths"], width]
                inserted += [(c.name, c.start, (width - layer.width) * c.stride) for c in layer.consumers]
        self.layers = _shifted(layers, inserted)

    def __call__(self, module: nn.Module, state: Any, prefix: str, _local: Any) -> None:
        """State-dict post-hook: put the history into the metadata."""
        metadata = getattr(state, "_metadata", None)
        if metadata is not None and self.layers:
            metadata.setdefault(prefix.removesuffix("."), {})[KEY] = self.layers

    def on_load(self, module: nn.Module, state: Any, prefix: str, local: Mapping[str, Any], *_: Any) -> None:
        """Load pre-hook: give the model the widths of the state dict."""
        _make_parts_growable(module, state)  # torch shows their record to the outermost module alone
        stored = local.get(KEY) or self.elsewhere()
        state, prefix = {plain_name(name): tensor for name, tensor in state.items()}, plain_name(prefix)
        for name in {**self.layers, **stored}:
            _resize(module, state, prefix, stored.get(name) or self.layers[name])
        self.layers = {**self.layers, **stored}


def _shifted(layers: dict[str, dict[str, Any]], inserted: list[tuple[str, int, int]]) -> dict[str, dict[str, Any]]:
    """Move the first columns of layers, in place, behind so many columns inserted into (consumer, at, how many)."""
    for consumer in (c for entry in layers.values() for c in entry["consumers"]):
        name, start, _ = consumer
        consumer[1] += sum(count for other, place, count in inserted if other == name and place < start)
    return layers


def make_growable(model: nn.Module) -> GrowthHistory:
    """Let a model's state dicts cross widths; calling it again changes nothing. Returns the model's history."""
    model = plain_module(model)
    history = _history(model)
    if history is None:
        history = GrowthHistory()
        model.register_load_state_dict_pre_hook(history.on_load)
        model.register_state_dict_post_hook(history)
    return history


def is_growable(model: nn.Module) -> bool:
    """Whether ``make_growable`` was called on a model."""
    return _history(plain_module(model)) is not None


def recall(model: nn.Module) -> dict[str, dict[str, Any]] | None:
    """What a model's history tells so far; None for one that was not made growable."""
    history = _history(plain_module(model))
    return None if history is None else history.layers


def forget(model: nn.Module, layers: dict[str, dict[str, Any]] | None) -> None:
    """Put a model's history back to what ``recall`` gave."""
    model = plain_module(model)
    history = _history(model)
    if history is not None and layers is not None:
        history.layers = layers
    elif layers is None:
        for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]


def _history(model: nn.Module) -> GrowthHistory | None:
    return next((hook for hook in model._state_dict_hooks.values() if isinstance(hook, GrowthHistory)), None)


def _is_ours(hook: Any) -> bool:
    """Whether a hook is a history, or a bound method of one, as torch wraps it."""
    hook = getattr(hook, "hook", hook)
    return isinstance(getattr(hook, "__self__", hook), GrowthHistory)


def remember(model: nn.Module, plan: GrowthPlan) -> None:
    """Make a model growable and note a plan in its history."""
    make_growable(model).add(plan)


def read_history(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The growth that a Lightning checkpoint or a saved state dict records, by layer; empty where there is none.

    Raises:
        SplitWatchError: the file holds no state dict, or classes that torch does not load unasked.
    """
    state, checkpoint = read_state(path)
    return stored_history(state) or told_history(checkpoint)


def told_history(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The growth by layer that a callback's state in a Lightning checkpoint tells, empty where none does.

    A state dict that somebody rebuilt, to leave out frozen parameters for instance, has no metadata any more.
    """
    states = checkpoint.get("callbacks", {}).values()
    return next((state[KEY] for state in states if isinstance(state, Mapping) and state.get(KEY)), {})


def stored_histories(state: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The growth by layer of every module that grew by itself, by its prefix in a state dict."""
    metadata: Mapping[str, Any] = getattr(state, "_metadata", {})
    return {prefix: entry[KEY] for prefix, entry in metadata.items() if KEY in entry}


def stored_history(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All growth in a state dict by layer; where several modules grew by themselves, by their names in the whole."""
    return by_layer(stored_histories(state))


def by_layer(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of modules' layers, by prefix, all by layer: those of a single module by their names in it."""
    if len(parts) == 1:
        return dict(next(iter(parts.values())))
    return {f"{prefix}.{name}".lstrip("."): one for prefix, layers in parts.items() for name, one in layers.items()}


def read_state(path: str | os.PathLike[str]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The state dict in a file, and the checkpoint around it."""
    checkpoint = _loaded(path)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(map(_is_entry, state, state.values())):
        raise SplitWatchError(f"path: required a Lightning checkpoint or a state dict, found something else in {path}")
    return state, checkpoint


def _is_entry(name: Any, value: Any) -> bool:
    """Whether a state dict may hold this: tensors, and what modules return from ``get_extra_state``."""
    return isinstance(value, Tensor) or str(name).endswith("_extra_state")


def _loaded(path: str | os.PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SplitWatchError(f"path: required an existing file, found none at {path}") from None
    except (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        if names := _refused_classes(path):
            raise SplitWatchError(
                f"path: required tensors and plain values, found {', '.join(names)} in {path}; if you trust the file, "
                "name these classes to torch.serialization.add_safe_globals([...]) first"
            ) from error
        raise SplitWatchError(
            f"path: required a file that torch.save wrote, found something else at {path} ({type(error).__name__})"
        ) from error


def _refused_classes(path: str | os.PathLike[str]) -> list[str]:
    """The classes in a file that torch does not load without being told to; none where it is no such file."""
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError):
        return []


def load_grown(cls: Any, path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Build a module and load a checkpoint of any width into it.

    Args:
        cls: a class or function that builds the narrow module; it gets the saved hyperparameters that it takes.
        path: a Lightning checkpoint or a saved state dict.
        kwargs: passed to ``cls``, over the saved hyperparameters.

    Raises:
        SplitWatchError: the file holds no state dict, classes that torch does not load unasked, or tensors of another
            width and no record of what grew.
        RuntimeError: the tensors do not fit otherwise; torch's own.
    """
    state, checkpoint = read_state(path)
    model = cls(**{**_taken(cls, checkpoint.get("hyper_parameters", {})), **kwargs})
    history, *_ = _make_parts_growable(model, state) or [make_growable(model)]
    history.elsewhere = partial(told_history, checkpoint)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        if "size mismatch" not in str(error) or stored_histories(state) or told_history(checkpoint):
            raise
        raise SplitWatchError(
            f"path: required a record of what grew beside tensors of another width, found none in {path}; save the "
            "whole state dict of the module that grew: a part of it, or a dict made of its tensors, has no record"
        ) from error
    history.elsewhere = dict
    return model


def _make_parts_growable(model: nn.Module, state: Mapping[str, Any]) -> list[GrowthHistory]:
    """The histories of the modules whose growth a state dict records; the model's where it has none of that name."""
    modules = dict(model.named_modules())
    return [make_growable(modules.get(prefix.rstrip("."), model)) for prefix in stored_histories(state)]


def _taken(cls: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved hyperparameters that a class or function takes; names with an underscore are the savers' own."""
    parameters = signature(cls).parameters
    any_name = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {k: v for k, v in saved.items() if k in parameters or (any_name and not k.startswith("_"))}


def _resize(model: nn.Module, state: Mapping[str, Any], prefix: str, layer: Mapping[str, Any]) -> None:
    new = state.get(f"{prefix}{layer['producers'][0]}.weight")
    if new is None:
        return
    width = len(new)
    for name in (*layer["producers"], *layer["riders"]):
        fields = rows(module := plain_module(model, name))
        _set_width(module, fields.tensors, 0, width)
        for size in fields.sizes:
            setattr(module, size, width)
    for name, _, stride in layer["consumers"]:
        module: Any = plain_module(model, name)
        saved = state.get(f"{prefix}{name}.weight")
        inputs, groups = module.weight.shape[1] if saved is None else saved.shape[1], getattr(module, "groups", 1)
        if (inputs - module.weight.shape[1]) * groups % stride == 0:
            _set_width(module, columns(module).tensors, 1, inputs)
            for size in columns(module).sizes:
                setattr(module, size, inputs * groups)


def _set_width(module: nn.Module, names: tuple[str, ...], axis: int, width: int) -> None:
    """Give tensors another length along an axis, parameters in place; what they hold is about to be overwritten."""
    for name in names:
        tensor = getattr(module, name)
        if tensor is None or tensor.shape[axis] == width:
            continue
        shape = [width if i == axis else n for i, n in enumerate(tensor.shape)]
        if is_sharded(tensor):
            raise SplitWatchError(
                f"state_dict: required the widths of a model that is sharded already, found {width} for "
                f"{tensor.shape[axis]}; call splitwatch.load_grown before fully_shard"
            )
        empty = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        if isinstance(tensor, nn.Parameter):  # stays the one that optimizers own
            tensor.data, tensor.grad = empty, None
        else:
            setattr(module, name, empty)
