"""Where hidden layers stand on a tape: linear calls, who owns their weights, and the paths between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from splitwatch.linear_map import SUPPORTED, LinearCall, linear_call
from splitwatch.tape import Call, Tape, Value

_WRAPPED = "_orig_mod"
"""Where a compiled module keeps the module it was made from."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Where one hidden layer stands on a tape: its producers' calls, the calls of its path, its consumers' calls."""

    producers: tuple[LinearCall, ...]
    path: tuple[int, ...]
    consumers: tuple[LinearCall, ...]

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.producers[0].weight.shape[0]

    @property
    def starts(self) -> tuple[Value, ...]:
        """The pre-activations."""
        return tuple(call.output for call in self.producers)

    @property
    def ends(self) -> tuple[Value, ...]:
        """What the consumers read."""
        return tuple(call.input for call in self.consumers)


class Anatomy:
    """A tape with its linear calls and the modules that own the tensors."""

    def __init__(self, model: nn.Module, tape: Tape) -> None:
        self.tape = tape
        self.owners: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
        for name, module in plain_modules(model):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self.owners[id(tensor)].append((name, module))
        self.linear = {i: call for i in range(len(tape.calls)) if (call := linear_call(tape, i)) is not None}
        self.calls = defaultdict(list)
        for call in self.linear.values():
            if (name := self.holder(call)) is not None:
                self.calls[name].append(call)

    def owner(self, tensor: Tensor) -> tuple[str, nn.Module] | None:
        """Name and module that own a parameter or buffer (the first of them where it is shared)."""
        owners = self.owners.get(id(tensor))
        return owners[0] if owners else None

    def holder(self, call: LinearCall) -> str | None:
        """The linear module whose weight a call takes; None for other tensors, as a subclass's second matrix (LoRA)."""
        name, module = self.owner(call.weight) or ("", None)
        return name if isinstance(module, SUPPORTED) and call.weight is module.weight else None

    def describe(self, call: Call) -> str:
        """A call in words: its function, and the module whose parameter it reads."""
        for leaf in call.leaves:
            if isinstance(leaf, Tensor) and (owner := self.owner(leaf)) and owner[0]:
                return f"{call.name} ({owner[0]})"
        return call.name

    def is_boundary(self, index: int) -> bool:
        """Whether the call at ``index`` ends a path: a Linear or a convolution that is not depthwise."""
        call = self.linear.get(index)
        return call is not None and not is_depthwise(call)

    def slice(self, producers: Sequence[LinearCall]) -> tuple[Slice, list[int]]:
        """The slice below some producers, and every call their outputs reach before a consumer."""
        starts = {call.output for call in producers}
        reached = self.tape.downstream(starts, self.is_boundary)
        values = starts.union(*(self.tape.calls[i].results for i in reached if not self.is_boundary(i)))
        consumers = [self.linear[i] for i in reached if self.is_boundary(i)]
        consumers = [call for call in consumers if call.input in values]
        inner = [i for i in reached if not self.is_boundary(i)]
        path = self.tape.upstream([call.input for call in consumers], inner)
        return Slice(tuple(producers), tuple(path), tuple(consumers)), inner


def plain_name(name: str) -> str:
    """A dotted name as it is without ``torch.compile``, whose wrappers hold the module as ``_orig_mod``."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its plain name, but not the wrappers of compiled ones."""
    for name, module in model.named_modules():
        if _WRAPPED not in module._modules:
            yield plain_name(name), module


def plain_module(model: nn.Module, name: str = "") -> Any:
    """The module of a plain name, without its wrapper; AttributeError where there is none."""
    module: Any = model.get_submodule(name)
    while _WRAPPED in module._modules:
        module = module._modules[_WRAPPED]
    return module


def is_depthwise(call: LinearCall) -> bool:
    """Whether a convolution keeps every channel to itself, as an operation on a path does."""
    return call.groups > 1 and call.groups == call.weight.shape[0] and call.weight.shape[1] == 1


def holds_weights(module: nn.Module) -> bool:
    """Whether a module holds a matrix of weights of its own, or computes one."""
    parameters = (p for p in module._parameters.values() if p is not None)
    stored = is_quantised(module) and callable(getattr(module, "weight", None))
    return any(p.ndim > 1 for p in parameters) or hasattr(module, "parametrizations") or stored


def is_computed(module: nn.Module) -> bool:
    """Whether weight or bias is no parameter: what ``torch.nn.utils`` computes by hooks is an ordinary attribute."""
    hooked = any(isinstance(vars(module).get(name), Tensor) for name in ("weight", "bias"))
    return parametrize.is_parametrized(module) or hooked


def is_quantised(module: nn.Module) -> bool:
    """Whether a module comes from torch's quantisation."""
    return "quantized" in type(module).__module__


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers of some tensors in a row; complex ones are two, sparse ones (gradients of embeddings) have zeros."""
    dense = (t if t.layout is torch.strided else t.to_dense() for t in tensors)
    return torch.cat([(torch.view_as_real(t) if t.is_complex() else t).flatten() for t in dense])
