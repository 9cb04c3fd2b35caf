"""The refined schedule with plain loops, every variable of the paper kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median


def median_filtered(G: Sequence[float], tau: float) -> list[float]:
    """Return the filtered norms; left of the first value stands the first, right of the last the mirror."""
    T = len(G)
    W = 2 * math.floor(math.floor(tau * T) / 2) + 1
    while W > 1 and W > T / 2:
        W -= 2
    h = W // 2

    def at(i: int) -> float:
        if i < 0:
            return G[0]
        return G[i] if i < T else G[2 * (T - 1) - i]

    return [median(at(i + d) for d in range(-h, h + 1)) for i in range(T)]


def schedule(G: Sequence[float], *, norm: str, tau: float, drop_zero: bool) -> list[float]:
    """Return the normalized schedule of T updates."""
    G_hat = median_filtered(G, tau)
    if drop_zero:
        G_hat = [*G_hat, G_hat[-1]]
    w = [1 / g if norm == "l1" else 1 / g**2 for g in G_hat]
    eta = []
    for t in range(len(w)):
        tail = 0.0
        for p in range(t + 1, len(w)):
            tail += w[p]
        eta.append(w[t] * tail / sum(w))
    if drop_zero:
        eta = eta[:-1]
    return [value / max(eta) for value in eta]
