"""Activations whose derivatives are taken once: the Hessian of plain autograd; other functions are left alone."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splitwatch.geometry import elementwise
from splitwatch.geometry.elementwise import CurvedOnce

ARGUMENTS = [
    partial(F.gelu, approximate="tanh"),
    partial(F.softplus, beta=2.0, threshold=1.0),
    partial(F.elu, alpha=0.7),
    partial(F.elu, inplace=True),
    lambda z: F.celu(z, 0.5),
    lambda z: F.silu(z, True),
    torch.relu,
    Tensor.tanh_,
]


@pytest.mark.parametrize("function", [*sorted(elementwise._SMOOTH, key=str), *ARGUMENTS], ids=str)
def test_the_hessian_is_that_of_the_function_itself(function):
    x, w = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(w):
        return (function(x @ w) @ w).square().mean()

    live = w.clone().requires_grad_()
    with CurvedOnce():
        slope = torch.autograd.grad(loss(live), live, create_graph=True)[0]
    rows = [torch.autograd.grad(one, live, retain_graph=True)[0] for one in slope.flatten()]
    torch.testing.assert_close(
        torch.stack(rows).view(5, 5, 5, 5), torch.autograd.functional.hessian(loss, w), rtol=1e-9, atol=1e-12
    )


def test_a_third_derivative_is_refused_not_wrong():
    z = torch.tensor(0.3, requires_grad=True)
    with CurvedOnce():
        slope = torch.autograd.grad(torch.tanh(z), z, create_graph=True)[0]
    bend = torch.autograd.grad(slope, z, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(bend, z)


def test_inside_of_torch_func_everything_is_left_alone():
    x, w = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w.requires_grad_()
    with CurvedOnce():
        loss = torch.func.grad(lambda u: torch.tanh(u * w).sum())(x).sum()
    slope = torch.autograd.grad(loss, w)[0]
    closed = 1 - torch.tanh(x * w) ** 2
    torch.testing.assert_close(slope, closed - 2 * x * w * torch.tanh(x * w) * closed)
