"""Statistics of batch norms that are merged, from plain numbers."""

from __future__ import annotations


def pooled(means: list[float], variances: list[float]) -> tuple[float, float]:
    """Return mean and variance of an equal mixture of distributions."""
    count = len(means)
    mean = sum(means) / count
    second = sum(variance + m * m for m, variance in zip(means, variances, strict=True)) / count
    return mean, second - mean * mean
