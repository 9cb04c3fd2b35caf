"""The tests for the batch size by their definition, with the gradient of every sample.

Lau, Liu and Kolar 2024, arXiv 2402.11215, section 3; every sum is written out, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def variances(gradients: Tensor, weights: Tensor | None = None) -> tuple[float, float, float, float]:
    """Return |g|^2, V1, V2 and V3.

    Args:
        gradients: (B, d) gradient of each sample.
        weights: (d,) that each product of two coordinates is multiplied by; None for ones.
    """
    gradients = gradients.double()
    count = len(gradients)
    weights = torch.ones(gradients.shape[1]) if weights is None else weights
    weights = weights.double()

    def inner(a: Tensor, b: Tensor) -> float:
        return float((a * b * weights).sum())

    mean = torch.zeros(gradients.shape[1], dtype=torch.float64)
    for gradient in gradients:
        mean += gradient / count
    norm = inner(mean, mean)
    v1 = v2 = v3 = 0.0
    for gradient in gradients:
        along = inner(gradient, mean)
        across = gradient - along / norm * mean
        v1 += inner(gradient - mean, gradient - mean) / (count - 1)
        v2 += (along - norm) ** 2 / (count - 1)
        v3 += inner(across, across) / (count - 1)
    return norm, v1, v2, v3


def weighted_variance(gradients: Tensor, shares: Tensor, samples: int) -> tuple[float, float]:
    """Return |g|^2 and V1 where micro-batches have unequal shares of the loss.

    The variance of micro-batch m's gradient is v / (samples p_m), so that sum_m p_m |g_m - g|^2 has the
    expectation v (M - 1) / samples.

    Args:
        gradients: (M, d) gradient of each micro-batch's mean loss.
        shares: (M,) p_m, of sum 1.
        samples: Samples of all micro-batches.
    """
    gradients, shares = gradients.double(), shares.double()
    mean = (shares[:, None] * gradients).sum(0)
    spread = sum(float(p) * float((g - mean).square().sum()) for p, g in zip(shares, gradients, strict=True))
    return float(mean.square().sum()), samples * spread / (len(shares) - 1)


def required(
    gradients: Tensor, test: str, *, eta: float, theta: float, nu: float, sizes: list[int] | None = None
) -> float:
    """Return the batch that a test asks for.

    Args:
        gradients: (B, d).
        test: As in the method.
        eta: Tolerances.
        theta: Tolerances.
        nu: Tolerances.
        sizes: Elements of each parameter tensor, for the coordinate test.
    """
    norm, v1, v2, v3 = variances(gradients)
    if test == "norm":
        return v1 / (eta**2 * norm)
    if test == "inner_product":
        return v2 / (theta**2 * norm**2)
    if test == "augmented":
        return max(v2 / (theta**2 * norm**2), v3 / (nu**2 * norm))
    assert sizes is not None
    quotients = []
    for part in gradients.split(sizes, dim=1):
        part_norm, part_variance, _, _ = variances(part)
        quotients.append(part_variance / (eta**2 * part_norm))
    return float(torch.tensor(quotients, dtype=torch.float64).quantile(0.9))


def next_batch(batch: int, wanted: float, batch_max: int) -> int:
    """Return the next update's batch."""
    if math.ceil(wanted) > batch:
        return min(math.ceil(wanted), batch_max)
    return batch
