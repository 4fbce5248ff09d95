"""Critical embedding and reduction on real modules: same function, same stationary points, and back again."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import SINGLY, ZOO

from splitwatch.growth.checkpoint import load_grown
from splitwatch.growth.embedding import critical_embedding, critical_reduction, redundancy
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.probe import Probe
from splitwatch.records import SplitWatchError, UnsupportedLayerError

PATTERNS = [(0.5, 0.5), (2.0, -1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.3, 0.7), (1.0, 1.0, -1.0), (0.6, 0.0, -0.1, 0.5)]


@functools.cache
def case(name: str):
    model, probe = ZOO[name].make()
    model.eval()
    return model, probe, select_layers(find_hidden_layers(model, probe), None)


def growable(model, probe):
    return select_layers(find_hidden_layers(model, probe), None)


def widths(layers):
    return {layer.name: layer.width for layer in layers}


def outputs(model, probe):
    with torch.no_grad():
        return torch.cat([model.eval()(x).flatten(1) for x, _ in probe.half("all")])


def assert_same_function(model, other, probe, tolerance=1e-12):
    expected = outputs(model, probe)
    assert float((outputs(other, probe) - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def snapshot(model):
    return {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}


def assert_untouched(model, before):
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is tensor and torch.equal(tensor, value) for key, (tensor, value) in before.items())
    assert not model._state_dict_hooks and not model._load_state_dict_pre_hooks


moves = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.sampled_from(PATTERNS)), min_size=1, max_size=3)


@pytest.mark.parametrize("name", SINGLY)
@settings(max_examples=6, deadline=None)
@given(moves=moves)
def test_reduction_undoes_embedding(name, moves):
    model, probe, layers = case(name)
    before, wide, found = snapshot(model), model, layers
    for which, neuron, coefficients in moves:
        layer = found[which % len(found)]
        wide = critical_embedding(wide, layer, neuron % layer.width, coefficients)
        found = growable(wide, probe)
    assert sum(widths(found).values()) == sum(widths(layers).values()) + sum(len(c) - 1 for _, _, c in moves)
    assert_same_function(model, wide, probe)
    narrow, reduction = critical_reduction(wide, found)
    assert_same_function(model, narrow, probe)
    assert widths(growable(narrow, probe)) == widths(layers)
    for item in reduction.layers:
        lost = sum(len(group) - 1 for group in item.merged) + len(item.dropped)
        assert item.old_width - item.new_width == lost
        assert item.layer in str(reduction)
    for (key, old), new in zip(model.state_dict().items(), narrow.state_dict().values(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12, msg=key)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", SINGLY)
def test_every_copy_has_its_share_of_the_outgoing_weights(name):
    model, _, layers = case(name)
    coefficients = (0.0, 1.7, -0.7)
    for layer in layers:
        wide = critical_embedding(model, layer, 1, coefficients)
        for consumer in layer.consumers:
            old, new = (m.get_submodule(consumer.name).weight.detach() for m in (model, wide))
            s = consumer.stride
            v = old[:, consumer.start + s : consumer.start + 2 * s]
            places = [1, layer.width, layer.width + 1]
            for place, share in zip(places, coefficients, strict=True):
                start = consumer.start + place * s
                got = new[: len(old), start : start + s]
                assert torch.equal(got, 0 * v) if share == 0 else torch.allclose(got, share * v, atol=1e-14)


@pytest.mark.parametrize("name", SINGLY)
def test_neurons_nobody_reads_are_dropped(name):
    model, probe, layers = case(name)
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers:
            for c in layer.consumers:
                silenced.get_submodule(c.name).weight[:, c.start + c.stride : c.start + 2 * c.stride] = 0
    narrow, reduction = critical_reduction(silenced, growable(silenced, probe))
    assert_same_function(silenced, narrow, probe)
    assert all(item.dropped == (1,) and not item.merged for item in reduction.layers)
    assert redundancy(silenced, growable(silenced, probe)) == dict.fromkeys(widths(layers), 1)


@pytest.mark.parametrize("name", SINGLY)
def test_one_neuron_always_stays(name):
    model, probe, layers = case(name)
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers:
            for c in layer.consumers:
                silenced.get_submodule(c.name).weight[:, c.start : c.start + layer.width * c.stride] = 0
    narrow, reduction = critical_reduction(silenced, growable(silenced, probe))
    assert {item.new_width for item in reduction.layers} == {1}
    assert_same_function(silenced, narrow, probe)


def test_gradients_are_shared_out_by_the_coefficients():
    """∂L/∂w_j = λ_j ∂L/∂w and ∂L/∂v_j = ∂L/∂v, so a wide point is stationary where the narrow one is."""
    model, probe, layers = case("mlp")
    coefficients = (0.0, 1.5, -0.5)
    wide = critical_embedding(model, layers[0], 2, coefficients)
    narrow_grad, wide_grad = (gradients(m, probe) for m in (model, wide))
    assert all(torch.allclose(wide_grad[key], narrow_grad[key], atol=1e-14) for key in ("2.bias", "5.weight", "5.bias"))
    for place, share in zip((2, 6, 7), coefficients, strict=True):
        torch.testing.assert_close(wide_grad["0.weight"][place], share * narrow_grad["0.weight"][2])
        torch.testing.assert_close(wide_grad["2.weight"][:, place], narrow_grad["2.weight"][:, 2])


@pytest.mark.parametrize("coefficients", PATTERNS)
def test_wide_points_are_stationary_where_narrow_ones_are(coefficients):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    probe = stationary_probe(model, x)
    (layer,) = growable(model, probe)
    assert max(float(g.abs().max()) for g in gradients(model, probe).values()) < 1e-13
    for neuron in range(4):
        wide = critical_embedding(model, layer, neuron, coefficients)
        assert max(float(g.abs().max()) for g in gradients(wide, probe).values()) < 1e-13


def stationary_probe(model, x):
    """Targets that make the model's point stationary, its residual in the kernel of the output's Jacobian."""
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    outputs = model(x).detach()
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, x))(parameters)
    J = torch.cat([block.flatten(2) for block in jacobian.values()], dim=2).flatten(0, 1)
    kernel = torch.linalg.svd(J.T).Vh[torch.linalg.matrix_rank(J) :]
    residual = (kernel.T @ torch.randn(len(kernel), dtype=J.dtype)).reshape(outputs.shape)
    return Probe([(x, outputs - residual)], nn_mse)


def nn_mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def gradients(model, probe):
    loss = sum(probe.loss_fn(model.eval(), batch) * len(batch[0]) for batch in probe.half("all")) / probe.samples()
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def test_redundancy_that_only_shows_after_another_layer_shrank():
    """Neurons 0 and 1 of the second layer read two replicas differently, and the replicas together alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(10, 2, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[2].weight[1] = model[2].weight[0] + torch.tensor([0.25, -0.25, 0.0])
        model[2].bias[1] = model[2].bias[0]
    probe = Probe([(x, torch.zeros(10, 2, dtype=torch.float64))], nn_mse)
    narrow, reduction = critical_reduction(model, growable(model, probe))
    assert [(item.new_width, item.merged) for item in reduction.layers] == [(2, ((0, 1),)), (2, ((0, 1),))]
    assert_same_function(model, narrow, probe)


def test_replicas_that_cancel_are_dropped_together():
    model, probe, layers = case("mlp")
    wide = critical_embedding(model, layers[0], 0, (0.5, 0.5))
    with torch.no_grad():
        wide[2].weight[:, 6] = -wide[2].weight[:, 0]
    narrow, reduction = critical_reduction(wide, growable(wide, probe))
    assert reduction.layers[0].dropped == (0, 6) and reduction.layers[0].new_width == 5
    assert_same_function(wide, narrow, probe)


def test_replicas_with_other_batchnorm_entries_are_kept_apart():
    model, probe, layers = case("conv+bn")
    for attribute in ("weight", "bias", "running_mean", "running_var"):
        wide = critical_embedding(model, layers[0], 0, (0.5, 0.5))
        with torch.no_grad():
            getattr(wide[1], attribute)[4] *= 1.001
        assert redundancy(wide, growable(wide, probe)) == {"0": 0, "4": 0}
        assert redundancy(wide, growable(wide, probe), tolerance=1e-2) == {"0": 1, "4": 0}


def test_a_reduced_network_is_saved_and_loaded(tmp_path):
    model, probe, layers = case("concatenation")
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        silenced.out.weight[:, [0, 10]] = 0
    narrow, _ = critical_reduction(silenced, layers)
    torch.save(narrow.state_dict(), tmp_path / "narrow.pt")
    loaded = load_grown(lambda: ZOO["concatenation"].build().double(), tmp_path / "narrow.pt")
    assert loaded.out.in_features == 10
    assert_same_function(narrow, loaded, probe, tolerance=0.0)


def test_refusals_leave_the_model_alone():
    model, probe, layers = case("mlp")
    before = snapshot(model)
    with pytest.raises(SplitWatchError, match="sum to 1"):
        critical_embedding(model, layers[0], 0, (0.5, 0.6))
    with pytest.raises(SplitWatchError, match="0 … 5"):
        critical_embedding(model, layers[0], 6, (0.5, 0.5))
    output = find_hidden_layers(model, probe)[-1]
    with pytest.raises(UnsupportedLayerError, match="output layer"):
        critical_embedding(model, output, 0, (0.5, 0.5))
    with pytest.raises(SplitWatchError, match="find them again"):
        critical_reduction(critical_embedding(model, layers[0], 0, (0.5, 0.5)), layers)
    with pytest.raises(SplitWatchError, match="tolerance"):
        critical_reduction(model, layers, tolerance=-1.0)
    assert_untouched(model, before)
