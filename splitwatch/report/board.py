"""Growth events and layer geometry on TensorBoard, or on any writer with some of ``SummaryWriter``'s methods.

What a writer has no method for is left out. Start TensorBoard with ``--load_fast=false --samples_per_plugin
images=200,text=200``; by default it keeps ten of each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from splitwatch.records import GrowthEvent, LayerGeometry, Split, Sprout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT: Final = "splitwatch"
EVENT_TAG: Final = f"{ROOT}/event"
FIGURES: Final = 8  # layers that are drawn at one event; a figure takes a third of a second
LISTED: Final = 40  # moves listed one by one in the text
CERTAINTY: Final = {"moving": 0.0, "suspected": 0.5, "undecided": 0.5, "stationary": 1.0}


def event_scalars(event: GrowthEvent) -> dict[str, float]:
    """The numbers of an event by tag; those that are not known (nan) are left out.

    Eigenvalues are the extremes over a layer's neurons, ``min_eigenvalue_low``, ``_median`` and ``_high`` the 5 %, 50 %
    and 95 % quantiles of the lower ends; ``growth/realised_decrease`` is held out, ``growth/realised_fitted`` is not.
    """
    plan, scalars = event.plan, {"growth/parameters": float(event.parameters[1])}
    if event.verdict is not None:
        fields = ("trend", "trend_error", "gradient_norm", "gradient_bound", "noise")
        scalars |= {f"stationarity/{name}": getattr(event.verdict, name) for name in fields}
        scalars["stationarity/stationary"] = CERTAINTY.get(event.verdict.kind, math.nan)
    for name, geometry in event.geometry.items():
        scalars |= {f"geometry/{name}/{key}": value for key, value in _summary(geometry).items()}
    scalars |= {f"width/{name}": float(after) for name, (_, after) in event.widths.items()}
    if plan:
        scalars["growth/predicted_decrease"] = plan.predicted_decrease
    scalars["growth/realised_decrease"] = event.realised_held_out
    scalars["growth/realised_fitted"] = event.realised_fitted
    scalars["growth/drift"] = event.drift
    if event.seconds:
        scalars["growth/seconds"] = sum(event.seconds.values())
    return {f"{ROOT}/{tag}": value for tag, value in scalars.items() if not math.isnan(value)}


def log_geometry(
    writer: Any, geometry: Mapping[str, LayerGeometry] | LayerGeometry, step: int, *, figures: int = FIGURES
) -> None:
    """Histograms of both ends of every layer's spectra, and a figure of each of the layers with the lowest escapes.

    Args:
        writer: a ``SummaryWriter`` or something like it.
        geometry: of one layer, or of several by name.
        step: place on the x-axis.
        figures: number of layers drawn.
    """
    layers = {geometry.layer: geometry} if isinstance(geometry, LayerGeometry) else geometry
    for name, measured in layers.items():
        _histogram(writer, f"{ROOT}/min_eigenvalue/{name}", measured.min_eigenvalue, step)
        _histogram(writer, f"{ROOT}/max_eigenvalue/{name}", measured.max_eigenvalue, step)
        _histogram(writer, f"{ROOT}/escape_eigenvalue/{name}", measured.escape_eigenvalue, step)
    from splitwatch.report.figures import spectrum_figure

    for name in _lowest(layers, figures):
        _figure(writer, f"{ROOT}/spectrum/{name}", step, lambda name=name: spectrum_figure(layers[name]))


def log_event(
    writer: Any, event: GrowthEvent, *, scalars: bool = True, step: int | None = None, figures: int = FIGURES
) -> None:
    """Everything there is to see of an event: scalars, histograms, figures, and a page of text.

    Args:
        writer: a ``SummaryWriter`` or something like it.
        event: what happened.
        scalars: whether to log ``event_scalars``.
        step: place on the x-axis; by default the event's own step.
        figures: number of layers drawn.
    """
    step = event.step if step is None else step
    if scalars and hasattr(writer, "add_scalar"):
        for tag, value in event_scalars(event).items():
            writer.add_scalar(tag, value, step)
    if hasattr(writer, "add_text"):
        writer.add_text(EVENT_TAG, event_markdown(event), step)
    log_geometry(writer, event.geometry, step, figures=figures)
    from splitwatch.report.figures import line_search_figure

    for name in _lowest(event.geometry, figures):
        _figure(writer, f"{ROOT}/plateau/{name}", step, lambda name=name: best_plateau(event, name))
    if event.plan.line_search:
        _figure(writer, f"{ROOT}/line_search", step, lambda: line_search_figure(event.plan))


def event_markdown(event: GrowthEvent) -> str:
    """A page on an event: the decision and why, what came of it, what was measured, the moves, the plateaus."""
    moves = event.plan.moves
    headline = f"grew by {sum(move.added for move in moves)} neurons" if event.grown else "measured, not grown"
    parts = [f"## Step {event.step}: {headline}", f"**Decision:** {_words(event.plan.reason)}."]
    if event.verdict is not None:
        parts.append(
            f"**Verdict:** {event.verdict.kind}: {_words(event.verdict.reason)}; loss {event.verdict.loss:.6g}."
        )
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
    if event.plateaus:
        rows = ((name, item.kind.replace("_", " "), _words(item.reason)) for name, item in event.plateaus.items())
        parts += ["### Plateaus", _table(("split", "kind", "why"), rows)]
    return "\n\n".join(parts) + "\n"


def best_plateau(event: GrowthEvent, layer: str) -> Figure:
    """The splits of the neuron of a layer that the plan moves first, or else of the one with the lowest escape.

    The narrow point is taken for a nondegenerate minimum, as the title says. A coupling no larger than the part of it
    that a stationary point does not have cannot be told from zero, and is left out.
    """
    from splitwatch.report.figures import plateau_figure

    geometry = event.geometry[layer]
    moves = (move for move in event.plan.moves if isinstance(move, Split) and move.layer == layer)
    move = next(moves, None)
    r = int(geometry.escape_eigenvalue.argmin()) if move is None else move.neuron
    coupling = float(geometry.coupling_norm[r])
    known = coupling > float(geometry.stationarity_residual[r])
    return plateau_figure(
        float(geometry.min_eigenvalue[r]),
        float(geometry.max_eigenvalue[r]),
        coupling_norm=coupling if known else 0.0,
        escape_eigenvalue=float(geometry.escape_eigenvalue[r]) if known else None,
        interval=geometry.interval[r].tolist(),
        max_interval=geometry.max_interval[r].tolist(),
        coefficients=None if move is None else move.coefficients,
        narrow="nondegenerate_minimum",
        outputs=geometry.escape_out.shape[1],
        title=f"layer {layer}, neuron {r}: its splits, if the narrow point is a nondegenerate minimum",
    )


def add_layout(writer: Any, layers: Sequence[str]) -> None:
    """Arrange the Custom Scalars tab: widths, decreases, stationarity, and the curvature and shares of every layer.

    TensorBoard colours by run, so each layer has charts of its own; within a chart, markers tell tags apart.
    """
    if not hasattr(writer, "add_custom_scalars"):
        return
    ends = ("median", "low", "high")
    shares = [f"share_{name}" for name in ("negative", "indefinite", "positive", "undecided")]
    margins = {name: ["Margin", [f"{ROOT}/geometry/{name}/min_eigenvalue_{end}" for end in ends]] for name in layers}
    writer.add_custom_scalars(
        {
            f"{ROOT}: widths": {name: _lines(f"width/{name}") for name in layers},
            f"{ROOT}: growth": {
                "decrease of the loss, predicted and realised": _lines(
                    "growth/predicted_decrease", "growth/realised_decrease"
                ),
                "parameters": _lines("growth/parameters"),
            },
            f"{ROOT}: gradient, estimate and upper bound": {
                "norm": _lines("stationarity/gradient_norm", "stationarity/gradient_bound")
            },
            f"{ROOT}: lowest eigenvalue, median and 5 to 95 % of the neurons": margins,
            f"{ROOT}: shares of the neurons by sign of curvature": {
                name: _lines(*(f"geometry/{name}/{share}" for share in shares)) for name in layers
            },
        }
    )


class TensorBoardSink:
    """A sink for events: logs each one, and arranges the Custom Scalars tab at the first that has geometry.

    Args:
        writer: a ``SummaryWriter`` or something like it.
        scalars: whether to log ``event_scalars``; off where a logger takes them already.
    """

    def __init__(self, writer: Any, *, scalars: bool = True) -> None:
        self.writer, self.scalars = writer, scalars
        self._arranged = False

    def __call__(self, event: GrowthEvent, step: int | None = None) -> None:
        """Log an event, at its own step by default."""
        if event.geometry and not self._arranged:
            add_layout(self.writer, list(event.geometry))
            self._arranged = True
        log_event(self.writer, event, scalars=self.scalars, step=step)
        if hasattr(self.writer, "flush"):
            self.writer.flush()


def read_events(logdir: str | Path) -> list[tuple[int, str]]:
    """The pages of text that ``log_event`` wrote below a folder, (step, markdown), run by run."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    runs = EventMultiplexer(size_guidance={"tensors": 0})
    runs.AddRunsFromDirectory(str(logdir)).Reload()
    return [page for run in sorted(runs.Runs()) for page in _pages(runs, run)]


def _pages(runs: Any, run: str) -> Iterator[tuple[int, str]]:
    tag = f"{EVENT_TAG}/text_summary"
    if tag in runs.GetAccumulator(run).Tags()["tensors"]:
        for item in runs.Tensors(run, tag):
            yield item.step, item.tensor_proto.string_val[0].decode()


def _summary(geometry: LayerGeometry) -> dict[str, float]:
    lower = geometry.min_eigenvalue.detach().double().cpu()
    quantiles = lower.quantile(lower.new_tensor([0.05, 0.5, 0.95])).tolist()
    return {
        **{f"share_{name}": value for name, value in geometry.shares.items()},
        **dict(zip(("min_eigenvalue_low", "min_eigenvalue_median", "min_eigenvalue_high"), quantiles, strict=True)),
        "min_eigenvalue": float(lower.min()),
        "max_eigenvalue": float(geometry.max_eigenvalue.max()),
        "coupling": float(geometry.coupling_norm.median()),
        "escape": float(geometry.escape_eigenvalue.min()),
    }


def _lowest(layers: Mapping[str, LayerGeometry], count: int) -> list[str]:
    """Names of the layers whose best escapes are lowest, in the layers' own order."""
    chosen = sorted(layers, key=lambda name: float(layers[name].escape_eigenvalue.min()))[:count]
    return [name for name in layers if name in chosen]


def _lines(*tags: str) -> list[Any]:
    """A chart of several tags, which TensorBoard reads as regular expressions."""
    return ["Multiline", [f"^{re.escape(f'{ROOT}/{tag}')}$" for tag in tags]]


def _histogram(writer: Any, tag: str, values: Tensor, step: int) -> None:
    values = values.detach().double().cpu()
    values = values[torch.isfinite(values)]
    if len(values) and hasattr(writer, "add_histogram"):
        writer.add_histogram(tag, values, step)


def _figure(writer: Any, tag: str, step: int, draw: Callable[[], Figure]) -> None:
    if hasattr(writer, "add_figure"):
        writer.add_figure(tag, draw(), step)


def _sizes(event: GrowthEvent) -> Iterator[tuple[str, ...]]:
    widths = {f"width of `{name}`": sizes for name, sizes in event.widths.items()}
    for name, sizes in {**widths, "parameters": event.parameters}.items():
        before, after = (f"{size:,}" for size in sizes)
        yield name, before, after if after == before else f"**{after}**"


def _outcome(event: GrowthEvent) -> Iterator[tuple[str, str]]:
    plan = event.plan
    if plan:
        yield "offset, relative to the neurons' weights", f"{plan.offset:g}"
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


def _measured(item: tuple[str, LayerGeometry]) -> tuple[str, ...]:
    name, geometry = item
    numbers, shares = _summary(geometry), geometry.shares
    values = [_number(numbers[key]) for key in ("min_eigenvalue", "max_eigenvalue", "coupling", "escape")]
    signs = ", ".join(f"{share:.0%} {sign}" for sign, share in shares.items() if share)
    return f"`{name}`", str(len(geometry.min_eigenvalue)), *values, signs


def _move(move: Split | Sprout) -> tuple[str, ...]:
    neuron, coefficients = "new", "sprout"
    if isinstance(move, Split):
        neuron, coefficients = str(move.neuron), ", ".join(map(_number, move.coefficients))
    return f"`{move.layer}`", neuron, coefficients, _number(move.predicted_decrease), _words(move.reason)


def _number(value: float) -> str:
    return "not known" if math.isnan(value) else f"{value:.3g}".replace("-", "−")


def _words(text: str) -> str:
    """Text that neither ends a table cell or a sentence nor starts formatting."""
    return re.sub(r"([|*_])", r"\\\1", text.rstrip(".")).replace("\n", " ")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *rows])
