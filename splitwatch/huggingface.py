"""Hugging Face's ``Trainer``: ``Trainer(model, arguments, train_dataset=data, callbacks=[SplitWatchCallback()])``.

A callback sees neither batches nor losses, so a hook notes what the model is called with and what it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]

from splitwatch.batches import Batch
from splitwatch.grower import Grower
from splitwatch.growth.checkpoint import KEY, make_growable, recall
from splitwatch.growth.policy import GrowthPolicy
from splitwatch.records import SplitWatchError

FILE = "splitwatch.pt"  # in every checkpoint: the grower's state, and what grew, which files of weights do not tell


class SplitWatchCallback(TrainerCallback):
    """Watches a run and widens the model, which has to return its loss; acts before the Trainer evaluates or saves.

    Args:
        policy: budgets and schedule.
        settings: ``monitor_only``, ``sinks`` and ``probe``, as of ``Grower``.
    """

    def __init__(self, policy: GrowthPolicy | None = None, **settings: Any) -> None:
        self.policy, self.settings = policy or GrowthPolicy(), settings
        self.grower: Grower | None = None
        self._calls, self._hook = list[tuple[Batch, Tensor]](), None

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Let checkpoints of another width load; refuse what could not follow a growing model."""
        several = args.world_size > 1 or args.deepspeed or args.fsdp
        if (several and not self.settings.get("monitor_only")) or self.policy.control:
            raise SplitWatchError(
                "args: required one process, no DeepSpeed, no FSDP and a policy without control where the model grows, "
                f"found {args.world_size} processes, deepspeed={args.deepspeed!r}, fsdp={args.fsdp!r}, "
                f"control={self.policy.control!r}; for several processes use a plain loop with DistributedDataParallel"
            )
        if model is not None:
            make_growable(model).elsewhere = partial(_told, args.output_dir)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        """Begin to watch, or go on where the checkpoint was saved."""
        settings = {**self.settings, "progress": not args.disable_tqdm}
        self.grower = Grower(model, optimizer, lambda model, batch: _loss(model(**batch)), self.policy, **settings)
        saved = Path(args.output_dir, f"checkpoint-{state.global_step}", FILE)
        if state.global_step and saved.exists():
            self.grower.load_state_dict(torch.load(saved, weights_only=True))
        self.on_train_end(args, state, control)  # of a run that failed
        self._hook = model.register_forward_hook(self._note, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take note of a step; measure and grow where it is time to, unless it was the last."""
        if self.grower is not None and self._calls:
            batch, losses = dict(self._calls[-1][0]), torch.stack([loss for _, loss in self._calls])
            divided = batch.pop("num_items_in_batch", None) is not None  # by the items of all accumulated batches
            self.grower.observe(batch, losses.sum() if divided else losses.mean())
            if not control.should_training_stop:
                self.grower.act()
        self._calls = []

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Keep what grew, and the grower's state, beside the weights."""
        if self.grower is not None and state.is_world_process_zero:
            saved = {**self.grower.state_dict(), KEY: recall(model) or {}}
            torch.save(saved, Path(args.output_dir, f"checkpoint-{state.global_step}", FILE))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the model alone."""
        if self._hook is not None:
            self._hook.remove()
        self._calls, self._hook = [], None

    def _note(self, model: nn.Module, _: Any, inputs: dict[str, Any], outputs: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self._calls.append((inputs, _loss(outputs).detach()))


def _loss(outputs: Any) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if loss is None:
        cure = "give it labels, and leave label_smoothing_factor and compute_loss_func out"
        raise SplitWatchError(f"model: required one that returns its loss, found none; {cure}")
    return loss


def _told(folder: str) -> Mapping[str, Any]:
    """The growth that the newest checkpoint in a folder tells; shapes decide how much of it a state dict has."""
    files = sorted(Path(folder).glob(f"checkpoint-*/{FILE}"), key=lambda file: int(file.parent.name.split("-")[1]))
    return torch.load(files[-1], weights_only=True)[KEY] if files else {}
