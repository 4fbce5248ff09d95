"""The probe: fixed batches on which geometry is measured, without a trace left on the model.

Half of the batches are fitted on, the other half is held out for verification. Every batch counts with its number of
samples, so ragged batches are weighted right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from splitwatch.anatomy import Anatomy, flat, plain_module
from splitwatch.batches import Batch, Cuts, Loan, batch_size, halve, mapped, shares
from splitwatch.channels import pre_activation
from splitwatch.precision import Uncast, upcast
from splitwatch.ranks import share_of, summed, summed_number
from splitwatch.recompute import straight_through
from splitwatch.records import HiddenLayer, SplitWatchError
from splitwatch.tape import Footprint, Tape
from splitwatch.trace import LayerTrace, trace
from splitwatch.undisturbed import undisturbed

WHOLE = (
    "splitwatch computed the loss of a batch of its probe, which may hold some of the samples of a batch of yours; "
    "where the loss needs batches as they are (pairs, graphs, a carried state), pass probe=Probe(batches, loss_fn) of "
    "two batches or more that it takes"
)
"""What to do where a loss is computed of batches of training, but not of the probe's."""

LossFunction = Callable[[nn.Module, Batch], Tensor]


class Probe:
    """Fixed batches and the loss that judges them.

    Args:
        batches: mini-batches in the form ``loss_fn`` takes; tensors in them carry samples along their first axis. Even
            ones are fitted on, odd ones held out; a single batch is cut into halves.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss of the batch.

    Raises:
        SplitWatchError: no batches, or one batch that cannot be halved.
    """

    def __init__(self, batches: Iterable[Batch], loss_fn: LossFunction) -> None:
        batches = list(batches)
        if not batches:
            raise SplitWatchError("batches: required at least one batch, found none; pass training batches")
        if len(batches) == 1:
            batches = halve(batches[0])
        self.fitted: tuple[Batch, ...] = tuple(batches[::2])
        self.held_out: tuple[Batch, ...] = tuple(batches[1::2])
        self.loss_fn = loss_fn
        self._takes_gradients = False  # as far as is known
        self._loans, self._cuts = [(batch, Loan()) for batch in self.half("all")], Cuts()

    def half(self, name: str) -> tuple[Batch, ...]:
        """The batches of a half: "fitted", "held_out" or "all"; a ``SplitWatchError`` for any other name."""
        found = {"fitted": self.fitted, "held_out": self.held_out, "all": self.fitted + self.held_out}
        if name not in found:
            raise SplitWatchError(f"half: required one of {', '.join(found)}, found {name!r}; name one of them")
        return found[name]

    def samples(self, half: str = "all") -> int:
        """Number of samples in a half."""
        return sum(map(batch_size, self.half(half)))

    def loss(self, model: nn.Module, half: str = "all", *, finite: bool = True) -> float:
        """Mean loss per sample over a half, in eval mode; over the halves of all ranks where several train together.

        Raises:
            SplitWatchError: the loss is not a scalar, or not ``finite`` where it has to be.
        """
        batches = self.half(half)
        losses = zip(self._losses(model, batches), shares(batches), strict=True)
        mean = summed_number(sum(loss * share for loss, share in losses) * share_of(self.samples(half)))
        return self._finite(mean) if finite else mean  # asked of the sum, which ends every rank alike

    def losses(
        self, model: nn.Module, half: str = "all", *, finite: bool = True, at_least: int = 8
    ) -> tuple[Tensor, Tensor]:
        """Mean losses of parts of a half and the parts' shares of its samples, both (parts,); errors as for ``loss``.

        Batches are cut where there are fewer than ``at_least``, as far as their samples allow.
        """
        pieces = self._pieces(model, half, -(-at_least // len(self.half(half))))
        values = torch.tensor(self._losses(model, pieces), dtype=torch.float64)
        if finite:
            self._finite(float(values.sum()))
        return values, torch.tensor(shares(pieces), dtype=torch.float64)

    def _pieces(self, model: nn.Module, half: str, parts: int) -> list[Batch]:
        """The batches of a half cut into parts, as far as their samples and finite losses allow."""
        return self._cuts.pieces(self.half(half), parts, partial(self._losses, model))

    def _losses(self, model: nn.Module, batches: Sequence[Batch], *, training: bool = False) -> list[float]:
        with undisturbed(model, training=training):
            return [float(self._scalar(self._gradless(model, batch)).double()) for batch in batches]

    def first(self, model: nn.Module, *, training: bool = False) -> float:
        """The mean loss of the first batch, in eval mode or in the modes that modules are in; it may not be finite."""
        return self._losses(model, self.fitted[:1], training=training)[0]

    def gradients(self, model: nn.Module, at_least: int = 8) -> Iterator[tuple[Tensor, int]]:
        """The gradient on every batch, flat over the trainable parameters, with the batch's size.

        Batches are cut into parts where there are fewer than ``at_least``, as far as their samples allow.

        Yields:
            One pair (gradient, size) after the other.

        Raises:
            SplitWatchError: as for ``record``.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        for batch in self._pieces(model, "all", -(-at_least // len(self.half("all")))):
            yield self._gradient(model, batch, parameters), batch_size(batch)

    def slope(self, model: nn.Module, parameters: Sequence[Tensor]) -> Tensor:
        """The gradient of the mean loss of all ranks' first batches in some parameters, flat; it may not be finite.

        Raises:
            SplitWatchError: the loss is not a scalar, or depends on no parameter; or inference mode is on.
        """
        gradient = self._gradient(model, self.fitted[0], parameters, finite=False)
        return summed(gradient * share_of(batch_size(self.fitted[0])))

    def _gradient(self, model: nn.Module, batch: Batch, parameters: Sequence[Tensor], *, finite: bool = True) -> Tensor:
        with undisturbed(model), torch.enable_grad():
            loss = self._with_graph(self._run(model, batch), finite=finite)
            return flat(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    def outputs(self, model: nn.Module, modules: Sequence[str]) -> list[Tensor]:
        """What some modules, by dotted names, put out last on the first batch, in eval mode."""
        found: dict[str, Tensor] = {}

        def keep(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found[name] = output.detach().clone()  # a copy: what follows may change it in place

        hooks = []
        try:
            hooks.extend(plain_module(model, name).register_forward_hook(partial(keep, name)) for name in modules)
            with undisturbed(model):
                self._checked(self._gradless(model, self.fitted[0]))
                if by_hand := set(modules) - set(found):  # such as F.linear(x, module.weight)
                    calls = Anatomy(model, self.record(model, self.fitted[0])[0]).calls
                    found |= {name: pre_activation(calls[name][-1]) for name in by_hand}
        finally:
            for hook in hooks:
                hook.remove()
        return [found[name] for name in modules]

    def record(self, model: nn.Module, batch: Batch) -> tuple[Tape, Tensor]:
        """The loss of one batch with the tape of how it was computed, in eval mode, autograd graph kept.

        Whoever follows the graph of a model with half-precision parameters does so within ``undisturbed(model)``.

        Raises:
            SplitWatchError: the loss is not a finite scalar, or depends on no parameter; or inference mode is on.
        """
        tape = Tape()
        with undisturbed(model), torch.enable_grad(), tape:
            loss = self._run(model, batch)
        return tape, self._with_graph(loss)

    def capture(self, model: nn.Module, layers: Sequence[HiddenLayer], half: str) -> dict[str, list[LayerTrace]]:
        """What every layer sees on every batch of a half.

        Raises:
            SplitWatchError: the loss is not finite, or does not depend on a layer.
        """
        traces: dict[str, list[LayerTrace]] = {layer.name: [] for layer in layers}
        for found in self.traces(model, layers, half):
            for name, one in found.items():
                traces[name].append(one)
        return traces

    def traces(
        self, model: nn.Module, layers: Sequence[HiddenLayer], half: str, pieces: int = 1
    ) -> Iterator[dict[str, LayerTrace]]:
        """What every layer sees, by its name, on one batch after another, each cut into ``pieces`` where it can be."""
        batches = self._pieces(model, half, pieces)
        for batch, share in zip(batches, shares(batches), strict=True):
            yield self._traces(model, layers, batch, share)

    def footprint(self, model: nn.Module, half: str) -> tuple[int, int]:
        """Bytes of all that the loss of a half's largest batch computes, and of the largest tensor among it."""
        seen = Footprint()
        with undisturbed(model):
            self._checked(self._gradless(model, max(self.half(half), key=batch_size), seen))
        return seen.total, seen.largest

    def _traces(
        self, model: nn.Module, layers: Sequence[HiddenLayer], batch: Batch, share: float
    ) -> dict[str, LayerTrace]:
        with undisturbed(model):
            tape, loss = self.record(model, batch)
            anatomy = Anatomy(model, tape)
            return {layer.name: trace(anatomy, layer, loss, batch_size(batch), share) for layer in layers}

    def _gradless(self, model: nn.Module, batch: Batch, seen: AbstractContextManager[Any] | None = None) -> Any:
        """What the loss function returns, without a graph unless it takes gradients itself, as penalties on them do."""
        try:
            with torch.set_grad_enabled(self._takes_gradients), seen or nullcontext():
                loss = self._run(model, batch)
        except RuntimeError as error:
            if self._takes_gradients or "does not require grad" not in str(error):
                raise
            self._takes_gradients = True
            return self._gradless(model, batch, seen)
        return loss.detach() if isinstance(loss, Tensor) else loss

    def _run(self, model: nn.Module, batch: Batch) -> Any:
        """What the loss function returns; half precision is float32 in it, and what checkpoints would drop is kept."""
        loan = next((loan for known, loan in self._loans if known is batch), None)  # none of a piece: copies
        try:
            with (loan or Loan()).of(batch) as lent, Uncast(), straight_through():
                return self.loss_fn(model, mapped(upcast, lent))
        except Exception as error:
            if loan is not None and not loan.returned:
                getattr(error, "add_note", str)(WHOLE)  # since Python 3.11
            raise

    @classmethod
    def _with_graph(cls, loss: Any, *, finite: bool = True) -> Tensor:
        """A loss that can be differentiated."""
        if torch.is_inference_mode_enabled():
            raise SplitWatchError("probe: required autograd, found torch.inference_mode(); measure outside of it")
        loss = cls._checked(loss) if finite else cls._scalar(loss)
        if not loss.requires_grad:
            raise SplitWatchError(
                "loss_fn: required a loss that depends on the model's parameters, found a constant; "
                "do not detach it and do not compute it under no_grad"
            )
        return loss

    @classmethod
    def _checked(cls, loss: Any) -> Tensor:
        loss = cls._scalar(loss)
        cls._finite(float(loss.detach()))
        return loss

    @staticmethod
    def _scalar(loss: Any) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss).__name__)
            raise SplitWatchError(f"loss_fn: required a scalar tensor (the mean loss), found {found}; reduce it")
        return loss

    @staticmethod
    def _finite(loss: float) -> float:
        if not isfinite(loss):
            raise SplitWatchError(
                f"loss_fn: required a finite loss, found {loss}; look for probe batches without a valid target if it "
                "averages over those (ignore_index, a mask), and pass a probe of larger batches; where training losses "
                "are not finite either, look for overflow or a division by zero in the model or the data"
            )
        return loss
