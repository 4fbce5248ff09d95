"""Sprouts: what is measured of possible neurons, how they are chosen, what plans of them do."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_growth import assert_untouched, data, growable, picture, train
from torch import nn
from zoo import ZOO, in_turn, mse

from splitwatch import Grower, GrowthPolicy, Probe, grow, measure_geometry, plan_growth
from splitwatch.growth import mixture, pursuit, seedbed
from splitwatch.growth.candidates import (
    FRESH,
    LARGEST,
    MORE,
    TRIED,
    ascend,
    best,
    candidates,
    explained,
    fitted_to_data,
    flattest,
    select,
)
from splitwatch.growth.cost import duplicate
from splitwatch.growth.grow import count_parameters, widened
from splitwatch.growth.pursuit import lowest, pursue, rebalance, sized
from splitwatch.growth.search import scale, searched
from splitwatch.growth.seedbed import RESOLUTION, RIDGE, SMALL, THRESHOLD, Seedbed
from splitwatch.records import GrowthPlan, Split, Sprout, UnsupportedLayerError

torch.set_num_threads(1)

BYTES = 2**28
REFUSED = {"inverted bottleneck": "no kernel for its depthwise convolution", "grouped": "none of its 2 groups"}
LAYERS = [(name, layer) for name, case in ZOO.items() for layer in case.growable if name not in REFUSED]


def only(model, probe, name):
    (layer,) = growable(model, probe, [name])
    return layer


def settled(outputs=1, width=3, seed=0, n=60, dtype=torch.float64):
    """A narrow network whose read-out is a least-squares solution on the fitted half, and its probe."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)
    x = torch.randn(n, 4, dtype=dtype)
    y = torch.sin(2 * x[:, :outputs]) + x[:, :1] * x[:, 1:2]
    probe = Probe([(x, y)], mse)
    x, y = probe.fitted[0]
    with torch.no_grad():
        features = torch.cat([model[:2](x), torch.ones_like(x[:, :1])], dim=1)
        solved = torch.linalg.lstsq(features, y).solution
        model[2].weight.copy_(solved[:-1].T)
        model[2].bias.copy_(solved[-1])
    return model, probe


def sprout(model, layer, w, v):
    return GrowthPlan((layer,), (Sprout(layer.name, w, v),), "by hand")


# --- what is measured ------------------------------------------------------------------------------------------------


def slope_in_outgoing(model, layer, probe, w, c):
    """∂L/∂v of one new neuron at v = 0 by central differences of the loss."""
    found = torch.zeros(c, dtype=torch.float64)
    for i in range(c):
        losses = []
        for size in (1e-5, -1e-5):
            v = torch.zeros(c, dtype=torch.float64)
            v[i] = size
            with widened(model, sprout(model, layer, w, v)):
                losses.append(probe.loss(model, "fitted"))
        found[i] = (losses[0] - losses[1]) / 2e-5
    return found


@pytest.mark.parametrize(("name", "layer_name"), LAYERS)
def test_gains_are_the_slopes_of_the_loss(name, layer_name):
    """Along v with the existing weights rebalanced, by finite differences; the features' norm from inputs seen."""
    model, probe = ZOO[name].make(samples=4)
    layer = only(model, probe, layer_name)
    bed = Seedbed(model, layer, probe, 6, BYTES)
    w = candidates(bed, None, 0)
    measured = bed.measure(w)
    for k in (0, 5):
        seen = inputs_of_consumers(model, layer, probe, w[k])
        assert float((measured.norm - bed.floor(w))[k]) == pytest.approx(seen, rel=1e-10)
        for i in {0, bed.c // 2, bed.c - 1}:
            unit = torch.zeros(bed.c, dtype=torch.float64)
            unit[i] = 1.0
            change, biases = rebalance(bed.readers, measured.combination[:, k, None], unit[None])
            move = Sprout(layer.name, w[k], unit, others=(change.T, unit[None]), biases=biases[0])
            losses = []
            for size in (1e-5, -1e-5):
                with widened(model, GrowthPlan((layer,), (scale(move, size),), "")):
                    losses.append(probe.loss(model, "fitted"))
            slope = (losses[0] - losses[1]) / 2e-5
            if any("conv" in type(model.get_submodule(c.name)).__name__.lower() for c in layer.consumers):
                continue  # a kernel has other weights at the border, where the constant's combination differs
            if any(c.stride > 1 for c in layer.consumers):
                continue
            assert slope == pytest.approx(float(measured.gain[k, i]), rel=1e-5, abs=1e-8)


def inputs_of_consumers(model, layer, probe, w):
    """Mean over samples of the squares of what consumers read of one new neuron, by forward hooks."""
    c = Seedbed(model, layer, probe, 1, BYTES).c
    total, places = [0.0], {c.name: c for c in layer.consumers}

    def hook(name):
        def add(module, inputs):
            axis = 1 - module.weight.ndim
            where = places[name]
            block = inputs[0].narrow(axis, where.start + layer.width * where.stride, where.stride)
            total[0] += float(block.square().sum())

        return add

    with widened(model, sprout(model, layer, w, torch.zeros(c))):
        hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in places]
        try:
            probe.loss(model, "fitted")
        finally:
            for item in hooks:
                item.remove()
    return total[0] / probe.samples("fitted")


@pytest.mark.parametrize("name", ["conv+bn", "flatten", "conv1d", "conv3d"])
def test_gains_of_kernels_and_positions_are_slopes_too(name):
    """Without rebalancing, the raw gain of every outgoing weight."""
    model, probe = ZOO[name].make(samples=4)
    for layer in growable(model, probe):
        bed = Seedbed(model, layer, probe, 2, BYTES)
        w = candidates(bed, None, 0)
        bed.known.zero_()
        gain = bed.measure(w).gain
        assert torch.allclose(
            gain[1].double(), slope_in_outgoing(model, layer, probe, w[1], bed.c), rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize(("name", "layer_name"), LAYERS)
def test_the_slope_of_the_score_is_that_of_finite_differences(name, layer_name):
    model, probe = ZOO[name].make(samples=6)
    bed = Seedbed(model, only(model, probe, layer_name), probe, 4, BYTES)
    w = candidates(bed, None, 1)
    along = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(0))

    def log_score(size):
        found = bed.measure(w + size * along)
        return (found.gain.square().sum(1) / (found.left.diagonal() + RIDGE * found.norm)).log()

    expected = (log_score(1e-6) - log_score(-1e-6)) / 2e-6
    assert torch.allclose((bed.slope(w) * along).sum(1), expected, rtol=1e-3, atol=1e-4)


# --- how neurons are chosen ------------------------------------------------------------------------------------------


def residual(features, y):
    """Sum of squares that least squares leaves."""
    return float((y - features @ torch.linalg.lstsq(features, y).solution).square().sum())


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_greedy_choice_is_that_of_explicit_least_squares(outputs):
    model, probe = settled(outputs)
    x, y = probe.fitted[0]
    bed = Seedbed(model, only(model, probe, "0"), probe, 12, BYTES)
    w = candidates(bed, None, 0)
    chosen, explained = select(bed.measure(w), 5)
    features = torch.cat([model[:2](x).detach(), torch.ones_like(x[:, :1])], dim=1)
    new = torch.tanh(F.linear(x, w[:, :-1], w[:, -1]))
    scale = 4 / (outputs**2 * len(x))  # g is the gradient of a mean over outputs and samples, ‖φ⊥‖² a mean over samples
    for picked, gain in zip(chosen.tolist(), explained.tolist(), strict=True):
        before = residual(features, y)
        reductions = [before - residual(torch.cat([features, new[:, [k]]], dim=1), y) for k in range(len(w))]
        assert picked == max(range(len(w)), key=lambda k: reductions[k])
        assert gain == pytest.approx(scale * reductions[picked], rel=1e-8)
        features = torch.cat([features, new[:, [picked]]], dim=1)


@pytest.mark.parametrize(
    ("size", "steep", "expected"),
    [(2.0, 3.0, 1.0), (1.0, 0.5, 0.5), (0.3, 4.0, 2.0), (40.0, 1.0, 1 / 16)],
    ids=["the same", "flatter", "steeper", "saturated"],
)
def test_new_neurons_are_as_steep_as_the_target_asks(size, steep, expected):
    """By explicit ridge regression: doubled where that explains clearly more, halved while that costs nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.fill_(size)
        model[0].bias.copy_(torch.tensor([0.1, -0.2]))
    x = torch.randn(400, 1, dtype=torch.float64)
    y = torch.tanh(steep * x) + torch.sin(steep * x)
    probe = Probe([(x, y)], mse)
    x, y = probe.fitted[0]
    features = torch.cat([model[:2](x).detach(), torch.ones_like(x)], dim=1)
    with torch.no_grad():
        solved = torch.linalg.lstsq(features, y).solution
        model[2].weight.copy_(solved[:-1].T)
        model[2].bias.copy_(solved[-1])
    bed = Seedbed(model, only(model, probe, "0"), probe, 32, BYTES)
    w = fitted_to_data(bed, torch.randn(32, 2, dtype=torch.float64), torch.rand(32, dtype=torch.float64))

    old = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach()
    per_weight = features[:, :-1].square().mean(0).max() / old.square().sum(1).max()
    scaled = features / features.norm(dim=0)

    def explained_by_old(target):
        """Directions in which the existing features hardly differ explain nothing."""
        return scaled @ torch.linalg.lstsq(scaled, target, rcond=RESOLUTION**0.5, driver="gelsd").solution

    def together(factor):
        """Ridge and all, as the greedy choice of one after the other reaches it in the end."""
        new = torch.tanh(F.linear(x, factor * w[:TRIED, :-1], factor * w[:TRIED, -1]))
        left = new - explained_by_old(new)
        floor = SMALL * per_weight * factor**2 * w[:TRIED].square().sum(1)
        gram = left.T @ left / len(x) + RIDGE * (new.square().mean(0) + floor).diag()
        gain = 2 * left.T @ (features @ torch.linalg.lstsq(features, y).solution - y) / len(x)
        return float(gain.T @ torch.linalg.solve(gram, gain))

    sizes = [2.0**-i for i in range(-1, 8)]
    assert list(explained(bed, w[:TRIED], sizes)) == pytest.approx([together(size) for size in sizes], rel=1e-6)
    assert (together(2) > MORE * together(1)) == (expected == 2)
    assert all(together(size) >= together(2 * size) for size in sizes if expected <= size < 1)
    next_one, fresh = expected / 2, FRESH / float(w.norm(dim=1).median())
    assert expected == 2 or next_one < fresh or together(next_one) < together(expected)
    assert torch.equal(flattest(bed, w), expected * w)


@pytest.mark.parametrize(
    ("path", "expected"),
    [((nn.ReLU(),), True), ((nn.BatchNorm2d(3), nn.LeakyReLU(), nn.AvgPool2d(2)), True), ((nn.SiLU(),), False)],
)
def test_features_that_only_scale_get_the_size_of_a_fresh_layer(path, expected):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), *path, nn.Conv2d(3, 1, 1)).double().eval()
    with torch.no_grad():
        model[0].weight.mul_(30)
    batches = [(torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.randn(4, 1, 1, 1, dtype=torch.float64))] * 2
    probe = Probe(batches, lambda model, batch: (model(batch[0]).mean((2, 3), keepdim=True) - batch[1]).square().mean())
    bed = Seedbed(model, only(model, probe, "0"), probe, 4, BYTES)
    w = candidates(bed, None, 0)
    assert bed.scales() == expected
    fresh = nn.Conv2d(2, 4000, 3)
    usual = (fresh.weight.square().sum((1, 2, 3)) + fresh.bias.square()).mean().sqrt()
    assert not expected or torch.allclose(w.norm(dim=1), usual.double(), rtol=0.05)


def test_features_much_larger_than_the_existing_ones_come_last():
    model, probe = settled(n=400)
    model[1] = nn.SiLU()
    bed = Seedbed(model, only(model, probe, "0"), probe, 20, BYTES)
    w = candidates(bed, None, 0)
    w[::3] *= 30
    found, largest = bed.measure(w), model[:2](probe.fitted[0][0]).square().mean(0).max()
    small = found.norm <= LARGEST**2 * largest
    assert 0 < small.sum() < 20
    order = [int((w == row).all(1).nonzero()) for row in best(bed, w, 20)]
    assert all(small[order[: small.sum()]])
    assert (found.scores[order[: small.sum()]].diff() <= 0).all()


def test_features_that_hardly_fire_get_no_large_weights():
    """A neuron of ReLU that one sample excites, by next to nothing, would explain that sample with a huge weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    x = torch.randn(60, 2, dtype=torch.float64)
    batch = x, x.prod(1, keepdim=True)
    probe = Probe([batch, batch], mse)
    bed = Seedbed(model, only(model, probe, "0"), probe, 2, BYTES)
    top = int((x @ x.new_tensor([1.0, 0.0])).argmax())
    dead, alive = x.new_tensor([[1.0, 0.0, 1e-5 - x[top, 0]], [1.0, 0.0, -x[:, 0].median()]])
    found = bed.measure(torch.stack([dead, alive]))
    old = model[0].weight.square().sum(1) + model[0].bias.square()
    floor = SMALL * (model[:2](x).square().mean(0).max() / old.max()).detach()
    assert torch.allclose(found.norm[0], floor * dead.square().sum() + 1e-10 / 60, rtol=1e-10)
    assert found.scores[0] == 0 < found.scores[1]
    chosen, _ = select(found, 2)
    assert chosen.tolist() == [1]


def shrunk(model, size):
    """The second neuron next to nothing: a multiple of it in what takes φ − φ⊥ out was 1 / size."""
    model[0].weight[1] *= size
    model[0].bias[1] *= size
    model[2].weight[:, 1] = 0


def alike(model, size):
    """The second neuron next to the first: of their difference that multiple was 1 / size."""
    model[0].weight[1] = model[0].weight[0] + size * model[0].weight[1]
    model[0].bias[1] = model[0].bias[0]
    model[2].weight[:, :2] /= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("change", "size"), [(shrunk, 1e-3), (shrunk, 1e-6), (alike, 1e-2)])
def test_existing_neurons_that_hardly_span_a_direction_get_no_large_weights(change, size, dtype):
    model, probe = settled(width=4, n=2000, dtype=dtype)
    with torch.no_grad():
        change(model, size)
    largest = model[2].weight.abs().max()
    geometry = measure_geometry(model, probe, layers := growable(model, probe))
    for moves in ("even", "mixed"):
        plan = plan_growth(model, geometry, probe, GrowthPolicy(moves=moves, max_ratio=2), layers=layers)
        with widened(model, plan):
            assert any(isinstance(move, Sprout) and move.outgoing.any() for move in plan.moves)
            assert model[2].weight.abs().max() <= 10 * largest


def test_repeated_features_are_chosen_once():
    model, probe = settled()
    bed = Seedbed(model, only(model, probe, "0"), probe, 8, BYTES)
    w = candidates(bed, None, 0)[:2].repeat(4, 1)
    chosen, _ = select(bed.measure(w), 8)
    assert sorted(k % 2 for k in chosen.tolist()) == [0, 1]
    existing = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach()
    assert not len(select(bed.measure(existing), 3)[0])  # nothing new in them
    assert 0 < THRESHOLD < 1


@pytest.mark.parametrize("name", ["settled", "conv+bn", "gated"])
def test_ascent_raises_scores(name):
    model, probe = settled(n=400) if name == "settled" else ZOO[name].make()
    for layer in growable(model, probe):
        bed = Seedbed(model, layer, probe, 10, BYTES)
        w = candidates(bed, None, 0)
        found = [bed.measure(w), bed.measure(ascend(bed, w))]
        before, after = (x.gain.square().sum(1) / (x.left.diagonal() + RIDGE * x.norm) for x in found)
        able = before > 0  # not those that are dead on every sample
        assert (after[able] / before[able]).log().mean() > 0


def test_every_step_of_the_ascent_takes_another_batch(monkeypatch):
    """Its statistics are those of a probe that holds nothing else, but for what existing features span."""
    monkeypatch.setattr(seedbed, "SEEN", 9)
    model, _ = settled()
    torch.manual_seed(1)
    batches = [(torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)) for n in (20, 9, 30, 9)]
    probe, layer = Probe(batches, mse), only(model, Probe(batches, mse), "0")
    bed = Seedbed(model, layer, probe, 5, BYTES)
    w = candidates(bed, None, 0)
    along = torch.randn_like(w)
    for step in range(4):
        alone = Seedbed(model, layer, Probe([batches[2 * (step % 2)], batches[1]], mse), 5, BYTES)
        alone.inverse, alone.known, alone.small, alone.whole = bed.inverse, bed.known, bed.small, False
        assert torch.allclose(bed.at(step).measure(w).norm, alone.measure(w).norm)
        assert torch.allclose(bed.at(step).slope(w), alone.slope(w))
        up, down = (bed.at(step).measure(w + h * along) for h in (1e-6, -1e-6))
        rise = (up.gain.square().sum(1) / up.norm).log() - (down.gain.square().sum(1) / down.norm).log()
        assert torch.allclose((alone.slope(w) * along).sum(1), rise / 2e-6, rtol=1e-5)
        assert torch.allclose(bed.at(step).measure(w, pairs=False).scores, alone.measure(w).scores)


def test_the_size_of_batches_hardly_matters():
    """Where all rows fit into a step, the same neurons are chosen whatever the batches are."""
    model, whole = settled(n=120)
    (x, y), held_out = whole.fitted[0], whole.held_out
    small = Probe([*zip(x.split(7), y.split(7), strict=True), *held_out], mse)
    small.fitted, small.held_out = tuple(zip(x.split(7), y.split(7), strict=True)), held_out
    chosen = [pursue(model, {only(model, p, "0"): 3}, p, {}, max_bytes=BYTES)[0].incoming for p in (whole, small)]
    assert len(x) <= seedbed.SEEN < 2 * len(x)
    assert torch.allclose(*chosen, rtol=1e-6)


def test_more_neurons_are_found_than_candidates_are_tried_beyond_them(monkeypatch):
    monkeypatch.setattr(pursuit, "MOST", 4)
    model, probe = settled(n=400)
    assert len(pursue(model, {only(model, probe, "0"): 9}, probe, {}, max_bytes=BYTES)[0].sprouts()) > 4


def test_what_new_neurons_change_in_existing_weights_takes_little_memory():
    model, probe = settled(n=400)
    layer = only(model, probe, "0")
    for move in pursue(model, {layer: 2}, probe, {}, max_bytes=BYTES)[0].sprouts():
        assert [factor.shape for factor in move.others] == [(layer.width, 1), (1, 1)]
        assert scale(move, 0.0).others is None


def test_new_neurons_have_a_ridge_on_their_outgoing_weights():
    model, probe = settled(outputs=2)
    found = pursue(model, {only(model, probe, "0"): 3}, probe, {}, max_bytes=BYTES)[0]
    outgoing = torch.stack([move.outgoing for move in found.sprouts()])
    slope = found.measured.gain + (found.measured.left + RIDGE * found.measured.norm.diag()) @ outgoing
    assert torch.allclose(slope, torch.zeros_like(slope), atol=1e-12)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_a_layer_whose_neurons_are_all_silent_gets_new_ones(activation):
    """All existing features are zero, or constant: no new one is called too large beside them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    x = torch.randn(400, 3, dtype=torch.float64)
    probe = Probe(zip(x.split(100), x[:, :1].tanh().split(100), strict=True), mse)
    geometry = measure_geometry(model, probe)
    for moves in ("sprouts", "even"):
        plan = plan_growth(model, geometry, probe, GrowthPolicy(moves=moves))
        assert plan.held_out_decrease > 0.05 * probe.loss(model, "held_out")


def test_the_best_come_first_and_large_ones_last():
    model, probe = settled(n=400)
    bed = Seedbed(model, only(model, probe, "0"), probe, 40, BYTES)
    w = candidates(bed, None, 0)
    found = bed.measure(w, pairs=False)
    bed.largest = found.norm.median() / LARGEST**2
    chosen = bed.measure(best(bed, w, 40), pairs=False)
    large = chosen.norm > found.norm.median()
    assert large.tolist() == [False] * 20 + [True] * 20
    assert all(torch.equal(part, part.sort(descending=True)[0]) for part in (chosen.scores[:20], chosen.scores[20:]))


# --- what it brings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("wanted", [1, 4])
def test_the_prediction_is_exact_for_a_linear_read_out_under_the_squared_error(outputs, wanted):
    model, probe = settled(outputs)
    layer = only(model, probe, "0")
    moves = sized(model, [layer], pursue(model, {layer: wanted}, probe, {}, max_bytes=BYTES)[0].sprouts(), probe)
    assert len(moves) == wanted
    plan = searched(model, GrowthPlan((layer,), moves, ""), probe)
    assert plan.step == 1
    assert plan.fitted_decrease == pytest.approx(plan.predicted_decrease, rel=1e-6)
    for step, decrease in plan.step_search:
        assert decrease == pytest.approx(plan.predicted_decrease * step * (2 - step), rel=1e-6, abs=1e-12)
    x, y = probe.fitted[0]
    w = torch.stack([move.incoming for move in plan.moves])
    new = torch.tanh(F.linear(x, w[:, :-1], w[:, -1]))
    features = torch.cat([model[:2](x).detach(), torch.ones_like(x[:, :1]), new], dim=1)
    best = residual(features, y) / y.numel()  # all outgoing weights and biases at their optimum, without the ridge
    possible = probe.loss(model, "fitted") - best
    assert plan.fitted_decrease <= possible * (1 + 1e-9)
    assert wanted > 1 or plan.fitted_decrease == pytest.approx(possible, rel=1e-6)  # of one, the length is searched


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_new_neurons_do_not_depend_on_the_scale_of_the_loss(factor):
    model, plain = settled(outputs=2)
    layer = only(model, plain, "0")
    scaled = Probe([*plain.fitted, *plain.held_out], lambda model, batch: factor * mse(model, batch))
    moves, others = (
        sized(model, [layer], pursue(model, {layer: 3}, p, {}, max_bytes=BYTES)[0].sprouts(), p)
        for p in (plain, scaled)
    )
    for one, other in zip(moves, others, strict=True):
        assert torch.allclose(one.outgoing, other.outgoing, rtol=1e-6)
        assert other.predicted_decrease == pytest.approx(factor * one.predicted_decrease, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("factor", "shift"), [(1e-9, 0), (1e-6, 0), (1e6, 0), (1e-9, -1e-12), (1, -5), (1e3, -5e3)])
def test_the_length_of_outgoing_weights_follows_scale_and_zero_of_the_loss(factor, shift, dtype):
    model, plain = settled(outputs=2)
    layer = only(model, plain, "0")
    moves = pursue(model, {layer: 3}, plain, {}, max_bytes=BYTES)[0].sprouts()
    start = plain.loss(model, "fitted")
    expected = lowest(model, [layer], moves, plain, start)
    model.to(dtype)
    batches = [tuple(part.to(dtype) for part in batch) for batch in (*plain.fitted, *plain.held_out)]
    probe = Probe(batches, lambda model, batch: factor * mse(model, batch) + shift)
    scaled = [replace(move, predicted_decrease=factor * move.predicted_decrease) for move in moves]
    found = lowest(model, [layer], scaled, probe, probe.loss(model, "fitted"))
    assert found == pytest.approx(expected, rel=1e-6 if dtype == torch.float64 and not shift else 0.02)


def test_the_length_of_outgoing_weights_is_found_beside_infinite_losses():
    model, plain = settled(outputs=2)
    layer, start = only(model, plain, "0"), plain.loss(model, "fitted")
    bounded = Probe(
        [*plain.fitted, *plain.held_out], lambda *args: torch.where((loss := mse(*args)) > 9 * start, torch.inf, loss)
    )
    moves = pursue(model, {layer: 3}, plain, {}, max_bytes=BYTES)[0].sprouts()
    far = [replace(scale(move, 50), predicted_decrease=50 * move.predicted_decrease) for move in moves]
    with widened(model, GrowthPlan((layer,), tuple(far), "")):
        assert bounded.loss(model, "fitted", finite=False) == torch.inf
    steps = [lowest(model, [layer], far, probe, start) for probe in (plain, bounded)]
    assert steps[1] == pytest.approx(steps[0], rel=1e-6)


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_gets_sprouts_or_is_refused(name):
    model, probe = ZOO[name].make()
    before, state = picture(prepared(model, probe), []), torch.get_rng_state()
    for layer in growable(model, probe):
        if name in REFUSED:
            with pytest.raises(UnsupportedLayerError, match=REFUSED[name]):
                pursue(model, {layer: 2}, probe, {}, max_bytes=BYTES)
            continue
        geometry = measure_geometry(model, probe, [layer])[layer.name]
        found = [
            pursue(model, {layer: 2}, probe, {layer.name: geometry}, max_bytes=BYTES)[0].sprouts() for _ in range(2)
        ]
        moves = sized(model, [layer], found[0], probe)
        assert 0 < len(moves) <= 2
        for first, second in zip(*found, strict=True):
            assert torch.equal(first.incoming, second.incoming)
            assert torch.equal(first.outgoing, second.outgoing)
        plan = searched(model, GrowthPlan((layer,), moves, ""), probe)
        assert plan.fitted_decrease > 0
        assert plan.predicted_decrease <= probe.loss(model, "fitted") * (1 + 1e-9)
    assert_untouched(before, model, [])
    assert torch.equal(torch.get_rng_state(), state)


def prepared(model, probe):
    """The model with gradients, so that it can be seen whether they stay."""
    mse(model.eval(), probe.fitted[0]).backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return model


@pytest.mark.parametrize(("name", "moves"), in_turn(ZOO, ["sprouts", "mixed"]))
def test_plans_grow_as_they_say(name, moves):
    model, probe = ZOO[name].make()
    before = picture(prepared(model, probe), [])
    policy = GrowthPolicy(max_neurons=4, moves=moves)
    plan = plan_growth(model, measure_geometry(model, probe), probe, policy)
    assert_untouched(before, model, [])
    if not plan:
        assert "would not help" in plan.reason
        return
    assert "held-out decrease of" in plan.reason
    assert sum(move.added for move in plan.moves) <= 4
    assert all(move.reason for move in plan.moves)
    start = probe.loss(model, "fitted"), probe.loss(model, "held_out")
    event = grow(model, plan, probe=probe)
    assert event.realised_fitted == pytest.approx(plan.fitted_decrease, rel=1e-9)
    assert event.realised_held_out == pytest.approx(plan.held_out_decrease, rel=1e-9)
    assert start[1] - probe.loss(model, "held_out") > 0


# --- the planner -----------------------------------------------------------------------------------------------------


def deep(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    batches = data(40, 40)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, batches * 200)
    return model, optimizer, Probe(batches, mse), batches


@pytest.mark.parametrize("moves", ["sprouts", "mixed"])
@pytest.mark.parametrize("limits", [{"max_neurons": 3}, {"max_parameters": 75}, {"max_ratio": 1.3}, {"max_neurons": 0}])
def test_budgets_are_respected(moves, limits):
    model, _, probe, _ = deep()
    parameters = count_parameters(model)
    policy = GrowthPolicy(moves=moves, **limits)
    plan = plan_growth(model, measure_geometry(model, probe), probe, policy)
    with widened(model, plan):
        grown = count_parameters(model)
    assert grown <= (policy.max_parameters or grown)
    assert grown <= parameters * (policy.max_ratio or 2)
    assert sum(move.added for move in plan.moves) <= (99 if policy.max_neurons is None else policy.max_neurons)
    if policy.max_neurons == 0:
        assert plan.reason == "the budget allows no new neuron"


def test_splits_that_leave_no_room_are_no_half_and_half(monkeypatch):
    """Half of the splits, into five copies each, add more neurons than there are, so nothing can stand beside them."""
    model, _, probe, _ = deep()
    layers = tuple(growable(model, probe))
    splits = [duplicate(model, layer, r, (0.2,) * 5) for layer in layers for r in range(layer.width)]
    compared = []
    monkeypatch.setattr(mixture, "_chosen", lambda model, plans, probe: compared.append([*plans]) or plans["splits"])
    mixture.mix(model, GrowthPlan(layers, tuple(splits), ""), {}, probe, GrowthPolicy(moves="mixed", max_ratio=None))
    assert compared == [["sprouts", "splits"]]


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)])
def test_half_and_half_grows_with_optimizer_state_and_trains_on(make, monkeypatch):
    model, _, probe, batches = deep()
    optimizer = make(model.parameters(), lr=1e-3)
    train(model, optimizer, batches)
    only_half = lambda model, plans, probe: replace(plans["half and half"], reason="half and half")  # noqa: E731
    monkeypatch.setattr(mixture, "_chosen", only_half)
    plan = plan_growth(model, measure_geometry(model, probe), probe, GrowthPolicy(moves="mixed", max_neurons=4))
    assert {type(move) for move in plan.moves} == {Split, Sprout}
    assert plan.offset
    assert plan.step
    before = probe.loss(model)
    event = grow(model, plan, optimizer, probe=probe)
    assert event.drift <= 1e-12
    assert event.realised_fitted == pytest.approx(plan.fitted_decrease, rel=1e-9)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]
    assert all(value.shape == p.shape for p, s in optimizer.state.items() for value in s.values() if value.ndim)
    train(model, optimizer, batches * 50)
    assert probe.loss(model) < before


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model, optimizer, probe, _ = deep()
    geometry, before = measure_geometry(model, probe), picture(model, [optimizer])

    def failing(*arguments, **options):
        raise KeyError

    for place in ((Probe, "traces"), (pursuit, "ascend"), (pursuit, "lowest"), (Probe, "losses")):
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr(*place, failing)
            plan_growth(model, geometry, probe, GrowthPolicy(moves="mixed"))
        assert_untouched(before, model, [optimizer])


def test_a_grower_mixes_moves_where_it_is_told_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    x = torch.rand(256, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    policy = GrowthPolicy(window=100, max_events=1, max_overhead=None, moves="mixed")
    grower = Grower(model, optimizer, mse, policy, progress=False)
    for _ in range(900):
        for batch in zip(x.split(64), y.split(64), strict=True):
            optimizer.zero_grad()
            loss = mse(model, batch)
            loss.backward()
            optimizer.step()
            event = grower.step(batch, loss)
            if event is not None and event.grown:
                assert "held-out decrease of" in str(event)
                return
    raise AssertionError("it never grew")
