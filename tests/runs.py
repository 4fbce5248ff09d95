"""Small Lightning runs that grow soon, in either of Lightning's packages, on one process or several."""

import functools
import importlib
import multiprocessing

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from splitwatch import GrowthPolicy, SplitWatch
from splitwatch.ranks import rank, rank_count

CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["torch", "pytorch_lightning", "lightning.pytorch", "splitwatch"])

PACKAGES = ("pytorch_lightning", "lightning.pytorch")

USUAL = (
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*treespec.*",
    "ignore:.*logging interval.*:UserWarning",
    "ignore:.*litlogger.*",
    "ignore:.*tensorboardX.*",
    "ignore:Checkpoint directory.*:UserWarning",
    "ignore:The number of training batches.*:UserWarning",
    "ignore:.*ended before the epoch ended.*:UserWarning",
)
"""Warnings of any short run."""

QUIET = (
    *USUAL,
    "ignore:.*mid-epoch checkpoint.*:UserWarning",
    "ignore:.*resumed from a checkpoint that ended before.*:UserWarning",
    "ignore:.*You defined a .validation_step.*:UserWarning",
)

SOON = GrowthPolicy(
    window=10, tolerance=1e9, noise_ratio=1e9, max_events=2, max_neurons=2, max_overhead=None, probe_samples=256,
    moves="splits",
)  # fmt: skip
"""A policy to which every point is stationary."""


def in_clean_process(test):
    """Runs a test that forks in a process where nothing ran before: a fork does not survive other tests' threads."""

    @functools.wraps(test)
    def run(**arguments):
        process = CLEAN.Process(target=_call, args=(test.__module__, test.__name__, arguments))
        process.start()
        process.join(400)
        process.kill()
        assert process.exitcode == 0

    return run


def _call(module, name, arguments):
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)


def wave(n=512):
    x = torch.rand(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return x, torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])


def module_of(package="pytorch_lightning", lr=3e-2, seed=0, **hooks):
    """A LightningModule of a package; ``hooks`` take the place of its methods."""
    pl = importlib.import_module(package)

    class Wave(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
            with torch.no_grad():
                for weight in (self.net[0].weight, self.net[2].weight):
                    weight.mul_(2)
            self.lr = lr

        def training_step(self, batch, batch_idx):
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def train_dataloader(self):
            """Batches of 64 samples, dealt to the ranks."""
            ranks, data = self.trainer.world_size, TensorDataset(*wave())
            sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
            return DataLoader(data, 64 // ranks, sampler=sampler)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    for name, hook in hooks.items():
        setattr(Wave, name, hook)
    return Wave()


def loader(batch_size=64):
    return DataLoader(TensorDataset(*wave()), batch_size=batch_size)


def trainer_of(callbacks, package="pytorch_lightning", steps=40, **settings):
    pl = importlib.import_module(package)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    settings = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "max_epochs": -1} | settings
    return pl.Trainer(max_steps=steps, callbacks=callbacks, **settings)


def held(model):
    """A copy of the parameters, whole where processes share them out; then each has to ask."""
    found = [p.detach() for p in model.parameters()]
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for p in found]


class Diary:
    """What happened in a run, one file a rank: losses over all ranks, growth, parameters right after it and at the end.

    The callback that keeps it is made by ``in_package``, since it has to be one of the package's own.
    """

    def __init__(self, folder):
        self.folder, self.losses, self.grown, self.after = folder, [], [], []
        self.watch = SplitWatch(SOON, sinks=[self.sink])

    def sink(self, event):
        if event.grown:
            self.grown.append((event.step, [(move.layer, move.neuron, move.coefficients) for move in event.plan.moves]))
            self.after += held(self.watch.grower.model)

    def in_package(self, package="pytorch_lightning"):
        base = importlib.import_module(package).Callback
        return type("Keeper", (Keeper, base), {})(self)


class Keeper:
    def __init__(self, diary):
        self.diary = diary

    def __reduce__(self):  # the class is made on the way, so it is made again in a spawned process
        return Diary.in_package, (self.diary,)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().clone()
        if trainer.world_size > 1:
            distributed.all_reduce(loss)
        self.diary.losses.append(float(loss) / trainer.world_size)

    def on_train_end(self, trainer, pl_module):
        diary, end = self.diary, held(pl_module)
        kept = {"losses": diary.losses, "grown": diary.grown, "after": diary.after, "end": end}
        torch.save(kept, f"{diary.folder}/{trainer.global_rank}")


class Dealt:
    """A loader that knows where it stands, to resume within an epoch; it gives each rank its samples."""

    position = 0

    def __len__(self):
        return 8

    def __iter__(self):
        x, y = wave()
        for i in range(self.position, 8):
            self.position = (i + 1) % 8
            rows = slice(64 * i + rank(), 64 * i + 64, rank_count())
            yield x[rows], y[rows]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
