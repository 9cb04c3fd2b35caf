"""Progressive self-distillation as it is written: explicit targets t, and the kernel ridge regression."""

from __future__ import annotations

import torch
from torch import Tensor


def alpha(top: float, epoch: int, epochs: int) -> float:
    """Return alpha_e = alpha_T (e + 1) / E."""
    return top * (epoch + 1) / epochs


def losses(logits: Tensor, previous: Tensor | None, labels: Tensor, weight: float) -> Tensor:
    """Return -sum_v t_v log p_v at each label: logits and previous distributions (N, V), labels (N,)."""
    found = []
    for i, label in enumerate(labels.tolist()):
        p = torch.softmax(logits[i].double(), -1)
        y = torch.zeros_like(p)
        y[label] = 1.0
        q = y if previous is None else previous[i].double()
        t = (1.0 - weight) * y + weight * q
        found.append(-(t * p.log()).sum())
    return torch.stack(found)


def top_tokens(previous: Tensor, k: int, rest: str) -> Tensor:
    """Return distributions (N, V) with the k likeliest tokens alone, or the rest's mass spread evenly."""
    kept = []
    for row in previous.double():
        order = sorted(range(len(row)), key=lambda v: -float(row[v]))
        best, others = order[:k], order[k:]
        mass = float(row[best].sum())
        found = torch.zeros_like(row)
        for v in best:
            found[v] = row[v] / mass if rest == "drop" or not others else row[v]
        for v in others:
            found[v] = 0.0 if rest == "drop" else (1.0 - mass) / len(others)
        kept.append(found)
    return torch.stack(kept)


def ridge_rounds(kernel: Tensor, ridge: float, y: Tensor, truth: float, rounds: int) -> list[Tensor]:
    """Return predictions after each round of kernel ridge regression on truth * y + (1 - truth) * last."""
    smoother = kernel @ torch.linalg.inv(kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype))
    found = [smoother @ y]
    while len(found) < rounds:
        found.append(smoother @ (truth * y + (1.0 - truth) * found[-1]))
    return found


def ridge_limit(kernel: Tensor, ridge: float, y: Tensor, truth: float) -> Tensor:
    """Return what the rounds tend to: the same regression with the ridge over `truth`."""
    scaled = truth * kernel
    return scaled @ torch.linalg.inv(scaled + ridge * torch.eye(len(kernel), dtype=kernel.dtype)) @ y
