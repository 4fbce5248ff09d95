"""Growth by gromo 0.1.0, the library of TINY's authors.

    pip install --no-deps gromo deprecated wrapt

Where an MLP of one hidden layer grows, its weights go into gromo's own ``GrowingMLP``, which sees the whole probe and
grows as gromo's tutorial asks: statistics, ``compute_optimal_updates``, four scaling factors tried, ``apply_change``.
What came of the weights becomes sprouts, the first of which carries what gromo's natural gradient step ("optimal
delta") did to existing outgoing weights and biases; ``growth_peers.tiny`` is the same choice without that step.
Surgery, optimizer state and random neurons where gromo finds fewer are the harness's, as for all others.

gromo's other line search (``gromo.utils.utils.line_search``) looks at 201 factors or more. On the whole probe that
costs 500 to 1,200 training steps an event, on one batch of it 70 to 170, and either way most cells end worse. The step
has no ridge: outgoing weights of up to 10⁷ that cancel were met, and losses as large a few training steps later.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from growth_site import Move, Site
from torch import nn

from splitwatch import Probe
from splitwatch.records import HiddenLayer, Sprout

FACTORS = (0.0, 0.1, 0.5, 1.0)
"""What the tutorial tries: new neurons' weights on either side are multiplied by it, the natural step by its square."""


def gromo(site: Site, layer: HiddenLayer, count: int) -> list[Move]:
    """At most as many neurons as inputs or outputs, and the change of existing outgoing weights that goes with them."""
    if not count:
        return []
    net = proposed(site.model, site.probe, count)
    best = min(FACTORS, key=lambda factor: extended_loss(net, site.probe, factor))
    if best == 0:  # neurons without any weights would never learn
        return []
    net.set_scaling_factor(best)
    net.apply_change()
    return sprouts(site.model, layer, net)


def proposed(model: nn.Module, probe: Probe, count: int) -> Any:
    """A network of gromo's with our weights, and what it asks for by default: new neurons, a natural gradient step."""
    net = measured(model, probe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of singular statistics, which gromo has a pseudo-inverse for
        net.compute_optimal_updates(maximum_added_neurons=count)
    net.reset_computation()
    net.dummy_select_update()
    return net


def measured(model: nn.Module, probe: Probe) -> Any:
    """A network of gromo's with our weights and the statistics of the whole probe.

    Losses are sums over samples, since gromo divides by their number.
    """
    from gromo.containers.growing_mlp import GrowingMLP

    first, activation, last = model.children()
    net = GrowingMLP(first.in_features, last.out_features, first.out_features, 1, activation).to(first.weight)
    for module, ours in zip(net.layers, (first, last), strict=True):
        module.layer.load_state_dict(ours.state_dict())
    net.set_growing_layers(index=0)
    net.init_computation()
    for batch in probe.half("all"):
        (probe.loss_fn(net, batch) * len(batch[0])).backward()
        net.update_computation()
    return net


@torch.no_grad()
def extended_loss(net: Any, probe: Probe, factor: float) -> float:
    """Mean loss on the probe with what is proposed at a factor."""
    net.set_scaling_factor(factor)
    batches = probe.half("all")
    loss = sum(float(probe.loss_fn(net.extended_forward, batch)) for batch in batches) / len(batches)
    return loss if loss == loss else float("inf")


def sprouts(model: nn.Module, layer: HiddenLayer, net: Any) -> list[Move]:
    """What gromo made of our weights, (n, d) → (n + k, d) and (c, n) → (c, n + k), as k sprouts."""
    first, _, last = model.children()
    n, (incoming, outgoing) = first.out_features, net.layers
    w = torch.cat([incoming.weight, incoming.bias[:, None]], dim=1)[n:].detach()
    v, old = outgoing.weight.T.detach(), last.weight.T.detach()
    found = [Sprout(layer.name, *pair) for pair in zip(w, v[n:], strict=True)]
    found[0] = replace(found[0], others=(torch.eye(n), v[:n] - old), biases=(outgoing.bias - last.bias).detach())
    return list(found)
