"""Pictures of growth: line searches, and what was predicted against what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from splitwatch.events import Outcome
from splitwatch.records import GrowthPlan, Sprout
from splitwatch.report.figures import HIGH, INK, LOW, blank, columns, dress

Search = Sequence[tuple[float, float]]


def line_search_figure(plan: GrowthPlan) -> Figure:
    """Decrease of the probe loss against the size of the splits' offset, beside what the second order predicts.

    With sprouts in the plan the marked decrease is that of the splits alone, before a step of the sprouts was sought.
    """
    label = "size of the offset, relative to the neuron's weights"
    if not any(x for x, _ in plan.line_search):
        return _nothing(plan)
    sprouts = sum(move.predicted_decrease for move in plan.moves if isinstance(move, Sprout))
    best = plan.predicted_decrease - sprouts
    alone = not plan.step
    fitted = plan.fitted_decrease if alone else dict(plan.line_search).get(plan.offset, math.nan)
    marks = (plan.offset, fitted, plan.held_out_decrease if alone else math.nan)
    return _search(plan.line_search, marks, lambda x: best * (x / plan.offset) ** 2, "second order", label)


def step_search_figure(plan: GrowthPlan) -> Figure:
    """Decrease of the probe loss against the step of the sprouts, on top of the splits, beside a quadratic model's."""
    label = "step of the sprouts, relative to a quadratic model's"
    if not plan.step_search:
        return _nothing(plan)
    part = min(plan.step, 1.0)
    sprouts = sum(move.predicted_decrease for move in plan.moves if isinstance(move, Sprout))
    top = sprouts / (part * (2 - part)) if part else 0.0
    splits = dict(plan.line_search).get(plan.offset, 0.0)
    marks = (plan.step, plan.fitted_decrease, plan.held_out_decrease)
    return _search(plan.step_search, marks, lambda x: splits + top * x * (2 - x), "quadratic model", label)


def calibration_figure(outcomes: Sequence[Outcome]) -> Figure:
    """Realised against predicted decrease of moves, with the band of a factor of two.

    Moves that did not decrease the loss, which a logarithmic axis cannot hold, stand as triangles at the lower edge.
    """
    figure = blank("decrease of the held-out loss: predicted and realised, move by move", (7, 4.6))
    axes = figure.subplots()
    shown = [x for x in outcomes if x.predicted > 0 and math.isfinite(x.predicted) and math.isfinite(x.realised)]
    sizes = [x.predicted for x in shown] + [x.realised for x in shown if x.realised > 0]
    low, high = (min(sizes) / 3, max(sizes) * 3) if sizes else (1e-3, 1.0)
    low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
    line = [low, high]
    axes.fill_between(line, [x / 2 for x in line], [x * 2 for x in line], color="#DDDDDD", lw=0, label="factor of two")
    axes.plot(line, line, color=INK, lw=0.8)
    for kind, colour in (("split", LOW), ("sprout", HIGH)):
        for sure in (True, False):
            some = [x for x in shown if x.kind == kind and x.certified == sure]
            words = f"{kind}, {'certified' if sure else 'not certified'}" if kind == "split" else kind
            _scatter(axes, some, colour if sure or kind == "sprout" else "white", colour, words, low)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low / 1.5, high))
    for axis in (axes.xaxis, axes.yaxis):  # whole decades only: what lies between would overlap
        axis.set_minor_formatter(NullFormatter())
    dress(axes, "predicted decrease", "realised decrease, held-out half")
    near = sum(0.5 <= x.realised / x.predicted <= 2 for x in shown)
    paid, count = sum(x.realised > 0 for x in shown), len(shown)
    told = "no moves yet"
    if count:
        told = f"{count} moves: {paid / count:.0%} decrease the loss, {near / count:.0%} within a factor of two"
    axes.set_title(told, fontsize=9, color=INK)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def _scatter(axes: Axes, some: Sequence[Outcome], fill: str, edge: str, label: str, low: float) -> None:
    up = [(x.predicted, x.realised) for x in some if x.realised > 0]
    down = [(x.predicted, low / 1.25) for x in some if not x.realised > 0]
    look = {"color": edge, "mfc": fill, "ms": 6.5, "mew": 1.2, "zorder": 4}
    if up:
        axes.plot(*columns(up), "o", label=label, **look)
    if down:
        axes.plot(*columns(down), "v", label=f"{label}: no decrease", **look)


def _search(
    tried: Search, marks: tuple[float, float, float], curve: Callable[[Tensor], Tensor], words: str, label: str
) -> Figure:
    """A search: what was tried, what was chosen (size, fitted, held out), and what was predicted."""
    figure, (chosen, fitted, held_out) = blank("", (7, 3.6)), marks
    axes = figure.subplots()
    found = sorted((abs(x), y if math.isfinite(y) else -math.inf, x < 0) for x, y in tried if x)
    best = max(y for y in (held_out, *(y for _, y, _ in found)) if not math.isnan(y))
    losses = sorted(-y for _, y, _ in found if math.isfinite(y)) or [1.0]
    size = best if best > 0 else losses[len(losses) // 2] or 1.0
    floor, roof = (-0.6 * best, 1.5 * best) if best > 0 else (-2 * size, 0.5 * size)
    for reverse, style in ((False, "o-"), (True, "s--")):
        x, y = columns([(x, max(y, 2 * floor)) for x, y, sign in found if sign == reverse])
        if x:
            axes.plot(x, y, style, color=LOW, ms=4, lw=1.2, label="fitted half" + ", reversed" * reverse)
    below = [x for x, y, _ in found if y < floor]
    if below:
        axes.plot(below, [floor * 0.93] * len(below), "v", color=LOW, mfc="white", ms=6, label="lower, off the picture")
    axes.set_xscale("log", base=2)
    if chosen:
        low, high = math.log2(found[0][0]), math.log2(found[-1][0])
        grid = torch.logspace(low, high, 200, base=2.0, dtype=torch.float64)
        axes.plot(grid.tolist(), curve(grid).tolist(), ":", color=INK, lw=1.4, label=words)
        axes.axvline(abs(chosen), color="#999999", lw=0.8, zorder=0)
        axes.plot([abs(chosen)], [fitted], "o", color=LOW, ms=9, label="chosen, fitted half")
        if not math.isnan(held_out):
            axes.plot([abs(chosen)], [held_out], "D", color=HIGH, mec="white", ms=8, label="chosen, held-out half")
    axes.axhline(0, color=INK, lw=0.8)
    axes.set_ylim(floor, roof)
    dress(axes, label, "decrease of the probe loss")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def _nothing(plan: GrowthPlan) -> Figure:
    figure = blank("", (7, 3.6))
    axes = figure.subplots()
    words = f"no line search: {plan.reason}"
    axes.text(0.5, 0.5, words, ha="center", fontsize=9, wrap=True, transform=axes.transAxes)
    axes.set_axis_off()
    return figure
