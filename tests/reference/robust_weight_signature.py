"""Robust weight signatures as the paper has them, on plain tensors in fp64, and uniform codes in plain loops.

Written from Cai, Zhang and Wang 2023 and the behavior of their quantizer, whose argument is the number of
levels.
"""

from __future__ import annotations

from torch import Tensor


def signature(start: Tensor, clean: Tensor, robust: Tensor) -> Tensor:
    """Return s = v - <v, a> / <a, a> a for one tensor."""
    a, v = (clean.double() - start.double()), (robust.double() - start.double())
    square = float((a * a).sum())
    return v - (float((v * a).sum()) / square) * a if square else v


def uniform(values: list[float], levels: int) -> list[float]:
    """Return values rounded to evenly spaced levels from the least to the largest."""
    low, high = min(values), max(values)
    if low == high:
        return list(values)
    return [
        round((x - low) / (high - low) * (levels - 1)) / (levels - 1) * (high - low) + low for x in values
    ]
