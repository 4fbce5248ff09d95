"""Batches of any structure: which entries belong to a sample, and what a loss may do to them."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitwatch.batches import batch_size, cut, halve, select_samples, tensors
from splitwatch.collect import ProbeCollector
from splitwatch.probe import Probe
from splitwatch.records import SplitWatchError

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Data:
    x: torch.Tensor
    y: torch.Tensor


def ragged(n):
    return [torch.full((1 + i % 3,), float(i)) for i in range(n)]


x, y = torch.arange(12.0).reshape(6, 2), torch.arange(6.0)
ROWS = torch.tensor([4, 1])

PER_SAMPLE = {
    "numbers": list(range(6)),
    "strings": tuple("abcdef"),
    "tensors of differing lengths": ragged(6),
    "dictionaries": [{"boxes": box, "label": i} for i, box in enumerate(ragged(6))],
    "scalars": list(torch.arange(6.0)),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_lists_with_an_entry_per_sample_are_cut_along(name):
    own = PER_SAMPLE[name]
    for batch in ((x, own), {"own": own, "x": x}):
        assert batch_size(batch) == 6
        part = select_samples(batch, ROWS)
        part, rest = (part["x"], part["own"]) if isinstance(part, dict) else part
        assert torch.equal(part, x[ROWS])
        assert type(rest) is type(own)
        assert [id(entry) for entry in rest] == [id(own[4]), id(own[1])]


def test_detection_batches_have_no_tensor_of_their_size():
    images = [torch.full((3, 4, 4), float(i)) for i in range(8)]
    targets = [{"boxes": torch.zeros(1 + i % 2, 4), "labels": torch.full((1 + i % 2,), i)} for i in range(8)]
    assert batch_size((images, targets)) == 8
    for part in cut((images, targets), 4):
        assert batch_size(part) == 2  # though both have as many boxes
        assert [int(image.mean()) for image in part[0]] == [int(target["labels"][0]) for target in part[1]]
    collector = ProbeCollector(64)
    for _ in range(2):
        collector.add((images, targets))
    assert collector.samples == len(images)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_arrays_and_sparse_tensors_are_cut_along():
    for sparse in (x.to_sparse(), x.to_sparse_csr()):
        part = select_samples((sparse, y, y.numpy()), ROWS)
        assert torch.equal(part[0].to_dense(), x[ROWS])
        assert part[0].layout == sparse.layout
        assert np.array_equal(part[2], [4, 1])


@pytest.mark.parametrize("batch", [[x[:2], y[:2]], {"views": (x[:2], y[:2])}, [[x[:2], x[2:4]], y[:2]]])
def test_a_pair_of_two_samples_is_structure(batch):
    found = [tensor for part in halve(batch) for tensor in tensors(part)]
    assert {len(tensor) for tensor in found} == {1}


def test_the_size_is_the_most_common_one():
    weight = torch.ones(5)
    assert batch_size({"weight": weight, "x": x, "y": y}) == 6
    assert batch_size([weight, x, y]) == 6
    assert batch_size((x, [y, weight])) == 6
    assert batch_size((x[:2], weight)) == 2  # as common: the first
    assert [len(part["weight"]) for part in halve({"weight": weight, "x": x, "y": y})] == [5, 5]
    with pytest.raises(SplitWatchError, match="found a batch without any tensor"):
        batch_size({"x": ["a", "b"]})


@pytest.mark.parametrize("batch", [UserDict(x=x, y=y), Data(x, y), Pair(x, y), {"x": x, "y": y}, [x, y]])
def test_parts_are_of_the_same_kind(batch):
    part = select_samples(batch, ROWS)
    assert type(part) is type(batch)
    own = [*part.values()] if hasattr(part, "values") else [part.x, part.y] if hasattr(part, "x") else part
    assert torch.equal(own[0], x[ROWS])
    assert torch.equal(own[1], y[ROWS])
    collector = ProbeCollector(6)
    for half in cut(batch, 2):
        collector.add(half)
    assert collector.ready
    assert collector.samples == 6


# --- a loss that changes its batch -----------------------------------------------------------------------------------


def pop(model, batch):
    target = batch.pop("y")
    return F.mse_loss(model(batch["x"] / 255), target)


def in_place(model, batch):
    return F.mse_loss(model(batch["x"].div_(255)), batch["y"])


def rebind(model, batch):
    batch["x"] = batch["x"] / 255
    return F.mse_loss(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("loss", [pop, in_place, rebind])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_loss_may_change_its_batch(loss, kind):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 1), 255 * torch.rand(16, 4), torch.rand(16, 1)
    probe = Probe([kind(x=x.clone(), y=y.clone())], loss)
    expected = float(F.mse_loss(model(x / 255), y).detach())
    assert [probe.loss(model) for _ in range(3)] == pytest.approx([expected] * 3)
    assert all(float(gradient.norm()) > 0 for gradient, _ in probe.gradients(model))
    assert probe.loss(model) == pytest.approx(expected)


def test_tensors_that_a_loss_leaves_alone_are_not_copied_again():
    seen = []
    probe = Probe([x[:, :2], x[:, :2].clone()], lambda model, batch: seen.append(batch) or model(batch).mean())
    model = nn.Linear(2, 1)
    for _ in range(2):
        probe.loss(model)
    assert [any(batch is own for own in probe.half("all")) for batch in seen] == [False, False, True, True]


# --- means over valid targets ----------------------------------------------------------------------------------------


def test_a_batch_stays_whole_where_a_part_of_it_has_no_valid_target():
    torch.manual_seed(0)
    labels = torch.full((32,), -100)
    labels[:2] = 1
    probe = Probe([(torch.randn(32, 3), labels) for _ in range(2)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    model = nn.Linear(3, 2)
    values, weights = probe.losses(model)
    assert float(weights @ values) == pytest.approx(probe.loss(model))
    assert [size for _, size in probe.gradients(model)] == [32, 32]
    nn.init.constant_(model.weight, torch.nan)  # other networks are judged on the same parts
    assert probe.losses(model, finite=False)[0].shape == values.shape


def test_mean_losses_are_those_of_parts_that_are_not_all_whole():
    torch.manual_seed(0)
    few = torch.full((16,), -100)
    few[0] = 1
    batches = [(torch.randn(16, 3), torch.randint(0, 2, (16,))), (torch.randn(16, 3), few)]
    probe, model = Probe(batches, lambda m, b: F.cross_entropy(m(b[0]), b[1])), nn.Linear(3, 2)
    values, weights = probe.losses(model)
    assert len(values) == 5
    assert float(weights @ values) == pytest.approx(probe.loss(model))
