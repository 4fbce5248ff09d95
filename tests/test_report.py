import io
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from splitwatch.events import GrowthEvent, Outcome
from splitwatch.geometry.plateau import classify_split, plateau_regions
from splitwatch.records import (
    GrowthPlan,
    LayerGeometry,
    PlateauVerdict,
    Split,
    Sprout,
    StationarityVerdict,
)
from splitwatch.report.board import (
    TensorBoardSink,
    add_layout,
    best_plateau,
    event_markdown,
    event_scalars,
    log_event,
    log_geometry,
    read_events,
)
from splitwatch.report.figures import plateau_figure, spectrum_figure
from splitwatch.report.figures_growth import calibration_figure, line_search_figure, step_search_figure
from splitwatch.report.scalars import size_scalars

NEURONS = 12


def geometry(name: str = "net.0", m: int = NEURONS, d: int = 4, c: int = 3) -> LayerGeometry:
    generator = torch.Generator().manual_seed(len(name))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    low = draw(m) - 0.3
    high = low + draw(m).abs()
    width = 0.2 * draw(m).abs()[:, None] * torch.tensor([-1.0, 1.0])
    return LayerGeometry(
        layer=name,
        min_eigenvalue=low,
        max_eigenvalue=high,
        min_vector=draw(m, d),
        max_vector=draw(m, d),
        residual=1e-6 * draw(m, 2).abs(),
        coupling_norm=draw(m).abs(),
        escape_eigenvalue=low - 0.1,
        escape_in=draw(m, d),
        escape_out=draw(m, c),
        escape_residual=1e-6 * draw(m).abs(),
        interval=low[:, None] + width,
        max_interval=high[:, None] + width,
        escape_interval=low[:, None] - 0.1 + width,
        stationarity_residual=1e-3 * draw(m).abs(),
        proven=torch.zeros(m, 2, dtype=torch.bool),
        screened=torch.zeros(m, dtype=torch.bool),
    )


def grown_event() -> GrowthEvent:
    split = Split("net.0", 5, (2.0, -1.0), torch.zeros(2, 4), torch.zeros(2, 3), 0.01, "curvature -1 | both ends")
    sprout = Sprout("net.2", torch.zeros(4), torch.zeros(3), 0.002, "a fresh direction")
    search = tuple((sign * 2.0**p, 0.3 * 4.0**p - 0.2 * 16.0**p) for p in range(-9, 2) for sign in (1, -1))
    return GrowthEvent(
        plan=GrowthPlan((), (split, sprout), "2 of 24 neurons move", 0.5, 0.012, 0.011, 0.009, search),
        widths={"net.0": (12, 13), "net.2": (12, 13)},
        parameters=(1000, 1016),
        drift=1e-8,
        realised_fitted=0.011,
        realised_held_out=0.009,
        verdict=StationarityVerdict("stationary", "the bound is below the floor", 0.5, 1e-4, 2e-4, 1e-3, 2e-3, 0.1),
        geometry={"net.0": geometry("net.0"), "net.2": geometry("net.2b")},
        plateaus={"net.0[5] as planned": PlateauVerdict("strict_saddle", "it descends", (1, 1, 0), (2.0, -1.0))},
        seconds={"geometry": 1.5, "growth": 0.5},
        step=120,
        grown=True,
        outcomes=(Outcome("net.0", "split", 0.01, 0.008, certified=True), Outcome("net.2", "sprout", 0.002, 0.0005)),
    )


def measured_event() -> GrowthEvent:
    return GrowthEvent(GrowthPlan((), (), "growth would not help here"), {}, (1000, 1000), step=7)


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "histograms": 0})
    return events.Reload()


def regions(figure, axes: int) -> dict[str, str]:
    """What is drawn where: sign pattern or t, to kind."""
    found = (artist.get_gid() for artist in [*figure.axes[axes].patches, *figure.axes[axes].lines])
    return dict(gid.rsplit(" ", 1) for gid in found if gid)


def test_scalars_say_what_happened():
    scalars = event_scalars(grown_event())
    assert scalars["splitwatch/width/net.0"] == 13
    assert scalars["splitwatch/growth/parameters"] == 1016
    assert scalars["splitwatch/growth/predicted_decrease"] == 0.012
    assert scalars["splitwatch/growth/realised_decrease"] == 0.009
    assert scalars["splitwatch/growth/seconds"] == 2.0
    assert scalars["splitwatch/stationarity/stationary"] == 1.0
    shares = [
        scalars[f"splitwatch/geometry/net.0/share_{s}"] for s in ["negative", "indefinite", "positive", "undecided"]
    ]
    assert sum(shares) == pytest.approx(1)
    lowest = geometry("net.0").min_eigenvalue
    assert scalars["splitwatch/geometry/net.0/min_eigenvalue"] == pytest.approx(float(lowest.min()))
    assert scalars["splitwatch/geometry/net.0/min_eigenvalue_median"] == pytest.approx(
        float(lowest.double().quantile(0.5))
    )


def test_unknown_numbers_are_left_out():
    assert event_scalars(measured_event()) == {"splitwatch/growth/parameters": 1000.0}
    untested = replace(measured_event(), verdict=StationarityVerdict("moving", "the loss falls", 1.0, trend=-0.1))
    stationarity = {tag.split("/", 2)[2] for tag in event_scalars(untested) if "/stationarity/" in tag}
    assert stationarity == {"trend", "stationary"}


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        TensorBoardSink(writer)(grown_event())
        TensorBoardSink(writer, scalars=False)(replace(grown_event(), step=240), 200)
    logged = read(tmp_path)
    tags = logged.Tags()
    assert set(event_scalars(grown_event())) == set(tags["scalars"])
    for tag, value in event_scalars(grown_event()).items():
        *before, item = logged.Scalars(tag)
        assert (item.step, item.value) == (120, pytest.approx(value))
        expected = size_scalars(grown_event(), before=True)
        assert [(b.step, b.value) for b in before] == ([(119, expected[tag])] if tag in expected else [])
    ends = {f"splitwatch/{end}_eigenvalue/{name}" for end in ("min", "max", "escape") for name in ("net.0", "net.2")}
    assert set(tags["histograms"]) == ends
    assert [(item.step, item.histogram_value.num) for item in logged.Histograms("splitwatch/min_eigenvalue/net.0")] == [
        (120, NEURONS),
        (200, NEURONS),
    ]
    drawn = {f"splitwatch/{kind}/{name}" for kind in ("spectrum", "plateau") for name in ("net.0", "net.2")}
    assert set(tags["images"]) == drawn | {"splitwatch/line_search", "splitwatch/calibration"}
    image = logged.Images("splitwatch/plateau/net.0")[0]
    assert (image.width, image.height) == (900, 400)


def test_text_is_read_back(tmp_path):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        log_event(writer, grown_event())
        log_event(writer, measured_event())
    assert read_events(tmp_path) == [(120, event_markdown(grown_event())), (7, event_markdown(measured_event()))]
    assert read_events(tmp_path / "nothing") == []


def test_layout_names_tags_that_exist(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        for event in (measured_event(), grown_event(), grown_event()):
            sink(event)
    (item,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(item.tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    multiline = {tag for chart in charts for tag in chart.multiline.tag}
    margins = {
        tag for chart in charts for series in chart.margin.series for tag in (series.value, series.lower, series.upper)
    }
    assert {chart.title for chart in charts} >= {"net.0", "net.2"}
    known = event_scalars(grown_event())
    assert {tag.strip("^$").replace("\\", "") for tag in multiline} | margins <= set(known)


def test_markdown_has_decision_numbers_moves_and_plateaus():
    page = event_markdown(grown_event())
    assert page.startswith("## Step 120: grew by 2 neurons")
    for words in (
        "2 of 24 neurons move",
        "stationary: the bound",
        "| width of `net.0` | 12 | **13** |",
        "**1,016**",
        "| 1e−08 |",
    ):
        assert words in page
    assert "| `net.0` | 5 | 2, −1 | 0.01 | curvature -1 \\| both ends |" in page
    assert "| `net.2` | new | sprout |" in page
    assert "| net.0[5] as planned | strict saddle | it descends |" in page
    assert event_markdown(measured_event()).startswith("## Step 7: measured, not grown")
    assert "Moves" not in event_markdown(measured_event())


def test_long_list_of_moves_is_cut():
    event = grown_event()
    many = replace(event, plan=replace(event.plan, moves=event.plan.moves[:1] * 50))
    assert "… and 10 more." in event_markdown(many)


@pytest.mark.parametrize("method", ["add_scalar", "add_histogram", "add_figure", "add_text", "add_custom_scalars"])
def test_writer_with_one_method_is_served(method):
    calls = []
    writer = type("Writer", (), {method: lambda self, *arguments: calls.append(arguments)})()
    TensorBoardSink(writer)(grown_event())
    assert calls
    TensorBoardSink(object())(grown_event())


def test_unusable_values_leave_no_histogram(tmp_path):
    broken = replace(geometry(), min_eigenvalue=torch.full((NEURONS,), torch.nan))
    with SummaryWriter(str(tmp_path)) as writer:
        log_geometry(writer, broken, 3, figures=0)
        add_layout(writer, [])
    assert set(read(tmp_path).Tags()["histograms"]) == {f"splitwatch/{e}_eigenvalue/net.0" for e in ("max", "escape")}


def test_figures_are_limited_to_the_lowest_escapes():
    names = []
    writer = type("Writer", (), {"add_figure": lambda self, tag, figure, step: names.append(tag)})()
    layers = {
        name: replace(geometry(name), escape_eigenvalue=torch.full((NEURONS,), -i * 1.0))
        for i, name in enumerate("abc")
    }
    log_geometry(writer, layers, 0, figures=2)
    assert names == ["splitwatch/spectrum/b", "splitwatch/spectrum/c"]


@pytest.mark.parametrize("ends", [(0.4, 2.0), (-2.0, -0.4), (-0.8, 1.6), (0.0, 1.0), (0.0, 0.0)])
def test_regions_are_those_of_the_theory(ends):
    figure = plateau_figure(*ends)
    kinds = [kind for _, _, kind in plateau_regions(*ends)]
    assert list(regions(figure, 0).values()) == [kinds[0], kinds[2], kinds[4], kinds[1], kinds[3]]
    assert len(regions(figure, 1)) == 7
    for words, kind in regions(figure, 1).items():
        signs = [1.0 if sign == "+" else -1.0 for sign in words.split()]
        minus = signs.count(-1.0)
        weights = [(1.0 + minus) / (3 - minus) if sign > 0 else -1.0 for sign in signs]
        assert kind == classify_split(ends, weights).kind


def test_coupling_leaves_strict_saddles_only():
    kinds = regions(plateau_figure(0.4, 1.6, coupling_norm=0.3), 1)
    assert kinds["+ + +"] == "coupling"
    assert set(kinds.values()) == {"coupling", "strict_saddle"}
    assert set(regions(plateau_figure(0.4, 1.6, coupling_norm=1e-9), 1).values()) == {"minimum", "strict_saddle"}


def test_sign_that_is_not_confirmed_decides_nothing():
    assert regions(plateau_figure(0.4, 1.6, interval=(-0.1, 0.9)), 1)["+ + +"] == "inconclusive"
    assert regions(plateau_figure(0.4, 1.6, interval=(0.1, 0.9)), 1)["+ + +"] == "minimum"


def test_band_holds_the_lowest_curvature_with_coupling():
    generator = torch.Generator().manual_seed(0)
    S, G = torch.randn(5, 5, generator=generator).double(), torch.randn(3, 5, generator=generator).double()
    S, g = S + S.T, float(torch.linalg.matrix_norm(G, 2))
    ends = torch.linalg.eigvalsh(S)[[0, -1]].tolist()
    band = next(
        b for b in plateau_figure(*ends, coupling_norm=g).axes[0].collections if "coupling" in str(b.get_label())
    )
    edges = torch.tensor(band.get_paths()[0].vertices)
    for t in (-0.7, 0.0, 0.2, 0.5, 1.4):
        square = t**2 + (1 - t) ** 2
        corner, mixed = t * (1 - t) / square * S, G / (2 * square) ** 0.5
        matrix = torch.cat([torch.cat([corner, mixed.T], 1), torch.cat([mixed, torch.zeros(3, 3)], 1)])
        lowest = float(torch.linalg.eigvalsh(matrix)[0])
        near = edges[(edges[:, 0] - t).abs() < 1e-6, 1]
        assert float(near.min()) - 1e-9 <= lowest <= float(near.max()) + 1e-9


@pytest.mark.parametrize("coefficients", [(0.5, 0.5), (3.0, -2.0), (1.0, 1.0, -1.0)])
def test_chosen_coefficients_are_marked_within_the_picture(coefficients):
    axes = plateau_figure(-1.0, 1.0, coefficients=coefficients).axes[len(coefficients) - 2]
    (mark,) = (line for line in axes.lines if str(line.get_label()).startswith("chosen"))
    assert mark.get_xdata()[0] == coefficients[0]
    assert axes.get_xlim()[0] < coefficients[0] < axes.get_xlim()[1]


def test_best_plateau_shows_the_neuron_that_moves_first_else_the_lowest_escape():
    event = grown_event()
    assert "layer net.0, neuron 5:" in best_plateau(event, "net.0").get_suptitle()
    lowest = int(event.geometry["net.2"].escape_eigenvalue.argmin())
    assert f"layer net.2, neuron {lowest}:" in best_plateau(event, "net.2").get_suptitle()


def test_spectrum_is_sorted_and_filled_where_confirmed():
    measured = geometry()
    lines = [line for line in spectrum_figure(measured).axes[0].lines if len(line.get_xdata()) == NEURONS]
    heights = torch.tensor(lines[0].get_ydata())
    assert torch.equal(heights, measured.min_eigenvalue.double().sort().values)
    filled = torch.tensor(lines[1].get_ydata()).isfinite()
    same_sign = (measured.interval[:, 0] > 0) | (measured.interval[:, 1] < 0)
    assert int(filled.sum()) == int(same_sign.sum())


@pytest.mark.parametrize(
    "plan",
    [
        GrowthPlan((), (), "nothing to do"),
        GrowthPlan((), (), "none pays", line_search=tuple((2.0**p, -(4.0**p)) for p in range(-9, 2))),
        GrowthPlan((), (), "all overflow", line_search=((0.5, float("nan")), (1.0, float("-inf")))),
        GrowthPlan((), (), "reversed", -0.5, 0.1, 0.08, 0.07, ((-0.5, 0.08), (0.5, 0.05), (1.0, float("-inf")))),
    ],
    ids=lambda plan: plan.reason,
)
def test_any_line_search_can_be_drawn(plan, tmp_path):
    figure = line_search_figure(plan)
    figure.savefig(tmp_path / "search.png")
    labels = {str(line.get_label()) for line in figure.axes[0].lines}
    assert ("second order" in labels) == bool(plan.offset)


def test_second_order_passes_through_the_prediction_of_the_splits():
    plan = grown_event().plan
    split, _ = plan.moves
    curve = next(line for line in line_search_figure(plan).axes[0].lines if line.get_label() == "second order")
    x, y = torch.tensor(curve.get_xdata()), torch.tensor(curve.get_ydata())
    torch.testing.assert_close(y, split.predicted_decrease * (x / plan.offset) ** 2)


def test_the_steps_of_sprouts_are_drawn_on_top_of_the_splits():
    tried = tuple((2.0**p, 0.004 + 0.002 * 2.0**p * (2 - 2.0**p)) for p in range(-4, 2))
    event = grown_event()
    plan = replace(event.plan, step=0.5, step_search=tried, line_search=((0.5, 0.004),), fitted_decrease=0.0055)
    axes = step_search_figure(plan).axes[0]
    curve = next(line for line in axes.lines if line.get_label() == "quadratic model")
    x, y = torch.tensor(curve.get_xdata()), torch.tensor(curve.get_ydata())
    top = 0.002 / (0.5 * 1.5)  # the sprout predicts 0.002 at half of the step
    torch.testing.assert_close(y, 0.004 + top * x * (2 - x))
    marks = {str(line.get_label()): float(line.get_ydata()[0]) for line in line_search_figure(plan).axes[0].lines}
    assert marks["chosen, fitted half"] == 0.004  # of the splits alone
    assert "chosen, held-out half" not in marks
    step_search_figure(GrowthPlan((), (), "none", step_search=((1.0, -1.0), (2.0, float("nan"))))).savefig(io.BytesIO())


def test_predicted_and_realised_are_drawn_and_counted():
    outcomes = [
        Outcome("a", "split", 0.01, 0.009, certified=True),
        Outcome("a", "split", 0.02, 0.005),
        Outcome("b", "sprout", 0.03, 0.04),
        Outcome("b", "sprout", 0.03, -0.001),
        Outcome("b", "sprout", 0.0, 0.1),
    ]
    axes = calibration_figure(outcomes).axes[0]
    assert axes.get_title() == "4 moves: 75% decrease the loss, 50% within a factor of two"
    found = {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert found["split, certified"] == ([0.01], [0.009])
    assert found["sprout"] == ([0.03], [0.04])
    assert "sprout: no decrease" in found
    calibration_figure([]).savefig(io.BytesIO())


def test_outcomes_are_logged_and_gathered_over_the_run():
    drawn = []
    writer = type("Writer", (), {"add_figure": lambda self, tag, figure, step: drawn.append((tag, figure))})()
    sink = TensorBoardSink(writer)
    for _ in range(3):
        sink(grown_event())
    titles = [figure.axes[0].get_title() for tag, figure in drawn if tag.endswith("calibration")]
    assert [title.split(":")[0] for title in titles] == ["2 moves", "4 moves", "6 moves"]
    scalars = event_scalars(grown_event())
    assert scalars["splitwatch/calibration/realised_over_predicted"] == pytest.approx((0.8 + 0.25) / 2)
    assert scalars["splitwatch/calibration/within_factor_two"] == 0.5
    assert scalars["splitwatch/calibration/decreasing"] == 1.0
    assert "| split in net.0 | 0.01 | 0.008 | yes |" in event_markdown(grown_event())


def test_silent_moves_are_in_no_share_of_the_calibration():
    event = grown_event()
    silent = [Outcome("net.2", "sprout", 0.0, realised, moves=3) for realised in (0.0, -1e-17)]
    shares = {name for name in event_scalars(event) if "calibration" in name}
    more = event_scalars(replace(event, outcomes=(*event.outcomes, *silent)))
    assert {name: more[name] for name in shares} == {name: event_scalars(event)[name] for name in shares}
    alone = event_scalars(replace(event, outcomes=tuple(silent)))
    assert not any("calibration" in name for name in alone)


def test_infinite_intervals_are_drawn_without_a_band(tmp_path):
    endless = geometry().interval * torch.tensor([-torch.inf, torch.inf]).abs()
    figure = plateau_figure(-1.0, 1.0, interval=(-torch.inf, torch.inf), max_interval=(torch.nan, torch.nan))
    figure.savefig(tmp_path / "plateau.png")
    assert set(regions(figure, 1).values()) == {"inconclusive"}
    spectrum_figure(replace(geometry(), interval=endless)).savefig(tmp_path / "spectrum.png")
