"""Every way to grow that benchmarks/growth.py compares, by name: a site in, a plan out."""

from __future__ import annotations

from collections.abc import Callable

from growth_firefly import firefly
from growth_gromo import gromo
from growth_peers import gradmax, net2wider, s2d, s3d, tiny
from growth_site import Site, everywhere, random_new

from splitwatch import GrowthPolicy, plan_growth
from splitwatch.records import GrowthPlan


def splitwatch(site: Site) -> GrowthPlan:
    """Splitwatch's own plan for a schedule: every layer to the width that is wanted."""
    policy = GrowthPolicy(moves="even", max_ratio=site.width / site.layers[0].width)
    return plan_growth(site.model, {}, site.probe, policy, layers=site.layers)


DUE = "when due"
"""What methods that widen where a ``StationarityDetector`` finds that the loss no longer falls end in."""

PEERS = {
    "random": everywhere(random_new),
    "Net2Wider": everywhere(net2wider),
    "S2D": everywhere(s2d),
    "S3D": everywhere(s3d),
    "GradMax": everywhere(gradmax),
    "TINY": everywhere(tiny),
    "Firefly": everywhere(firefly),
    "gromo": everywhere(gromo),
}
TIMED = {f"{name}, {DUE}": plan for name, plan in PEERS.items()}
"""The same at splitwatch's timing."""
NEEDS = dict.fromkeys(("gromo", f"gromo, {DUE}"), "gromo")
"""Methods that need a package."""
PLAIN = {*NEEDS}
"""Methods that know only MLPs of one hidden layer."""

OWN = dict.fromkeys(("splitwatch", *(f"splitwatch, {when}" for when in (DUE, "later"))), splitwatch)
"""The last widens at ``Cell.later`` and is compared with fixed widths only."""

GROW: dict[str, Callable[[Site], GrowthPlan]] = {**PEERS, **TIMED, **OWN}
GRID = [*PEERS, f"random, {DUE}", *OWN]
"""What is run unless others are asked for."""
