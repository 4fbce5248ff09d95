"""The benchmark that is meant for a GPU runs on a CPU too, at reduced size."""

import importlib.util
import pathlib
import sys

import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_gpu", BENCHMARKS / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_gpu", module)
    spec.loader.exec_module(module)
    return module


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
