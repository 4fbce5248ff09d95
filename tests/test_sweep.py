"""Some neurons at a time, layers kept or captured anew, signs that are proven: all the same numbers."""

from functools import partial

import pytest
import torch
from torch import nn
from zoo import ZOO, Experts, mse

from splitwatch.geometry.dense import inner_hessian, layer_curvature
from splitwatch.geometry.measure import measure_geometry
from splitwatch.geometry.sweep import Recaptured, Sweep
from splitwatch.layers import find_hidden_layers
from splitwatch.probe import Probe


def growable(model, probe):
    return [layer for layer in find_hidden_layers(model, probe) if layer.growable]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_products_for_some_neurons_are_those_of_all(name):
    model, probe = ZOO[name].make(samples=5)
    generator = torch.Generator().manual_seed(0)
    for layer in growable(model, probe):
        whole = layer_curvature(model, layer, probe, "fitted")
        some = torch.tensor([layer.width - 1, 0])
        u = torch.randn(layer.width, whole.d, dtype=torch.float64, generator=generator)
        v = torch.randn(layer.width, whole.c, dtype=torch.float64, generator=generator)
        part = whole.restricted(some)
        one = part.restricted(torch.tensor([1]))
        close(part.hessian(u[some]), whole.hessian(u)[some])
        close(part.coupling(u[some]), whole.coupling(u)[some])
        close(part.coupling_adjoint(v[some]), whole.coupling_adjoint(v)[some])
        close(one.coupling(u[:1]), whole.coupling(u)[:1])
        joint = whole.joint(u, v, 0.7, 0.3)
        close(part.joint(u[some], v[some], 0.7, 0.3), joint[some])
        close(joint[:, : whole.d], 0.7 * whole.hessian(u) + 0.3 * whole.coupling_adjoint(v))
        close(joint[:, whole.d :], 0.3 * whole.coupling(u))
        close(part.quotients(u[some], v[some], 0.7, 0.3), whole.quotients(u, v, 0.7, 0.3)[:, some])


@pytest.mark.parametrize(
    ("name", "held"), [("mlp", False), ("transformer", False), ("gated", False), ("conv+bn", True)]
)
def test_paths_without_mixing_let_their_graphs_go(name, held):
    model, probe = ZOO[name].make(samples=5)
    for curvature in Sweep(model, probe, growable(model, probe)[:1], "fitted").curvatures():
        assert all((part.response.graph is not None) == held for part in curvature.parts)


def storages(held, seen):
    """Bytes of every storage that an object keeps alive, by its address."""
    if isinstance(held, torch.Tensor):
        storage = held.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if id(held) in seen or isinstance(held, (type, str, int, float, torch.Size)) or callable(held):
        return {}
    seen.add(id(held))
    if isinstance(held, dict):
        inner = held.values()
    elif isinstance(held, (list, tuple, set)):
        inner = held
    else:
        names = [*getattr(held, "__slots__", ()), *getattr(held, "__dict__", ())]
        inner = [getattr(held, name) for name in names]
    found = {}
    for one in inner:
        found |= storages(one, seen)
    return found


@pytest.mark.parametrize("name", ["mlp", "transformer", "gated", "conv+bn"])
def test_what_is_kept_is_what_is_counted(name):
    model, probe = ZOO[name].make(samples=64)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for curvature in Sweep(model, probe, growable(model, probe)[:1], "fitted").curvatures():
        for part in curvature.parts:
            kept = {at: size for at, size in storages(vars(part), set()).items() if at not in weights}
            assert sum(kept.values()) <= 1.02 * part.nbytes


ANEW = ["mlp", "conv+bn", "gated"]


@pytest.mark.parametrize("name", ANEW)
def test_products_captured_anew_are_those_of_what_is_kept(name):
    model, probe = ZOO[name].make(samples=5)
    layers = growable(model, probe)
    kept, anew = (Sweep(model, probe, layers, "fitted", **bound).curvatures() for bound in ({}, {"max_bytes": 1}))
    generator = torch.Generator().manual_seed(0)
    for layer, one, other in zip(layers, kept, anew, strict=True):
        assert (type(one.parts), type(other.parts)) == (tuple, Recaptured)
        u = torch.randn(layer.width, one.d, dtype=torch.float64, generator=generator)
        v = torch.randn(layer.width, one.c, dtype=torch.float64, generator=generator)
        close(other.hessian(u), one.hessian(u))
        close(other.coupling(u), one.coupling(u))
        close(other.joint(u, v, 0.7, 0.3), one.joint(u, v, 0.7, 0.3))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "mlp" else pytest.mark.slow) for name in ANEW])
def test_what_does_not_fit_is_captured_anew_with_the_same_result(name):
    model, probe = ZOO[name].make(samples=5)
    converged = partial(measure_geometry, model, probe, tolerance=1e-6)  # what is compared is not the solver's error
    kept, anew = converged(), converged(max_bytes=1)
    assert kept.keys() == anew.keys()
    for layer in kept:
        for field in ("min_eigenvalue", "max_eigenvalue", "coupling_norm", "escape_eigenvalue", "escape_interval"):
            torch.testing.assert_close(getattr(anew[layer], field), getattr(kept[layer], field), rtol=1e-5, atol=1e-7)


def test_layers_go_together_as_far_as_they_fit():
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 2)).double()
    probe = Probe([(torch.randn(6, 4).double(), torch.randn(6, 2).double()) for _ in range(4)], mse)
    layers = growable(model, probe)
    sweep = Sweep(model, probe, layers, "fitted")
    list(sweep.curvatures())
    assert len(set(sweep.sizes.values())) <= 2
    largest = max(sweep.sizes.values())
    passes = []
    traces = probe.traces
    probe.traces = lambda model, layers, *rest: passes.append(len(layers)) or traces(model, layers, *rest)
    curvatures = list(Sweep(model, probe, layers, "fitted", max_bytes=2 * largest).curvatures())
    assert passes == [3, 2, 1]  # a look at the sizes, then two groups
    assert [c.layer for c in curvatures] == layers
    assert all(isinstance(c.parts, tuple) for c in curvatures)


def one_hidden_layer(activation, signs):
    """A scalar network with outgoing weights of given signs and targets that all errors are positive for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, len(signs)), activation, nn.Linear(len(signs), 1)).double()
    model[2].weight.data = torch.tensor([signs], dtype=torch.float64)
    batches = [(torch.randn(20, 3).double(), torch.full((20, 1), -50.0).double()) for _ in range(2)]
    return model, Probe(batches, mse)


def test_signs_are_proven_where_all_curvatures_agree():
    model, probe = one_hidden_layer(nn.Softplus(), [1.0, -1.0, 0.5])
    proven = measure_geometry(model, probe)["0"].proven
    assert proven.tolist() == [[True, False], [False, True], [True, False]]
    eigenvalues = torch.linalg.eigvalsh(inner_hessian(model, "0", probe, half="fitted"))
    assert (eigenvalues[[0, 2]] >= -1e-12).all() and (eigenvalues[1] <= 1e-12).all()
    assert "proven S ⪰ 0" in str(measure_geometry(model, probe)["0"])


def test_nothing_is_proven_where_signs_change_and_everything_where_there_is_no_curvature():
    model, probe = one_hidden_layer(nn.Tanh(), [1.0, -1.0])
    assert not measure_geometry(model, probe)["0"].proven.any()
    model, probe = one_hidden_layer(nn.ReLU(), [1.0, -1.0])
    assert measure_geometry(model, probe)["0"].proven.all()


def test_screening_spends_products_only_on_neurons_that_can_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 3)).double()
    with torch.no_grad():
        model[2].weight *= torch.logspace(-2, 0, 60)[torch.randperm(60)]
    probe = Probe([(torch.randn(300, 40).double(), torch.randn(300, 3).double()) for _ in range(2)], mse)
    full, some = measure_geometry(model, probe)["0"], measure_geometry(model, probe, wanted=5)["0"]
    assert not full.screened.any()
    assert 10 <= int(some.screened.sum()) <= 55
    lowest = full.escape_eigenvalue.argsort()[:5]
    assert not some.screened[lowest].any()
    torch.testing.assert_close(some.escape_eigenvalue[lowest], full.escape_eigenvalue[lowest], rtol=2e-3, atol=0)
    assert "10 %" in str(some)


def test_large_batches_are_captured_piece_by_piece_with_the_same_result():
    model, probe = ZOO["transformer"].make(samples=6)
    layers = growable(model, probe)
    total, largest = probe.footprint(model, "fitted")
    assert 0 < largest < total
    sweep = Sweep(model, probe, layers, "fitted", max_bytes=(total + 8 * largest) // 2)
    assert sweep.pieces >= 2
    whole = list(Sweep(model, probe, layers, "fitted").curvatures())
    for cut, one in zip(sweep.curvatures(), whole, strict=True):
        assert sum(1 for _ in cut.parts) > len(one.parts)
        u = torch.randn(one.layer.width, one.d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        close(cut.hessian(u), one.hessian(u))
        close(cut.coupling(u), one.coupling(u))


def test_both_halves_keep_within_the_memory_bound():
    model, probe = ZOO["mlp"].make(samples=6)
    pieces = {}
    traces = probe.traces
    probe.traces = lambda model, layers, half, n: pieces.setdefault(half, n) and traces(model, layers, half, n)
    measure_geometry(model, probe, ["0"], max_bytes=1000)
    assert pieces.keys() == {"fitted", "held_out"}
    assert min(pieces.values()) > 1


def test_a_batch_that_leaves_an_expert_out_counts_as_zero_there():
    """As where the expert sees every sample and what it says of most is masked."""

    def loss(model, x):
        return (model(x) - x[:, 1:]).square().mean()

    both, first = Experts.batches()
    for half in ([both, both], [first, both], [both, first, first]):  # the batches that are held out
        probe = Probe([x for held in half for x in (both, held)], loss)
        routed, masked = (measure_geometry(Experts(routed=way), probe, ["a", "c"]) for way in (True, False))
        for name in ("a", "c"):
            torch.testing.assert_close(routed[name].min_eigenvalue, masked[name].min_eigenvalue, rtol=1e-4, atol=1e-9)
            close(routed[name].coupling_norm, masked[name].coupling_norm)
