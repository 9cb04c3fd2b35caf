"""PiSSA and QPiSSA, slow and plain: full SVDs, the residual written out, every round of QPiSSA in full."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def principal_factors(weight: Tensor, r: int, s: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return A (r, n) and B (m, r) with s B A the best approximation of rank r, in the weight's dtype."""
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    root = torch.diag((sigma[:r] / s).sqrt())
    return root @ vh[:r], u[:, :r] @ root


class ReferencePissa:
    """One layer y = x (W_res + s B A)^T.

    Args:
        weight: W0 (m, n).
        r: Rank.
        alpha: None for s = 1, else s = alpha / r.
    """

    def __init__(self, weight: Tensor, r: int, alpha: float | None = None) -> None:
        self.s = 1.0 if alpha is None else alpha / r
        a, b = principal_factors(weight, r, self.s)
        self.residual = weight - self.s * b @ a
        self.a, self.b = a.requires_grad_(), b.requires_grad_()

    def weight(self) -> Tensor:
        """Return the effective weight (m, n)."""
        return self.residual + self.s * self.b @ self.a

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., n) through the layer, without a bias."""
        return x @ self.weight().T


def qpissa(
    weight: Tensor, r: int, rounds: int, quantize: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q_T (m, n), dequantized, and the product s B A (m, n) of the last round, with its error's norm.

    Args:
        weight: W0 (m, n).
        r: Rank.
        rounds: T.
        quantize: Quantizes a weight and returns what is read back.
    """
    rest = weight
    stored, product = weight, torch.zeros_like(weight)
    for _ in range(rounds):
        a, b = principal_factors(rest, r)
        product = b @ a
        stored = quantize(weight - product)
        rest = weight - stored
    return stored, product, (weight - stored - product).norm()
