"""Lightning has two packages, ``pytorch_lightning`` and ``lightning.pytorch``, with classes of the same names.

A class of one is none of the other's, so ``isinstance`` misses silently: every class is looked up in the package that
the Trainer at hand comes from.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import pytorch_lightning

NAMES = ("pytorch_lightning", "lightning.pytorch")


def installed() -> list[ModuleType]:
    """Those of the two packages that are there."""
    both = importlib.util.find_spec("lightning") is not None
    return [pytorch_lightning, *([importlib.import_module(NAMES[1])] if both else [])]


CALLBACKS: tuple[type, ...] = tuple(package.Callback for package in installed())
"""The base classes of a callback that both packages take for one of theirs."""


def package_of(trainer: Any) -> ModuleType:
    """The package that a Trainer, or a class derived from one, comes from."""
    for kind in type(trainer).__mro__:
        for name in NAMES:
            if kind.__module__.startswith(name + "."):
                return importlib.import_module(name)
    return pytorch_lightning
