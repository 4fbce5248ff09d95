"""Widen a network by a plan, atomically: on any error model and optimizers are as before."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, isfinite

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from splitwatch.anatomy import plain_name
from splitwatch.events import GrowthEvent
from splitwatch.growth.atomic import all_or_nothing, held_back
from splitwatch.growth.checkpoint import remember
from splitwatch.growth.optimizer import exchange
from splitwatch.growth.replicas import bare_optimizers
from splitwatch.growth.stability import steady
from splitwatch.growth.statistics import moved_channels, renew_statistics
from splitwatch.growth.surgery import Surgery, prepare
from splitwatch.growth.widening import IndexMap, submodule, widenings
from splitwatch.probe import Probe
from splitwatch.ranks import largest_over_ranks
from splitwatch.records import GrowthPlan, Split, SplitWatchError, UnfitPlanError

_DRIFT_BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""By the precision in which the copies' weights are rounded; those of equal copies are halves, exact in any."""

_logger = logging.getLogger("splitwatch")

_TOLD = "_splitwatch_told"
"""On parameters of which a user was told that no optimizer given owns them; their successors inherit it."""

SLACK = 8.0
"""How many times the rounding of the consumers' weights the drift may be where their sums cancel."""


def grow(
    model: nn.Module, plan: GrowthPlan, optimizers: Optimizer | Iterable[Optimizer] = (), *, probe: Probe | None = None
) -> GrowthEvent:
    """Apply a plan to a model and its optimizers.

    Args:
        model: the network; its parameters are replaced in place, its modules stay.
        plan: what ``plan_growth`` returned, or moves of your own.
        optimizers: every optimizer that owns parameters of the model; schedulers need not be told. Where some are given
            and none of them owns a trainable parameter that is replaced, a warning is logged once.
        probe: where output drift at zero offset and the realised decrease are measured, BatchNorm statistics of neurons
            whose incoming weights move, and second moments with which steps of Adam and its kin along new outgoing
            weights are stable; none of these is known without it.

    Returns:
        What happened; ``drift`` is at most 1e-6 in float32, 1e-12 in float64 (2e-3 and 2e-2 where the parameters are
        float16 and bfloat16), times the largest Σ|λ| of signed coefficients, or growth is undone; it may be more where
        rounding alone does as much to the outputs, because their terms cancel.

    Raises:
        SplitWatchError: the plan does not fit the model, the function changes at zero offset, or the widened network
            cannot be run. Model and optimizers are then as before, as they are after any other failure: tensors,
            optimizer states and sizes are the very objects they were. Ctrl-C waits until a loss is computed.
    """
    optimizers = bare_optimizers(optimizers)
    with held_back() as interruptible:
        surgery = prepare(model, plan)
        _check_finite(plan, surgery)
        with all_or_nothing(model, surgery, optimizers):
            return _grown(model, plan, surgery, optimizers, probe, interruptible)


def _grown(
    model: nn.Module,
    plan: GrowthPlan,
    surgery: Surgery,
    optimizers: Sequence[Optimizer],
    probe: Probe | None,
    interruptible: Callable[[], None],
) -> GrowthEvent:
    start, before = time.perf_counter(), count_parameters(model)
    drift = _drift(model, plan, probe, surgery.precision) if probe is not None and plan else float("nan")
    interruptible()
    losses = _losses(model, probe)
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    exchanges = [exchange(optimizer, surgery.replacements) for optimizer in optimizers]
    _check_owned(surgery, optimizers, names)
    moved = moved_channels(model, plan)
    surgery.carry_hooks()
    surgery.commit()
    for item in exchanges:
        item.commit()
    if probe is not None:
        renew_statistics(model, moved, probe)
        steady(model, surgery.replacements, optimizers, probe)
    realised = [old - new for old, new in zip(losses, _losses(model, probe), strict=True)]
    fitted, held_out = realised or (float("nan"), float("nan"))
    remember(model, plan)
    event = GrowthEvent(
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
    interruptible()
    return event


def _check_owned(surgery: Surgery, optimizers: Sequence[Optimizer], names: dict[int, str]) -> None:
    """Warn of parameters that an optimizer which was not given may own: it would go on with those that are gone."""
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    loose = {names[id(r.old)]: r for r in surgery.replacements if r.old.requires_grad and id(r.old) not in owned}
    told = {name for name, r in loose.items() if hasattr(r.old, _TOLD)}
    if optimizers and loose.keys() - told:
        _logger.warning(
            "optimizers: none of those given owns %s, which growth replaces; if another one trains it, give that too, "
            "or it goes on with the old tensors",
            ", ".join(sorted(loose.keys() - told)),
        )
        for item in loose.values():
            setattr(item.new, _TOLD, True)


def _check_finite(plan: GrowthPlan, surgery: Surgery) -> None:
    """Refuse moves with weights that are not numbers; without a probe nothing else would see them."""
    if all(bool(item.new.isfinite().all()) for item in surgery.replacements):
        return
    for move in plan.moves:
        names = ("in_offset", "out_offset") if isinstance(move, Split) else ("incoming", "outgoing", "others", "biases")
        for name in names:
            if not all(leaf is None or bool(leaf.isfinite().all()) for leaf in tree_leaves(getattr(move, name))):
                raise SplitWatchError(
                    f"plan: required finite numbers in every move, found nan or inf in {name} of {move}; plan again"
                )


def count_parameters(model: nn.Module) -> int:
    """Number of the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def not_grown(model: nn.Module, plan: GrowthPlan) -> GrowthEvent:
    """The event of a plan that is not carried out."""
    parameters = count_parameters(model)
    return GrowthEvent(plan, {x.name: (x.width, x.width) for x in plan.layers}, (parameters, parameters))


@contextmanager
def widened(model: nn.Module, plan: GrowthPlan, *, offsets: bool = True) -> Iterator[None]:
    """The model widened by a plan for the duration of a block; afterwards it holds its own tensors again.

    Ctrl-C takes effect at the end of the block.
    """
    with held_back():
        surgery = prepare(model, plan, offsets=offsets)
        undo = surgery.undo
        try:
            surgery.commit()
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
    before, kept = probe.outputs(model, consumers), _kept(model, plan)
    try:
        with widened(model, plan, offsets=False):
            after = probe.outputs(model, consumers)
    except (torch.OutOfMemoryError, MemoryError):  # says nothing about widths
        raise
    except Exception as error:
        raise UnfitPlanError(
            f"model: required a forward pass that follows the modules' widths, found a failure after widening "
            f"{sorted(grown)}: {error}; look for sizes written into the code (such as view(-1, 128))"
        ) from error
    pairs = zip(consumers, after, before, strict=True)
    drift = max((_relative(_at(a, kept.get(name)), b) for name, a, b in pairs), default=0.0)
    drift = largest_over_ranks(drift if isfinite(drift) else inf)  # every rank goes on, or none
    amplification = _amplification(plan)
    bound = max(_DRIFT_BOUNDS[dtype] for dtype in (precision, before[0].dtype)) * amplification
    if isfinite(drift) and drift > bound:
        bound = max(bound, SLACK * amplification * _rounding(model, consumers, probe, before))
    if not drift <= bound:
        raise UnfitPlanError(
            f"plan: required outputs that change by at most {bound:g} (relative) at zero offset, found {drift:.2e} in "
            f"the consumers of {sorted(grown)}; the model was left as it was"
        )
    return drift


def _rounding(model: nn.Module, consumers: Sequence[str], probe: Probe, before: Sequence[Tensor]) -> float:
    """Relative change of what consumers put out when their weights are off by a rounding: much where terms cancel."""
    with rounded(model, consumers):
        after = probe.outputs(model, consumers)
    return largest_over_ranks(max(map(_relative, after, before)))


@contextmanager
def rounded(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The weights of some modules off by a rounding each, for the duration of a block."""
    generator, weights = torch.Generator().manual_seed(0), [submodule(model, name).weight for name in names]
    kept = [weight.data for weight in weights]
    try:
        for weight in weights:
            signs = torch.randint(2, weight.shape, generator=generator).to(weight) * 2 - 1
            weight.data = weight.data * (1 + torch.finfo(weight.dtype).eps * signs)
        yield
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.data = data


def _amplification(plan: GrowthPlan) -> float:
    """How much larger than a neuron's own rounding that of its copies can be: the largest Σ|λ|."""
    return max((sum(map(abs, move.coefficients)) for move in plan.moves if isinstance(move, Split)), default=1.0)


def _kept(model: nn.Module, plan: GrowthPlan) -> dict[str, tuple[int, Tensor]]:
    """Where modules that are widened put out the neurons they had: the axis, and the places along it."""
    found = {}
    for widening in widenings(model, plan):
        first = IndexMap(widening.source, widening.layer.width).first
        found |= {name: (1 - submodule(model, name).weight.ndim, first) for name in widening.layer.producers}
    return found


def _at(output: Tensor, kept: tuple[int, Tensor] | None) -> Tensor:
    return output if kept is None else output.index_select(kept[0], kept[1].to(output.device))


def _relative(new: Tensor, old: Tensor) -> float:
    scale = float(old.double().norm())
    change = float((new.double() - old.double()).norm())
    return change / scale if scale else change
