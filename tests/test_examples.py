"""The examples run, at reduced size, and do what their first lines say."""

import importlib.util
import pathlib
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning", "ignore:.*treespec.*")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_plain_loop(tmp_path):
    grower, loss = load("plain_loop").main(1200, str(tmp_path))
    assert any(event.grown for event in grower.events)
    assert loss < 0.05
    assert list(tmp_path.glob("events*"))


def test_fabric_loop():
    grower, loss = load("fabric_loop").main(1200)
    assert any(event.grown for event in grower.events)
    assert loss < 0.05


@pytest.mark.slow
def test_convnet(tmp_path):
    grower, _ = load("convnet").main(1200, str(tmp_path))
    assert any(event.grown for event in grower.events)


@pytest.mark.slow
def test_transformer_mlp(tmp_path):
    grower, loss = load("transformer_mlp").main(700, str(tmp_path))
    assert grower.steps == 700
    assert loss < 3.0


@pytest.mark.slow
def test_lightning_digits(tmp_path):
    watch, trainer = load("lightning_digits").main(2600, str(tmp_path))
    assert any(event.grown for event in watch.events)
    assert trainer.global_step == 2600
