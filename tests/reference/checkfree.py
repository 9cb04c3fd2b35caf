"""CheckFree by hand: which layers a lost one is made of, and the weighted mean of numbers."""

from __future__ import annotations


def mean(
    left: list[float], right: list[float], omega: tuple[float, float], power: float, eps: float
) -> list[float]:
    """Return (w_l left + w_r right) / (w_l + w_r), w = (omega + eps)^power."""
    a, b = ((value + eps) ** power for value in omega)
    return [(a * x + b * y) / (a + b) for x, y in zip(left, right, strict=True)]
