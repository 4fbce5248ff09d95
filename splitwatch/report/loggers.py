"""Loggers of experiment trackers as writers: those methods of ``SummaryWriter`` that they have a counterpart for.

Known by the methods they have, so that no tracker has to be installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def writer_of(logger: Any) -> Any | None:
    """What shows figures and texts of a Lightning logger; None for one that takes numbers only."""
    experiment = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure") or hasattr(experiment, "add_histogram"):  # TensorBoard
        return experiment
    if hasattr(experiment, "log_figure") and hasattr(experiment, "log_text") and hasattr(logger, "run_id"):
        return MLflowWriter(experiment, logger.run_id)
    if hasattr(logger, "log_image") and hasattr(logger, "log_text"):
        return WandbWriter(logger)
    return None


class MLflowWriter:
    """Artifacts of a run: a file for every figure and text at every step."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    def add_figure(self, tag: str, figure: Figure, step: int) -> None:
        """A picture."""
        self.client.log_figure(self.run_id, figure, f"{tag}/{step:08}.png")

    def add_text(self, tag: str, text: str, step: int) -> None:
        """A page of markdown."""
        self.client.log_text(self.run_id, text, f"{tag}/{step:08}.md")


class WandbWriter:
    """Media of a Weights & Biases run, through Lightning's logger, which keeps the x-axis."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def add_figure(self, tag: str, figure: Figure, step: int) -> None:
        """A picture."""
        self.logger.log_image(tag, [figure], step=step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """A page of markdown, in a table of one cell."""
        self.logger.log_text(tag, columns=["page"], data=[[text]], step=step)
