"""Compiled models, memory formats, and models that cannot be measured where they are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_precision import assert_close, numbers
from test_probe import PROBING, assert_unchanged, make, mse, picture
from torch import nn
from zoo import ZOO, Case, conv3d, conv_bn, in_turn

from splitwatch import Grower, GrowthPolicy
from splitwatch.geometry.measure import measure_geometry
from splitwatch.growth.checkpoint import make_growable
from splitwatch.growth.grow import grow
from splitwatch.growth.reduction import critical_reduction
from splitwatch.growth.stored import stored_redundancy
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, Split, SplitWatchError

# The compiler looks at everything, deprecated attributes and non-leaf gradients too.
pytestmark = pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor.*", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch.compiler.reset()


def split_first(model, probe, offset=0.0):
    """A plan that splits neuron 1 of the first layer."""
    layer = select_layers(find_hidden_layers(model, probe), None)[0]
    found = measure_geometry(model, probe, [layer])[layer.name]
    d, c = found.min_vector.shape[1], found.escape_out.shape[1]
    generator = torch.Generator().manual_seed(0)
    moved = torch.randn(d, generator=generator) * offset
    move = Split(layer.name, 1, (0.5, 0.5), torch.stack([moved, -moved]), torch.zeros(2, c), 0.0)
    return GrowthPlan((layer,), (move,), "by hand")


# --- torch.compile ---------------------------------------------------------------------------------------------------


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def every_part(model):
    for name, child in model.named_children():
        setattr(model, name, torch.compile(child, backend="eager"))
    return model


def nested(model):
    return torch.compile(every_part(model), backend="eager")


COMPILED = [whole, in_place, every_part, nested]
NETS = ["mlp", "conv+bn", "gated", "user-written activation"]


@pytest.mark.parametrize(("name", "compiled"), in_turn(NETS, COMPILED))
def test_a_compiled_model_has_the_geometry_of_the_plain_one(name, compiled):
    model, probe = ZOO[name].make(torch.float64)
    expected, rows = numbers(model, probe), find_hidden_layers(model, probe)
    model = compiled(model.eval())
    mse(model, probe.fitted[0]).backward()
    model.zero_grad()
    assert repr(find_hidden_layers(model, probe)) == repr(rows)
    assert_close(numbers(model, probe), expected, 1e-9)


@pytest.mark.parametrize("name", PROBING)
@pytest.mark.parametrize("compiled", [whole, in_place])
def test_probing_a_compiled_model_changes_nothing(name, compiled):
    model, probe = make()
    model = compiled(model)
    before = picture(model)
    PROBING[name](model, probe)
    assert_unchanged(before, model)


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_model_computes_the_widened_function(compiled):
    model, probe = ZOO["mlp"].make(torch.float64)
    plain = copy.deepcopy(model)
    model = compiled(model)
    optimizer, other = (torch.optim.Adam(net.parameters()) for net in (model, plain))
    x, y = probe.fitted[0]
    model.eval(), plain.eval()
    for net, own in ((model, optimizer), (plain, other)):
        mse(net, (x, y)).backward()
        own.step()
    event = grow(model, split_first(model, probe, 0.1), optimizer, probe=probe)
    grow(plain, split_first(plain, probe, 0.1), other, probe=probe)
    assert event.grown
    assert event.widths == {"0": (6, 7)}
    assert event.restarted == ()
    torch.testing.assert_close(model(x), plain(x))
    for net, own in ((model, optimizer), (plain, other)):
        own.zero_grad()
        mse(net, (x, y)).backward()
        own.step()
    torch.testing.assert_close(model(x), plain(x))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.slow
def test_inductor_code_is_made_again_after_growth():
    model, probe = ZOO["mlp"].make(torch.float32)
    model = torch.compile(model.eval())
    x = probe.fitted[0][0]
    try:
        model(x)
    except Exception as error:  # no compiler on this machine
        pytest.skip(f"inductor does not work here: {type(error).__name__}")
    grow(model, split_first(model, probe, 0.1), probe=probe)
    torch.testing.assert_close(model(x), model._orig_mod(x))
    assert model._orig_mod[0].out_features == 7


@pytest.mark.parametrize("reset", [False, True])
def test_a_compiled_model_stays_compiled_through_many_growths_where_the_count_starts_anew(reset):
    model, probe = ZOO["mlp"].make(torch.float32)
    x, runs = probe.fitted[0][0], []

    def backend(graph, inputs):
        return lambda *arguments: runs.append(graph) or graph(*arguments)

    model = torch.compile(model.eval(), backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=3):
        for _ in range(5):
            grow(model, split_first(model, probe), probe=probe)
            if reset:
                torch.compiler.reset()
            runs.clear()
            torch.testing.assert_close(model(x), model._orig_mod(x))
    assert bool(runs) == reset  # after the limit torch runs the code uncompiled, without a word


@pytest.mark.parametrize("compiled", COMPILED)
def test_checkpoints_of_compiled_models_cross_widths(compiled, tmp_path):
    model, probe = ZOO["mlp"].make(torch.float64)
    narrow = compiled(copy.deepcopy(model))
    wide = compiled(model)
    grow(wide, split_first(wide, probe), probe=probe)
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    make_growable(narrow)
    narrow.load_state_dict(torch.load(tmp_path / "wide.pt", weights_only=True))
    x = probe.fitted[0][0]
    torch.testing.assert_close(narrow.eval()(x), wide.eval()(x))
    assert stored_redundancy(tmp_path / "wide.pt") == {"0": 1}
    reduced, _ = critical_reduction(wide, find_hidden_layers(wide, probe), probe=probe)
    torch.testing.assert_close(reduced.eval()(x), wide(x))


def test_the_grower_of_a_compiled_model():
    torch.manual_seed(0)
    x = torch.randn(256, 2)
    y = torch.sin(3 * x[:, :1])
    model = whole(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, mse, GrowthPolicy(window=50, max_events=1), progress=False)
    for _ in range(800):
        rows = torch.randint(256, (64,))
        optimizer.zero_grad()
        loss = mse(model, (x[rows], y[rows]))
        loss.backward()
        optimizer.step()
        grower.step((x[rows], y[rows]), loss)
    (event,) = [event for event in grower.events if event.grown]
    assert set(event.widths) == {"0"}
    assert event.drift < 1e-6
    assert model._orig_mod[0].out_features > 2


# --- channels last ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv+bn", "residual blocks", "inverted bottleneck", "flatten", "conv3d"])
def test_channels_last_has_the_geometry_of_contiguous(name):
    memory_format = torch.channels_last_3d if name == "conv3d" else torch.channels_last
    model, probe = ZOO[name].make(torch.float64)
    expected = numbers(model, probe)
    model.to(memory_format=memory_format)
    last = copy.copy(probe)
    for half in ("fitted", "held_out"):
        batches = tuple((x.contiguous(memory_format=memory_format), y) for x, y in probe.half(half))
        setattr(last, half, batches)
    assert_close(numbers(model, last), expected, 1e-9)


def layouts(model):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return {
        name: p.is_contiguous(memory_format=formats[p.ndim]) and not p.is_contiguous()
        for name, p in model.named_parameters()
        if p.ndim in formats and p.shape[1] > 1 and p[0, 0].numel() > 1
    }


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("case", [Case(conv_bn, (2, 8, 8), ()), Case(conv3d, (1, 5, 5, 5), ())])
def test_growth_keeps_the_memory_format(case, last):
    model, probe = case.make(torch.float32)
    if last:
        model.to(memory_format=torch.channels_last if case.build is conv_bn else torch.channels_last_3d)
    optimizer = torch.optim.Adam(model.parameters())
    mse(model, probe.fitted[0]).backward()
    optimizer.step()
    before = layouts(model)
    assert set(before.values()) == {last}
    event = grow(model, split_first(model, probe), optimizer, probe=probe)
    assert event.drift < 1e-6
    assert layouts(model) == before
    for p in model.parameters():
        assert p.grad.stride() == optimizer.state[p]["exp_avg"].stride() == p.stride()


# --- models that cannot be measured ----------------------------------------------------------------------------------


def refused(model, probe, match):
    for action in (find_hidden_layers, measure_geometry, lambda m, p: p.loss(m), lambda m, p: list(p.gradients(m))):
        with pytest.raises(SplitWatchError, match=match):
            action(model, probe)


PROBE = Probe([torch.randn(4, 3), torch.randn(4, 3)], lambda m, x: m(x).square().mean())


def test_parameters_without_values():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, device="meta"))
    refused(model, PROBE, r"model: required parameters with values, found 2.weight on the meta device; use .*to_empty")


def test_lazy_parameters():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
    refused(model, PROBE, r"model: required parameters with values, found 0.weight uninitialised; run the model")


def test_parameters_on_several_devices(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    class Elsewhere(nn.Parameter):
        device = torch.device("cuda:1")

    model[2].weight = Elsewhere(torch.randn(2, 4))
    refused(
        model,
        PROBE,
        r"model: required parameters on one device, found cpu \(0.weight\), cuda:1 \(2.weight\); move .*model.to",
    )


class ComplexNet(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.c = nn.Linear(3, 4, dtype=torch.complex64)
        self.d = nn.Linear(4, 2, dtype=torch.complex64)
        self.seen = seen

    def forward(self, x):
        out = self.b(torch.tanh(self.a(x)))
        z = self.c(x.to(torch.complex64))
        return out + (self.d(z * z).abs() if self.seen else 0)


@pytest.mark.parametrize("seen", [True, False])
def test_complex_layers_are_left_alone(seen):
    torch.manual_seed(0)
    model = ComplexNet(seen)
    rows = {row.name: row for row in find_hidden_layers(model, PROBE)}
    assert [name for name, row in rows.items() if row.growable] == ["a"]
    assert not seen or "complex weights" in rows["c"].reason
    assert set(measure_geometry(model, PROBE)) == {"a"}
    gradients = [gradient for gradient, _ in PROBE.gradients(model)]
    assert not gradients[0].is_complex()
    assert len(gradients[0]) == sum(p.numel() * (1 + p.is_complex()) for p in model.parameters())


class Packed(nn.Module):
    """A layer with integer weights, as quantising libraries make them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-8, 8, (4, 3), dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x):
        return F.linear(x, self.weight.float() * self.scale[:, None])


def test_integer_weights_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(Packed(), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    rows = {row.name: row for row in find_hidden_layers(model, PROBE)}
    assert [name for name, row in rows.items() if row.growable] == ["2"]
    assert "Packed is not a layer type that can be widened" in rows["0"].reason
    assert set(measure_geometry(model, PROBE)) == {"2"}
