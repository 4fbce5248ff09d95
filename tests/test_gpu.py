"""What holds on the CPU holds on a CUDA device."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from test_devices import split_first
from test_lightning import POLICY, fit
from test_precision import altered, assert_close, numbers, train_scaled, under_autocast
from test_probe import PROBING, assert_unchanged, make, picture
from torch import nn
from zoo import ZOO, mse

from splitwatch import Grower, GrowthPolicy, SplitWatch
from splitwatch.geometry.dense import layer_curvature
from splitwatch.geometry.measure import measure_geometry
from splitwatch.growth.grow import grow
from splitwatch.growth.plan import plan_growth
from splitwatch.precision import full_precision
from splitwatch.probe import Probe
from splitwatch.records import SplitWatchError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, found none"),
]
HALF = [torch.bfloat16, torch.float16]


def on_cuda(model, probe):
    """Copies of a model and its probe on the device."""
    return copy.deepcopy(model).cuda(), altered(probe, of=torch.Tensor.cuda)


@pytest.fixture(autouse=True)
def tf32():
    """Training allows TF32."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", ZOO)
def test_the_geometry_is_that_of_the_cpu(name, dtype, tolerance):
    model, probe = ZOO[name].make(torch.float64)
    expected = numbers(model, probe)
    model, probe = on_cuda(model.to(dtype), altered(probe, of=lambda part: part.to(dtype)))
    found = numbers(model, probe)
    assert {values.device.type for values in found.values()} == {"cuda"}
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("name", ["mlp", "conv+bn", "transformer", "gated"])
def test_autocast_and_half_precision_weights(name, half):
    model, probe = ZOO[name].make(torch.float32)
    expected = numbers(model, probe)
    model, probe = on_cuda(model, probe)
    assert_close(numbers(model, altered(probe, under_autocast(mse, half, "cuda"))), expected, 1e-4)
    with torch.autocast("cuda", dtype=half):
        assert_close(numbers(model, probe), expected, 1e-4)
        assert torch.is_autocast_enabled("cuda")
    model.to(half)
    truth = copy.deepcopy(model).cpu().double()
    probe = altered(probe, of=lambda part: part.to(half))
    reference = numbers(truth, altered(probe, of=lambda part: part.cpu().double()))
    assert_close(numbers(model, probe), reference, 1e-3)


@pytest.mark.parametrize("name", PROBING)
def test_probing_changes_nothing(name):
    model, probe = make()
    model, probe = model.cuda(), altered(probe, of=torch.Tensor.cuda)
    before, rng = picture(model), torch.cuda.get_rng_state()
    PROBING[name](model, probe)
    assert_unchanged(before, model)
    assert torch.equal(torch.cuda.get_rng_state(), rng)
    assert torch.get_float32_matmul_precision() == "high"


def test_products_are_exact_to_float32_though_training_allows_tf32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10))
    batches = [(torch.randn(512, 256), torch.randn(512, 10)) for _ in range(2)]
    direction = torch.randn(128, 257)
    truth = copy.deepcopy(model).double()
    wide = Probe([(x.double(), y.double()) for x, y in batches], mse)
    expected = layer_curvature(truth, "0", wide).hessian(direction.double())
    model, probe = on_cuda(model, Probe(batches, mse))
    with full_precision(model):
        found = layer_curvature(model, "0", probe).hessian(direction.cuda())
    assert float((found.double().cpu() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", ["mlp", "conv+bn", "transformer", "gated", "concatenation"])
def test_growth_does_not_change_the_function(name, dtype, bound):
    model, probe = on_cuda(*ZOO[name].make(dtype))
    event = grow(model, split_first(model, probe), probe=probe)
    assert event.grown
    assert event.drift <= bound
    assert {p.device.type for p in model.parameters()} == {"cuda"}


def test_a_plan_is_made_and_carried_out():
    model, probe = on_cuda(*ZOO["mlp"].make(torch.float64, samples=200))
    plan = plan_growth(model, measure_geometry(model, probe), probe, GrowthPolicy(max_neurons=2))
    event = grow(model, plan, probe=probe)
    assert not plan or event.realised_fitted == pytest.approx(plan.fitted_decrease, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"capturable": True}, {"foreach": True}, {"amsgrad": True}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_null_growth_keeps_adams_state(kind, settings):
    model, probe = on_cuda(*ZOO["conv+bn"].make(torch.float32))
    model.to(memory_format=torch.channels_last)
    optimizer = kind(model.parameters(), lr=1e-3, **settings)
    for _ in range(3):
        optimizer.zero_grad()
        mse(model, probe.fitted[0]).backward()
        optimizer.step()
    event = grow(model, split_first(model, probe), optimizer, probe=probe)
    assert event.restarted == ()
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
        assert float(state["step"]) == 3
        assert state["exp_avg"].device == p.device
    for _ in range(2):
        optimizer.zero_grad()
        mse(model, probe.fitted[0]).backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_scaler_and_a_grower_in_one_loop():
    torch.manual_seed(0)
    x = torch.randn(512, 2, device="cuda")
    y = torch.sin(3 * x[:, :1])
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).cuda()
    optimizer, scaler = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True), torch.amp.GradScaler("cuda")
    loss_fn = under_autocast(mse, torch.float16, "cuda")
    grower = Grower(model, optimizer, loss_fn, GrowthPolicy(window=50, max_events=1), progress=False)
    train_scaled(grower, scaler, x, y, 1500)
    assert grower.events
    assert all(event.drift <= 1e-6 for event in grower.events if event.grown)


def test_a_saved_grower_goes_on():
    model, probe = on_cuda(*ZOO["mlp"].make(torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growers = [Grower(model, optimizer, mse, GrowthPolicy(window=50), probe=probe, progress=False) for _ in range(2)]
    growers[0].observe(probe.fitted[0], mse(model, probe.fitted[0]))
    growers[1].load_state_dict(growers[0].state_dict())
    for _ in range(10):
        growers[1].observe(probe.fitted[0], mse(model, probe.fitted[0]))
    assert len(growers[1].watcher.detector.means) == 2


def test_memory_is_given_back(record_property):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)).cuda()
    batches = [(torch.randn(1024, 784).cuda(), torch.randint(0, 10, (1024,)).cuda()) for _ in range(2)]
    probe = Probe(batches, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
    for _ in range(3):  # libraries take their workspaces, not all of them the first time
        measure_geometry(model, probe)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    after = []
    for _ in range(3):
        measure_geometry(model, probe)
        gc.collect()
        after.append(torch.cuda.memory_allocated())
    peak = torch.cuda.max_memory_allocated() - before
    record_property("peak_mib", peak / 2**20)
    print(f"measure_geometry of 784-512-512-10 at 1024 samples: {peak / 2**20:.0f} MiB at its peak")
    assert after == [before] * 3
    assert peak < 4 * 2**30


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_grows(backend):
    model, probe = on_cuda(*ZOO["mlp"].make(torch.float32))
    model.eval()
    expected = numbers(model, probe)
    compiled = torch.compile(model, backend=backend)
    x = probe.fitted[0][0]
    compiled(x)
    assert_close(numbers(compiled, probe), expected, 1e-5)
    event = grow(compiled, split_first(compiled, probe, 0.1), probe=probe)
    assert event.widths == {"0": (6, 7)}
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)  # TF32 is allowed here
    torch.compiler.reset()


def test_a_model_on_two_devices_is_refused():
    model, probe = ZOO["mlp"].make(torch.float32)
    model[0].cuda()
    with pytest.raises(SplitWatchError, match=r"model: required parameters on one device, found cpu .*cuda:0 .*"):
        measure_geometry(model, probe)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_lightning_on_the_device(precision):
    watch = SplitWatch(POLICY)
    fit([watch], accelerator="gpu", devices=1, precision=precision)
    assert watch.events
    assert all(event.drift <= 1e-6 for event in watch.events if event.grown)
    assert all(event.verdict is None or event.verdict.loss < 1 for event in watch.events)
