"""Averages of a sequence of weights as plain sums over it, in fp64."""

from __future__ import annotations

import math


def ema(
    start: list[float],
    thetas: list[list[float]],
    decay: float,
    *,
    warmup: bool = False,
    bias_correction: bool = False,
) -> list[float]:
    """Return sum_t w_t theta_t with the weights of an EMA written out.

    Args:
        start: Weights before the first update.
        thetas: Those after each update.
        decay: beta.
        warmup: Whether the t-th update has min(beta, (1 + t) / (10 + t)).
        bias_correction: Whether the start does not count, and the weights sum to 1 without it.
    """
    betas = [min(decay, (1 + t) / (10 + t)) if warmup else decay for t in range(1, len(thetas) + 1)]
    weights = [(1 - beta) * math.prod(betas[t + 1 :]) for t, beta in enumerate(betas)]
    left = math.prod(betas)
    found = [sum(w * theta[i] for w, theta in zip(weights, thetas, strict=True)) for i in range(len(start))]
    if bias_correction:
        return [value / sum(weights) for value in found]
    return [value + left * first for value, first in zip(found, start, strict=True)]


def mean(samples: list[list[float]]) -> list[float]:
    """Return the mean of some weights."""
    return [math.fsum(column) / len(samples) for column in zip(*samples, strict=True)]
