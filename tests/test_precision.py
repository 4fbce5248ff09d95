"""Measured in full precision, whatever training uses: autocast, TF32, half-precision weights."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from test_probe import PROBING, assert_unchanged, make, mse, picture
from torch import nn
from zoo import ZOO, in_turn

from splitwatch import Grower, GrowthPolicy
from splitwatch.geometry.dense import layer_curvature
from splitwatch.geometry.measure import measure_geometry
from splitwatch.geometry.narrow import narrow_verdict
from splitwatch.growth.grow import grow
from splitwatch.layers import find_hidden_layers, select_layers
from splitwatch.precision import full_precision
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, Split

HALF = [torch.bfloat16, torch.float16]


def under_autocast(loss_fn, dtype, device="cpu"):
    def loss(model, batch):
        with torch.autocast(device, dtype=dtype):
            return loss_fn(model, batch)

    return loss


def train_scaled(grower, scaler, x, y, steps):
    """A plain loop with a gradient scaler and a grower in it."""
    (optimizer,) = grower.optimizers
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), device=x.device)
        optimizer.zero_grad()
        loss = grower.training_loss(grower.model, (x[rows], y[rows]))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        grower.step((x[rows], y[rows]), loss)


def altered(probe, loss_fn=None, of=lambda part: part):
    """The probe with another loss function, or other batches in their place."""
    other = copy.copy(probe)
    other.loss_fn = loss_fn or probe.loss_fn
    for half in ("fitted", "held_out"):
        setattr(other, half, tuple(tuple(map(of, batch)) for batch in probe.half(half)))
    return other


def numbers(model, probe):
    """Everything that is measured without choosing among eigenvectors, by layer."""
    fields = ("min_eigenvalue", "max_eigenvalue", "coupling_norm", "escape_eigenvalue", "stationarity_residual")
    return {
        name: torch.stack([getattr(found, field) for field in fields])
        for name, found in measure_geometry(model, probe, tolerance=1e-6).items()
    }


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, values in found.items():
        reference = expected[name].to(values.device, torch.float64)
        assert float((values.double() - reference).norm()) <= tolerance * float(reference.norm()), name


# --- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), in_turn(ZOO, HALF))
def test_autocast_in_the_loss_does_not_reach_the_geometry(name, dtype):
    model, probe = ZOO[name].make(torch.float32)
    expected = numbers(model, probe)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    found = numbers(model, altered(probe, under_autocast(mse, dtype)))
    assert_close(found, expected, 1e-5)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_around_the_call_does_not_reach_the_geometry(dtype):
    model, probe = ZOO["conv+bn"].make(torch.float32)
    expected, loss = numbers(model, probe), probe.loss(model)
    curvature = layer_curvature(model, "0", probe)
    u = torch.randn(curvature.layer.width, curvature.d)
    product = curvature.hessian(u)
    with torch.autocast("cpu", dtype=dtype):
        assert_close(numbers(model, probe), expected, 1e-5)
        assert probe.loss(model) == pytest.approx(loss, rel=1e-6)
        again = curvature.hessian(u)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is dtype
        assert F.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype is dtype
    assert again.dtype is torch.float32
    torch.testing.assert_close(again, product)


def test_autocast_is_left_alone_when_the_loss_raises():
    model, probe = make()

    def failing(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            F.linear(torch.ones(1, 2), torch.ones(1, 2))
            raise ValueError("no data today")

    for around in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with around:
            before = torch.is_autocast_enabled("cpu")
            with pytest.raises(ValueError, match="no data today"):
                measure_geometry(model, altered(probe, failing))
            assert torch.is_autocast_enabled("cpu") is before


def test_the_autocast_cache_stays():
    model, probe = ZOO["mlp"].make(torch.float32)
    x = probe.fitted[0][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model[0](x)
        measure_geometry(model, altered(probe, under_autocast(mse, torch.bfloat16)))
        second = model[0](x)
    casts = [output.grad_fn.next_functions[2][0].next_functions[0][0] for output in (first, second)]
    assert "ToCopy" in casts[0].name()
    assert casts[0] is casts[1]  # the very same cast weight


class Caster(nn.Module):
    """Casts by hand, in all the ways there are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = x.to(torch.bfloat16).half().to(dtype=torch.bfloat16).type(torch.float16).bfloat16()
        h = torch.tanh(F.linear(x, self.a.weight.to(x.dtype), self.a.bias.to(x.dtype)))
        shift = torch.zeros(4, dtype=torch.bfloat16)
        return F.linear(h + shift, self.b.weight.type_as(h)).float() + self.b.bias


def test_casts_by_hand_are_seen_through():
    torch.manual_seed(0)
    model = Caster()
    plain = nn.Sequential(model.a, nn.Tanh(), model.b)
    batches = [(torch.randn(8, 3), torch.randn(8, 2)) for _ in range(2)]
    assert model(batches[0][0]).sub(plain(batches[0][0])).abs().max() > 1e-4  # they do matter
    probe = Probe(batches, mse)
    assert probe.loss(model) == pytest.approx(probe.loss(plain), rel=1e-6)
    for (found, _), (expected, _) in zip(probe.gradients(model), probe.gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)


# --- half-precision weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), in_turn(ZOO, HALF))
def test_half_precision_weights_are_measured_in_float32(name, dtype):
    model, probe = ZOO[name].make(torch.float32)
    model.to(dtype)
    half = altered(probe, of=lambda part: part.to(dtype))
    truth = ZOO[name].build().double()
    truth.load_state_dict(model.state_dict())
    expected = numbers(truth, altered(half, of=torch.Tensor.double))
    found = numbers(model, half)
    assert {values.dtype for values in found.values()} == {torch.float32}
    assert_close(found, expected, 1e-4)  # float32's accuracy, not bfloat16's: the weights are taken as they are
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PROBING)
def test_probing_half_precision_weights_changes_nothing(name, dtype):
    model, probe = make()
    model.zero_grad()
    model.to(dtype)
    half = altered(probe, of=lambda part: part.to(dtype) if part.is_floating_point() else part)
    x = half.fitted[0][0]
    model(x).sum().backward()
    calls = []
    model.head.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.dtype))
    before = picture(model)
    pointers = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    PROBING[name](model, half)
    assert_unchanged(before, model)
    assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == pointers
    assert calls == []
    model(x).sum().backward()
    assert calls == [dtype]


def plan_of(model, probe, coefficients=(0.5, 0.5)):
    (layer, *_) = select_layers(find_hidden_layers(model, probe), None)
    d, c = model[0].weight.shape[1] + 1, model[2].weight.shape[0]
    k = len(coefficients)
    return GrowthPlan((layer,), (Split(layer.name, 1, coefficients, torch.zeros(k, d), torch.zeros(k, c), 0.0),), "")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("coefficients", "bound"), [((0.5, 0.5), 1e-6), ((0.7, 0.3), 2e-2), ((1.3, -0.3), 2e-2)])
def test_half_precision_weights_grow(dtype, coefficients, bound):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    probe = Probe([(torch.randn(6, 3, dtype=dtype), torch.randn(6, 2, dtype=dtype)) for _ in range(2)], mse)
    optimizer = torch.optim.AdamW(model.parameters())
    mse(model, probe.fitted[0]).backward()
    optimizer.step()
    event = grow(model, plan_of(model, probe, coefficients), optimizer, probe=probe)
    assert event.grown
    assert event.drift <= bound
    assert {p.dtype for p in model.parameters()} == {dtype}
    mse(model, probe.fitted[0]).backward()
    optimizer.step()


def test_the_narrow_verdict_of_half_precision_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()
    batches = [(torch.randn(6, 3).bfloat16(), torch.randn(6, 2).bfloat16()) for _ in range(2)]
    truth = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    truth.load_state_dict(model.state_dict())
    found = narrow_verdict(model, Probe(batches, mse))
    expected = narrow_verdict(truth, Probe([(x.double(), y.double()) for x, y in batches], mse))
    assert found.min_eigenvalue == pytest.approx(expected.min_eigenvalue, rel=1e-4)
    assert model[0].weight.dtype is torch.bfloat16


# --- TF32 ------------------------------------------------------------------------------------------------------------

FLAGS = [("generic", "all"), *itertools.product(("cuda", "mkldnn"), ("all", "matmul", "conv", "rnn"))]
new_flags = pytest.mark.skipif(not hasattr(torch._C, "_get_fp32_precision_getter"), reason="needs torch 2.9")


def legacy():
    """The old flags, or the error where they contradict the new ones."""

    def read(of):
        try:
            return of()
        except RuntimeError:
            return "contradiction"

    return [read(torch.get_float32_matmul_precision), read(torch._C._get_cublas_allow_tf32), read(
        torch._C._get_cudnn_allow_tf32
    )]  # fmt: skip


def flags():
    return [torch._C._get_fp32_precision_getter(*flag) for flag in FLAGS]


@pytest.fixture
def give_back():
    raw = {}
    for flag in FLAGS:
        raw[flag] = torch._C._get_fp32_precision_getter(*flag)
        torch._C._set_fp32_precision_setter(*flag, "none")
    for flag in FLAGS:
        torch._C._set_fp32_precision_setter(*flag, raw[flag])
    yield
    torch.set_float32_matmul_precision("highest")
    torch._C._set_cudnn_allow_tf32(True)
    for flag in FLAGS:
        torch._C._set_fp32_precision_setter(*flag, raw[flag])


def old_way(matmul, cudnn):
    def set_them():
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn

    return set_them


def new_way(**values):
    def set_them():
        for flag, value in values.items():
            torch._C._set_fp32_precision_setter(*flag.split("_"), value)

    return set_them


SETTINGS = {
    "default": lambda: None,
    **{
        f"{matmul}, cudnn {on}": old_way(matmul, on) for matmul in ("highest", "high", "medium") for on in (True, False)
    },
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "generic": new_way(generic_all="tf32"),
    "generic bf16": new_way(generic_all="bf16"),
    "parents": new_way(generic_all="ieee", cuda_all="tf32", mkldnn_all="bf16"),
    "leaves": new_way(cuda_matmul="tf32", cuda_conv="ieee", cuda_rnn="none", mkldnn_matmul="bf16", mkldnn_conv="tf32"),
    "followers": new_way(generic_all="tf32", cuda_matmul="none", cuda_conv="none", cuda_rnn="none"),
}


@new_flags
@pytest.mark.parametrize("setting", SETTINGS)
def test_reduced_products_are_off_inside_and_as_before_after(setting, give_back):
    SETTINGS[setting]()
    before = flags(), legacy()
    seen = []

    def loss(model, batch):
        seen.append((flags(), legacy()))
        with torch.backends.cudnn.flags(enabled=False):  # reads the old flag and refuses a contradiction
            return mse(model, batch)

    model, probe = ZOO["mlp"].make(torch.float32)
    measure_geometry(model, altered(probe, loss))
    assert (flags(), legacy()) == before
    with pytest.raises(ValueError, match="stop"), full_precision(), full_precision():
        seen.append((flags(), legacy()))
        raise ValueError("stop")
    assert (flags(), legacy()) == before
    for new, old in seen:
        assert set(new) == {"ieee"}
        assert old == ["highest", False, False]
    for parent in FLAGS[:2]:  # what followed its parent still does
        torch._C._set_fp32_precision_setter(*parent, "tf32")
    after = flags()
    SETTINGS[setting]()
    for parent in FLAGS[:2]:
        torch._C._set_fp32_precision_setter(*parent, "tf32")
    assert flags() == after


@pytest.mark.parametrize("benchmark", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_choice_of_algorithms_is_reproducible_inside(benchmark, deterministic):
    cudnn, seen = torch.backends.cudnn, []

    def loss(model, batch):
        seen.append((cudnn.benchmark, cudnn.deterministic))
        return mse(model, batch)

    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
    try:
        model, probe = ZOO["mlp"].make(torch.float32)
        altered(probe, loss).loss(model)
        assert (cudnn.benchmark, cudnn.deterministic) == (benchmark, deterministic)
    finally:
        cudnn.benchmark, cudnn.deterministic = before
    assert set(seen) == {(False, True)}


# --- GradScaler ------------------------------------------------------------------------------------------------------


def test_a_scaler_beside_the_grower():
    """The grower is told the loss itself; gradients may be scaled, and growth carries them as they are."""
    torch.manual_seed(0)
    x = torch.randn(256, 2)
    y = torch.sin(3 * x[:, :1])
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    optimizer, scaler = torch.optim.Adam(model.parameters(), lr=1e-2), torch.amp.GradScaler("cpu")
    loss_fn = under_autocast(mse, torch.bfloat16)
    grower = Grower(model, optimizer, loss_fn, GrowthPolicy(window=50, max_events=1), progress=False)
    train_scaled(grower, scaler, x, y, 600)
    assert any(event.grown for event in grower.events)
    assert all(event.drift < 1e-6 for event in grower.events if event.grown)
    assert max(grower.watcher.detector.means, default=0.0) < 2
