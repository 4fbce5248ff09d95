"""Hidden layers of one recorded loss, and why others cannot be widened.

From every Linear and convolution call the tape is followed forward to the calls that consume its output. Whether the
operations in between treat every channel alike is not looked up in a list of names but observed: channels carry binary
codes, the path is replayed once per bit, and the elements that change tell which channels each of them depends on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import lcm

import torch
from torch import Tensor, nn

from splitwatch.anatomy import (
    Anatomy,
    Slice,
    holds_weights,
    is_computed,
    is_depthwise,
    is_quantised,
    plain_module,
    plain_modules,
)
from splitwatch.channels import ChannelCodes, block, pre_activation
from splitwatch.handlers import has_rows, rows
from splitwatch.linear_map import SUPPORTED, LinearCall
from splitwatch.records import Consumer, HiddenLayer, UnsupportedLayerError
from splitwatch.tape import Call, Path, Tape, Value, is_floating


class Discovery:
    """Finds the hidden layers of one recorded loss."""

    def __init__(self, model: nn.Module, tape: Tape, loss: Tensor) -> None:
        self.model, self.tape = model, tape
        self.anatomy = Anatomy(model, tape)
        self.loss, self.root = tape.value(loss), loss
        self.used = set(tape.upstream([self.loss], range(len(tape.calls))))

    def layers(self) -> tuple[HiddenLayer, ...]:
        """One row for every parametrised module, except the further producers of a gated layer."""
        rows: dict[str, HiddenLayer] = {}
        absorbed: set[str] = set()
        order = {name: calls[0].index for name, calls in self.anatomy.calls.items()}
        modules = [(name, module) for name, module in plain_modules(self.model) if holds_weights(module)]
        for name, module in sorted(modules, key=lambda item: order.get(item[0], len(self.tape.calls))):
            if name not in absorbed:
                rows[name] = self.layer(name, module)
                absorbed.update(rows[name].producers[1:])
        return tuple(rows.values())

    def layer(self, name: str, module: nn.Module) -> HiddenLayer:
        """The hidden layer that starts at one module."""
        width = int(getattr(module, "out_features", 0) or getattr(module, "out_channels", 0))
        try:
            return self._examine(width, self._checked(name, module, "the layer"))
        except UnsupportedLayerError as refusal:
            return HiddenLayer(name, width, reason=str(refusal))

    def _checked(self, name: str, module: nn.Module, role: str) -> LinearCall:
        """The one call of a module whose weights may be replaced, or a refusal."""
        if is_quantised(module):
            raise UnsupportedLayerError(f"{role} is quantised ({type(module).__name__})")
        if is_computed(module):
            raise UnsupportedLayerError(
                f"{role} is parametrized or pruned: its weights are computed from other tensors"
            )
        if not isinstance(module, SUPPORTED):
            raise UnsupportedLayerError(f"{type(module).__name__} is not a layer type that can be widened")
        parameters = [module.weight] + ([module.bias] if module.bias is not None else [])
        if any(len(self.anatomy.owners[id(p)]) > 1 for p in parameters):
            raise UnsupportedLayerError(f"{role} has tied weights: {name} shares them with another module")
        calls = self.anatomy.calls.get(name, [])
        reads = self._reads(parameters)
        if not calls:
            raise UnsupportedLayerError("its weight is used functionally" if reads else "the loss does not use it")
        products = sum(i in self.anatomy.linear for i in reads)
        if products > 1:
            raise UnsupportedLayerError(
                f"{role} is used {products} times in one pass (a shared module or tied weights)"
            )
        if len(reads) > products:
            other = next(self.tape.calls[i].name for i in reads if i not in self.anatomy.linear)
            raise UnsupportedLayerError(
                f"{role} has weights that {other} reads too, as penalties do; "
                "pass a loss_fn without them and use the optimizer's weight_decay"
            )
        if any(p.is_complex() for p in parameters):
            raise UnsupportedLayerError(f"{role} has complex weights")
        if not all(p.requires_grad for p in parameters):
            raise UnsupportedLayerError(f"{role} is frozen: its parameters do not require gradients")
        if not calls[0].arguments["input"].numel():
            raise UnsupportedLayerError(
                f"{role} is given nothing of the probe's first batch (an expert without samples)"
            )
        return calls[0]

    def _reads(self, tensors: Iterable[Tensor]) -> list[int]:
        """Products with some weights, and whatever else the loss makes of them; what is only logged is none of it."""
        calls = sorted({i for tensor in tensors for i in self.tape.uses[self.tape.value(tensor)]})
        return [i for i in calls if i in self.anatomy.linear or i in self.used]

    def _examine(self, width: int, call: LinearCall) -> HiddenLayer:
        producers = [call]
        while True:
            where, inner = self.anatomy.slice(producers)
            self._refuse_outputs(where, inner)
            codes = ChannelCodes(self.anatomy, where)
            joined, riders = self._couplings(where, codes)
            if not joined:
                break
            producers = sorted([*producers, *joined], key=lambda call: call.index)
        self._refuse_streams(where)
        self._refuse_replay(where)
        names = tuple(self._name(call) for call in producers)
        operations = tuple(self.anatomy.describe(self.tape.calls[i]) for i in where.path)
        consumers = self._consumers(where, width, codes)
        groups, reason = _grouping(where, consumers)
        return HiddenLayer(names[0], width, names, consumers, riders, operations, reason, groups)

    def _name(self, call: LinearCall) -> str:
        if (name := self.anatomy.holder(call)) is None:
            meets = self.anatomy.describe(call.call)
            raise UnsupportedLayerError(
                f"coupled to {meets}, whose weight is not a plain module's (functional, parametrized or pruned)"
            )
        return name

    # --- refusals -----------------------------------------------------------------------------------------------

    def _refuse_outputs(self, where: Slice, inner: list[int]) -> None:
        reaches = set(where.starts).union(*(self.tape.calls[i].results for i in inner))
        if not where.consumers:
            downstream = self.tape.downstream(reaches)
            used = self.loss in reaches or any(self.loss in self.tape.calls[i].results for i in downstream)
            reason = "an output layer: no linear layer reads it" if used else "the loss does not depend on it"
            if not used and self._reaches_unseen(where):
                reason = (
                    "what it puts out enters scripted or compiled code, into which nothing sees; leave that in Python"
                )
            raise UnsupportedLayerError(reason)
        if self.loss in reaches:
            raise UnsupportedLayerError("an output layer: it also reaches the loss directly")

    def _reaches_unseen(self, where: Slice) -> bool:
        """Whether autograd knows a way to the loss that the tape does not."""
        weights = [call.weight for call in where.producers]
        return any(g is not None for g in torch.autograd.grad(self.root, weights, retain_graph=True, allow_unused=True))

    def _refuse_streams(self, where: Slice) -> None:
        below = self.tape.downstream(where.starts)
        if any(self.tape.calls[i].function is torch.autograd.grad and i in self.used for i in below):
            raise UnsupportedLayerError(
                "what it puts out is differentiated within the loss (torch.autograd.grad), so its weights act twice"
            )
        reached = set(where.starts).union(*(self.tape.calls[i].results for i in below))
        for call in where.producers:
            if call.input in reached:
                raise UnsupportedLayerError(f"part of a residual stream: {self._name(call)} reads and adds to it")

    def _refuse_replay(self, where: Slice) -> None:
        path = Path(self.tape, where.path, where.starts, where.ends)
        with torch.no_grad():
            replayed = path(*(pre_activation(call) for call in where.producers))
        for call, values in zip(where.consumers, replayed, strict=True):
            expected = call.arguments["input"].detach()
            scale = torch.finfo(expected.dtype).eps * 64 * expected.abs().amax()
            if not bool(((values - expected).abs() <= scale).all()):
                raise UnsupportedLayerError("its path cannot be replayed (randomness, or views changed in place)")

    def _couplings(self, where: Slice, codes: ChannelCodes) -> tuple[list[LinearCall], tuple[str, ...]]:
        """Further producers and the riders that the path needs."""
        joined: dict[int, LinearCall] = {}
        riders: dict[str, None] = {}
        for call in (self.tape.calls[i] for i in where.path):
            for leaf in codes.bound_leaves(call):
                owner = self.anatomy.owner(call.leaves[leaf])
                if owner is None:
                    joined |= {c.index: c for c in self._sources(call, call.inputs[leaf])}
                else:
                    riders[self._rider(owner, call.leaves[leaf], where.width)] = None
        known = {call.index for call in where.producers}
        return [call for index, call in joined.items() if index not in known], tuple(riders)

    def _rider(self, owner: tuple[str, nn.Module], tensor: Tensor, width: int) -> str:
        name, module = owner
        known = has_rows(module) and any(getattr(module, field) is tensor for field in rows(module).tensors)
        if not known or isinstance(module, nn.Linear) or tensor.shape[0] != width:
            owner_name = name or type(module).__name__
            why = "and cannot be widened" if has_rows(module) else f"and {type(module).__name__} has no handler"
            raise UnsupportedLayerError(f"{owner_name} holds one entry per neuron {why}")
        if is_computed(module):
            raise UnsupportedLayerError(f"{name} is parametrized or pruned and holds one entry per neuron")
        if len(self._reads([tensor])) > 1 or len(self.anatomy.owners[id(tensor)]) > 1:
            raise UnsupportedLayerError(
                f"{name} holds one entry per neuron but is shared with another layer or a penalty"
            )
        return name

    def _sources(self, call: Call, value: Value) -> list[LinearCall]:
        """The linear calls whose outputs make up an activation that meets the path channel by channel."""
        found, waiting = [], [value]
        while waiting:
            index = self.tape.source.get(waiting.pop())
            if index is None:
                raise UnsupportedLayerError(f"part of a residual stream: meets the model's input in {call.name}")
            source = self.tape.calls[index]
            if self.anatomy.is_boundary(index):
                producer = self.anatomy.linear[index]
                name = self._name(producer)
                found.append(self._checked(name, plain_module(self.model, name), f"{name}, met in {call.name},"))
                continue
            inputs = [v for i, v in source.inputs.items() if self._is_activation(source.leaves[i])]
            if not inputs:
                meets = self.anatomy.describe(source)
                raise UnsupportedLayerError(f"part of a residual stream: meets {meets} in {call.name}")
            waiting += inputs
        return found

    def _is_activation(self, leaf: Tensor) -> bool:
        return is_floating(leaf) and self.anatomy.owner(leaf) is None and leaf.numel() > 1

    def _consumers(self, where: Slice, width: int, codes: ChannelCodes) -> tuple[Consumer, ...]:
        consumers = []
        for call in where.consumers:
            name = self._name(call)
            self._checked(name, plain_module(self.model, name), f"its consumer {name}")
            consumers.append(replace(block(name, codes.columns(call), width), groups=call.groups))
        return tuple(consumers)


def _grouping(where: Slice, consumers: Sequence[Consumer]) -> tuple[int, str]:
    """In how many groups the neurons stand that have to grow alike, and why they cannot grow where they cannot."""
    if any(is_depthwise(call) for call in where.producers):
        return 1, "a depthwise convolution, which grows with the layer that it reads"
    for call, consumer in zip(where.consumers, consumers, strict=True):
        inputs = call.weight.shape[1] * call.groups
        if call.groups > 1 and where.width * consumer.stride < inputs:
            return 1, f"the groups of its consumer {consumer.name} hold other channels beside it, and would be cut anew"
        if where.width % call.groups:
            return 1, f"the groups of its consumer {consumer.name} cut through what one neuron puts out"
    return lcm(*(call.groups for call in (*where.producers, *where.consumers))), ""
