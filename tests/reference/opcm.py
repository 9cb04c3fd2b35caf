"""OPCM as its maintained code has it: full bases, one model after another, whole models in fp64.

Written from Tang et al. 2025, algorithm 1, and the behavior of the authors' maintained code: the diagonal and
the leading block of the coefficients are cleared, the blocks beside it are not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(merged: Tensor, change: Tensor, alpha: float, drop_cross: bool = False) -> Tensor:
    """Return what of a change stays.

    Args:
        merged: M, (m, n).
        change: T, (m, n).
        alpha: Share of the spectrum.
        drop_cross: Whether the blocks beside the leading one are cleared too.
    """
    u, s, vh = torch.linalg.svd(merged.double(), full_matrices=True)
    if float(s.sum()) == 0.0:
        return change.double()
    shares = s.cumsum(0) / s.sum()
    r = next(i for i in range(len(s)) if float(shares[i]) > alpha)
    p = u.T @ change.double() @ vh.T
    rank = int((s > 1e-6 * s[0]).sum())  # the vectors of the others are not determined
    p.diagonal()[:rank] = 0.0
    p[:r, :r] = 0.0
    if drop_cross:
        p[:r] = 0.0
        p[:, :r] = 0.0
    return u @ p @ vh


def merge(
    base: dict[str, Tensor],
    models: list[dict[str, Tensor]],
    alpha: float,
    matrices: set[str],
    **options: bool,
) -> tuple[dict[str, Tensor], list[float]]:
    """Return the merged model and lambda after each step.

    Args:
        base: theta_0.
        models: theta_1, theta_2, ... in order.
        alpha: Share of the spectrum.
        matrices: Names of the tensors that are projected.
        **options: Passed on to `project`.
    """
    start = {name: value.double() for name, value in base.items()}
    merged = {name: value.double() for name, value in models[0].items()}
    scale, scales = 1.0, [1.0]
    norms = [norm({name: merged[name] - start[name] for name in start})]
    for model in models[1:]:
        sums = {}
        for name in start:
            old, new = merged[name] - start[name], model[name].double() - start[name]
            sums[name] = scale * old + (project(old, new, alpha, **options) if name in matrices else new)
        norms.append(norm({name: model[name].double() - start[name] for name in start}))
        scale = norm(sums) / (sum(norms) / len(norms))
        scales.append(scale)
        merged = {name: start[name] + sums[name] / scale for name in start}
    return merged, scales


def norm(tensors: dict[str, Tensor]) -> float:
    """Return the norm of all tensors together."""
    return float(torch.cat([value.reshape(-1) for value in tensors.values()]).norm())
