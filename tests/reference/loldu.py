"""LoLDU, slow and plain: elimination entry by entry, and the paper's z with its residual weight."""

from __future__ import annotations

import torch
from torch import Tensor


def eliminate(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Return P L (m, k), D (k,), U (k, n) and the pivot rows, by elimination with partial pivoting."""
    m, n = weight.shape
    k = min(m, n)
    rest = weight.clone()
    rows = list(range(m))
    lower, d, upper = weight.new_zeros(m, k), weight.new_ones(k), weight.new_zeros(k, n)
    for i in range(k):
        best = max(range(i, m), key=lambda j: (abs(float(rest[rows[j], i])), -j))
        rows[i], rows[best] = rows[best], rows[i]
        pivot = rows[i]
        lower[pivot, i] = 1.0
        upper[i, i:] = rest[pivot, i:]
        if float(rest[pivot, i]) != 0.0:
            d[i] = rest[pivot, i]
            for row in rows[i + 1 :]:
                lower[row, i] = rest[row, i] / d[i]
                rest[row] = rest[row] - lower[row, i] * rest[pivot]
        upper[i] = upper[i] / d[i]
    return lower, d, upper, rows[:k]


class ReferenceLoldu:
    """One layer y = x (W_res + s L_r diag(z) U_r)^T, with z trained.

    Args:
        weight: W0 (m, n).
        r: Rank.
        alpha: None for s = 1, else s = alpha / r.
    """

    def __init__(self, weight: Tensor, r: int, alpha: float | None = None) -> None:
        lower, d, upper, _ = eliminate(weight)
        self.s = 1.0 if alpha is None else alpha / r
        self.lower, self.upper = lower[:, :r], upper[:r]
        self.residual = weight - self.s * self.lower @ torch.diag(d[:r]) @ self.upper
        self.z = d[:r].clone().requires_grad_()

    def weight(self) -> Tensor:
        """Return the effective weight (m, n)."""
        return self.residual + self.s * self.lower @ torch.diag(self.z) @ self.upper

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., n) through the layer, without a bias."""
        return x @ self.weight().T
