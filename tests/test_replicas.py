"""Plain loops on several processes: what the user wrapped stays wrapped, and follows the growth."""

import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from runs import SOON, in_clean_process, wave
from torch import distributed, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from splitwatch import Grower, SplitWatchError

SETTINGS = [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}]


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        for weight in (model[0].weight, model[2].weight):
            weight.mul_(2)
    return model


def train(model, optimizer, grower, ranks=1, rank=0, backward=torch.Tensor.backward):
    """Losses on all ranks' samples; each rank has its share of every batch."""
    losses, (x, y) = [], wave()
    for step in range(30):
        rows = slice(step % 8 * 64 + rank, step % 8 * 64 + 64, ranks)
        batch = x[rows], y[rows]
        optimizer.zero_grad()
        loss = mse(model, batch)
        backward(loss)
        optimizer.step()
        mean = loss.detach().clone()
        if ranks > 1:
            distributed.all_reduce(mean)
        losses.append(float(mean) / ranks)
        grower.step(batch, loss)
    return losses


def on_rank(rank, folder, settings):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([trained(rank, chosen) for chosen in settings], f"{folder}/{rank}")
    # A reducer that outlives the group is the last to hold its threads: it waits for them with the interpreter locked,
    # and one that has still to let a tensor go waits for the lock. The group by itself waits with the lock released.
    gc.collect()
    distributed.destroy_process_group()


def trained(rank, chosen):
    """Losses, steps of growth and parameters of a run on one of two ranks, under settings of the wrapper."""
    model = DistributedDataParallel(network(), **chosen)
    if not chosen:
        model.register_comm_hook(None, default_hooks.allreduce_hook)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    grower = Grower(model, optimizer, mse, SOON, progress=False)
    losses = train(model, optimizer, grower, 2, rank)
    assert not chosen or getattr(model, next(iter(chosen)))
    return losses, [e.step for e in grower.events if e.grown], [p.detach() for p in model.parameters()]


def alone():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    return train(model, optimizer, Grower(model, optimizer, mse, SOON, progress=False))


@pytest.mark.slow
@in_clean_process
def test_a_wrapped_model_follows_its_growth_with_all_of_its_settings(tmp_path):
    multiprocessing.start_processes(on_rank, (str(tmp_path), SETTINGS), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    wanted = alone()
    for (losses, steps, parameters), (others, also, theirs) in zip(first, second, strict=True):
        assert losses == others == pytest.approx(wanted, rel=1e-5)
        assert steps == also == [10, 20]
        assert all(torch.equal(a, b) for a, b in zip(parameters, theirs, strict=True))


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_what_cannot_be_made_anew_is_refused_when_the_grower_is_made(group):
    model = DistributedDataParallel(network())
    model.register_comm_hook([1], default_hooks.allreduce_hook)
    with pytest.raises(SplitWatchError, match=r"model: required .*hook with state"):
        Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), mse)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*treespec.*")
def test_what_fabric_set_up_grows_as_without_it():
    fabric = Fabric(accelerator="cpu", devices=1)
    bare = network()
    model, optimizer = fabric.setup(bare, torch.optim.Adam(bare.parameters(), lr=3e-2))
    grower = Grower(model, optimizer, mse, replace(SOON), progress=False)
    assert train(model, optimizer, grower, backward=fabric.backward) == alone()
    assert grower.model is bare
    assert grower.growths == 2
