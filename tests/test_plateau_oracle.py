"""A short run of the plateau oracle: verdicts against dense Hessians of whole wide networks."""

import importlib.util
import pathlib
import sys
from collections import Counter

import pytest

ORACLE = pathlib.Path(__file__).parent.parent / "benchmarks" / "plateau_oracle.py"


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.syspath_prepend(str(ORACLE.parent))
    spec = importlib.util.spec_from_file_location("plateau_oracle", ORACLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_no_disagreement_in_300_cases(oracle):
    cases, points = oracle.run(300, seed=0)
    assert len(cases) >= 300
    assert [case for case in cases if case.wrong] == []
    assert sum(bool(case.grey) for case in cases) <= len(cases) // 50
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
