"""TIES as its paper and three implementations of it have it: slow, plain, on flat task vectors in fp64.

Written from Yadav et al. 2023, algorithm 1, and from the behavior of the authors' code, of PEFT 0.21 and of
mergekit 0.1.5; `rule` chooses among them, "ours" is this library's default.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def trim(tau: Tensor, density: float, rule: str = "ours") -> Tensor:
    """Keep the entries of largest magnitude.

    Args:
        tau: (d,).
        density: Share that is kept.
        rule: "ours", "reference", "peft" or "mergekit".
    """
    d = tau.numel()
    if density >= 1.0:
        return tau.clone()
    order = sorted(range(d), key=lambda p: (-abs(float(tau[p])), p))  # equal ones by index
    if rule == "reference":
        k = d - int(d * density)
        limit = sorted(abs(float(x)) for x in tau)[k - 1]
        return torch.where(tau.abs() >= limit, tau, torch.zeros_like(tau))
    k = math.floor(density * d + 1e-9) if rule == "ours" else max(1, int(density * d))
    kept = torch.zeros_like(tau)
    for p in order[:k]:
        kept[p] = tau[p]
    return kept


def merge(
    taus: Tensor,
    density: float,
    weights: list[float] | None = None,
    *,
    rule: str = "ours",
    elect: str = "mass",
    combine: str = "mean",
) -> Tensor:
    """Return the merged task vector.

    Args:
        taus: (n, d).
        density: Share that is kept of each.
        weights: One for each model; None for 1.
        rule: Whose rules.
        elect: "mass" or "count".
        combine: "mean", "sum" or "max".
    """
    n, d = taus.shape
    weights = weights or [1.0] * n
    kept = torch.stack([trim(tau.double(), density, rule) for tau in taus])
    before = (
        torch.ones(n, dtype=torch.float64)
        if rule in ("peft", "reference")
        else torch.tensor(weights).double()
    )
    voting = kept * before[:, None]
    gammas = []
    for p in range(d):
        score = float(voting[:, p].sum()) if elect == "mass" else float(voting[:, p].sign().sum())
        gammas.append(math.copysign(1.0, score) if score else 0.0)
    if rule == "reference":
        majority = sum(gammas)
        gammas = [g or (1.0 if majority > 0 else -1.0) for g in gammas]
    gammas = [g or 1.0 for g in gammas]
    merged = torch.zeros(d, dtype=torch.float64)
    for p in range(d):
        agree = [t for t in range(n) if float(voting[t, p]) * gammas[p] > 0]
        if not agree:
            continue
        if rule == "peft":
            merged[p] = sum(weights[t] * float(kept[t, p]) for t in agree) / len(agree)
            continue
        total = sum(float(voting[t, p]) for t in agree)
        if combine == "mean":
            shares = sum(float(before[t]) for t in agree)
            merged[p] = total / shares if shares else 0.0
        elif combine == "sum":
            merged[p] = total
        else:
            merged[p] = gammas[p] * max(abs(float(voting[t, p])) for t in agree)
    return merged
