"""A short run of the plateau oracle: verdicts against dense Hessians of whole wide networks."""

import importlib.util
import pathlib
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from splitwatch import Probe, coupling, find_hidden_layers, inner_hessian
from splitwatch.growth.embedding import critical_embedding

ORACLE = pathlib.Path(__file__).parent.parent / "benchmarks" / "plateau_oracle.py"


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.syspath_prepend(str(ORACLE.parent))
    spec = importlib.util.spec_from_file_location("plateau_oracle", ORACLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def random_landscape(oracle, family, activation):
    points, rng = sys.modules["plateau_points"], np.random.default_rng(3)
    land = points.build(rng, family, activation, bias=activation != "sin")
    targets = torch.as_tensor(rng.normal(size=land.Y.shape))
    land.Y = targets.softmax(1) if land.classes else targets
    return land


def close(digits, numbers, scale):
    return np.abs(digits.astype(float) - numbers.numpy()).max() <= 1e-13 * max(float(scale), 1.0)


@pytest.mark.parametrize("activation", ["tanh", "GELU", "softplus", "sin"])
@pytest.mark.parametrize("family", ["multi-output", "3 classes", "deep"])
def test_many_digits_agree_with_autograd(oracle, family, activation):
    land = random_landscape(oracle, family, activation)
    net, hessian = sys.modules["plateau_digits"].Network.of(land), land.hessian(land.point)
    gradient, digits = net.derivatives()
    assert torch.equal(net.point(), land.point)
    assert close(gradient, land.gradient(land.point), 1.0)
    assert close(digits, hessian, hessian.abs().max())
    probe = Probe([(land.X, land.Y)], land.loss_fn)
    for layer in (layer for layer in find_hidden_layers(land.model, probe) if layer.growable):
        S, G = net.measured(int(layer.name) // 2, 0)
        assert close(S, inner_hessian(land.model, layer, probe)[0], 1.0)
        assert close(G, coupling(land.model, layer, probe)[0], 1.0)
        wide = critical_embedding(land.model, layer, 0, (0.5, 0.9, -0.4))
        embedded = net.embedded(int(layer.name) // 2, 0, (0.5, 0.9, -0.4)).point()
        assert torch.allclose(embedded, nn.utils.parameters_to_vector(wide.parameters()).detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("family", ["multi-output", "3 classes"])
def test_a_design_is_met_exactly(oracle, family):
    points, exact, rng = sys.modules["plateau_points"], sys.modules["plateau_exact"], np.random.default_rng(0)
    land = None
    while land is None or not land.design.column.any():
        land = points.designed(rng, family, "tanh")
    index, r = int(land.design.place[0]) // 2, land.design.place[1]
    net = exact.met(sys.modules["plateau_digits"].Network.of(land), land.design)
    assert np.abs(net.Y.astype(float) - land.Y.numpy()).max() < 1e-12
    assert max(abs(net.gradient())) < 1e-60
    S, G = net.measured(index, r)
    assert close(S, torch.as_tensor(land.design.inner), 1e-2)
    first, second, *_ = [*exact.singular(G)[0], 0.0]
    assert first > 1e-6 and second < 1e-60


@pytest.mark.parametrize("power", [2, 3])
def test_degenerate_points_are_found(oracle, power):
    """A steep valley along a parabola whose floor rises with the given power plus one of the distance."""
    exact = sys.modules["plateau_exact"]

    class Valley:
        def __init__(self, point):
            self.point = point

        def gradient(self):
            x, y = self.point
            self.side = y - x**2
            return np.array([x**power - 2 * x * self.side, self.side])

        def hessian(self):
            x, _ = self.point
            return np.array([[power * x ** (power - 1) - 2 * self.side + 4 * x**2, -2 * x], [-2 * x, 1]])

        def moved(self, step):
            return Valley(self.point + step)

    start = sys.modules["plateau_digits"].digits(np.array([10 ** (-15 / power), 1e-16]))
    assert max(abs(exact.polished(Valley(start)).point)) < 1e-44


@pytest.mark.slow
def test_no_disagreement_in_300_cases(oracle):
    cases, points = oracle.run(300, seed=0)
    assert len(cases) >= 300
    assert [case for case in cases if case.wrong] == []
    assert sum(bool(case.grey) for case in cases) < len(cases) / 100
    spectra = Counter(case.spectrum for case in cases if not case.grey)
    assert min(spectra["positive"], spectra["negative"], spectra["indefinite"]) >= 20, spectra
    assert {len(case.coefficients) for case in cases} == {2, 3, 4, 5}
    assert {"minimum", "strict_saddle", "saddle"} <= {case.kind for case in cases}
    assert points["found"] >= 10


@pytest.mark.slow
def test_a_wrong_theory_is_caught(oracle, monkeypatch):
    """Signs of the coefficients exchanged: the oracle has to object."""
    right = oracle.classify_split

    def wrong(eigenvalues, coefficients, **options):
        return right(-eigenvalues, coefficients, **options)

    monkeypatch.setattr(oracle, "classify_split", wrong)
    cases, _ = oracle.run(80, seed=0)
    assert sum(bool(case.wrong) for case in cases) > 5
