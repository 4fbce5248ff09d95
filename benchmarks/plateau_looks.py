"""What the plateau oracle sees of a stationary point: a first look in float64, and a second one at 150 digits.

Eigenvalues are compared with the norm of the narrow network's Hessian (the wide one's with its own). In the first look
those up to ZERO count as zero, those from CLEAR on as nonzero; a case with one in between gets a second look at 150
digits: a trained point is polished by Newton's method, a designed one gets targets that meet its design to all digits.
The Hessians of the narrow and the wide network are taken there, and the inner Hessian and coupling that splitwatch
measures, in float64 as ever, are held against their values at 150 digits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import plateau_exact as exact
import torch
from plateau_digits import Network
from plateau_points import STATIONARY, Landscape
from torch import Tensor, nn

from splitwatch import HiddenLayer, Probe, coupling, find_hidden_layers, inner_hessian
from splitwatch.growth.embedding import critical_embedding

Inertia: TypeAlias = tuple[int, int, int]

ZERO = 1e-13  # rounding stays below 1e-14
# A singular value g of G shows in the wide Hessian as little as g², an eigenvalue of S times what λ makes of it.
CLEAR = {"narrow Hessian": 1e-11, "wide Hessian": 1e-11, "inner Hessian": 1e-9, "coupling": 1e-6}
CLOSER = {"inner Hessian": 10 * ZERO, "coupling": 10 * ZERO}  # in the second look, of what float64 measures


def inertia(values: Tensor | np.ndarray, scale: float, zero: float, clear: float) -> tuple[Inertia, bool]:
    """Numbers of positive, negative, zero values, and whether any is grey: between ``zero`` and ``clear``."""
    relative = values / scale
    up, down = int((relative > zero).sum()), int((relative < -zero).sum())
    grey = bool(((abs(relative) > zero) & (abs(relative) < clear)).any())
    return (up, down, len(values) - up - down), grey


@dataclass
class Neuron:
    """Inner Hessian and coupling of a neuron, as splitwatch measures them."""

    layer: HiddenLayer
    r: int
    S: Tensor  # (d, d)
    G: Tensor  # (c, d)
    eigenvalues: Tensor  # (d − ρ,), ascending: of S on the kernel of the coupling
    rank: int
    signs: Inertia
    grey: str

    @property
    def position(self) -> int:
        """The layer's place among the linear maps."""
        return int(self.layer.name) // 2


@dataclass
class FirstLook:
    """A stationary point in float64."""

    land: Landscape
    clear = CLEAR

    @cached_property
    def values(self) -> Tensor | np.ndarray:
        """Eigenvalues of the narrow Hessian."""
        return torch.linalg.eigvalsh(self.land.hessian(self.land.point))

    @cached_property
    def scale(self) -> float:
        return float(abs(self.values).max())

    @property
    def narrow(self) -> tuple[Inertia, str]:
        found, grey = inertia(self.values, self.scale, ZERO, CLEAR["narrow Hessian"])
        return found, "narrow Hessian" if grey else ""

    def visible(self, neuron: Neuron) -> bool:
        """Whether all of S but its zeros outweighs terms of third order in losses at a distance of some 1e-3."""
        return not inertia(neuron.eigenvalues, self.scale, ZERO, 1e-4)[1]

    def neurons(self) -> Iterator[Neuron]:
        """All neurons of the layers that can be widened, always in the same order."""
        land, probe = self.land, Probe([(self.land.X, self.land.Y)], self.land.loss_fn)
        for layer in (layer for layer in find_hidden_layers(land.model, probe) if layer.growable):
            measured = zip(inner_hessian(land.model, layer, probe), coupling(land.model, layer, probe), strict=True)
            for r, (S, G) in enumerate(measured):
                (rank, _, _), faint = inertia(torch.linalg.svdvals(G), self.scale, ZERO, self.clear["coupling"])
                kernel = torch.linalg.svd(G).Vh[rank:]
                values = torch.linalg.eigvalsh(kernel @ S @ kernel.T)
                signs, blurred = inertia(values, self.scale, ZERO, self.clear["inner Hessian"])
                grey = "coupling" if faint else "inner Hessian" if blurred else ""
                yield Neuron(layer, r, S, G, values, rank, signs, grey)

    def embedded(self, neuron: Neuron, coefficients: Sequence[float]) -> Landscape:
        return replace(self.land, model=critical_embedding(self.land.model, neuron.layer, neuron.r, coefficients))

    def wide(self, neuron: Neuron, coefficients: Sequence[float]) -> tuple[Inertia, str, bool]:
        """Inertia of the wide network's Hessian, what is grey about it, and whether the point is stationary."""
        land = self.embedded(neuron, coefficients)
        values, flat = torch.linalg.eigvalsh(land.hessian(land.point)), float(land.gradient(land.point).norm())
        found, grey = inertia(values, float(values.abs().max()), ZERO, CLEAR["wide Hessian"])
        return found, "wide Hessian" if grey else "", flat <= 10 * STATIONARY


@dataclass
class SecondLook(FirstLook):
    """A stationary point at 150 digits; ``land`` is the same point rounded, where splitwatch measures."""

    net: Network
    clear = CLOSER

    @classmethod
    def at(cls, land: Landscape) -> SecondLook | None:
        """At the stationary point next to the landscape's, or None if none is found."""
        net = Network.of(land)
        net = exact.met(net, land.design) if land.design else exact.polished(net)
        if net is None:
            return None
        model = copy.deepcopy(land.model)
        nn.utils.vector_to_parameters(net.point(), model.parameters())
        return cls(replace(land, model=model, Y=torch.as_tensor(net.Y.astype(float))), net)

    @cached_property
    def values(self) -> np.ndarray:
        return exact.eigenvalues(self.net.derivatives()[1])

    @property
    def narrow(self) -> tuple[Inertia, str]:
        found, grey = inertia(self.values, self.scale, exact.ZERO, exact.CLEAR)
        return found, "narrow Hessian" if grey else ""

    def check(self, neuron: Neuron) -> tuple[str, str]:
        """What 150 digits object to in splitwatch's numbers of a neuron: (what stays grey, what is wrong)."""
        S, G = self.net.measured(neuron.position, neuron.r)
        singular, rows = exact.singular(G)
        (rank, _, _), _ = inertia(singular, self.scale, exact.ZERO, exact.CLEAR)
        kernel = rows[rank:]
        values = exact.eigenvalues(kernel @ S @ kernel.T) if len(kernel) else np.empty(0)
        signs, _ = inertia(values, self.scale, exact.ZERO, exact.CLEAR)
        # A faint coupling has its kernel known to as few digits.
        sharp = min(1.0, float(singular[rank - 1]) / self.scale) if rank else 1.0
        if np.abs(singular.astype(float) - torch.linalg.svdvals(neuron.G).numpy()).max() > ZERO * self.scale:
            return "", "splitwatch's coupling is off"
        if rank != neuron.rank:
            return "coupling", ""
        if (
            rank < S.shape[0]
            and np.abs(values.astype(float) - neuron.eigenvalues.numpy()).max() > ZERO * self.scale / sharp
        ):
            return "", "splitwatch's inner Hessian is off"
        return "" if signs == neuron.signs else "inner Hessian", ""

    def wide(self, neuron: Neuron, coefficients: Sequence[float]) -> tuple[Inertia, str, bool]:
        gradient, hessian = self.net.embedded(neuron.position, neuron.r, coefficients).derivatives()
        values = exact.eigenvalues(hessian)
        scale = abs(values).max()
        found, grey = inertia(values, scale, exact.ZERO, exact.CLEAR)
        return found, "wide Hessian" if grey else "", max(abs(gradient)) <= exact.ZERO * scale


def descends(land: Landscape, radii: tuple[float, ...], rng: np.random.Generator) -> bool:
    """Whether bounded searches from random starts reach a lower loss in every one of the boxes."""
    base = float(land.value(land.point))

    def lower(radius: float) -> bool:
        start = land.point + radius * torch.as_tensor(rng.uniform(-1, 1, len(land.point)))
        return land.lowest(start, 100, radius)[1] < base - 1e-12

    return all(any(lower(radius) for _ in range(3)) for radius in radii)
