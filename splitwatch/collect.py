"""Collect a probe from the batches that training sees anyway, every sample at most once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from splitwatch.batches import Batch, batch_size, mapped, select_samples, tensors
from splitwatch.probe import LossFunction, Probe
from splitwatch.ranks import everywhere, gathered, rank, rank_count

STORED = 2**26
"""Bytes of the largest probe in the making that is saved, on all ranks together; a larger one is collected afresh."""

RECENT = 64
"""Samples over which the share of new ones is averaged, so that a few repeated ones do not end the collecting."""


class ProbeCollector:
    """Keeps training batches until it has ``samples`` distinct samples, or hardly any new ones come: then it is ready.

    A sample that comes again (in a later epoch) is dropped, so that no sample stands in both halves of the probe; so is
    a batch of which less than half is new.
    """

    def __init__(self, samples: int) -> None:
        self.target = samples
        self.clear()

    def clear(self) -> None:
        """Start afresh."""
        self.batches: list[Batch] = []
        self._prints: list[list[float]] = []  # of each batch's samples
        self._seen: set[float] = set()
        self._news = 1.0
        self.ready = False

    def state_dict(self) -> dict[str, Any]:
        """What this rank collected, in builtins and tensors; empty where that is much."""
        size = sum(leaf.numel() * leaf.element_size() for leaf in tensors(self.batches))
        if size > STORED / rank_count() or not _is_plain(self.batches):
            return {}
        batches = mapped(lambda x: x.cpu() if isinstance(x, Tensor) else x, self.batches)
        place = {"rank": rank(), "ranks": rank_count()}
        return {"batches": batches, "prints": self._prints, "news": self._news, "ready": self.ready, **place}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from what was saved, or afresh where a rank has nothing, or what another one saved."""
        self.clear()
        if everywhere("batches" in state and (state.get("rank", 0), state.get("ranks", 1)) == (rank(), rank_count())):
            self.batches = mapped(lambda x: x.to(device) if isinstance(x, Tensor) else x, state["batches"])
            self._prints, self._news, self.ready = list(state["prints"]), state["news"], state["ready"]
            self._seen = {value for prints in self._prints for value in prints}

    @property
    def samples(self) -> int:
        """Distinct samples collected."""
        return len(self._seen)

    def add(self, batch: Batch) -> None:
        """Take over the samples of a batch that were not seen before; free once the probe is ready."""
        if self.ready or not batch_size(batch):
            return
        prints = _fingerprints(batch)
        first = {value: i for i, value in reversed(list(enumerate(prints)))}
        rows = sorted(i for value, i in first.items() if value not in self._seen)
        if 2 * len(rows) < len(first):
            rows = []  # a few samples are no batch that training could have seen: their loss may be far off, or nan
        weight = min(len(prints) / RECENT, 1.0)
        self._news += weight * (len(rows) / len(first) - self._news)
        if rows:
            self._prints.append([prints[i] for i in rows])
            self._seen.update(self._prints[-1])
            new = batch if len(rows) == len(prints) else select_samples(batch, torch.tensor(rows))
            self.batches.append(mapped(_kept, new))
        enough = self.samples >= self.target and len(self.batches) >= 2
        self.ready = enough or (self.samples >= 2 and self._news < 0.1)  # of a single batch both halves are made

    def probe(self, loss_fn: LossFunction) -> Probe:
        """The probe over everything collected; a sample that several ranks collected stays with the first of them."""
        return Probe(self.batches if rank_count() == 1 else self._own(), loss_fn)

    def _own(self) -> list[Batch]:
        """The batches without samples that another rank collected earlier, or as early with a lower number.

        Where that leaves a rank without a probe, since it was given the samples of another, each keeps its own.
        """
        numbered = [[i, value] for i, prints in enumerate(self._prints) for value in prints]
        first: dict[float, tuple[float, int]] = {}
        for owner, flat in enumerate(gathered([number for pair in numbered for number in pair])):
            for i, value in zip(flat[::2], flat[1::2], strict=True):
                first[value] = min(first.get(value, (i, owner)), (i, owner))
        kept = []
        for batch, prints in zip(self.batches, self._prints, strict=True):
            rows = [i for i, value in enumerate(prints) if first[value][1] == rank()]
            kept += [select_samples(batch, torch.tensor(rows))] if rows else []
        return kept if everywhere(len(kept) >= 2) else self.batches


def _kept(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _is_plain(value: object) -> bool:
    """Whether ``torch.load(weights_only=True)`` takes a value."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))  # pyright: ignore[reportArgumentType]
    if type(value) is dict:
        return all(_is_plain(part) for item in value.items() for part in item)
    return type(value) in (Tensor, int, float, str, bool, type(None))


def _fingerprints(batch: Batch) -> list[float]:
    """A number for each sample that differs between samples: a fixed random projection of all its tensors."""
    size = batch_size(batch)
    total: Tensor | None = None
    for leaf in tensors(batch):
        if leaf.ndim and leaf.shape[0] == size:
            value = _projected(leaf, size)
            total = value if total is None else total * 0.618 + value.to(total.device)
    if total is not None:
        return total.tolist()
    samples = (select_samples(batch, torch.tensor([i])) for i in range(size))  # all tensors stand in lists
    return [sum(float(_projected(leaf, 1)) / 0.618**i for i, leaf in enumerate(tensors(one))) for one in samples]


def _projected(leaf: Tensor, size: int) -> Tensor:
    """A number for each of the tensor's rows, (size,)."""
    rows = leaf.detach() if leaf.layout is torch.strided else leaf.detach().to_dense()
    rows = (torch.view_as_real(rows.resolve_conj()) if rows.is_complex() else rows).reshape(size, -1).double()
    rows = rows.nan_to_num(0.5, 1.0, -1.0)  # nan is not even itself
    # A sum along each row, not a matrix product: its rounding does not depend on the row's place in the batch.
    return (rows * _projection(rows.shape[1], rows.device)).sum(1)


@lru_cache(maxsize=4)
def _projection(length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(length, generator=generator, dtype=torch.float64).to(device)
