"""Widen a network by a plan, atomically: on any error model and optimizers are as before."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import inf, isfinite

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from splitwatch.anatomy import plain_name
from splitwatch.growth.checkpoint import remember
from splitwatch.growth.optimizer import exchange
from splitwatch.growth.surgery import Surgery, prepare
from splitwatch.probe import Probe
from splitwatch.ranks import largest_over_ranks
from splitwatch.records import GrowthEvent, GrowthPlan, SplitWatchError

_DRIFT_BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""By the precision in which the copies' weights are rounded; those of equal copies are halves, exact in any."""


def grow(
    model: nn.Module, plan: GrowthPlan, optimizers: Optimizer | Iterable[Optimizer] = (), *, probe: Probe | None = None
) -> GrowthEvent:
    """Apply a plan to a model and its optimizers.

    Args:
        model: the network; its parameters are replaced in place, its modules stay.
        plan: what ``plan_growth`` returned, or moves of your own.
        optimizers: every optimizer that owns parameters of the model; schedulers need not be told.
        probe: where output drift at zero offset and the realised decrease are measured; neither is known without it.

    Returns:
        What happened; ``drift`` is at most 1e-6 in float32, 1e-12 in float64 (2e-3 and 2e-2 where the
        parameters are float16 and bfloat16), or growth is undone.

    Raises:
        SplitWatchError: the plan does not fit the model, the function changes at zero offset, or the widened network
            cannot be run. Model and optimizers are then as before.
    """
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    start, before = time.perf_counter(), count_parameters(model)
    surgery = prepare(model, plan)
    drift = _drift(model, plan, probe, surgery.precision) if probe is not None and plan else float("nan")
    losses = _losses(model, probe)
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    exchanges = [exchange(optimizer, surgery.replacements) for optimizer in optimizers]
    states = [dict(optimizer.state) for optimizer in optimizers]
    undo = surgery.commit()
    try:
        for item in exchanges:
            item.commit()
        realised = [old - new for old, new in zip(losses, _losses(model, probe), strict=True)]
        remember(model, plan)
    except BaseException:
        for item, state in zip(exchanges, states, strict=True):
            item.rollback(state)
        undo.commit()
        raise
    fitted, held_out = realised or (float("nan"), float("nan"))
    return GrowthEvent(
        plan=plan,
        widths={layer.name: (layer.width, layer.width + added) for layer, added in _added(plan).items()},
        parameters=(before, count_parameters(model)),
        drift=drift,
        realised_fitted=fitted,
        realised_held_out=held_out,
        restarted=tuple(names[id(old)] for item in exchanges for old in item.restarted),
        seconds={"growth": time.perf_counter() - start},
        grown=bool(plan),
    )


def count_parameters(model: nn.Module) -> int:
    """Number of the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def widened(model: nn.Module, plan: GrowthPlan, *, offsets: bool = True) -> Iterator[None]:
    """The model widened by a plan for the duration of a block; afterwards it holds its own tensors again."""
    undo: Surgery = prepare(model, plan, offsets=offsets).commit()
    try:
        yield
    finally:
        undo.commit()


def _added(plan: GrowthPlan) -> dict:
    return {layer: sum(move.added for move in plan.moves if move.layer == layer.name) for layer in plan.layers}


def _losses(model: nn.Module, probe: Probe | None) -> list[float]:
    return [] if probe is None else [probe.loss(model, half) for half in ("fitted", "held_out")]


def _drift(model: nn.Module, plan: GrowthPlan, probe: Probe, precision: torch.dtype) -> float:
    """Relative change of what the widened layers' consumers put out when copies have no offset yet."""
    grown = {move.layer for move in plan.moves}
    consumers = sorted({c.name for layer in plan.layers if layer.name in grown for c in layer.consumers})
    before = probe.outputs(model, consumers)
    try:
        with widened(model, plan, offsets=False):
            after = probe.outputs(model, consumers)
    except (RuntimeError, ValueError, IndexError) as error:
        raise SplitWatchError(
            f"model: required a forward pass that follows the modules' widths, found a failure after widening "
            f"{sorted(grown)}: {error}; look for sizes written into the code (such as view(-1, 128))"
        ) from error
    drift = max((_relative(a, b) for a, b in zip(after, before, strict=True)), default=0.0)
    drift = largest_over_ranks(drift if isfinite(drift) else inf)  # every rank goes on, or none
    bound = max(_DRIFT_BOUNDS[dtype] for dtype in (precision, before[0].dtype))
    if not drift <= bound:
        raise SplitWatchError(
            f"plan: required outputs that change by at most {bound:g} (relative) at zero offset, found {drift:.2e} in "
            f"the consumers of {sorted(grown)}; the model was left as it was"
        )
    return drift


def _relative(new: Tensor, old: Tensor) -> float:
    # A consumer that is itself widened keeps its neurons where they were and puts out the copies after them.
    new = new[tuple(slice(0, n) for n in old.shape)]
    scale = float(old.double().norm())
    change = float((new.double() - old.double()).norm())
    return change / scale if scale else change
