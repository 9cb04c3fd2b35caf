"""Random masks by position: each entry's draw depends on seed, parent, tensor name and offset alone.

Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") turns a counter into a number, so
the draw for entry e is found without those before it: blocks of any size, in any order and from any thread
give one mask, and a further parent changes no other parent's.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_PER_COUNTER = 8  # 32-bit draws of one counter value


def draws(seed: int, parent: int, name: str, start: int, count: int) -> np.ndarray:
    """Return uniform 32-bit integers for entries start .. start + count - 1 of a tensor.

    Args:
        seed: The merge's seed.
        parent: Index of the parent.
        name: The tensor's key.
        start: First entry, in row-major order.
        count: Number of entries.

    Returns:
        (count,), uint32.
    """
    key = hashlib.sha256(f"{seed}/{parent}/{name}".encode()).digest()[:16]
    first, skip = divmod(start, _PER_COUNTER)
    generator = np.random.Philox(key=int.from_bytes(key, "little"), counter=first)
    words = -(-(skip + count) // 2)
    # "<u8" then "<u4": the same halves in the same order whatever the machine's byte order.
    raw = np.asarray(generator.random_raw(words), dtype="<u8").view("<u4")
    return raw[skip : skip + count]


def bernoulli(density: float, seed: int, parent: int, name: str, start: int, count: int) -> Tensor:
    """Return which entries are kept, each with probability `density` (rounded to 2^-32).

    Returns:
        (count,), bool.
    """
    limit = round(density * 2**32)
    if limit >= 2**32:
        return torch.ones(count, dtype=torch.bool)
    return torch.from_numpy(draws(seed, parent, name, start, count) < np.uint32(limit))
