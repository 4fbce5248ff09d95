"""What a layer's consumers would read of new neurons, and what that would do to the loss, on the fitted half.

The model is widened once by k silent neurons (outgoing weights zero), which changes nothing that it computes, and its
traces are captured. From then on the new neurons' incoming weights can be anything: their pre-activations are put
into the recorded path, so that any activation, normalisation, gate or pooling is evaluated as the model would do it.

    φ_k   the features: what the consumers read of neuron k, (rows,)
    φ_k⊥  the features less what the layer's features and the consumers' biases make of them by least squares
    g_k   the gains: ∂L/∂v_k at v_k = 0 of φ_k⊥, (c,)

A new neuron whose outgoing weights are v comes with −a v on the existing ones and the biases, a the combination that
makes φ − φ⊥: then nothing but φ⊥ enters, and what the fitted half alone would change in the existing weights (at a
stationary point of the whole loss its slope in them is sampling noise) has no part in the choice. Where a consumer
reads several positions of a neuron (a kernel's offsets, flattened images), they count as further rows: the metric
‖φ⊥‖² leaves out that each of them has weights of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from splitwatch.geometry.ends import channels, lift, outgoing_gradient
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.grow import widened
from splitwatch.probe import Probe
from splitwatch.ranks import everywhere, is_first, summed, summed_number
from splitwatch.records import GrowthPlan, HiddenLayer, Sprout
from splitwatch.trace import LayerTrace

RESOLUTION = 1e-3
"""Eigenvalues of the existing features' correlations that count as zero, relative to the largest.

At 1e-6 neurons that are nearly alike came away with outgoing weights many times as large as before, of opposite signs.
"""

FAINT = 0.01
"""Existing neurons with features this small, relative to the largest, count as none. To take part in what the others
make they would need outgoing weights that no training recovers from: one that had shrunk to 1e-6 was given 30,000.
"""

RIDGE = 0.1
"""Ridge on the outgoing weights relative to ‖φ‖². Features of which existing ones leave a hundredth would get a tenfold
weight for what may be noise; losses after growth scattered so widely without it that some runs never recovered."""

SMALL = 0.03
"""What counts as φ² of a neuron at least, as a share of what the largest existing one's weights make of theirs, ‖w‖².

Neurons that fire on next to none of the probe would be given outgoing weights a thousand times as large as existing
ones otherwise. The area under the validation curve of staged training is 3 % lower with it (mean of thirteen tasks), on
digits and a teacher of ReLU 10 %; a hundredth and a tenth gain less.
"""

SEEN = 64
"""Rows that a step of the search sees at least, of as many batches as it takes: on 8 it chooses worse neurons, on twice
as many none that end better."""

THRESHOLD = 1e-3
"""Share of ‖φ‖² that has to be left in ‖φ⊥‖² for a neuron to count as new."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """k possible neurons on the fitted half, in float64.

    ``gain`` (k, c) is g, ``norm`` (k,) N, the mean of φ² over samples and its ``floor``, ``left`` (k, k) the mean of
    φ⊥ᵀφ⊥, ``combination`` (b, k) how existing features and biases make φ − φ⊥.
    """

    gain: Tensor
    norm: Tensor
    left: Tensor
    combination: Tensor

    def of(self, rows: Tensor) -> Measured:
        """The same of some of the neurons."""
        return Measured(self.gain[rows], self.norm[rows], self.left[rows][:, rows], self.combination[:, rows])

    @property
    def scores(self) -> Tensor:
        """‖g‖²/‖φ⊥‖², zero for neurons that are hardly new, (k,)."""
        left = self.left.diagonal()
        return torch.where(left > THRESHOLD * self.norm, self.gain.square().sum(1) / left, 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Bed:
    """One batch: the trace of the widened layer, existing pre-activations, features (rows, b) and their gains (b, c).

    Existing features are the m neurons' and ones for every consumer that has a bias.
    """

    trace: LayerTrace
    standing: tuple[Tensor, ...]
    features: Tensor
    gain: Tensor
    share: float

    @property
    def nbytes(self) -> int:
        kept = [self.features, *self.standing, *self.trace.signals]
        maps = [x.input for x in (*self.trace.producers, *self.trace.consumers)]
        return sum(x.nbytes for x in (*kept, *maps))


@dataclass(frozen=True, slots=True)
class Reader:
    """A consumer's share of a neuron's outgoing weights: their number, its outputs, whether it has a bias."""

    size: int
    outputs: int
    has_bias: bool


class Seedbed:
    """A layer with room for k new neurons.

    Args:
        model: the network; widened while it is captured, left as it was.
        layer: the layer.
        probe: its fitted half is measured on.
        count: k.
        max_bytes: what may be kept of the traces; batches beyond it are left out.
        rows: no more batches of each rank than it takes for so many rows.

    Raises:
        UnsupportedLayerError: the layer cannot hold new neurons (a depthwise convolution needs a kernel for each).
    """

    def __init__(
        self, model: nn.Module, layer: HiddenLayer, probe: Probe, count: int, max_bytes: int, rows: int | None = None
    ) -> None:
        incoming, outgoing = neuron_weights(model, layer)
        self.layer, self.count, self.incoming = layer, count, incoming
        self.d, self.c = incoming.shape[1], outgoing.shape[1]
        silent = Sprout(layer.name, torch.zeros(self.d), torch.zeros(self.c))
        plan, wide = GrowthPlan((layer,), (silent,) * count, ""), replace(layer, width=layer.width + count)
        self.beds: list[_Bed] = []
        with widened(model, plan):
            for traces in probe.traces(model, [wide], "fitted"):
                self.beds.append(self._bed(traces[layer.name]))
                full = sum(bed.nbytes for bed in self.beds) * (1 + 1 / len(self.beds)) > max_bytes
                if full or (rows is not None and sum(len(bed.features) for bed in self.beds) >= rows):
                    break
        maps = zip(layer.consumers, self.beds[0].trace.consumers, strict=True)
        shapes = [(where.stride, x.weight_shape, x.has_bias) for where, x in maps]
        self.readers = tuple(Reader(n * shape[0] * shape[2:].numel(), shape[0], bias) for n, shape, bias in shapes)
        self.beds, self.whole = _shared(self.beds), True  # all of what the Gram matrix below is of
        gram = sum(_weight(bed) * bed.features.double().T @ bed.features.double() for bed in self.beds)
        gram = summed(torch.as_tensor(gram))
        square = gram.diagonal()[: layer.width]  # φ²
        self.largest = square.max()
        self.inverse = _pseudo_inverse(gram, torch.nonzero(square < FAINT**2 * self.largest))
        self.small = (SMALL * self.largest / incoming.double().square().sum(1).max()).nan_to_num(0, 0, 0)
        slope = summed(torch.as_tensor(sum(bed.share * bed.gain.double() for bed in self.beds)))
        self.known = self.inverse @ slope  # what the existing weights would do about their own slope, (b, c)

    def at(self, step: int) -> Seedbed:
        """The same with a part of each rank's batches, others at every step; what existing features span stays."""
        one, n = copy(self), len(self.beds)
        count = min(n, -(-SEEN // len(self.beds[0].features)))
        one.beds = _shared([self.beds[(step * count + i) % n] for i in range(count)])
        one.whole = everywhere(count == n)
        return one

    def measure(self, w: Tensor, *, pairs: bool = True) -> Measured:
        """Gains and Gram matrices of neurons with incoming weights (k', d), k' ≤ k; without ``pairs`` diagonal ones."""
        with torch.no_grad():
            gain, gram, cross = (summed(part.double()) for part in self._moments(w, pairs))
        combination = self.inverse @ cross.T
        norm = (gram.diagonal() if pairs else gram) + self.floor(w)
        left = gram - cross @ combination if pairs else (gram - (cross * combination.T).sum(1)).diag()
        return Measured(gain - cross @ self.known, norm, left, combination)

    def floor(self, w: Tensor) -> Tensor:
        """What counts as φ² of neurons with incoming weights (k', d) beside their own, (k',)."""
        return self.small * w.double().square().sum(1)

    def slope(self, w: Tensor) -> Tensor:
        """The gradient of log ‖g‖²/(‖φ⊥‖² + ρN) in incoming weights (k', d), N the norm, ρ the ridge; on a part ‖g‖²/N.

        ‖φ⊥‖² = ‖φ‖² − cᵀG⁺c, so its gradient is that of ‖φ‖² − 2 aᵀc with the combination a = G⁺c held fixed. Without
        the ridge it would lead to features that are hardly new, and on a part of what G was measured on it still does;
        there c enters only through cᵀ times what is known, which costs less. The graphs of all batches are kept for it.
        """
        with torch.enable_grad():
            leaf = w.detach().requires_grad_()
            gain, square, cross = self._moments(leaf, pairs=False, onto=None if self.whole else self.known)
            g, norm, c = (summed(part.detach().double()) for part in (gain, square, cross))
            floor, share = self.floor(leaf), RIDGE if self.whole else 1.0
            left, toward_old = share * (norm + floor.detach()), torch.zeros_like(c)
            if self.whole:
                a = c @ self.inverse
                left, toward_old = left + norm - (c * a).sum(1), 2 * a
            g = g - (c @ self.known if self.whole else c)
            towards = 2 * g / g.square().sum(1, keepdim=True)
            toward_old = toward_old / left[:, None] - (towards @ self.known.T if self.whole else towards)
            value = (towards.to(w) * gain).sum() + (toward_old.to(w) * cross).sum()
            value = value - ((share + self.whole) * square / left.to(w)).sum()
            value = value - is_first() * (share * floor / left).sum()
            return summed(torch.autograd.grad(value, leaf)[0])

    def _moments(self, w: Tensor, pairs: bool, onto: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's part of ∂L/∂v (k', c), of φᵀφ (k', k') or its diagonal, and of φᵀ with existing features.

        The latter times a matrix ``onto`` (b, n), where one is given.
        """
        parts = []
        for bed in self.beds:
            blocks = self._read(bed.trace, bed.standing, w)
            phi, weight = _rows(bed.trace, blocks)[:, : len(w)], _weight(bed)
            gain, old = bed.share * outgoing_gradient(bed.trace, blocks)[: len(w)], bed.features
            if pairs:
                gain, phi, old = gain.double(), phi.double(), old.double()
            square = phi.T @ phi if pairs else phi.square().sum(0)
            cross = phi.T @ old if onto is None else torch.linalg.multi_dot([phi.T, old, onto.to(old)])
            parts.append((gain, weight * square, weight * cross))
        gain, square, cross = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        return gain, square, cross

    @torch.no_grad()
    def scales(self) -> bool:
        """Whether what consumers read of a new neuron is twice as much for twice its weights, as next to ReLU."""
        trace, standing = self.beds[0].trace, self.beds[0].standing
        places = torch.arange(self.count, device=standing[0].device) % self.layer.width
        z = [x.index_select(p.channel_axis, places) for x, p in zip(standing, trace.producers, strict=True)]
        once, twice = (self._through(trace, standing, [factor * x for x in z]) for factor in (1, 2))
        return everywhere(all(torch.allclose(2 * a, b) for a, b in zip(once, twice, strict=True)))

    def _bed(self, trace: LayerTrace) -> _Bed:
        """What is kept of one batch."""
        m, axis = self.layer.width, trace.producers[0].channel_axis
        z = trace.pre_activations()
        standing = tuple(x.narrow(axis, 0, m).detach().clone() for x in z)
        blocks = channels(trace, trace.path(*z), 0, m)
        ones = [_ones_in(trace, blocks, i) for i, consumer in enumerate(trace.consumers) if consumer.has_bias]
        features = torch.cat([_rows(trace, part) for part in (blocks, *ones)], dim=1)
        gain = torch.cat([outgoing_gradient(trace, part) for part in (blocks, *ones)])
        return _Bed(trace, standing, features.detach(), gain.detach(), trace.share)

    def _read(self, trace: LayerTrace, standing: Sequence[Tensor], w: Tensor) -> list[Tensor]:
        """What each consumer reads of the new neurons; those without weights here get zeros."""
        return self._through(trace, standing, lift(trace, torch.cat([w, w.new_zeros(self.count - len(w), self.d)])))

    def _through(self, trace: LayerTrace, standing: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
        """What each consumer reads of new neurons with some pre-activations."""
        maps = zip(standing, new, trace.producers, strict=True)
        z = [torch.cat([old, more], dim=p.channel_axis) for old, more, p in maps]
        return channels(trace, trace.path(*z), self.layer.width, self.count)


def _rows(trace: LayerTrace, blocks: Sequence[Tensor]) -> Tensor:
    """Features of the neurons in blocks, (rows, k): every consumer, sample, position and stride is a row."""
    parts = []
    for block, where, consumer in zip(blocks, trace.layer.consumers, trace.consumers, strict=True):
        apart = block.movedim(consumer.channel_axis, -1).unflatten(-1, (-1, where.stride))
        parts.append(apart.movedim(-2, -1).flatten(0, -2))
    return torch.cat(parts)


def _ones_in(trace: LayerTrace, blocks: Sequence[Tensor], which: int) -> list[Tensor]:
    """What a bias makes, as if it were a neuron: ones for one consumer, zeros for the others."""
    found = []
    for i, (block, where, consumer) in enumerate(zip(blocks, trace.layer.consumers, trace.consumers, strict=True)):
        one = block.narrow(consumer.channel_axis, 0, where.stride)
        found.append(torch.ones_like(one) if i == which else torch.zeros_like(one))
    return found


def _shared(beds: Sequence[_Bed]) -> list[_Bed]:
    """Batches that count with their shares of the samples of all ranks' batches."""
    seen = summed_number(sum(bed.trace.size for bed in beds))
    return [replace(bed, share=bed.trace.size / seen) for bed in beds]


def _weight(bed: _Bed) -> float:
    """What one sample of a batch counts."""
    return bed.share / bed.trace.size


def _pseudo_inverse(gram: Tensor, without: Tensor) -> Tensor:
    """A⁺ of a Gram matrix of features, whatever their scales, zero for some."""
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, 1 / scale, 0).index_fill(0, without.flatten(), 0)
    scale = scale[:, None] * scale
    return torch.linalg.pinv(gram * scale, rtol=RESOLUTION, hermitian=True) * scale
