"""Lightning on two processes, each with half of every batch, against one process with all of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from runs import QUIET, SOON, Diary, in_clean_process, module_of, trainer_of
from torch import multiprocessing
from torch.multiprocessing import ProcessRaisedException

from splitwatch import SplitWatch, SplitWatchError, load_grown, make_growable

pytestmark = pytest.mark.filterwarnings(*QUIET)
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    diary = Diary(folder)
    trainer_of([diary.in_package(), diary.watch]).fit(module_of())
    return torch.load(folder / "0")


def assert_same_run(folder, alone, losses=True):
    """Both ranks grew as one process does, to the same parameters, to the bit."""
    ranks = [torch.load(folder / str(rank)) for rank in range(2)]
    for kept in ranks:
        assert kept["grown"] == alone["grown"]
        assert len(kept["grown"]) == 2
        if losses:
            assert kept["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name in ("after", "end"):
        first, second = (kept[name] for kept in ranks)
        assert len(first) == len(second) > 0
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return ranks[0]


def forked(folder, module=None, steps=40, diary=None, **settings):
    """A run on two forked processes; the module comes back as it ended."""
    module, diary = module or module_of(), diary or Diary(folder)
    make_growable(module)
    strategy = DDPStrategy(start_method="fork", **settings.pop("ddp", {}))
    trainer = trainer_of([diary.in_package(), diary.watch], strategy=strategy, devices=2, steps=steps, **settings)
    trainer.fit(module)
    return module


@pytest.mark.parametrize(
    "ddp",
    [
        {},
        pytest.param({"find_unused_parameters": True}, marks=pytest.mark.slow),
        pytest.param({"static_graph": True}, marks=pytest.mark.slow),
        pytest.param({"gradient_as_bucket_view": True}, marks=pytest.mark.slow),
    ],
    ids=lambda ddp: next(iter(ddp), "plain"),
)
@in_clean_process
def test_two_processes_equal_one_on_the_union_of_their_batches(ddp, alone, tmp_path):
    module = forked(tmp_path, ddp=ddp)
    kept = assert_same_run(tmp_path, alone)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), kept["end"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_the_strategies_by_name(strategy, alone, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    script = [sys.executable, str(TESTS / "ddp_run.py"), strategy, str(tmp_path)]
    subprocess.run(script, check=True, env=environment, timeout=300)
    kept = assert_same_run(tmp_path, alone)
    back = torch.load(tmp_path / "main")
    assert all(torch.equal(p, q) for p, q in zip(back, kept["end"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
@in_clean_process
def test_manual_optimization_on_two_processes(static, alone, tmp_path):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        return loss

    module = module_of(training_step=training_step)
    module.automatic_optimization = False
    diary = Diary(tmp_path)
    diary.watch.loss_fn = lambda module, batch: F.mse_loss(module.net(batch[0]), batch[1])
    forked(tmp_path, module, diary=diary, ddp={"static_graph": static})
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
@in_clean_process
def test_accumulated_gradients_on_two_processes(tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    diary = Diary(folder)
    trainer_of([diary.in_package(), diary.watch], steps=30, accumulate_grad_batches=2).fit(module_of())
    forked(tmp_path, steps=30, accumulate_grad_batches=2)
    assert_same_run(tmp_path, torch.load(folder / "0"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["norm", "compiled"])
@in_clean_process
def test_ranks_stay_the_same_with_norms_and_compiled_code(kind, tmp_path):
    module = module_of()
    if kind == "norm":
        module.net.insert(1, torch.nn.BatchNorm1d(2).double())
    else:
        module.net = torch.compile(module.net, backend="eager")
    forked(tmp_path, module)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first["grown"] == second["grown"]
    assert len(first["grown"]) == 2
    for name in ("after", "end"):
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))


def shard(self):
    from torch.distributed.fsdp import fully_shard

    for module in (self.net[0], self.net):
        fully_shard(module, mesh=self.device_mesh["data_parallel"])


def on_rank(rank, folder, port, settings):
    """A run under ModelParallelStrategy, as torchrun would start it."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none"} | {k: str(v) for k, v in given.items()}
    module, diary = module_of(configure_model=shard), Diary(folder)
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    trainer = trainer_of([diary.in_package(), diary.watch], strategy=strategy, devices=2, **settings)
    trainer.fit(module)
    trainer.save_checkpoint(folder / "last.ckpt")


@pytest.mark.slow
@in_clean_process
def test_two_processes_with_a_sharded_module_equal_one(alone, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    multiprocessing.start_processes(on_rank, (tmp_path, port, {}), nprocs=2, start_method="fork")
    kept = assert_same_run(tmp_path, alone)
    back = load_grown(module_of, tmp_path / "last.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), kept["end"], strict=True))


@in_clean_process
def test_forked_processes_need_a_model_that_can_come_back_and_say_so(tmp_path):
    trainer = trainer_of([SplitWatch(SOON)], steps=1, strategy="ddp_fork", devices=1)
    with pytest.raises(ProcessRaisedException, match="make_growable"):
        trainer.fit(module_of())


def strategy_named(name, bases=(pl.strategies.SingleDeviceStrategy,)):
    return type(name, bases, {})(device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_strategies_that_shard_parameters_are_refused_by_name(name):
    trainer = trainer_of([SplitWatch(SOON)], steps=1, strategy=strategy_named(name))
    with pytest.raises(SplitWatchError, match=rf"strategy: required .* found {name}.*ddp"):
        trainer.fit(module_of())


def test_a_strategy_of_ones_own_is_refused_on_several_processes(monkeypatch):
    own = strategy_named("OwnStrategy")
    trainer = trainer_of([SplitWatch(SOON)], steps=1, strategy=own)
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(SplitWatchError, match="OwnStrategy"):
        trainer.fit(module_of())


@in_clean_process
def test_processes_that_average_their_models_now_and_then_are_refused(tmp_path):
    module = module_of()
    make_growable(module)
    strategy = DDPStrategy(start_method="fork", model_averaging_period=3)
    with pytest.raises(ProcessRaisedException, match="SplitWatchError: model_averaging_period"):
        trainer_of([SplitWatch(SOON)], steps=1, strategy=strategy, devices=1).fit(module)


def test_a_sharded_optimizer_is_refused():
    sharded = type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {})
    module = module_of(configure_optimizers=lambda self: sharded(self.parameters(), lr=0.1))
    with pytest.raises(SplitWatchError, match=r"optimizer: required .* ZeroRedundancyOptimizer"):
        trainer_of([SplitWatch(SOON)], steps=1).fit(module)
