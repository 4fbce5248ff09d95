"""Every way to grow that benchmarks/growth.py compares, by name: a site in, a plan out."""

from __future__ import annotations

from collections.abc import Callable

from growth_firefly import firefly
from growth_lean import Lean
from growth_peers import gradmax, net2wider, s2d, s3d, tiny
from growth_site import Site, everywhere, random_new

from splitwatch import GrowthPolicy, measure_geometry, plan_growth
from splitwatch.records import GrowthPlan


def splitwatch(moves: str) -> Callable[[Site], GrowthPlan]:
    """Splitwatch's own plan, within the neurons and parameters that the others take."""

    def plan(site: Site) -> GrowthPlan:
        count = sum(map(site.missing, site.layers))
        policy = GrowthPolicy(max_neurons=count, max_parameters=site.parameters, max_ratio=None, moves=moves)
        geometry = measure_geometry(site.model, site.probe, site.layers, wanted=count)
        return plan_growth(site.model, geometry, site.probe, policy, layers=site.layers)

    return plan


PEERS = {
    "random": everywhere(random_new),
    "Net2Wider": everywhere(net2wider),
    "S2D": everywhere(s2d),
    "S3D": everywhere(s3d),
    "GradMax": everywhere(gradmax),
    "TINY": everywhere(tiny),
    "Firefly": everywhere(firefly),
}
OWN = {"splitwatch": splitwatch("mixed")}
EXPERIMENTS = {
    "splits .3": everywhere(lambda site, layer, count: s2d(site, layer, count, 0.3)),
    "lean": Lean(),
    "lean, silent": Lean(steps=(0.0,)),
    "lean, others": Lean(others=False),
    "lean, others, to .5": Lean(others=False, steps=(0.0, 0.125, 0.25, 0.5)),
    "lean, half, silent": Lean(splits=0.5, steps=(0.0,)),
    "lean, quarter, silent": Lean(splits=0.25, steps=(0.0,)),
    "lean, half .1, silent": Lean(splits=0.5, offset=0.1, steps=(0.0,)),
    "lean, silent, 10": Lean(ascent=10, steps=(0.0,)),
    "lean, silent, pool 4": Lean(pool=4.0, steps=(0.0,)),
}
GROW: dict[str, Callable[[Site], GrowthPlan]] = {**PEERS, **OWN, **EXPERIMENTS}
