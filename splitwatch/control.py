"""The counterfactual: a copy of the network that did not grow, trained on beside the one that did."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from splitwatch.batches import Batch
from splitwatch.events import Comparison
from splitwatch.probe import LossFunction, Probe
from splitwatch.ranks import paired_error, rank_count

_logger = logging.getLogger("splitwatch")


class Control:
    """A copy of a model and of its optimizers, made before growth.

    Every step it takes on a batch is: gradient of ``loss_fn``, then each optimizer with the settings (learning rates,
    betas, weight decay) that the live one had at its own step. Dropout draws from a stream of random numbers that
    begins where the live one was; nothing of the live network is touched.

    Args:
        model: the network.
        optimizers: all of them.
        loss_fn: what training minimises.
        probe: on its held-out half both are compared at the end.
        steps: how long it trains.

    Raises:
        ValueError: several processes train, or an optimizer evaluates the loss several times a step.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], loss_fn: LossFunction, probe: Probe, steps: int
    ) -> None:
        if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
            raise ValueError("L-BFGS evaluates the loss several times a step")
        if rank_count() > 1:
            raise ValueError(f"its gradients would have to be averaged over {rank_count()} processes")
        memo = _detached(model)
        self.model: nn.Module = deepcopy(model, memo)
        self.optimizers = [_copied(optimizer, memo) for optimizer in optimizers]
        self.live, self.loss_fn, self.probe, self.steps = list(optimizers), loss_fn, probe, steps
        self.devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        with self._own_random_numbers(begin=True):
            pass
        self.settings = [_settings(optimizer) for optimizer in optimizers]
        self.hooks = [o.register_step_pre_hook(self._noting(i)) for i, o in enumerate(optimizers)]
        self.losses: list[tuple[Tensor, Tensor]] = []

    @property
    def done(self) -> bool:
        """Whether it has trained for all its steps."""
        return len(self.losses) >= self.steps

    def step(self, batch: Batch, loss: Tensor | float) -> None:
        """One training step on a batch, on which the live network had that ``loss``."""
        for optimizer, settings in zip(self.optimizers, self.settings, strict=True):
            for group, values in zip(optimizer.param_groups, settings, strict=True):
                group.update(deepcopy(values))
        with self._own_random_numbers(), torch.enable_grad():
            self.model.zero_grad(set_to_none=True)
            own = self.loss_fn(self.model, batch)
            if not self.losses:
                self._check_own(own)
            own.backward()
            for optimizer in self.optimizers:
                optimizer.step()
        self.losses.append((torch.as_tensor(loss).detach().double().cpu(), own.detach().double().cpu()))

    def _check_own(self, loss: Tensor) -> None:
        """Refuse a loss of another model than the one that it is given: its gradients would be the live network's."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError("loss_fn has to use the model that it is given, not one that it knows")

    def follow(self, batch: Batch, loss: Tensor | float) -> bool:
        """A step; False, with a warning, where it fails, as after parameter groups were added to a live optimizer."""
        try:
            self.step(batch, loss)
        except (RuntimeError, ValueError) as error:
            _logger.warning("the control is dropped: it could not be trained: %s", error)
            return False
        return True

    def compare(self, model: nn.Module) -> Comparison:
        """The live network beside the copy, as they are now."""
        grown, weights = self.probe.losses(model, "held_out", finite=False)
        control, _ = self.probe.losses(self.model, "held_out", finite=False)
        trained = torch.stack([torch.stack(pair) for pair in self.losses]).mean(0).tolist()
        grown_loss, control_loss = float(weights @ grown), float(weights @ control)
        error = paired_error(control - grown, weights)
        return Comparison(len(self.losses), grown_loss, control_loss, error, *trained)

    def close(self) -> None:
        """Forget the copy."""
        for hook in self.hooks:
            hook.remove()
        del self.model, self.optimizers, self.live

    def _noting(self, place: int) -> Callable[..., None]:
        def note(optimizer: Optimizer, *_: Any) -> None:
            self.settings[place] = _settings(optimizer)

        return note

    @contextmanager
    def _own_random_numbers(self, *, begin: bool = False) -> Iterator[None]:
        """The copy's own stream inside; it begins at the state of the live one."""
        with torch.random.fork_rng(devices=self.devices):
            if not begin:
                torch.set_rng_state(self.random[0])
                for device, state in zip(self.devices, self.random[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            yield
            self.random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]


def control_for(
    model: nn.Module, optimizers: Sequence[Optimizer], loss_fn: LossFunction, probe: Probe, steps: int
) -> Control | None:
    """A control, or None with a warning where the network or its optimizers cannot be copied."""
    try:
        return Control(model, optimizers, loss_fn, probe, steps)
    except Exception as error:
        _logger.warning("growth goes on without the control of %d steps: a copy cannot be trained: %s", steps, error)
        return None


def _detached(model: nn.Module) -> dict[int, Any]:
    """Copies of tensors that modules hold with a graph, such as metric states, which ``deepcopy`` refuses; by id."""
    held = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return {id(tensor): tensor.detach().clone() for tensor in held if tensor.grad_fn is not None}


def _copied(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """A copy on the copied parameters, without hooks and without what schedulers wrapped around ``step``."""
    copied = deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():
        if name not in vars(copied) and not callable(value) and not isinstance(value, OrderedDict):
            setattr(copied, name, deepcopy(value, memo))
    return copied


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    groups = ({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
    return [deepcopy(group) for group in groups]
