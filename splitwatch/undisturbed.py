"""Run a model without leaving a trace on it."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from splitwatch.precision import full_precision
from splitwatch.records import SplitWatchError

_STANDARD = frozenset(vars(nn.Module()))
"""What every module has; of it, only buffers hold what running a model may change."""

_COPIES: dict[type, Callable[[Any], Any]] = {
    **dict.fromkeys((list, deque), list),
    **dict.fromkeys((dict, OrderedDict, defaultdict, Counter), dict),
    set: set,
}
"""How to copy containers that can be filled again, by their exact type: others may do more than hold."""


_WRITTEN: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""By module, from its first run on: the names of its parameters that a run was seen to write to."""


@contextmanager
def undisturbed(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Eval mode, full precision and nothing compiled inside; everything outside is as before, to the bit.

    With ``training`` modules stay in the modes that they are in, but for those that count batches: BatchNorm's running
    statistics change without a trace in their versions.

    RNG states (of torch, Python and NumPy, and generators that modules hold), modes, precision flags, buffers,
    parameters that the run writes to (momentum encoders, weights clamped in the forward pass) and whatever else modules
    hold as attributes are put back: counters, lists, dicts, tensors, metric states. Hooks on parameters are not called,
    gradients are those of the loss. Objects of other classes stay the objects they are; what a run does inside of them
    stays done, as in modules other than the model.

    Raises:
        SplitWatchError: the parameters are on several devices, or hold no values.
    """
    check_parameters(model)
    with full_precision(model), torch.compiler.set_stance("force_eager"), _restored(model, training), _hookless(model):
        yield


def check_parameters(model: nn.Module) -> None:
    """Refuse models that cannot be run as they are.

    Raises:
        SplitWatchError: the parameters are on several devices, hold no values, or are shards.
    """
    check_whole(model)
    where: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise SplitWatchError(
                f"model: required parameters with values, found {name} uninitialised; run the model on a batch first"
            )
        where.setdefault(str(parameter.device), name)
    if "meta" in where:
        raise SplitWatchError(
            f"model: required parameters with values, found {where['meta']} on the meta device; "
            "use model.to_empty(device=...) and load or initialise them first"
        )
    if len(where) > 1:
        found = ", ".join(f"{device} ({name})" for device, name in sorted(where.items()))
        raise SplitWatchError(
            f"model: required parameters on one device, found {found}; move the model to one with model.to(device)"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only its part of a tensor, as a ``DTensor``; that class is slow to import."""
    return hasattr(tensor, "full_tensor")


def check_whole(model: nn.Module) -> None:
    """Refuse models of which each process holds only a part.

    Raises:
        SplitWatchError: a parameter is a shard.
    """
    shard = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if shard is not None:
        raise SplitWatchError(
            f"model: required parameters that are whole, found {shard} sharded over processes; let Grower or "
            "SplitWatch measure and grow it, which gather it first"
        )


@contextmanager
def _restored(model: nn.Module, training: bool) -> Iterator[None]:
    """Eval mode inside, but for ``training``; RNG states, modes and what modules hold outside are as before."""
    modes = {module: module.training for module in model.modules()}
    held = _Held(model)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), _forked():
        try:
            for module in [module for module in modes if isinstance(module, _NormBase)] if training else [model]:
                module.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            held.put_back()


@contextmanager
def _hookless(model: nn.Module) -> Iterator[None]:
    """Parameters without the hooks that change or note the gradients of training."""
    hooked = [(p, p._backward_hooks) for p in model.parameters() if p._backward_hooks]
    try:
        for parameter, _ in hooked:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


@contextmanager
def _forked() -> Iterator[None]:
    """The generators of Python and NumPy, which data augmentation draws from, are as before."""
    python, legacy = random.getstate(), numpy.random.get_state(legacy=False)
    try:
        yield
    finally:
        if random.getstate() != python:  # much faster to compare than to set
            random.setstate(python)
        numpy.random.set_state(legacy)


class _Held:
    """What modules hold besides modules and hooks: attributes, parameters, buffers, containers, tensors' values.

    Containers are put back in place, so that whoever else holds them sees the same; only what changed is touched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names: list[tuple[dict, dict]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int, bool, Tensor]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._parameters: list[tuple[nn.Module, str, nn.Parameter, int, Tensor | None, bool]] = []
        for module in model.modules():
            own, written = vars(module), _WRITTEN.get(module)
            for name, p in module._parameters.items():
                if p is not None and not p.is_inference():
                    kept = self._values(p, written, name)
                    self._parameters.append((module, name, p, p._version, kept, written is None))
            self._names.append((own, own.copy()))
            self._keep(module._buffers)
            for name in own.keys() - _STANDARD:
                self._keep(own[name])

    def _keep(self, value: Any) -> None:
        kind = type(value)
        if kind in _COPIES:
            self._containers.append((value, _COPIES[kind](value)))
            for inner in self._inside(value):  # lists of losses by name grow as often as lists do
                self._keep(inner)
        elif kind is torch.Generator:
            self._generators.append((value, value.get_state()))
        elif isinstance(value, Tensor) and not (isinstance(value, nn.Parameter) or value.is_inference()):
            self._tensors.append((value, value._version, value.requires_grad, value.detach().clone()))

    @staticmethod
    def _inside(container: Any) -> Iterable[Any]:
        """What may hold more: the values of a dict, the parts of a sequence of containers, not of one of numbers."""
        if isinstance(container, dict):
            return container.values()
        return container if isinstance(container, (list, deque)) and container and type(container[0]) in _COPIES else ()

    def put_back(self) -> None:
        """Bind every name to what it was bound to, then give containers and tensors their contents."""
        for own, before in self._names:
            if not _same(own, before):
                for name in own.keys() - before.keys() - _STANDARD:
                    del own[name]
                own.update(before)
        for container, before in self._containers:
            if not _same(container, before):
                container.clear()
                (container.update if isinstance(container, (dict, set)) else container.extend)(before)
        for generator, state in self._generators:
            generator.set_state(state)
        with torch.no_grad():
            for tensor, version, requires_grad, value in self._tensors:
                if tensor._version != version:
                    (tensor if tensor.requires_grad == requires_grad else tensor.detach_()).copy_(value)
        for module, name, parameter, version, value, first in self._parameters:
            written = _WRITTEN.setdefault(module, set())
            if value is not None and not (first and torch.equal(parameter.detach().cpu(), value)):
                parameter.data.copy_(value)
                written.add(name)
            elif parameter._version != version:
                written.add(name)

    @staticmethod
    def _values(parameter: nn.Parameter, written: set[str] | None, name: str) -> Tensor | None:
        """A copy: of every parameter for the first run, in the host's memory, then of those that were written to."""
        if written is None:
            return parameter.detach().to("cpu", copy=True)
        return parameter.detach().clone() if name in written else None


def _same(now: Any, before: Any) -> bool:
    """Whether a container holds the same objects in the same order; they are not compared, which tensors refuse."""
    if isinstance(now, set):
        return now == before
    if len(now) != len(before) or not all(map(is_, now, before)):
        return False
    return not isinstance(now, dict) or all(map(is_, now.values(), before.values()))
