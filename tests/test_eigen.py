import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh

from splitwatch.geometry.eigen import ExtremeEigenpairs, dense_operator, extreme_eigenpairs
from splitwatch.geometry.krylov import Lanczos
from splitwatch.geometry.operators import scaled
from splitwatch.records import SplitWatchError

TOLERANCE = 1e-3
ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}  # of one product at these sizes, relative to ‖A‖
SCALES = [1e-30, 1e-7, 1.0, 1e8]
DTYPES = [torch.float32, torch.float64]


def spectra(n):
    """Named spectra (n,), chosen for what each of them breaks."""
    ramp = torch.linspace(-1, 1, n, dtype=torch.float64)
    one = torch.zeros(n, dtype=torch.float64)
    one[0] = 1.0
    clustered = torch.where(ramp > 0, 1.0, -0.5).double() + 1e-3 * ramp
    return {
        "semicircle": torch.sin(ramp * torch.pi / 2),  # dense at both ends: no gap to converge by
        "clustered": clustered,
        "ramp": ramp,
        "rank one": one,
        "rank one, negative": -one,
        "negative definite": -2 + ramp,
        "few": torch.tensor([1, 0.9, -3, 0.5, 0.1], dtype=torch.float64).repeat(n)[:n],  # multiple eigenvalues
        "one negative among many positive": torch.where(one > 0, -0.02, ramp.abs()),
        "identity": torch.ones(n, dtype=torch.float64),
        "zero": torch.zeros(n, dtype=torch.float64),
    }


def rotated(spectrum, seed=0):
    """A symmetric matrix with this spectrum, float64."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    a = (q * spectrum) @ q.mT
    return (a + a.mT) / 2


def product_of(matrices):
    return lambda vectors: (matrices @ vectors[:, :, None])[:, :, 0]


def solve(matrices, **options):
    m, n, _ = matrices.shape
    return extreme_eigenpairs(product_of(matrices), m, n, dtype=matrices.dtype, device="cpu", **options)


def batch(n, dtype, scale=1.0):
    return torch.stack([rotated(s, seed) * scale for seed, s in enumerate(spectra(n).values())]).to(dtype)


def assert_sound(pairs: ExtremeEigenpairs, matrices, tolerance=TOLERANCE):
    """What holds for every result, converged or not; all in units of ‖A‖ in float64."""
    exact = matrices.double()
    rounding = ROUNDING[matrices.dtype]
    truth = torch.linalg.eigvalsh(exact)
    norm = truth.abs().amax(dim=1)
    unit = torch.where(norm > 0, norm, 1.0)
    low, high = pairs.min_value.double(), pairs.max_value.double()
    assert ((low - truth[:, 0]) / unit >= -rounding).all()
    assert ((truth[:, -1] - high) / unit >= -rounding).all()
    assert ((high - low) / unit >= -rounding).all()
    assert (pairs.scale.double() <= norm * (1 + rounding)).all()
    for end, (value, vector) in enumerate([(low, pairs.min_vector), (high, pairs.max_vector)]):
        u = vector.double()
        assert torch.allclose(u.norm(dim=1), torch.ones(len(u)).double(), rtol=0, atol=rounding)
        recomputed = (product_of(exact / unit[:, None, None])(u) - (value / unit)[:, None] * u).norm(dim=1)
        assert torch.allclose(pairs.residual[:, end].double() / unit, recomputed, rtol=0, atol=rounding)
    small = pairs.residual.double() <= tolerance * pairs.scale.double()[:, None] * (1 + rounding)
    assert (small | ~pairs.converged).all()


def assert_extreme(pairs: ExtremeEigenpairs, matrices, tolerance=TOLERANCE):
    assert_sound(pairs, matrices, tolerance)
    assert pairs.converged.all()
    truth = torch.linalg.eigvalsh(matrices.double())
    bound = (tolerance + ROUNDING[matrices.dtype]) * truth.abs().amax(dim=1)
    assert ((pairs.min_value.double() - truth[:, 0]).abs() <= bound).all()
    assert ((pairs.max_value.double() - truth[:, -1]).abs() <= bound).all()


@pytest.mark.parametrize("n", [5, 24, 25, 90], ids=lambda n: f"n={n}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_every_spectrum_at_every_scale(n, dtype, scale):
    matrices = batch(n, dtype, scale)
    assert_extreme(solve(matrices), matrices)


@pytest.mark.parametrize("n", [10, 60])
def test_an_operator_and_a_power_of_two_of_it_take_the_same_steps(n):
    matrices = batch(n, torch.float32)
    plain, tiny = solve(matrices), solve(matrices * 2.0**-60)
    assert plain.products == tiny.products
    assert torch.equal(plain.min_vector, tiny.min_vector)
    assert torch.equal(plain.max_value * 2.0**-60, tiny.max_value)


@pytest.mark.parametrize("scale", [1e-38, 1e36])
@pytest.mark.parametrize("n", [10, 60])
def test_the_ends_of_float32_give_no_nan(n, scale):
    matrices = batch(n, torch.float32, scale)
    pairs = solve(matrices)
    truth = torch.linalg.eigvalsh(matrices.double())
    assert ((pairs.min_value.double() - truth[:, 0]).abs() <= 1e-2 * scale * 3).all()
    assert ((pairs.max_value.double() - truth[:, -1]).abs() <= 1e-2 * scale * 3).all()


@pytest.mark.parametrize("n", [5, 100])
def test_the_minimum_is_not_mistaken_for_the_maximum_modulus(n):
    spectrum = torch.zeros(n, dtype=torch.float64)
    spectrum[:5] = torch.tensor([1, 0.9, -3, 0.5, 0.1])
    pairs = solve(torch.diag(spectrum)[None], tolerance=1e-6)
    assert pairs.min_value.item() == pytest.approx(-3, rel=1e-9)
    assert pairs.max_value.item() == pytest.approx(1, rel=1e-9)
    assert pairs.scale.item() == pytest.approx(3, rel=1e-9)
    assert pairs.min_vector[0, 2].abs().item() == pytest.approx(1, rel=1e-9)


def test_scipy_agrees_on_a_larger_operator():
    n, samples = 300, 500
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    c = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    pairs = extreme_eigenpairs(
        lambda u: ((x @ u.mT) * c).mT @ x, 2, n, dtype=torch.float64, device="cpu", tolerance=1e-8
    )
    assert pairs.converged.all()
    for row in range(2):
        weights = c[:, row].numpy()
        oracle = LinearOperator(
            (n, n), matvec=lambda u, w=weights: x.numpy().T @ (w * (x.numpy() @ u)), dtype=np.float64
        )
        low, high = np.sort(eigsh(oracle, k=2, which="BE", v0=np.ones(n), return_eigenvectors=False))
        assert pairs.min_value[row].item() == pytest.approx(low, rel=1e-10)
        assert pairs.max_value[row].item() == pytest.approx(high, rel=1e-10)


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_operators_return_zero_and_unit_vectors(n, dtype):
    pairs = solve(torch.zeros(3, n, n, dtype=dtype))
    for zero in (pairs.min_value, pairs.max_value, pairs.residual, pairs.scale):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert pairs.converged.all() and pairs.exhausted.all()
    assert torch.allclose(pairs.min_vector.norm(dim=1), torch.ones(3, dtype=dtype))


def test_rows_that_die_early_do_not_disturb_their_neighbours():
    n = 80
    kinds = spectra(n)
    matrices = torch.stack([rotated(kinds[k], 5) for k in ("zero", "rank one", "ramp", "identity")])
    together = solve(matrices)
    assert_extreme(together, matrices)
    assert together.exhausted.tolist() == [True, True, False, True]
    exact = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(together.max_value[[0, 1, 3]], exact, rtol=1e-12, atol=0)
    assert together.min_value[1].abs() < 1e-12


def test_finished_rows_are_applied_to_zero():
    seen = []
    matrices = torch.stack([torch.zeros(50, 50).double(), rotated(spectra(50)["ramp"])])

    def product(vectors):
        seen.append(vectors.abs().amax(dim=1))
        return product_of(matrices)(vectors)

    pairs = extreme_eigenpairs(product, 2, 50, dtype=torch.float64, device="cpu")
    assert len(seen) == pairs.products
    assert all(row[0] == 0 for row in seen[1:])
    assert all(row[1] > 0 for row in seen)


def test_dimension_one():
    pairs = solve(torch.tensor([[[-2.0]], [[0.0]], [[3.0]]]))
    assert pairs.min_value.tolist() == pairs.max_value.tolist() == [-2.0, 0.0, 3.0]
    assert pairs.scale.tolist() == [2.0, 0.0, 3.0]
    assert pairs.converged.all() and pairs.exhausted.all()


@pytest.mark.parametrize("n", [1, 30])
def test_no_operators(n):
    def never(vectors):
        raise AssertionError

    pairs = extreme_eigenpairs(never, 0, n, dtype=torch.float32, device="cpu")
    assert pairs.min_value.shape == pairs.scale.shape == pairs.exhausted.shape == (0,)
    assert pairs.min_vector.shape == (0, n)
    assert pairs.residual.shape == pairs.converged.shape == (0, 2)
    assert pairs.products == 0


def test_shapes_and_types():
    pairs = solve(batch(30, torch.float32))
    m = len(spectra(30))
    for tensor, shape in [
        (pairs.min_value, (m,)),
        (pairs.max_value, (m,)),
        (pairs.min_vector, (m, 30)),
        (pairs.max_vector, (m, 30)),
        (pairs.residual, (m, 2)),
        (pairs.scale, (m,)),
    ]:
        assert tensor.shape == shape and tensor.dtype == torch.float32
    assert pairs.converged.dtype == pairs.exhausted.dtype == torch.bool


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone():
    matrices = batch(60, torch.float32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = solve(matrices, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = solve(matrices, seed=4)
    assert torch.equal(first.min_vector, second.min_vector) and torch.equal(first.max_value, second.max_value)
    assert not torch.equal(first.min_vector, solve(matrices, seed=5).min_vector)


def test_the_budget_bounds_the_products_and_what_it_misses_is_admitted():
    matrices = rotated(spectra(150)["semicircle"])[None]
    pairs = solve(matrices, tolerance=1e-8, max_products=9)
    assert pairs.products == 9
    assert not pairs.converged.any() and not pairs.exhausted.any()
    assert_sound(pairs, matrices, 1e-8)


def test_a_full_krylov_space_is_exhausted_and_exact():
    matrices = rotated(spectra(40)["semicircle"])[None]
    pairs = solve(matrices, tolerance=0.0)
    assert pairs.products <= 40
    truth = torch.linalg.eigvalsh(matrices[0])
    assert pairs.min_value.item() == pytest.approx(truth[0].item(), rel=1e-12)
    assert pairs.max_value.item() == pytest.approx(truth[-1].item(), rel=1e-12)


def test_autocast_and_gradients_stay_outside():
    matrices = batch(60, torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = solve(matrices)
    assert not pairs.min_vector.requires_grad
    assert_extreme(pairs, matrices.detach())


@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_names_its_rows(n, bad):
    matrices = torch.eye(n).repeat(5, 1, 1)
    matrices[[1, 3]] *= bad
    with pytest.raises(SplitWatchError, match=r"2 of 5 operators \(first rows: \[1, 3\]\)"):
        solve(matrices)


def test_wrong_shapes_and_empty_budgets_are_refused():
    with pytest.raises(SplitWatchError, match=r"shape \(2, 40\), found \(40, 2\)"):
        extreme_eigenpairs(lambda u: u.mT, 2, 40, dtype=torch.float32, device="cpu")
    with pytest.raises(SplitWatchError, match="max_products = 0"):
        solve(torch.eye(4)[None], max_products=0)
    with pytest.raises(SplitWatchError, match="n = 0"):
        solve(torch.zeros(1, 0, 0))


def test_dense_operator_returns_the_matrices_as_they_are():
    matrices = torch.arange(18.0).reshape(2, 3, 3)
    raw = dense_operator(product_of(matrices), 2, 3, dtype=torch.float32, device="cpu")
    assert torch.equal(raw, matrices)


def test_dense_operators_that_are_not_finite_are_named():
    matrices = torch.eye(3).repeat(4, 1, 1)
    matrices[2, 0, 1] = float("nan")
    with pytest.raises(SplitWatchError, match=r"1 of 4 operators \(first rows: \[2\]\)"):
        dense_operator(product_of(matrices), 4, 3, dtype=torch.float32, device="cpu")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    eigenvalues=st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=1, max_size=45),
    exponent=st.integers(-28, 8),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_spectrum_is_sound(eigenvalues, exponent, dtype, seed):
    spectrum = torch.tensor(eigenvalues, dtype=torch.float64)
    largest = spectrum.abs().max()
    spectrum = spectrum / largest if largest > 0 else spectrum
    matrices = (rotated(spectrum, seed) * 10.0**exponent)[None].to(dtype)
    pairs = solve(matrices, seed=seed)
    assert_sound(pairs, matrices)
    assert pairs.converged.all()
    if pairs.exhausted.all():
        assert_extreme(pairs, matrices)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_pairs():
    matrices = batch(60, torch.float32)
    there = matrices.cuda()
    m, n, _ = matrices.shape
    pairs = extreme_eigenpairs(product_of(there), m, n, dtype=torch.float32, device="cuda")
    assert {t.device.type for t in (pairs.min_value, pairs.max_vector, pairs.residual, pairs.converged)} == {"cuda"}
    here = solve(matrices)
    assert torch.allclose(pairs.min_value.cpu(), here.min_value, rtol=0, atol=1e-3 * 3)
    assert torch.allclose(pairs.max_value.cpu(), here.max_value, rtol=0, atol=1e-3 * 3)


def test_groups_within_a_memory_bound_give_the_same_pairs():
    matrices = batch(60, torch.float64)
    whole, groups = solve(matrices), solve(matrices, max_bytes=3 * 60 * 8 * 32)
    for field in ("min_value", "max_value", "residual", "scale"):
        torch.testing.assert_close(getattr(groups, field), getattr(whole, field), rtol=1e-9, atol=1e-9)
    assert torch.equal(groups.exhausted, whole.exhausted)
    assert groups.products > whole.products


def test_a_start_saves_products_and_misses_nothing():
    n = 200
    spectrum = torch.linspace(-0.5, 0.5, n, dtype=torch.float64)
    spectrum[0], spectrum[-1] = -1.0, 1.0
    matrix = rotated(spectrum)
    lowest, other = (torch.linalg.eigh(matrix).eigenvectors[:, i] for i in (0, 100))
    plain, helped, misled = (solve(matrix[None], start=start) for start in (None, lowest, other))
    assert helped.products <= plain.products
    for pairs in (plain, helped, misled):
        assert pairs.min_value.item() == pytest.approx(-1, abs=1e-3)
        assert pairs.max_value.item() == pytest.approx(1, abs=1e-3)


def test_one_end_takes_fewer_products_where_the_other_is_hard():
    n = 150
    spectrum = 1 - torch.linspace(0, 1, n, dtype=torch.float64) ** 3  # crowded at the top
    spectrum[-1] = -1.0
    both, low = (
        solve(rotated(spectrum)[None], tolerance=1e-6),
        solve(rotated(spectrum)[None], tolerance=1e-6, ends="min"),
    )
    assert low.products < both.products
    assert low.converged[0, 0] and low.min_value.item() == pytest.approx(-1, abs=1e-9)


def test_screened_operators_are_not_among_the_lowest_wanted():
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 30, dtype=torch.float64)
    matrices = torch.stack(
        [s * rotated(torch.randn(80, generator=generator).double(), i) for i, s in enumerate(scales)]
    )
    pairs = solve(matrices, ends="min", wanted=4)
    truth = torch.linalg.eigvalsh(matrices)[:, 0]
    lowest = truth.argsort()[:4]
    assert pairs.screened.sum() >= 10 and not pairs.screened[lowest].any()
    assert (pairs.converged[:, 0] | pairs.screened).all()
    assert (pairs.min_value[pairs.screened] > truth[lowest].max()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_stay_orthogonal_to_half_precision(dtype):
    n, steps = 150, 100
    spectrum = torch.linspace(0, 1, n, dtype=torch.float64)
    spectrum[-1] = 5.0  # converges early, after which plain Lanczos would find it again and again
    matrix = rotated(spectrum).to(dtype)[None]
    start = torch.nn.functional.normalize(torch.ones(1, n, dtype=dtype))
    operators = scaled(product_of(matrix), 1, None)
    space = Lanczos(operators, start, steps)
    for _ in range(steps):
        space.step()
    vectors = space.basis[:steps, 0].double()
    overlap = (vectors @ vectors.mT - torch.eye(steps).double()).abs().max()
    assert overlap <= 10 * torch.finfo(dtype).eps ** 0.5
    values = torch.linalg.eigvalsh(torch.diag(space.alpha[0]) + torch.diag(space.beta[0, :-1], -1)) * operators.unit
    assert int((values > 4).sum()) == 1  # no copies
