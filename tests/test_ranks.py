"""Two real processes, each with half of the batches, against one process with all of them."""

import dataclasses
from functools import cache

import pytest
import torch
from test_metrics import EXACT, every_metric
from torch import distributed, multiprocessing, nn
from torch.utils._pytree import tree_leaves

from splitwatch import (
    Grower,
    GrowthPolicy,
    Probe,
    Split,
    Sprout,
    StationarityDetector,
    budget,
    count_flops,
    find_hidden_layers,
    measure_geometry,
    plan_growth,
)
from splitwatch.geometry.caveats import caveats
from splitwatch.geometry.dense import coupling, inner_hessian
from splitwatch.geometry.diagnose import diagnose_splits
from splitwatch.geometry.narrow import narrow_verdict
from splitwatch.geometry.sweep import Sweep
from splitwatch.growth import pursuit
from splitwatch.growth.seedbed import Seedbed


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
    grower.watcher.budget.costs = {budget.TEST: 5.0}
    for _ in range(1000):
        clock[0] += rank == 0
        grower.step(probe.fitted[0], 1.0 + rank)
        if grower.watcher.budget.spent:
            break
    return grower.steps, len(grower.events)


def drawn(model):
    """With large random weights, so that there are neurons which are worth to be split."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 / parameter[0].numel() ** 0.5)
    return model.double()


def mlp():
    torch.manual_seed(1)
    return drawn(nn.Sequential(nn.Linear(25, 3), nn.Tanh(), nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3)))


def conv():
    """With running statistics of some batches; those of BatchNorm in training would differ from rank to rank."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 5, 5)), nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, (2, 1)), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    drawn(model)(torch.randn(32, 25, dtype=torch.float64))
    return model


NETWORKS = {"mlp": mlp, "conv": conv}
RAGGED = (50, 30, 20), (40, 60)
LITTLE = 15_000  # bytes


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def ragged_probe(rank):
    """Ragged batches of one of two ranks, or those of both as one process has them, each in the half it was in."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(map(sum, RAGGED)), 25, dtype=torch.float64, generator=generator)
    labels = x[:, :3].square().argmax(1)
    batches = list(zip(x.split(sum(RAGGED, ())), labels.split(sum(RAGGED, ())), strict=True))
    first, second = batches[:3], batches[3:]
    both = [first[0], first[1], first[2], second[1], second[0]]
    return Probe({0: first, 1: second, None: both}[rank], cross_entropy)


def captured_anew(name, rank=None):
    """Products with so little memory that a layer is captured anew for every one of them, and what they need."""
    model, probe = NETWORKS[name](), ragged_probe(rank)
    layers = [layer for layer in find_hidden_layers(model, probe) if layer.growable]
    sweep, products = Sweep(model, probe, layers, "fitted", LITTLE), {}
    for curvature in sweep.curvatures():
        ends = torch.randn(curvature.layer.width, curvature.d + curvature.c, generator=torch.Generator().manual_seed(0))
        u, v = ends.double().split([curvature.d, curvature.c], 1)
        products[curvature.layer.name] = {
            "hessian": curvature.hessian(u), "coupling": curvature.coupling(u), "joint": curvature.joint(u, v, 0.7, 0.3)
        }  # fmt: skip
    return {"products": products, "sizes": sweep.sizes}


def geometry_anew(name, rank=None):
    """Geometry with as little memory."""
    geometry = measure_geometry(NETWORKS[name](), ragged_probe(rank), max_bytes=LITTLE)
    return {key: dataclasses.asdict(value) for key, value in geometry.items()}


def measured(name, rank=None):
    """Everything that is measured at a stationary point, and what is planned there, as tensors and strings."""
    model, probe = NETWORKS[name](), ragged_probe(rank)
    layers = [layer for layer in find_hidden_layers(model, probe) if layer.growable]
    geometry = measure_geometry(model, probe, layers)
    plan = plan_growth(model, geometry, probe, GrowthPolicy(moves="splits"), layers=layers)
    narrow = narrow_verdict(model, probe, tested=True)
    dense = {layer.name: (inner_hessian(model, layer, probe), coupling(model, layer, probe)) for layer in layers[1:]}
    verdicts = [diagnose_splits(model, probe, layer, 1, [(0.5, 0.5), (2.0, -1.0)]) for layer in layers[1:]]
    return {
        "geometry": {key: dataclasses.asdict(value) for key, value in geometry.items()},
        "dense": dense,
        "losses": [probe.loss(model, half) for half in ("fitted", "held_out", "all")],
        "moves": [(move.layer, move.neuron, move.coefficients) for move in plan.moves],
        "offsets": [(move.in_offset, move.out_offset) for move in plan.moves],
        "plan": (plan.offset, plan.line_search, plan.fitted_decrease, plan.held_out_decrease, plan.reason),
        "narrow": (narrow.kind, narrow.reason, narrow.exhausted),
        "numbers": (narrow.min_eigenvalue, narrow.max_eigenvalue, narrow.gradient_norm),
        "noise": narrow.noise,
        "verdicts": [(verdict.kind, verdict.reason) for found in verdicts for verdict in found],
        "caveats": caveats(model, probe, layers, geometry),
    }


def pursued(name, rank=None):
    """What is measured of possible neurons, and what is planned by every policy that looks for some."""
    model, probe = NETWORKS[name](), ragged_probe(rank)
    layers = [layer for layer in find_hidden_layers(model, probe) if layer.growable]
    geometry, found = measure_geometry(model, probe), {}
    rooms = pursuit._rooms(model, layers, probe, 2**20)
    for layer, room in zip(layers, rooms, strict=True):
        bed = Seedbed(model, layer, probe, 5, 2**28)
        w = torch.randn(5, bed.d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        at = bed.measure(w)
        found[layer.name] = {**dataclasses.asdict(at), "slope": bed.slope(w)}
        found[layer.name]["room"] = room
    plans = {}
    for moves in ("mixed", "sprouts", "even", "certified", "preserve"):
        policy = GrowthPolicy(moves=moves, max_flops=1.8 * count_flops(model, probe), per="flop")
        plan = plan_growth(model, geometry, probe, policy, layers=layers)
        decreases = plan.predicted_decrease, plan.fitted_decrease, plan.held_out_decrease
        weights = [[getattr(move, name) for name in WEIGHTS[type(move)]] for move in plan.moves]
        tensors = [[leaf for leaf in tree_leaves(values) if leaf is not None] for values in weights]
        plans[moves] = [str(plan), decreases, plan.line_search, plan.step_search, tensors]
    return {"beds": found, "plans": plans, "flops": count_flops(model, probe)}


WEIGHTS = {Split: ("in_offset", "out_offset"), Sprout: ("incoming", "outgoing", "others", "biases")}


def trained(name, rank):
    """Parameters and plans of a network that grows while each of two ranks trains on batches of its own."""
    model = NETWORKS[name]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    policy = GrowthPolicy(window=10, noise_ratio=1e9, tolerance=1e9, max_events=2, max_overhead=None, probe_samples=200)
    grower = Grower(model, optimizer, cross_entropy, policy, progress=False)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(14):
        x = torch.randn(24 + 16 * rank, 25, dtype=torch.float64, generator=generator)
        batch = x, x[:, :3].square().argmax(1)
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()
        grower.step(batch, loss)
    state = [value for group in optimizer.state.values() for value in group.values()]
    events = [(e.step, e.grown, e.drift, e.realised_fitted, e.realised_held_out, e.point) for e in grower.events]
    plans = [(e.plan.reason, e.plan.line_search, [str(move) for move in e.plan.moves]) for e in grower.events]
    return {"parameters": list(model.parameters()), "state": state, "events": events, "plans": plans}


TASKS = {
    "measured": measured, "captured anew": captured_anew, "geometry anew": geometry_anew, "pursued": pursued,
    "grown": trained,
}  # fmt: skip
LATER = {("geometry anew", "conv"), ("pursued", "mlp"), ("grown", "conv")}
"""What only the slow tests ask for: the other network goes the same way in the quick ones."""


def networks(task):
    return [pytest.param(name, marks=pytest.mark.slow if (task, name) in LATER else []) for name in NETWORKS]


def rank_main(rank, folder, tasks):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(rank, None, 2)
    metrics = every_metric(half)
    found = {name: metric.compute() for name, metric in metrics.items()}
    kept = len(metrics["noise"].sums)  # the rank's own again
    verdicts = verdict(half), verdict(half, losses=[1.0 + 2 * rank] * 10)
    results = {"found": found, "kept": kept, "verdicts": verdicts, "schedule": schedule(rank)}
    results |= {f"{name} {task}": TASKS[task](name, rank) for task, name in tasks}
    torch.save(results, f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """Results of two ranks on some tasks; the processes are started once."""

    @cache
    def run(tasks):
        folder = tmp_path_factory.mktemp("ranks")
        multiprocessing.spawn(rank_main, (str(folder), tasks), nprocs=2)
        return [torch.load(folder / str(rank)) for rank in range(2)]

    return run


@pytest.fixture
def ranks(request, spawned):
    slow = request.node.get_closest_marker("slow") is not None
    tasks = ((task, name) for task in TASKS for name in NETWORKS)
    return spawned(tuple(task for task in tasks if (task in LATER) == slow))


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


@pytest.mark.parametrize("name", networks("measured"))
def test_every_rank_measures_what_one_process_does_on_the_union_of_the_halves(ranks, name):
    found, other = (rank[f"{name} measured"] for rank in ranks)
    assert_same(found, other)
    wanted = measured(name)
    assert all(wanted["geometry"])
    assert wanted["moves"]
    assert found["noise"] == pytest.approx(wanted.pop("noise"), rel=0.1)  # from the scatter of other parts
    for part, value in wanted.items():
        assert_near(found[part], value, part)


@pytest.mark.parametrize("name", networks("captured anew"))
def test_what_is_kept_in_memory_is_decided_alike(ranks, name):
    found, wanted = ranks[0][f"{name} captured anew"], captured_anew(name)
    assert_same(found, ranks[1][f"{name} captured anew"])
    assert_near(found["products"], wanted["products"], "products")
    assert max(found["sizes"].values()) > LITTLE > min(found["sizes"].values()) * 40 / 70
    shares = {key: value * 70 / 110 for key, value in wanted["sizes"].items()}  # rank 0 has most to fit on
    assert found["sizes"] == pytest.approx(shares, rel=0.05)


@pytest.mark.parametrize("name", networks("geometry anew"))
def test_geometry_is_the_same_where_layers_are_captured_anew(ranks, name):
    first, second = (rank[f"{name} geometry anew"] for rank in ranks)
    assert_same(first, second)
    assert_near(first, geometry_anew(name), "geometry")


@pytest.mark.parametrize("name", networks("grown"))
def test_replicas_grow_alike_and_stay_the_same_to_the_bit(ranks, name):
    first, second = (rank[f"{name} grown"] for rank in ranks)
    assert_same(first, second)
    assert [event[:2] for event in first["events"]] == [(10, True)]


@pytest.mark.parametrize("name", networks("pursued"))
def test_every_rank_pursues_the_same_neurons(ranks, name):
    """To the bit on each; what is measured of given neurons is that of one process on the union of the halves."""
    found, wanted = ranks[0][f"{name} pursued"], pursued(name)
    assert_same(found, ranks[1][f"{name} pursued"])
    for layer in wanted["beds"].values():
        layer.pop("room")  # for candidates: that of the rank with most in a batch
    assert_near(
        {key: {k: x for k, x in bed.items() if k != "room"} for key, bed in found["beds"].items()},
        wanted["beds"],
        "beds",
    )
    assert found["flops"] == pytest.approx(wanted["flops"], rel=1e-12)
    even = found["plans"]["even"][0]
    assert "every layer by the ratio" in even
    assert "sprout in" in even


def assert_same(first, second):
    """Equal to the bit, through any structure."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, (list, tuple, dict)):
        assert len(first) == len(second)
        values = (first.values(), second.values()) if isinstance(first, dict) else (first, second)
        for a, b in zip(*values, strict=True):
            assert_same(a, b)
    else:
        assert first == second or (first != first and second != second)


def assert_near(found, wanted, what):
    """Equal to 1e-10 of the largest entry, vectors up to sign, through any structure."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_near(found[key], wanted[key], f"{what} {key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_near(a, b, what)
    elif isinstance(wanted, (float, torch.Tensor)):
        a, b = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
        error, scale = float((a - b).abs().max()), float(b.abs().max())
        if not error <= 1e-10 * max(scale, 1.0):
            raise AssertionError((what, error, scale))
    else:
        assert found == wanted, what
