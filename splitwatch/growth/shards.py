"""Networks that ``fully_shard`` deals out to processes: whole for a measurement, dealt out anew after growth.

A sharded parameter is a row of a table that FSDP keeps; a wider one that is put in its place is not in the table and is
silently overwritten by the narrow one at the next pass. So what has grown gets a new row, made as FSDP makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from splitwatch.ranks import rank_count
from splitwatch.records import SplitWatchError
from splitwatch.undisturbed import is_sharded


def check_shards(model: nn.Module, *, grows: bool, control: bool) -> None:
    """Refuse sharded models that cannot be gathered, or could not be dealt out again when they have grown.

    Raises:
        SplitWatchError: naming what ``fully_shard`` has to be used without.
    """
    if not _is_dealt_out(model):
        return
    rows = _rows(model)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) and (found := _unlike_fsdp(parameter, rows)):
            raise SplitWatchError(
                f"model: required parameters that fully_shard deals out by rows to all processes, found {name} {found};"
                " call fully_shard(module, mesh=mesh) with one mesh of all processes and nothing else"
            )
    norm = next((name for name, module in model.named_modules() if isinstance(module, _BatchNorm)), None)
    if grows and norm is not None:
        raise SplitWatchError(
            f"model: required no BatchNorm where a sharded network grows, found {norm}, whose statistics differ from "
            "process to process; use another norm, DistributedDataParallel, or monitor_only=True"
        )
    if grows and control:
        raise SplitWatchError(
            "control: required 0 where the network is sharded, found a control, which would be a copy of it; leave "
            "control out of the policy"
        )


def _unlike_fsdp(parameter: Any, rows: dict[int, tuple[Any, int]]) -> str:
    if id(parameter) not in rows:
        return "sharded by something else"
    group = rows[id(parameter)][0]
    if type(group.offload_policy).__name__ != "OffloadPolicy":
        return f"with {type(group.offload_policy).__name__}"
    if len(group.modules) > 1:
        return "in one group of several modules"
    if parameter.device_mesh.size() != rank_count():
        return f"on {parameter.device_mesh.size()} of {rank_count()} processes"
    *copies, last = parameter.placements
    return "" if last.is_shard(0) and all(p.is_replicate() for p in copies) else f"placed as {parameter.placements}"


@contextmanager
def whole(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Iterator[None]:
    """Parameters, gradients and states of optimizers are whole inside, on every process; afterwards they are shards.

    What is the same afterwards comes back as the very shards it was. What has grown inside is dealt out anew: the
    modules, FSDP's settings and the optimizers' groups stay. Does nothing for a model without shards. Every rank has to
    enter it.
    """
    if not _is_dealt_out(model):
        yield
        return
    shards = _Shards(model, list(optimizers))
    with _without_hooks(model):
        shards.put_whole()
        try:
            yield
        finally:
            shards.put_back()


class _Shards:
    """The shards of a model and its optimizers, and what is whole of them."""

    def __init__(self, model: nn.Module, optimizers: list[Optimizer]) -> None:
        self.rows, self.optimizers = _rows(model), optimizers
        self.places = [
            (module, name, shard)
            for module in model.modules()
            for name, shard in module._parameters.items()
            if shard is not None and is_sharded(shard)
        ]
        self.full = {id(shard): (shard, _whole_parameter(shard)) for shard in {p: None for _, _, p in self.places}}
        self.states = [dict(optimizer.state) for optimizer in optimizers]
        self.full_states = [{self._full(p): _whole_state(state) for p, state in s.items()} for s in self.states]

    def _full(self, parameter: Any) -> Any:
        return self.full.get(id(parameter), (None, parameter))[1]

    def put_whole(self) -> None:
        for module, name, shard in self.places:
            setattr(module, name, self._full(shard))
        for optimizer, states in zip(self.optimizers, self.full_states, strict=True):
            _exchange(optimizer, {id(shard): full for shard, full in self.full.values()}, states)

    def put_back(self) -> None:
        """Put back the shards of what is as it was, new shards of what has grown."""
        shards: dict[int, Any] = {}
        present = [getattr(module, name) for module, name, _ in self.places]  # kept alive: they are known by identity
        for (module, name, shard), now in zip(self.places, present, strict=True):
            grown = now is not self._full(shard) and id(now) not in shards
            shards.setdefault(id(now), self._dealt_out(shard, now) if grown else shard)
            setattr(module, name, shards[id(now)])
        for optimizer, before, full in zip(self.optimizers, self.states, self.full_states, strict=True):
            same = {id(whole): state for state, whole in zip(before.values(), full.values(), strict=True)}
            states = {}
            for parameter, state in optimizer.state.items():
                shard = shards.get(id(parameter), parameter)
                states[shard] = same[id(state)] if id(state) in same else _dealt_state(state, shard)
            _exchange(optimizer, shards, states)

    def _dealt_out(self, old: Any, new: nn.Parameter) -> Any:
        """The shard of a parameter that has grown, in the old one's place in FSDP's table."""
        group, position = self.rows[id(old)]
        row = group.fsdp_params[position]
        row._post_load_hook_handle.remove()
        placements = (row._module_info, row.mesh_info, row.post_forward_mesh_info, row.device, None)
        made = type(row)(new, *placements, group.mp_policy, group.offload_policy)
        made._param_fqn = row._param_fqn
        made.init_dtype_attrs(group.mp_policy)
        group.fsdp_params[position] = made
        shard = made.sharded_param
        shard.grad = None if new.grad is None else _like(new.grad, shard)
        return shard


def _is_dealt_out(model: nn.Module) -> bool:
    """Whether a model has shards; FSDP leaves it whole after a forward pass without gradients, and gathers anew."""
    for unit in _units(model):
        unit.reshard()
    return any(map(is_sharded, model.parameters()))


def _units(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called with."""
    return [module for module in model.modules() if hasattr(type(module), "_get_fsdp_state")]


def _rows(model: nn.Module) -> dict[int, tuple[Any, int]]:
    """FSDP's group of every sharded parameter, by identity, and its place in the group."""
    found = {}
    for unit in _units(model):
        state = unit._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # there was one group, or none, before torch knew several
        for group in filter(None, [state._fsdp_param_group] if groups is None else groups):
            found |= {id(row.sharded_param): (group, i) for i, row in enumerate(group.fsdp_params)}
    return found


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """FSDP gathers nothing inside; hooks come back in their order."""
    with ExitStack() as stack:
        for unit in _units(model):
            state = unit._get_fsdp_state()
            for hooks, handle in (
                (unit._forward_pre_hooks, state._pre_forward_hook_handle),
                (unit._forward_hooks, state._post_forward_hook_handle),
            ):
                stack.callback(_put, hooks, dict(hooks))
                del hooks[handle.id]
        yield


def _put(into: Any, items: Any) -> None:
    into.clear()
    into.update(items)


def _exchange(optimizer: Optimizer, parameters: dict[int, Any], states: dict[Any, Any]) -> None:
    for group in optimizer.param_groups:
        group["params"][:] = [parameters.get(id(parameter), parameter) for parameter in group["params"]]
    _put(optimizer.state, states)


def _whole(value: Any) -> Any:
    return value.full_tensor() if is_sharded(value) else value


def _whole_parameter(shard: Any) -> nn.Parameter:
    with torch.no_grad():
        full = nn.Parameter(shard.detach().full_tensor(), requires_grad=shard.requires_grad)
        full.grad = None if shard.grad is None else _whole(shard.grad)
    return full


def _whole_state(state: dict[str, Any]) -> dict[str, Any]:
    return {key: _whole(value) for key, value in state.items()}


def _dealt_state(state: dict[str, Any], shard: Any) -> dict[str, Any]:
    """State of a parameter's shape as its shards; numbers as they are."""
    if not is_sharded(shard):
        return state
    like = (key for key, value in state.items() if isinstance(value, Tensor) and value.shape == shard.shape)
    return state | {key: _like(state[key], shard) for key in like}


def _like(tensor: Tensor, shard: Any) -> Any:
    """A tensor that every rank holds, dealt out as a parameter is."""
    from torch.distributed.tensor import distribute_tensor  # slow to import, and loaded where there are shards

    return distribute_tensor(tensor, shard.device_mesh, shard.placements)
