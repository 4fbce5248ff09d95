"""Splits against sprouts, mixtures and random new neurons at a plateau: teacher regressions and handwritten digits.

A narrow student is trained to a plateau by L-BFGS, grown once by every method by as many neurons, and trained on with
300 steps of Adam. Each cell is the loss at growth / exp of the mean log loss over the steps / the final loss, divided
by the plateau's loss: geometric means over seeds. Where a method finds that growth would not help, training goes on
without. Run: python benchmarks/pursuit.py [seeds] [-v]
"""

from __future__ import annotations

import copy
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from splitwatch import GrowthPolicy, Probe, grow, measure_geometry, plan_growth
from splitwatch.lightning.demo import load_digits
from splitwatch.records import GrowthPlan, Sprout

STEPS = 300
TEACHERS = {  # activation, outputs, width, new neurons
    "tanh, 1 output, 3 + 3": (nn.Tanh, 1, 3, 3),
    "GELU, 1 output, 3 + 3": (nn.GELU, 1, 3, 3),
    "tanh, 4 outputs, 4 + 4": (nn.Tanh, 4, 4, 4),
}
METHODS = ("splits", "sprouts", "mixed", "random")


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def teacher(activation, outputs, width, seed):
    """Student, training batch, test batch, loss."""
    torch.manual_seed(seed)
    target = nn.Sequential(nn.Linear(4, 12), activation(), nn.Linear(12, outputs))
    with torch.no_grad():
        target[0].weight.normal_()
        target[2].weight.normal_()
        x, x_test = torch.randn(256, 4), torch.randn(2048, 4)
        y, y_test = target(x), target(x_test)
    mean, std = y.mean(0), y.std()
    student = nn.Sequential(nn.Linear(4, width), activation(), nn.Linear(width, outputs))
    return student, (x, (y - mean) / std), (x_test, (y_test - mean) / std), mse


def digits(seed):
    torch.manual_seed(seed)
    train, test = (part.tensors for part in load_digits())
    return nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10)), train, test, cross_entropy


def settle(model, batch, loss_fn, steps):
    """To a plateau, by L-BFGS."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe", history_size=30)

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)


def random_plan(model, layer, count, seed):
    """New neurons as a fresh layer would have them, with zero outgoing weights."""
    torch.manual_seed(seed)
    fresh = nn.Linear(model[0].in_features, count)
    incoming = torch.cat([fresh.weight, fresh.bias[:, None]], dim=1).detach()
    moves = tuple(Sprout(layer.name, w, torch.zeros(model[2].out_features)) for w in incoming)
    return GrowthPlan((layer,), moves, "random")


def curve(model, batch, test, loss_fn):
    """Loss now, its logarithm's mean over training, the final loss, the test loss."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        final, tested = float(loss_fn(model, batch)), float(loss_fn(model, test))
    return losses[0], math.exp(sum(map(math.log, losses)) / STEPS), final, tested


def compare(make, new, seed):
    """For every method: the curve in relation to the plateau's loss, what was chosen, seconds of planning."""
    student, batch, test, loss_fn = make(seed)
    settle(student, batch, loss_fn, 500)
    with torch.no_grad():
        plateau, tested = float(loss_fn(student, batch)), float(loss_fn(student, test))
    probe = Probe([batch], loss_fn)
    geometry = measure_geometry(student, probe)
    splits = plan_growth(student, geometry, probe, GrowthPolicy(max_neurons=new, max_ratio=None))
    new, rows = len(splits.moves) or new, {}
    for method in METHODS:
        start = time.perf_counter()
        if method == "random":
            plan = random_plan(student, splits.layers[0], new, seed)
        else:
            plan = plan_growth(student, geometry, probe, GrowthPolicy(max_neurons=new, moves=method, max_ratio=None))
        seconds, model = time.perf_counter() - start, copy.deepcopy(student)
        grow(model, plan)
        *values, final_test = curve(model, batch, test, loss_fn)
        rows[method] = [value / plateau for value in values] + [final_test / tested, len(plan.moves), seconds]
        if "-v" in sys.argv:
            print(seed, method, [f"{v:.3f}" for v in rows[method]], plan.reason, plan.offset, plan.step, flush=True)
    return rows


def main(seeds):
    torch.set_num_threads(1)
    problems = {name: (lambda seed, case=case: teacher(*case[:3], seed), case[3]) for name, case in TEACHERS.items()}
    problems["digits, 4 + 4"] = (digits, 4)
    for name, (make, new) in problems.items():
        runs = [compare(make, new, seed) for seed in range(seeds)]
        print(f"\n{name}: at growth / area / final / final on test data | neurons | seconds")
        for method in METHODS:
            columns = list(zip(*(run[method] for run in runs), strict=True))
            cells = [math.exp(sum(map(math.log, column)) / seeds) for column in columns[:4]]
            counts = [sum(column) / seeds for column in columns[4:]]
            print(
                f"  {method:<8} "
                + " / ".join(f"{cell:.3f}" for cell in cells)
                + f" | {counts[0]:.1f} | {counts[1]:.2f}"
            )


if __name__ == "__main__":
    main(next((int(word) for word in sys.argv[1:] if word.isdigit()), 4))
