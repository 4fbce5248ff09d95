"""One product with the Hessian of the whole loss, against libraries that do only that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec

import torch
from curvature_clock import Clock, Row
from curvature_nets import Case, convnet, mnist
from curvature_solve import probe
from torch import Tensor, nn

from splitwatch.geometry.narrow import LossCurvature

Product = Callable[[], Tensor]
AGREEMENT = 1e-4


def splitwatch(case: Case, v: Tensor) -> Product:
    loss = LossCurvature(case.model, probe(case))
    return lambda: loss.product(v[None], "fitted")[0]


def curvlinops(case: Case, v: Tensor) -> Product:
    from curvlinops import HessianLinearOperator

    parameters = list(case.model.parameters())
    operator = HessianLinearOperator(
        case.model, nn.CrossEntropyLoss(), parameters, [case.batch], check_deterministic=False
    )
    return lambda: operator @ v


def pyhessian(case: Case, v: Tensor) -> Product:
    from pyhessian.hessian import hessian
    from pyhessian.utils import hessian_vector_product

    found = hessian(case.model, nn.CrossEntropyLoss(), data=case.batch, cuda=False)
    sizes = [p.numel() for p in found.params]
    parts = [part.view_as(p) for part, p in zip(v.split(sizes), found.params, strict=True)]
    return lambda: torch.cat([x.flatten() for x in hessian_vector_product(found.gradsH, found.params, parts)])


def hessian_eigenthings(case: Case, v: Tensor) -> Product:
    from hessian_eigenthings import HessianOperator

    operator = HessianOperator(case.model, [case.batch], case.loss_fn)
    return lambda: operator.matvec(v)


PEERS = {f.__name__: f for f in (curvlinops, pyhessian, hessian_eigenthings)}


def full_products(clock: Clock) -> list[Row]:
    mlp = mnist(64, 32) if clock.quick else mnist(1024)
    return [*_compared(clock, "MLP", mlp), *_compared(clock, "conv net", convnet(4 if clock.quick else 64))]


def _compared(clock: Clock, name: str, case: Case) -> list[Row]:
    case.model.eval()
    v = torch.randn(sum(p.numel() for p in case.model.parameters()), generator=torch.Generator().manual_seed(0))
    v /= v.norm()
    products, rows = {"splitwatch": splitwatch(copy.deepcopy(case), v)}, []
    for peer, build in PEERS.items():
        product = build(copy.deepcopy(case), v) if find_spec(peer) is not None else None
        reason = "not installed" if product is None else _failure(product)
        if product is None or reason:
            rows.append(Row(f"{name}: {peer}", reason))
        else:
            products[peer] = product
    return [*rows, *_against(clock, name, products)] if len(products) > 1 else rows


def _failure(product: Product) -> str:
    """Why a library's product cannot be had, or nothing."""
    try:
        product()
    except NotImplementedError as error:
        return f"fails: {str(error).splitlines()[0]}"
    return ""


def _against(clock: Clock, name: str, products: dict[str, Product]) -> list[Row]:
    seconds = clock.medians(products, 5)  # the two fastest are a few percent apart
    images = {who: product().detach() for who, product in products.items()}
    own = images.pop("splitwatch")
    deviation = max(float((image - own).norm() / own.norm()) for image in images.values())
    fastest = min(images, key=seconds.__getitem__)
    note = f" ({', '.join(f'{who} {1e3 * took:.4g} ms' for who, took in seconds.items())})"
    what, ratio = f"{name}: full Hessian product against {fastest}", seconds["splitwatch"] / seconds[fastest]
    return [
        clock.at_most(what, ratio, 1, "×", note),
        Row(f"{name}: the libraries agree", f"{deviation:.1e}", f"≤ {AGREEMENT:g}", deviation <= AGREEMENT),
    ]
