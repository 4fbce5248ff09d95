"""A byte-level language model on the source text of Python's own standard library; its MLPs are hidden layers.

python examples/transformer_mlp.py [steps]
"""

import os
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from splitwatch import Grower, GrowthPolicy
from splitwatch.report.board import TensorBoardSink

CONTEXT = 32


class Block(nn.Module):
    """Pre-norm attention, then a gated MLP (SwiGLU), each around a residual connection."""

    def __init__(self, size, width, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.gate, self.up, self.down = nn.Linear(size, width), nn.Linear(size, width), nn.Linear(width, size)

    def forward(self, x):
        b, t, s = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, s))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class LanguageModel(nn.Module):
    def __init__(self, size=32, width=8, blocks=2):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, size), nn.Embedding(CONTEXT, size)
        self.blocks = nn.Sequential(*(Block(size, width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 256)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places(torch.arange(x.shape[1], device=x.device)))))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def source_text():
    files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def main(steps=1500, logdir="runs/transformer_mlp"):
    torch.manual_seed(0)
    text = source_text()
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    policy = GrowthPolicy(max_events=2, max_ratio=1.2, probe_samples=512, window=300)
    grower = Grower(model, optimizer, loss_fn, policy, sinks=[TensorBoardSink(SummaryWriter(logdir)), print])

    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (32,))
        batch = text[starts[:, None] + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        grower.step(batch, loss)

    print(f"{float(loss.detach()):.3f} nats a byte; MLP widths {[b.gate.out_features for b in model.blocks]}")
    return grower, float(loss.detach())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
