"""PACED's weights and loss, one problem and one token at a time, in plain double precision."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def weight(p: float, alpha: float, beta: float) -> float:
    """Return p^alpha (1 - p)^beta, with 0^0 = 1."""
    return (1.0 if alpha == 0 else p**alpha) * (1.0 if beta == 0 else (1.0 - p) ** beta)


def weights(counts: Sequence[int], rollouts: int, alpha: float = 1.0, beta: float = 1.0) -> list[float]:
    """Return the weights of problems with these counts of passes, of mean 1."""
    raw = [weight(c / rollouts, alpha, beta) for c in counts]
    return [w * len(raw) / sum(raw) for w in raw]


def expected_raw_weight(p: float, rollouts: int) -> float:
    """Return E[q (1 - q)] of the share q of passes among the rollouts."""
    total = 0.0
    for c in range(rollouts + 1):
        chance = math.comb(rollouts, c) * p**c * (1 - p) ** (rollouts - c)
        total += chance * (c / rollouts) * (1 - c / rollouts)
    return total


def draws(found: Sequence[float], rng: random.Random) -> list[int]:
    """Return as many rows as there are, by systematic resampling, walking along the weights."""
    step, point = sum(found) / len(found), rng.random()
    drawn, end, row = [], found[0], 0
    for number in range(len(found)):
        while (number + point) * step >= end:
            row += 1
            end += found[row]
        drawn.append(row)
    return drawn


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    """Return KL(p || q) in nats."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def batch_loss(
    rows: Sequence[Sequence[tuple[Sequence[float], Sequence[float]]]], w: Sequence[float]
) -> float:
    """Return sum_i w_i sum_t KL(p_it || q_it) over all tokens, for rows of pairs (p, q)."""
    tokens = sum(len(row) for row in rows)
    return sum(w[i] * sum(kl(p, q) for p, q in row) for i, row in enumerate(rows)) / tokens
