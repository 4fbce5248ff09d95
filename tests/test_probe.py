import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from splitwatch.geometry.measure import measure_geometry
from splitwatch.growth.grow import grow
from splitwatch.growth.plan import plan_growth
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.layers import find_hidden_layers
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, Split, SplitWatchError, Sprout, UnsupportedLayerError

torch.set_num_threads(1)


class Net(nn.Module):
    """Everything that probing could leave a trace on."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)
        self.middle, self.mean = nn.Linear(16, 5), nn.BatchNorm1d(5, momentum=None)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(5, 3)
        self.accuracy, self.loss = MulticlassAccuracy(3), MeanMetric()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        h = torch.tanh(self.norm(self.conv(x)))
        return self.head(F.gelu(self.dropout(self.mean(self.middle(h.flatten(1))))))


def with_metrics(model, batch):
    x, y = batch
    logits = model(x)
    model.accuracy(logits, y)
    loss = F.cross_entropy(logits, y)
    model.loss.update(loss.detach())
    return loss


def make(seed=0):
    torch.manual_seed(seed)
    model = Net().double()
    batches = [(torch.randn(n, 2, 6).double(), torch.randint(0, 3, (n,))) for n in (6, 5, 6)]
    model.train()
    for batch in batches:
        with_metrics(model, batch).backward()
    model.norm.eval()  # a mix of modes, as in fine-tuning
    model.dropout.eval()
    return model, Probe(batches, with_metrics)


def picture(model):
    """Everything that must stay as it was, with the parameters' identities."""
    metrics = {
        name: copy.deepcopy(
            {k: v for k, v in m.__dict__.items() if k in m._defaults or k in ("_update_count", "_computed")}
        )
        for name, m in model.named_modules()
        if hasattr(m, "_defaults")
    }
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": [(name, id(p)) for name, p in model.named_parameters()],
        "buffer ids": [(name, id(b)) for name, b in model.named_buffers()],
        "versions": [p._version for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "grad ids": [id(p.grad) for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "modes": {name: module.training for name, module in model.named_modules()},
        "rng": torch.get_rng_state(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "metrics": metrics,
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
        "sizes": str(model),
        "grad mode": torch.is_grad_enabled(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_unchanged(before, model):
    after = picture(model)
    assert [key for key in before if not same(before[key], after[key])] == []


def geometry_and_plan(model, probe):
    geometry = measure_geometry(model, probe)
    return plan_growth(model, geometry, probe, GrowthPolicy(max_neurons=3))


PROBING = {
    "find_hidden_layers": find_hidden_layers,
    "measure_geometry": measure_geometry,
    "plan_growth": geometry_and_plan,
    "loss": lambda model, probe: probe.loss(model, "all"),
    "gradients": lambda model, probe: list(probe.gradients(model)),
    "outputs": lambda model, probe: probe.outputs(model, ["middle", "head"]),
}


@pytest.mark.parametrize("name", PROBING)
def test_probing_changes_nothing(name):
    model, probe = make()
    before = picture(model)
    PROBING[name](model, probe)
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", PROBING)
def test_probing_changes_nothing_in_eval_mode_without_gradients(name):
    model, probe = make()
    model.eval().zero_grad()
    before = picture(model)
    with torch.no_grad():
        PROBING[name](model, probe)
    assert_unchanged(before, model)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_leave_no_trace_between_batches():
    model, probe = make()
    before = picture(model)
    for _ in probe.gradients(model):
        assert_unchanged(before, model)


@pytest.mark.parametrize("name", PROBING)
@pytest.mark.parametrize("where", ["before", "after", "third"])
def test_probing_changes_nothing_when_the_loss_raises(name, where):
    calls = []

    def failing(model, batch):
        calls.append(1)
        torch.rand(3), np.zeros(3)
        if where == "before":
            raise ValueError("no data today")
        loss = with_metrics(model, batch)
        if where == "after" or len(calls) >= 3:
            raise ValueError("no data today")
        return loss

    model, good = make()
    probe = Probe(good.half("all"), failing)
    before = picture(model)
    if where != "third" or name in ("measure_geometry", "plan_growth", "loss", "gradients"):
        with pytest.raises(ValueError, match="no data today"):
            PROBING[name](model, probe)
    assert_unchanged(before, model)


def test_what_the_next_training_step_computes_is_the_same():
    results = []
    for look in (False, True):
        model, probe = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(3):
            if look:
                geometry_and_plan(model, probe)
            optimizer.zero_grad()
            with_metrics(model, probe.fitted[0]).backward()
            optimizer.step()
        results.append((model.state_dict(), model.accuracy.compute(), model.loss.compute()))
    assert same(*results)


def test_randomness_inside_the_loss_is_given_back():
    model, good = make()

    def noisy(model, batch):
        return with_metrics(model, (batch[0] + 0.0 * torch.randn_like(batch[0]), batch[1]))

    probe = Probe(good.half("all"), noisy)
    before = picture(model)
    measure_geometry(model, probe)
    assert_unchanged(before, model)


# --- bad input -------------------------------------------------------------------------------------------------------


def mlp(d=3, m=4, c=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, m), nn.Tanh(), nn.Linear(m, c)).double()


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def data(*sizes, d=3, c=2):
    return [(torch.randn(n, d).double(), torch.randn(n, c).double()) for n in sizes]


def refused(model, probe, match, error=SplitWatchError, action=measure_geometry):
    """An action raises, and the model is as before."""
    before = picture(model)
    with pytest.raises(error, match=match):
        action(model, probe)
    assert_unchanged(before, model)


@pytest.mark.parametrize("batches", [[], (), iter([])])
def test_an_empty_probe(batches):
    with pytest.raises(SplitWatchError, match=r"batches: required at least one batch, found none; pass"):
        Probe(batches, mse)


def test_a_probe_of_one_sample():
    with pytest.raises(SplitWatchError, match=r"batches: required two samples or more .* found one"):
        Probe(data(1), mse)


def test_two_batches_of_one_sample_each_decide_nothing():
    model, probe = mlp(), Probe(data(1, 1), mse)
    found = measure_geometry(model, probe)["0"]
    assert bool((found.interval[:, 1] == torch.inf).all())
    assert found.shares["undecided"] == 1
    plan = plan_growth(model, {"0": found}, probe)
    assert not plan
    assert "held-out half; a larger probe may decide" in plan.reason


@pytest.mark.parametrize("batch", ["text", {"n": 3}, torch.tensor(1.0), []])
def test_a_batch_without_samples(batch):
    with pytest.raises(SplitWatchError, match=r"batches: required tensors whose first axis is the sample"):
        Probe([batch], mse)


@pytest.mark.parametrize(
    "action", [find_hidden_layers, measure_geometry, Probe.loss, lambda m, p: list(p.gradients(m))]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value, action):
    model, batches = mlp(), data(4, 4)
    batches[0][1][0, 0] = value
    run = (lambda m, p: p.loss(m)) if action is Probe.loss else action
    refused(model, Probe(batches, mse), r"loss_fn: required a finite loss, found (nan|inf); look for", action=run)


def test_a_loss_that_is_not_finite_on_the_held_out_half_only():
    model, batches = mlp(), data(4, 4)
    batches[1][1][0, 0] = float("nan")
    refused(model, Probe(batches, mse), "loss_fn: required a finite loss, found nan")


@pytest.mark.parametrize("action", [find_hidden_layers, measure_geometry, lambda m, p: p.loss(m)])
@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda m, b: (m(b[0]) - b[1]).square(), r"a tensor of shape \(4, 2\)"),
        (lambda m, b: float(mse(m, b).detach()), "'float'"),
        (lambda m, b: None, "'NoneType'"),
        (lambda m, b: {"loss": mse(m, b)}, "'dict'"),
    ],
)
def test_a_loss_that_is_not_a_scalar(loss, found, action):
    refused(mlp(), Probe(data(4, 4), loss), rf"loss_fn: required a scalar tensor .*{found}; reduce it", action=action)


def test_a_loss_of_shape_one_is_a_scalar():
    model = mlp()
    batches = data(4, 4)
    one = measure_geometry(model, Probe(batches, lambda m, b: mse(m, b)[None]))["0"]
    assert torch.equal(one.min_eigenvalue, measure_geometry(model, Probe(batches, mse))["0"].min_eigenvalue)


def test_a_loss_that_depends_on_no_parameter():
    def constant(model, batch):
        return mse(model, batch).detach()

    refused(mlp(), Probe(data(4, 4), constant), r"loss_fn: required a loss that depends on the model's parameters")


def test_a_loss_computed_without_gradients():
    refused(mlp(), Probe(data(4, 4), torch.no_grad()(mse)), r"loss_fn: required .*do not compute it under no_grad")


class Detached(nn.Module):
    """Two branches; one of them is cut off from the loss."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) + self.d(torch.tanh(self.c(x))).detach()


def test_a_loss_that_does_not_depend_on_the_layer():
    torch.manual_seed(0)
    model, probe = Detached().double(), Probe(data(4, 4), mse)
    match = r"(loss_fn|layers): .*(does not depend on layer c|detached|does not depend on it)"
    refused(model, probe, match, action=lambda m, p: measure_geometry(m, p, layers=["c"]))
    assert set(measure_geometry(model, probe, layers=["a"])) == {"a"}


def test_a_layer_that_only_some_batches_use():
    model = mlp()
    model.other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss(model, batch):
        net = model.other if len(batch[0]) == 4 else model[:3]
        return F.mse_loss(net(batch[0]), batch[1])

    refused(
        model,
        Probe(data(4, 5), loss),
        "loss_fn: required losses that use layer other.0 alike",
        action=lambda m, p: measure_geometry(m, p, layers=["other.0"]),
    )


@pytest.mark.parametrize("action", [find_hidden_layers, measure_geometry, lambda m, p: p.loss(m)])
def test_wrong_shapes_pass_through(action):
    model, probe = mlp(), Probe(data(4, 4, d=5), mse)
    refused(model, probe, "mat1 and mat2 shapes cannot be multiplied|size mismatch", RuntimeError, action)


def test_a_frozen_producer():
    model, probe = mlp(), Probe(data(4, 4), mse)
    model[0].requires_grad_(False)
    refused(
        model,
        probe,
        r"layers: 0: cannot be widened: the layer is frozen: its parameters do not require gradients",
        UnsupportedLayerError,
        lambda m, p: measure_geometry(m, p, layers=["0"]),
    )
    assert measure_geometry(model, probe) == {}
    plan = plan_growth(model, {}, probe)
    assert not plan
    assert "no hidden layer can be widened" in plan.reason


def test_tied_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    model[2].weight = model[0].weight
    for layer in ("0", "2"):
        refused(
            model,
            Probe(data(4, 4), mse),
            rf"layers: {layer}: cannot be widened: .*tied weights",
            UnsupportedLayerError,
            lambda m, p, layer=layer: measure_geometry(m, p, layers=[layer]),
        )


def test_a_budget_of_zero():
    model, probe = mlp(), Probe(data(20, 20), mse)
    geometry = measure_geometry(model, probe)
    before = picture(model)
    for policy in (GrowthPolicy(max_neurons=0), GrowthPolicy(max_parameters=0), GrowthPolicy(max_ratio=1.0)):
        plan = plan_growth(model, geometry, probe, policy)
        assert not plan
        assert "budget" in plan.reason
        assert "budget" in str(plan)
    assert_unchanged(before, model)
    event = grow(model, plan, probe=probe)
    assert not event.grown
    assert event.parameters[0] == event.parameters[1]


@pytest.mark.parametrize("field", ["max_neurons", "max_parameters", "max_ratio", "max_events", "tolerance"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_budget_below_zero(field, value):
    kind = "a whole number" if field in {"max_neurons", "max_events"} else "a number"
    with pytest.raises(SplitWatchError, match=rf"{field}: required {kind} ≥ 0"):
        GrowthPolicy(**{field: value})


def test_a_layer_that_does_not_exist():
    model, probe = mlp(), Probe(data(4, 4), mse)
    match = r"layers: required the dotted name of a layer the loss uses, found 'nowhere'; choose from 0, 2"
    refused(model, probe, match, action=lambda m, p: measure_geometry(m, p, layers=["nowhere"]))
    geometry = measure_geometry(model, probe)
    refused(model, probe, match, action=lambda m, p: plan_growth(m, geometry, p, GrowthPolicy(layers=["nowhere"])))


def test_a_layer_that_was_not_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    probe = Probe(data(4, 4), mse)
    geometry = measure_geometry(model, probe, layers=["0"])
    refused(
        model,
        probe,
        r"geometry: required a measurement of layer '2', found only \['0'\]; measure it too",
        action=lambda m, p: plan_growth(m, geometry, p, GrowthPolicy(layers=["0", "2"])),
    )


def split(layer, neuron, d, c, coefficients=(0.5, 0.5), size=0.0):
    k = len(coefficients)
    return Split(layer, neuron, coefficients, torch.full((k, d), size), torch.zeros(k, c), 0.0)


def test_a_stale_geometry():
    model, probe = mlp(), Probe(data(8, 8), mse)
    geometry = measure_geometry(model, probe)
    layers = find_hidden_layers(model, probe)
    grow(model, GrowthPlan(layers, (split("0", 1, 4, 2),), "by hand"), probe=probe)
    refused(
        model,
        probe,
        r"geometry: required 5 neurons in '0', found 4; the model changed since it was measured, measure again",
        action=lambda m, p: plan_growth(m, geometry, p),
    )


def test_a_plan_for_a_model_that_has_changed():
    model, probe = mlp(), Probe(data(8, 8), mse)
    plan = GrowthPlan(find_hidden_layers(model, probe), (split("0", 1, 4, 2),), "by hand")
    grow(model, plan, probe=probe)
    match = r"plan: required 4 neurons in 0, found 5; the model changed since the plan was made, plan again"
    refused(model, probe, match, action=lambda m, p: grow(m, plan, probe=p))
    refused(model, probe, match, action=lambda m, _: grow(m, plan))
    refused(
        nn.Sequential(nn.Linear(3, 4)), probe, "plan: required a module named '2'", action=lambda m, _: grow(m, plan)
    )


def test_a_plan_for_another_model():
    model, probe = mlp(), Probe(data(8, 8), mse)
    plan = GrowthPlan(find_hidden_layers(model, probe), (split("0", 1, 4, 2),), "by hand")
    refused(nn.Sequential(nn.Tanh(), nn.Linear(3, 2)), probe, "plan: ", action=lambda m, _: grow(m, plan))


MOVES = {
    "neuron out of range": (split("0", 4, 4, 2), "at most once, found 4"),
    "coefficients": (split("0", 0, 4, 2, (0.5, 0.6)), "coefficients that sum to 1"),
    "one coefficient": (split("0", 0, 4, 2, (1.0,)), "two or more coefficients"),
    "shapes": (split("0", 0, 3, 2), "plan: required weights of shapes"),
    "biases": (
        Sprout("0", torch.ones(4), torch.ones(2), biases=torch.ones(3)),
        r"found .*\(3,\).* its consumers 2 biases",
    ),
    "other layer": (split("2", 0, 3, 2), "plan: required moves in its own layers"),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_that_does_not_fit(name):
    model, probe = mlp(), Probe(data(8, 8), mse)
    move, match = MOVES[name]
    layers = tuple(layer for layer in find_hidden_layers(model, probe) if layer.growable)
    refused(model, probe, match, action=lambda m, p: grow(m, GrowthPlan(layers, (move,), "by hand"), probe=p))


def test_a_neuron_split_twice_in_one_plan():
    model, probe = mlp(), Probe(data(8, 8), mse)
    move = split("0", 1, 4, 2)
    plan = GrowthPlan(find_hidden_layers(model, probe), (move, move), "by hand")
    refused(model, probe, "at most once, found 1", action=lambda m, p: grow(m, plan, probe=p))


def test_vmap_inside_of_the_loss_is_refused_by_name():
    model, x, y = nn.Linear(3, 1), torch.randn(8, 3), torch.randn(8, 1)
    probe = Probe([(x, y)], lambda model, batch: (torch.func.vmap(model)(batch[0]) - batch[1]).square().mean())
    with pytest.raises(SplitWatchError, match="loss_fn: required torch calls on whole batches, found"):
        probe.record(model, probe.fitted[0])
