import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev
from zoo import ZOO, mse

from splitwatch.geometry.dense import coupling, inner_hessian, layer_curvature
from splitwatch.geometry.measure import measure_geometry
from splitwatch.layers import find_hidden_layers
from splitwatch.probe import Probe
from splitwatch.records import SplitWatchError, UnsupportedLayerError

torch.set_num_threads(1)


def hidden_layers(model, probe):
    return [layer for layer in find_hidden_layers(model, probe) if layer.growable]


def calls_of(model, names, run):
    """Inputs and outputs of some modules during ``run()``, by plain forward hooks."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.__setitem__(name, (inputs[0], output))
        )
        for name in names
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def read_by(weight, consumer, groups, m):
    """What a consumer's weight (o, i/groups, …) reads m neurons with, (m, o/groups, stride, …)."""
    inside, outputs = weight.shape[1], len(weight) // groups
    columns = [weight[j // inside * outputs :][:outputs, j % inside] for j in range(inside * groups)]
    used = torch.stack(columns)[consumer.start : consumer.start + m * consumer.stride]
    return used.unflatten(0, (m, consumer.stride)).movedim(2, 1)


class Linearised:
    """φ = Σ ⟨e, y(W, V)⟩ of one batch: the consumers' outputs against their fixed output gradients.

    Everything that is not the layer's own is fixed: a consumer sees its recorded input plus the change that the
    producers' weights make to the part that reads the layer. That is the forward pass itself as long as the producers'
    inputs are fixed, which holds where no consumer feeds a producer back.
    """

    def __init__(self, model, layer, batch):
        self.model, self.layer, self.batch = model.eval(), layer, batch
        self.consumers = [consumer.name for consumer in layer.consumers]
        losses = []
        seen = calls_of(model, self.consumers, lambda: losses.append(mse(model, batch)))
        outputs = [seen[name][1] for name in self.consumers]
        self.signals = [signal.detach() for signal in torch.autograd.grad(losses[0], outputs)]
        parts = [*layer.producers, *self.consumers]
        self.parameters = {
            f"{name}.{key}": p.detach() for name in parts for key, p in model.get_submodule(name).named_parameters()
        }

    def __call__(self, parameters):
        run = lambda: functional_call(self.model, self.parameters | parameters, (self.batch[0],))  # noqa: E731
        seen = calls_of(self.model, self.consumers, run)
        return sum((e * seen[name][1]).sum() for e, name in zip(self.signals, self.consumers, strict=True))

    def incoming(self):
        keys = [f"{name}.{key}" for name in self.layer.producers for key in ("weight", "bias")]
        return [key for key in keys if key in self.parameters]

    def rows(self):
        """The incoming weights, one row a neuron: (m, d)."""
        return torch.cat([self.parameters[key].reshape(self.layer.width, -1) for key in self.incoming()], 1)

    def hessian(self):
        """∂²φ/∂W∂W, (m, d, m, d)."""
        return jacrev(grad(lambda w: self(self._unpacked(w))))(self.rows()).detach()

    def mixed(self):
        """∂²φ/∂V∂W in the columns that read the neurons, (m, c, m, d)."""
        m, w, blocks = self.layer.width, self.rows(), []
        for consumer in self.layer.consumers:
            key = f"{consumer.name}.weight"

            def phi_v(v, w, key=key):
                return self({key: v, **self._unpacked(w)})

            both = jacrev(grad(phi_v), argnums=1)(self.parameters[key], w)  # (o, i, *k, m, d)
            groups = getattr(self.model.get_submodule(consumer.name), "groups", 1)
            blocks.append(read_by(both, consumer, groups, m).reshape(m, -1, *w.shape))
        return torch.cat(blocks, 1).detach()

    def _unpacked(self, w):
        keys = self.incoming()
        shapes = [self.parameters[key].shape for key in keys]
        parts = w.split([shape[1:].numel() for shape in shapes], 1)
        return {key: part.reshape(shape) for key, part, shape in zip(keys, parts, shapes, strict=True)}


def weighted(values, batches):
    sizes = [len(batch[0]) for batch in batches]
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def of_neurons(block):
    """The diagonal of (m, a, m, b) over neurons, and what is off it."""
    m = len(block)
    index = torch.arange(m)
    off = block.clone()
    off[index, :, index] = 0
    return block[index, :, index], off


def assert_close(found, expected, tolerance=1e-10):
    scale = expected.abs().max()
    assert scale > 0
    assert float((found - expected).abs().max() / scale) <= tolerance


LAYERS = [(name, layer) for name, case in ZOO.items() for layer in case.growable]


@pytest.mark.parametrize(("name", "layer_name"), LAYERS)
def test_products_equal_the_dense_derivatives_of_the_linearised_loss(name, layer_name):
    model, probe = ZOO[name].make(samples=5, batches=3)
    layer = next(layer for layer in hidden_layers(model, probe) if layer.name == layer_name)
    for half, batches in (("fitted", probe.fitted), ("held_out", probe.held_out), ("all", probe.half("all"))):
        losses = [Linearised(model, layer, batch) for batch in batches]
        hessian, off = of_neurons(weighted([loss.hessian() for loss in losses], batches))
        assert off.abs().max() <= 1e-12 * hessian.abs().max()  # φ is a sum over neurons
        assert_close(inner_hessian(model, layer, probe, half=half), hessian)
        mixed, off = of_neurons(weighted([loss.mixed() for loss in losses], batches))
        assert off.abs().max() <= 1e-12 * mixed.abs().max()
        assert_close(coupling(model, layer, probe, half=half), mixed)


def batches_of(sizes, inputs, outputs, seed=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn(n, inputs, dtype=dtype, generator=generator) for n in sizes]
    return [(x, torch.randn(len(x), outputs, dtype=dtype, generator=generator)) for x in data]


def two_layers(d, m, c, dtype=torch.float64, activation=nn.Tanh, seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, m, bias=bias), activation(), nn.Linear(m, c)).to(dtype)


def closed_form(model, batches):
    """S_r = E[(v_r·e) σ''(a) x xᵀ] and G_r = E[e σ'(a) xᵀ] for one hidden tanh layer and squared loss."""
    w, b = model[0].weight.detach(), model[0].bias.detach()
    v = model[2].weight.detach()
    x = torch.cat([batch[0] for batch in batches])
    y = torch.cat([batch[1] for batch in batches])
    a = x @ w.T + b
    tanh = (a.exp() - (-a).exp()) / (a.exp() + (-a).exp())
    first, second = 1 - tanh**2, -2 * tanh * (1 - tanh**2)
    e = 2 * (tanh @ v.T + model[2].bias.detach() - y) / y.shape[1]  # of one sample's loss: mean over outputs
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    hessian = torch.einsum("nr,nr,ni,nj->rij", e @ v, second, x, x) / len(x)
    return hessian, torch.einsum("nc,nr,ni->rci", e, first, x) / len(x)


@pytest.mark.parametrize("sizes", [(8, 2), (1, 1), (7, 3, 5, 1), (4, 4, 4)])
@pytest.mark.parametrize("outputs", [1, 3])
def test_closed_form_with_ragged_batches(sizes, outputs):
    model, batches = two_layers(4, 5, outputs), batches_of(sizes, 4, outputs)
    probe = Probe(batches, mse)
    for half in ("all", "fitted", "held_out"):
        hessian, mixed = closed_form(model, probe.half(half))
        assert_close(inner_hessian(model, "0", probe, half=half), hessian)
        assert_close(coupling(model, "0", probe, half=half), mixed)


def test_one_batch_is_cut_into_halves_that_make_up_the_whole():
    model, (batch,) = two_layers(3, 4, 2), batches_of([9], 3, 2)
    hessian, mixed = closed_form(model, [batch])
    probe = Probe([batch], mse)
    assert (probe.samples("fitted"), probe.samples("held_out")) == (5, 4)
    assert_close(inner_hessian(model, "0", probe), hessian)
    assert_close(coupling(model, "0", probe), mixed)


def test_gradient_identity_of_the_coupling():
    """v_rᵀ G_r is the loss gradient in w_r, the bias included."""
    model, batches = two_layers(4, 5, 3), batches_of([6], 4, 3)
    found = torch.einsum("rc,rcd->rd", model[2].weight.detach().T, coupling(model, "0", Probe(batches, mse)))
    grads = torch.autograd.grad(mse(model, batches[0]), [model[0].weight, model[0].bias])
    assert_close(found, torch.cat([grads[0], grads[1][:, None]], 1))


def test_some_neurons_in_the_order_asked():
    model, probe = two_layers(3, 5, 2), Probe(batches_of([4, 4], 3, 2), mse)
    whole = inner_hessian(model, "0", probe)
    torch.testing.assert_close(inner_hessian(model, "0", probe, neurons=[4, 1]), whole[[4, 1]], rtol=0, atol=0)
    with pytest.raises(SplitWatchError, match=r"neurons: required indices from 0 to 4 of 0, found \[5\]"):
        inner_hessian(model, "0", probe, neurons=[5])


@pytest.mark.parametrize("name", ZOO)
def test_symmetry_adjoint_and_per_sample_means(name):
    model, probe = ZOO[name].make(samples=5, batches=3)
    for layer in hidden_layers(model, probe):
        for half in ("fitted", "all"):
            curvature = layer_curvature(model, layer, probe, half)
            generator = torch.Generator().manual_seed(1)
            shape = layer.width, curvature.d
            a, b = (torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(2))
            v = torch.randn(layer.width, curvature.c, dtype=torch.float64, generator=generator)
            s, g = (f(model, layer, probe, half=half) for f in (inner_hessian, coupling))
            assert_close(s, s.mT, 1e-12)
            assert_close(curvature.hessian(a), torch.einsum("rij,rj->ri", s, a))
            assert_close(curvature.coupling(a), torch.einsum("rci,ri->rc", g, a))
            assert_close(curvature.coupling_adjoint(v), torch.einsum("rci,rc->ri", g, v))
            quotients = curvature.quotients(a)
            assert quotients.shape == (probe.samples(half), layer.width)
            assert_close(quotients.mean(0), torch.einsum("ri,rij,rj->r", a, s, a))
            both = curvature.quotients(b, v, kappa=0.7, gamma=0.3).mean(0)
            expected = 0.7 * torch.einsum("ri,rij,rj->r", b, s, b) + 0.6 * torch.einsum("rc,rci,ri->r", v, g, b)
            assert_close(both, expected)


def test_quotients_are_those_of_each_sample():
    model, batches = two_layers(3, 4, 2), batches_of([3, 5, 2], 3, 2)
    curvature = layer_curvature(model, "0", Probe(batches, mse), "all")
    u = torch.randn(4, 4, dtype=torch.float64)
    order = [batches[0], batches[2], batches[1]]  # the fitted half comes first
    singles = [(x[None], y[None]) for batch in order for x, y in zip(*batch, strict=True)]
    expected = torch.stack([torch.einsum("ri,rij,rj->r", u, closed_form(model, [one])[0], u) for one in singles])
    assert_close(curvature.quotients(u), expected)


@pytest.mark.parametrize("length", [3, 5, 10])
def test_means_are_right_where_the_first_axis_is_not_the_sample(length):
    """A sequence-first network: what cannot be told apart by sample is at least averaged right."""

    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = two_layers(3, 4, 2)

        def forward(self, x):
            return self.net(x.transpose(0, 1)).mean(0)

    model, generator = SequenceFirst(), torch.Generator().manual_seed(0)
    shapes = [(n, length, 3) for n in (4, 5)]
    batches = [
        (torch.randn(*shape, generator=generator).double(), torch.zeros(shape[0], 2).double()) for shape in shapes
    ]
    probe = Probe(batches, mse)
    u = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    for half in ("fitted", "held_out"):
        s = inner_hessian(model, "net.0", probe, half=half)
        quotients = layer_curvature(model, "net.0", probe, half).quotients(u)
        assert_close(quotients.mean(0), torch.einsum("ri,rij,rj->r", u, s, u))


# --- what measure_geometry says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_extremes_couplings_and_escapes_equal_dense_ones(name):
    model, probe = ZOO[name].make(samples=5)
    geometry = measure_geometry(model, probe, tolerance=1e-9)
    assert set(geometry) == set(ZOO[name].growable)
    for layer in hidden_layers(model, probe):
        found = geometry[layer.name]
        s, g = (f(model, layer, probe, half="fitted") for f in (inner_hessian, coupling))
        check_s, check_g = (f(model, layer, probe, half="held_out") for f in (inner_hessian, coupling))
        values = torch.linalg.eigvalsh(s)
        assert_close(found.min_eigenvalue, values[:, 0], 1e-8)
        assert_close(found.max_eigenvalue, values[:, -1], 1e-8)
        readers = [(model.get_submodule(c.name), c) for c in layer.consumers]
        blocks = [read_by(r.weight.detach(), c, getattr(r, "groups", 1), layer.width) for r, c in readers]
        v = torch.cat([block.flatten(1) for block in blocks], 1)
        axis = v / v.norm(dim=1, keepdim=True)
        off_axis = torch.eye(v.shape[1], dtype=torch.float64) - axis[:, :, None] * axis[:, None]
        projected = off_axis @ g
        norms = torch.linalg.matrix_norm(projected, 2)
        assert float((found.coupling_norm - norms).abs().max()) <= 1e-6 * float(norms.max())
        # λ = (½, ½): κ = ½, γ = 1.
        zero = projected.new_zeros(layer.width, v.shape[1], v.shape[1])
        dense = torch.cat([torch.cat([s / 2, projected.mT], 2), torch.cat([projected, zero], 2)], 1)
        assert_close(found.escape_eigenvalue, torch.linalg.eigvalsh(dense)[:, 0], 1e-7)
        assert_close(found.stationarity_residual, (axis[:, None] @ g)[:, 0].norm(dim=1), 1e-9)
        # Held-out intervals contain the true held-out means of the fitted directions.
        means = {
            "interval": torch.einsum("ri,rij,rj->r", found.min_vector, check_s, found.min_vector),
            "max_interval": torch.einsum("ri,rij,rj->r", found.max_vector, check_s, found.max_vector),
            "escape_interval": 0.5 * torch.einsum("ri,rij,rj->r", found.escape_in, check_s, found.escape_in)
            + 2 * torch.einsum("rc,rci,ri->r", found.escape_out, check_g, found.escape_in),
        }
        for attribute, mean in means.items():
            interval = getattr(found, attribute)
            assert bool((interval[:, 0] <= mean).all() & (mean <= interval[:, 1]).all())
            assert_close(interval.mean(1), mean, 1e-9)
        assert bool((found.min_vector.norm(dim=1) - 1).abs().max() < 1e-8)


@pytest.mark.parametrize("name", ["mlp", "conv+bn", "gated", "transformer"])
def test_single_precision_is_close_to_double(name):
    double, single = (ZOO[name].make(dtype) for dtype in (torch.float64, torch.float32))
    single[0].load_state_dict(double[0].state_dict())
    batches = [tuple(t.float() for t in batch) for batch in (double[1].fitted[0], double[1].held_out[0])]
    pair = Probe(batches, mse), Probe([tuple(t.double() for t in batch) for batch in batches], mse)
    for layer in hidden_layers(single[0], pair[0]):
        for product in (inner_hessian, coupling):
            assert_close(product(single[0], layer, pair[0]).double(), product(double[0].double(), layer, pair[1]), 2e-5)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh])
def test_piecewise_linear_activations_have_no_curvature_of_their_own(activation):
    model, probe = two_layers(4, 5, 3, activation=activation), Probe(batches_of([6, 6], 4, 3), mse)
    assert torch.equal(inner_hessian(model, "0", probe), torch.zeros(5, 5, 5, dtype=torch.float64))
    x = torch.cat([batch[0] for batch in probe.half("all")])
    y = torch.cat([batch[1] for batch in probe.half("all")])
    with torch.no_grad():
        a = model[0](x)
        slope = (model[1](a + 1e-7) - model[1](a - 1e-7)) / 2e-7
        e = 2 * (model(x) - y) / y.shape[1]
    expected = torch.einsum("nc,nr,ni->rci", e, slope.round(decimals=4), torch.cat([x, torch.ones_like(x[:, :1])], 1))
    assert_close(coupling(model, "0", probe), expected / len(x), 1e-6)
    found = measure_geometry(model, probe)["0"]
    assert float(found.min_eigenvalue.abs().max()) == float(found.max_eigenvalue.abs().max()) == 0
    alive = found.coupling_norm > 0
    assert bool(alive.any())
    assert bool((found.escape_eigenvalue[alive] < 0).all())


def test_frozen_batch_norm_and_dropout_are_as_in_eval_mode():
    model, probe = ZOO["conv+bn"].make()
    training = inner_hessian(model.train(), "0", probe)
    assert torch.equal(training, inner_hessian(model.eval(), "0", probe))


def test_a_path_with_interacting_elements_is_measured_too():
    """A product of neighbouring positions: ∂²φ/∂z² is not diagonal."""

    class Neighbours(nn.Module):
        def forward(self, x):
            return x * x.roll(1, dims=-1) + torch.tanh(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), Neighbours(), nn.Conv1d(3, 2, 1)).double()
    batches = [(torch.randn(4, 2, 5).double(), torch.randn(4, 2, 4).double()) for _ in range(2)]
    probe = Probe(batches, mse)
    (layer,) = hidden_layers(model, probe)
    hessian, _ = of_neurons(weighted([Linearised(model, layer, b).hessian() for b in probe.half("all")], batches))
    assert_close(inner_hessian(model, layer, probe), hessian)
    curvature = layer_curvature(model, layer, probe, "all")
    u = torch.randn(3, curvature.d, dtype=torch.float64)
    assert_close(curvature.quotients(u).mean(0), torch.einsum("ri,rij,rj->r", u, hessian, u))


def test_cross_entropy_and_integer_targets():
    model, (x, _) = two_layers(4, 5, 3), batches_of([10], 4, 1)[0]
    y = torch.arange(10) % 3
    probe = Probe([(x, y)], lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
    with torch.no_grad():
        a = model[0](x)
        e = torch.softmax(model(x), 1) - F.one_hot(y, 3)
        t = torch.tanh(a)
        extended = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        v_e = e @ model[2].weight
        expected = torch.einsum("nr,nr,ni,nj->rij", v_e, -2 * t * (1 - t * t), extended, extended) / 10
    assert_close(inner_hessian(model, "0", probe), expected)


def test_all_that_discovery_finds_may_be_passed_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    probe = Probe([(torch.randn(8, 3), torch.randn(8, 2))], mse)
    found = find_hidden_layers(model, probe)
    assert [layer.growable for layer in found] == [True, False]
    assert list(measure_geometry(model, probe, found)) == ["0"]
    with pytest.raises(UnsupportedLayerError, match="2: cannot be widened: an output layer"):
        measure_geometry(model, probe, found[1:])
