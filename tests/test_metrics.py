"""The metrics: textbook formulas in numpy on ragged batches, merged or not."""

import math

import numpy as np
import pytest
import torch
import torchmetrics
from scipy import stats

from splitwatch import GradientNoise, HeldOutQuotient, ProbeLoss, SplitWatchError

SIZES = [4, 36, 10, 1, 4, 16, 16, 8]
EXACT = {"rtol": 1e-12, "atol": 0.0}


def batch_gradients(sizes=SIZES, p=7, seed=0, offset=0.3):
    generator = torch.Generator().manual_seed(seed)
    return [offset + torch.randn(p, generator=generator, dtype=torch.float64) / n**0.5 for n in sizes]


def noise_of(gradients, sizes=SIZES, **settings):
    metric = GradientNoise(**settings)
    for gradient, size in zip(gradients, sizes, strict=True):
        metric.update(gradient, size)
    return metric


def pairwise_statistics(gradients, sizes):
    """The U-statistic by a double loop over pairs, its jackknife by leaving out one gradient after the other."""
    g, n = torch.stack(gradients).numpy(), np.array(sizes, dtype=float)

    def u_statistic(chosen):
        pairs = [(i, j) for i in chosen for j in chosen if i != j]
        return sum(n[i] * n[j] * (g[i] @ g[j]) for i, j in pairs) / sum(n[i] * n[j] for i, j in pairs)

    everyone = range(len(n))
    square = u_statistic(everyone)
    left = np.array([u_statistic([i for i in everyone if i != out]) for out in everyone])
    error = math.sqrt((len(n) - 1) / len(n) * ((left - left.mean()) ** 2).sum())
    mean = (n[:, None] * g).sum(0) / n.sum()
    variance = (n * ((g - mean) ** 2).sum(1)).sum() / (len(n) - 1)
    norms = (square, square + 1.645 * error, square - 1.645 * error)
    upper = max(square, 0.0) + 1.645 * error
    return [math.sqrt(max(norms[0], 0.0)), math.sqrt(upper), math.sqrt(max(norms[2], 0.0)), variance]


@pytest.mark.parametrize("offset", [0.0, 0.3, 5.0])
def test_gradient_noise_is_the_u_statistic_and_its_jackknife(offset):
    gradients = batch_gradients(offset=offset)
    found = [float(value) for value in noise_of(gradients).compute().values()]
    assert found == pytest.approx(pairwise_statistics(gradients, SIZES), rel=1e-10)


def test_more_batches_than_groups_leave_the_estimates_and_bound_the_memory():
    sizes = SIZES * 5
    gradients = batch_gradients(sizes)
    few, all_kept = noise_of(gradients, sizes, groups=8), noise_of(gradients, sizes, groups=100)
    assert len(few.sums) == 8
    for name in ("gradient_norm", "gradient_variance"):
        torch.testing.assert_close(few.compute()[name], all_kept.compute()[name], rtol=1e-10, atol=0)
    kept = [sum(n * g for n, g in list(zip(sizes, gradients, strict=True))[i::8]) for i in range(8)]
    torch.testing.assert_close(torch.cat(few.sums), torch.stack(kept))
    # The jackknife over groups by its definition.
    total, n = sum(kept), np.array(sizes)
    squares = sum(m**2 * float(g @ g) for m, g in zip(sizes, gradients, strict=True))
    left = []
    for i, group in enumerate(kept):
        inside = list(zip(sizes, gradients, strict=True))[i::8]
        rest, mass = total - group, n.sum() - sum(m for m, _ in inside)
        diagonal = squares - sum(m**2 * float(g @ g) for m, g in inside)
        left.append((float(rest @ rest) - diagonal) / (mass**2 - (n**2).sum() + sum(m**2 for m, _ in inside)))
    error = math.sqrt(7 * np.var(left))
    bound = float(few.compute()["gradient_norm"]) ** 2 + 1.645 * error
    assert float(few.compute()["gradient_bound"]) ** 2 == pytest.approx(bound, rel=1e-10)


def test_grouped_bounds_cover_as_often_as_they_say():
    generator, mean = torch.Generator().manual_seed(3), torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    sizes, covered = [4, 36, 10, 10, 4, 16] * 8, 0
    for _ in range(300):
        noise = torch.randn(len(sizes), 3, generator=generator, dtype=torch.float64)
        gradients = [mean + row / n**0.5 for row, n in zip(noise, sizes, strict=True)]
        covered += float(noise_of(gradients, sizes).compute()["gradient_bound"]) >= float(mean.norm())
    assert covered / 300 > 0.88


def test_equal_gradients_have_no_noise_to_rounding():
    for seed in range(50):
        gradient = torch.randn(7, generator=torch.Generator().manual_seed(seed))
        found = noise_of([gradient] * 9, [16] * 9).compute()
        assert 0 <= found["gradient_variance"] <= 1e-5 * gradient.square().sum()


def test_two_batches_have_no_bounds():
    found = noise_of(batch_gradients()[:2], SIZES[:2]).compute()
    assert found["gradient_bound"] == math.inf
    assert found["gradient_floor"] == 0
    assert found["gradient_norm"].isfinite()


def test_probe_loss_weighs_samples():
    losses = torch.rand(8, dtype=torch.float64)
    metric = ProbeLoss()
    for loss, size in zip(losses.float(), SIZES, strict=True):
        metric.update(loss, size)
    assert float(metric.compute()) == pytest.approx(np.average(losses.float().double(), weights=SIZES), rel=1e-14)


def held_out(n=95, m=5, shift=0.0):
    return shift + torch.randn(n, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def quotient_of(batches, **settings):
    metric = HeldOutQuotient(**settings)
    for batch in batches:
        metric.update(batch)
    return metric


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("confidence", [0.8, 0.99])
def test_held_out_bounds_are_the_textbook_ones(confidence, two_sided):
    values = held_out()
    found = quotient_of(values.split(SIZES), confidence=confidence, two_sided=two_sided).compute()
    numbers = values.numpy()
    error = numbers.std(0, ddof=1) / math.sqrt(len(numbers))
    tail = (1 - confidence) / (2 if two_sided else 1)
    np.testing.assert_allclose(found["mean"], numbers.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["lower"], numbers.mean(0) - stats.norm.ppf(1 - tail) * error, rtol=1e-10)
    np.testing.assert_allclose(found["upper"], numbers.mean(0) + stats.norm.ppf(1 - tail) * error, rtol=1e-10)


def test_held_out_bounds_do_not_cancel_far_from_zero():
    near, far = (quotient_of(held_out(shift=shift).split(SIZES)).compute() for shift in (0.0, 2.0**30))
    widths = [found["upper"] - found["lower"] for found in (near, far)]
    torch.testing.assert_close(widths[0], widths[1], rtol=1e-5, atol=0)


def test_a_single_sample_bounds_nothing():
    values = held_out()
    single = quotient_of([values[:1]]).compute()
    assert single["upper"].eq(math.inf).all()


def every_metric(half=slice(None)):
    """Each metric after the batches of a half."""
    gradients, values = batch_gradients()[half], held_out().split(SIZES)[half]
    loss = ProbeLoss()
    for gradient, size in zip(gradients, SIZES[half], strict=True):
        loss.update(gradient[0], size)
    return {"noise": noise_of(gradients, SIZES[half]), "loss": loss, "quotient": quotient_of(values)}


def test_merged_states_are_the_union():
    one, two, union = every_metric(slice(0, 3)), every_metric(slice(3, 8)), every_metric()
    more = {"noise": (torch.ones(7), 1), "loss": (1.0, 1), "quotient": (torch.ones(1, 5),)}
    for name, metric in one.items():
        metric.merge_state(two[name])
        torch.testing.assert_close(metric.compute(), union[name].compute(), **EXACT)
        metric.update(*more[name])
        torch.testing.assert_close(two[name].compute(), every_metric(slice(3, 8))[name].compute(), **EXACT)


def test_they_work_in_a_collection_and_start_afresh_after_reset():
    collection = torchmetrics.MetricCollection(every_metric())
    found = collection.compute()
    assert {"gradient_norm", "gradient_variance", "loss", "mean", "lower"} <= set(found)
    collection.reset()
    for gradient, size, values in zip(batch_gradients(), SIZES, held_out().split(SIZES), strict=True):
        collection["noise"].update(gradient, size)
        collection["loss"].update(gradient[0], size)
        collection["quotient"].update(values)
    torch.testing.assert_close(collection.compute(), found, **EXACT)


def test_forward_keeps_no_more_than_update():
    metric = GradientNoise(groups=3)
    for gradient, size in zip(batch_gradients(), SIZES, strict=True):
        metric(gradient, size)
    assert len(metric.sums) == 3
    torch.testing.assert_close(metric.compute(), noise_of(batch_gradients(), groups=3).compute(), **EXACT)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize(
    ("match", "action"),
    [
        ("groups", lambda: GradientNoise(groups=2)),
        ("gradient", lambda: GradientNoise().update(torch.ones(2, 2), 3)),
        ("size", lambda: GradientNoise().update(torch.ones(2), 0)),
        ("gradient", lambda: GradientNoise().compute()),
        ("confidence", lambda: HeldOutQuotient(confidence=95)),
        ("values", lambda: HeldOutQuotient().update(torch.ones(2))),
        ("values", lambda: HeldOutQuotient().compute()),
    ],
)
def test_what_makes_no_sense_is_named(match, action):
    with pytest.raises(SplitWatchError, match=match):
        action()
