"""Hooks of parameters live through growth; parameters that no optimizer given owns are told of."""

import logging

import pytest
import torch
from test_growth import random_plan
from torch import nn
from zoo import mse

from splitwatch import Probe, find_hidden_layers, grow
from splitwatch.growth.grow import widened


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    batch = torch.randn(32, 4), torch.randn(32, 1)
    probe = Probe([batch], mse)
    layers = [layer for layer in find_hidden_layers(model, probe) if layer.growable]
    return model, batch, probe, random_plan(model, probe, layers, [(0.5, 0.5)])


def test_hooks_fire_after_growth_and_can_be_removed(case):
    model, batch, probe, plan = case
    calls = []
    hook = model[0].weight.register_hook(lambda gradient: calls.append("hook") or 0 * gradient)
    post = model[0].weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter))
    grow(model, plan, probe=probe)
    calls.clear()
    mse(model, batch).backward()
    assert calls[0] == "hook" and calls[1] is model[0].weight and not model[0].weight.grad.any()
    hook.remove()
    post.remove()
    calls.clear()
    mse(model, batch).backward()
    assert not calls and model[0].weight.grad.any()


def test_hooks_do_not_fire_on_what_is_tried_out_and_are_there_afterwards(case):
    model, batch, _, plan = case
    calls = []
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter))
    with widened(model, plan):
        mse(model, batch).backward()
        assert not calls
    mse(model, batch).backward()
    assert len(calls) == 1 and calls[0] is model[0].weight


def test_a_parameter_that_no_optimizer_given_owns_is_told_of_once(case, caplog):
    model, _, probe, plan = case
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    model[2].bias.requires_grad_(False)
    with caplog.at_level(logging.WARNING, "splitwatch"):
        grow(model, plan, first, probe=probe)
        layers = [layer for layer in find_hidden_layers(model, probe) if layer.growable]
        grow(model, random_plan(model, probe, layers, [(0.5, 0.5)]), first, probe=probe)
    (record,) = caplog.records
    assert "owns 2.weight, which growth replaces" in record.message


@pytest.mark.parametrize("owned", [None, "all"])
def test_nothing_is_told_without_optimizers_or_where_they_own_all(case, caplog, owned):
    model, _, probe, plan = case
    grow(model, plan, [torch.optim.SGD(model.parameters(), lr=0.1)] if owned else (), probe=probe)
    assert not caplog.records
