"""FedHyper's rules as loops over plain lists of numbers, for one weight vector per process.

Each round: every process takes its local steps from the common weights, then the server moves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Vector = list[float]


def dot(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def agreement(x: Vector, y: Vector, kind: str) -> float:
    nx, ny = math.sqrt(dot(x, x)), math.sqrt(dot(y, y))
    if nx < 1e-12 or ny < 1e-12:
        return 0.0
    return dot(x, y) if kind == "raw" else dot(x, y) / (nx * ny)


def clipped(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def train(
    start: Vector,
    gradient: Callable[[int, int, Vector], Vector],
    *,
    processes: int,
    rounds: int,
    local_steps: int,
    rate: float,
    variant: str = "G",
    local: str = "none",
    kind: str = "cosine",
    kappa: float = 0.1,
    gamma_alpha: float = 3.0,
    gamma_beta: float = 10.0,
    momentum: float = 0.9,
    additive: bool = False,
) -> list[Vector]:
    """Return the common weights after each round of SGD.

    Args:
        start: Common weights at the start.
        gradient: Gradient for (process, step since the start, weights).
        processes: Number of processes.
        rounds: Number of rounds.
        local_steps: Local steps of a round.
        rate: Learning rate.
        variant: "G", "GM", "SL" or "none".
        local: "CL" or "none".
        kind: "cosine" or "raw".
        kappa: Step of both rules.
        gamma_alpha: Bound of the outer factor.
        gamma_beta: Bound of the local factors.
        momentum: Of GM.
        additive: Whether CL adds.
    """
    w, before, velocity, alpha, server = list(start), None, None, 1.0, 1.0
    history = []
    for t in range(rounds):
        ends = []
        for r in range(processes):
            theta, beta, last = list(w), 1.0, None
            for k in range(local_steps):
                g = gradient(r, t * local_steps + k, theta)
                u = [-rate * server * beta * x for x in g]
                theta = [a + b for a, b in zip(theta, u, strict=True)]
                if local == "CL" and last is not None:
                    a = agreement(u, last, kind)
                    if before is not None:
                        a += agreement(u, before, kind) / processes
                    if additive:
                        beta = clipped(beta + kappa * a, 1 / gamma_beta, gamma_beta)
                    else:
                        beta *= clipped(1 + kappa * a, 1 / 1.1, 1.1)
                        beta = clipped(beta, 1 / gamma_beta, gamma_beta)
                last = u
            ends.append(theta)
        mean = [sum(column) / processes for column in zip(*ends, strict=True)]
        delta = [a - b for a, b in zip(mean, w, strict=True)]
        if variant == "GM":
            agreed = 0.0
            if velocity is not None:
                agreed = clipped(kappa * agreement(delta, velocity, kind), -0.2, 4.0)
            v = velocity or [0.0] * len(w)
            w = [m + agreed * d + momentum * agreed * x for m, d, x in zip(mean, delta, v, strict=True)]
            velocity = [d + momentum * x for d, x in zip(delta, v, strict=True)]
        else:
            if before is not None and variant == "G":
                alpha = clipped(alpha + kappa * agreement(delta, before, kind), 1 / gamma_alpha, gamma_alpha)
            if before is not None and variant == "SL":
                server = clipped(server + kappa * agreement(delta, before, kind), 1 / gamma_beta, gamma_beta)
            step = alpha if variant == "G" else 1.0
            w = [a + step * d for a, d in zip(w, delta, strict=True)]
        before = delta
        history.append(list(w))
    return history
