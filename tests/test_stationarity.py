"""The detector: trends with known answers, gradient statistics against simulation and closed forms."""

import math

import pytest
import torch
from torch import nn

from splitwatch import GradientNoise, Probe, SplitWatchError, StationarityDetector


def feed(detector, losses):
    verdicts = [v for loss in losses if (v := detector.update(loss)) is not None]
    return verdicts[-1] if verdicts else None


def test_a_falling_loss_is_moving_and_a_flat_one_is_suspected():
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(200, generator=generator)
    falling = feed(StationarityDetector(100), 2 - 0.005 * torch.arange(200) + noise)
    flat = feed(StationarityDetector(100), 1 + noise)
    assert falling is not None and falling.kind == "moving"
    assert falling.trend == pytest.approx(-0.5, abs=4 * falling.trend_error)
    assert flat is not None and flat.kind == "suspected"


def test_without_noise_a_trend_below_the_tolerance_is_suspected():
    slope = lambda per_step: [1.0 - per_step * t for t in range(100)]  # noqa: E731
    assert feed(StationarityDetector(100, tolerance=0.01), slope(5e-5)).kind == "suspected"
    assert feed(StationarityDetector(100, tolerance=0.01), slope(1e-3)).kind == "moving"


def test_verdicts_do_not_depend_on_the_scale_of_the_loss():
    generator = torch.Generator().manual_seed(1)
    losses = (3 - 0.002 * torch.arange(300) + 0.3 * torch.randn(300, generator=generator)).double()
    kinds = [
        [v.kind for loss in losses * scale if (v := detector.update(loss))]
        for scale in (1e-30, 1.0, 1e30)
        for detector in [StationarityDetector(100)]
    ]
    assert kinds[0] == kinds[1] == kinds[2]


def test_a_nan_loss_is_undecided_not_stationary():
    verdict = feed(StationarityDetector(20), [1.0] * 19 + [math.nan])
    assert verdict.kind == "undecided"
    assert "finite" in verdict.reason


def test_a_detector_of_ones_own_judges_the_last_ten_means():
    seen = []
    detector = StationarityDetector(20, suspects=lambda losses: seen.append(losses) or losses[-1] == 9.0)
    verdicts = [verdict for t in range(26) if (verdict := detector.update(t // 2))]
    assert seen == [tuple(float(t) for t in range(start, start + 10)) for start in range(4)]
    assert [verdict.kind for verdict in verdicts] == ["suspected", "moving", "moving", "moving"]
    assert verdicts[0].reason == "your detector sees a standstill"
    assert verdicts[0].trend == 10.0
    assert feed(StationarityDetector(20, suspects=lambda losses: True), [1.0] * 19 + [math.nan]).kind == "undecided"


def test_false_alarms_on_a_clear_trend_are_rare():
    generator = torch.Generator().manual_seed(2)
    runs = 200
    noise = 0.1 * torch.randn(runs, 100, generator=generator)
    losses = 2 - 0.003 * torch.arange(100) + noise
    alarms = sum(feed(StationarityDetector(100), row).kind == "suspected" for row in losses)
    assert alarms <= 0.05 * runs


def test_state_survives_a_round_trip():
    losses = torch.linspace(2, 1, 137).tolist()
    straight, resumed = StationarityDetector(50), StationarityDetector(50)
    feed(straight, losses)
    feed(resumed, losses[:61])
    copy = StationarityDetector(50)
    copy.load_state_dict(resumed.state_dict())
    feed(copy, losses[61:])
    assert copy.means == straight.means
    assert copy.state_dict() == straight.state_dict()


def test_memory_does_not_grow_with_the_run():
    detector = StationarityDetector(10)
    feed(detector, torch.linspace(9, 1, 500).tolist())
    assert len(detector.means) == 10
    assert detector.range == (1.0, 9.0)


def test_one_infinite_loss_is_forgotten():
    """It neither stands for the scale of the loss nor stops the watch once it has left the window."""
    detector = StationarityDetector(10)
    falling = [20 - t for t in range(12)]
    assert feed(detector, [math.inf, *[30.0] * 10, *falling]).kind == "moving"


def test_a_window_too_short_is_refused():
    with pytest.raises(SplitWatchError, match="window"):
        StationarityDetector(5)


def test_gradient_statistics_are_unbiased_for_ragged_batches():
    generator = torch.Generator().manual_seed(3)
    mean, sizes = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), [4, 36, 10, 10, 4, 16, 16, 8]
    squares, variances, covered = [], [], 0
    for _ in range(2000):
        gradients = [mean + torch.randn(3, generator=generator, dtype=torch.float64) / n**0.5 for n in sizes]
        metric = GradientNoise()
        for gradient, size in zip(gradients, sizes, strict=True):
            metric.update(gradient, size)
        norm, bound, _, variance = map(float, metric.compute().values())
        squares.append(norm**2)
        variances.append(variance)
        covered += bound >= float(mean.norm())
    assert sum(variances) / 2000 == pytest.approx(3.0, rel=0.05)  # trace of the unit covariance
    # |E g|² = 0.14; the norm is clipped at zero, which lifts the mean a little.
    assert sum(squares) / 2000 == pytest.approx(0.14, rel=0.15)
    assert covered / 2000 > 0.85


def linear_regression(noise):
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.randn(800, 3, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) + noise * torch.randn(800, 1, dtype=torch.float64)
    probe = Probe(list(zip(x.split(100), y.split(100), strict=True)), lambda m, b: (m(b[0]) - b[1]).square().mean())
    return model, probe, x, y


def test_a_solved_regression_is_stationary_and_an_unsolved_one_is_not():
    model, probe, x, y = linear_regression(noise=0.5)
    detector = StationarityDetector()
    assert detector.test(model, probe, batch_size=32).kind == "moving"
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones_like(y)], 1), y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:3].T)
        model.bias.copy_(solution[3])
    verdict = detector.test(model, probe, batch_size=32)
    assert verdict.kind == "stationary"
    assert verdict.gradient_bound <= verdict.noise


def test_a_probe_that_is_too_small_leaves_it_undecided():
    model, probe, x, y = linear_regression(noise=0.5)
    small = Probe([(x[:6], y[:6])], probe.loss_fn)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    assert StationarityDetector().test(model, small, batch_size=4096).kind != "stationary"
