"""What can be widened: hidden layers = producer(s) → per-channel path → consumer(s), found in unmodified models.

The loss is recorded once on a tape. From every Linear and convolution call the tape is followed forward to the calls
that consume its output. Whether the operations in between treat every channel alike is not looked up in a list of
names but observed: channels carry binary codes, the path is replayed once per bit, and the elements that change tell
which channels each of them depends on. What cannot be widened is reported with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from splitwatch.anatomy import Anatomy, Slice
from splitwatch.linear_map import SUPPORTED, LinearCall
from splitwatch.records import Consumer, HiddenLayer, SplitWatchError, UnsupportedLayerError
from splitwatch.tape import Call, Path, Tape, Value, evaluate, is_floating

if TYPE_CHECKING:
    from splitwatch.probe import Probe

RIDERS = (nn.modules.batchnorm._BatchNorm, nn.PReLU, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules on a path that may hold one entry per neuron (convolutions: depthwise ones)."""


def find_hidden_layers(model: nn.Module, probe: Probe) -> tuple[HiddenLayer, ...]:
    """Every parametrised layer the loss uses, as a hidden layer that can be widened or with the reason why not.

    Args:
        model: any module; it is run once, in eval mode, and left as it was.
        probe: its first batch is the one that is traced.

    Raises:
        SplitWatchError: the loss is not finite or does not depend on any parameter.
    """
    tape, loss = probe.record(model, probe.fitted[0])
    return Discovery(model, tape, loss).layers()


def select_layers(layers: Iterable[HiddenLayer], names: Sequence[str] | None) -> tuple[HiddenLayer, ...]:
    """The growable layers, or exactly those named.

    Raises:
        SplitWatchError: a name does not exist.
        UnsupportedLayerError: a named layer cannot be widened.
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
        if not by_name[name].growable:
            raise UnsupportedLayerError(f"layers: {by_name[name]}")
    return tuple(by_name[name] for name in names)


class Discovery:
    """Finds the hidden layers of one recorded loss."""

    def __init__(self, model: nn.Module, tape: Tape, loss: Tensor) -> None:
        self.model, self.tape = model, tape
        self.anatomy = Anatomy(model, tape)
        self.loss = tape.value(loss)

    def layers(self) -> tuple[HiddenLayer, ...]:
        """One row for every parametrised module, except the further producers of a gated layer."""
        rows: dict[str, HiddenLayer] = {}
        absorbed: set[str] = set()
        order = {name: calls[0].index for name, calls in self.anatomy.calls.items()}
        modules = [(name, module) for name, module in self.model.named_modules() if _holds_weights(module)]
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
        if "quantized" in type(module).__module__:
            raise UnsupportedLayerError(f"{role} is quantised ({type(module).__name__})")
        if parametrize.is_parametrized(module) or hasattr(module, "weight_g") or hasattr(module, "weight_orig"):
            raise UnsupportedLayerError(f"{role} is parametrized: its weight is computed from other tensors")
        if not isinstance(module, SUPPORTED):
            raise UnsupportedLayerError(f"{type(module).__name__} is not a layer type that can be widened (Linear, Conv1d/2d/3d are)")
        parameters = [module.weight] + ([module.bias] if module.bias is not None else [])
        if any(len(self.anatomy.owners[id(p)]) > 1 for p in parameters):
            raise UnsupportedLayerError(f"{role} has tied weights: {name} shares them with another module")
        calls = self.anatomy.calls.get(name, [])
        uses = max(self.anatomy.weight_uses(p) for p in parameters)
        if not calls:
            raise UnsupportedLayerError("its weight is used functionally" if uses else "the loss does not use it")
        if uses > 1:
            raise UnsupportedLayerError(f"{role} is used {uses} times in one forward pass (a shared module or tied weights)")
        if not all(p.requires_grad for p in parameters):
            raise UnsupportedLayerError(f"{role} is frozen: its parameters do not require gradients")
        if calls[0].arguments["groups"] != 1:
            raise UnsupportedLayerError(f"{role} is a grouped convolution")
        return calls[0]

    def _examine(self, width: int, call: LinearCall) -> HiddenLayer:
        producers = [call]
        while True:
            where, inner = self.anatomy.slice(producers)
            self._refuse_outputs(where, inner)
            codes = self._codes(where)
            joined, riders = self._couplings(where, codes)
            if not joined:
                break
            producers = sorted([*producers, *joined], key=lambda call: call.index)
        self._refuse_streams(where)
        self._refuse_replay(where)
        names = tuple(self._name(call) for call in producers)
        operations = tuple(self._describe(self.tape.calls[i]) for i in where.path)
        return HiddenLayer(names[0], width, names, self._consumers(where, width, codes), riders, operations)

    def _name(self, call: LinearCall) -> str:
        owner = self.anatomy.owner(call.weight)
        if owner is None or not isinstance(owner[1], SUPPORTED):
            raise UnsupportedLayerError(f"coupled to {self._describe(call.call)}, whose weight is not a plain module's")
        return owner[0]

    def _describe(self, call: Call) -> str:
        for leaf in call.leaves:
            if isinstance(leaf, Tensor) and (owner := self.anatomy.owner(leaf)) and owner[0]:
                return f"{call.name} ({owner[0]})"
        return call.name

    # --- refusals -----------------------------------------------------------------------------------------------

    def _refuse_outputs(self, where: Slice, inner: list[int]) -> None:
        reaches = set(where.starts).union(*(self.tape.calls[i].results for i in inner))
        if not where.consumers:
            downstream = self.tape.downstream(reaches)
            used = self.loss in reaches or any(self.loss in self.tape.calls[i].results for i in downstream)
            raise UnsupportedLayerError("an output layer: no linear layer reads it" if used else "the loss does not depend on it")
        if self.loss in reaches:
            raise UnsupportedLayerError("an output layer: it also reaches the loss directly")

    def _refuse_streams(self, where: Slice) -> None:
        below = self.tape.downstream(where.starts)
        reached = set(where.starts).union(*(self.tape.calls[i].results for i in below))
        for call in where.producers:
            if call.input in reached:
                raise UnsupportedLayerError(f"part of a residual stream: {self._name(call)} adds to it and reads from it")

    def _refuse_replay(self, where: Slice) -> None:
        path = Path(self.tape, where.path, where.starts, where.ends)
        with torch.no_grad():
            replayed = path(*(_pre_activation(call) for call in where.producers))
        for call, values in zip(where.consumers, replayed, strict=True):
            expected = call.arguments["input"].detach()
            scale = torch.finfo(expected.dtype).eps * 64 * expected.abs().amax()
            if not bool(((values - expected).abs() <= scale).all()):
                raise UnsupportedLayerError("its path cannot be replayed (randomness in eval mode, or in-place changes of views)")

    # --- what depends on which channel ---------------------------------------------------------------------------

    def _couplings(self, where: Slice, codes: dict[Value, Tensor]) -> tuple[list[LinearCall], tuple[str, ...]]:
        """Further producers and the riders that the path needs."""
        joined: dict[int, LinearCall] = {}
        riders: dict[str, None] = {}
        for call in (self.tape.calls[i] for i in where.path):
            for leaf in self._bound_leaves(call, codes):
                owner = self.anatomy.owner(call.leaves[leaf])
                if owner is None:
                    joined |= {c.index: c for c in self._sources(call, call.inputs[leaf])}
                else:
                    riders[self._rider(owner, call.leaves[leaf], where.width)] = None
        known = {call.index for call in where.producers}
        return [call for index, call in joined.items() if index not in known], tuple(riders)

    def _rider(self, owner: tuple[str, nn.Module], tensor: Tensor, width: int) -> str:
        name, module = owner
        if not isinstance(module, RIDERS) or tensor.shape[0] != width:
            raise UnsupportedLayerError(f"{name or type(module).__name__} holds one entry per neuron in a way that cannot be widened")
        if self.anatomy.weight_uses(tensor) > 1 or len(self.anatomy.owners[id(tensor)]) > 1:
            raise UnsupportedLayerError(f"{name} holds one entry per neuron but is shared with another layer")
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
                found.append(self._checked(name, self.model.get_submodule(name), f"{name}, met in {call.name},"))
                continue
            inputs = [v for i, v in source.inputs.items() if self._is_activation(source.leaves[i])]
            if not inputs:
                raise UnsupportedLayerError(f"part of a residual stream: meets {self._describe(source)} in {call.name}")
            waiting += inputs
        return found

    def _is_activation(self, leaf: Tensor) -> bool:
        return is_floating(leaf) and self.anatomy.owner(leaf) is None and leaf.numel() > 1

    def _codes(self, where: Slice) -> dict[Value, Tensor]:
        """For every value on the path the channel each element depends on, -1 for none; refuses mixing."""
        widths = {call.weight.shape[0] for call in where.producers}
        if len(widths) > 1:
            raise UnsupportedLayerError(f"producers of different widths {sorted(widths)} meet on its path")
        replay = _Replay(Path(self.tape, where.path, where.starts, where.ends), where.producers)
        codes = {v: torch.zeros(t.shape, dtype=torch.int32, device=t.device) for v, t in replay.base.items()}
        touched = {v: torch.zeros_like(code, dtype=torch.bool) for v, code in codes.items()}
        for bit in range(max(1, (where.width - 1).bit_length())):
            ones, zeros = replay.changed(bit, 1), replay.changed(bit, 0)
            self._refuse_mixing(where, {v: ones[v] & zeros[v] for v in codes})
            for v, code in codes.items():
                code += ones[v].int() << bit
                touched[v] |= ones[v] | zeros[v]
        return {v: torch.where(touched[v], code, -1) for v, code in codes.items()}

    def _refuse_mixing(self, where: Slice, mixed: dict[Value, Tensor]) -> None:
        for i in where.path:
            call = self.tape.calls[i]
            if any(bool(mixed[v].any()) for v in call.results if v in mixed):
                raise UnsupportedLayerError(f"{self._describe(call)} on its path mixes the channels")

    def _bound_leaves(self, call: Call, codes: dict[Value, Tensor]) -> list[int]:
        """The constant leaves of a call that hold one entry per channel, found by changing single entries."""
        call = _detached(call)
        inner = {i for i, v in call.inputs.items() if v in codes}
        outer = [i for i in call.inputs if i not in inner and self._may_be_bound(call.leaves[i])]
        with torch.no_grad():
            fixed = {i: _normal(call.leaves[i]) for i in inner if is_floating(call.leaves[i])}
            return [i for i in outer if self._touched_channels(call, i, fixed, codes) == 1]

    def _may_be_bound(self, leaf: Tensor) -> bool:
        """Single numbers serve every channel alike, except in a BatchNorm over one channel."""
        owner = self.anatomy.owner(leaf)
        return is_floating(leaf) and (leaf.numel() > 1 or (owner is not None and isinstance(owner[1], RIDERS[0])))

    def _touched_channels(self, call: Call, leaf: int, fixed: dict[int, Tensor], codes: dict[Value, Tensor]) -> int:
        """How many channels one entry of a constant reaches (none where the call only puts it beside them)."""
        changed = call.leaves[leaf].detach().clone(memory_format=torch.contiguous_format)
        changed.view(-1)[changed.numel() // 2] += 1 + changed.abs().amax()
        before, after = evaluate(call, fixed), evaluate(call, fixed | {leaf: changed})
        reached: set[int] = set()
        for v in (v for v in call.results if v in codes and before[v].shape == codes[v].shape):
            reached.update(codes[v][(before[v] != after[v]) & (codes[v] >= 0)].unique().tolist())
        return len(reached)

    def _consumers(self, where: Slice, width: int, codes: dict[Value, Tensor]) -> tuple[Consumer, ...]:
        consumers = []
        for call in where.consumers:
            name = self._name(call)
            self._checked(name, self.model.get_submodule(name), f"its consumer {name}")
            columns = codes[call.input].movedim(call.channel_axis, 0).flatten(1).amax(1)
            consumers.append(_block(name, columns.tolist(), width))
        return tuple(consumers)


class _Replay:
    """Replays a path on two independent draws of the pre-activations, exchanged on half of the channels."""

    def __init__(self, path: Path, producers: Sequence[LinearCall]) -> None:
        self.path = path
        self.draws = [_random_pair(call) for call in producers]
        self.axes = [call.channel_axis for call in producers]
        with torch.no_grad():
            self.base = path.trace(*(a for a, _ in self.draws))

    @torch.no_grad()
    def changed(self, bit: int, side: int) -> dict[Value, Tensor]:
        """Which elements change when the channels whose ``bit`` equals ``side`` are exchanged."""
        starts = [self._exchange(a, b, axis, bit, side) for (a, b), axis in zip(self.draws, self.axes, strict=True)]
        values = self.path.trace(*starts)
        return {v: (t != self.base[v]) & ~(t.isnan() & self.base[v].isnan()) for v, t in values.items()}

    @staticmethod
    def _exchange(a: Tensor, b: Tensor, axis: int, bit: int, side: int) -> Tensor:
        members = (torch.arange(a.shape[axis], device=a.device) >> bit) & 1 == side
        return torch.where(members.reshape(-1, *[1] * (-axis - 1)), b, a)


def _block(name: str, columns: list[int], width: int) -> Consumer:
    """The contiguous block of a consumer's columns that reads the neurons in order."""
    members = [j for j, channel in enumerate(columns) if channel >= 0]
    counts = Counter(columns[j] for j in members)
    stride = max(counts.values())
    start = members[0] - (columns[members[0]] * stride)
    expected = {start + r * stride + p: r for r in range(width) for p in range(stride)}
    if start < 0 or any(columns[j] != expected.get(j) for j in members):
        raise UnsupportedLayerError(f"its consumer {name} reads the neurons in an order that cannot be widened")
    return Consumer(name, start, stride)


def _holds_weights(module: nn.Module) -> bool:
    parameters = (p for p in module._parameters.values() if p is not None)
    return any(p.ndim > 1 for p in parameters) or hasattr(module, "parametrizations") or _is_quantised(module)


def _is_quantised(module: nn.Module) -> bool:
    return "quantized" in type(module).__module__ and callable(getattr(module, "weight", None))


def _detached(call: Call) -> Call:
    leaves = tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves)
    return Call(call.function, leaves, call.spec, call.inputs, call.outputs, call.mutated)


def _pre_activation(call: LinearCall) -> Tensor:
    values = evaluate(_detached(call.call), {})
    return values[call.output]


def _normal(like: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like)


def _random_pair(call: LinearCall) -> tuple[Tensor, Tensor]:
    """Two independent draws of a producer's output, of its own size."""
    z = _pre_activation(call)
    scale = z.std() if z.numel() > 1 and bool(z.std() > 0) else z.new_ones(())
    return _normal(z, 2 * call.index) * scale, _normal(z, 2 * call.index + 1) * scale
