"""SORSA, slow and plain: every variable of the paper, one matrix, autograd for everything."""

from __future__ import annotations

import torch
from torch import Tensor


class ReferenceSorsa:
    """One layer y = x (W_res + s B diag(S) A)^T + b, with the penalty in the gradient by autograd.

    Args:
        weight: W0 (m, n).
        r: Rank.
        alpha: None for s = 1, else s = alpha / r.
        eps: Smoothing of the norms, in units of sqrt(r).
    """

    def __init__(self, weight: Tensor, r: int, alpha: float | None = None, eps: float = 0.0) -> None:
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        self.s = 1.0 if alpha is None else alpha / r
        self.a = vh[:r].clone().requires_grad_()
        self.b = u[:, :r].clone().requires_grad_()
        self.sigma = (sigma[:r] / self.s).clone().requires_grad_()
        self.residual = weight - u[:, :r] @ torch.diag(sigma[:r]) @ vh[:r]
        self.r, self.eps = r, eps

    def weight(self) -> Tensor:
        """Return the effective weight (m, n)."""
        return self.residual + self.s * self.b @ torch.diag(self.sigma) @ self.a

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., n) through the layer, without a bias."""
        return x @ self.weight().T

    def penalty(self) -> Tensor:
        """Return R of this one layer: the mean of the two smoothed norms."""
        e = self.eps * self.r**0.5
        unit = torch.eye(self.r, dtype=self.a.dtype)
        norms = [
            (m.square().sum() + e * e).sqrt() - e
            for m in (self.a @ self.a.T - unit, self.b.T @ self.b - unit)
        ]
        return (norms[0] + norms[1]) / 2
