"""A Lightning run with one added line, marked with ←; the LightningModule knows nothing of splitwatch.

python examples/lightning_digits.py [steps]
"""

import sys

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from splitwatch import GrowthPolicy, SplitWatch


class Classifier(pl.LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def main(steps=3000, logdir="runs"):
    pl.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    watch = SplitWatch(GrowthPolicy(max_events=2))  # ←
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[watch],
        logger=TensorBoardLogger(logdir, name="lightning_digits"),
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=128, shuffle=True))
    for event in watch.events:
        print(event)
    return watch, trainer


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
