"""Networks that compute parts of themselves twice to save memory are measured as if they did not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint as module
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from splitwatch import Grower, GrowthPolicy, Probe, measure_geometry
from splitwatch.recompute import straight_through


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 4))
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        if self.use_reentrant is None:
            return self.last(x + self.block(x))
        return self.last(x + checkpoint(self.block, x, use_reentrant=self.use_reentrant))


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 4, generator=generator)
    return x, torch.sin(2 * x[:, :2])


def network(use_reentrant):
    torch.manual_seed(0)
    return Checkpointed(use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_network_is_measured_like_one_that_is_not(use_reentrant):
    probe = Probe([data()], mse)
    plain, checkpointed = (measure_geometry(network(how), probe) for how in (None, use_reentrant))

    assert plain.keys() == checkpointed.keys() == {"block.0"}
    for name in ("min_eigenvalue", "max_eigenvalue", "coupling_norm", "escape_eigenvalue", "interval"):
        torch.testing.assert_close(getattr(checkpointed["block.0"], name), getattr(plain["block.0"], name))


@pytest.mark.parametrize(
    ("use_reentrant", "measured"),
    [
        (False, "grow"),
        (True, "monitor"),
        pytest.param(True, "grow", marks=pytest.mark.slow),
        pytest.param(False, "monitor", marks=pytest.mark.slow),
    ],
)
def test_training_with_checkpoints_is_that_without(use_reentrant, measured):
    """To the bit, measurements and growth in between."""

    def run(how):
        model, (x, y) = network(how), data()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        policy = GrowthPolicy(
            window=10, tolerance=1e9, noise_ratio=1e9, max_events=1, max_neurons=1, max_overhead=None, probe_samples=64
        )
        grower = Grower(model, optimizer, mse, policy, progress=False, monitor_only=measured == "monitor")
        losses = []
        for step in range(25):
            rows = torch.arange(16) + 16 * (step % 8)
            loss = mse(model, (x[rows], y[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            grower.step((x[rows], y[rows]), loss)
            losses.append(loss.item())
        assert any(event.geometry for event in grower.events)
        return losses, model.block[0].out_features

    losses, width = run(use_reentrant)

    assert (losses, width) == run(None)
    assert width == (4 if measured == "grow" else 3)


def test_everything_is_put_back_even_after_an_error():
    before = dict(vars(module))

    with pytest.raises(ZeroDivisionError), straight_through(), straight_through():
        checkpoint(lambda x: 1 / 0, torch.ones(1), use_reentrant=False)

    assert dict(vars(module)) == before


def test_inside_a_function_runs_once():
    """Keyword arguments, contexts and checkpoints in checkpoints are as they always are."""
    calls = []

    def inner(x, *, scale=1.0):
        calls.append("inner")
        return x.sin() * scale

    def outer(x):
        calls.append("outer")
        return checkpoint(inner, x, use_reentrant=False, scale=3.0)

    x = torch.linspace(0, 1, 3, requires_grad=True)
    with straight_through():
        once = checkpoint(outer, x, use_reentrant=False) + checkpoint(outer, x, use_reentrant=True)
        (gradient,) = torch.autograd.grad(once.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)

    assert calls == ["outer", "inner"] * 2
    torch.testing.assert_close(second, -6 * x.detach().sin())


def test_segments_of_a_sequence_run_straight_through_too():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    whole = copy.deepcopy(model)

    def in_segments(net, batch):
        return F.mse_loss(checkpoint_sequential(net, 2, batch[0], use_reentrant=True), batch[1])

    found, expected = (measure_geometry(m, Probe([data()], f)) for m, f in ((model, in_segments), (whole, mse)))

    assert found.keys() == expected.keys() == {"0", "2"}
    for name, geometry in found.items():
        torch.testing.assert_close(geometry.min_eigenvalue, expected[name].min_eigenvalue)
