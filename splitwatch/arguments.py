"""What is handed over before training, checked before training: a mistake would show at the first measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from splitwatch.growth.policy import GrowthPolicy
from splitwatch.probe import Probe
from splitwatch.records import SplitWatchError


def check_given(policy: Any, probe: Any, loss_fn: Any) -> None:
    """Refuse what is no policy, probe or loss function; None leaves policy and probe to the defaults.

    Raises:
        SplitWatchError: something else was given; the message names it.
    """
    if not (policy is None or isinstance(policy, GrowthPolicy)):
        raise SplitWatchError(f"policy: required a GrowthPolicy, found {policy!r}; pass GrowthPolicy(...)")
    if not (probe is None or isinstance(probe, Probe)):
        raise SplitWatchError(f"probe: required a Probe, found {_kind(probe)}; pass Probe(batches, loss_fn)")
    if isinstance(loss_fn, nn.modules.loss._Loss) or not callable(loss_fn):
        raise SplitWatchError(
            f"loss_fn: required a function of the model and a batch, found {_kind(loss_fn)}; "
            "pass lambda model, batch: criterion(model(batch[0]), batch[1]), or what your batches need"
        )


def as_sinks(sinks: Iterable[Any]) -> list[Callable[..., object]]:
    """Sinks as a list.

    Raises:
        SplitWatchError: they are not several, or one cannot be called.
    """
    found = list(sinks) if isinstance(sinks, Iterable) else None
    if found is None or not all(map(callable, found)):
        raise SplitWatchError(f"sinks: required functions of an event, in a list, found {sinks!r}; pass sinks=[print]")
    return found


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
