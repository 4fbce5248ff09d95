"""Residual pursuit within the cost of some tens of training steps: an experiment beside splitwatch's own.

The pool of candidates is scored on one batch; the best are improved by gradient ascent on one batch a step, as training
itself would; only the outgoing weights are solved for on all of the fitted half, and how much of them is taken, none
included, is decided on the held-out half. New neurons are never refused: without outgoing weights they cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from growth_peers import s2d
from growth_site import Move, Site, random_new
from torch import Tensor

from splitwatch import Probe
from splitwatch.growth.grow import widened
from splitwatch.growth.pursuit import Seedlings, candidates, select, sized
from splitwatch.growth.search import scale
from splitwatch.growth.seedbed import Seedbed
from splitwatch.precision import full_precision
from splitwatch.records import GrowthPlan, HiddenLayer, Sprout

BYTES = 2**30


@dataclass(frozen=True)
class Lean:
    """A plan of as many new neurons as are missing.

    Args:
        pool: candidates, relative to the neurons wanted.
        kept: those that are improved, relative to the neurons wanted.
        ascent: steps of gradient ascent, and their rate relative to the norm of the incoming weights.
        steps: parts of the outgoing weights that the held-out half chooses from.
        splits: share of the new neurons that split along v_min instead, at ``offset``.
        others: whether existing weights change so that only what is new of a feature enters.
        ridge: on the outgoing weights, relative to the features' mean squares.
    """

    pool: float = 2.0
    kept: float = 1.0
    ascent: int = 20
    rate: float = 0.1
    steps: Sequence[float] = (0.0, 0.25, 0.5, 1.0)
    splits: float = 0.0
    offset: float = 0.3
    others: bool = True
    ridge: float = 0.0

    def __call__(self, site: Site) -> GrowthPlan:
        splits: list[Move] = []
        sprouts: list[Sprout] = []
        for layer in site.layers:
            count = site.missing(layer)
            halves = s2d(first(site), layer, int(count * self.splits), self.offset) if self.splits else []
            splits += halves
            sprouts += self.sprouts(site, layer, count - len(halves))
        sprouts = list(sized(site.model, site.layers, sprouts, site.probe)) or sprouts
        if not self.others:
            sprouts = [replace(move, others=None, biases=None) for move in sprouts]
        best = min(self.steps, key=lambda step: self.loss(site, splits, sprouts, step))
        moves = [*splits, *(scale(move, best) for move in sprouts)]
        for layer in site.layers:
            found = sum(move.added for move in moves if move.layer == layer.name)
            moves += random_new(site, layer, site.missing(layer) - found)
        return GrowthPlan(site.layers, tuple(moves), "", step=best, offset=self.offset if splits else 0.0)

    def loss(self, site: Site, splits: Sequence[Move], sprouts: Sequence[Sprout], step: float) -> float:
        if len(self.steps) == 1:
            return 0.0
        moves = (*splits, *(scale(move, step) for move in sprouts))
        with widened(site.model, GrowthPlan(site.layers, moves, "")):
            loss = site.probe.loss(site.model, "held_out", finite=False)
        return loss if loss == loss else float("inf")

    def sprouts(self, site: Site, layer: HiddenLayer, count: int) -> tuple[Sprout, ...]:
        """New neurons of one layer, with outgoing weights in proportion."""
        if not count:
            return ()
        small = first(site)
        with full_precision():
            bed = Seedbed(site.model, layer, small.probe, max(8, round(self.pool * count)), BYTES)
            w = candidates(bed, None, site.seed)
            w = w[bed.measure(w, pairs=False).scores.argsort(descending=True)[: max(4, round(self.kept * count))]]
            bed = Seedbed(site.model, layer, site.probe, len(w), BYTES)
            w = self.ascend(bed, w)
            kept, explained = select(found := bed.measure(w), count)
        found = replace(found, left=found.left + self.ridge * found.norm.diag())
        return Seedlings(layer, bed.readers, w[kept], found.of(kept), explained).sprouts()

    def ascend(self, bed: Seedbed, w: Tensor) -> Tensor:
        """Stochastic ascent, another batch at every step, with a rate that falls to zero."""
        size = w.norm(dim=1, keepdim=True) / w.shape[1] ** 0.5
        place = torch.nn.Parameter(w / torch.where(size > 0, size, 1))
        optimizer = torch.optim.Adam([place], lr=self.rate)
        beds = bed.beds
        for step in range(self.ascent):
            optimizer.param_groups[0]["lr"] = self.rate * (1 - step / self.ascent)
            bed.beds = [beds[step % len(beds)]]
            share = bed.beds[0].share
            at = bed.measure(place.detach() * size, pairs=False)
            place.grad = -(bed.slope(place.detach() * size, at) * size / share).nan_to_num(0, 0, 0)
            optimizer.step()
        bed.beds = beds
        return place.detach() * size


def first(site: Site) -> Site:
    """The same with one batch for each half."""
    probe = Probe([site.probe.fitted[0], site.probe.held_out[0]], site.probe.loss_fn)
    small = Site(site.model, probe, site.width, site.seed, site.parameters)
    small.__dict__["layers"] = site.layers
    return small
