"""What products and spectra cost against a training step, against other ways to them, and as networks grow."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from curvature_clock import Clock, Row, cpu_seconds
from curvature_nets import Case, convnet, mnist, shallow, transformer
from curvature_solve import TOLERANCE, Layers, both_ends, escape_ends
from scipy.sparse.linalg import LinearOperator, eigsh

from splitwatch.geometry.curvature import LayerCurvature
from splitwatch.trace import LayerTrace

STEPS = "steps"


def mlp(clock: Clock) -> list[Row]:
    """The first layer of 784-512-512-10 on one batch."""
    case = (mnist(128, 32) if clock.quick else mnist(1024)).trained(5 if clock.quick else 60)
    found = Layers(case, ["0"])
    (curvature,) = found.prepared()
    m, d = len(curvature.outgoing), curvature.d
    direction = torch.randn(m, d, generator=torch.Generator().manual_seed(0))
    lowest = both_ends(curvature).min_vector
    seconds = clock.medians(
        {
            "step": case.step,
            "product": lambda: curvature.hessian(direction),
            "ends": lambda: both_ends(curvature),
            "all": found.spectra,
            "escape": lambda: escape_ends(curvature, lowest),
        }
    )
    step, ends = seconds["step"], seconds["ends"]
    where = f"{m} neurons, d = {d}"
    return [
        Row(f"MLP, step: forward and backward, batch {len(case.batch[0])}", f"{step:.3g} s"),
        clock.at_most(f"one product, {where}", seconds["product"] / step, 0.5, STEPS),
        clock.at_most("both ends of S with vectors", ends / step, 8, STEPS),
        Row("the same with capturing and preparing", f"{seconds['all'] / step:.3g} {STEPS}"),
        clock.at_most(
            "both ends of the escape operator, S's lowest vectors known", seconds["escape"] / step, 16, STEPS
        ),
        *alternatives(clock, curvature, ends),
    ]


def alternatives(clock: Clock, curvature: LayerCurvature, ends: float) -> list[Row]:
    """Both ends in other ways, run for a share of the neurons and scaled to all of them."""
    from threadpoolctl import threadpool_limits  # comes with mlxtend

    inputs, bends = closed_form(curvature)
    m, sample = bends.shape[1], 4 if clock.quick else 16
    neurons = torch.linspace(0, m - 1, sample).long().tolist()
    dense = median(cpu_seconds(lambda r=r: dense_ends(inputs, bends[:, r])) for r in neurons) * m
    one, note = {}, f" (timed on {sample} of {m} neurons, median scaled)"
    for dtype in (np.float32, np.float64):
        x, c = inputs.numpy().astype(dtype), bends.numpy().astype(dtype)
        with threadpool_limits(1):
            one[dtype] = median(cpu_seconds(lambda r=r, x=x, c=c: scipy_ends(x, c[:, r])) for r in neurons) * m
    fastest = min(one, key=one.__getitem__)
    part = next(iter(curvature.parts))
    autograd = median(cpu_seconds(lambda r=r: autograd_ends(part.trace, r)) for r in neurons[:2]) * m
    return [
        clock.at_least("faster than dense S and torch.linalg.eigh", dense / ends, 60, "×", note),
        clock.at_least("faster than eigsh on autograd's products", autograd / ends, 200, "×", f" (timed on 2 of {m})"),
        Row(f"faster than eigsh on the closed form, {fastest.__name__}", f"{one[fastest] / ends:.3g} ×{note}"),
    ]


def closed_form(curvature: LayerCurvature) -> tuple[torch.Tensor, torch.Tensor]:
    """X with a column of ones (samples, d) and c (samples, m): S_r = Xᵀ diag(c_r) X."""
    (part,) = curvature.parts
    x = part.trace.producers[0].input
    assert part.response.bends is not None
    (((bends,),),) = (part.response.bends,)
    assert bends is not None
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1), bends


def dense_ends(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigh(x.T @ (c[:, None] * x)).eigenvectors[:, [0, -1]]


def scipy_ends(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    d, rows = x.shape[1], np.ascontiguousarray(x.T)
    operator = LinearOperator((d, d), matvec=lambda u: rows @ (c * (x @ u.ravel())), dtype=x.dtype)
    return eigsh(operator, k=2, which="BE", tol=TOLERANCE)[1]


def autograd_ends(trace: LayerTrace, r: int) -> np.ndarray:
    """Both ends for one neuron as autograd alone gives them: double backward of φ in the neuron's weights."""
    x, (weight,), (bias,), (reader,), (signal,) = (
        trace.producers[0].input,
        trace.weights,
        trace.biases,
        trace.readers,
        trace.signals,
    )
    assert bias is not None
    own = torch.cat([weight[r], bias[r : r + 1]]).requires_grad_()

    def product(u: np.ndarray) -> np.ndarray:
        rows = torch.cat([weight[:r], own[None, :-1], weight[r + 1 :]])
        z = torch.nn.functional.linear(x, rows, torch.cat([bias[:r], own[-1:], bias[r + 1 :]]))
        phi = (signal * trace.path(z)[0].matmul(reader.T)).sum()
        (slope,) = torch.autograd.grad(phi, own, create_graph=True)
        direction = torch.from_numpy(np.ascontiguousarray(u.ravel(), dtype=np.float32))
        return torch.autograd.grad(slope, own, direction)[0].numpy()

    operator = LinearOperator((len(own), len(own)), matvec=product, dtype=np.float32)
    return eigsh(operator, k=2, which="BE", tol=TOLERANCE)[1]


def conv(clock: Clock) -> list[Row]:
    """All layers of a convolutional network."""
    case = (convnet(4) if clock.quick else convnet()).trained(1 if clock.quick else 30)
    found = Layers(case)
    curvatures = found.prepared()
    work: dict[str, Callable[[], object]] = {"step": case.step, "all": found.spectra}
    for i, curvature in enumerate(curvatures):
        direction = torch.randn(len(curvature.outgoing), curvature.d)
        work[f"product, {curvature.layer.width} channels"] = lambda i=i, u=direction: curvatures[i].hessian(u)
    seconds = clock.medians(work)
    step = seconds["step"]
    products = {name: value / step for name, value in seconds.items() if name.startswith("product")}
    return [
        Row(f"conv net, step, batch {len(case.batch[0])}", f"{step:.3g} s"),
        *(clock.at_most(f"one {name}", value, 1, STEPS) for name, value in products.items()),
        clock.at_most("one product of each layer", sum(products.values()), 1, STEPS),
        clock.at_most("both ends of all layers, from capture on", seconds["all"] / step, 25, STEPS),
    ]


def attention(clock: Clock) -> list[Row]:
    """All layers of a transformer."""
    case = transformer(32, 64, 2, 4, 16) if clock.quick else transformer()
    found = Layers(case)
    seconds = clock.medians({"step": case.step, "all": found.spectra})
    tokens, layers = case.batch[0].numel(), len(found.layers)
    return [
        Row(f"transformer, step, {tokens} tokens", f"{seconds['step']:.3g} s"),
        clock.at_most(
            f"both ends of all {layers} layers, from capture on", seconds["all"] / seconds["step"], 15, STEPS
        ),
    ]


def growth(clock: Clock) -> list[Row]:
    """Slopes of cost in width and in samples, on doubly logarithmic axes."""
    widths = (32, 64) if clock.quick else (256, 512, 1024, 2048, 4096)
    samples = (64, 128) if clock.quick else (2048, 4096, 8192, 16384)
    few, usual = (64, 32) if clock.quick else (1024, 512)
    return [
        *_slopes(clock, "width", widths, [shallow(few, width) for width in widths]),
        *_slopes(clock, "samples", samples, [shallow(size, usual) for size in samples]),
    ]


def _slopes(clock: Clock, name: str, sizes: tuple[int, ...], cases: list[Case]) -> list[Row]:
    curvatures = [Layers(case, ["0"]).prepared()[0] for case in cases]
    work: dict[str, Callable[[], object]] = {}
    for size, curvature in zip(sizes, curvatures, strict=True):
        u = torch.randn(len(curvature.outgoing), curvature.d)
        work[f"one product {size}"] = lambda c=curvature, u=u: c.hessian(u)
        work[f"both ends {size}"] = lambda c=curvature: both_ends(c)
    seconds, note = clock.medians(work), f" ({sizes[0]} to {sizes[-1]})"
    rows = []
    for what in ("one product", "both ends"):
        slope = np.polyfit(np.log(sizes), np.log([seconds[f"{what} {size}"] for size in sizes]), 1)[0]
        rows.append(clock.within(f"{what}: slope of cost in {name}", float(slope), 0.9, 1.15, note))
    return rows
