"""Surgery on networks put together at random: the function, the optimizers, the gradients, and the way back."""

import copy
from dataclasses import replace

import pytest
import torch
from architectures import BUILDERS, cases, optimizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_growth import outputs
from torch.optim import LBFGS
from zoo import mse

from splitwatch import Split, find_hidden_layers, grow
from splitwatch.growth.grow import widened
from splitwatch.growth.reduction import critical_reduction

BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}
QUICK = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
THOROUGH = settings(QUICK, max_examples=60)


def bound(case, parameter):
    """Of relative differences in what consumers put out: that of the precision, times the largest Σ|λ|."""
    sums = [sum(map(abs, move.coefficients)) for move in case.plan.moves if isinstance(move, Split)]
    return BOUNDS[parameter.dtype] * max([1.0, *sums])


def relative(new, old):
    """The largest difference of outputs, which may be zero throughout where a ReLU has died."""
    pairs = zip(new, old, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9)) for a, b in pairs)


def without_offsets(move):
    """The same move without any change of the function."""
    if isinstance(move, Split):
        still = {"in_offset": torch.zeros_like(move.in_offset), "out_offset": torch.zeros_like(move.out_offset)}
    else:
        still = {"outgoing": torch.zeros_like(move.outgoing), "others": None, "biases": None}
    return replace(move, **still)


def splits(plan):
    return replace(plan, moves=tuple(without_offsets(move) for move in plan.moves if isinstance(move, Split)))


def train(case, trained, steps=2):
    """Some steps of all optimizers on the first batch."""
    for _ in range(steps):
        for optimizer in trained:

            def closure():
                case.model.zero_grad()
                loss = mse(case.model, case.probe.fitted[0])
                loss.backward()
                return loss

            optimizer.step(closure)


def assert_surgery(case, make):
    model, probe, plan = case.model, case.probe, case.plan
    trained = make(model)
    if any(isinstance(optimizer, LBFGS) for optimizer in trained):
        model.to(memory_format=torch.contiguous_format)  # it takes views of gradients
    train(case, trained)
    assert_the_function_stays(case)
    assert_there_is_a_way_back(case)
    order = [[n for n, p in model.named_parameters() if id(p) in ids] for ids in map(owned, trained)]
    keys, mode = list(model.state_dict()), model.training
    gradients = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    event = grow(model, plan, trained, probe=probe)
    assert event.grown == bool(plan.moves)
    assert list(model.state_dict()) == keys
    assert model.training == mode
    live = dict(model.named_parameters())
    assert [[id(live[name]) for name in names] for names in order] == [
        [key for key in map(id, live.values()) if key in ids] for ids in map(owned, trained)
    ]
    assert set().union(*map(owned, trained)) == set(map(id, live.values()))
    assert {name: parameter.grad is not None for name, parameter in live.items()} == gradients
    assert all(p.grad.shape == p.shape and p.grad.dtype == p.dtype for p in live.values() if p.grad is not None)
    assert_state_fits(trained)
    before = {name: parameter.detach().clone() for name, parameter in live.items()}
    train(case, trained)
    assert_state_fits(trained)
    for name, parameter in model.named_parameters():
        assert parameter is live[name]
        if parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-3:
            assert not torch.equal(parameter, before[name]), name


def owned(optimizer):
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def assert_state_fits(trained):
    for optimizer in trained:
        assert set(map(id, optimizer.state)) <= set(owned(optimizer))
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim and not isinstance(optimizer, LBFGS):
                    wanted = {
                        "row_var": (*parameter.shape[:-1], 1),
                        "col_var": (*parameter.shape[:-2], 1, parameter.shape[-1]),
                    }
                    assert tuple(value.shape) == wanted.get(key, tuple(parameter.shape)), key
                    assert value.dtype == parameter.dtype


def assert_the_function_stays(case):
    """Also in training mode, with the gradients that the widened network has by itself."""
    model, probe, parameter = case.model, case.probe, next(case.model.parameters())
    expected, limit = outputs(model, probe), bound(case, parameter)
    with widened(model, case.plan, offsets=False):
        assert relative(outputs(model, probe), expected) <= 4 * limit  # what cancels in them counts as well
    wide = copy.deepcopy(model)
    wide.zero_grad()
    mse(wide, probe.fitted[0]).backward()
    assert not grow(wide, splits(case.plan), probe=probe).drift > limit
    carried = [parameter.grad for parameter in wide.parameters()]
    wide.zero_grad()
    mse(wide, probe.fitted[0]).backward()
    scale = max(float(gradient.abs().max()) for gradient in carried if gradient is not None)
    for (name, parameter), gradient in zip(wide.named_parameters(), carried, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or float((parameter.grad - gradient).abs().max()) <= 10 * limit * scale, name


def assert_there_is_a_way_back(case):
    model, probe, parameter = case.model, case.probe, next(case.model.parameters())
    wide = copy.deepcopy(model)
    grow(wide, replace(case.plan, moves=tuple(map(without_offsets, case.plan.moves))))
    narrow, _ = critical_reduction(wide, find_hidden_layers(wide, probe))
    sizes = [{layer.name: layer.width for layer in find_hidden_layers(x, probe)} for x in (model, narrow)]
    assert sizes[0] == sizes[1]
    assert relative(outputs(narrow, probe), outputs(model, probe)) <= 4 * bound(case, parameter)


@pytest.mark.parametrize("kind", BUILDERS)
@QUICK
@given(data=st.data(), make=optimizers)
def test_surgery(kind, data, make):
    assert_surgery(data.draw(cases(kind)), make)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDERS)
@THOROUGH
@given(data=st.data(), make=optimizers)
def test_surgery_thoroughly(kind, data, make):
    assert_surgery(data.draw(cases(kind)), make)
