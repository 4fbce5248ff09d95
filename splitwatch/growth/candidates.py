"""Possible new neurons: where the search begins, how large they are, what improves them, which explain most.

Candidates are scored by ‖g‖²/‖φ⊥‖² on one batch, the best are improved by stochastic gradient ascent, as training
would, then put in order, each against what those before it leave (orthogonal matching pursuit, Pati, Rezaiifar &
Krishnaprasad 1993), on all batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from splitwatch.geometry.ends import incoming_sizes, lift
from splitwatch.growth.seedbed import RIDGE, THRESHOLD, Measured, Seedbed
from splitwatch.ranks import is_first, summed, summed_number
from splitwatch.records import LayerGeometry

REACHES = (0.3, 1.0)
"""Finite steps along split directions among the candidates, relative to the norm of the incoming weights."""
FRESH = 3**-0.5
"""Norm of a neuron's incoming weights in one layer as PyTorch draws them, linear or convolution of any size."""
STEEPEST, TRIED = 2.0, 10
"""Largest spread of new pre-activations relative to existing ones', and on how many candidates spreads are compared.

Four times as steep ones gain little more.
"""
MORE = 1.3
"""How much more candidates of the largest spread have to explain to be taken: 1.5 gains less in staged training."""
LARGEST = 2.0
"""Root mean square of a new feature at most, relative to the largest of the existing ones."""
ASCENT, RATE = 5, 0.1
"""Steps of gradient ascent, and how far the first goes relative to the norm of the incoming weights.

The rate falls to zero, so that the last batches do not decide. In staged training 4 and 10 steps lower the loss at
growth by about as much and end alike; none lowers it by less.
"""


def candidates(bed: Seedbed, geometry: LayerGeometry | None, seed: int) -> Tensor:
    """Incoming weights (k, d): finite steps along the lowest split directions (up to half of k), the rest random.

    Random ones spread their pre-activations around a random sample's, as widely as it takes (``flattest``).
    """
    steps = bed.incoming[:0]
    if geometry is not None:
        lowest = geometry.min_eigenvalue.argsort()[: bed.count // (4 * len(REACHES))]
        old, along = bed.incoming[lowest], geometry.min_vector[lowest].to(bed.incoming)
        sizes = [sign * reach for reach in REACHES for sign in (1, -1)]
        steps = torch.cat([old + size * old.norm(dim=1, keepdim=True) * along for size in sizes])
    k, generator = bed.count - len(steps), torch.Generator().manual_seed(seed)
    w = torch.randn(k, bed.d, generator=generator, dtype=torch.float64).to(bed.incoming)
    where = torch.rand(k, generator=generator, dtype=torch.float64)
    return torch.cat([steps, flattest(bed, fitted_to_data(bed, w, where))])


def fitted_to_data(bed: Seedbed, w: Tensor, where: Tensor) -> Tensor:
    """Directions (k', d) scaled so that pre-activations spread like existing neurons', with biases at a sample.

    The pre-activation is zero at one row (a sample, or a position in it) of rank 0; ``where`` (k',) in [0, 1)
    names that row as a share of its rows.
    """
    axes = [p.channel_axis for p in bed.beds[0].trace.producers]
    seen = ((lift(one.trace, w), one.standing) for one in bed.beds)
    new, old = zip(*((_channels_last(a, axes), _channels_last(b, axes)) for a, b in seen), strict=True)
    new, old = ([torch.cat(z) for z in zip(*parts, strict=True)] for parts in (new, old))
    parts = []
    sizes, maps = incoming_sizes(bed.beds[0].trace), bed.beds[0].trace.producers
    for part, z, standing, producer in zip(w.split(sizes, dim=1), new, old, maps, strict=True):
        spread = _spread(standing)[torch.arange(len(w)) % bed.layer.width]
        spread = torch.where(spread > 0, spread, 1) / _spread(z)
        factor = torch.where(spread.isfinite(), spread, 1)[:, None]
        part = part * factor
        if producer.has_bias:
            at = (where.to(z) * len(z)).long()
            part[:, -1] -= factor[:, 0] * summed(z[at, torch.arange(len(w))] * is_first())
        parts.append(part)
    return torch.cat(parts, dim=1)


def _spread(z: Tensor) -> Tensor:
    """Standard deviations of the columns over the rows of all ranks."""
    rows = summed_number(len(z))
    mean = summed(z.sum(0)) / rows
    return (summed((z - mean).square().sum(0)) / rows).sqrt()


def _channels_last(z: Sequence[Tensor], axes: Sequence[int]) -> list[Tensor]:
    """Pre-activations as (rows, channels)."""
    return [x.movedim(axis, -1).flatten(0, -2) for x, axis in zip(z, axes, strict=True)]


def flattest(bed: Seedbed, w: Tensor) -> Tensor:
    """Incoming weights (k, d) times one factor: no larger than their features need to explain what they do.

    Large weights are slow to turn. The largest spread is kept where half of it explains clearly less; then weights are
    halved, down to a fresh layer's, as long as that costs nothing. Where features only scale, all explain the same.
    """
    fresh = FRESH * len(bed.layer.producers) ** 0.5 / w.norm(dim=1, keepdim=True)
    if bed.scales():
        return w * fresh
    sizes, least = [STEEPEST], float(fresh.median())
    while sizes[-1] / 2 >= least:
        sizes.append(sizes[-1] / 2)
    found = zip(sizes, explained(bed, w[:TRIED], sizes), strict=True)
    size, most = next(found)
    for smaller, value in found:
        if (MORE if size == STEEPEST else 1.0) * value < most:
            break
        size, most = smaller, value
    return size * w


def explained(bed: Seedbed, w: Tensor, sizes: Sequence[float]) -> Iterator[float]:
    """What neurons of incoming weights (n, d) times each of the sizes explain together, with the ridge of the solve."""
    for size in sizes:
        found = bed.measure(size * w)
        found = replace(found, left=found.left + RIDGE * found.norm.diag())
        yield float(select(found, len(w))[1].sum())


def best(bed: Seedbed, w: Tensor, count: int) -> Tensor:
    """Those candidates (count, d) that explain most by themselves; those much larger than existing ones come last.

    The rate of training suits the features that there are: with much larger ones SGD can diverge.
    """
    found = bed.measure(w, pairs=False)
    order = found.scores.argsort(descending=True, stable=True)
    large = (found.norm > LARGEST**2 * bed.largest) & (bed.largest > 0)
    return w[order[large[order].byte().argsort(stable=True)][:count]]


def ascend(bed: Seedbed, w: Tensor) -> Tensor:
    """Incoming weights after stochastic gradient ascent on log ‖g‖²/(‖φ⊥‖² + ridge) or ‖g‖²/‖φ‖², (k', d)."""
    size = w.norm(dim=1, keepdim=True) / w.shape[1] ** 0.5
    place = torch.nn.Parameter(w / torch.where(size > 0, size, 1))
    optimizer = torch.optim.Adam([place], lr=RATE)
    for step in range(ASCENT):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / ASCENT)
        place.grad = -(bed.at(step).slope(place.detach() * size) * size).nan_to_num(0, 0, 0)
        optimizer.step()
    return place.detach() * size


def select(measured: Measured, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the neurons that together explain most, one after the other, and what each adds, both (n,).

    A pivoted Cholesky factorisation of φ⊥ᵀφ⊥ that carries g along; neurons of which the ones before leave less than
    ``THRESHOLD`` are not chosen.
    """
    gain, left = measured.gain.clone(), measured.left.clone()
    chosen, explained = [], []
    open_, least = torch.ones(len(gain), dtype=torch.bool, device=gain.device), THRESHOLD * measured.norm
    for _ in range(min(count, len(gain))):
        rest = left.diagonal()
        open_ &= rest > least
        scores = torch.where(open_, gain.square().sum(1) / rest, 0)
        i = int(scores.argmax())
        if not scores[i] > 0:
            break
        chosen.append(i)
        explained.append(scores[i])
        column = left[:, i] / left[i, i]
        gain, left = gain - torch.outer(column, gain[i]), left - torch.outer(column, left[i])
        open_[i] = False
    index = torch.tensor(chosen, dtype=torch.long, device=gain.device)
    return index, torch.stack(explained) if explained else gain.new_zeros(0)
