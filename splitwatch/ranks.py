"""What the processes of one training run agree on; with a single process nothing is sent.

Every rank has to make the same calls in the same order, as with any collective of ``torch.distributed``.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def rank_count() -> int:
    """Number of processes that train together."""
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def is_first() -> bool:
    """Whether this is rank 0, whose clock decides."""
    return rank() == 0


def mean_over_ranks(value: float) -> float:
    """The mean of a number over the ranks."""
    return summed_number(value) / rank_count()


def everywhere(flag: bool) -> bool:
    """Whether every rank says yes."""
    return flag if rank_count() == 1 else bool(_reduced(float(flag), distributed.ReduceOp.MIN))


def largest_over_ranks(value: float) -> float:
    """The largest of a number over the ranks."""
    return value if rank_count() == 1 else _reduced(value, distributed.ReduceOp.MAX)


def gathered(value: T) -> list[T]:
    """What all ranks have, in their order."""
    found: list = [value]
    if rank_count() > 1:
        found *= rank_count()
        distributed.all_gather_object(found, value)
    return found


def rank() -> int:
    """The number of this process."""
    return 0 if rank_count() == 1 else distributed.get_rank()


def share_of(samples: int) -> float:
    """This process's share of the samples of all ranks."""
    return samples / summed_number(samples)


def _reduced(value: float, operation: distributed.ReduceOp.RedOpType) -> float:
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor, operation)
    return float(tensor)


def summed(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the ranks, the same on each, to the bit; its memory may be that of the tensor."""
    if rank_count() > 1:
        home, there = value.device, "cuda" if distributed.get_backend() == "nccl" else value.device
        value = value.to(there).contiguous()
        distributed.all_reduce(value)
        value = value.to(home)
    return value


def summed_number(value: float) -> float:
    """The sum of a number over the ranks."""
    return value if rank_count() == 1 else _reduced(value, distributed.ReduceOp.SUM)


def mean_with_error(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of values (parts, n) and its standard error, over the parts of all ranks, both (n,); nan for a single part.

    Args:
        values: what was measured on each part.
        weights: what each part counts, (parts,); those of all ranks sum to one.
    """
    parts, mean = summed_number(len(values)), summed(weights @ values)
    scatter = summed(weights @ (values - mean).square())
    return mean, (scatter / (parts - 1)).sqrt() if parts > 1 else torch.full_like(mean, torch.nan)


def paired_error(difference: Tensor, weights: Tensor) -> float:
    """Standard error of the mean of differences (parts,) of two networks' losses; see ``mean_with_error``."""
    return float(mean_with_error(difference[:, None], weights)[1])
