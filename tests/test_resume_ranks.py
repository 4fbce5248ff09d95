"""Two processes that are killed and resumed end as two that never were, to the bit."""

import os
import signal
import socket
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from runs import Dealt, in_clean_process, module_of, trainer_of, wave
from test_resume import FORK, POLICY, assert_same, die, told
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from splitwatch import Grower, SplitWatch, make_growable

RANKS, STEPS = 2, 66
SLOWER = replace(POLICY, window=20)
EVERY = 3  # steps; a block of losses, two steps, is half full every other time
DEATHS = ((0, 2), (1, 17), (0, 20), (1, 41), (0, 58))
"""Who dies at which step: before anything was saved, with a probe in the making, after a growth."""


def rows_of(step, rank):
    return torch.randint(512, (64,), generator=torch.Generator().manual_seed(step))[rank::RANKS]


def saved(folder):
    """The last step of which every rank has its file."""
    steps = [{int(path.stem) for path in Path(folder).glob(f"*.{rank}")} for rank in range(RANKS)]
    return max(set.intersection(*steps), default=None)


def plain(rank, folder, store, death):
    """A loop around DistributedDataParallel with a checkpoint every few steps, one file a rank."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    make_growable(net)
    step, state = saved(folder), {}
    if step is not None:
        state = torch.load(f"{folder}/{step}.{rank}", weights_only=True)
        net.load_state_dict(state["net"])
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    grower = Grower(model, optimizer, lambda m, b: F.mse_loss(m(b[0]), b[1]), SLOWER, progress=False)
    parts = {"net": net, "optimizer": optimizer, "grower": grower}
    for name in ("optimizer", "grower") if state else ():
        parts[name].load_state_dict(state[name])
    x, y = wave()
    for step in range(grower.steps, STEPS):
        grower.act()  # what was decided before the checkpoint
        if death == (rank, step):
            die()
        rows = rows_of(step, rank)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        grower.observe((x[rows], y[rows]), loss)
        if grower.steps % EVERY == 0:
            torch.save({name: part.state_dict() for name, part in parts.items()}, f"{folder}/part{rank}")
            os.replace(f"{folder}/part{rank}", f"{folder}/{grower.steps}.{rank}")
    return net, optimizer, grower


class Death(Callback):
    def __init__(self, death):
        self.death = death

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.death == (trainer.global_rank, trainer.global_step):
            die()


def lightning(rank, folder, store, death):
    """The same through Lightning, which saves one file for all."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.name, RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS), TORCHELASTIC_RUN_ID="none", GROUP_RANK="0")
    watch, path = SplitWatch(SLOWER), f"{folder}/last.ckpt"
    keep = ModelCheckpoint(folder, "last", every_n_train_steps=EVERY, enable_version_counter=False)
    module = module_of()
    trainer = trainer_of(
        [Death(death), watch, keep], steps=STEPS, devices=RANKS, strategy=DDPStrategy(), enable_checkpointing=True
    )
    trainer.fit(module, Dealt(), ckpt_path=path if os.path.exists(path) else None, weights_only=True)
    return module.net, trainer.optimizers[0], watch.grower


RUNS = {"plain": plain, "lightning": lightning}


def child(name, rank, folder, store, death):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    net, optimizer, grower = RUNS[name](rank, folder, store, death)
    result = {"net": dict(net.named_parameters()), "optimizer": optimizer.state_dict(), "events": told(grower.events)}
    torch.save(result, f"{folder}/result{rank}")
    os._exit(0)


def attempt(name, folder, store, death=None):
    """Whether both ranks came to their end; where one dies the other one is killed."""
    ranks = [FORK.Process(target=child, args=(name, rank, folder, store, death)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    if death is not None:
        ranks[death[0]].join()
        assert ranks[death[0]].exitcode == -signal.SIGKILL
        ranks[1 - death[0]].kill()
    for process in ranks:
        process.join()
    return all(process.exitcode == 0 for process in ranks)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@in_clean_process
def test_two_processes_that_are_killed_end_as_two_that_never_were(name, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    assert attempt(name, straight, tmp_path / free_port())
    for death in DEATHS:
        assert not attempt(name, killed, tmp_path / free_port(), death)
    assert attempt(name, killed, tmp_path / free_port())
    for rank in range(RANKS):
        wanted = torch.load(straight / f"result{rank}")
        assert sum(event["grown"] for event in wanted["events"]) == 3
        assert_same(torch.load(killed / f"result{rank}"), wanted)
    first, second = (torch.load(straight / f"result{rank}")["net"] for rank in range(RANKS))
    assert_same(first, second)
