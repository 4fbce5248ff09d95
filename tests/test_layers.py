import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from zoo import ZOO, Experts

from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.probe import Probe
from splitwatch.records import SplitWatchError, UnsupportedLayerError

torch.set_num_threads(1)


def squares(model, batch):
    """A loss that reads every output and needs no target."""
    return model(batch[0]).square().mean()


def table(model, *shape, samples=6, data=None):
    """Hidden layers by name, of a model fed with normal (or given) data."""
    data = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0)) if data is None else data
    return {layer.name: layer for layer in find_hidden_layers(model, Probe([(data,)], squares))}


def growable(layers):
    return {name for name, layer in layers.items() if layer.growable}


class Module(nn.Module):
    """A module from its parts and a function of (self, x)."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def mlp(*middle, width=4):
    return nn.Sequential(nn.Linear(3, width), *(middle or (nn.Tanh(),)), nn.Linear(width, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_shows_exactly_its_growable_layers(name, dtype):
    case = ZOO[name]
    model, probe = case.make(dtype)
    layers = find_hidden_layers(model, probe)
    assert {layer.name for layer in layers if layer.growable} == set(case.growable)
    for layer in layers:
        if layer.growable:
            first = model.get_submodule(layer.producers[0])
            assert layer.name == layer.producers[0]
            assert layer.width == first.weight.shape[0]
            assert layer.consumers
            assert str(layer).startswith(f"{layer.name}: {layer.width} neurons")
        else:
            assert len(layer.reason) > 10
            assert layer.reason in str(layer)


@pytest.mark.parametrize("name", ZOO)
def test_nothing_with_weights_is_missing_from_the_table(name):
    model, probe = ZOO[name].make()
    layers = find_hidden_layers(model, probe)
    listed = {name for layer in layers for name in (layer.name, *layer.producers, *layer.riders)}
    holding = {
        name for name, module in model.named_modules() if any(p.ndim > 1 for p in module.parameters(recurse=False))
    }
    assert holding <= listed


def test_where_a_consumer_reads_the_neurons():
    model, probe = ZOO["concatenation"].make()
    layers = {layer.name: layer for layer in find_hidden_layers(model, probe)}
    left, right = layers["left"].consumers[0], layers["right"].consumers[0]
    assert (left.name, left.start, left.stride) == ("out", 0, 1)
    assert (right.name, right.start, right.stride) == ("out", 9, 1)
    model, probe = ZOO["flatten"].make()
    (consumer,) = find_hidden_layers(model, probe)[0].consumers
    assert (consumer.name, consumer.start, consumer.stride) == ("4", 0, 9)


def test_riders_and_both_producers_of_a_gate():
    model, probe = ZOO["inverted bottleneck"].make()
    layers = {layer.name: layer for layer in find_hidden_layers(model, probe)}
    assert layers["expand"].riders == ("depth", "norm")
    model, probe = ZOO["gated"].make()
    layers = {layer.name: layer for layer in find_hidden_layers(model, probe)}
    assert layers["gate"].producers == ("gate", "up")
    assert "up" not in layers


@pytest.mark.parametrize("outer", [F.relu, F.hardtanh, torch.tanh])
@pytest.mark.parametrize("inner", [F.relu, F.relu6, torch.sin])
def test_gates_that_are_shut_half_of_the_time(outer, inner):
    """Whatever is cut off where the data or a draw happen to be negative."""
    for seed in range(12):
        torch.manual_seed(seed)
        m, d = 1 + seed % 5, 1 + seed % 3
        parts = {"gate": nn.Linear(d, m), "up": nn.Linear(d, m, bias=False), "down": nn.Linear(m, 2)}
        model = Module(lambda self, x: self.down(outer(self.gate(x)) * inner(self.up(x))), **parts)
        assert table(model, d, samples=32)["gate"].producers == ("gate", "up")


def test_slopes_that_no_draw_meets_at_first():
    """PReLU's slopes matter on one side of zero; few samples may all be on the other one."""
    for seed in range(24):
        torch.manual_seed(seed)
        width = 3 + seed % 4
        assert table(mlp(nn.PReLU(width), width=width), 3, samples=2 + seed % 2)["0"].riders == ("1",)


# --- refusals --------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A language model whose head reads the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.embed(x))))


def frozen(model, index):
    model[index].requires_grad_(False)
    return model


def computed(model, index, change, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(model[index], *arguments)
    return model


def normed(change, *arguments):
    """A masked or parametrized BatchNorm on the path."""
    return computed(mlp(nn.BatchNorm1d(4), nn.Tanh()), 1, change, *arguments)


def stream():
    def forward(self, x):
        h = self.stem(x)
        return self.head(h + self.down(torch.tanh(self.up(h))))

    parts = {"stem": nn.Linear(3, 4), "up": nn.Linear(4, 5), "down": nn.Linear(5, 4), "head": nn.Linear(4, 2)}
    return Module(forward, **parts)


def plus_input():
    return Module(lambda self, x: self.b(torch.tanh(self.a(x)) + x), a=nn.Linear(3, 3), b=nn.Linear(3, 2))


def twice():
    return Module(
        lambda self, x: self.b(torch.tanh(self.a(torch.tanh(self.a(x))))), a=nn.Linear(3, 3), b=nn.Linear(3, 2)
    )


def shared_norm():
    def forward(self, x):
        return self.c(torch.tanh(self.norm(self.b(torch.tanh(self.norm(self.a(x)))))))

    return Module(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2), norm=nn.BatchNorm1d(4))


def functional_weight():
    model = Module(lambda self, x: F.linear(torch.tanh(self.a(x)), self.W), a=nn.Linear(3, 4))
    model.W = nn.Parameter(torch.randn(2, 4))
    return model


def functional_use():
    model = Module(lambda self, x: F.linear(torch.tanh(F.linear(x, self.a.weight * 2)), self.b.weight))
    model.a, model.b = nn.Linear(3, 4), nn.Linear(4, 2)
    return model


def attention():
    return Module(
        lambda self, x: self.head(self.attend(x, x, x)[0]), attend=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 2)
    )


def unused():
    return Module(lambda self, x: self.a(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2))


def detached():
    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) + 0 * self.c(x).detach().sum()

    return Module(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2), c=nn.Linear(3, 2))


def flipped():
    return Module(lambda self, x: self.b(torch.tanh(self.a(x)).flip(1)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))


def noisy():
    return Module(
        lambda self, x: self.b(F.dropout(torch.tanh(self.a(x)), 0.5, training=True)),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 2),
    )


def also_output():
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return torch.cat([h, self.b(h)], 1)

    return Module(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2))


def per_neuron_scale():
    model = Module(lambda self, x: self.b(torch.tanh(self.a(x)) * self.scale), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    model.scale = nn.Parameter(torch.rand(4))
    return model


def sliced():
    return Module(lambda self, x: self.b(torch.tanh(self.a(x))[:, :2]), a=nn.Linear(3, 4), b=nn.Linear(2, 2))


class LowRank(nn.Linear):
    """A linear layer with a trained correction of rank one (LoRA)."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.rand(1, inputs)), nn.Parameter(torch.rand(outputs, 1))

    def forward(self, x):
        return F.linear(F.linear(x, self.down), self.up) + super().forward(x)


class Scaled(nn.Conv1d):
    """A convolution that scales what it reads, or what it puts out, channel by channel."""

    def __init__(self, *sizes, before):
        super().__init__(*sizes)
        self.before, self.gain = before, nn.Parameter(torch.rand(sizes[not before], 1))

    def forward(self, x):
        return super().forward(x * self.gain) if self.before else super().forward(x) * self.gain


REFUSALS = {
    "layer norm in the path": (lambda: mlp(nn.LayerNorm(4), nn.Tanh()), (3,), "0", "layer_norm.* mixes the channels"),
    "group norm": (lambda: mlp(nn.GroupNorm(2, 4), nn.Tanh()), (3,), "0", "group_norm.* mixes the channels"),
    "softmax in the path": (lambda: mlp(nn.Softmax(-1)), (3,), "0", "softmax.* mixes the channels"),
    "maxout": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.MaxPool1d(2), nn.Flatten(),
                                     nn.Linear(2, 2)), (3,), "0", "mixes the channels"),
    "residual stream": (stream, (3,), "stem", "residual stream"),
    "end of a residual block": (stream, (3,), "down", "residual stream"),
    "meets the input": (plus_input, (3,), "a", "residual stream"),
    "called twice": (twice, (3,), "a", "used 2 times"),
    "before a module called twice": (twice, (3,), "a", "shared module|tied"),
    "parametrized": (lambda: computed(mlp(), 0, nn.utils.parametrizations.weight_norm), (3,), "0", "parametrized"),
    "consumer parametrized": (lambda: computed(mlp(), 2, nn.utils.parametrizations.weight_norm), (3,), "0",
                              r"\(2\).* parametrized"),
    "old weight norm": (lambda: computed(mlp(), 0, nn.utils.weight_norm), (3,), "0", "parametrized"),
    "pruned": (lambda: computed(mlp(), 0, prune.l1_unstructured, "weight", 0.5), (3,), "0", "parametrized or pruned"),
    "consumer pruned": (lambda: computed(mlp(), 2, prune.l1_unstructured, "weight", 0.5), (3,), "0", r"\(2\).* pruned"),
    "bias pruned": (lambda: computed(mlp(), 0, prune.l1_unstructured, "bias", 0.5), (3,), "0", "layer is .* pruned"),
    "consumer's bias pruned": (lambda: computed(mlp(), 2, prune.random_unstructured, "bias", 0.5), (3,), "0",
                               "consumer 2 is .* pruned"),
    "norm pruned": (lambda: normed(prune.random_unstructured, "weight", 0.5), (3,), "0", "1 is .* pruned"),
    "norm parametrized": (lambda: normed(parametrize.register_parametrization, "bias", nn.Tanh()), (3,), "0", "1|bias"),
    "spectral norm": (lambda: computed(mlp(), 0, nn.utils.parametrizations.spectral_norm), (3,), "0", "parametrized"),
    "consumer's spectral norm": (lambda: computed(mlp(), 2, nn.utils.parametrizations.spectral_norm), (3,), "0",
                                 r"\(2\).* parametrized"),
    "old spectral norm": (lambda: computed(mlp(), 0, nn.utils.spectral_norm), (3,), "0", "parametrized"),
    "frozen producer": (lambda: frozen(mlp(), 0), (3,), "0", "the layer is frozen"),
    "frozen consumer": (lambda: frozen(mlp(), 2), (3,), "0", "consumer 2 is frozen"),
    "output": (mlp, (3,), "2", "output layer"),
    "also an output": (also_output, (3,), "a", "output layer"),
    "unused": (unused, (3,), "b", "the loss does not use it"),
    "detached": (detached, (3,), "c", "does not depend on it|output layer"),
    "functional weight": (functional_weight, (3,), "a", "not a plain module's"),
    "functional use": (functional_use, (3,), "a", "used functionally"),
    "scripted activation": (lambda: mlp(torch.jit.script(nn.Softsign())), (3,), "0", "scripted"),
    "recurrent": (lambda: Module(lambda self, x: self.a(x)[0], a=nn.LSTM(3, 4)), (2, 3), "a", "LSTM is not a layer"),
    "multi-head attention": (attention, (2, 4), "attend", "MultiheadAttention is not a layer type"),
    "batch norm shared by two layers": (shared_norm, (3,), "a", "norm.*shared"),
    "order reversed": (flipped, (3,), "a", "order that cannot be widened"),
    "read in part": (sliced, (3,), "a", "b reads some of the neurons only"),
    "a second matrix": (lambda: nn.Sequential(LowRank(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,), "0",
                        "not a plain module's"),
    "a consumer's second matrix": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), LowRank(4, 2)), (3,), "0",
                                   "not a plain module's"),
    "a convolution's own scale": (lambda: nn.Sequential(Scaled(3, 4, 1, before=False), nn.Conv1d(4, 2, 1)), (3, 5), "0",
                                  "0 holds one entry per neuron and cannot be widened"),
    "a consumer's own scale": (lambda: nn.Sequential(nn.Conv1d(3, 4, 1), Scaled(4, 2, 1, before=True)), (3, 5), "0",
                               "1 holds one entry per neuron and cannot be widened"),
    "random in eval mode": (noisy, (3,), "a", "cannot be replayed|dropout"),
    "one number per neuron": (per_neuron_scale, (3,), "a", "one entry per neuron"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_the_reason(name):
    build, shape, layer, reason = REFUSALS[name]
    torch.manual_seed(0)
    layers = table(build(), *shape)
    assert not layers[layer].growable
    with pytest.raises(UnsupportedLayerError, match=rf"{layer}: cannot be widened: .*({reason})"):
        select_layers(layers.values(), [layer])


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_penalty_is_named_and_what_is_only_logged_is_not(parameter):
    """A penalty makes splits change the loss, so it refuses the layer; a norm that nothing reads does not."""

    def loss(model, x, factor):
        norm = getattr(model[0], parameter).square().sum()
        return model(x).square().mean() + (factor * norm if factor else 0)

    torch.manual_seed(0)
    model, x = mlp(), torch.randn(6, 3)
    penalised, logged = (find_hidden_layers(model, Probe([x], partial(loss, factor=f)))[0] for f in (0.1, 0))
    assert "square reads too, as penalties do" in penalised.reason
    assert logged.growable


def test_tied_head_and_embedding_are_refused():
    torch.manual_seed(0)
    layers = table(Tied(), data=torch.arange(6).reshape(6, 1))
    assert "Embedding is not a layer type" in layers["embed"].reason
    assert "tied weights" in layers["head"].reason
    assert "embed" in layers["inner"].reason
    assert not growable(layers)


def test_a_functional_weight_is_listed_by_the_module_that_owns_it():
    layers = table(functional_weight(), 3)
    assert not growable(layers)
    assert {"", "a"} <= set(layers)


def test_a_quantised_layer_is_listed_with_the_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = pytest.importorskip("torch.ao.nn.quantized.dynamic")
        try:
            quantised = dynamic.Linear(4, 4)
        except RuntimeError:
            pytest.skip("this build of torch has no quantised kernels")
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), quantised, nn.Tanh(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = torch.randn(6, 3)
        layers = find_hidden_layers(model, Probe([data], lambda m, x: m(x).square().mean()))
    reasons = {layer.name: layer.reason for layer in layers}
    assert "quantised" in reasons["2"]
    assert reasons["0"]


# --- what must not stand in the way ----------------------------------------------------------------------------------


def branch():
    def forward(self, x):
        h = self.a(x)
        h = torch.tanh(h) if float(h.detach().sum()) > 0 else F.gelu(h)
        for _ in range(int(x.shape[0] > 2)):
            h = h * 2
        return self.b(h)

    return Module(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2))


def silent_channels():
    """BatchNorm weights that are zero, in the middle and elsewhere."""
    model = mlp(nn.BatchNorm1d(4), nn.Tanh())
    with torch.no_grad():
        model[1].weight[2:] = 0
    return model


def dead():
    model = mlp(nn.ReLU())
    nn.init.constant_(model[0].bias, -100.0)
    return model


def tensor_method():
    return Module(
        lambda self, x: self.b(self.a(x).tanh_().mul(0.5).clamp(min=-0.3)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    )


FOUND = {
    "inplace relu": (lambda: mlp(nn.ReLU(inplace=True)), (3,), {"0"}),
    "inplace after batch norm": (lambda: mlp(nn.BatchNorm1d(4), nn.LeakyReLU(inplace=True)), (3,), {"0"}),
    "in-place tensor methods": (tensor_method, (3,), {"a"}),
    "data-dependent control flow": (branch, (3,), {"a"}),
    "dropout": (lambda: mlp(nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.1)), (3,), {"0"}),
    "dead": (dead, (3,), {"0"}),
    "width one": (lambda: mlp(width=1), (3,), {"0"}),
    "width one with batch norm": (lambda: mlp(nn.BatchNorm1d(1), nn.Tanh(), width=1), (3,), {"0"}),
    "width two": (lambda: mlp(width=2), (3,), {"0"}),
    "no activation": (lambda: mlp(nn.Identity()), (3,), {"0"}),
    "one parameter for all": (lambda: mlp(nn.PReLU()), (3,), {"0"}),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)),
        (3,),
        {"0"},
    ),
    "extra axes": (lambda: mlp(), (2, 5, 3), {"0"}),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    build, shape, expected = FOUND[name]
    torch.manual_seed(0)
    assert growable(table(build(), *shape)) == expected


def test_a_rider_with_silent_channels_is_still_a_rider():
    assert table(silent_channels(), 3)["0"].riders == ("1",)


def test_zero_weights_are_still_found():
    model = mlp()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert growable(table(model, 3)) == {"0"}


def test_a_layer_that_reads_zeros_is_still_found():
    assert growable(table(mlp(nn.ReLU()), data=torch.zeros(6, 3))) == {"0"}


def test_the_whole_model_may_be_in_eval_mode_or_compiled_into_a_wrapper():
    wrapped = nn.ModuleDict({"net": mlp()}).eval()
    layers = find_hidden_layers(wrapped, Probe([torch.randn(6, 3)], lambda m, x: m["net"](x).square().mean()))
    assert {layer.name for layer in layers if layer.growable} == {"net.0"}
    assert not wrapped.training


def test_a_name_that_does_not_exist_is_named():
    layers = table(mlp(), 3).values()
    with pytest.raises(SplitWatchError, match=r"layers: .*'nowhere'.*choose from 0, 2"):
        select_layers(layers, ["nowhere"])
    assert [layer.name for layer in select_layers(layers, None)] == ["0"]


def test_the_batchs_samples_do_not_change_what_is_found():
    torch.manual_seed(0)
    model = mlp(nn.ReLU())
    for seed in range(5):
        data = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        assert growable(table(copy.deepcopy(model), data=data)) == {"0"}


def test_an_expert_that_the_first_batch_leaves_out_is_refused_and_others_are_not():
    model, batches = Experts(routed=True), Experts.batches()
    layers = {layer.name: layer for layer in find_hidden_layers(model, Probe(batches[::-1], scored))}
    assert layers["a"].growable
    assert "given nothing of the probe's first batch" in layers["c"].reason


def scored(model, x):
    return model(x).square().mean()
