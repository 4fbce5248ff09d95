"""The verdicts of ``classify_split`` against the dense Hessian of the whole wide network, at real stationary points.

A case is a stationary point of a tiny float64 network (gradient ≤ 1e-10), one of its neurons, and coefficients λ. The
inner Hessian S and coupling G that splitwatch measures predict inertia(H_wide) − inertia(H_narrow) and the kind; the
wide network is built by ``critical_embedding`` and its Hessian taken by autograd over all its parameters.

Points are *trained* (L-BFGS for a random number of steps, then Levenberg-Marquardt on the gradient, which finds saddles
as well) or *designed*: gradient, S and G are linear in the output residual, so targets are chosen that make the
gradient vanish and prescribe S and G. Where float64 cannot tell an eigenvalue from zero, the case is looked at again at
150 digits (``plateau_looks``) and counts as settled, or as undecided if that does not tell either.

    python benchmarks/plateau_oracle.py --cases 3000 --seed 0
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, product

import numpy as np
import torch
from plateau_looks import ZERO, FirstLook, Inertia, Neuron, SecondLook, descends
from plateau_points import ACTIVATIONS, CLASSES, FAMILIES, STATIONARY, Landscape, designed, trained
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from splitwatch import classify_split


@dataclass
class Case:
    family: str
    activation: str
    narrow: str
    spectrum: str  # of S where the coupling is zero, otherwise "coupled"
    coefficients: tuple[float, ...]
    kind: str
    grey: str = ""
    wrong: str = ""
    settled: bool = False  # only the second look decided it
    descended: bool | None = None  # whether a search found lower losses nearby, if one was made


def patterns(rng: np.random.Generator, rounds: int) -> Iterator[tuple[float, ...]]:
    """Coefficients of two to five copies: all positive; one positive; two positive and a negative; with zeros."""
    shapes = {"all +": [1, 1], "one +": [1, -1], "mixed": [1, 1, -1], "zeros": [0, 1]}
    more = {"all +": [1], "one +": [-1], "mixed": [-1, 1], "zeros": [-1, 0, 1]}
    for shape in list(shapes) * rounds:
        while True:
            k = int(rng.integers(len(shapes[shape]), 6))
            signs = rng.permutation([*shapes[shape], *rng.choice(more[shape], k - len(shapes[shape]))])
            raw = signs * rng.uniform(0.3, 2.0, k)
            first = int(np.argmax(signs == 1))
            raw[first] += 1 - raw.sum()
            if 0.05 < raw[first] < 6:
                yield tuple(raw.tolist())
                break


def narrow_kind(land: Landscape, found: Inertia) -> str:
    last = land.model[-1]
    symmetries = last.in_features + (last.bias is not None) if land.classes else 0  # all logits up by the same
    if found[1] or found[2] > symmetries:
        return "strict_saddle" if found[1] else "degenerate"
    return "minimum" if found[2] else "nondegenerate_minimum"


def name(rank: int, up: int, down: int, flat: int) -> str:
    if rank or (up and down):
        return "coupled" if rank else "indefinite"
    return "zero" if not up + down else "semidefinite" if flat else "positive" if up else "negative"


def examine(land: Landscape, rng: np.random.Generator) -> Iterator[Case]:
    """All cases of one stationary point: its neurons times some coefficients."""
    first, again = FirstLook(land), cache(lambda: closer(land))
    for number, neuron in enumerate(first.neurons()):
        chosen = land.design is not None and land.design.place == (neuron.layer.name, neuron.r)
        off = chosen and float(np.abs(neuron.S.numpy() - land.design.inner).max()) > 1e-10 * max(first.scale, 1.0)
        for coefficients in patterns(rng, 4 if chosen else 1):
            case = judge(first, neuron, coefficients)
            case.wrong = "S is not as prescribed" if off else case.wrong
            if case.grey and not case.wrong:
                second, neurons = again()
                case = settle(second, neurons[number], coefficients, case) if second else case
            elif case.kind in ("minimum", "saddle") and rng.random() < 0.2 and first.visible(neuron):
                search(case, first.embedded(neuron, coefficients), rng)
            yield case


def closer(land: Landscape) -> tuple[SecondLook | None, list[Neuron]]:
    look = SecondLook.at(land)
    return look, list(look.neurons()) if look else []


def judge(look: FirstLook, neuron: Neuron, coefficients: tuple[float, ...]) -> Case:
    """Hold what splitwatch predicts of a split against the dense Hessian of the wide network."""
    land, (found, grey) = look.land, look.narrow
    narrow = narrow_kind(land, found)
    # Two-class softmax sees one combination of its logits.
    binary = land.classes and land.Y.shape[1] == 2 and neuron.layer.name == str(len(land.model) - 3)
    options = {"coupling_rank": neuron.rank, "narrow": narrow, "tolerance": ZERO * look.scale}
    predicted = classify_split(neuron.eigenvalues, coefficients, outputs=len(neuron.G), **options)
    kind = (
        classify_split(neuron.eigenvalues, coefficients, **options).kind
        if binary and neuron.rank < 2
        else predicted.kind
    )
    activation = type(land.model[1]).__name__
    case = Case(land.origin, activation, narrow, name(neuron.rank, *neuron.signs), coefficients, kind)
    wide, blurred, stationary = look.wide(neuron, coefficients)
    expected = tuple(a + b for a, b in zip(found, predicted.inertia, strict=True))
    case.grey = grey or neuron.grey or blurred
    if case.grey:
        return case
    if not stationary:
        case.wrong = "the wide point is not stationary"
    elif wide != expected:
        case.wrong = f"inertia {wide}, predicted {expected}"
    elif (case.kind == "strict_saddle") != (wide[1] > 0):
        case.wrong = f"{wide[1]} negative eigenvalues"
    return case


def settle(look: SecondLook, neuron: Neuron, coefficients: tuple[float, ...], case: Case) -> Case:
    """The case decided at 150 digits, or as it was where float64 cannot tell whether a measured number is zero."""
    grey, wrong = look.check(neuron)
    if grey or wrong:
        return replace(case, grey=grey, wrong=wrong)
    case = judge(look, neuron, coefficients)
    return replace(case, settled=not case.grey)


def search(case: Case, wide: Landscape, rng: np.random.Generator) -> None:
    """Look for lower losses next to a predicted minimum or saddle."""
    case.descended = descends(wide, (0.05, 0.01, 0.002) if case.kind == "minimum" else (0.3,), rng)
    case.wrong = "lower losses next to it" if case.descended and case.kind == "minimum" else case.wrong


@threadpool_limits.wrap(limits=1)  # threads of BLAS only wait for each other here
def run(wanted: int, seed: int) -> tuple[list[Case], Counter[str]]:
    """At least ``wanted`` cases, and the numbers of stationary points found and of attempts that failed."""
    rng, cases, points = np.random.default_rng(seed), [], Counter()
    turns = cycle([*product((trained, designed), FAMILIES), (designed, "scalar"), (designed, "2 classes")])
    bar = tqdm(total=wanted, unit="case")
    while len(cases) < wanted:
        make, family = next(turns)
        land = None
        while land is None or float(land.gradient(land.point).norm()) > STATIONARY:
            points["attempts"] += 1
            land = make(rng, family, str(rng.choice(list(ACTIVATIONS))))
        land.origin = f"{make.__name__}, {family}"
        cases += examine(land, rng)
        points["found"] += 1
        bar.update(len(cases) - bar.n)
    bar.close()
    return cases, points


def table(cases: list[Case]) -> Table:
    columns = (*CLASSES, "coupled")
    heads = ("", "cases", *columns, "150 digits", "disagree", "undecided")
    result = Table(*heads, title="Plateau oracle, by inner Hessian")
    for column in result.columns[1:]:
        column.justify = "right"
    keys = (lambda c: c.family, lambda c: c.activation, lambda c: f"{len(c.coefficients)} copies")
    for key in (*keys, lambda c: f"narrow: {c.narrow}", lambda c: f"predicted: {c.kind}", lambda c: "all"):
        for label in sorted(set(map(key, cases))):
            rows = [c for c in cases if key(c) == label]
            numbers = [sum(c.spectrum == column for c in rows) for column in columns]
            outcomes = [sum(bool(getattr(c, outcome)) for c in rows) for outcome in ("settled", "wrong", "grey")]
            result.add_row(label, *map(str, [len(rows), *numbers, *outcomes]))
        result.add_section()
    return result


def main(argv: list[str] | None = None) -> list[Case]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    start, console = time.perf_counter(), Console(width=142, highlight=False)
    cases, points = run(arguments.cases, arguments.seed)
    console.print(table(cases))
    for kind in ("minimum", "saddle"):
        tried = [c.descended for c in cases if c.kind == kind and c.descended is not None]
        console.print(f"predicted {kind}: searches found lower losses next to {sum(tried)} of {len(tried)}")
    console.print(f"settled with 150 digits: {sum(c.settled for c in cases)}")
    console.print(f"undecided, by what has a grey eigenvalue: {dict(Counter(c.grey for c in cases if c.grey))}")
    console.print(f"{points['found']} stationary points from {points['attempts']} attempts, seed {arguments.seed}")
    console.print(f"torch {torch.__version__}, one thread, {time.perf_counter() - start:.0f} s")
    wrong = [case for case in cases if case.wrong]
    for case in wrong:
        console.print(f"DISAGREES: {case}")
    console.print(f"{len(wrong)} disagreements in {len(cases)} cases")
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
