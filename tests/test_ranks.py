"""Two real processes, each with half of the batches, against one process with all of them."""

import pytest
import torch
from test_metrics import EXACT, every_metric
from torch import distributed, multiprocessing, nn

from splitwatch import Grower, GrowthPolicy, Probe, StationarityDetector, budget


def regression(half=slice(None)):
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.randn(800, 3, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + torch.randn(800, 1, dtype=torch.float64)
    batches = list(zip(x.split(50), y.split(50), strict=True))[half]
    return model, Probe(batches, lambda m, b: (m(b[0]) - b[1]).square().mean())


def verdict(half=slice(None), losses=()):
    """A verdict on some of the batches after some losses, and the block means."""
    model, probe = regression(half)
    detector = StationarityDetector(10)
    for loss in losses:
        detector.update(loss)
    found = detector.test(model, probe, 32)
    return found.kind, found.gradient_norm, found.gradient_bound, found.noise, found.loss, tuple(detector.means)


def schedule(rank):
    """Steps at which a monitor measures; the clock of rank 0 runs on with its training, that of rank 1 stands still."""
    clock = [0.0]
    budget.perf_counter = lambda: clock[0]
    model, probe = regression()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    policy = GrowthPolicy(window=10, max_overhead=0.01)
    grower = Grower(model, optimizer, probe.loss_fn, policy, monitor_only=True, probe=probe, progress=False)
    grower.budget.costs = {budget.TEST: 5.0}
    for _ in range(1000):
        clock[0] += rank == 0
        grower.step(probe.fitted[0], 1.0 + rank)
        if grower.budget.spent:
            break
    return grower.steps, len(grower.events)


def rank_main(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(rank, None, 2)
    metrics = every_metric(half)
    found = {name: metric.compute() for name, metric in metrics.items()}
    kept = len(metrics["noise"].sums)  # the rank's own again
    verdicts = verdict(half), verdict(half, losses=[1.0 + 2 * rank] * 10)
    torch.save({"found": found, "kept": kept, "verdicts": verdicts, "schedule": schedule(rank)}, f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(rank_main, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


def test_every_rank_computes_what_one_process_does_from_all_batches(ranks):
    wanted = {name: metric.compute() for name, metric in every_metric().items()}
    for rank in ranks:
        torch.testing.assert_close(rank["found"], wanted, **EXACT)
        assert rank["kept"] == 4


def test_every_rank_has_the_verdict_on_all_batches(ranks):
    alone = verdict()
    for rank in ranks:
        reduced, later = rank["verdicts"]
        assert reduced[0] == alone[0]
        assert reduced[1:5] == pytest.approx(alone[1:5], rel=1e-12)
        assert later[4:] == (2.0, (2.0,) * 10)  # of the losses 1 on one rank and 3 on the other
    assert ranks[0]["verdicts"] == ranks[1]["verdicts"]


def test_the_clock_of_rank_0_decides_for_all(ranks):
    assert ranks[0]["schedule"] == ranks[1]["schedule"]
    steps, events = ranks[0]["schedule"]
    assert events >= 1
    assert steps >= 500
