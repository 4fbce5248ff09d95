"""Growth events and layer geometry on TensorBoard, or on any writer with some of ``SummaryWriter``'s methods.

What a writer has no method for is left out. Start TensorBoard with ``--load_fast=false --samples_per_plugin
images=200,text=200``; by default it keeps ten of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from splitwatch.events import GrowthEvent, Outcome
from splitwatch.records import LayerGeometry, Split
from splitwatch.report.page import event_markdown
from splitwatch.report.scalars import ROOT, event_scalars, size_scalars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENT_TAG: Final = f"{ROOT}/event"
FIGURES: Final = 8  # layers that are drawn at one event; a figure takes a third of a second


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
    writer: Any,
    event: GrowthEvent,
    *,
    scalars: bool = True,
    step: int | None = None,
    figures: int = FIGURES,
    outcomes: Sequence[Outcome] | None = None,
) -> None:
    """Everything there is to see of an event: scalars, histograms, figures, and a page of text.

    Args:
        writer: a ``SummaryWriter`` or something like it.
        event: what happened.
        scalars: whether to log ``event_scalars``.
        step: place on the x-axis; by default the event's own step.
        figures: number of layers drawn.
        outcomes: of all moves of the run so far; by default those of the event alone.
    """
    step = event.step if step is None else step
    if scalars and hasattr(writer, "add_scalar"):
        sizes = size_scalars(event, before=True).items() if event.grown else ()
        for place, items in ((step - 1, sizes), (step, event_scalars(event).items())):
            for tag, value in items:
                writer.add_scalar(tag, value, place)
    if hasattr(writer, "add_text"):
        writer.add_text(EVENT_TAG, event_markdown(event), step)
    log_geometry(writer, event.geometry, step, figures=figures)
    from splitwatch.report.figures_growth import line_search_figure, step_search_figure

    for name in _lowest(event.geometry, figures):
        _figure(writer, f"{ROOT}/plateau/{name}", step, lambda name=name: best_plateau(event, name))
    if event.plan.line_search:
        _figure(writer, f"{ROOT}/line_search", step, lambda: line_search_figure(event.plan))
    if event.plan.step_search:
        _figure(writer, f"{ROOT}/step_search", step, lambda: step_search_figure(event.plan))
    log_calibration(writer, event.outcomes if outcomes is None else outcomes, step)


def log_calibration(writer: Any, outcomes: Sequence[Outcome], step: int) -> None:
    """A figure of what was predicted of moves against what came of them; nothing where there are none."""
    if outcomes:
        from splitwatch.report.figures_growth import calibration_figure

        _figure(writer, f"{ROOT}/calibration", step, lambda: calibration_figure(outcomes))


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
        self._arranged, self.outcomes = False, list[Outcome]()

    def __call__(self, event: GrowthEvent, step: int | None = None) -> None:
        """Log an event, at its own step by default."""
        if event.geometry and not self._arranged:
            add_layout(self.writer, list(event.geometry))
            self._arranged = True
        self.outcomes += event.outcomes
        log_event(self.writer, event, scalars=self.scalars, step=step, outcomes=self.outcomes if event.outcomes else ())
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
