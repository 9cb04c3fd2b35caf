"""The infinite schedule as its phases are written down: one learning rate per update, no shared formula."""

from __future__ import annotations

import math
from typing import Any


def learning_rate(s: int, *, eta_max: float, eta_const: float, eta_min: float, **marks: Any) -> float:
    """Return the rate of update s.

    Args:
        s: Index of the update, from 0.
        eta_max: Peak.
        eta_const: Rate of the constant phase.
        eta_min: Rate after the anneal.
        **marks: W, C, A and N, and the shapes `cooldown`, `a` and `anneal`.
    """
    w, c, a, n = marks["W"], marks["C"], marks.get("A", math.inf), marks.get("N", 1)
    if s < w:
        return eta_max * s / w
    if s < c:
        x = (s - w) / (c - w)
        shape = marks.get("cooldown", "cosine")
        if shape == "cosine":
            return eta_const + (eta_max - eta_const) / 2 * (1 + math.cos(math.pi * x))
        if shape == "linear":
            return eta_max + (eta_const - eta_max) * x
        scale = marks.get("a", 10.0)
        h_x = 1 / math.sqrt(1 + scale * x) - 1
        h_1 = 1 / math.sqrt(1 + scale) - 1
        return eta_max + (eta_const - eta_max) * h_x / h_1
    if s < a:
        return eta_const
    if s > a + n:
        return eta_min
    y = (s - a) / n
    shape = marks.get("anneal", "exponential")
    if shape == "exponential":
        return eta_const * (eta_min / eta_const) ** y
    if shape == "linear":
        return eta_const + (eta_min - eta_const) * y
    return eta_min + (eta_const - eta_min) * (1 - math.sqrt(y))
