"""The baselines of benchmarks/growth.py do what their papers say; runs keep to their budget and resume."""

import importlib
import json
import math
import pathlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitwatch import Probe, grow, inner_hessian
from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.grow import widened
from splitwatch.records import GrowthPlan, Split

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
PEERS = ("random", "Net2Wider", "S2D", "S3D", "GradMax", "TINY", "Firefly")


@pytest.fixture
def bench(monkeypatch):
    """A module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def site(bench):
    """A tanh network before growth from 6 to 9 neurons."""
    return site_of(bench, nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), 9, torch.randn)


def site_of(bench, model, width, draw, shape=(5,), loss=F.mse_loss):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = [draw(32, *shape) if draw is torch.randn else draw(256, (32, *shape)) for _ in range(2)]
    y = [torch.randn(32, 3) for _ in x] if loss is F.mse_loss else [torch.randint(10, (32,)) for _ in x]
    probe = Probe(list(zip(x, y, strict=True)), lambda net, batch: loss(net(batch[0]), batch[1]))
    return bench("growth_site").Site(model, probe, width, 0, 10**6)


def after(site, moves, half="all"):
    with widened(site.model, GrowthPlan(site.layers, tuple(moves), "")):
        return site.probe.loss(site.model, half)


def test_silent_neurons_and_copies_keep_the_function(bench, site):
    peers, layer, before = bench("growth_peers"), site.layers[0], site.probe.loss(site.model)
    for moves in (
        bench("growth_site").random_new(site, layer, 3),
        peers.net2wider(site, layer, 3, noise=0.0),
        peers.gradmax(site, layer, 3),
    ):
        assert sum(move.added for move in moves) == 3
        assert after(site, moves) == pytest.approx(before, rel=1e-6)


def test_s2d_goes_along_the_lowest_eigenvectors(bench, site):
    layer = site.layers[0]
    values, vectors = torch.linalg.eigh(inner_hessian(site.model, layer, site.probe, range(6)))
    moves = bench("growth_peers").s2d(site, layer, 3)
    assert [move.neuron for move in moves] == values[:, 0].argsort()[:3].tolist()
    for move in moves:
        u = move.in_offset[1]
        assert abs(float(F.normalize(u, dim=0) @ vectors[move.neuron, :, 0].to(u))) == pytest.approx(1, abs=1e-3)


def test_s3d_reaches_its_gain_on_either_side(bench, site):
    layer, (w, _) = site.layers[0], neuron_weights(site.model, site.layers[0])
    hessians = inner_hessian(site.model, layer, site.probe, range(6))
    for move in bench("growth_peers").s3d(site, layer, 6):
        s, size = hessians[move.neuron].to(w), 1e-2 * w[move.neuron].norm()
        values = torch.linalg.eigvalsh(s)
        weights = torch.tensor(move.coefficients)
        assert torch.allclose(weights @ move.in_offset, torch.zeros(6), atol=1e-6 * float(size))
        gain = weights @ torch.einsum("ji,ik,jk->j", move.in_offset, s, move.in_offset) / size**2
        assert float(gain) == pytest.approx(float(min(values[0], -0.5 * values[-1])), rel=1e-2)


def test_gradmax_has_the_largest_gradient(bench, site):
    peers, layer = bench("growth_peers"), site.layers[0]
    best = peers.gradmax(site, layer, 3)

    def gradient(outgoing):
        moves = [replace(move, outgoing=v) for move, v in zip(best, outgoing, strict=True)]
        with widened(site.model, GrowthPlan(site.layers, tuple(moves), "")):
            loss = sum(site.probe.loss_fn(site.model, batch) for batch in site.probe.half("all"))
            weight, bias = torch.autograd.grad(loss, [site.model[0].weight, site.model[0].bias])
        return float(weight[6:].square().sum() + bias[6:].square().sum())

    norm = best[0].outgoing.norm()
    others = [norm * torch.linalg.qr(torch.randn(3, 3))[0] for _ in range(20)]
    one = torch.stack([best[0].outgoing] * 3)
    assert gradient(one) >= max(gradient(norm * F.normalize(torch.randn(3, 3), dim=1)) for _ in range(20))
    assert gradient([m.outgoing for m in best]) == pytest.approx(gradient(others[0]), rel=1e-3)  # c = 3: all of it


def test_tiny_explains_most_of_what_existing_weights_cannot(bench, site):
    peers, layer = bench("growth_peers"), site.layers[0]
    batches = site.probe.half("all")
    x = torch.cat([batch[0] for batch in batches])
    h = torch.tanh(site.model[0](x)).detach()
    s = torch.cat([2 * (site.model(b[0]) - b[1]).detach() for b in batches])
    h, x = (torch.cat([part, torch.ones(64, 1)], 1) for part in (h, x))
    left = s - h @ torch.linalg.lstsq(h, s).solution

    def explained(incoming, outgoing):
        made = x @ incoming[:, None] @ outgoing[None]
        return float((made * left).sum() ** 2 / made.square().sum())

    moves = peers.tiny(site, layer, 3)
    best = explained(moves[0].incoming, moves[0].outgoing)
    assert best >= max(explained(torch.randn(6), torch.randn(3)) for _ in range(200))
    assert best >= 0.99 * explained(torch.linalg.lstsq(x, left @ moves[0].outgoing).solution, moves[0].outgoing)
    assert after(site, moves) <= site.probe.loss(site.model)


def test_firefly_scores_add_up_to_the_change_of_the_loss(bench, site):
    candidates = bench("growth_firefly").Candidates(site, site.layers[0], 6)
    untrained = after(site, candidates.moves())
    candidates.train()
    trained = after(site, candidates.moves())
    assert trained < min(untrained, site.probe.loss(site.model))
    assert float(candidates.scores().sum()) == pytest.approx(trained - site.probe.loss(site.model), rel=1e-2)


@pytest.mark.parametrize("name", [*PEERS, "splitwatch"])
@pytest.mark.parametrize("kind", ["convolutions", "transformer"])
def test_every_method_widens_every_network(bench, name, kind):
    models = bench("growth_models")
    if kind == "convolutions":
        model = models.convolutions("ReLU")(2)
        draw, shape, loss = torch.randn, (1, 28, 28), F.cross_entropy
    else:
        model = nn.Sequential(models.ByteModel(4, nn.GELU, 6, size=8), nn.Flatten(), nn.Linear(6 * 256, 10))
        draw, shape, loss = torch.randint, (6,), F.cross_entropy
    site = site_of(bench, model, 4 if kind == "convolutions" else 7, draw, shape, loss)
    before = {layer.name: layer.width for layer in site.layers}
    event = grow(model, bench("growth_methods").GROW[name](site))
    assert before and {layer: widths[1] for layer, widths in event.widths.items()} == dict.fromkeys(before, site.width)
    assert math.isfinite(site.probe.loss(model))


def test_burgers_waves_fade_and_keep_their_mean(bench):
    start, end = bench("growth_data").burgers_pairs(8, 32)
    assert np.allclose(start.mean(1), end.mean(1), atol=1e-9)
    assert (np.square(end).sum(1) < np.square(start).sum(1)).all()


def test_runs_keep_to_their_budget_and_resume(bench, tmp_path, monkeypatch):
    cells, runner, report = bench("growth_cells"), bench("growth"), bench("growth_report")
    cell = replace(cells.BY_NAME["teacher tanh"], widths=(4, 8), at=(0.3,), steps=60, probe=2)
    monkeypatch.setitem(cells.BY_NAME, cell.name, cell)
    path = tmp_path / "growth.jsonl"
    for method in ("fixed 4", "fixed 8", "random", "splitwatch"):
        results = [bench("growth_run").execute(cell, method, seed) for seed in range(2)]
        runner.store(path, results)
        assert all(result["spent"] >= 1 for result in results)
        assert method == "splitwatch" or all(result["spent"] < 1.1 for result in results)
    again = bench("growth_run").execute(cell, "random", 0)
    found = runner.stored(path)
    kept = next(r for r in found if runner.key(r) == runner.key(again))["curve"]
    assert [y for _, y in kept] == pytest.approx([y for _, y in again["curve"]], rel=1e-5)  # six digits are stored
    with path.open("a") as file:
        file.write(json.dumps(found[0])[:50])  # stopped while it wrote
    assert runner.stored(path) == found
    diverged = [*found[:-1], {**found[-1], "final": math.nan, "area": math.nan}]
    assert "nan" not in report.describe(diverged, "splitwatch")
    text = report.describe(found, "splitwatch")
    assert "wide from scratch" in text and "| random |" in text
    report.draw(found, "splitwatch", tmp_path / "growth.png")
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## Growth\nold\n\n## Next\nkept\n")
    report.put_into(page, text)
    assert "old" not in page.read_text() and "## Next\nkept" in page.read_text()


def test_what_grows_when_due_waits_for_a_loss_that_falls_and_no_longer_than_half_the_budget(bench):
    execute, cell = bench("growth_run").execute, bench("growth_cells").BY_NAME["teacher tanh"]
    cell = replace(cell, widths=(4, 8, 16), at=(0.01, 0.02), steps=500, probe=2)
    still, falling = (execute(replace(cell, rate=rate), "splitwatch, when due", 0) for rate in (0.0, 1e-3))
    first, second = (event["share"] for event in still["events"])
    assert 0.05 < first < second < 0.5  # 200 steps at width 4 cost 10 % of 500 at width 16
    assert [event["widths"] for event in still["events"]] == [[(4, 8)], [(8, 16)]]
    assert not falling["events"] or falling["events"][0]["share"] > first
    short = execute(replace(cell, steps=50), "random, when due", 0)
    assert not short["events"] and short["parameters"] < still["parameters"]


def test_a_fixed_schedule_has_no_rival_that_the_detector_helped(bench):
    grown = bench("growth_report").grown
    names = ["fixed 8", "fixed 16", "fixed 64", "splitwatch", "splitwatch, later", "splitwatch, when due", "random"]
    runs = {name: {} for name in [*names, "random, when due"]}
    assert grown("teacher tanh", runs, "splitwatch") == ["fixed 8", "fixed 64", "random"]
    found = grown("teacher tanh", runs, "splitwatch, when due")
    assert found == ["fixed 8", "fixed 64", "random", "random, when due"]


@pytest.fixture
def plateau(bench):
    """A tanh network in double precision whose outgoing weights cannot be better, before growth from 6 to 8 neurons."""
    site = site_of(bench, nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(), 8, torch.randn)
    batches = [(x.double(), y.double()) for x, y in site.probe.half("all")]
    probe = Probe(batches, lambda net, batch: F.mse_loss(net(batch[0]), batch[1]))
    hidden = torch.cat([torch.tanh(site.model[0](x)) for x, _ in batches])
    hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1).detach()
    solved = torch.linalg.lstsq(hidden, torch.cat([y for _, y in batches])).solution.T
    site.model[2].load_state_dict({"weight": solved[:, :-1], "bias": solved[:, -1]})
    return replace(site, probe=probe)


def test_gromo_asks_for_the_neurons_that_tiny_asks_for(bench, plateau):
    pytest.importorskip("gromo")
    net = bench("growth_gromo").measured(plateau.model, plateau.probe)
    net.compute_optimal_updates(maximum_added_neurons=2, dtype=torch.float64)
    new = net.layers[0].extended_output_layer
    theirs = (net.layers[1].extended_input_layer.weight @ torch.cat([new.weight, new.bias[:, None]], 1)).detach()
    moves = bench("growth_peers").tiny(plateau, plateau.layers[0], 2)
    ours = sum(move.outgoing[:, None] * move.incoming for move in moves)
    size = theirs.norm() / ours.norm()
    assert len(moves) == 2 and torch.allclose(size * ours, theirs, rtol=0, atol=1e-12)
    gamma = 1e-7
    root = (gamma * size).sqrt()
    small = [replace(move, incoming=root * move.incoming, outgoing=root * move.outgoing) for move in moves]
    slope = (plateau.probe.loss(plateau.model) - after(plateau, small)) / gamma
    assert slope == pytest.approx(float(net.layers[1].new_neurons_fo_improvement), rel=1e-5)


def test_what_gromo_makes_of_a_network_is_what_the_harness_makes_of_it(bench, site):
    pytest.importorskip("gromo")
    gromo = bench("growth_gromo")
    net = gromo.proposed(site.model, site.probe, 3)
    losses = [gromo.extended_loss(net, site.probe, factor) for factor in gromo.FACTORS]
    assert min(losses) < 0.99 * losses[0] and losses[0] == pytest.approx(site.probe.loss(site.model), rel=1e-6)
    moves = gromo.gromo(site, site.layers[0], 3)
    assert len(moves) == 3 and moves[0].others[1].norm() > 0
    assert after(site, moves) == pytest.approx(min(losses), rel=1e-5)


def test_methods_run_where_they_know_the_network_and_are_installed(bench, tmp_path, monkeypatch, capsys):
    runner, cells = bench("growth"), bench("growth_cells").BY_NAME
    chosen = [cells["teacher tanh"], cells["MNIST conv, once"]]
    found = {(cell, name) for cell, name, _ in runner.tasks(chosen, ["random", "gromo"], 1) if "fixed" not in name}
    assert found == {("teacher tanh", "random"), ("teacher tanh", "gromo"), ("MNIST conv, once", "random")}
    monkeypatch.setitem(runner.NEEDS, "gromo", "not_a_package")
    ran = []
    monkeypatch.setattr(runner, "run_all", lambda todo, *_: ran.extend(name for _, name, _ in todo) or [])
    runner.main(["--cells", "teacher tanh", "--methods", "gromo", "random", "--results", str(tmp_path / "none.jsonl")])
    assert "random" in ran and "gromo" not in ran
    assert "gromo: left out, not_a_package is not installed" in capsys.readouterr().out


@pytest.mark.slow
def test_only_certified_and_signed_splits_leave_minima_of_either_sign(bench, monkeypatch, capsys):
    minimum = bench("growth_minimum")
    monkeypatch.setattr(minimum, "STEPS", 300)
    found = minimum.main(["--points", "1", "--seed", "1"])
    for sign in (1, -1):
        (certified,), (s2d,) = found[sign, "certified"], found[sign, "S2D"]
        assert min(certified.coefficients) * sign < 0 < certified.coefficients[0]
        assert certified.curvature < 0
        assert certified.final < certified.at_growth < 1
        assert (s2d.curvature < -1e-12) == (sign < 0)
        assert (s2d.final < 1) == (sign < 0)
    assert "1 of 1" in capsys.readouterr().out


def test_single_candidates_come_with_what_the_held_out_half_says(bench, site):
    """What benchmarks/growth_candidates.py ranks: random new neurons and splits, each at a size of its own."""
    module = bench("growth_candidates")
    run = type("Run", (), {"model": site.model, "seed": 0})()
    moves = [*module.sprouts(run, site.layers[0], site.probe, 3), *module.splits(run, site.layers, site.probe)]
    assert len(moves) > 3
    before = site.probe.loss(site.model, "held_out")
    for move in moves:
        realised, sure = before - after(site, [move], "held_out"), isinstance(move, Split)
        assert realised * move.predicted_decrease > 0
        assert not sure or realised == pytest.approx(move.predicted_decrease, rel=1e-4)


def test_every_method_is_reported_at_its_own_best_rate(bench):
    """What benchmarks/growth_rates.py says of runs: chosen by validation loss, told by test error."""
    module, cell = bench("growth_rates"), bench("growth_cells").BY_NAME["Burgers tanh, SGD, once"]
    best = {"fixed 16": (1, 4.0), "fixed 32": (3, 2.0), "random": (3, 3.0), "splitwatch": (10, 1.0)}
    best |= {"splitwatch, when due": (1, 1.5), "splitwatch, rewarmed": (1, 2.5)}
    found = {
        f"{method} × {factor}": [{"final loss": loss + (factor != rate), "final": share * loss} for share in (0.1, 0.4)]
        for method, (rate, loss) in best.items()
        for factor in module.FACTORS
    }
    found["fixed 16 × 10"] = [{"final loss": 0.1, "final": 0.1}, {"final loss": math.inf, "final": math.inf}]
    told = ["0.6 at × 3: 1.50, 0 of 2", "0.2 at × 10: 0.50, 2 of 2", "0.3 at × 1: 0.75, 2 of 2"]
    told.append("0.5 at × 1: 1.25, 0 of 2")
    assert module.row(cell, found) == [cell.name, "32: 0.4 at × 3", *told]


def test_a_growing_run_reaches_the_best_width_within_its_standard_error(bench, monkeypatch):
    """What benchmarks/growth_sweep.py runs, and says of it."""
    module, cell = bench("growth_sweep"), bench("growth_cells").BY_NAME["MNIST conv, once"]
    made = []
    result = {"cell": cell.name, "seed": 3, "final": 0.1, "area": 0.2}
    monkeypatch.setattr(module, "execute", lambda task, method, seed: made.append((task.steps, method)) or result)
    for which in ("fixed 8", "splitwatch, when due", "splitwatch, when due at 60%"):
        assert module.one(cell.name, which, 3) == {"method": which, "cell": cell.name, "seed": 3, "final": 0.1}
    assert made == [(400, "fixed 8"), (400, "splitwatch, when due"), (480, "splitwatch, when due")]
    found = {"fixed 4": (0.3, 0.5), "fixed 8": (0.1, 0.3), "splitwatch": (0.2, 0.5), "splitwatch, when due": (0.2, 0.3)}
    found |= {"splitwatch at 60%": (0.1, 0.2), "splitwatch, when due at 60%": (0.4, 0.4)}
    told = ["0.3500 ± 0.1500", "**0.2500 ± 0.0500**", "**0.1500 ± 0.0500**", "0.4000 ± 0.0000"]
    beyond = ["+0.1500 ± 0.6353", "+0.0500 ± 0.6353"]  # Student's t of one degree of freedom: 12.7
    found = {name: dict(enumerate(finals)) for name, finals in found.items()}
    assert module.row(cell, found) == [cell.name, "50%", "8: 0.2000 ± 0.1000", *told, *beyond]
