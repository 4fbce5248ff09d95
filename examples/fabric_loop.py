"""A Fabric loop: Grower takes what ``fabric.setup`` returns. A narrow network fits a wave and gets stuck.

python examples/fabric_loop.py [steps] (needs the package ``lightning``)
"""

import sys

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn

from splitwatch import Grower, GrowthPolicy


def loss_fn(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def main(steps=3000):
    fabric = Fabric(accelerator="cpu", devices=1)  # with devices=2, DDP follows the growth
    fabric.launch()
    torch.manual_seed(0)
    x = torch.rand(4096, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=3e-3))
    grower = Grower(model, optimizer, loss_fn, GrowthPolicy(max_ratio=2, max_events=2), sinks=[print])

    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        batch = x[rows], y[rows]
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        fabric.backward(loss)
        optimizer.step()
        grower.step(batch, loss)

    final = float(loss_fn(model, (x, y)).detach())
    print(f"loss {final:.5f} with {model.module[0].out_features} neurons")
    return grower, final


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
