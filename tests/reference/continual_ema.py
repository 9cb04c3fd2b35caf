"""Continual EMA as the authors' code has it, for one tensor as a list of numbers, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence


def l1(values: Sequence[float]) -> float:
    """Return the sum of magnitudes."""
    return math.fsum(abs(value) for value in values)


def alpha(
    theta: Sequence[float],
    ema: Sequence[float],
    g: Sequence[float],
    g_prev: Sequence[float] | None,
    fallback: float = 0.01,
    factor: float = 2.0,
) -> float:
    """Return the weight of the new weights at a step."""
    if g_prev is None:
        return fallback
    a = l1([x - y for x, y in zip(theta, ema, strict=True)])
    b = l1(g)
    c = l1([x - y for x, y in zip(g, g_prev, strict=True)])
    if a * c == 0.0:
        return fallback
    value = factor * (1.0 + b) / (a * c)
    return value if 0.0 < value < 1.0 else fallback


def average(
    start: Sequence[float],
    thetas: Sequence[Sequence[float]],
    gradients: Sequence[Sequence[float]],
    fallback: float,
) -> list[float]:
    """Return theta* after all steps, from the weights before the first."""
    ema, g_prev = list(start), None
    for theta, g in zip(thetas, gradients, strict=True):
        weight = alpha(theta, ema, g, g_prev, fallback)
        ema = [(1.0 - weight) * old + weight * new for old, new in zip(ema, theta, strict=True)]
        g_prev = g
    return ema
