"""What happened, as frozen records: events, what came of single moves, comparisons with a network that did not grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from splitwatch.records import (
    Consumer,
    GrowthPlan,
    HiddenLayer,
    LayerGeometry,
    PlateauVerdict,
    Split,
    Sprout,
    StationarityVerdict,
    table,
)

SURE: Final = 2.0
"""Standard errors from which on a difference counts as one."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a move, or ``moves`` like ones of a layer together, was predicted to decrease the loss by, and what it did.

    ``realised`` is on the held-out half. ``kind`` is "split" or "sprout"; ``certified`` says whether the held-out
    interval of a split's curvature lies on the descending side.
    """

    layer: str
    kind: str
    predicted: float
    realised: float
    moves: int = 1
    certified: bool = False

    @property
    def name(self) -> str:
        """The move in words."""
        return f"{self.kind} in {self.layer}" if self.moves == 1 else f"{self.moves} {self.kind}s in {self.layer}"

    def __str__(self) -> str:
        words = f"predicted {self.predicted:.3e}, realised {self.realised:.3e} (held out)"
        return words + (", certified" if self.certified else "")


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A grown network and a copy that was not grown, both trained for ``steps`` steps on the same batches.

    ``grown`` and ``control`` are their losses on the held-out half of the probe, ``error`` the standard error of the
    difference over parts of it, paired; ``grown_training`` and ``control_training`` their mean losses in training over
    the steps.
    """

    steps: int
    grown: float
    control: float
    error: float
    grown_training: float
    control_training: float

    @property
    def difference(self) -> float:
        """By how much the grown network's loss is lower."""
        return self.control - self.grown

    @property
    def paid(self) -> bool | None:
        """Whether growth paid; None where the difference is within two standard errors."""
        return None if not abs(self.difference) > SURE * self.error else self.difference > 0

    def __str__(self) -> str:
        words = {True: "growth paid", False: "growth did not pay", None: "no difference between growing and not"}
        return (
            f"{words[self.paid]}: after {self.steps} steps the held-out loss is {self.grown:.4g}, that of the same "
            f"network without growth {self.control:.4g} (difference {self.difference:.2g} ± {self.error:.1g}); in "
            f"training they had {self.grown_training:.4g} and {self.control_training:.4g} on average"
        )


@dataclass(frozen=True, slots=True, eq=False)
class GrowthEvent:
    """What happened at one measurement: verdict, geometry, plan, and, where the network grew, what came of it.

    ``drift`` is the relative change of what the widened layers' consumers put out, at zero offset; it and the
    ``realised_*`` decreases are nan where no probe was given. ``point`` says in words what the narrow point itself is,
    as far as that was looked at; ``plateaus`` what splits of it are; ``caveats`` what keeps the theory from applying.
    ``widths`` maps layer to (before, after), ``seconds`` stage to time spent. ``overhead`` is all monitoring so far in
    relation to training time, without measurements that led to growth. ``step`` is the user's step count.
    """

    plan: GrowthPlan
    widths: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    drift: float = float("nan")
    realised_fitted: float = float("nan")
    realised_held_out: float = float("nan")
    restarted: tuple[str, ...] = ()
    verdict: StationarityVerdict | None = None
    geometry: Mapping[str, LayerGeometry] = field(default_factory=dict)
    point: str = ""
    plateaus: Mapping[str, PlateauVerdict] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    overhead: float = float("nan")
    step: int = 0
    grown: bool = False
    outcomes: tuple[Outcome, ...] = ()
    comparison: Comparison | None = None

    def __str__(self) -> str:
        rows: dict[str, object] = {"verdict": self.verdict} if self.verdict else {}
        rows |= {"the point itself": self.point} if self.point else {}
        rows |= {f"width of {name}": f"{a} → {b}" for name, (a, b) in self.widths.items() if a != b}
        rows["parameters"] = f"{self.parameters[0]} → {self.parameters[1]}"
        if self.grown:
            rows["output drift at zero offset"] = f"{self.drift:.1e}"
            rows["decrease predicted"] = f"{self.plan.predicted_decrease:.4e}"
            rows["decrease realised (fitted half)"] = f"{self.realised_fitted:.4e}"
            rows["decrease realised (held-out half)"] = f"{self.realised_held_out:.4e}"
        rows |= {f"{i}. {item.name}": item for i, item in enumerate(self.outcomes, 1)}
        if self.restarted:
            rows["optimizer state restarted"] = ", ".join(self.restarted)
        rows |= {f"caveat {i}": words for i, words in enumerate(self.caveats, 1)}
        if self.seconds:
            rows["seconds"] = ", ".join(f"{stage} {value:.2f}" for stage, value in self.seconds.items())
        rows |= {"monitoring so far": f"{self.overhead:.2%} of training time"} if self.overhead >= 0 else {}
        done = "grew" if self.grown else "measured" if self.comparison is None else "compared"
        return table(f"step {self.step}: {done}: {self.plan.reason}", rows)


def light(event: GrowthEvent) -> GrowthEvent:
    """An event without its tensors, but for a plan that was carried out."""
    plan = event.plan if event.grown else replace(event.plan, moves=())
    return replace(event, geometry={}, plan=plan)


_RECORDS: Final[dict[str, Any]] = {
    record.__name__: record
    for record in (
        GrowthEvent, Outcome, Comparison, GrowthPlan, HiddenLayer, Consumer, Split, Sprout, StationarityVerdict,
        PlateauVerdict, LayerGeometry,
    )
}  # fmt: skip


def packed(value: Any) -> Any:
    """A record, or what one holds, in builtins and tensors, which ``torch.load(weights_only=True)`` takes."""
    if (name := type(value).__name__) in _RECORDS:
        return {"record": name} | {item.name: packed(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: packed(item) for key, item in value.items()}
    return tuple(map(packed, value)) if isinstance(value, (tuple, list)) else value


def unpacked(value: Any) -> Any:
    """What was packed; fields that the record does not have any more are left out."""
    if isinstance(value, (tuple, list)):
        return tuple(map(unpacked, value))
    if not isinstance(value, Mapping):
        return value
    inside = {key: unpacked(item) for key, item in value.items()}
    name = inside.get("record")
    if not isinstance(name, str) or name not in _RECORDS:
        return inside
    record = _RECORDS[name]
    return record(**{item.name: inside[item.name] for item in fields(record) if item.name in inside})
