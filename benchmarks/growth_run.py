"""One run of benchmarks/growth.py: a network trained on a budget of FLOPs, grown on the way, everything recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from math import nan
from statistics import median
from typing import Any

import torch
from growth_cells import Cell
from growth_methods import DUE, GROW, OWN
from growth_site import Move, Site
from growth_tasks import Problem
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from splitwatch import Probe, StationarityDetector, grow
from splitwatch.growth.grow import count_parameters, widened
from splitwatch.records import GrowthPlan

LOOKS = 40
"""Validations in one run, at equal distances of FLOPs."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p, lr: torch.optim.Adam(p, lr, fused=True),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.01, fused=True),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, fused=True),
}


@contextmanager
def counted(into: list[int]):
    """The FLOPs of a block are appended to a list."""
    with FlopCounterMode(display=False) as counter:
        yield
    into.append(counter.get_total_flops())


def mean(of: Callable, model: nn.Module, batches) -> float:
    model.eval()
    with torch.no_grad():
        sizes = [len(batch[0]) for batch in batches]
        total = sum(float(of(model, batch)) * size for batch, size in zip(batches, sizes, strict=True))
    model.train()
    return total / sum(sizes)


class Run:
    """A network in training; ``spent`` FLOPs of a ``budget``."""

    def __init__(self, cell: Cell, problem: Problem, width: int, seed: int) -> None:
        self.cell, self.problem, self.seed, self.spent = cell, problem, seed, 0
        torch.manual_seed(seed)
        self.model = problem.build(cell.widths[-1])
        self.batch = next(problem.batches)
        self.budget = cell.steps * self.cost()
        torch.manual_seed(seed)
        self.model = problem.build(width)
        self.optimizer = OPTIMIZERS[cell.optimizer](self.model.parameters(), lr=cell.rate)
        self.price = self.cost()
        self.clock: list[float] = []
        self.paid = 0.0
        self.curve: list[tuple[float, float]] = []
        self.events: list[dict[str, Any]] = []

    @property
    def share(self) -> float:
        return self.spent / self.budget

    def parameters(self, width: int) -> int:
        return count_parameters(self.problem.build(width))

    def cost(self) -> int:
        """FLOPs of one training step."""
        flops: list[int] = []
        with counted(flops):
            self.problem.loss(self.model, self.batch).backward()
        self.model.zero_grad()
        return flops[0]

    def step(self) -> float:
        """One training step; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.cell.rate * (1 + math.cos(math.pi * min(self.share, 1))) / 2
        self.optimizer.zero_grad()
        loss = self.problem.loss(self.model, next(self.problem.batches))
        loss.backward()
        self.optimizer.step()
        self.spent += self.price
        return loss.item()

    def until(self, share: float, detector: StationarityDetector | None = None) -> None:
        """Train to a share of the budget, or to where a detector finds that the loss no longer falls."""
        while self.share < share:
            if self.share * LOOKS >= len(self.curve):
                self.look()
            start = time.process_time()
            loss = self.step()
            self.clock.append(time.process_time() - start)
            if detector and (verdict := detector.update(loss)) and verdict.kind == "suspected":
                break
        if self.events:  # CPU time in steps of the widened network, as they were made since
            self.events[-1]["CPU"] = self.paid / median(self.clock or [nan])

    def look(self) -> None:
        self.curve.append((self.share, mean(self.problem.loss, self.model, self.problem.validation)))

    def grow(self, method: str, width: int) -> None:
        """One growth event, charged to the budget, but for the losses before and after."""
        probe = Probe(list(islice(self.problem.batches, self.cell.probe)), self.problem.loss)
        fresh = list(islice(self.problem.batches, self.cell.probe))
        before, costs, measured = mean(self.problem.loss, self.model, fresh), [], []
        make = partial(Site, self.model, probe, width, 1000 * self.seed + width, self.parameters(width))
        start = time.process_time()
        GROW[method](make())
        self.paid = time.process_time() - start  # apart, because counting takes longer than what it counts
        with counted(costs):
            plan = GROW[method](make())
        looked = [move for move in plan.moves if move.predicted_decrease > 0] if method in OWN else []
        moves = [(type(m).__name__, m.predicted_decrease, before - self.alone(plan, m, fresh)) for m in looked]
        with counted(measured):
            probe.loss(self.model)
        with counted(costs):
            event = grow(self.model, plan, self.optimizer, probe=probe)
        with counted(measured):
            probe.loss(self.model)
        flops = sum(costs) - sum(measured)
        self.spent += flops
        self.price, self.clock = self.cost(), []
        self.events.append(
            {
                "share": self.share,
                "before": before,
                "after": mean(self.problem.loss, self.model, fresh),
                "flops": flops / self.price,
                "predicted": plan.predicted_decrease,
                "held out": plan.held_out_decrease,
                "moves": moves,
                "parameters": event.parameters,
                "widths": list(event.widths.values()),
                "offset": plan.offset,
                "step": plan.step,
                "reason": plan.reason,
            }
        )

    def alone(self, plan: GrowthPlan, move: Move, fresh: list) -> float:
        """The loss on fresh data after one move of a plan alone."""
        with widened(self.model, replace(plan, moves=(move,))):
            return mean(self.problem.loss, self.model, fresh)


def execute(cell: Cell, method: str, seed: int, *, after: Callable[[Run], None] | None = None) -> dict[str, Any]:
    """One run from start to end: "fixed n" trains width n throughout, other methods grow; ``after`` follows growth."""
    torch.set_num_threads(1)
    start = time.process_time()
    fixed = method.startswith("fixed ")
    width = int(method.split()[1]) if fixed else cell.widths[0]
    run = Run(cell, cell.problem(cell.activation, seed), width, seed)
    due = method.endswith(DUE)
    shares = cell.latest if due else cell.later if method.endswith("later") else cell.at
    for share, wide in () if fixed else zip(shares, cell.widths[1:], strict=True):
        run.until(share, StationarityDetector() if due else None)
        if run.share >= (share if due else 1):  # the loss still falls, or choosing the last moves took what was left
            break
        run.grow(method, wide)
        if after is not None:
            after(run)
    run.until(1.0)
    run.look()
    return {
        "cell": cell.name,
        "method": method,
        "seed": seed,
        "final": mean(run.problem.error, run.model, run.problem.test),
        "final loss": run.curve[-1][1],
        "area": area(run.curve),
        "parameters": count_parameters(run.model),
        "spent": run.share,
        "curve": run.curve,
        "events": run.events,
        "seconds": time.process_time() - start,
    }


def area(curve: list[tuple[float, float]]) -> float:
    """Exp of the mean log validation loss over FLOPs."""
    pairs = pairwise(curve)
    total = sum((b[0] - a[0]) * (math.log(a[1]) + math.log(b[1])) / 2 for a, b in pairs)
    return math.exp(total / (curve[-1][0] - curve[0][0]))
