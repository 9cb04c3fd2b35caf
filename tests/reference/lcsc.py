"""LCSC's search and combination, plain and slow, for comparison: fp64, one list after another.

Written from the steps of the method: start from the last checkpoint, the uniform average and exponential
averages; children of two of the best by mean or uniform crossover, with noise; keep the best. The draws are
those of the fast form, so that both walk the same way.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def combination(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return sum_i alpha_i theta_i / sum_i alpha_i in fp64."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, alpha in zip(tensors, coefficients, strict=True):
        total = total + alpha * tensor.double()
    return total / math.fsum(coefficients)


def ema(count: int, rate: float) -> list[float]:
    """Return the weights of checkpoints in theta <- rate theta + (1 - rate) theta_i, of sum one."""
    weights = [0.0] * (count - 1) + [1.0]
    for index in range(count - 2, -1, -1):
        weights[index] = weights[index + 1] * rate
    return [weight / math.fsum(weights) for weight in weights]


def search(
    score: Callable[[Sequence[float]], float],
    count: int,
    *,
    population: int,
    parents: int,
    iterations: int,
    sigma: float,
    rates: Sequence[float],
    max_l2: float,
    seed: int,
) -> tuple[list[float], list[float]]:
    """Return the best coefficients and the best score after each new evaluation."""
    seen: dict[tuple[float, ...], float] = {}
    best: list[float] = []
    members: list[tuple[float, int, list[float]]] = []

    def add(alpha: list[float]) -> None:
        key = tuple(round(value, 6) + 0.0 for value in alpha)
        if key in seen:
            return
        seen[key] = score(alpha)
        best.append(min([seen[key], *best]))
        members.append((seen[key], len(seen), alpha))

    for rate in [0.0, 1.0, *rates]:
        add(ema(count, rate))
    for number in range(iterations):
        members.sort()
        del members[population:]
        draw = random.Random(f"{seed}/{number}")
        mother, father = draw.sample([alpha for _, _, alpha in members[:parents]], 2)
        if draw.random() < 0.5:
            free = [(mother[i] + father[i]) / 2 for i in range(1, count)]
        else:
            free = []
            for i in range(1, count):
                free.append(mother[i] if draw.random() < 0.5 else father[i])
        for i in range(len(free)):
            free[i] = free[i] + draw.gauss(0.0, sigma)
        norm = math.hypot(*free)
        if norm > max_l2:
            free = [value * max_l2 / norm for value in free]
        add([1.0 - math.fsum(free), *free])
    members.sort()
    return members[0][2], best
