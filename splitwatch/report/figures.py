"""Pictures of a plateau and of a layer's spectra; each function returns a matplotlib ``Figure``.

Figures are made without pyplot, so nothing is shown, kept or restyled behind the caller's back: save one with
``figure.savefig("plateau.png")``, or return it from a notebook cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon
from torch import Tensor

from splitwatch.geometry.plateau import Narrow, classify_split
from splitwatch.records import LayerGeometry

NO_COUPLING: Final = 1e-6  # a coupling this much smaller than the inner Hessian is rounding error
INK, LOW, HIGH, ESCAPE = "#222222", "#0072B2", "#D55E00", "#6A3D9A"
KINDS: Final = {  # colours told apart in every common kind of colour vision
    "minimum": ("#56B4E9", "minimum"),
    "saddle": ("#F0E442", "saddle"),
    "strict_saddle": ("#E8916B", "strict saddle"),
    "coupling": ("#F8D5C4", "strict saddle through the coupling alone"),
    "inconclusive": ("#C8C8C8", "inconclusive at second order"),
    "not_stationary": ("#F4F4F4", "not stationary"),
}
WIDE: Final = 50.0  # largest over median eigenvalue from which a spectrum is drawn on a logarithmic scale
NAMED: Final = 40  # a layer with more neurons than this has them ranked, not numbered
SURE: Final = "two +, one −: saddle for any inner Hessian"


@dataclass(frozen=True, slots=True)
class _Theory:
    """What is known of one neuron, and hence of its splits."""

    eigenvalues: tuple[float, float]
    coupled: bool
    narrow: Narrow
    outputs: int

    def kind(self, coefficients: Sequence[float]) -> str:
        """Key in ``KINDS`` of the split into these coefficients."""
        outputs = max(self.outputs, 1 + self.coupled)
        alone = classify_split(self.eigenvalues, coefficients, outputs=outputs, narrow=self.narrow).kind
        if not self.coupled or alone in ("strict_saddle", "not_stationary"):
            return alone
        return "coupling"


def plateau_figure(
    min_eigenvalue: float,
    max_eigenvalue: float,
    *,
    coupling_norm: float = 0.0,
    escape_eigenvalue: float | None = None,
    interval: Sequence[float] | None = None,
    max_interval: Sequence[float] | None = None,
    coefficients: Sequence[float] | None = None,
    narrow: Narrow = "minimum",
    outputs: int = 1,
    title: str = "",
) -> Figure:
    """What the splits of one neuron are: into two copies, with their curvatures, and into three, by their signs.

    Args:
        min_eigenvalue: lowest eigenvalue of the inner Hessian.
        max_eigenvalue: the highest.
        coupling_norm: spectral norm of the coupling, projected off v; zero with one output.
        escape_eigenvalue: lowest curvature with the coupling, measured at the coefficients (½, ½).
        interval: held-out interval of the lowest eigenvalue, drawn as a band; where it holds zero, or lies on the other
            side of it, the eigenvalue counts as zero in the regions.
        max_interval: the same of the highest eigenvalue.
        coefficients: the chosen ones, two or three, to be marked.
        narrow: what the narrow point is, as in ``classify_split``.
        outputs: number of outgoing weights of the neuron.
        title: of the figure.
    """
    ends, bars = (min_eigenvalue, max_eigenvalue), (interval, max_interval)
    coupled = coupling_norm > NO_COUPLING * max(map(abs, ends))
    theory = _Theory((_sure(ends[0], bars[0]), _sure(ends[1], bars[1])), coupled, narrow, outputs)
    reach = max([2.0, *(abs(value) + 0.25 for value in coefficients or ())])
    figure = blank(title)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    seen = _shade_two(left, theory, reach) | _shade_three(right, theory, reach)
    _curves(left, reach, ends, bars, coupling_norm if coupled else 0.0)
    if escape_eigenvalue is not None:
        label = r"lowest, measured at $(\frac{1}{2}, \frac{1}{2})$"
        left.plot([0.5], [escape_eigenvalue], "*", color=ESCAPE, mec="white", ms=13, zorder=6, label=label)
    _mark(left, right, coefficients or ())
    left.margins(y=0.12)
    regions = [Patch(fc=KINDS[kind][0], alpha=0.6, label=KINDS[kind][1]) for kind in KINDS if kind in seen]
    regions.append(Patch(fc="white", ec="#999999", hatch="////", lw=0.5, label=SURE))
    handles = [*left.get_legend_handles_labels()[0], *regions]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def spectrum_figure(geometry: LayerGeometry) -> Figure:
    """Both ends of every neuron's inner Hessian with held-out intervals, and the coupling; neurons sorted by the lower.

    A point is filled where the held-out half confirms its sign. The scale of a spectrum over many decades is
    logarithmic beyond the median size.
    """
    order = _numbers(geometry.min_eigenvalue).argsort()
    figure = blank(f"layer {geometry.layer}: inner Hessians of its {len(order)} neurons")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    place, size = range(len(order)), max(2.5, min(5.0, 300 / (1 + len(order))))
    ends = [_numbers(end)[order] for end in (geometry.min_eigenvalue, geometry.max_eigenvalue)]
    top.vlines(place, *(end.tolist() for end in ends), color="#CCCCCC", lw=0.8, zorder=1)
    for label, colour, end, bars in (
        ("lowest eigenvalue", LOW, ends[0], geometry.interval),
        ("highest eigenvalue", HIGH, ends[1], geometry.max_interval),
    ):
        low, high = _numbers(bars)[order].T
        sure = torch.where(end < 0, high < 0, low > 0)
        top.vlines(place, low.tolist(), high.tolist(), color=colour, alpha=0.45, lw=size / 2)
        top.plot(place, end.tolist(), "o", color=colour, mfc="white", ms=size)
        top.plot(place, end.where(sure, math.nan).tolist(), "o", color=colour, ms=size, label=label)
    top.plot(
        [], [], "o", color="#777777", mfc="white", label="hollow: sign not confirmed by the held-out interval (bar)"
    )
    sizes = torch.cat(ends).abs()
    if float(sizes.max()) > WIDE * float(sizes.median()) > 0:
        top.set_yscale("symlog", linthresh=float(sizes.median()), linscale=0.5)
    top.axhline(0, color=INK, lw=0.8)
    bottom.bar(place, _numbers(geometry.coupling_norm)[order].tolist(), width=0.7, color=ESCAPE)
    bottom.margins(x=0.01)
    if len(order) <= NAMED:
        bottom.set_xticks(place, order.tolist())
    dress(top, "", "curvature")
    dress(bottom, f"{'neuron' if len(order) <= NAMED else 'rank'}, by lowest eigenvalue", "coupling")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _shade_two(axes: Axes, theory: _Theory, reach: float) -> set[str]:
    """The regions of the line λ = (t, 1−t) and its points t = 0, 1; returns the kinds drawn."""
    kinds = {t: theory.kind((t, 1 - t)) for t in (-1.0, 0.0, 0.5, 1.0, 2.0)}
    for start, stop, t in ((1 - reach, 0.0, -1.0), (0.0, 1.0, 0.5), (1.0, reach, 2.0)):
        axes.axvspan(start, stop, color=KINDS[kinds[t]][0], alpha=0.6, lw=0, gid=f"t={t:g} {kinds[t]}")
    for t in (0.0, 1.0):
        axes.axvline(t, color=INK, lw=3.4)
        axes.axvline(t, color=KINDS[kinds[t]][0], lw=2.2, gid=f"t={t:g} {kinds[t]}")
    axes.set_xlim(1 - reach, reach)
    dress(axes, r"two copies: coefficients $(t,\ 1-t)$", "curvature as the copies part")
    return set(kinds.values())


def _shade_three(axes: Axes, theory: _Theory, reach: float) -> set[str]:
    """The regions of the plane (λ₁, λ₂) with λ₃ = 1−λ₁−λ₂, by their signs; returns the kinds drawn."""
    far, near, seen = reach, 1 - reach, set()
    for signs, corners in {
        (1, 1, 1): [(0, 0), (1, 0), (0, 1)],
        (1, 1, -1): [(1, 0), (far, 0), (far, far), (0, far), (0, 1)],
        (1, -1, 1): [(0, 0), (1, 0), (far, near), (0, near)],
        (-1, 1, 1): [(0, 0), (0, 1), (near, far), (near, 0)],
        (3, -1, -1): [(1, 0), (far, 0), (far, near)],
        (-1, 3, -1): [(0, 1), (0, far), (near, far)],
        (-1, -1, 3): [(0, 0), (near, 0), (near, near), (0, near)],
    }.items():
        kind = theory.kind([sign / sum(signs) for sign in signs])
        words = " ".join("+" if sign > 0 else "−" for sign in signs)
        hatch = "////" if words.count("+") == 2 else None
        colour = KINDS[kind][0]
        axes.add_patch(Polygon(corners, fc=colour, alpha=0.6, ec="white", hatch=hatch, lw=0, gid=f"{words} {kind}"))
        x, y = (sum(axis) / len(axis) for axis in columns(corners))
        lift = 14 if len(corners) == 5 else 0  # (1, 1, −1) is often chosen, and marked
        box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}
        look = {"ha": "center", "va": "center", "fontsize": 9, "color": INK, "bbox": box}
        axes.annotate(words, (x, y), (0, lift), textcoords="offset points", **look)
        seen.add(kind)
    for line in ([(0, near), (0, far)], [(near, 0), (far, 0)], [(near, far), (far, near)]):
        axes.plot(*columns(line), color="white", lw=1)
    axes.add_patch(Polygon([(0, 0), (1, 0), (0, 1)], fill=False, ec=INK, lw=1.8, joinstyle="round", zorder=3))
    axes.set(xlim=(near, far), ylim=(near, far), aspect="equal")
    dress(axes, r"three copies: $\lambda_1$,   $\lambda_3 = 1 - \lambda_1 - \lambda_2$", r"$\lambda_2$")
    return seen


def _curves(axes: Axes, reach: float, ends: Sequence[float], bars: Sequence[Sequence[float] | None], g: float) -> None:
    """Curvatures κ(t) λ_min and κ(t) λ_max; with a coupling, the band that holds the lowest curvature.

    The latter is the lowest eigenvalue of [[κ S, γ Gᵀ], [γ G, 0]], hence between those of [[κ λ, γ g], [γ g, 0]] for
    the two ends λ of S, where g = |G| and γ = 1 / √(2 (t² + (1−t)²)); nor is it above the lowest κ λ.
    """
    t = torch.linspace(1 - reach, reach, 301, dtype=torch.float64)
    square = t**2 + (1 - t) ** 2
    kappa = t * (1 - t) / square
    x, curves = t.tolist(), [kappa * end for end in ends]
    labels = r"along the lowest: $\kappa(t)\,\lambda_{\min}$", r"along the highest: $\kappa(t)\,\lambda_{\max}$"
    band = "held-out interval"
    for curve, bar, style, label in zip(curves, bars, ("-", "--"), labels, strict=True):
        if bar is not None and all(map(math.isfinite, bar)):
            low, high = ((kappa * end).tolist() for end in bar)
            axes.fill_between(x, low, high, color=INK, alpha=0.16, lw=0, label=band)
            band = ""
        axes.plot(x, curve.tolist(), style, color=INK, lw=1.8, label=label)
    axes.axhline(0, color=INK, lw=0.6)
    if g:
        lower, upper = torch.minimum(*curves), torch.maximum(*curves)
        low, high = ((p - (p**2 + 2 * g**2 / square).sqrt()) / 2 for p in (lower, upper))
        label = "lowest with coupling: in this band"
        high = torch.minimum(high, lower).tolist()
        axes.fill_between(x, low.tolist(), high, color=ESCAPE, alpha=0.45, lw=0, label=label, zorder=3)


def _mark(left: Axes, right: Axes, coefficients: Sequence[float]) -> None:
    """Mark the chosen coefficients: two on the line, three in the plane."""
    words = ", ".join(f"{value:g}".replace("-", "−") for value in coefficients)
    look = {"color": INK, "mec": "white", "ms": 9, "zorder": 7, "label": f"chosen: ({words})"}
    if len(coefficients) == 2:
        left.axvline(coefficients[0], color=INK, lw=1.2, ls=(0, (2, 2)))
        left.plot([coefficients[0]], [0.0], "D", **look)
    elif len(coefficients) == 3:
        right.plot(coefficients[0], coefficients[1], "D", **look)


def _sure(value: float, interval: Sequence[float] | None) -> float:
    """The value, or zero where its held-out interval does not confirm its sign."""
    confirmed = interval is None or (interval[1] < 0 if value < 0 else interval[0] > 0)
    return value if confirmed else 0.0


def blank(title: str, size: tuple[float, float] = (9, 4)) -> Figure:
    """A figure with nothing in it yet."""
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    return figure


def dress(axes: Axes, x: str, y: str) -> None:
    """Names and looks of axes."""
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def columns(rows: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Pairs as two lists."""
    return [x for x, _ in rows], [y for _, y in rows]


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()
