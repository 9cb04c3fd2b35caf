"""Reversible model merging as its paper describes it: one singular value decomposition for each position.

Written from the description of Alipour and Amiri 2025: plain loops in fp64, on peft's factors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rebuild(x: Tensor, p: int, center: bool = False) -> Tensor:
    """Return the vectors of one position from a basis of p vectors.

    Args:
        x: (r, n), one column for each model.
        p: Size of the basis.
        center: Whether the mean is taken out first and kept.
    """
    x = x.double()
    mean = x.mean(dim=1, keepdim=True) if center else torch.zeros(len(x), 1, dtype=torch.float64)
    u, _, _ = torch.linalg.svd(x - mean, full_matrices=False)
    basis = u[:, :p]
    return mean + basis @ (basis.T @ (x - mean))


def rebuild_factors(
    factors: list[Tensor], p: int, granularity: str = "position", center: bool = False
) -> list[Tensor]:
    """Return one factor of all models as rebuilt.

    Args:
        factors: (features, r) each: lora_A transposed, or lora_B.
        p: Size of the basis.
        granularity: "position" or "tensor".
        center: Whether means are taken out.
    """
    if granularity == "tensor":
        x = torch.stack([factor.reshape(-1) for factor in factors], dim=1)
        found = rebuild(x, p, center)
        return [found[:, i].view(factors[0].shape) for i in range(len(factors))]
    made = [torch.zeros(factor.shape, dtype=torch.float64) for factor in factors]
    for position in range(len(factors[0])):
        x = torch.stack([factor[position] for factor in factors], dim=1)
        found = rebuild(x, p, center)
        for i in range(len(factors)):
            made[i][position] = found[:, i]
    return made
