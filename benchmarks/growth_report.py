"""What the results of benchmarks/growth.py say: tables in markdown, paired intervals, what has to hold, a figure."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from growth_cells import BY_NAME
from growth_methods import DUE
from scipy.stats import t as student

Result = dict[str, Any]
Table = dict[str, dict[str, dict[int, Result]]]
"""Results by cell, method and seed."""


def arranged(results: Sequence[Result]) -> Table:
    """A run that diverged counts as the worst one of its cell that did not."""
    table: Table = defaultdict(lambda: defaultdict(dict))
    for result in results:
        table[result["cell"]][result["method"]][result["seed"]] = dict(result)
    for methods in table.values():
        runs = [run for seeds in methods.values() for run in seeds.values()]
        worst = {key: max(run[key] for run in runs if math.isfinite(run[key])) for key in ("area", "final")}
        for run in runs:
            run |= {key: value for key, value in worst.items() if not math.isfinite(run[key])}
    return table


def at_growth(result: Result) -> float:
    """Loss after a growth event over the loss before it, on fresh data; the geometric mean of the run's events."""
    ratios = [math.log(event["after"] / event["before"]) for event in result["events"]]
    return math.exp(fmean(ratios)) if ratios else 1.0


def area(result: Result) -> float:
    return result["area"]


def final(result: Result) -> float:
    return result["final"]


MEASURES: dict[str, Callable[[Result], float]] = {"at growth": at_growth, "area": area, "final": final}


def scale(cell: str, measure: str) -> Callable[[float], float]:
    """Logarithms, but for shares of wrong answers and nats a byte."""
    return math.log if measure != "final" or BY_NAME[cell].regression else lambda value: value


def centre(cell: str, measure: str, runs: dict[int, Result]) -> float:
    """Geometric mean over seeds, plain where no logarithm is taken."""
    to = scale(cell, measure)
    value = fmean(to(MEASURES[measure](run)) for run in runs.values())
    return math.exp(value) if to is math.log else value


def difference(cell: str, measure: str, a: dict[int, Result], b: dict[int, Result]) -> tuple[float, float]:
    """Mean of a − b over seeds that both have, and half of its 95 % confidence interval (paired t)."""
    to, of = scale(cell, measure), MEASURES[measure]
    return interval([to(of(a[seed])) - to(of(b[seed])) for seed in a if seed in b])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % confidence interval (Student's t); infinite for a single value."""
    if len(values) < 2:
        return fmean(values), math.inf
    return fmean(values), float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def grown(cell: str, methods: dict[str, dict[int, Result]], own: str) -> list[str]:
    """The methods that the own one is compared with: all but inner widths of the sweep and its other schedules.

    Random neurons that come when they are due, which splitwatch's detector says, are no rivals of a fixed schedule.
    """
    ends = {f"fixed {BY_NAME[cell].widths[0]}", f"fixed {BY_NAME[cell].widths[-1]}"}
    others = (name for name in methods if name.split(", ")[0] != own.split(", ")[0])
    rivals = (name for name in others if own.endswith(DUE) or not name.endswith(DUE))
    return [name for name in rivals if name in ends or not name.startswith("fixed ")]


def shown(cell: str, methods: dict[str, dict[int, Result]], own: str) -> list[str]:
    """The own method, its rivals, and what grows when due."""
    names = [own, *grown(cell, methods, own), *(name for name in methods if name.endswith(f", {DUE}"))]
    return list(dict.fromkeys(names))


def describe(results: Sequence[Result], own: str) -> str:
    """Everything, as markdown."""
    table = arranged([r for r in results])
    table = {cell: methods for cell, methods in table.items() if own in methods}
    if not table:
        return f"no results of {own} yet"
    parts = [summary(table, own)]
    parts += [matrix(table, own, measure) for measure in MEASURES]
    parts += [sweep(table, own), versus(table, own), costs(table, own)]
    return "\n\n".join(parts)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def matrix(table: Table, own: str, measure: str) -> str:
    """Methods by cells; ° is not significantly worse than the own method, the best is bold."""
    names = dict.fromkeys(n for c, ms in table.items() for n in shown(c, ms, own) if "fixed" not in n)
    labels = {"no growth": 0, "wide from scratch": -1}
    rows = []
    for name in [*labels, *names]:
        row = [name]
        for cell, methods in table.items():
            actual = f"fixed {BY_NAME[cell].widths[labels[name]]}" if name in labels else name
            row.append(entry(cell, methods, actual, own, measure))
        rows.append(row)
    titles = {"at growth": "Loss after growth over loss before", "area": "Area under the log validation loss (exp)"}
    return f"{titles.get(measure, 'Final test metric')}\n\n{markdown(['', *table], rows)}"


def entry(cell: str, methods: dict[str, dict[int, Result]], name: str, own: str, measure: str) -> str:
    if name not in methods:
        return ""
    values = {n: centre(cell, measure, methods[n]) for n in shown(cell, methods, own)}
    text = f"{values[name]:.3g}"
    if name != own:
        mean, half = difference(cell, measure, methods[own], methods[name])
        text += "°" if abs(mean) <= half else ""
    return f"**{text}**" if values[name] == min(values.values()) else text


def summary(table: Table, own: str) -> str:
    """In how many cells the own method is best, tied or worse, and how far predictions can be trusted."""
    names = [own, f"{own}, {DUE}", f"{own}, later"]
    lines = [line for name in names[:2] for line in standing(table, name)]
    against = [line for name in names for line in regression(table, name)]
    trusted = [line for name in names[:2] for line in predictions(table, name)]
    return "\n".join([*lines, *against, *trusted])


def standing(table: Table, own: str) -> list[str]:
    """In how many cells a method is best, tied or worse."""
    table, lines = {cell: methods for cell, methods in table.items() if own in methods}, []
    for measure in MEASURES if table else ():
        best = tied = worse = 0
        for cell, methods in table.items():
            rivals = grown(cell, methods, own)
            rival = min(rivals, key=lambda name: centre(cell, measure, methods[name]))
            mean, half = difference(cell, measure, methods[own], methods[rival])
            best += mean < 0
            tied += mean < 0 or mean <= half
            worse += mean > half
        counts = f"best in {best} of {len(table)} cells, best or tied in {tied}, worse in {worse}"
        lines.append(f"- {own}, {measure}: {counts}")
    return lines


def regression(table: Table, own: str) -> list[str]:
    """Against the sweep of fixed widths, run by run."""
    ratios, wide = [], []
    for cell, methods in table.items():
        if BY_NAME[cell].regression:
            for seed, run in methods.get(own, {}).items():
                fixed = [r[seed]["final"] for name, r in methods.items() if name.startswith("fixed ") and seed in r]
                ratios.append(run["final"] / min(fixed))
                wide.append(methods[f"fixed {BY_NAME[cell].widths[-1]}"][seed]["final"] / run["final"])
    if not ratios:
        return []
    below = sum(ratio < 1 for ratio in ratios) / len(ratios)
    return [
        f"- {own}, regression: below every fixed width in {below:.0%} of {len(ratios)} runs; error over the best "
        f"fixed width's: median {median(ratios):.2f}, largest {max(ratios):.2f}; wide from scratch over it: "
        f"{median(wide):.1f}"
    ]


def predictions(table: Table, own: str) -> list[str]:
    """Of single moves on fresh data."""
    events = [e for methods in table.values() for run in methods.get(own, {}).values() for e in run["events"]]
    pairs = [(predicted, realised) for e in events for _, predicted, realised in e["moves"] if predicted > 0]
    if not pairs:
        return []
    positive = sum(realised > 0 for _, realised in pairs) / len(pairs)
    close = sum(0.5 <= realised / predicted <= 2 for predicted, realised in pairs) / len(pairs)
    return [
        f"- {own}, predictions: of {len(pairs)} moves, {positive:.0%} decrease the loss on fresh data when made alone, "
        f"{close:.0%} within a factor of two of what was predicted"
    ]


def sweep(table: Table, own: str) -> str:
    """The final metric of every fixed width beside the growing run's."""
    rows = []
    for cell, methods in table.items():
        widths = [f"fixed {width}" for width in BY_NAME[cell].widths if f"fixed {width}" in methods]
        fixed = ", ".join(f"{name.split()[1]}: {centre(cell, 'final', methods[name]):.3g}" for name in widths)
        rows.append([cell, fixed, f"{centre(cell, 'final', methods[own]):.3g}"])
    return f"Fixed widths, at the same FLOPs each\n\n{markdown(['', 'fixed widths', own], rows)}"


def versus(table: Table, own: str) -> str:
    """Wins, ties and losses of the own method against each other one, over cells."""
    rows: dict[str, dict[str, list[int]]] = defaultdict(lambda: {measure: [0, 0, 0] for measure in MEASURES})
    for cell, methods in table.items():
        ends = {f"fixed {BY_NAME[cell].widths[0]}": "no growth", f"fixed {BY_NAME[cell].widths[-1]}": "wide"}
        for name in grown(cell, methods, own):
            for measure in MEASURES:
                mean, half = difference(cell, measure, methods[own], methods[name])
                rows[ends.get(name, name)][measure][0 if mean < -half else 2 if mean > half else 1] += 1
    body = [[name, *("/".join(map(str, counts[measure])) for measure in MEASURES)] for name, counts in rows.items()]
    return f"Wins/ties/losses of {own} by paired 95 % intervals\n\n{markdown(['against', *MEASURES], body)}"


def costs(table: Table, own: str) -> str:
    """What one growth event costs, in training steps of the widened network: median and largest."""
    rows = []
    for cell, methods in table.items():
        events = [event for run in methods[own].values() for event in run["events"]]
        flops, cpu = ([event[kind] for event in events] for kind in ("flops", "CPU"))
        rows.append([cell, *(f"{median(values):.0f} / {max(values):.0f}" if values else "" for values in (flops, cpu))])
    head = ["", "FLOPs", "CPU time"]
    return (
        f"Cost of a growth event in training steps of the widened network, median / largest\n\n{markdown(head, rows)}"
    )


def put_into(path: Path, text: str) -> None:
    """Put the section on growth into a page."""
    command = (
        "`python benchmarks/growth.py`; paired over seeds; ° differs from splitwatch by less than its 95 % interval; "
        '"when due" widens where the detector finds that the loss no longer falls, others at fixed shares of the FLOPs.'
    )
    put_section(path, "Growth", f"{command}\n\n![Validation loss over FLOPs](figures/growth.png)\n\n{text}")


def put_section(path: Path, title: str, body: str) -> None:
    """Put a section into a page, in the place of the one of that title, or at the end."""
    page, section = path.read_text(), f"## {title}\n\n{body}\n"
    found = re.search(rf"^## {title}\n.*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    page = page[: found.start()] + section + "\n" + page[found.end() :] if found else f"{page.rstrip()}\n\n{section}"
    path.write_text(page.rstrip() + "\n")


def draw(results: Sequence[Result], own: str, path: Path) -> None:
    """Validation loss over FLOPs, one panel a cell, the own method on top."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    table = arranged(results)
    columns = min(len(table), 5)
    shape = -(-len(table) // columns), columns
    figure, axes = plt.subplots(*shape, figsize=(3.4 * columns, 2.8 * shape[0]), squeeze=False, layout="constrained")
    lines = {}
    for axis, (cell, methods) in zip(axes.flat, table.items(), strict=False):
        mine = tuple(name for name in (f"{own}, {DUE}", own) if name in methods)
        names = [*grown(cell, methods, own), *mine]
        for i, name in enumerate(names):
            curves = [run["curve"] for run in methods[name].values()]
            count = min(map(len, curves))
            x = [fmean(curve[k][0] for curve in curves) for k in range(count)]
            y = [math.exp(fmean(math.log(curve[k][1]) for curve in curves)) for k in range(count)]
            label = {0: "no growth", 1: "wide from scratch"}.get(i, name) if "fixed" in name else name
            style = {"color": "black", "lw": 2.2, "ls": "-" if name == own else ":"}
            style = style if name in mine else {"color": f"C{i % 10}", "lw": 1}
            lines[label] = axis.plot(x, y, **style)[0]
        axis.set(title=cell, yscale="log", xlabel="share of the FLOPs")
        axis.set_ylim(top=1.2 * max(run["curve"][0][1] for run in methods[names[-1]].values()))  # cuts off spikes
    for axis in list(axes.flat)[len(table) :]:
        axis.set_axis_off()
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(6, 2 * columns), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
