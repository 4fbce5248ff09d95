"""All of a change or nothing of it, whatever fails; ctrl-C waits for a moment at which nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from splitwatch.growth.checkpoint import forget, recall
from splitwatch.growth.surgery import Surgery


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Ctrl-C is noted inside and takes effect later; threads other than the main one it never interrupts anyway.

    Yields:
        A function that lets it take effect at once, if it came; at the end it does by itself.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield lambda: None
        return
    noted: list[Any] = []

    def check() -> None:
        if noted and callable(before):
            before(*noted.pop())

    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append((number, frame)))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
        if noted:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def all_or_nothing(model: nn.Module, surgery: Surgery, optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Where the block fails, what a surgery replaces, the optimizers and the history of growth are as they were.

    The very objects come back, so that closures, schedulers and hooks that know them find them again.
    """
    undo, history = surgery.undo, recall(model)
    saved = [_Saved(optimizer) for optimizer in optimizers]
    try:
        yield
    except BaseException:
        for item in saved:
            item.put_back()
        undo.commit()
        forget(model, history)
        raise


class _Saved:
    """The parameters and states of an optimizer, by identity."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.states = optimizer, dict(optimizer.state)
        self.parameters = [list(group["params"]) for group in optimizer.param_groups]
        self.numbers = getattr(optimizer, "_numel_cache", None)

    def put_back(self) -> None:
        for group, parameters in zip(self.optimizer.param_groups, self.parameters, strict=True):
            group["params"][:] = parameters
        self.optimizer.state.clear()
        self.optimizer.state.update(self.states)
        if hasattr(self.optimizer, "_numel_cache"):
            self.optimizer._numel_cache = self.numbers  # pyright: ignore[reportAttributeAccessIssue]
