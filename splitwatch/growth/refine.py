"""Finite splits beside new neurons: halves of the neurons whose inner Hessian curves down most.

Residual pursuit adds features that a layer lacks, halves refine those it has: two copies of a neuron at ±ε|w| along the
lowest curvature, λ < 0. Which neurons, and along what, is seen well enough on a few batches, since the held-out half
has the last word on all of them together and says how far they part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import accumulate
from math import inf, isfinite

import torch
from torch import nn

from splitwatch.batches import batch_size
from splitwatch.geometry.curvature import LayerCurvature
from splitwatch.geometry.eigen import extreme_eigenpairs
from splitwatch.geometry.measure import EQUAL, InnerHessian
from splitwatch.geometry.sweep import Sweep
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.search import held_out_gains, stretch
from splitwatch.precision import full_precision
from splitwatch.probe import Probe
from splitwatch.ranks import paired_error
from splitwatch.records import GrowthPlan, HiddenLayer, Split

SEEN, TOLERANCE = 256, 0.1
"""Samples of each rank that the curvature is seen on, and how well it is solved for; more and 1 % gained nothing."""

REACHES = (0.03, 0.1, 0.3)
"""How far copies may part, relative to the norm of the incoming weights."""

SURE = 2.0
"""Standard errors that the decrease has to be above zero."""


def halves(model: nn.Module, counts: Mapping[HiddenLayer, int], probe: Probe, max_bytes: int) -> list[Split]:
    """Splits at offset 1, |w|, the best of each layer first; none of neurons whose loss does not curve down.

    Args:
        model: the network, left as it was.
        counts: some of its hidden layers, and at most how many splits in each, one for a neuron.
        probe: a few batches of its fitted half are seen.
        max_bytes: what may be kept in memory.
    """
    layers = [layer for layer, count in counts.items() if count]
    if not layers:
        return []
    with full_precision():
        seen = Sweep(model, _few(probe), layers, "fitted", max_bytes).curvatures()
        return [
            move for x, one in zip(layers, seen, strict=True) for move in _best(model, x, one, counts[x], max_bytes)
        ]


def _few(probe: Probe) -> Probe:
    """The first batches of each rank's fitted half, every sample of which counts the same."""
    few, seen = copy(probe), [0, *accumulate(map(batch_size, probe.fitted))]
    few.fitted = tuple(batch for batch, before in zip(probe.fitted, seen, strict=False) if before < SEEN)
    return few


def _best(model: nn.Module, layer: HiddenLayer, seen: LayerCurvature, count: int, max_bytes: int) -> list[Split]:
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
    falls = plan.held_out_decrease + means[best]
    return replace(plan, moves=(*plan.moves, *parted), offset=plan.offset or best, held_out_decrease=falls)
