"""What the curvature benchmark times: products and spectra of hidden layers on one batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from curvature_nets import Case

from splitwatch import Probe, find_hidden_layers
from splitwatch.geometry.curvature import LayerCurvature
from splitwatch.geometry.eigen import ExtremeEigenpairs, extreme_eigenpairs
from splitwatch.geometry.measure import Across, EscapeOperator, InnerHessian, escape_weights
from splitwatch.geometry.sweep import MAX_BYTES, Sweep
from splitwatch.records import HiddenLayer

TOLERANCE = 1e-3


class Layers:
    """The hidden layers of a network, measured on its one batch."""

    def __init__(self, case: Case, names: Sequence[str] | None = None) -> None:
        self.case, self.probe = case, probe(case)
        found = find_hidden_layers(case.model, few(case))
        self.layers = [layer for layer in found if (layer.growable if names is None else layer.name in names)]

    def prepared(self, max_bytes: int = MAX_BYTES) -> list[LayerCurvature]:
        """Every layer captured, its derivatives taken: what a product needs."""
        return list(Sweep(self.case.model, self.probe, self.layers, "fitted", max_bytes).curvatures())

    def spectra(self, max_bytes: int = MAX_BYTES) -> list[ExtremeEigenpairs]:
        """Both ends of every layer, capturing and preparing included."""
        sweep = Sweep(self.case.model, self.probe, self.layers, "fitted", max_bytes)
        return [both_ends(curvature, max_bytes // 2) for curvature in sweep.curvatures()]


def probe(case: Case) -> Probe:
    """A probe whose fitted half is the batch."""
    return Probe([case.batch] * 2, case.loss_fn)


def few(case: Case, samples: int = 2) -> Probe:
    """A probe of a few samples, which is all that finding layers takes."""
    batch = case.batch[0][:samples], case.batch[1][:samples]
    return Probe([batch] * 2, case.loss_fn)


def layer_of(case: Case, name: str) -> HiddenLayer:
    (layer,) = islice(Layers(case, [name]).layers, 1)
    return layer


def both_ends(curvature: LayerCurvature, max_bytes: int | None = None) -> ExtremeEigenpairs:
    """Both extreme eigenpairs of every neuron's S."""
    return _solve(InnerHessian(curvature), curvature, curvature.mean_input(), max_bytes)


def escape_ends(curvature: LayerCurvature, lowest: torch.Tensor) -> ExtremeEigenpairs:
    """Both extreme eigenpairs of every neuron's escape operator, S's lowest eigenvectors (m, d) being known."""
    operator = EscapeOperator(curvature, Across.of(curvature), *escape_weights())
    return _solve(operator, curvature, operator.start(lowest), None)


def _solve(
    operator: InnerHessian | EscapeOperator, curvature: LayerCurvature, start: torch.Tensor, max_bytes: int | None
) -> ExtremeEigenpairs:
    like = curvature.outgoing
    space = {"dtype": like.dtype, "device": like.device}
    return extreme_eigenpairs(
        operator, len(like), start.shape[-1], **space, tolerance=TOLERANCE, max_bytes=max_bytes, start=start
    )
