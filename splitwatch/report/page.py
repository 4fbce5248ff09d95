"""A growth event as a page of markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from splitwatch.records import GrowthEvent, LayerGeometry, Split, Sprout

LISTED = 40
"""Moves listed one by one."""


def event_markdown(event: GrowthEvent) -> str:
    """A page on an event: the decision and why, what came of it, what was measured, the moves, the plateaus."""
    headline = f"grew {_count(event)}" if event.grown else "measured, not grown"
    parts = [f"## Step {event.step}: {headline}", f"**Decision:** {_words(event.plan.reason)}."]
    if event.verdict is not None:
        parts.append(
            f"**Verdict:** {event.verdict.kind}: {_words(event.verdict.reason)} (loss {event.verdict.loss:.6g})."
        )
    parts.append(_table(("", "before", "after"), _sizes(event)))
    parts.append(_table(("quantity", "value"), _outcome(event)))
    if event.geometry:
        heads = ("layer", "neurons", "lowest", "highest", "coupling (median)", "best escape", "confirmed signs")
        parts += ["### Curvature", _table(heads, map(_measured, event.geometry.items()))]
    if event.plan.moves:
        heads = ("layer", "neuron", "coefficients", "predicted decrease", "why")
        parts += ["### Moves", _table(heads, map(_move, event.plan.moves[:LISTED]))]
        if len(event.plan.moves) > LISTED:
            parts.append(f"… and {len(event.plan.moves) - LISTED} more.")
    if event.plateaus:
        rows = ((name, item.kind.replace("_", " "), _words(item.reason)) for name, item in event.plateaus.items())
        parts += ["### Plateaus", _table(("split", "kind", "why"), rows)]
    return "\n\n".join(parts) + "\n"


def _count(event: GrowthEvent) -> str:
    added = sum(move.added for move in event.plan.moves)
    return f"by {added} neuron{'' if added == 1 else 's'}"


def _sizes(event: GrowthEvent) -> Iterator[tuple[str, ...]]:
    for name, (before, after) in event.widths.items():
        yield f"width of `{name}`", f"{before:,}", f"**{after:,}**" if after != before else f"{after:,}"
    before, after = event.parameters
    yield "parameters", f"{before:,}", f"**{after:,}**" if after != before else f"{after:,}"


def _outcome(event: GrowthEvent) -> Iterator[tuple[str, str]]:
    plan = event.plan
    if plan:
        yield "offset, relative to the neurons' weights", f"{plan.offset:g}"
        yield "decrease predicted (second order)", _number(plan.predicted_decrease)
        yield "decrease planned, fitted half", _number(plan.fitted_decrease)
        yield "decrease planned, held-out half", _number(plan.held_out_decrease)
    if event.grown:
        yield "decrease realised, fitted half", _number(event.realised_fitted)
        yield "decrease realised, held-out half", f"**{_number(event.realised_held_out)}**"
        yield "output drift at zero offset", _number(event.drift)
    if event.restarted:
        yield "optimizer state restarted", ", ".join(f"`{name}`" for name in event.restarted)
    if event.seconds:
        yield "seconds", ", ".join(f"{stage} {value:.2f}" for stage, value in event.seconds.items())


def _measured(item: tuple[str, LayerGeometry]) -> tuple[str, ...]:
    name, geometry = item
    shares = ", ".join(f"{value:.0%} {sign}" for sign, value in geometry.shares.items() if value)
    numbers = (
        geometry.min_eigenvalue.min(),
        geometry.max_eigenvalue.max(),
        geometry.coupling_norm.median(),
        geometry.escape_eigenvalue.min(),
    )
    return f"`{name}`", str(len(geometry.min_eigenvalue)), *(_number(float(number)) for number in numbers), shares


def _move(move: Split | Sprout) -> tuple[str, ...]:
    if isinstance(move, Split):
        coefficients = ", ".join(f"{value:g}".replace("-", "−") for value in move.coefficients)
        place = (str(move.neuron), f"({coefficients})")
    else:
        place = ("new", "sprout")
    return f"`{move.layer}`", *place, _number(move.predicted_decrease), _words(move.reason)


def _number(value: float) -> str:
    return "not known" if math.isnan(value) else f"{value:.3g}".replace("-", "−")


def _words(text: str) -> str:
    """Text that neither ends a table cell nor starts formatting."""
    return text.rstrip(".").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("\n", " ")


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""
