"""Record what the loss really computes, and replay slices of it.

A ``Tape`` sees every call of the torch API made under it, with real values, so models need no base class, no naming
rules and may branch on their data. Calls are kept in static single assignment: a tensor that is changed in place gets
a new value number, so ``ReLU(inplace=True)`` is an operation like any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from splitwatch.records import SplitWatchError

Value = int
"""The number of a value on the tape."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One recorded call: ``leaves`` are the flattened arguments, ``inputs`` maps leaf position to value.

    ``outputs`` maps the position among the flattened results to a value, ``mutated`` the position of a leaf that the
    call changed in place to the value it has afterwards.
    """

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    inputs: dict[int, Value]
    outputs: dict[int, Value]
    mutated: dict[int, Value]

    @property
    def name(self) -> str:
        """The function's short name, such as ``gelu``."""
        full = resolve_name(self.function) or getattr(self.function, "__name__", repr(self.function))
        return full.removesuffix(".__get__").rsplit(".", 1)[-1].strip("_")

    @property
    def results(self) -> tuple[Value, ...]:
        """Every value the call defines."""
        return (*self.outputs.values(), *self.mutated.values())

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The recorded positional and keyword arguments."""
        return pytree.tree_unflatten(list(self.leaves), self.spec)


def _edge(tensor: Tensor) -> GradientEdge | None:
    """Where a tensor stands in the graph; nowhere, if it is a view taken under ``no_grad``, whatever it says itself."""
    try:
        return get_gradient_edge(tensor)
    except AssertionError:
        return None


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _tensors(leaves: Iterable[Any]) -> dict[int, Tensor]:
    return {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


class Tape(TorchFunctionMode):
    """Records the torch calls made inside ``with tape:``; tensors stay alive as long as the tape does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.tensors: list[Tensor] = []
        self.edges: dict[Value, GradientEdge] = {}
        self.source: dict[Value, int] = {}
        self.uses: dict[Value, list[int]] = defaultdict(list)
        self._numbers: dict[int, Value] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        before = {i: (tensor, _version(tensor)) for i, tensor in _tensors(leaves).items()}
        inputs = {i: self.value(tensor) for i, (tensor, _) in before.items()}
        result = func(*args, **(kwargs or {}))
        mutated = {i: self._define(t) for i, (t, version) in before.items() if _version(t) != version}
        outputs = {
            i: self.value(tensor) if any(tensor is before[j][0] for j in mutated) else self._define(tensor)
            for i, tensor in _tensors(pytree.tree_leaves(result)).items()
        }
        if outputs or mutated:
            self._append(Call(func, tuple(leaves), spec, inputs, outputs, mutated))
        return result

    def value(self, tensor: Tensor) -> Value:
        """The number of the value a tensor holds now."""
        number = self._numbers.get(id(tensor))
        return self._define(tensor) if number is None else number

    def _define(self, tensor: Tensor) -> Value:
        if is_batchedtensor(tensor):
            raise SplitWatchError(
                "loss_fn: required torch calls on whole batches, found torch.func.vmap inside of the loss; "
                "write that part with a batch dimension, or pass a probe whose loss does"
            )
        number = len(self.tensors)
        self.tensors.append(tensor)
        self._numbers[id(tensor)] = number
        if tensor.requires_grad and (edge := _edge(tensor)) is not None:
            # The edge of this moment: a later in-place operation moves the tensor to another place in the graph.
            self.edges[number] = edge
        return number

    def _append(self, call: Call) -> None:
        index = len(self.calls)
        self.calls.append(call)
        self.source.update(dict.fromkeys(call.results, index))
        for value in set(call.inputs.values()):
            self.uses[value].append(index)

    def downstream(self, starts: Iterable[Value], stop: Callable[[int], bool] = lambda index: False) -> list[int]:
        """The calls that depend on ``starts``, in order; nothing flows through a call that ``stop`` names."""
        reached, found = set(starts), []
        first = min((self.uses[value][0] for value in reached if self.uses[value]), default=len(self.calls))
        for index in range(first, len(self.calls)):
            call = self.calls[index]
            if reached.isdisjoint(call.inputs.values()):
                continue
            found.append(index)
            if not stop(index):
                reached.update(call.results)
        return found

    def upstream(self, ends: Iterable[Value], among: Iterable[int]) -> list[int]:
        """The calls ``among`` those given that ``ends`` depend on, in order."""
        needed, found = set(ends), []
        for index in sorted(among, reverse=True):
            call = self.calls[index]
            if not needed.isdisjoint(call.results):
                found.append(index)
                needed.update(call.inputs.values())
        return found[::-1]


class Footprint(TorchFunctionMode):
    """Counts the bytes that torch calls allocate, views left out; ``total`` and the ``largest`` of a single tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(pytree.tree_leaves(result)).values():
            if tensor._base is None:
                self.total += tensor.nbytes
                self.largest = max(self.largest, tensor.nbytes)
        return result


class Path:
    """A slice of a tape as a function of its start values; every other value it reads is a constant."""

    def __init__(self, tape: Tape, calls: Sequence[int], starts: Sequence[Value], ends: Sequence[Value]) -> None:
        self.starts, self.ends = tuple(starts), tuple(ends)
        inner = set(starts).union(*(tape.calls[i].results for i in calls))
        self.calls = [self._freeze(tape.calls[i], inner) for i in calls]

    @staticmethod
    def _freeze(call: Call, inner: set[Value]) -> Call:
        leaves = tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves)
        leaves = tuple(None if call.inputs.get(i) in inner else leaf for i, leaf in enumerate(leaves))
        inputs = {i: value for i, value in call.inputs.items() if value in inner}
        return Call(call.function, leaves, call.spec, inputs, call.outputs, call.mutated)

    def __call__(self, *starts: Tensor) -> tuple[Tensor, ...]:
        """The end values, given the start values."""
        values = self.trace(*starts)
        return tuple(values[end] for end in self.ends)

    def trace(self, *starts: Tensor) -> dict[Value, Tensor]:
        """Every value on the slice, given the start values."""
        values = dict(zip(self.starts, starts, strict=True))
        for call in self.calls:
            values.update(evaluate(call, {i: values[v] for i, v in call.inputs.items()}))
        return values


def evaluate(call: Call, replaced: dict[int, Tensor]) -> dict[Value, Tensor]:
    """Repeat a recorded call with some of its leaves replaced; what it changes in place is copied first."""
    leaves = list(call.leaves)
    for i, tensor in replaced.items():
        leaves[i] = tensor
    for i in call.mutated:
        leaves[i] = leaves[i].clone()
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    results = pytree.tree_leaves(call.function(*args, **kwargs))
    values = {value: results[i] for i, value in call.outputs.items()}
    return values | {value: leaves[i] for i, value in call.mutated.items()}


def is_floating(value: Any) -> bool:
    """Whether a value is a real floating-point tensor."""
    return isinstance(value, Tensor) and torch.is_floating_point(value)
