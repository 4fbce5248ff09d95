"""The code of every how-to page runs, and does what the page says."""

import gc
import inspect
import os
import pathlib
import re
import sys

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.strategies import ModelParallelStrategy
from runs import QUIET, SOON, trainer_of, wave
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from splitwatch import (
    Grower,
    GrowthPlan,
    GrowthPolicy,
    Probe,
    Split,
    SplitWatch,
    Sprout,
    find_hidden_layers,
    grow,
    load_grown,
    make_growable,
)
from splitwatch.growth import optimizer as carrying

PAGES = pathlib.Path(__file__).parent.parent / "docs" / "how-to"

pytestmark = pytest.mark.filterwarnings(
    *QUIET,
    "ignore:.*recommend setting.*:UserWarning",
    "ignore:.*grad attribute of a Tensor.*",
    "ignore::DeprecationWarning",
    "ignore:.*ckpt_path=.last.*:UserWarning",
)


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
        self.double()


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-2)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader_of()


def loader_of():
    return DataLoader(TensorDataset(*wave(2048)), batch_size=64)


def names():
    model = Net()
    quiet = ("logger", "enable_progress_bar", "enable_model_summary")
    settings = {"accelerator": "cpu", "max_epochs": -1, **dict.fromkeys(quiet, False)}
    return {
        "os": os, "pl": pl, "EarlyStopping": EarlyStopping,
        "torch": torch, "distributed": distributed, "ModelCheckpoint": ModelCheckpoint,
        "EMAWeightAveraging": EMAWeightAveraging, "AveragedModel": AveragedModel, "Grower": Grower, "grow": grow,
        "DistributedDataParallel": DistributedDataParallel, "SplitWatch": SplitWatch, "load_grown": load_grown,
        "make_growable": make_growable, "Net": Net, "Module": Module, "loader": loader_of(), "policy": SOON,
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), "backend": "eager", "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=3e-2), "settings": settings, "nn": nn,
        "GrowthPolicy": GrowthPolicy,
    }  # fmt: skip


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / page).read_text(), flags=re.DOTALL)


def run(code, **more):
    space = names() | more
    exec(code, space)
    return space


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_resume():
    callback, loop = blocks("resume.md")
    run(callback.replace("max_steps=40", "max_steps=20"))
    space = run(callback)
    assert space["trainer"].global_step == 40
    assert space["best"].net[0].out_features > 2
    first = run(loop)["grower"]
    second = run(loop)["grower"]
    assert (first.steps, second.steps) == (32, 64)
    assert second.model[0].out_features > 2


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Where a page begins a group and says no more, it is one of one process, which ends here."""
    begin, alone = (
        distributed.init_process_group,
        {"init_method": f"file://{tmp_path}/store", "rank": 0, "world_size": 1},
    )
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **given: begin(backend, **(given or alone)))
    yield
    gc.collect()  # no reducer outlives the group
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_distribute(group):
    callback, loop = blocks("distribute.md")
    assert run(callback)["module"].net[0].out_features > 2
    assert run(loop)["model"].module[0].out_features > 2


def test_shard(group):
    callback, loop = blocks("shard.md")
    names = {"fully_shard": fully_shard, "init_device_mesh": init_device_mesh}
    assert run(loop, **names)["model"][0].out_features > 2
    names["ModelParallelStrategy"] = ModelParallelStrategy
    trainer = run(callback.replace("=2", "=1"), **names)["trainer"]
    assert trainer.lightning_module.net[0].out_features > 2


def test_compile():
    (loop,) = blocks("compile.md")
    space = run(loop)
    assert space["net"][0].out_features > 2
    assert space["grower"].growths == 2


def test_average():
    callback, loop = blocks("average.md")
    assert run(callback)["average"]._average_model.module.net[0].out_features > 2
    space = run(loop)
    assert space["average"].module[0].out_features == space["model"][0].out_features > 2


def test_callbacks():
    (code,) = blocks("callbacks.md")
    space = run(code)
    assert space["trainer"].global_step == 32  # the end of the epoch in which it grew


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_huggingface():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from test_huggingface import POLICY, classifier, sentences, width

    (code,) = blocks("huggingface.md")
    arguments = transformers.TrainingArguments(
        "out", max_steps=15, per_device_train_batch_size=32, use_cpu=True, report_to=[], save_strategy="no"
    )
    names = {"Trainer": transformers.Trainer, "model": classifier(), "data": sentences(), "policy": POLICY}
    space = run(code, arguments=arguments, **names)
    assert width(space["loaded"]) == width(space["model"]) == 4


def test_cli(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    (yaml,), (command,) = blocks("cli.md", "yaml"), blocks("cli.md", "bash")
    (tmp_path / "config.yaml").write_text(yaml)
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    quiet += ["--trainer.enable_model_summary=false", "--trainer.enable_checkpointing=false"]
    by_file = cli(["fit", "--config", "config.yaml", *quiet])
    assert by_file.policy == GrowthPolicy(["net.0"], 2, max_ratio=2.0, max_events=2, window=10, max_overhead=None)
    assert by_file.grower.steps == 30
    by_flag = cli([*command.split()[2:], "--trainer.max_steps=5", *quiet])
    assert by_flag.policy.max_neurons == 2


def test_the_command_line_explains_every_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(SystemExit):
        cli(["fit", "--trainer.callbacks.help", "splitwatch.SplitWatch"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "measure and report, never grow." in shown
    for name in inspect.signature(SplitWatch).parameters:
        assert f"--trainer.callbacks.{name} " in shown


def cli(arguments):
    program = LightningCLI(Module, Data, args=arguments, save_config_callback=None, seed_everything_default=0)
    (watch,) = [callback for callback in program.trainer.callbacks if isinstance(callback, SplitWatch)]
    return watch


def test_optimizers():
    loop, manual, own = blocks("optimizers.md")
    before = dict(carrying.STATES)
    for half in (False, True):
        space = run(loop, half=half, device="cpu")
        assert space["model"][0].out_features > 2
        live = {id(p) for p in space["model"].parameters()}
        assert {id(p) for o in space["optimizers"] for group in o.param_groups for p in group["params"]} == live
        assert {id(p) for optimizer in space["optimizers"] for p in optimizer.state} == live
        assert space["schedulers"][0].last_epoch == 16
    module = Manual()
    watch = run(manual)["watch"]
    trainer_of([watch], steps=30).fit(module, loader_of())
    assert module.net[0].out_features > 2
    run(own)
    assert carrying.STATES.pop("my_momentum") is carrying.LINEAR
    assert before == carrying.STATES


def test_extend():
    loss, detector, sink, handler = blocks("extend.md")
    space = run(loss + detector + sink + handler)
    grower, scale = space["grower"], space["Scale"]
    for batch in loader_of():
        value = space["loss_fn"](space["model"], batch)
        space["optimizer"].zero_grad()
        value.backward()
        space["optimizer"].step()
        grower.step(batch, value)
    assert grower.events[0].verdict.kind == "stationary"
    assert len(space["growths"]) == grower.growths > 0
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), scale(3), nn.Linear(3, 1))
    probe = Probe([torch.randn(8, 2), torch.randn(8, 2)], lambda m, x: m(x).square().mean())
    (layer, _) = find_hidden_layers(model, probe)
    assert layer.riders == ("2",)
    still = Sprout("0", torch.ones(3), torch.zeros(1))
    split = Split("0", 1, (2.0, -1.0), torch.zeros(2, 3), torch.zeros(2, 1), 0.0)
    event = grow(model, GrowthPlan((layer,), (split, still), "by hand"), probe=probe)
    assert event.drift <= 1e-6
    assert model[2].factor.tolist() == [1.0] * 5


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, loss = self.optimizers(), F.mse_loss(self.net(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def test_every_page_is_short_and_ends_with_when_it_fails():
    pages = sorted(page for page in PAGES.glob("*.md") if page.stem != "policies")  # longer; test_docs runs it
    assert {f"test_{page.stem}" for page in pages} <= set(vars(sys.modules[__name__]))
    for page in pages:
        assert sum(not line.startswith("|") for line in page.read_text().splitlines()) < 60  # tables aside
        assert "**When this fails.**" in page.read_text().split("\n\n")[-1]
