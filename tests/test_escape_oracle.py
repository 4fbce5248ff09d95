"""The brute-force check of escape neurons, at reduced size."""

import importlib.util
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("escape_oracle", BENCHMARKS / "escape_oracle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "escape_oracle", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_verdicts_agree_with_linear_programs_and_sampling(oracle, capsys):
    assert oracle.main(["--points", "60", "--seed", "1"]) == 0
    assert "0 disagreements" in capsys.readouterr().out
