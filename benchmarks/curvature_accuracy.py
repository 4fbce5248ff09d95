"""Measured curvatures of float32 networks against dense inner Hessians of float64 copies on the same data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from curvature_clock import Row
from curvature_nets import Case, transformer
from torch import Tensor, nn
from tqdm import tqdm

from splitwatch import Probe, find_hidden_layers, measure_geometry
from splitwatch.geometry.dense import inner_hessian
from splitwatch.records import HiddenLayer, LayerGeometry

TOLERANCE = 1e-3
SCALES = (1e-12, 1e-6, 1.0, 1e6)
ENOUGH = 0.999


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "sin": Sine,
}


class OneSided(Case):
    """All labels are one, so that every output gradient has the same sign, and convex neurons definite S."""

    def loss_fn(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.softplus(-model(batch[0])).mean()


def mlp(activation: type[nn.Module]) -> Case:
    model = nn.Sequential(nn.Linear(40, 32), activation(), nn.Linear(32, 24), activation(), nn.Linear(24, 5))
    return Case(model, (torch.randn(192, 40), torch.randint(5, (192,))))


def one_sided(activation: type[nn.Module]) -> Case:
    model = nn.Sequential(nn.Linear(30, 32), activation(), nn.Linear(32, 1))
    return OneSided(model, (torch.randn(192, 30), torch.ones(192)))


def conv(activation: type[nn.Module]) -> Case:
    modules = [nn.Conv2d(4, 12, 3, padding=1), nn.BatchNorm2d(12), activation()]
    modules += [nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), activation(), nn.AvgPool2d(4)]
    model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(48, 5))
    return Case(model, (torch.randn(24, 4, 8, 8), torch.randint(5, (24,))))


def tokens(activation: type[nn.Module]) -> Case:
    return transformer(32, 64, 1, 12, 16, activation)


NETS: dict[str, Callable[[type[nn.Module]], Case]] = {
    "MLP": mlp,
    "MLP, one-sided loss": one_sided,
    "conv": conv,
    "transformer": tokens,
}


@dataclass
class Tally:
    """Neurons measured, and what was wrong with them."""

    neurons: int = 0
    close: list[int] = field(default_factory=lambda: [0, 0])
    called: int = 0
    wrongly: int = 0
    definite: int = 0

    def add(self, found: LayerGeometry, fitted: Tensor, held_out: Tensor) -> None:
        """Compare with float64 eigenvalues (m, d) on both halves, ascending."""
        lowest, size = fitted[:, 0], fitted.abs().amax(dim=1)
        for end, value in enumerate((found.min_eigenvalue, found.max_eigenvalue)):
            self.close[end] += int(((value - fitted[:, -end]).abs() <= TOLERANCE * size).sum())
        solved = found.min_eigenvalue + found.residual[:, 0] < -rounding(fitted) * size
        wrong = (solved & (lowest >= 0)) | (found.negative & (held_out[:, 0] >= 0))
        self.neurons += len(lowest)
        self.called += int((solved | found.negative).sum())
        self.wrongly += int(wrong.sum())
        self.definite += int((lowest >= 0).sum())


def rounding(spectrum: Tensor) -> float:
    """Relative to ‖S‖: below this float32 does not tell a sign."""
    return 10 * torch.finfo(torch.float32).eps * spectrum.shape[1] ** 0.5


def accuracy(quick: bool) -> list[Row]:
    found = {name: Tally() for name in NETS}
    for case, tally, scale in tqdm(list(_plan(found, quick)), desc="float32 against float64"):
        _compare(case(), tally, scale)
    total = sum(tally.neurons for tally in found.values())
    rows = []
    for name, tally in found.items():
        shares = [count / tally.neurons for count in tally.close]
        what = f"{name}: |error| ≤ {TOLERANCE:g}·‖S‖ at the lower, upper end"
        rows.append(Row(what, f"{shares[0]:.2%}, {shares[1]:.2%} of {tally.neurons} neurons"))
    ends = [sum(tally.close[end] for tally in found.values()) / total for end in (0, 1)]
    wrongly, called, definite = (
        sum(getattr(t, key) for t in found.values()) for key in ("wrongly", "called", "definite")
    )
    return [
        *rows,
        Row(
            "all networks: the same",
            f"{ends[0]:.2%}, {ends[1]:.2%} of {total} neurons",
            f"≥ {ENOUGH:.1%}",
            min(ends) >= ENOUGH,
        ),
        Row(
            f"called negative without being it ({definite} of {total} have no negative eigenvalue)",
            f"{wrongly} of {called} called",
            "0",
            wrongly == 0,
        ),
    ]


def _plan(found: dict[str, Tally], quick: bool) -> Iterator[tuple[Callable[[], Case], Tally, float]]:
    """Networks of every kind with every activation, at every scale (one each in a quick run), trained or not."""
    for i, (name, build) in enumerate(NETS.items()):
        for j, activation in enumerate(ACTIVATIONS.values()):
            for k, scale in enumerate(SCALES):
                if quick and (i + j) % len(SCALES) != k:
                    continue
                seed, steps = 100 * i + 10 * j + k, 40 * ((i + j + k // 2) % 2)
                yield lambda b=build, a=activation, s=seed, n=steps: _made(b, a, s, n), found[name], scale


def _made(build: Callable[[type[nn.Module]], Case], activation: type[nn.Module], seed: int, steps: int) -> Case:
    torch.manual_seed(seed)
    return build(activation).trained(steps)


def _compare(case: Case, tally: Tally, scale: float) -> None:
    """Measure every layer with a loss scaled such that its largest curvature is ``scale``."""
    model = copy.deepcopy(case.model).double()
    exact = Probe([tuple(_double(x) for x in case.batch)], case.loss_fn)
    layers = [layer for layer in find_hidden_layers(case.model, Probe([case.batch], case.loss_fn)) if layer.growable]
    for layer in layers:
        fitted, held_out = (_spectrum(model, layer, exact, half) for half in ("fitted", "held_out"))
        factor = scale / float(fitted.abs().max())
        probe = Probe([case.batch], lambda model, batch, factor=factor: factor * case.loss_fn(model, batch))
        found = measure_geometry(case.model, probe, [layer], tolerance=TOLERANCE)[layer.name]
        tally.add(found, factor * fitted, factor * held_out)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _spectrum(model: nn.Module, layer: HiddenLayer, probe: Probe, half: str) -> Tensor:
    """All eigenvalues of every neuron's S on a half, (m, d)."""
    return torch.linalg.eigvalsh(inner_hessian(model, layer, probe, half=half))
