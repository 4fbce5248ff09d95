"""Lightning's two packages hold different classes of the same names; SplitWatch is at home in both."""

import importlib

import pytest
import torch
from runs import PACKAGES, QUIET, SOON, loader, module_of, trainer_of

from splitwatch import SplitWatch

pytestmark = pytest.mark.filterwarnings(*QUIET)


def run(package, **settings):
    watch, module = SplitWatch(SOON), module_of(package)
    trainer = trainer_of([watch], package, **settings)
    trainer.fit(module, loader())
    return watch, module, trainer


@pytest.fixture(scope="module")
def runs():
    return {package: run(package) for package in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_it_is_a_callback_of_either_package(package):
    assert isinstance(SplitWatch(), importlib.import_module(package).Callback)


@pytest.mark.parametrize("package", PACKAGES)
def test_it_grows_in_either_package(runs, package):
    watch, module, _ = runs[package]
    assert [event.grown for event in watch.events] == [True, True]
    assert module.net[0].out_features > 2


def test_the_packages_give_the_same_numbers(runs):
    (first, a, _), (second, b, _) = runs.values()
    assert [event.step for event in first.events] == [event.step for event in second.events]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_checkpoint_of_either_package_resumes_in_the_same(runs, package, tmp_path):
    _, module, trainer = runs[package]
    trainer.save_checkpoint(tmp_path / "grown.ckpt")
    narrow = module_of(package)
    trainer_of([SplitWatch(SOON)], package, steps=45).fit(narrow, loader(), ckpt_path=tmp_path / "grown.ckpt")
    assert narrow.net[0].out_features == module.net[0].out_features


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_of_a_trainer_is_found_below_a_class_of_ones_own(package):
    from splitwatch.lightning.packages import package_of

    pl = importlib.import_module(package)
    own = type("Own", (pl.Trainer,), {"__module__": "somewhere"})
    assert package_of(own.__new__(own)) is pl
