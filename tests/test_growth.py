import copy
import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from zoo import ZOO, in_turn, mse

from splitwatch.geometry.dense import coupling, inner_hessian, layer_curvature
from splitwatch.geometry.measure import measure_geometry
from splitwatch.growth import grow as growing
from splitwatch.growth.checkpoint import load_grown, make_growable, read_history, recall
from splitwatch.growth.grow import grow, widened
from splitwatch.growth.optimizer import Exchange
from splitwatch.growth.plan import plan_growth
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.growth.stored import stored_redundancy
from splitwatch.growth.surgery import Surgery
from splitwatch.layers import find_hidden_layers
from splitwatch.probe import Probe
from splitwatch.records import GrowthPlan, Split, SplitWatchError, Sprout

torch.set_num_threads(1)

COEFFICIENTS = [(0.5, 0.5), (2.0, -1.0), (1.0, 1.0, -1.0), (0.7, 0.2, 0.1), (1.0, 0.0)]
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}


def growable(model, probe, names=None):
    return tuple(x for x in find_hidden_layers(model, probe) if x.growable and (names is None or x.name in names))


def parted(coefficients, d, c, generator):
    """Random directions in which copies part: Σ λ_j u_j = 0 and Σ δ_j = 0, of total length one."""
    weights = torch.tensor(coefficients, dtype=torch.float64)
    u = torch.randn(len(weights), d, dtype=torch.float64, generator=generator)
    v = torch.randn(len(weights), c, dtype=torch.float64, generator=generator)
    u = u - torch.outer(weights, weights @ u) / (weights @ weights)
    v = v - v.mean(0)
    length = (u.square().sum() + v.square().sum()).sqrt()
    return u / length, v / length


def random_plan(model, probe, layers, coefficients, *, share=1.0, seed=0):
    """Splits of a share of the neurons of every layer along random directions."""
    generator, moves = torch.Generator().manual_seed(seed), []
    patterns = itertools.cycle(coefficients)
    for layer in layers:
        curvature = layer_curvature(model, layer, probe)
        each = layer.width // layer.groups
        for r in range(max(1, round(share * each))):
            pattern = next(patterns)
            for neuron in range(r, layer.width, each):  # one in each group
                u, v = parted(pattern, curvature.d, curvature.c, generator)
                moves.append(Split(layer.name, neuron, pattern, u, v, 0.0))
    return GrowthPlan(layers, tuple(moves), "by hand")


def at(plan, size):
    moves = (replace(x, in_offset=x.in_offset * size, out_offset=x.out_offset * size) for x in plan.moves)
    return replace(plan, moves=tuple(moves))


def outputs(model, probe):
    mode = model.training
    with torch.no_grad():
        found = [model.eval()(batch[0]) for batch in probe.half("all")]
    model.train(mode)
    return found


def relative(new, old):
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(new, old, strict=True))


# --- at zero offset --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), in_turn(ZOO, BOUNDS))
def test_the_function_is_the_same_at_zero_offset(name, dtype):
    for pattern in ([c] for c in COEFFICIENTS):
        model, probe = ZOO[name].make(dtype, samples=4)
        before, loss = outputs(model, probe), probe.loss(model)
        layers = growable(model, probe)
        plan = random_plan(model, probe, layers, pattern, share=0.7)
        widths = {x.name: x.width for x in layers}
        with widened(model, plan, offsets=False):
            assert relative(outputs(model, probe), before) <= BOUNDS[dtype]
        event = grow(model, at(plan, 0.0), probe=probe)
        assert event.grown
        assert event.drift <= BOUNDS[dtype]
        assert relative(outputs(model, probe), before) <= BOUNDS[dtype]
        assert abs(event.realised_fitted) <= 10 * BOUNDS[dtype] * loss
        for layer in layers:
            added = sum(move.added for move in plan.moves if move.layer == layer.name)
            assert event.widths[layer.name] == (widths[layer.name], widths[layer.name] + added)
        found = {x.name: x.width for x in growable(model, probe)}  # and can be widened again
        assert found == {name: after for name, (_, after) in event.widths.items()}


def cancelling(error=1e-4):
    """A float32 network whose outputs are small differences of large terms, and a split of all its neurons."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))
    with torch.no_grad():
        for twins in (model[0].weight, model[0].bias):
            twins[32:] = twins[:32]
        model[2].weight[:, :32] *= 1000
        model[2].weight[:, 32:] = model[2].weight[:, :32] * -(1 + error)
    x = torch.randn(2, 64, 2)
    probe = Probe([(part, part[:, :1]) for part in x], mse)
    offsets = torch.zeros(3, 3), torch.zeros(3, 1)
    moves = [Split("0", r, (0.3, 0.3, 0.4), *offsets, 0.0) for r in range(64)]
    return model, probe, GrowthPlan(growable(model, probe), tuple(moves), "")


def test_rounding_that_cancellation_magnifies_is_no_drift_to_refuse():
    model, probe, plan = cancelling()
    event = grow(model, plan, probe=probe)
    assert event.grown
    assert 1e-5 < event.drift < 1e-3


@pytest.mark.parametrize("name", ZOO)
def test_layers_may_be_widened_one_after_the_other_and_again(name):
    model, probe = ZOO[name].make(samples=4)
    before = outputs(model, probe)
    for step in range(3):
        for layer in [x.name for x in growable(model, probe)]:
            plan = random_plan(model, probe, growable(model, probe, [layer]), COEFFICIENTS, share=0.5, seed=step)
            assert grow(model, at(plan, 0.0), probe=probe).drift <= 1e-12
    assert relative(outputs(model, probe), before) <= 1e-11


def test_batch_norm_in_train_mode_is_the_same_too():
    """Copies have the batch statistics of their source."""
    for name in ("conv+bn", "residual blocks", "inverted bottleneck", "grouped"):
        model, probe = ZOO[name].make()
        plan = random_plan(model, probe, growable(model, probe), COEFFICIENTS)
        x = probe.fitted[0][0]
        before = copy.deepcopy(model).train()(x).detach()
        grow(model, at(plan, 0.0), probe=probe)
        assert relative([model.train()(x).detach()], [before]) <= 1e-12


# --- at finite offset ------------------------------------------------------------------------------------------------


def predicted(model, probe, plan):
    """Decrease at second order, -½ Σ_j [λ_j u_jᵀ S u_j + 2 δ_jᵀ G u_j], from the dense matrices."""
    total = 0.0
    for layer in plan.layers:
        s, g = inner_hessian(model, layer, probe), coupling(model, layer, probe)
        for move in (x for x in plan.moves if x.layer == layer.name):
            weights = torch.tensor(move.coefficients, dtype=torch.float64)
            curved = torch.einsum("j,ja,ab,jb->", weights, move.in_offset, s[move.neuron], move.in_offset)
            mixed = torch.einsum("jc,ca,ja->", move.out_offset, g[move.neuron], move.in_offset)
            total -= 0.5 * float(curved + 2 * mixed)
    return total


def realised(model, probe, plan):
    before = probe.loss(model)
    with widened(model, plan):
        return before - probe.loss(model)


KINKED = {"conv+bn", "flatten", "conv1d"}  # max-pooling, PReLU: smooth only as long as no element changes sides


@pytest.mark.parametrize(("name", "coefficients"), in_turn(ZOO, COEFFICIENTS))
def test_the_second_order_prediction_is_right_to_third_order(name, coefficients):
    model, probe = ZOO[name].make(samples=4)
    sizes = [8e-4, 4e-4, 2e-4] if name in KINKED else [0.04, 0.02, 0.01]
    everything = growable(model, probe)
    groups = [(layer,) for layer in everything] + ([everything] if len(everything) > 1 else [])
    for layers in groups:
        plan = random_plan(model, probe, layers, [coefficients], share=0.5, seed=1)
        second = predicted(model, probe, plan)
        errors = []
        for size in sizes:
            # Of a step and its opposite the larger error: in one of them third and fourth order may cancel.
            gains = [realised(model, probe, at(plan, sign * size)) for sign in (1, -1)]
            errors.append(max(abs(gain - second * size**2) for gain in gains))
        rounding = 1e-15 * probe.loss(model)
        for coarse, fine in itertools.pairwise(errors):
            assert fine <= coarse / 2**2.7 + 4 * rounding


def test_adjacent_layers_add_up():
    model, probe = ZOO["mlp"].make()
    layers = growable(model, probe)
    plan = random_plan(model, probe, layers, [(0.5, 0.5), (2.0, -1.0)])
    parts = [replace(plan, moves=tuple(x for x in plan.moves if x.layer == layer.name)) for layer in layers]
    assert all(part.moves for part in parts)
    size = 1e-3
    together = realised(model, probe, at(plan, size))
    apart = sum(realised(model, probe, at(part, size)) for part in parts)
    assert abs(together - apart) <= 0.02 * max(abs(together), abs(apart))


@pytest.mark.parametrize("name", ZOO)
def test_the_event_says_what_the_plan_measured(name):
    """A plan's decreases are those of the model that it makes, and near the second-order one at small offsets."""
    model, probe = ZOO[name].make(samples=12)
    plan = plan_growth(model, measure_geometry(model, probe), probe, GrowthPolicy(max_neurons=2, moves="splits"))
    if not plan:
        assert "would not help" in plan.reason
        return
    before = probe.loss(model, "fitted"), probe.loss(model, "held_out")
    event = grow(model, plan, probe=probe)
    after = probe.loss(model, "fitted"), probe.loss(model, "held_out")
    assert event.realised_fitted == pytest.approx(before[0] - after[0], rel=1e-12)
    assert event.realised_held_out == pytest.approx(before[1] - after[1], rel=1e-12)
    assert event.realised_fitted == pytest.approx(plan.fitted_decrease, rel=1e-9)
    assert event.realised_held_out == pytest.approx(plan.held_out_decrease, rel=1e-9)
    assert event.realised_fitted > 0
    if name in KINKED:
        return
    small = min(plan.line_search, key=lambda item: abs(item[0]))
    assert small[1] == pytest.approx(plan.predicted_decrease * (small[0] / plan.offset) ** 2, rel=0.1)


# --- atomicity -------------------------------------------------------------------------------------------------------


def mlp(widths=(3, 4, 5, 2), dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    parts = [part for layer in layers for part in (layer, nn.Tanh())]
    return nn.Sequential(*parts[:-1]).to(dtype)


def data(*sizes, d=3, c=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(n, k, generator=generator, dtype=dtype) for k in (d, c)) for n in sizes]


def train(model, optimizer, batches, scheduler=None):
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = mse(model, batch)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def trained(seed=0):
    """A model with gradients, two optimizers with state, a probe and a plan for both of its layers."""
    model, batches = mlp(seed=seed), data(6, 6)
    optimizers = [
        torch.optim.AdamW([*model[0].parameters(), *model[2].parameters()], lr=1e-2),
        torch.optim.SGD(model[4].parameters(), lr=1e-2, momentum=0.9),
    ]
    for optimizer in optimizers:
        train(model, optimizer, batches)
    probe = Probe(batches, mse)
    plan = at(random_plan(model, probe, growable(model, probe), COEFFICIENTS), 0.1)
    return model, optimizers, probe, plan


def picture(model, optimizers):
    """Every object by identity, with a copy of what it holds."""
    parameters = [(name, p, p.detach().clone(), p.grad, p.grad.clone()) for name, p in model.named_parameters()]
    groups = [[(group, list(group["params"])) for group in o.param_groups] for o in optimizers]
    states = [
        [
            (p, state, {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()})
            for p, state in o.state.items()
        ]
        for o in optimizers
    ]
    return parameters, groups, states, str(model), model.training


def assert_untouched(before, model, optimizers):
    parameters, groups, states, text, training = before
    now = list(model.named_parameters())
    assert [name for name, *_ in parameters] == [name for name, _ in now]
    for (_, old, value, grad, grad_value), (_, new) in zip(parameters, now, strict=True):
        assert old is new
        assert old.grad is grad
        assert torch.equal(old, value)
        assert torch.equal(grad, grad_value)
    assert (str(model), model.training) == (text, training)
    for optimizer, old_groups, old_states in zip(optimizers, groups, states, strict=True):
        for group, (old_group, members) in zip(optimizer.param_groups, old_groups, strict=True):
            assert group is old_group
            assert all(a is b for a, b in zip(group["params"], members, strict=True))
        assert len(optimizer.state) == len(old_states)
        for parameter, state, copied in old_states:
            assert optimizer.state[parameter] is state
            assert state.keys() == copied.keys()
            assert all(
                torch.equal(state[k], v) if isinstance(v, torch.Tensor) else state[k] == v for k, v in copied.items()
            )


class InjectedError(Exception):
    """A failure that nothing else raises."""


def fail_in_the_exchange(monkeypatch, model, optimizers, probe):
    commit = Exchange.commit

    def failing(self):
        if self.optimizer is optimizers[-1]:
            group, position, _, new = self.parameters[0]
            group["params"][position] = new
            raise InjectedError
        commit(self)

    monkeypatch.setattr(Exchange, "commit", failing)
    return probe


def fail_after_the_exchange(monkeypatch, model, optimizers, probe):
    commit = Exchange.commit

    def failing(self):
        commit(self)
        raise InjectedError

    monkeypatch.setattr(Exchange, "commit", failing)
    return probe


def fail_in_the_loss_after_growth(monkeypatch, model, optimizers, probe):
    def loss(model, batch):
        if optimizers[0].param_groups[0]["params"][0].shape[0] > 4:
            raise InjectedError
        return mse(model, batch)

    return Probe(probe.half("all"), loss)


def fail_when_remembering(monkeypatch, model, optimizers, probe):
    def failing(model, plan):
        raise InjectedError

    monkeypatch.setattr(growing, "remember", failing)
    return probe


FAILURES = [
    fail_in_the_exchange,
    fail_after_the_exchange,
    fail_in_the_loss_after_growth,
    fail_when_remembering,
]


@pytest.mark.parametrize("failure", FAILURES)
def test_any_failure_leaves_model_and_optimizers_as_they_were(failure, monkeypatch):
    model, optimizers, probe, plan = trained()
    before = picture(model, optimizers)
    probe = failure(monkeypatch, model, optimizers, probe)
    with pytest.raises(InjectedError):
        grow(model, plan, optimizers, probe=probe)
    assert_untouched(before, model, optimizers)
    monkeypatch.undo()
    train(model, optimizers[0], data(6, 6))  # and it trains on
    assert grow(model, plan, optimizers, probe=Probe(data(6, 6), mse)).grown


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 6])
def test_a_failure_between_two_assignments_is_undone(steps, monkeypatch):
    model, optimizers, _, plan = trained()
    before = picture(model, optimizers)
    done, failed = [], []

    def assign(module, name, value):
        if name in ("weight", "bias", "in_features", "out_features") and not failed:
            if len(done) == steps:
                failed.append(1)
                raise InjectedError
            done.append(name)
        nn.Module.__setattr__(module, name, value)

    monkeypatch.setattr(nn.Linear, "__setattr__", assign)
    with pytest.raises(InjectedError):
        grow(model, plan, optimizers)
    assert failed
    assert_untouched(before, model, optimizers)


def test_a_failing_commit_of_the_surgery_is_undone(monkeypatch):
    model, optimizers, probe, plan = trained()
    before = picture(model, optimizers)
    commit, calls = Surgery.commit, []

    def failing(self):
        calls.append(1)
        if len(calls) == 3:  # after the two of the check at zero offset
            raise InjectedError
        return commit(self)

    monkeypatch.setattr(Surgery, "commit", failing)
    with pytest.raises(InjectedError):
        grow(model, plan, optimizers, probe=probe)
    assert_untouched(before, model, optimizers)


class HardCoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).view(-1, 4))


def test_a_width_written_into_the_code_is_a_clear_error():
    torch.manual_seed(0)
    model, batches = HardCoded().double(), data(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, batches)
    probe = Probe(batches, mse)
    plan = GrowthPlan(
        growable(model, probe), (Split("first", 0, (0.5, 0.5), torch.zeros(2, 4), torch.zeros(2, 2), 0.0),), ""
    )
    before = picture(model, [optimizer])
    with pytest.raises(
        SplitWatchError, match=r"model: required a forward pass that follows .*'first'.*view\(-1, 128\)"
    ):
        grow(model, plan, optimizer, probe=probe)
    assert_untouched(before, model, [optimizer])


def test_a_function_that_changes_at_zero_offset_is_refused():
    """A width read by the forward pass rescales the output: shapes fit, the function does not."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return self.second(h / h.shape[1] ** 0.5)

    torch.manual_seed(0)
    model, batches = Scaled().double(), data(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, batches)
    probe = Probe(batches, mse)
    plan = GrowthPlan(
        growable(model, probe), (Split("first", 0, (0.5, 0.5), torch.zeros(2, 4), torch.zeros(2, 2), 0.0),), ""
    )
    before = picture(model, [optimizer])
    with pytest.raises(SplitWatchError, match=r"plan: required outputs that change by at most 1e-12"):
        grow(model, plan, optimizer, probe=probe)
    assert_untouched(before, model, [optimizer])


# --- optimizers ------------------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD+momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "SGD+nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
}


def conv_bn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.SiLU(), nn.Conv1d(4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)
    )  # fmt: skip


def sprouts(model, probe):
    """One dead neuron in every layer."""
    moves, layers = [], growable(model, probe)
    for layer in layers:
        curvature = layer_curvature(model, layer, probe)
        moves.append(Sprout(layer.name, torch.zeros(curvature.d), torch.zeros(curvature.c)))
    return GrowthPlan(layers, tuple(moves), "dead neurons")


@pytest.mark.parametrize(("name", "kind", "dtype"), in_turn(OPTIMIZERS, ["mlp", "conv+bn"], BOUNDS, quick=2))
def test_dead_neurons_leave_the_loss_trajectory_as_it_was(name, kind, dtype):
    runs = []
    shape = (3,) if kind == "mlp" else (2, 6)
    generator = torch.Generator().manual_seed(5)
    batches = [
        (torch.randn(8, *shape, generator=generator).to(dtype), torch.randn(8, 2, generator=generator).to(dtype))
        for _ in range(30)
    ]
    for widen in (False, True):
        model = mlp(dtype=dtype) if kind == "mlp" else conv_bn().to(dtype)
        optimizer = OPTIMIZERS[name](model.parameters())
        scheduler = None
        if "momentum" in optimizer.defaults or "betas" in optimizer.defaults:
            cycled = name not in ("SGD", "RMSprop")
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=40, cycle_momentum=cycled)
        losses = train(model, optimizer, batches[:10], scheduler)
        if widen:
            probe = Probe(batches[:2], mse)
            event = grow(model, sprouts(model, probe), optimizer, probe=probe)
            assert event.grown
            assert event.restarted == ()
            assert event.parameters[1] > event.parameters[0]
        losses += train(model, optimizer, batches[10:], scheduler)
        runs.append(losses)
    bound = 1e-10 if dtype == torch.float64 else 1e-6
    straight, widened_ = (torch.tensor(run, dtype=torch.float64) for run in runs)
    assert float(((straight - widened_).abs() / straight).max()) <= bound
    assert straight[-1] != straight[0]


OWNERS = [(name, grown) for name in [*OPTIMIZERS, "LBFGS"] for grown in (None, "0", "2")]


@pytest.mark.parametrize(("name", "grown"), OWNERS)
def test_optimizers_own_exactly_the_live_parameters_and_train_on(name, grown):
    model, batches = mlp(), data(6, 6)
    make = OPTIMIZERS.get(name, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = mse(model, batches[0])
        loss.backward()
        return loss.detach() if name == "LBFGS" else loss

    for _ in range(3):
        optimizer.step(closure)
    probe = Probe(batches, mse)
    layers = growable(model, probe, None if grown is None else [grown])
    grow(model, at(random_plan(model, probe, layers, COEFFICIENTS), 0.01), optimizer, probe=probe)
    live = [id(p) for p in model.parameters()]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == live
    assert {id(p) for p in optimizer.state} <= set(live)
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if name != "LBFGS" and isinstance(value, torch.Tensor) and value.ndim:
                assert value.shape == parameter.shape
                assert value.dtype == parameter.dtype
    before = float(mse(model, batches[0]).detach())
    for _ in range(30):
        optimizer.step(closure)
    assert float(mse(model, batches[0]).detach()) < before
    fresh = make(model.parameters())
    fresh.load_state_dict(optimizer.state_dict())


def test_parameter_groups_flags_and_attributes_are_kept():
    model, batches = mlp(), data(6, 6)
    model[0].weight.mark = "kept"
    model[0].bias.requires_grad_(True)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "lr": 0.1, "name": "weights"},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    probe = Probe(batches, mse)
    inner = [group["params"] for group in optimizer.param_groups]
    grow(model, random_plan(model, probe, growable(model, probe), COEFFICIENTS), optimizer, probe=probe)
    assert model[0].weight.mark == "kept"
    assert all(a is group["params"] for a, group in zip(inner, optimizer.param_groups, strict=True))
    expected = [[p for p in model.parameters() if (p.ndim > 1) == matrices] for matrices in (True, False)]
    for group, members in zip(optimizer.param_groups, expected, strict=True):
        assert all(a is b for a, b in zip(group["params"], members, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_parameters_of_equal_values_are_told_apart():
    """Biases that all begin at zero: by value each would be every other."""
    model, batches = mlp((3, 4, 4, 4)), data(6, 6, c=4)
    for layer in (model[0], model[2], model[4]):
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    train(model, optimizer, batches)
    probe = Probe(batches, mse)
    kept = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
    grow(model, at(random_plan(model, probe, growable(model, probe, ["2"]), COEFFICIENTS), 0.0), optimizer, probe=probe)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    for name in ("0.weight", "0.bias", "4.bias"):
        assert optimizer.state[model.get_parameter(name)]["exp_avg"] is kept[name]
    assert len(optimizer.state[model[2].bias]["exp_avg"]) == len(model[2].bias) > 4


def test_parameters_are_replaced_and_neither_resized_nor_reordered():
    model, batches = mlp(), data(6, 6)
    probe, before = Probe(batches, mse), dict(model.named_parameters())
    shapes = {name: p.shape for name, p in before.items()}
    loss = mse(model, batches[0])
    grow(model, random_plan(model, probe, growable(model, probe), COEFFICIENTS), probe=probe)
    assert [name for name, _ in model.named_parameters()] == list(before)
    assert {name: p.shape for name, p in before.items()} == shapes
    loss.backward()  # a graph that was recorded before growth leads to the old parameters
    assert all(p.grad.shape == p.shape for p in before.values())
    assert all(p.grad is None for name, p in model.named_parameters() if p is not before[name])


class Factored(torch.optim.SGD):
    """Keeps a state of half a parameter's rows, as no index map can carry."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["half"] = p.detach()[: len(p) // 2].clone()
        return super().step(closure)


def test_a_state_of_unknown_layout_starts_anew_and_is_named():
    model, batches = mlp(), data(6, 6)
    optimizer, probe = Factored(model.parameters(), lr=0.01), Probe(batches, mse)
    train(model, optimizer, batches)
    event = grow(model, random_plan(model, probe, growable(model, probe, ["0"]), COEFFICIENTS), optimizer, probe=probe)
    assert event.restarted == ("0.weight", "0.bias", "2.weight")
    assert [name for name, p in model.named_parameters() if not optimizer.state[p]] == list(event.restarted)
    train(model, optimizer, batches)


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_optimizers_that_normalise_by_shape_train_on(name):
    """No growth is null to them; their state is carried where its layout is known and starts anew where not."""
    model, batches = mlp(dtype=torch.float32), data(6, 6, dtype=torch.float32)
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizer = getattr(torch.optim, name)(matrices, lr=0.01)
    train(model, optimizer, batches)
    probe = Probe(batches, mse)
    event = grow(
        model, at(random_plan(model, probe, growable(model, probe), COEFFICIENTS), 0.01), optimizer, probe=probe
    )
    assert bool(event.restarted) == (name == "Adafactor")
    before = mse(model, batches[0]).item()
    train(model, optimizer, batches * 10)
    assert mse(model, batches[0]).item() < before
    assert {id(p) for p in optimizer.param_groups[0]["params"]} <= set(map(id, model.parameters()))


SOURCES = [[0, 1, 2, 3, 0, 2, 2], [0, 1, 2, 3, 4, 4]]
LAMBDAS = [[2.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0, 0.25, 0.75]]
SPLITS = {"0": {0: (2.0, -1.0), 2: (1.0, 1.0, -1.0)}, "2": {4: (0.25, 0.75)}}


def duplicated(narrow):
    """The narrow network with copied neurons, written out by hand."""
    sources = [torch.tensor(source) for source in SOURCES]
    weights = [torch.tensor(values, dtype=torch.float64) for values in LAMBDAS]
    wide = mlp((3, 7, 6, 2))
    with torch.no_grad():
        wide[0].weight.copy_(narrow[0].weight[sources[0]])
        wide[0].bias.copy_(narrow[0].bias[sources[0]])
        wide[2].weight.copy_(narrow[2].weight[sources[1]][:, sources[0]] * weights[0])
        wide[2].bias.copy_(narrow[2].bias[sources[1]])
        wide[4].weight.copy_(narrow[4].weight[:, sources[1]] * weights[1])
        wide[4].bias.copy_(narrow[4].bias)
    return wide


STILL = {
    "SGD+momentum": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "SGD+nesterov": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.0),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.0, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.0, centered=True, eps=0.0),
    "RMSprop+momentum": lambda p: torch.optim.RMSprop(p, lr=0.0, momentum=0.5, eps=0.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.0),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.0),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.0, eps=0.0),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.0, eps=1e-30),
}


@pytest.mark.parametrize("name", STILL)
def test_state_is_that_of_a_network_that_had_the_copies_from_the_start(name):
    """With a step size of zero both networks see the same gradients, so their states obey the identities exactly."""
    narrow, batches = mlp(), data(6, 5, 7, 6)
    wide = duplicated(narrow)
    for model in (narrow, wide):
        model.optimizer = STILL[name](list(model.parameters()))
        train(model, model.optimizer, batches)
    probe = Probe(batches, mse)
    moves = tuple(
        Split(layer.name, r, pattern, torch.zeros(len(pattern), d), torch.zeros(len(pattern), c), 0.0)
        for layer, d, c in zip(growable(narrow, probe), (4, 5), (5, 2), strict=True)
        for r, pattern in SPLITS[layer.name].items()
    )
    grow(narrow, GrowthPlan(growable(narrow, probe), moves, ""), narrow.optimizer, probe=probe)
    for (key, grown), (_, expected) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        torch.testing.assert_close(grown, expected, rtol=1e-12, atol=1e-14, msg=key)
        torch.testing.assert_close(grown.grad, expected.grad, rtol=1e-10, atol=1e-14, msg=f"gradient of {key}")
        found, wanted = narrow.optimizer.state[grown], wide.optimizer.state[expected]
        assert found.keys() == wanted.keys()
        for entry, value in wanted.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found[entry], value, rtol=1e-9, atol=1e-14, msg=f"{entry} of {key}")


def test_gradients_are_carried_so_that_accumulation_goes_on():
    narrow, batches = mlp(), data(6, 5)
    wide = duplicated(narrow)
    for model in (narrow, wide):
        mse(model, batches[0]).backward()
    probe = Probe(batches, mse)
    moves = tuple(
        Split(layer.name, r, pattern, torch.zeros(len(pattern), d), torch.zeros(len(pattern), c), 0.0)
        for layer, d, c in zip(growable(narrow, probe), (4, 5), (5, 2), strict=True)
        for r, pattern in SPLITS[layer.name].items()
    )
    grow(narrow, GrowthPlan(growable(narrow, probe), moves, ""), probe=probe)
    for model in (narrow, wide):
        mse(model, batches[1]).backward()
    for grown, expected in zip(narrow.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(grown.grad, expected.grad, rtol=1e-10, atol=1e-13)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def build(name):
    """A fresh narrow model with other weights."""
    return ZOO[name].make(seed=9)[0]


def grown_twice(name):
    model, probe = ZOO[name].make(samples=4)
    for seed in range(2):
        layers = growable(model, probe)
        grow(model, at(random_plan(model, probe, layers, COEFFICIENTS, share=0.5, seed=seed), 0.1), probe=probe)
    return model, probe


@pytest.mark.parametrize("name", ZOO)
def test_a_narrow_model_loads_a_wide_checkpoint(name, tmp_path):
    model, probe = grown_twice(name)
    torch.save(model.state_dict(), tmp_path / "wide.pt")
    fresh = build(name)
    make_growable(fresh)
    assert not fresh.load_state_dict(torch.load(tmp_path / "wide.pt", weights_only=True)).missing_keys
    assert str(fresh) == str(model)
    for (key, a), (_, b) in zip(fresh.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh, probe), outputs(model, probe), strict=True))
    loaded = load_grown(lambda: build(name), tmp_path / "wide.pt")
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, probe), outputs(model, probe), strict=True))
    # What was loaded can be saved, loaded and widened again.
    torch.save(loaded.state_dict(), tmp_path / "again.pt")
    again = load_grown(lambda: build(name), tmp_path / "again.pt")
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, probe), outputs(model, probe), strict=True))
    assert {x.name: x.width for x in growable(again, probe)} == {x.name: x.width for x in growable(model, probe)}


class Holder(nn.Module):
    """A model whose part grows."""

    def __init__(self, student):
        super().__init__()
        self.student, self.teacher = student, nn.Linear(2, 2)


def test_a_checkpoint_of_a_model_whose_part_has_grown_is_loaded(tmp_path):
    model, probe = grown_twice("mlp")
    torch.save(Holder(model).state_dict(), tmp_path / "whole.pt")
    loaded = load_grown(lambda: Holder(build("mlp")), tmp_path / "whole.pt")
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded.student, probe), outputs(model, probe), strict=True))


def test_a_checkpoint_of_a_model_with_two_parts_that_have_grown_is_loaded(tmp_path):
    (one, probe), (other, more) = grown_twice("mlp"), grown_twice("gated")
    saved, make = tmp_path / "both.pt", lambda: nn.ModuleDict({"one": build("mlp"), "other": build("gated")})
    torch.save(nn.ModuleDict({"one": one, "other": other}).state_dict(), saved)
    by_hand = make()
    make_growable(by_hand)
    by_hand.load_state_dict(torch.load(saved, weights_only=True))
    for loaded in (load_grown(make, saved), by_hand):
        for part, model, at in ((loaded["one"], one, probe), (loaded["other"], other, more)):
            assert all(torch.equal(a, b) for a, b in zip(outputs(part, at), outputs(model, at), strict=True))
        torch.save(loaded.state_dict(), tmp_path / "again.pt")
        assert read_history(tmp_path / "again.pt") == read_history(saved)
    parts = {f"{part}.{name}" for part, model in (("one", one), ("other", other)) for name in recall(model)}
    assert parts == {*read_history(saved)} == {*stored_redundancy(saved)}
    assert all(found is not None for found in stored_redundancy(saved).values())


def test_a_file_that_lost_its_record_of_growth_is_refused_with_the_cure(tmp_path):
    model, _ = grown_twice("mlp")
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "copied.pt")
    with pytest.raises(SplitWatchError, match=r"path: required a record of what grew .* save the whole state dict"):
        load_grown(lambda: build("mlp"), tmp_path / "copied.pt")
    torch.save(build("mlp").state_dict() | {"more": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_grown(lambda: build("mlp"), tmp_path / "other.pt")


def test_only_hyperparameters_that_are_taken_are_passed_on(tmp_path):
    model, probe = grown_twice("mlp")
    saved = {"name": "mlp", "rate": 0.1, "_instantiator": "whoever made it"}
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": saved}, tmp_path / "last.ckpt")
    given = {}

    def named(name):
        return build(name)

    def anything(**settings):
        given.update(settings)
        return build(settings["name"])

    for make in (named, anything, lambda: build("mlp")):
        loaded = load_grown(make, tmp_path / "last.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, probe), outputs(model, probe), strict=True))
    assert given == {"name": "mlp", "rate": 0.1}


@pytest.mark.parametrize("name", ZOO)
def test_a_wide_model_loads_the_narrow_checkpoint_it_came_from(name, tmp_path):
    narrow, probe = ZOO[name].make(samples=4)
    torch.save(narrow.state_dict(), tmp_path / "narrow.pt")
    model, _ = grown_twice(name)
    model.load_state_dict(torch.load(tmp_path / "narrow.pt", weights_only=True))
    assert str(model) == str(narrow)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, probe), outputs(narrow, probe), strict=True))


@pytest.mark.parametrize("name", ["mlp", "concatenation", "conv+bn"])
def test_a_mismatch_that_growth_does_not_explain_is_torchs_error(name, tmp_path):
    model, _ = grown_twice(name)
    state = model.state_dict()
    key = [key for key in state if key.endswith("weight")][-1]
    broken = copy.copy(state)
    broken[key] = torch.zeros(state[key].shape[0] + 1, *state[key].shape[1:])
    fresh = build(name)
    make_growable(fresh)
    with pytest.raises(RuntimeError, match=rf"size mismatch for {key}"):
        fresh.load_state_dict(broken)
    extra = copy.copy(state)
    extra["surplus"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"surplus\""):
        build_growable(name).load_state_dict(extra)
    missing = copy.copy(state)
    del missing[key]
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: .*{key}"):
        build_growable(name).load_state_dict(missing)


def build_growable(name):
    model = build(name)
    make_growable(model)
    return model


def test_without_permission_a_narrow_model_refuses_a_wide_checkpoint():
    model, _ = grown_twice("mlp")
    with pytest.raises(RuntimeError, match="size mismatch"):
        build("mlp").load_state_dict(model.state_dict())


def test_shapes_are_enough_for_a_model_that_knows_its_growth():
    narrow, _ = ZOO["mlp"].make(samples=4)
    model, _ = grown_twice("mlp")
    wide = dict(model.state_dict())  # a plain dict: what it knew of growth is lost
    model.load_state_dict(dict(narrow.state_dict()))
    assert str(model) == str(narrow)
    model.load_state_dict(wide)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), wide.values(), strict=True))
    hooks = (len(model._load_state_dict_pre_hooks), len(model._state_dict_hooks))
    make_growable(model)
    assert hooks == (len(model._load_state_dict_pre_hooks), len(model._state_dict_hooks)) == (1, 1)


def test_an_ungrown_model_of_another_width_is_torchs_error():
    fresh = mlp((3, 4, 5, 2))
    make_growable(fresh)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(mlp((3, 6, 5, 2)).state_dict())


def test_load_grown_needs_a_state_dict(tmp_path):
    torch.save({"state_dict": 3}, tmp_path / "no.pt")
    with pytest.raises(SplitWatchError, match="path: required a Lightning checkpoint or a state dict"):
        load_grown(mlp, tmp_path / "no.pt")


def test_a_grown_model_inside_another_module(tmp_path):
    model, probe = grown_twice("mlp")
    torch.save(nn.ModuleDict({"net": model}).state_dict(), tmp_path / "wrapped.pt")
    fresh = build_growable("mlp")
    nn.ModuleDict({"net": fresh}).load_state_dict(torch.load(tmp_path / "wrapped.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh, probe), outputs(model, probe), strict=True))


def test_a_grown_model_can_be_copied_and_pickled(tmp_path):
    model, probe = grown_twice("conv+bn")
    torch.save(model, tmp_path / "whole.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert all(torch.equal(a, b) for a, b in zip(outputs(twin, probe), outputs(model, probe), strict=True))
        layers = growable(twin, probe)
        grow(twin, at(random_plan(twin, probe, layers, COEFFICIENTS, share=0.3), 0.1), probe=probe)
        fresh = build_growable("conv+bn")
        fresh.load_state_dict(twin.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(outputs(fresh, probe), outputs(twin, probe), strict=True))
    fresh = build_growable("conv+bn")
    fresh.load_state_dict(model.state_dict())  # the original's history is its own


# --- the escape is real ----------------------------------------------------------------------------------------------


def scalar_net(m, activation, seed, output_bias=False):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, m, bias=False), activation(), nn.Linear(m, 1, bias=output_bias)).double()


def dense_hessian(model, batch):
    """Loss Hessian in all parameters, brute force, and the gradient."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.mse_loss(functional_call(model, values, (batch[0],)), batch[1])

    point = flat.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(point), point)[0]
    return torch.autograd.functional.hessian(loss, flat), gradient, flat


def minimise(model, batch):
    """L-BFGS, then Newton; the smallest Hessian eigenvalue, or None where that leads to no strict minimum."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        lr=1.0,
        max_iter=400,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = mse(model, batch)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    for _ in range(8):
        hessian, gradient, flat = dense_hessian(model, batch)
        smallest = float(torch.linalg.eigvalsh(hessian)[0])
        if not smallest > 1e-5 or flat.abs().max() > 20:
            return None
        if float(gradient.norm()) <= 1e-13:
            break
        nn.utils.vector_to_parameters(flat - torch.linalg.solve(hessian, gradient), model.parameters())
    return smallest if float(dense_hessian(model, batch)[1].norm()) <= 1e-10 else None


def inner_spectra(model, batch):
    """Eigenvalues of the inner Hessians E[(v_r·e) σ'' x xᵀ], (m, d), with finite differences of σ' for σ''."""
    x = batch[0]
    with torch.no_grad():
        signal = 2 * (model(x) - batch[1]) @ model[2].weight
        a, h = model[0](x), 1e-4
        bend = (model[1](a + h) - 2 * model[1](a) + model[1](a - h)) / h**2
    return torch.linalg.eigvalsh(torch.einsum("nr,ni,nj->rij", signal * bend, x, x) / len(x))


@cache
def positive_minimum(m, activation, output_bias, start):
    """A strict minimum of a scalar network with a neuron whose inner Hessian is positive definite, and that neuron.

    It is looked for once; nobody changes it.
    """
    for seed in range(start, start + 100):
        torch.manual_seed(1000 + seed)
        x = torch.randn(20, 2, dtype=torch.float64)
        teacher = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        batch = x, 2 * teacher(2 * x).detach() + 0.2 * torch.randn(20, 1, dtype=torch.float64)
        model = scalar_net(m, activation, seed, output_bias)
        if minimise(model, batch) is None:
            continue
        spectra = inner_spectra(model, batch)
        positive = (spectra[:, 0] > 1e-3).nonzero()
        if len(positive):
            print(f"seed {seed}: a strict minimum with inner spectra {spectra.tolist()}")
            return model, batch, int(positive[0])
    raise AssertionError("no such minimum among these seeds")


def descend(model, batch, steps, lr):
    """Plain gradient descent; the lowest loss met."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return min(train(model, optimizer, [batch] * steps))


def split(model, probe, neuron, coefficients, size=0.0):
    """The network with one neuron split along a random direction of a given length."""
    wide, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    layers = growable(wide, probe)
    u, v = (size * part for part in parted(coefficients, 2, 1, generator))
    grow(wide, GrowthPlan(layers, (Split("0", neuron, coefficients, u, 0 * v, 0.0),), "by hand"), probe=probe)
    return wide


def assert_no_way_down(model, batch, lowest):
    """No negative curvature, and plain descent from nearby ends no lower."""
    hessian, gradient, _ = dense_hessian(model, batch)
    values = torch.linalg.eigvalsh(hessian)
    assert float(gradient.norm()) <= 1e-10
    assert float(values[0]) >= -1e-10 * float(values[-1])
    for seed in range(3):
        torch.manual_seed(seed)
        nudged = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in nudged.parameters():
                parameter += 1e-3 * torch.randn_like(parameter)
        assert descend(nudged, batch, 500, 0.5 / float(values[-1])) >= lowest - 1e-13


def assert_strict_saddle(model, batch):
    """Stationary with a negative curvature; the largest curvature."""
    hessian, gradient, _ = dense_hessian(model, batch)
    values = torch.linalg.eigvalsh(hessian)
    assert float(gradient.norm()) <= 1e-9
    assert float(values[0]) < -1e-4 * float(values[-1])
    return float(values[-1])


MINIMA = [
    pytest.param(1, nn.Tanh, False, 11, id="tanh"),
    pytest.param(1, nn.Softplus, False, 5, id="softplus", marks=pytest.mark.slow),
    pytest.param(1, nn.Softplus, True, 42, id="softplus and output bias"),
    pytest.param(2, nn.Softplus, False, 3, id="two neurons", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("m", "activation", "output_bias", "start"), MINIMA)
def test_the_escape_is_real(m, activation, output_bias, start):
    model, batch, neuron = positive_minimum(m, activation, output_bias, start)
    hessian, gradient, _ = dense_hessian(model, batch)
    assert float(gradient.norm()) <= 1e-10
    assert float(torch.linalg.eigvalsh(hessian)[0]) > 1e-5
    probe = Probe([batch, batch], mse)  # the same data in both halves: the minimum is one for each of them
    lowest = probe.loss(model)
    assert_no_way_down(split(model, probe, neuron, (0.5, 0.5)), batch, lowest)
    assert_no_way_down(split(model, probe, neuron, (0.2, 0.3, 0.5)), batch, lowest)

    geometry = measure_geometry(model, probe)
    assert geometry["0"].min_eigenvalue[neuron] > 0
    for choice in ("auto", "signed") if m == 1 else ("signed",):  # a second neuron may escape in equal shares
        plan = plan_growth(model, geometry, probe, GrowthPolicy(max_ratio=None, coefficients=choice, moves="splits"))
        assert plan, plan.reason
        move = next(move for move in plan.moves if move.neuron == neuron)
        assert min(move.coefficients) < 0
        sharpest = assert_strict_saddle(split(model, probe, neuron, move.coefficients), batch)
        wide = copy.deepcopy(model)
        event = grow(wide, replace(plan, moves=(move,)), probe=probe)
        assert event.drift <= 1e-12
        assert event.realised_fitted > 0
        assert descend(wide, batch, 500, 0.3 / sharpest) < lowest - event.realised_fitted
    # Any small parting of signed copies leads down, too: it needs no line search.
    nudged = split(model, probe, neuron, (2.0, -1.0), size=1e-3)
    assert descend(nudged, batch, 3000, 0.5 / sharpest) < lowest - 1e-9


def test_equal_coefficients_alone_find_no_way_down_there():
    model, batch, _ = positive_minimum(1, nn.Tanh, False, 11)
    probe = Probe([batch, batch], mse)
    plan = plan_growth(model, measure_geometry(model, probe), probe, GrowthPolicy(coefficients="equal", moves="splits"))
    assert not plan
    assert "growth would not help here" in plan.reason


@pytest.mark.parametrize("limit", [90, 120, 150, 200])
def test_a_budget_of_parameters_is_never_exceeded_by_neighbours_that_grow_together(limit):
    model, probe = ZOO["mlp"].make()
    geometry = measure_geometry(model, probe)
    plan = plan_growth(model, geometry, probe, GrowthPolicy(max_parameters=limit, max_ratio=None))
    event = grow(model, plan, probe=probe)
    assert event.parameters[1] == sum(p.numel() for p in model.parameters()) <= limit
