"""Firefly (Wu, Liu, Stone & Liu 2020), lite: splits and new neurons trained briefly, ranked by integrated gradient.

Every neuron is split into halves with offsets of their own, at most ε of its weights' norm, and twice as many new
neurons as wanted get outgoing weights of at most ε of a typical norm. All of that is trained for a few steps while the
network stays as it is. A candidate's score is the integral of its gradient from nothing to its full size, which is
its share of the change of the loss; the lowest are taken.
"""

from __future__ import annotations

import torch
from growth_site import Move, Site, fresh
from torch import Tensor

from splitwatch.anatomy import plain_module
from splitwatch.geometry.weights import extract_columns, incoming_weights, neuron_weights
from splitwatch.growth.grow import widened
from splitwatch.records import GrowthPlan, HiddenLayer, Split, Sprout

EPSILON, STEPS, POINTS = 0.1, 10, 3
"""Size of candidates, steps of training, points of the integral."""


class Candidates:
    """All candidates of one layer: offsets (m, 2, d), new neurons' incoming (p, d) and outgoing weights (p, c)."""

    def __init__(self, site: Site, layer: HiddenLayer, new: int) -> None:
        self.site, self.layer = site, layer
        w, v = neuron_weights(site.model, layer)
        self.m, self.sizes = len(w), (w.norm(dim=1)[:, None, None], v.norm(dim=1).mean())
        noise = [torch.randn(shape, generator=site.generator) for shape in ((self.m, 2, w.shape[1]), (new, v.shape[1]))]
        self.leaves = [noise[0], fresh(site, layer, new), noise[1]]
        self.project()

    def project(self) -> None:
        """Offsets and outgoing weights no longer than ε times what they are compared with."""
        for i, size in ((0, self.sizes[0]), (2, self.sizes[1])):
            norm = self.leaves[i].norm(dim=-1, keepdim=True)
            self.leaves[i] *= (EPSILON * size / norm).clamp(max=1).nan_to_num(1)

    def moves(self, part: float = 1.0) -> list[Move]:
        """Everything at a part of its size, splits first."""
        offsets, incoming, outgoing = self.leaves
        still = outgoing.new_zeros(2, outgoing.shape[1])
        name = self.layer.name
        splits = [Split(name, r, (0.5, 0.5), offsets[r] * part, still, 0.0) for r in range(self.m)]
        return [*splits, *(Sprout(name, w, v * part) for w, v in zip(incoming, outgoing, strict=True))]

    def gradients(self, batch: object, part: float = 1.0) -> list[Tensor]:
        """∂L of everything, in the order and shapes of the leaves."""
        model, layer = self.site.model, self.layer
        with widened(model, GrowthPlan((layer,), tuple(self.moves(part)), "")), torch.enable_grad():
            producers = [plain_module(model, name) for name in layer.producers]
            consumers = [plain_module(model, consumer.name) for consumer in layer.consumers]
            biases = [p.bias for p in producers if p.bias is not None]
            wanted = [*(p.weight for p in producers), *biases, *(c.weight for c in consumers)]
            grads = dict(zip(wanted, torch.autograd.grad(self.site.probe.loss_fn(model, batch), wanted), strict=True))
            w = incoming_weights([grads[p.weight] for p in producers], [grads.get(p.bias) for p in producers])
            read = zip(layer.consumers, consumers, strict=True)
            columns = [extract_columns(grads[c.weight], len(w), where.start, where.stride) for where, c in read]
        new, v = 2 * self.m, torch.cat(columns, dim=1)
        return [torch.stack([w[: self.m], w[self.m : new]], dim=1), w[new:], v[new:]]

    def train(self) -> None:
        optimizer = torch.optim.Adam(self.leaves)
        rates = [EPSILON * self.sizes[0].mean(), self.leaves[1].norm(dim=1).mean(), EPSILON * self.sizes[1]]
        rates = [float(rate) / leaf.shape[-1] ** 0.5 for rate, leaf in zip(rates, self.leaves, strict=True)]
        optimizer.param_groups = [
            {**optimizer.param_groups[0], "params": [x], "lr": rate / 3}
            for x, rate in zip(self.leaves, rates, strict=True)
        ]
        batches = self.site.probe.half("all")
        for step in range(STEPS):
            for leaf, grad in zip(self.leaves, self.gradients(batches[step % len(batches)]), strict=True):
                leaf.grad = grad
            optimizer.step()
            self.project()

    def scores(self) -> Tensor:
        """Every candidate's share of the change of the loss, in the order of the moves."""
        total: Tensor | float = 0.0
        batches = self.site.probe.half("all")
        for point in range(1, POINTS + 1):
            for batch in batches:
                offsets, _, outgoing = self.gradients(batch, (point - 0.5) / POINTS)
                split = (offsets * self.leaves[0]).sum((1, 2))
                total = total + torch.cat([split, (outgoing * self.leaves[2]).sum(1)]) / (POINTS * len(batches))
        return torch.as_tensor(total)


def firefly(site: Site, layer: HiddenLayer, count: int) -> list[Move]:
    """The best of all splits and of new neurons, after both were trained briefly."""
    candidates = Candidates(site, layer, 2 * count)
    candidates.train()
    moves = candidates.moves()
    return [moves[i] for i in candidates.scores().argsort()[:count].tolist()]
