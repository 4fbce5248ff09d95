"""A plain PyTorch loop: three added lines, marked with ←. A narrow network fits a wave and gets stuck.

python examples/plain_loop.py [steps]
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from splitwatch import Grower, GrowthPolicy
from splitwatch.report.board import TensorBoardSink


def loss_fn(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def main(steps=6000, logdir="runs/plain_loop"):
    torch.manual_seed(0)
    x = torch.rand(4096, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    policy = GrowthPolicy(max_ratio=2, max_events=2)
    grower = Grower(model, optimizer, loss_fn, policy, sinks=[TensorBoardSink(SummaryWriter(logdir)), print])  # ←

    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        batch = x[rows], y[rows]
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        grower.step(batch, loss)  # ←

    final = float(loss_fn(model, (x, y)).detach())
    print(f"loss {final:.5f} with {model[0].out_features} neurons; tensorboard --logdir {logdir} --load_fast=false")
    return grower, final


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
