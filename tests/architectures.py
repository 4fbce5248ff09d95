"""Hypothesis strategies: small networks put together at random, plans for them, and optimizers that train them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import nn, optim
from zoo import Wiggle, mse

from splitwatch import GrowthPlan, Probe, Split, Sprout, find_hidden_layers
from splitwatch.geometry.dense import layer_curvature

widths, booleans = st.integers(1, 5), st.booleans()
activations = st.sampled_from([nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.ReLU, nn.Mish, Wiggle, nn.PReLU])


def activation(draw, width):
    kind = draw(activations)
    return kind(width) if kind is nn.PReLU else kind()


def mlp(draw):
    sizes = draw(st.lists(widths, min_size=3, max_size=5))
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=draw(booleans)), activation(draw, outputs)]
    return nn.Sequential(*layers[:-1]), (sizes[0],)


def convolutional(draw):
    """Convolutions of one or two dimensions, normalised and pooled or not, and a linear layer on top."""
    d = draw(st.sampled_from([1, 2]))
    conv, norm, average, largest = (getattr(nn, f"{name}{d}d") for name in ("Conv", "BatchNorm", "AvgPool", "MaxPool"))
    channels = draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    layers = []
    for inputs, outputs in pairwise(channels):
        kernel, stride = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
        mode = draw(st.sampled_from(["zeros", "circular"]))
        layers.append(conv(inputs, outputs, kernel, stride, kernel // 2, bias=draw(booleans), padding_mode=mode))
        if draw(booleans):
            layers.append(norm(outputs, affine=draw(booleans)))
        layers.append(activation(draw, outputs))
        layers += [pool(2, 1, 1)] if (pool := draw(st.sampled_from([None, average, largest]))) else []
    shape = (channels[0], *[6] * d)
    features = nn.Sequential(*layers, nn.Flatten())
    count = features.eval()(torch.zeros(2, *shape)).shape[1]
    return features.append(nn.Linear(count, draw(widths), bias=draw(booleans))), shape


class Gated(nn.Module):
    def __init__(self, draw):
        super().__init__()
        width, outside = draw(widths), draw(st.integers(2, 4))
        self.gate = nn.Linear(outside, width, bias=draw(booleans))
        self.up, self.down = nn.Linear(outside, width, bias=draw(booleans)), nn.Linear(width, outside)
        self.act, self.norm = activation(draw, width), nn.LayerNorm(outside) if draw(booleans) else nn.Identity()
        self.shape = 3, outside

    def forward(self, x):
        y = self.norm(x).flatten(0, 1)
        return x + self.down(self.act(self.gate(y)) * self.up(y)).view_as(x)


class Consumers(nn.Module):
    """Two trunks side by side, read by heads of which some read both."""

    def __init__(self, draw):
        super().__init__()
        inputs, left, right = draw(widths), draw(widths), draw(widths)
        self.left, self.right = nn.Linear(inputs, left, bias=draw(booleans)), nn.Linear(inputs, right)
        self.acts = nn.ModuleList([activation(draw, left), activation(draw, right)])
        self.heads = nn.ModuleList(nn.Linear(left + inputs + right, n) for n in draw(st.lists(widths, max_size=2)))
        self.own, self.shape = nn.Linear(left, draw(widths), bias=draw(booleans)), (inputs,)

    def forward(self, x):
        left, right = self.acts[0](self.left(x)), self.acts[1](self.right(x))
        both = torch.cat([left, x, right], -1)
        return torch.cat([self.own(left), *(head(both) for head in self.heads)], -1)


def transformer(draw):
    kind, normed = draw(st.sampled_from(["relu", "gelu"])), draw(booleans)
    settings = {"batch_first": True, "activation": kind, "norm_first": normed, "bias": draw(booleans), "dropout": 0.0}
    layers = [nn.TransformerEncoderLayer(4, 2, draw(widths), **settings) for _ in range(draw(st.integers(1, 2)))]
    return nn.Sequential(*layers), (3, 4)


def by_class(kind):
    def build(draw):
        model = kind(draw)
        return model, model.shape

    return build


BUILDERS = {
    "mlp": mlp, "convolutional": convolutional, "gated": by_class(Gated), "consumers": by_class(Consumers),
    "transformer": transformer,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, a probe for it, and moves in some of its layers."""

    model: nn.Module
    probe: Probe
    plan: GrowthPlan

    def __repr__(self):
        return "\n".join(map(str, (self.model, self.model.training, *self.plan.layers, self.plan)))


@st.composite
def cases(draw, kind):
    torch.manual_seed(draw(st.integers(0, 99)))
    model, shape = BUILDERS[kind](draw)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    model.to(dtype).train(draw(booleans))
    if len(shape) == 3 and draw(booleans):
        model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    data = torch.randn(10, *shape, dtype=dtype)
    target = torch.randn_like(model(data).detach())
    probe = Probe(list(zip(data.split([6, 4]), target.split([6, 4]), strict=True)), mse)
    return Case(model, probe, draw(plans(model, probe)))


@st.composite
def plans(draw, model, probe):
    """Splits and sprouts in one or several layers."""
    layers = tuple(layer for layer in find_hidden_layers(model, probe) if layer.growable)
    if not layers:
        return GrowthPlan((), (), "nothing can be widened")
    moves = []
    for layer in draw(st.lists(st.sampled_from(layers), min_size=1, unique=True)):
        sizes = layer_curvature(model, layer, probe)
        neurons = draw(st.lists(st.integers(0, layer.width - 1), unique=True, max_size=3))
        moves += [split(draw, layer, r, sizes.d, sizes.c) for r in neurons]
        for _ in range(draw(st.integers(not neurons, 2))):
            moves.append(sprout(draw, model, layer, sizes.d, sizes.c))
    return GrowthPlan(layers, tuple(draw(st.permutations(moves))), "at random")


def split(draw, layer, neuron, d, c):
    free = draw(st.lists(st.integers(-8, 12), min_size=1, max_size=3))
    coefficients = (*(n / 7 for n in free), 1 - sum(n / 7 for n in free))
    k = len(coefficients)
    return Split(layer.name, neuron, coefficients, torch.randn(k, d) / 3, torch.randn(k, c) / 3, 0.0)


def sprout(draw, model, layer, d, c):
    rank = draw(st.integers(0, 3))
    others = (torch.randn(layer.width, rank) / 3, torch.randn(rank, c)) if draw(booleans) else None
    consumers = [model.get_submodule(consumer.name) for consumer in layer.consumers]
    count = sum(len(consumer.bias) for consumer in consumers if consumer.bias is not None)
    biases = torch.randn(count) / 3 if count and draw(booleans) else None
    return Sprout(layer.name, torch.randn(d), torch.randn(c) / 3, others=others, biases=biases)


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, 0.05),
    "SGD nesterov": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, 0.01),
    "Adam fused": lambda p: optim.Adam(p, 0.01, fused=True),
    "AdamW amsgrad": lambda p: optim.AdamW(p, 0.01, amsgrad=True, foreach=True),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, 0.05),
    "Adadelta": lambda p: optim.Adadelta(p, 1.0),
    "Adamax": lambda p: optim.Adamax(p, 0.01),
    "NAdam": lambda p: optim.NAdam(p, 0.01),
    "RAdam": lambda p: optim.RAdam(p, 0.01),
    "Rprop": lambda p: optim.Rprop(p, 0.01),
    "ASGD": lambda p: optim.ASGD(p, 0.05),
    "Adafactor": lambda p: optim.Adafactor(p, 0.05),
    "LBFGS": lambda p: optim.LBFGS(p, 0.1, max_iter=2),
}


def one_for_all(make, parameters):
    return [make(parameters)]


def one_each_for_halves(make, parameters):
    return [make(part) for part in (parameters[::2], parameters[1::2]) if part]


def two_groups(make, parameters):
    if make is OPTIMIZERS["LBFGS"]:  # which knows one only
        return [make(parameters)]
    return [make([{"params": part} for part in (parameters[::2], parameters[1::2]) if part])]


optimizers = st.tuples(
    st.sampled_from([*OPTIMIZERS.values()]), st.sampled_from([one_for_all, one_each_for_halves, two_groups])
).map(lambda drawn: lambda model: drawn[1](drawn[0], list(model.parameters())))
