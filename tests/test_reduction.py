"""Inactive units, constant units, several replications at once, and the branch a wide network lies on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_embedding import (
    assert_same_function,
    assert_untouched,
    case,
    gradients,
    growable,
    nn_mse,
    snapshot,
    stationary_probe,
    widths,
)
from torch import nn
from zoo import SINGLY, ZOO

from splitwatch.geometry.weights import neuron_weights
from splitwatch.growth.branch import branch
from splitwatch.growth.checkpoint import KEY, load_grown, recall
from splitwatch.growth.embedding import critical_embedding, inactive_propagation, inactive_units, unit_replication
from splitwatch.growth.reduction import critical_reduction, redundancy
from splitwatch.growth.stored import stored_redundancy
from splitwatch.layers import find_hidden_layers
from splitwatch.probe import Probe
from splitwatch.records import SplitWatchError, UnsupportedLayerError

DEPTHWISE = {"inverted bottleneck"}
SPROUTING = [name for name in SINGLY if name not in DEPTHWISE]
# Where a consumer pads with zeros, or has no bias, constants cannot go into its bias.
NOT_CONSTANT = {("conv+bn", "0"), ("residual blocks", "blocks.0.2"), ("residual blocks", "blocks.1.2"), ("conv1d", "0")}
CONSTANT = [name for name in SPROUTING if any((name, layer) not in NOT_CONSTANT for layer in ZOO[name].growable)]

counts, seeds = st.integers(1, 3), st.integers(0, 2**16)


def compensating(name, layers):
    return [layer for layer in layers if (name, layer.name) not in NOT_CONSTANT]


def random_units(model, layer, count, seed):
    """Incoming and outgoing weights of new neurons."""
    torch.manual_seed(seed)
    w, v = neuron_weights(model, layer)
    return torch.randn(count, w.shape[1], dtype=w.dtype), torch.randn(count, v.shape[1], dtype=v.dtype)


def assert_same_state(model, narrow):
    for (key, old), new in zip(model.state_dict().items(), narrow.state_dict().values(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12, msg=key)


def two_layers(outputs=1, activation=nn.Tanh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, outputs)).double()
    probe = stationary_probe(model, torch.randn(40, 3, dtype=torch.float64))
    (layer,) = growable(model, probe)
    return model, probe, layer


def largest(values):
    return max(float(value.abs().max()) for value in values)


def test_there_are_ten_architectures_of_each_kind():
    assert len(SPROUTING) >= 10
    assert len(CONSTANT) >= 10


@pytest.mark.parametrize("name", SPROUTING)
@settings(max_examples=6, deadline=None)
@given(which=st.integers(0, 9), count=counts, seed=seeds)
def test_reduction_undoes_inactive_propagation(name, which, count, seed):
    model, probe, layers = case(name)
    before, layer = snapshot(model), layers[which % len(layers)]
    wide = inactive_propagation(model, layer, random_units(model, layer, count, seed)[0])
    found = growable(wide, probe)
    assert widths(found) == widths(layers) | {layer.name: layer.width + count}
    assert_same_function(model, wide, probe)
    narrow, reduction = critical_reduction(wide, found)
    assert_same_function(model, narrow, probe)
    assert widths(growable(narrow, probe)) == widths(layers)
    (item,) = (item for item in reduction.layers if item.layer == layer.name)
    assert item.dropped == tuple(range(layer.width, layer.width + count))
    assert_same_state(model, narrow)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", CONSTANT)
@settings(max_examples=6, deadline=None)
@given(which=st.integers(0, 9), count=counts, seed=seeds)
def test_folding_undoes_inactive_units(name, which, count, seed):
    model, probe, layers = case(name)
    before = snapshot(model)
    layer = (able := compensating(name, layers))[which % len(able)]
    w, v = random_units(model, layer, count, seed)
    wide = inactive_units(model, layer, w[:, 0], v, probe)
    found = growable(wide, probe)
    assert widths(found) == widths(layers) | {layer.name: layer.width + count}
    assert_same_function(model, wide, probe)
    before_reduction = {key: value.clone() for key, value in wide.state_dict().items()}
    narrow, reduction = critical_reduction(wide, found, probe=probe)
    assert all(torch.equal(value, before_reduction[key]) for key, value in wide.state_dict().items())
    assert_same_function(wide, narrow, probe)
    assert_same_function(model, narrow, probe)
    assert widths(growable(narrow, probe)) == widths(layers)
    (item,) = (item for item in reduction.layers if item.layer == layer.name)
    gone = {*item.folded, *(r for group in item.merged for r in group)}
    assert gone | set(item.dropped) == set(range(layer.width, layer.width + count))
    assert_same_state(model, narrow)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", SINGLY)
@settings(max_examples=6, deadline=None)
@given(which=st.integers(0, 9), data=st.data())
def test_reduction_undoes_replications_at_once(name, which, data):
    model, probe, layers = case(name)
    before, layer = snapshot(model), layers[which % len(layers)]
    count = data.draw(st.integers(1, layer.width))
    neurons = data.draw(st.permutations(range(layer.width)))[:count]
    free = data.draw(st.lists(st.lists(st.integers(-4, 4), min_size=2, max_size=2), min_size=count, max_size=count))
    coefficients = torch.tensor([[a / 2, b / 2, 1 - (a + b) / 2] for a, b in free])
    wide = unit_replication(model, layer, neurons, coefficients)
    found = growable(wide, probe)
    assert widths(found)[layer.name] == layer.width + 2 * count
    assert_same_function(model, wide, probe)
    narrow, _ = critical_reduction(wide, found)
    assert_same_function(model, narrow, probe)
    assert widths(growable(narrow, probe)) == widths(layers)
    assert_same_state(model, narrow)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", CONSTANT)
def test_gradients_of_the_old_entries_stay_as_they_were(name):
    """And ∂L/∂w = 0 for silent neurons."""
    model, probe, layers = case(name)
    layer = compensating(name, layers)[0]
    w, v = random_units(model, layer, 2, 0)
    narrow = gradients(model, probe)
    silent = gradients(inactive_propagation(model, layer, w), probe)
    constant = gradients(inactive_units(model, layer, w[:, 0], v, probe), probe)
    old = {c.name: c.start + layer.width * c.stride for c in layer.consumers}
    for wide in (silent, constant):
        for key, gradient in narrow.items():
            kept = wide[key][tuple(slice(0, n) for n in gradient.shape)]
            module, _, field = key.rpartition(".")
            if field == "weight" and module in old:
                kept, gradient = kept[:, : old[module]], gradient[:, : old[module]]
            torch.testing.assert_close(kept, gradient, rtol=1e-9, atol=1e-12, msg=key)
    for key in (f"{name}.weight" for name in layer.producers):
        assert not silent[key][layer.width :].any()


def test_gradients_of_constant_neurons():
    """∂L/∂v = σ(β) ∂L/∂b."""
    model, probe, layers = case("mlp")
    _, v = random_units(model, layers[0], 2, 0)
    biases = torch.tensor([0.4, -1.1], dtype=torch.float64)
    wide = gradients(inactive_units(model, layers[0], biases, v, probe), probe)
    torch.testing.assert_close(wide["2.weight"][:, 6:], gradients(model, probe)["2.bias"][:, None] * biases.tanh())


@pytest.mark.parametrize("outputs", [1, 2])
@settings(max_examples=10, deadline=None)
@given(count=counts, seed=seeds)
def test_where_new_neurons_keep_a_point_stationary(outputs, count, seed):
    """Either alone leaves one gradient: v = 0 that in v, w = 0 that in w. Together they leave none."""
    model, probe, layer = two_layers(outputs)
    w, v = random_units(model, layer, count, seed)
    silent = gradients(inactive_propagation(model, layer, w), probe)
    new = silent["2.weight"][:, 4:]
    assert largest([silent["2.weight"][:, :4], silent["0.weight"], silent["0.bias"], silent["2.bias"]]) < 1e-13
    assert largest([new]) > 1e-6
    constant = gradients(inactive_units(model, layer, w[:, 0], v, probe), probe)
    assert largest([constant["2.weight"], constant["2.bias"], constant["0.bias"], constant["0.weight"][:4]]) < 1e-12
    both = gradients(inactive_units(model, layer, w[:, 0], 0 * v, probe), probe)
    assert largest(both.values()) < 1e-13
    coefficients = torch.cat([w[:, :1], 1 - w[:, :1]], 1)
    assert largest(gradients(unit_replication(model, layer, range(count), coefficients), probe).values()) < 1e-12


def test_a_constant_is_folded_exactly():
    """Linear → tanh → Linear: σ(β) v moves into the bias, to rounding; without a probe the neuron stays."""
    model, probe, layer = two_layers(2)
    with torch.no_grad():
        model[0].weight[1] = 0
    expected = model[2].bias + torch.tanh(model[0].bias[1]) * model[2].weight[:, 1]
    narrow, reduction = critical_reduction(model, [layer], probe=probe)
    torch.testing.assert_close(narrow[2].bias, expected, rtol=0, atol=1e-15)
    assert reduction.layers[0].folded == (1,)
    assert not reduction.layers[0].dropped
    assert "folded: 1" in str(reduction)
    assert_same_function(model, narrow, probe)
    assert redundancy(model, [layer]) == {"0": 0}
    assert redundancy(model, [layer], probe=probe) == {"0": 1}


def test_one_of_many_constants_stays():
    model, probe, layer = two_layers(2)
    with torch.no_grad():
        model[0].weight.zero_()
    narrow, reduction = critical_reduction(model, [layer], probe=probe)
    assert reduction.layers[0].new_width == 1
    assert reduction.layers[0].folded == (1, 2, 3)
    assert_same_function(model, narrow, probe)


@pytest.mark.parametrize(("name", "which"), [("conv+bn", 0), ("residual blocks", 1), ("conv1d", 0)])
def test_constants_that_no_bias_can_hold_stay(name, which):
    model, probe, layers = case(name)
    layer = layers[which]
    _, v = random_units(model, layer, 1, 0)
    with pytest.raises(SplitWatchError, match=r"zero padding|required a bias"):
        inactive_units(model, layer, [0.7], v, probe)
    wide = inactive_propagation(model, layer, 0 * random_units(model, layer, 1, 0)[0])
    with torch.no_grad():
        for c in layer.consumers:
            wide.get_submodule(c.name).weight[:, c.start + layer.width * c.stride :] = 0.5
        for producer in layer.producers:
            wide.get_submodule(producer).bias[-1] = 0.7
    assert redundancy(wide, growable(wide, probe), probe=probe)[layer.name] == 0


def test_a_gate_that_depends_on_the_input_is_not_constant():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(self.first(x).tanh() * x[:, :1])

    torch.manual_seed(0)
    model, x = Gated().double(), torch.randn(12, 3, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight[0] = 0
    probe = Probe([(x, torch.zeros(12, 2, dtype=torch.float64))], nn_mse)
    layers = growable(model, probe)
    assert [layer.name for layer in layers] == ["first"]
    assert redundancy(model, layers, probe=probe) == {"first": 0}
    with pytest.raises(SplitWatchError, match="depends on the input"):
        inactive_units(model, layers[0], [0.5], torch.ones(1, 2), probe)


def test_refusals_leave_the_model_alone():
    model, probe, layers = case("mlp")
    before, layer = snapshot(model), layers[0]
    w, v = random_units(model, layer, 2, 0)
    for call, words in [
        (lambda: unit_replication(model, layer, [0, 1], [(0.5, 0.5)]), "one row per neuron"),
        (lambda: unit_replication(model, layer, [1, 1], [(0.5, 0.5)] * 2), "at most once"),
        (lambda: inactive_propagation(model, layer, w[:, 1:]), "shapes"),
        (lambda: inactive_units(model, layer, [0.1], v, probe), "biases"),
        (lambda: inactive_units(model, layer, [0.1, 0.2], v[:, 1:], probe), "shapes"),
        (lambda: branch(model, layers, tolerance=-1.0), "tolerance"),
    ]:
        with pytest.raises(SplitWatchError, match=words):
            call()
    assert_untouched(model, before)
    model, _, layers = case("inverted bottleneck")
    with pytest.raises(UnsupportedLayerError, match="depthwise"):
        inactive_propagation(model, layers[0], random_units(model, layers[0], 1, 0)[0])


def test_a_folded_network_is_saved_and_loaded(tmp_path):
    model, probe, layer = two_layers(2)
    wide = inactive_units(model, layer, [0.3], torch.ones(1, 2), probe)
    narrow, _ = critical_reduction(wide, growable(wide, probe), probe=probe)
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    torch.save(narrow.state_dict(), tmp_path / "narrow.pt")
    for stored in (wide, narrow):
        path = tmp_path / ("wide.pt" if stored is wide else "narrow.pt")
        loaded = load_grown(lambda: two_layers(2)[0], path)
        assert_same_function(stored, loaded, probe, tolerance=0.0)


@settings(max_examples=20, deadline=None)
@given(count=counts, seed=seeds, split=st.sampled_from([(0.5, 0.5), (2.0, -1.0), (0.0, 0.3, 0.7)]))
def test_the_branch_counts_effective_and_silent_neurons(count, seed, split):
    model, probe, layer = two_layers()
    (narrow,) = branch(model, [layer])
    assert (narrow.effective, narrow.silent, narrow.excess_dimension) == (4, 0, 0)
    wide = unit_replication(model, layer, [2], [split])
    (found,) = growable(wide, probe)
    wide = inactive_propagation(wide, found, random_units(wide, found, count, seed)[0])
    (item,) = branch(wide, growable(wide, probe))
    k, d = len(split), 4
    assert (item.width, item.effective, item.silent) == (3 + k + count, 4, count)
    assert item.excess_dimension == (item.width - item.silent - item.effective) + item.silent * (d - 1)
    assert item.excess_dimension == k - 1 + count * (d - 1)
    assert f"C^(4,{count})" in str(item)
    assert f"N + {item.excess_dimension}" in str(item)


def test_the_branch_has_the_dimension_of_the_set_of_critical_points():
    """Replicas share out v in one way more (m − l − r); a silent w has d − 1 free directions on h(w) = 0."""
    model, probe, layer = two_layers()
    wide = unit_replication(model, layer, [0], [(1.3, -0.3)])
    (found,) = growable(wide, probe)

    def slope(w):
        """h(w) = E[e σ(w·x)], the gradient in the outgoing weight of a silent neuron."""
        return gradients(inactive_propagation(wide, found, w[None]), probe)["2.weight"][0, -1]

    torch.manual_seed(1)
    samples = torch.randn(40, 4, dtype=torch.float64)
    low, high = (next(w for w in samples if sign * slope(w) > 0) for sign in (-1, 1))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    wide = inactive_propagation(wide, found, low[None])
    assert largest(gradients(wide, probe).values()) < 1e-12
    (item,) = branch(wide, growable(wide, probe))
    assert (item.effective, item.silent, item.excess_dimension) == (4, 1, 1 + 3)
    assert flat_directions(wide, probe) - flat_directions(model, probe) == item.excess_dimension


def flat_directions(model, probe):
    """The dimension of the Hessian's kernel."""
    shapes = {key: p.shape for key, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def loss(theta):
        pieces = {key: t.view(shapes[key]) for key, t in zip(shapes, theta.split(sizes), strict=True)}
        return sum((torch.func.functional_call(model, pieces, x) - y).square().sum() for x, y in probe.half("all"))

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, theta)).abs()
    return int((values < 1e-10 * values.max()).sum())


def test_no_dimension_is_claimed_for_several_outputs():
    model, _, layer = two_layers(2)
    (item,) = branch(model, [layer])
    assert item.excess_dimension is None
    assert "not known" in str(item)


@pytest.mark.parametrize("name", SINGLY)
def test_a_checkpoint_tells_as_much_as_the_model(name, tmp_path):
    model, probe, layers = case(name)
    wide = model
    for which, layer in enumerate(layers):
        (found,) = (found for found in growable(wide, probe) if found.name == layer.name)
        wide = unit_replication(wide, found, [0, 1], [(0.3, 0.3, 0.4), (1.5, -0.5) if which else (1.0, 2.0, -2.0)])
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    holder = nn.Module()
    holder.net = wide
    torch.save({"state_dict": holder.state_dict()}, tmp_path / "wide.ckpt")
    expected = redundancy(wide, growable(wide, probe))
    assert set(expected.values()) <= {3, 4}
    for file in ("wide.pt", "wide.ckpt"):
        assert stored_redundancy(tmp_path / file) == expected
    told = {"SplitWatch": {KEY: recall(wide)}}  # the state dict was rebuilt, which loses its metadata
    torch.save({"state_dict": dict(wide.state_dict()), "callbacks": told}, tmp_path / "rebuilt.ckpt")
    assert stored_redundancy(tmp_path / "rebuilt.ckpt") == expected
    with torch.no_grad():
        wide.get_submodule(layers[0].name).weight[-1] *= 1 + 1e-4
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    assert stored_redundancy(tmp_path / "wide.pt")[layers[0].name] == expected[layers[0].name] - 1
    assert stored_redundancy(tmp_path / "wide.pt", tolerance=1e-2) == expected


def test_a_checkpoint_without_growth_tells_nothing(tmp_path):
    model, _, _ = case("mlp")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    assert stored_redundancy(tmp_path / "plain.pt") == {}
    with pytest.raises(SplitWatchError, match="tolerance"):
        stored_redundancy(tmp_path / "plain.pt", tolerance=-1.0)


class Joined(nn.Module):
    """Two hidden layers, whose neurons one consumer reads side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(7, 2)

    def forward(self, x):
        return self.c(torch.cat([self.a(x).tanh(), self.b(x).sigmoid()], -1))


def joined_and_grown():
    torch.manual_seed(0)
    model, x = Joined(), torch.randn(20, 4)
    probe = Probe([x], lambda model, x: model(x).square().mean())
    for name in "ab":
        layer = next(layer for layer in find_hidden_layers(model, probe) if layer.name == name)
        model = critical_embedding(model, layer, 0, (0.5, 0.5))
    return model, {layer.name: layer for layer in find_hidden_layers(model, probe)}


@pytest.mark.parametrize("reduced", ["a", "b", "ab"])
def test_a_checkpoint_tells_of_layers_beside_a_reduced_one(reduced, tmp_path):
    model, layers = joined_and_grown()
    small, _ = critical_reduction(model, [layers[name] for name in reduced])
    torch.save(small.state_dict(), tmp_path / "small.pt")
    assert stored_redundancy(tmp_path / "small.pt") == {name: int(name not in reduced) for name in "ab"}


class Versioned(nn.Linear):
    """A module that keeps more than tensors in a state dict."""

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        self.version = state["version"]


def test_what_modules_keep_beside_tensors_is_loaded(tmp_path):
    torch.save(nn.Sequential(Versioned(2, 2)).state_dict(), tmp_path / "extra.pt")
    assert load_grown(lambda: nn.Sequential(Versioned(2, 2)), tmp_path / "extra.pt")[0].version == 3


def test_files_that_are_no_checkpoints_are_refused_by_what_they_hold(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"act": nn.Tanh()}}, tmp_path / "classes.ckpt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    for name, match in [
        ("classes.ckpt", r"found torch.nn.modules.activation.Tanh in .*add_safe_globals"),
        ("text.pt", "a file that torch.save wrote"),
        ("empty.pt", "a file that torch.save wrote"),
        ("", "a file that torch.save wrote"),
    ]:
        with pytest.raises(SplitWatchError, match=f"path: required .*{match}"):
            load_grown(Joined, tmp_path / name)
