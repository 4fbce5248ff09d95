"""Activations whose derivatives are numbers an element: taken once, so that every further product multiplies by them.

Differentiating a gradient again, autograd evaluates σ'' of every activation anew, exponentials and all, in every
product with a Hessian. Here h = σ(z) is put on the graph with σ'(z) and σ''(z) beside it: the same gradient and the
same second derivative, for a multiplication each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_SMOOTH = frozenset(
    {torch.tanh, Tensor.tanh, F.tanh, torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.sin, Tensor.sin, torch.erf}
    | {F.gelu, F.silu, F.mish, F.softplus, F.elu, F.selu, F.celu, F.logsigmoid, F.tanhshrink, F.softsign}
)  # functions of one tensor that act on each element by itself; others are left to autograd, which is as right


class CurvedOnce(TorchFunctionMode):
    """Around a loss that is differentiated twice: smooth activations keep their two derivatives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _SMOOTH or not _eligible(*args, **kwargs):
            return func(*args, **kwargs)
        z = args[0].detach().requires_grad_()
        value = func(z, *args[1:], **kwargs)
        slope = torch.autograd.grad(value.sum(), z, create_graph=True)[0]
        bend = torch.autograd.grad(slope.sum(), z)[0] if slope.requires_grad else torch.zeros_like(z)
        return _Curved.apply(args[0], value.detach(), slope.detach(), bend)


def _eligible(z: Tensor | None = None, *args: Any, inplace: bool = False, **_: Any) -> bool:
    """Whether this is a new tensor that will be differentiated, by autograd alone and not by a torch.func transform."""
    if z is None or inplace or any(arg is True for arg in args):
        return False
    return z.requires_grad and torch.is_grad_enabled() and not is_functorch_wrapped_tensor(z)


class _Curved(torch.autograd.Function):
    """h = σ(z) from known values, slopes and curvatures."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        ctx.save_for_backward(z, slope, bend)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Pulled.apply(gradients[0], *ctx.saved_tensors), None, None, None


class _Pulled(torch.autograd.Function):
    """σ'(z) g, whose derivatives are σ'(z) and σ''(z) g."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, z: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        ctx.save_for_backward(slope, gradient * bend)
        return gradient * slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slope, bent = ctx.saved_tensors
        return gradients[0] * slope, gradients[0] * bent, None, None
