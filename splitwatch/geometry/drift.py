"""When Lanczos vectors have to be made orthogonal again: partial reorthogonalisation (Simon 1984)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Drift:
    """How far each newest vector of k Krylov spaces may have drifted from orthogonality to the older ones.

    The loss obeys a recurrence in α and β, which costs nothing next to a pass through the basis. As long as it stays
    below √ε the tridiagonal matrices are right to ε.
    """

    def __init__(self, m: int, eps: float) -> None:
        self.eps, self.again = eps, False
        self.before, self.now = torch.zeros(m, 0, dtype=torch.float64), torch.ones(m, 1, dtype=torch.float64)

    def keep(self, rows: Tensor) -> None:
        """Let go of all operators but some."""
        self.before, self.now = self.before[rows], self.now[rows]

    def grown(self, alpha: Tensor, beta: Tensor, size: Tensor, live: Tensor) -> bool:
        """Take note of step j, with alpha and beta (k, j); returns whether to reorthogonalise now."""
        j, w = alpha.shape[1], self.now
        loss = torch.zeros_like(w)
        old = slice(0, j - 1)
        loss[:, old] = (alpha[:, old] - alpha[:, j - 1 :]) * w[:, old] + beta[:, old] * w[:, 1:]
        loss[:, 1 : j - 1] += beta[:, : j - 2] * w[:, : j - 2] if j > 2 else 0
        loss[:, old] -= beta[:, j - 2, None] * self.before if j > 1 else 0
        noise = self.eps * size.double()[:, None]
        loss = (loss + noise * torch.where(loss < 0, -1, 1)) / beta[:, j - 1 :]
        worst = torch.where(live, loss.abs().amax(dim=1), 0.0)
        due = self.again or not bool((worst < self.eps**0.5).all())
        self.again = due and not self.again  # the recurrence looks two vectors back
        if due:
            loss[:] = self.eps
        self.before, self.now = w, F.pad(loss, (0, 1), value=1.0)
        return due
