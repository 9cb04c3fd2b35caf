"""Bone, slow and plain: delta W entry by entry and block by block, one matrix, autograd for everything."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_delta(d: Tensor, m: int, n: int) -> Tensor:
    """Return delta W (m, n) of the plain form, for D (r, m): output o sees D[i mod r, o] at input i."""
    r = d.shape[0]
    return torch.stack([torch.stack([d[i % r, o] for i in range(n)]) for o in range(m)])


def mini_delta(d: Tensor, m: int, n: int) -> Tensor:
    """Return delta W (m, n) of the mini form, for D (r, mini_r): the plain one of D, repeated for outputs."""
    return plain_delta(torch.cat([d] * (m // d.shape[1]), dim=1), m, n)


def bat_delta(w: Tensor, b: Tensor) -> Tensor:
    """Return delta W of the bat form, (W_ab + I) B_a for each r x r block of W (m, n); B is (m / r, r, r)."""
    r = b.shape[1]
    unit = torch.eye(r, dtype=w.dtype)
    rows = [
        torch.cat([(block + unit) @ b[a] for block in strip.split(r, dim=1)], dim=1)
        for a, strip in enumerate(w.split(r, dim=0))
    ]
    return torch.cat(rows, dim=0)


def chained(w: Tensor, steps: list[tuple[str, Tensor]]) -> Tensor:
    """Return the weight (m, n) that (form, block) steps make of W, each acting on what the last has left."""
    for form, block in steps:
        if form == "bat":
            w = w + bat_delta(w, block)
        else:
            w = w + (plain_delta if form == "plain" else mini_delta)(block, *w.shape)
    return w
