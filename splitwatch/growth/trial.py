"""Which layers the model's own code can follow to another width: one more neuron in each, tried and undone.

Sizes that are written into the code (``view(-1, 64)``, the size of an attention head) are in no module, and what code
hidden from the tape does with a layer is not seen either; both fail as soon as the layer is wider. So does, in training
alone, what only training uses. Where code divides by a width, the function changes with it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

import torch
from torch import nn

from splitwatch.anatomy import plain_modules
from splitwatch.growth.cost import one_round
from splitwatch.growth.grow import SLACK, rounded, widened
from splitwatch.linear_map import SUPPORTED
from splitwatch.probe import Probe
from splitwatch.ranks import largest_over_ranks
from splitwatch.records import GrowthPlan, HiddenLayer

CHANGED = 1e-3
"""Relative change of the loss from which on it is asked whether rounding explains it."""


def tried(model: nn.Module, layers: Sequence[HiddenLayer], probe: Probe, names: Container[str]) -> list[HiddenLayer]:
    """The layers as they are, but those that the forward pass cannot follow to another width with that as the reason.

    Args:
        model: the network, left as it was.
        layers: what ``find_hidden_layers`` found.
        probe: its first batch is run without gradients, in eval mode and as modules are, with all layers to be tried
            wider at once; one by one only where that fails.
        names: of the layers to try, which can be widened as far as is known.
    """
    able = [layer for layer in layers if layer.name in names]
    if not able:
        return list(layers)
    trial = Trial(model, probe)
    if not trial.failure(able):
        return list(layers)
    return [replace(layer, reason=trial.failure([layer])) if layer in able else layer for layer in layers]


class Trial:
    """A model and what its loss is now."""

    def __init__(self, model: nn.Module, probe: Probe) -> None:
        self.model, self.probe, self.loss = model, probe, probe.first(model)

    def failure(self, layers: Sequence[HiddenLayer]) -> str:
        """What goes wrong when layers have a neuron more in each of their groups, nothing where all goes well."""
        moves = [move for layer in layers for move in one_round(self.model, layer)]
        with widened(self.model, GrowthPlan(tuple(layers), tuple(moves), ""), offsets=False):
            why = self._failed()
            in_training = "" if why else self._failed(training=True)
        if in_training and in_training != self._failed(training=True):  # not whatever its width
            why = in_training
        anywhere = largest_over_ranks(float(bool(why)))  # every rank leaves the layer out, or none
        return f"the forward pass does not follow its width ({why or 'on another rank'})" if anywhere else ""

    def _failed(self, *, training: bool = False) -> str:
        """How the loss fails, or changes in eval mode, if it does."""
        try:
            loss = self.probe.first(self.model, training=training)
        except (torch.OutOfMemoryError, MemoryError):  # says nothing about widths
            raise
        except Exception as error:
            return str(error).strip().partition("\n")[0] or type(error).__name__
        same = training or not abs(loss - self.loss) > CHANGED * abs(self.loss) or self._rounds(loss)
        return "" if same else f"the loss changes from {self.loss:.3g} to {loss:.3g}"

    def _rounds(self, loss: float) -> bool:
        """Whether a rounding of all weights explains the change."""
        with rounded(self.model, [name for name, module in plain_modules(self.model) if isinstance(module, SUPPORTED)]):
            return abs(loss - self.loss) <= SLACK * abs(self.probe.first(self.model) - loss)
