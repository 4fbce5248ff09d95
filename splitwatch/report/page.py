"""An event as a page of markdown, for TensorBoard's Text tab and the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from splitwatch.events import GrowthEvent
from splitwatch.records import LayerGeometry, Split, Sprout
from splitwatch.report.scalars import summary

LISTED: Final = 40  # moves listed one by one


def event_markdown(event: GrowthEvent) -> str:
    """A page on an event: the decision and why, what came of it, what was measured, the moves, the plateaus."""
    moves = event.plan.moves
    word, headline = "Decision", "measured, not grown"
    if event.comparison is not None:
        word, headline = "Finding", "growth compared with none"
    headline = f"grew by {sum(move.added for move in moves)} neurons" if event.grown else headline
    parts = [
        f"## Step {event.step}: {headline}",
        f"**{word}:** {_words(event.plan.reason)}.",
    ]
    if event.verdict is not None:
        parts.append(
            f"**Verdict:** {event.verdict.kind}: {_words(event.verdict.reason)}; loss {event.verdict.loss:.6g}."
        )
    parts += [f"**The point itself:** {_words(event.point)}."] if event.point else []
    parts += ["### Caveats", "\n".join(f"* {_words(item)}." for item in event.caveats)] if event.caveats else []
    parts += ["### Size", _table(("", "before", "after"), _sizes(event))]
    outcome = list(_outcome(event))
    parts += ["### Outcome", _table(("quantity", "value"), outcome)] if outcome else []
    if event.geometry:
        heads = ("layer", "neurons", "lowest", "highest", "coupling (median)", "lowest escape", "confirmed curvature")
        parts += ["### Curvature", _table(heads, map(_measured, event.geometry.items()))]
    if moves:
        heads = ("layer", "neuron", "coefficients", "predicted decrease", "why")
        more = [f"… and {len(moves) - LISTED} more."] if len(moves) > LISTED else []
        parts += ["### Moves", _table(heads, map(_move, moves[:LISTED])), *more]
    if event.outcomes:
        rows = ((x.name, _number(x.predicted), _number(x.realised), _yes(x.certified)) for x in event.outcomes)
        heads = ("moves", "decrease predicted", "realised, held-out half", "certified")
        parts += ["### What came of the moves", _table(heads, rows)]
    if event.plateaus:
        rows = ((name, item.kind.replace("_", " "), _words(item.reason)) for name, item in event.plateaus.items())
        parts += ["### Plateaus", _table(("split", "kind", "why"), rows)]
    return "\n\n".join(parts) + "\n"


def _sizes(event: GrowthEvent) -> Iterator[tuple[str, ...]]:
    widths = {f"width of `{name}`": sizes for name, sizes in event.widths.items()}
    for name, sizes in {**widths, "parameters": event.parameters}.items():
        before, after = (f"{size:,}" for size in sizes)
        yield name, before, after if after == before else f"**{after}**"


def _outcome(event: GrowthEvent) -> Iterator[tuple[str, str]]:
    plan = event.plan
    if plan:
        if plan.offset or not plan.step:
            yield "offset, relative to the neurons' weights", f"{plan.offset:g}"
        if plan.step:
            yield "step of the sprouts, relative to a quadratic model's", f"{plan.step:g}"
        yield "decrease predicted (second order)", _number(plan.predicted_decrease)
        yield "decrease found by the line search, fitted half", _number(plan.fitted_decrease)
        yield "decrease found by the line search, held-out half", _number(plan.held_out_decrease)
    if event.grown:
        yield "decrease realised, fitted half", _number(event.realised_fitted)
        yield "decrease realised, held-out half", f"**{_number(event.realised_held_out)}**"
        yield "output drift at zero offset", _number(event.drift)
    if event.restarted:
        yield "optimizer state restarted", ", ".join(f"`{name}`" for name in event.restarted)
    if event.seconds:
        yield "seconds", ", ".join(f"{stage} {value:.2f}" for stage, value in event.seconds.items())
    if not math.isnan(event.overhead):
        yield "monitoring so far", f"{event.overhead:.2%} of training time"


def _measured(item: tuple[str, LayerGeometry]) -> tuple[str, ...]:
    name, geometry = item
    numbers, shares = summary(geometry), geometry.shares
    values = [_number(numbers[key]) for key in ("min_eigenvalue", "max_eigenvalue", "coupling", "escape")]
    signs = ", ".join(f"{share:.0%} {sign}" for sign, share in shares.items() if share)
    return f"`{name}`", str(len(geometry.min_eigenvalue)), *values, signs


def _move(move: Split | Sprout) -> tuple[str, ...]:
    neuron, coefficients = "new", "sprout"
    if isinstance(move, Split):
        neuron, coefficients = str(move.neuron), ", ".join(map(_number, move.coefficients))
    return f"`{move.layer}`", neuron, coefficients, _number(move.predicted_decrease), _words(move.reason)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _number(value: float) -> str:
    return "not known" if math.isnan(value) else f"{value:.3g}".replace("-", "−")


def _words(text: str) -> str:
    """Text that neither ends a table cell or a sentence nor starts formatting."""
    return re.sub(r"([|*_])", r"\\\1", text.rstrip(".")).replace("\n", " ")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *rows])
