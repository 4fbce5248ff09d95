"""What splits of a measured neuron are: sampling error in, plateau verdicts out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from splitwatch.geometry.dense import layer_curvature
from splitwatch.geometry.plateau import Narrow, classify_split
from splitwatch.geometry.weights import neuron_weights
from splitwatch.precision import in_full_precision
from splitwatch.probe import Probe
from splitwatch.records import HiddenLayer, PlateauVerdict

DENSE_LIMIT = 128
"""Incoming or outgoing weights of a neuron up to which its matrices are formed, one product a column."""


@in_full_precision
def diagnose_splits(
    model: nn.Module,
    probe: Probe,
    layer: HiddenLayer,
    neuron: int,
    coefficients: Iterable[Sequence[float]],
    narrow: Narrow = "undecided",
) -> tuple[PlateauVerdict, ...]:
    """Classify splits of one neuron into several sets of coefficients from its dense inner Hessian and coupling.

    Both are measured on each half of the probe: their mean is used, and half the norm of their difference, which
    estimates the mean's sampling error, is the tolerance below which eigenvalues and singular values count as zero.

    Args:
        model: the network, left as it was.
        probe: where to measure.
        layer: the hidden layer.
        neuron: which of its neurons.
        coefficients: sets of splitting coefficients.
        narrow: what the narrow point is known to be.
    """
    incoming, outgoing = neuron_weights(model, layer)
    if max(incoming.shape[1], outgoing.shape[1]) > DENSE_LIMIT:
        reason = f"the neuron has more than {DENSE_LIMIT} weights on a side, too many for dense matrices"
        return tuple(PlateauVerdict("inconclusive", reason, (0, 0, 0), tuple(lam)) for lam in coefficients)
    halves = [layer_curvature(model, layer, probe, half, [neuron]) for half in ("fitted", "held_out")]
    S, S_error = _mean_and_error([half.dense(half.hessian)[0] for half in halves])
    whole = [half.dense(half.coupling)[0] for half in halves]
    G, G_error = _mean_and_error([_project(coupling, outgoing[neuron]) for coupling in whole])
    scale = max(
        float(torch.linalg.matrix_norm(coupling, 2)) for coupling in whole
    )  # also where nothing but v̂ᵀG is left
    values, right = torch.linalg.svd(G)[1:]
    rank = int((values > max(G_error, scale * _rounding(G))).sum())
    kernel = right[rank:]
    eigenvalues = torch.linalg.eigvalsh(kernel @ S @ kernel.T)
    tolerance = max(S_error, float(eigenvalues.abs().amax()) * _rounding(S)) if len(eigenvalues) else None
    return tuple(
        classify_split(
            eigenvalues, lam, coupling_rank=rank, outputs=outgoing.shape[1], narrow=narrow, tolerance=tolerance
        )
        for lam in coefficients
    )


def _project(G: Tensor, v: Tensor) -> Tensor:
    """G off v, where only the distance from stationarity lives."""
    square = v @ v
    return G - torch.outer(v, v @ G) / square if bool(square > 0) else G


def _mean_and_error(halves: Sequence[Tensor]) -> tuple[Tensor, float]:
    first, second = (half.detach().double().cpu() for half in halves)
    return (first + second) / 2, float(torch.linalg.matrix_norm(first - second, 2)) / 2


def _rounding(matrix: Tensor) -> float:
    return max(matrix.shape) * torch.finfo(torch.float32).eps
