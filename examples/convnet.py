"""A small convolutional network with BatchNorm on digits: channels are neurons too.

python examples/convnet.py [steps]
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from splitwatch import Grower, GrowthPolicy, Probe, find_hidden_layers
from splitwatch.report.board import TensorBoardSink


def build():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(inplace=True), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def main(steps=2500, logdir="runs/convnet"):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    policy = GrowthPolicy(max_events=2, max_ratio=1.5)
    grower = Grower(model, optimizer, loss_fn, policy, sinks=[TensorBoardSink(SummaryWriter(logdir)), print])

    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        batch = x[rows], y[rows]
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        grower.step(batch, loss)

    print(*find_hidden_layers(model, Probe([(x, y)], loss_fn)), sep="\n")
    return grower, float(loss.detach())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
