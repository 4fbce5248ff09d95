"""Which neurons of a wide layer are replicas, which are silent, and the branch of critical points this puts it on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from splitwatch.geometry.weights import incoming_weights, neuron_weights
from splitwatch.growth.widening import IndexMap, submodule
from splitwatch.handlers import rows
from splitwatch.layers import select_layers
from splitwatch.records import HiddenLayer, SplitWatchError

Groups = list[list[int]]


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The branch C^{r,l} of one hidden layer: m neurons in r + l groups of equal incoming weights.

    ``effective`` is r, the groups whose outgoing weights do not cancel; ``silent`` is l, the groups whose outgoing
    weights sum to zero; ``width`` is m. ``incoming`` is d, ``outgoing`` c, the weights of one neuron.
    Neurons of constant activation count as effective.
    """

    layer: str
    width: int
    effective: int
    silent: int
    incoming: int
    outgoing: int
    tolerance: float

    @property
    def excess_dimension(self) -> int | None:
        """By how much the branch's dimension exceeds N; None where a neuron has several outgoing weights.

        (m − l − r) + N + l(d − 1): coefficients that move within their groups, the N dimensions of the critical set of
        width r, which are not known here, and l incoming weights that move on {h(w) = 0}. The count holds for critical
        points of networks with one hidden layer, one output and an analytic, non-polynomial activation, where h = 0 is
        one equation of full rank; elsewhere it is the count of these moves, not a theorem.

        Source: Zhang, Zhang & Luo 2024, branches C^{r,l}; l free incoming weights counted as in their figure 1.
        """
        if self.outgoing != 1:
            return None
        return (self.width - self.silent - self.effective) + self.silent * (self.incoming - 1)

    def __str__(self) -> str:
        excess = self.excess_dimension
        dimension = "dimension not known for several outgoing weights" if excess is None else f"dimension N + {excess}"
        return (
            f"{self.layer}: branch C^({self.effective},{self.silent}) of width {self.width}, {dimension}: "
            f"{self.effective} effective neurons, {self.silent} silent (relative tolerance {self.tolerance:g})"
        )


def branch(model: nn.Module, layers: Iterable[HiddenLayer], *, tolerance: float = 1e-6) -> tuple[Branch, ...]:
    """The branch C^{r,l} that each layer lies on, if the model is at a critical point; that it is, is not checked.

    Args:
        model: the wide network, left as it is.
        layers: its hidden layers; those that cannot be widened are passed over. Each is counted as it stands, the
            others left as they are.
        tolerance: as in ``critical_reduction``.

    Raises:
        SplitWatchError: layers and model do not fit, or the tolerance is negative.

    Source: Zhang, Zhang & Luo 2024, Def. 4.2 to 4.4.
    """
    return tuple(_branch(model, layer, tolerance) for layer in checked_layers(model, layers, tolerance))


def _branch(model: nn.Module, layer: HiddenLayer, tolerance: float) -> Branch:
    groups = replicas(model, layer, tolerance)
    silent = int(silence(model, layer, groups, tolerance)[0].sum())
    incoming, outgoing = (values.shape[1] for values in neuron_weights(model, layer))
    return Branch(layer.name, layer.width, len(groups) - silent, silent, incoming, outgoing, tolerance)


def checked_layers(model: nn.Module, layers: Iterable[HiddenLayer], tolerance: float) -> tuple[HiddenLayer, ...]:
    """The growable layers, once they and the tolerance are known to fit.

    Raises:
        SplitWatchError: layers and model do not fit, or the tolerance is negative.
    """
    if not tolerance >= 0:
        raise SplitWatchError(f"tolerance: required a number ≥ 0, found {tolerance}; 1e-6 is the default")
    given = select_layers(layers, None)
    for layer in given:
        found = len(submodule(model, layer.name).weight)
        if found != layer.width:
            raise SplitWatchError(
                f"layers: required {layer.width} neurons in {layer.name}, found {found}; find them again"
            )
    return given


def replicas(model: nn.Module, layer: HiddenLayer, tolerance: float) -> Groups:
    """Groups of neurons that agree with the first one of their group; every neuron is in one of them."""
    group = torch.tensor([layer.group(r) for r in range(layer.width)])
    equal = group[:, None] == group  # others read other channels, or are read by others
    for values in _identity(model, layer):
        size = values.norm(dim=1)
        apart = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
        equal &= apart <= tolerance * torch.maximum(size[:, None], size)
    groups: dict[int, list[int]] = {}
    for r, row in enumerate(equal.tolist()):
        first = next((s for s in groups if row[s]), r)
        groups.setdefault(first, []).append(r)
    return list(groups.values())


def silence(model: nn.Module, layer: HiddenLayer, groups: Groups, tolerance: float) -> tuple[Tensor, Tensor]:
    """Which groups no consumer hears (bool), and the norm of each group's outgoing weights where it is largest."""
    silent = torch.ones(len(groups), dtype=torch.bool)
    loudness = torch.zeros(len(groups), dtype=torch.float64)
    for blocks in _outgoing(model, layer):
        total = summed(blocks, groups).double().flatten(1).norm(dim=1).cpu()
        silent &= total <= tolerance * blocks.double().flatten(1).norm(dim=1).max().cpu()
        loudness = torch.maximum(loudness, total)
    return silent, loudness


def summed(blocks: Tensor, groups: Groups) -> Tensor:
    """One block a group: the sum over its neurons."""
    return torch.stack([blocks[group].sum(0) for group in groups])


def held(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a module that have one entry per neuron."""
    tensors = [(name, getattr(module, name)) for name in rows(module).tensors]
    return [(name, tensor) for name, tensor in tensors if tensor is not None]


def _identity(model: nn.Module, layer: HiddenLayer) -> list[Tensor]:
    """Everything that makes a neuron's activation what it is, part by part, one row a neuron."""
    producers = [submodule(model, name) for name in layer.producers]
    parts = [incoming_weights([module.weight], [module.bias]) for module in producers]
    riders = [tensor for name in layer.riders for _, tensor in held(submodule(model, name))]
    return [part.detach().reshape(layer.width, -1).double().cpu() for part in (*parts, *riders)]


def _outgoing(model: nn.Module, layer: HiddenLayer) -> list[Tensor]:
    """The consumers' weights, one block a neuron."""
    unchanged = IndexMap(torch.arange(layer.width), layer.width, axis=1)
    return [
        replace(unchanged, start=c.start, stride=c.stride, groups=c.groups).blocks(
            submodule(model, c.name).weight.detach()
        )
        for c in layer.consumers
    ]
