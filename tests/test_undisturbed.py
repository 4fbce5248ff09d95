"""Running a model leaves no trace on what its modules hold, nor on any generator."""

import random
from collections import Counter, OrderedDict, deque

import numpy
import pytest
import torch
import torchmetrics
from torch import nn

from splitwatch.undisturbed import undisturbed


class Diary(nn.Module):
    """Keeps notes in its forward pass in every way that is common."""

    written: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("rebound", torch.zeros(()))
        self.register_buffer("written", torch.zeros(2))
        self.calls, self.last, self.mean = 0, None, torch.zeros(2)
        self.losses, self.recent, self.seen = [], deque([1, 2], maxlen=2), {1}
        self.history, self.order, self.counts = {"loss": []}, OrderedDict(a=1, b=2), Counter(a=3)

    def forward(self, x):
        out = self.linear(x)
        self.rebound, self.last, self.extra = self.rebound + 1, out, self.calls
        self.written.add_(1)
        self.mean.add_(out.mean(0))  # not detached
        self.calls += 1
        self.losses.append(out)
        self.recent.append(self.calls)
        self.seen.add(self.calls + 1)
        self.history["loss"].append(self.calls)
        self.history[f"call {self.calls}"] = out
        self.order.move_to_end("a")
        self.counts["a"] += 1
        return out


def test_what_modules_hold_is_put_back_in_place():
    model, x = Diary(), torch.randn(4, 3)
    held = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    buffers, inner = dict(model.named_buffers()), model.history["loss"]
    with undisturbed(model):
        model(x)
        assert model.calls == 1 and len(model.losses) == 1 and inner == [1] and not model.training
    assert {name: value for name, value in vars(model).items() if not name.startswith("_")}.keys() == held.keys()
    assert all(getattr(model, name) is value for name, value in held.items())
    assert all(buffer is buffers[name] and not buffer.any() for name, buffer in model.named_buffers())
    assert not model.mean.any() and not model.mean.requires_grad
    assert (model.calls, model.last, model.losses, model.seen, model.training) == (0, None, [], {1}, True)
    assert (list(model.recent), model.recent.maxlen, model.counts) == ([1, 2], 2, Counter(a=3))
    assert model.history == {"loss": []} and model.history["loss"] is inner and list(model.order) == ["a", "b"]


def test_what_modules_hold_is_put_back_after_a_failure():
    model = Diary()
    with pytest.raises(RuntimeError), undisturbed(model):
        model(torch.randn(4, 3))
        model(torch.randn(4, 5))
    assert model.calls == 0 and model.losses == []


def test_what_was_not_changed_is_not_written():
    model = Diary()
    versions = [tensor._version for tensor in (model.written, model.mean)]
    with undisturbed(model):
        model.linear(torch.randn(4, 3))
    assert [tensor._version for tensor in (model.written, model.mean)] == versions


def test_tensors_made_in_inference_mode_may_be_held():
    model = Diary()
    with torch.inference_mode():
        model.last = kept = torch.ones(2)
    with undisturbed(model):
        model.last = None
    assert model.last is kept


def test_generators_of_python_and_numpy_go_on_as_if_nothing_was_drawn():
    def draw():
        return random.random(), numpy.random.randn()  # after an odd number of these a further one is in store

    def seed():
        random.seed(0)
        numpy.random.seed(0)

    seed()
    straight = [draw() for _ in range(3)]
    seed()
    drawn = []
    for _ in range(3):
        drawn.append(draw())
        with undisturbed(nn.Linear(1, 1)):
            draw()
    assert drawn == straight


def test_metrics_of_a_collection_keep_what_they_share():
    kinds = (torchmetrics.Accuracy, torchmetrics.Precision)
    metrics = torchmetrics.MetricCollection([kind("multiclass", num_classes=3) for kind in kinds])
    with undisturbed(metrics):  # its very first update decides on what is shared
        metrics.update(torch.tensor([0, 0]), torch.tensor([1, 2]))
    for _ in range(2):
        metrics.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
        with undisturbed(metrics):
            metrics.update(torch.tensor([0, 0]), torch.tensor([1, 2]))
    assert all(float(value) == 1 for value in metrics.compute().values())
