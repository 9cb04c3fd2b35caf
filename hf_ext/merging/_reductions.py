"""Sums over a tensor that do not depend on how it is cut into blocks.

Blocks begin at multiples of `CHUNK` elements. Each chunk is summed by itself in fp64, and the sums of the
chunks are added exactly (`math.fsum`), so that only the chunks, which are fixed, decide the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 14  # elements; blocks are multiples of it


def chunk_sums(values: Tensor) -> list[float]:
    """Return the fp64 sum of each chunk of a block's values.

    Args:
        values: (n,), fp32 or fp64.
    """
    flat = values.reshape(-1)
    whole = flat.numel() // CHUNK * CHUNK
    sums = flat[:whole].view(-1, CHUNK).sum(dim=1, dtype=torch.float64).tolist()
    if whole < flat.numel():
        sums.append(float(flat[whole:].sum(dtype=torch.float64)))
    return sums


def chunk_dots(a: Tensor, b: Tensor) -> list[float]:
    """Return the fp64 inner product of each chunk of two blocks.

    Args:
        a: (n,), fp32.
        b: (n,), fp32.
    """
    sums: list[float] = []
    for start in range(0, a.numel(), CHUNK):  # small enough for the fp64 copies to stay in the cache
        x, y = a[start : start + CHUNK].double(), b[start : start + CHUNK].double()
        sums.append(float((x * y).sum()))
    return sums
