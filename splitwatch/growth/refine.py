"""Finite splits beside new neurons: halves of the neurons whose inner Hessian curves down most.

Residual pursuit adds features that a layer lacks, halves refine those it has: two copies of a neuron at ±ε|w| along the
lowest curvature, λ < 0. Which neurons, and along what, is seen well enough on a few batches, since the held-out half
has the last word on all of them together and says how far they part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isfinite

import torch
from torch import nn

from splitwatch.geometry.curvature import LayerCurvature
from splitwatch.geometry.eigen import extreme_eigenpairs
from splitwatch.geometry.measure import EQUAL, InnerHessian
from splitwatch.geometry.sweep import Sweep
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.search import held_out_gains, stretch
from splitwatch.precision import full_precision
from splitwatch.probe import Probe, paired_error
from splitwatch.ranks import summed_number
from splitwatch.records import GrowthPlan, HiddenLayer, Split

SEEN, TOLERANCE = 256, 0.1
"""Samples of each rank that the curvature is seen on, and how well it is solved for; more and 1 % gained nothing."""

REACHES = (0.03, 0.1, 0.3)
"""How far copies may part, relative to the norm of the incoming weights."""

SURE = 2.0
"""Standard errors that the decrease has to be above zero."""


def halves(model: nn.Module, layer: HiddenLayer, probe: Probe, count: int, max_bytes: int) -> list[Split]:
    """At most so many splits at offset 1, |w|, best first; none of neurons whose loss does not curve down.

    Args:
        model: the network, left as it was.
        layer: one of its hidden layers.
        probe: a few batches of its fitted half are seen.
        count: of splits, one for a neuron.
        max_bytes: what may be kept in memory.
    """
    if not count:
        return []
    with full_precision():
        seen = _seen(model, layer, probe, max_bytes)
        if bool(seen.proven()[:, 0].all()):  # as next to piecewise linear activations
            return []
        size = {"m": layer.width, "n": seen.d, "dtype": seen.outgoing.dtype, "device": seen.outgoing.device}
        found = extreme_eigenpairs(InnerHessian(seen), **size, ends="min", tolerance=TOLERANCE, max_bytes=max_bytes)
    w, v = neuron_weights(model, layer)
    offset = (w.norm(dim=1, keepdim=True) * found.min_vector.to(w)).cpu()
    falls = (-0.5 * found.min_value.to(w) * w.square().sum(1)).cpu()
    falls, order = falls.sort(descending=True, stable=True)
    best, falls = (part[falls > 0][:count] for part in (order, falls))
    still, apart = torch.zeros(2, v.shape[1], dtype=v.dtype), torch.stack([offset, -offset], dim=1)[best]
    found = zip(best.tolist(), apart, falls.tolist(), strict=True)
    return [Split(layer.name, r, EQUAL, u, still, fall) for r, u, fall in found]


def _seen(model: nn.Module, layer: HiddenLayer, probe: Probe, max_bytes: int) -> LayerCurvature:
    """The layer on the first batches of each rank's fitted half; every sample counts the same."""
    parts, samples = [], 0
    for batch in Sweep(model, probe, [layer], "fitted", max_bytes).batches():
        parts.append(batch[layer.name])
        samples += parts[-1].trace.size
        if samples >= SEEN:
            break
    return LayerCurvature.of(layer, parts, probe.samples("fitted") / summed_number(samples))


def refined(model: nn.Module, plan: GrowthPlan, splits: Sequence[Split], probe: Probe) -> GrowthPlan:
    """A plan with splits added at the reach that is best on the held-out half; without them where none surely pays.

    What they bring there together is shared out as second order says.
    """
    if not splits:
        return plan
    plans = {r: replace(plan, moves=(*plan.moves, *(stretch(move, r) for move in splits))) for r in REACHES}
    means, gains, weights = held_out_gains(model, plans, probe, plan)
    best = max(means, key=lambda reach: means[reach] if isfinite(means[reach]) else -inf)
    if not means[best] > SURE * paired_error(gains[best], weights):
        return plan
    told = f"held-out decrease of {len(splits)} halves at {best:g} of their weights' norm {means[best]:.2e}"
    share = means[best] / sum(move.predicted_decrease for move in splits)
    parted = [
        replace(stretch(move, best), predicted_decrease=move.predicted_decrease * share, reason=told) for move in splits
    ]
    return replace(plan, moves=(*plan.moves, *parted), offset=plan.offset or best)
