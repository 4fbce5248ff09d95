"""Which layers the model's own code can follow to another width: one more neuron in each, tried and undone.

Sizes that are written into the code (``view(-1, 64)``, the size of an attention head) are in no module, and what code
hidden from the tape does with a layer is not seen either; both fail as soon as the layer is wider.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

import torch
from torch import nn

from splitwatch.growth.cost import one_round
from splitwatch.growth.grow import UNFOLLOWED, widened
from splitwatch.probe import Probe
from splitwatch.ranks import largest_over_ranks
from splitwatch.records import GrowthPlan, HiddenLayer


def tried(model: nn.Module, layers: Sequence[HiddenLayer], probe: Probe, names: Container[str]) -> list[HiddenLayer]:
    """The layers as they are, but those that the forward pass cannot follow to another width with that as the reason.

    Args:
        model: the network, left as it was.
        layers: what ``find_hidden_layers`` found.
        probe: its first batch is run, once for each layer that is tried, without gradients.
        names: of the layers to try, which can be widened as far as is known.
    """
    return [replace(layer, reason=_failure(model, layer, probe)) if layer.name in names else layer for layer in layers]


def _failure(model: nn.Module, layer: HiddenLayer, probe: Probe) -> str:
    """What goes wrong when a layer has a neuron more in each of its groups, nothing where all goes well."""
    with widened(model, GrowthPlan((layer,), tuple(one_round(model, layer)), ""), offsets=False):
        why = _error(model, probe)
    anywhere = largest_over_ranks(float(why is not None))  # every rank leaves the layer out, or none
    return f"the forward pass does not follow its width ({why or 'on another rank'})" if anywhere else ""


def _error(model: nn.Module, probe: Probe) -> str | None:
    """How the loss of the probe's first batch fails, if it does."""
    try:
        probe.outputs(model, ())
    except torch.OutOfMemoryError:  # says nothing about widths
        raise
    except UNFOLLOWED as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None
