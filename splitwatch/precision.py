"""Measure in full precision, whatever training uses: without autocast, TF32 and half-precision weights.

Rounding that training does not notice drowns second derivatives: with TF32 an eigenpair's estimated residual reads zero
while the true one is 3e-4. The flags that are switched off here belong to the process, so another thread that trains
meanwhile runs in full precision too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

P = ParamSpec("P")
R = TypeVar("R")

HALF = (torch.float16, torch.bfloat16)
"""The precisions in which nothing is measured."""

_DEVICES = ("cpu", "cuda")
_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_FLAGS = (*_PARENTS, *((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")))
"""What decides on the precision of float32 products since torch 2.9; "none" follows the parent, which is first."""


@contextmanager
def full_precision(model: nn.Module | None = None) -> Iterator[None]:
    """Float32 means float32 inside; autocast and TF32 are off, half-precision parameters and buffers are float32.

    Args:
        model: whose parameters and buffers to convert. They stay the objects they are, and hold the very same memory
            again afterwards; inside, a float32 copy of them takes twice their memory.

    Convolutions choose their algorithms reproducibly inside: paths are replayed and compared to the bit. Every flag is
    as before afterwards. Autocast that is entered inside has an effect, except under ``Uncast``.
    """
    autocast = [(device, torch.is_autocast_enabled(device)) for device in _DEVICES]
    with _ieee(), _reproducible(), _converted(model):
        try:
            _leave_autocast()
            yield
        finally:
            for device, enabled in autocast:
                torch.set_autocast_enabled(device, enabled)


def in_full_precision(measure: Callable[Concatenate[nn.Module, P], R]) -> Callable[Concatenate[nn.Module, P], R]:
    """Run a function of a model in ``full_precision(model)``."""

    @wraps(measure)
    def measured(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> R:
        with full_precision(model):
            return measure(model, *args, **kwargs)

    return measured


class Uncast(TorchFunctionMode):
    """Around the user's code: autocast entered inside has no effect, conversions to half precision go to float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        _leave_autocast()
        if func in (Tensor.half, Tensor.bfloat16):
            func = Tensor.float
        if func is not Tensor.view:  # a view of another type means the bits
            args = tuple(_widest(value) for value in args)
            kwargs = {key: _widest(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def upcast(values: Any) -> Any:
    """Any structure of tensors, those of half precision in float32."""
    if not any(_is_half(leaf) for leaf in pytree.tree_leaves(values)):
        return values
    return pytree.tree_map(lambda leaf: leaf.float() if _is_half(leaf) else leaf, values)


def _widest(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF


def _leave_autocast() -> None:
    """Switch autocast off where it is on; a context that was entered restores at its end what was before it."""
    for device in _DEVICES:
        if torch.is_autocast_enabled(device):
            torch.set_autocast_enabled(device, False)


@contextmanager
def _converted(model: nn.Module | None) -> Iterator[None]:
    """Half-precision parameters and buffers hold float32 copies; the objects, their versions and hooks are the same."""
    tensors = [] if model is None else [t for t in (*model.parameters(), *model.buffers()) if _is_half(t)]
    held = [tensor.data for tensor in tensors]
    try:
        for tensor, data in zip(tensors, held, strict=True):
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in zip(tensors, held, strict=True):
            tensor.data = data


@contextmanager
def _ieee() -> Iterator[None]:
    """Products of float32 numbers are computed in float32; both generations of torch's flags say so."""
    matmul, cudnn, flags = _switch_off()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a setter is old
            torch.set_float32_matmul_precision(matmul)
            torch._C._set_cudnn_allow_tf32(cudnn)
        for (backend, op), value in flags.items():
            torch._C._set_fp32_precision_setter(backend, op, value)


@contextmanager
def _reproducible() -> Iterator[None]:
    """One and the same cuDNN algorithm for the same shapes, none that adds up in an order of its own."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _switch_off() -> tuple[str, bool, dict[tuple[str, str], str]]:
    """Switch reduced products off; the flags as they were.

    A flag that follows its parent reads like the parent, so parents are read and cleared first. The old flags refuse to
    be read where the new ones contradict them, so they are read last, when every new one says "ieee".
    """
    flags: dict[tuple[str, str], str] = {}
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        for backend, op in _FLAGS:
            flags[backend, op] = torch._C._get_fp32_precision_getter(backend, op)
            torch._C._set_fp32_precision_setter(backend, op, "none")
        _set_all("ieee", flags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matmul = torch.get_float32_matmul_precision()
        try:
            cudnn = torch._C._get_cudnn_allow_tf32()
        except RuntimeError:  # it is on, against "ieee"
            cudnn = True
        torch.set_float32_matmul_precision("highest")
        torch._C._set_cudnn_allow_tf32(False)
    _set_all("ieee", flags)
    return matmul, cudnn, flags


def _set_all(precision: str, flags: dict[tuple[str, str], str]) -> None:
    for backend, op in flags:
        torch._C._set_fp32_precision_setter(backend, op, precision)
