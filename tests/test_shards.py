"""Networks that fully_shard deals out to two processes: measured whole, grown, dealt out again."""

import gc
from functools import partial

import pytest
import torch
from runs import SOON, in_clean_process
from test_replicas import alone, mse, network, train
from torch import distributed, multiprocessing, nn

from splitwatch import Grower, GrowthPlan, GrowthPolicy, SplitWatchError, grow, load_grown, make_growable
from splitwatch.growth.shards import whole

OTHERS = {"kept after forward": {"reshard_after_forward": False}, "with copies": {"names": ("copies", "shards")}}


def sharded(model, names=("shards",), **settings):
    """The model by rows on two processes; with two names every process has all rows, as a copy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 1)[: len(names)], mesh_dim_names=names)
    for module in (model[0], model):
        fully_shard(module, mesh=mesh, **settings)
    return model


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=3e-2)


def on_rank(rank, folder, run):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(run(rank, folder), f"{folder}/{rank}")
    gc.collect()  # no model outlives the group
    distributed.destroy_process_group()


def on_two(run, folder):
    """What a run returns on each of two processes."""
    multiprocessing.start_processes(on_rank, (str(folder), run), nprocs=2, start_method="fork")
    return [torch.load(folder / str(rank)) for rank in range(2)]


def full_state(model):
    state = model.state_dict()  # with what it says of growth
    for name, shard in state.items():
        state[name] = shard.full_tensor()
    return state


def assert_owned(optimizer, model):
    """The optimizer owns the live parameters in their order, and state that is dealt out as they are."""
    live = list(model.parameters())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in live]
    assert {id(p) for p in optimizer.state} == {id(p) for p in live}
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].placements == parameter.placements
            assert state[name].to_local().shape == parameter.to_local().shape


def grown(settings, rank, folder):
    model = sharded(network(), **settings)
    optimizer = adam(model)
    groups, modules = optimizer.param_groups, list(model.modules())
    grower = Grower(model, optimizer, mse, SOON, progress=False)
    losses = train(model, optimizer, grower, 2, rank)
    assert optimizer.param_groups is groups
    assert list(model.modules()) == modules
    assert_owned(optimizer, model)
    return losses, [event.step for event in grower.events if event.grown], full_state(model)


@pytest.mark.parametrize("name", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@in_clean_process
def test_two_processes_with_shards_equal_one_without(name, tmp_path):
    (losses, steps, state), (others, also, theirs) = on_two(partial(grown, OTHERS.get(name, {})), tmp_path)
    assert losses == others == pytest.approx(alone(), rel=1e-5)
    assert steps == also == [10, 20]
    assert all(torch.equal(state[name], theirs[name]) for name in state)
    torch.save(state, tmp_path / "weights")
    plain = load_grown(network, tmp_path / "weights")
    assert plain[0].weight.shape == (6, 2)
    assert all(torch.equal(p, state[name]) for name, p in plain.named_parameters())


class Silent:
    """A grower that does nothing."""

    def step(self, batch, loss):
        """Take no note of it."""


def everything(model, optimizer):
    """All objects that a measurement could exchange, by identity and in their order."""
    hooks = [list(h) for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
    kept = [*model.parameters(), *optimizer.param_groups[0]["params"], *optimizer.state]
    kept += [value for state in optimizer.state.values() for value in (state, *state.values())]
    return hooks, kept


def assert_same(before, after):
    assert before[0] == after[0]
    assert len(before[1]) == len(after[1])
    assert all(a is b for a, b in zip(before[1], after[1], strict=True))


def watched(rank, folder):
    """Losses with and without monitoring; objects before and after measurements, one of which fails."""
    model, bare = sharded(network()), sharded(network())
    optimizer, other = adam(model), adam(bare)
    grower = Grower(model, optimizer, mse, SOON, monitor_only=True, progress=False)
    losses = train(model, optimizer, grower, 2, rank), train(bare, other, Silent(), 2, rank)
    assert [event.step for event in grower.events] == [10, 20, 30]
    assert list(grower.events[-1].geometry) == ["0"]
    before = everything(model, optimizer)
    with pytest.raises(ZeroDivisionError), whole(model, [optimizer]):
        assert [type(p) for p in optimizer.param_groups[0]["params"]] == [nn.Parameter] * 4
        assert model[0].weight.grad.shape == (2, 2)
        raise ZeroDivisionError
    assert_same(before, everything(model, optimizer))
    train(model, optimizer, Silent(), 2, rank)
    return losses


@pytest.mark.slow
@in_clean_process
def test_what_is_only_watched_keeps_its_shards(tmp_path):
    for losses, bare in on_two(watched, tmp_path):
        assert losses == bare


def refused(rank, folder):
    """The words that something is refused with, by the reason."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.tensor import Shard, distribute_module

    def words(model, policy=SOON, **settings):
        with pytest.raises(SplitWatchError) as caught:
            Grower(model, adam(model), mse, policy, **settings)
        return str(caught.value)

    mesh, lonely = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    even, norm = nn.Sequential(nn.Linear(2, 2, bias=False)), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    pair = network()
    fully_shard([pair[0], pair[2]], mesh=mesh)
    with torch.no_grad():
        sharded(norm)(torch.zeros(2, 2))  # which leaves the outermost parameters whole
    Grower(norm, adam(norm), mse, monitor_only=True)
    narrow, wide = sharded(network()), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    make_growable(narrow).layers = {"0": {"producers": ["0"], "riders": [], "consumers": [["2", 0, 1]], "widths": [2]}}
    found = {
        "placed as": words(fully_shard(even, mesh=mesh, shard_placement_fn=lambda _: Shard(1))),
        "sharded by something else": words(distribute_module(network(), mesh)),
        "CPUOffloadPolicy": words(sharded(network(), offload_policy=CPUOffloadPolicy(pin_memory=False))),
        "one group of several modules": words(pair),
        "on 1 of 2 processes": words(fully_shard(network(), mesh=lonely)),
        "found 1, whose statistics": words(norm),
        "control": words(sharded(network()), GrowthPolicy(control=5)),
    }
    for reason, act in {
        "let Grower": lambda: grow(narrow, GrowthPlan((), (), "")),
        "load_grown before fully_shard": lambda: narrow.load_state_dict(wide.state_dict()),
    }.items():
        with pytest.raises(SplitWatchError) as caught:
            act()
        found[reason] = str(caught.value)
    return found


@in_clean_process
def test_what_could_not_be_dealt_out_again_is_refused(tmp_path):
    for found in on_two(refused, tmp_path):
        assert [reason for reason, words in found.items() if reason not in words] == []
