"""Activation checkpointing put aside: what would be computed twice to save memory is computed once and kept.

Checkpointed functions are run again in the backward pass, which a measurement cannot have: there is none of the kind
that reentrant checkpoints need, and what is recorded or differentiated twice does not run the same way again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint as torch_checkpoint


@contextmanager
def straight_through() -> Iterator[None]:
    """Inside, ``torch.utils.checkpoint`` calls the function it is given and nothing else.

    What ``checkpoint`` looks up when it is called is exchanged, not ``checkpoint`` itself: models hold that by name.
    """
    exchanged = {name: getattr(torch_checkpoint, name) for name in _INSTEAD if hasattr(torch_checkpoint, name)}
    try:
        for name in exchanged:
            setattr(torch_checkpoint, name, _INSTEAD[name])
        yield
    finally:
        for name, original in exchanged.items():
            setattr(torch_checkpoint, name, original)


class _Straight:
    """Stands in for the autograd function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    """Stands in for what is done before and after the function of other checkpoints, which ``checkpoint`` calls."""
    yield


_INSTEAD = {"CheckpointFunction": _Straight, "_checkpoint_without_reentrant_generator": _nothing_around}
