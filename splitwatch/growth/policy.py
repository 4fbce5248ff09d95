"""What may grow, how much, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

from splitwatch.geometry.plateau import splitting_modes
from splitwatch.geometry.sweep import MAX_BYTES
from splitwatch.records import SplitWatchError

MOVES = ("mixed", "splits", "sprouts", "certified", "preserve", "even")

_NUMBERS: dict[str, tuple[type, float, bool]] = {
    "max_neurons": (Integral, 0, True),
    "max_parameters": (Real, 0, True),
    "max_flops": (Real, 0, True),
    "max_ratio": (Real, 0, True),
    "max_events": (Integral, 0, True),
    "tolerance": (Real, 0, False),
    "noise_ratio": (Real, 0, False),
    "max_overhead": (Real, 0, True),
    "window": (Integral, 10, False),
    "probe_samples": (Integral, 2, False),
    "max_bytes": (Real, 1, False),
    "control": (Integral, 1, True),
    "rewarm": (Integral, 1, True),
}
"""Of every field that is a number: of what kind, at least how large, and whether it may be None."""

Chooser = Callable[..., Any]
"""``chooser(model, geometry, probe, policy, layers)`` returns moves, in the order in which budgets are to take them."""

Detector = Callable[..., bool]
"""``detector(losses)`` says of ten mean losses, each of a tenth of a window, whether they look like a standstill."""


@dataclass(frozen=True)
class GrowthPolicy:
    """Budgets and schedule of growth; every field can stand in a YAML file.

    Args:
        layers: names of the hidden layers that may grow, none in an empty list; all that can be widened by default.
        max_neurons: new neurons in one event.
        max_parameters: parameters of the network after growth.
        max_flops: floating-point operations of one sample's forward and backward pass after growth, as
            ``count_flops(model, probe)`` counts them.
        max_ratio: parameters after one event over parameters before it; for "even", neurons of every layer after it
            over those before.
        max_events: growth events in one run.
        per: what a predicted decrease is divided by where moves compete: "parameter", "neuron", or "flop" (of a
            sample's forward and backward pass).
        coefficients: "auto" splits equally, and by signed coefficients where equal ones let no neuron descend; "equal",
            "signed"; or the coefficients themselves, k numbers that sum to 1.
        moves: what growth consists of; docs/how-to/policies.md says when to choose which.
            "mixed": splits, new neurons found by residual pursuit ("sprouts"), or half of the splits and sprouts, as
            far as the budgets go, whichever decreases the loss most on the held-out half. For training as usual.
            "splits", "sprouts": only these.
            "certified": splits only, of neurons whose split is a strict saddle up to the confidence bounds of what was
            measured. Where every move has to be justified by the theory.
            "preserve": splits without offsets into coefficients for which a minimum stays one; none where the plateau
            has none. To widen now and to move later.
            "even": all layers by ``max_ratio``, whether it helps now or not, without geometry. For schedules.
            "module:function", or a function: a chooser of your own, ``chooser(model, geometry, probe, policy, layers)``
            returning moves, which are made as they are as far as the budgets go.
        cap: bound on Σ|λ| of signed coefficients; long negative coefficients lead to ever sharper regions.
        window: training steps the detector looks back over; also the least distance between two measurements.
        tolerance: improvement over a window, relative to the loss scale, that still counts as none.
        noise_ratio: a mean gradient counts as zero below this multiple of one training batch's gradient noise.
        probe_samples: training samples the probe collects when none is given, on all processes together.
        max_overhead: seconds that monitoring may take to a second of training, by the clock; None sets no limit. A
            measurement is postponed until what was spent and what it is expected to cost fit, so the steps at which a
            run is measured depend on timing: pass None where they have to be reproducible, and for small networks,
            where a measurement takes as long as thousands of steps. A measurement that ends in growth does not count,
            and a run that may grow is held back only after a minute of measurements that came to nothing.
        max_bytes: memory that a measurement may keep beside the model's own forward and backward pass on one batch, and
            half of it again for the solver's vectors; what does not fit is computed again instead.
        control: training steps for which a copy that did not grow is trained beside the network after each growth, on
            the same batches; then both are compared. It takes as long again as these steps, and the memory of a second
            network with its optimizer, and changes nothing else.
        rewarm: training steps over which the learning rates of all optimizers grow back from a tenth of what schedulers
            say after each growth, where the wider network might not bear them at once; see ``Rewarm``.
        detector: a function of your own, or its "module:function", in place of the loss trend and ``tolerance``:
            ``detector(losses)`` says of ten mean losses, each of a tenth of the window and over all processes, whether
            the gradient is to be tested. ``noise_ratio=inf`` lets every gradient pass that test.
    """

    layers: Sequence[str] | None = None
    max_neurons: int | None = None
    max_parameters: int | None = None
    max_ratio: float | None = 2.0
    max_events: int | None = None
    coefficients: str | Sequence[float] = "auto"
    moves: str | Chooser = "mixed"
    cap: float = 3.0
    window: int = 200
    tolerance: float = 0.01
    noise_ratio: float = 1.0
    probe_samples: int = 4096
    max_overhead: float | None = 0.01
    max_bytes: int = MAX_BYTES
    max_flops: float | None = None
    per: str = "parameter"
    control: int | None = None
    rewarm: int | None = None
    detector: str | Detector | None = None

    def __post_init__(self) -> None:
        for name, (kind, least, optional) in _NUMBERS.items():
            _check_number(name, getattr(self, name), kind, least, optional)
        if not isfinite(self.max_bytes):
            raise SplitWatchError(f"max_bytes: required a finite number, found {self.max_bytes}; 2**31 is usual")
        _check_names(self.layers)
        _check_coefficients(self.coefficients)
        if self.per not in ("parameter", "neuron", "flop"):
            raise SplitWatchError(f'per: required "parameter", "neuron" or "flop", found {self.per!r}; choose one')
        if self.detector is not None:
            imported("detector", self.detector)
        if self.chooser is None and self.moves not in MOVES:
            names = ", ".join(f'"{name}"' for name in MOVES)
            raise SplitWatchError(f'moves: required {names}, "module:function" or a function, found {self.moves!r}')
        if self.moves == "even" and not (self.max_ratio is not None and isfinite(self.max_ratio)):
            raise SplitWatchError(
                f'max_ratio: required a number with moves="even", found {self.max_ratio}; 2.0 doubles every layer'
            )
        if not (isinstance(self.cap, Real) and 1 < self.cap < inf):
            raise SplitWatchError(
                f"cap: required a finite Σ|λ| > 1 (1 leaves no negative coefficient), found {self.cap!r}"
            )

    @property
    def chooser(self) -> Chooser | None:
        """The user's own choice of moves, if there is one.

        Raises:
            SplitWatchError: it is named and cannot be found.
        """
        own = callable(self.moves) or (isinstance(self.moves, str) and ":" in self.moves)
        return imported("moves", self.moves) if own else None


def imported(field: str, given: str | Callable[..., Any]) -> Callable[..., Any]:
    """A function of the user's, or the one of that name.

    Raises:
        SplitWatchError: it cannot be found, or is no function.
    """
    if callable(given):
        return given
    try:
        module, _, name = given.partition(":")
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SplitWatchError(
            f"{field}: required a function that can be imported, found {given!r} ({error}); "
            'name it as "package.module:function"'
        ) from error
    if not callable(found):
        raise SplitWatchError(f"{field}: required a function, found {type(found).__name__} at {given!r}")
    return found


def _check_number(name: str, value: Any, kind: type, least: float, optional: bool) -> None:
    fine = optional if value is None else isinstance(value, kind) and value >= least
    if not fine or isinstance(value, bool):
        wanted = "a whole number" if kind is Integral else "a number"
        more = " or None" if optional else ""
        raise SplitWatchError(
            f"{name}: required {wanted} ≥ {least:g}{more}, found {value!r}; leave it out for the default"
        )


def _check_coefficients(given: Any) -> None:
    if isinstance(given, str) and given in {"auto", "equal", "signed"}:
        return
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError):
        raise SplitWatchError(
            f'coefficients: required "auto", "equal", "signed" or numbers, found {given!r}; [0.5, 0.5] are two halves'
        ) from None
    splitting_modes(values)


def _check_names(layers: Any) -> None:
    """Refuse what are no names of layers, a single string included, whose letters would be taken for names."""
    if layers is None:
        return
    if isinstance(layers, str) or not (isinstance(layers, Sequence) and all(isinstance(x, str) for x in layers)):
        cure = f"; write [{layers!r}]" if isinstance(layers, str) else ""
        raise SplitWatchError(f"layers: required a list of dotted names or None, found {layers!r}{cure}")
    if len(set(layers)) < len(layers):
        raise SplitWatchError(f"layers: required every name once, found {list(layers)}; leave out what is repeated")
