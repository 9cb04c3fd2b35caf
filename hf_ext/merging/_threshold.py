"""The k-th largest magnitude of any number of values, exactly, from two histograms.

The bit pattern of a non-negative fp32 number grows with the number. A first pass counts the upper 15 bits of
|x| (32 768 bins), a second one the lower 16 bits of those values that share the upper bits of the k-th
largest. Counts are integers, so blocks may be of any size and come in any order, or from several processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HIGH_BINS, LOW_BINS = 1 << 15, 1 << 16
_FIRST_NON_FINITE = 0x7F80  # upper bits of infinity; those of NaN lie above
_MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude.

    Args:
        bits: Its fp32 bit pattern.
        keep_equal: How many of the values with exactly this magnitude are among the k largest.
        equal: How many values have exactly this magnitude.
    """

    bits: int
    keep_equal: int
    equal: int


def magnitude_bits(values: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the bit patterns of |x| as int32.

    Args:
        values: (n,), fp32.
        out: (n,), int32; None for a new tensor.
    """
    return torch.bitwise_and(values.view(torch.int32), _MAGNITUDE, out=out)


def high_histogram(bits: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Count the upper bits.

    Args:
        bits: (n,), from `magnitude_bits`.
        scratch: (n,), int32, overwritten; may be `bits` itself.

    Returns:
        (32768,), int64.
    """
    return torch.bincount(torch.bitwise_right_shift(bits, 16, out=scratch), minlength=HIGH_BINS)


def low_bits(bits: Tensor, high: int) -> np.ndarray:
    """Return the lower bits of the values with the given upper bits, in order.

    Args:
        bits: (n,), from `magnitude_bits`.
        high: The upper bits.

    Returns:
        (m,), uint16; m is a small share of n where magnitudes are spread out.
    """
    # numpy's comparisons and selections take a fraction of the time of torch's here.
    held = bits.numpy()
    inside = np.greater_equal(held, high << 16)
    inside &= held <= ((high << 16) | 0xFFFF)
    return held[inside].astype(np.uint16)


def low_histogram(low: np.ndarray) -> Tensor:
    """Count lower bits.

    Args:
        low: From `low_bits`.

    Returns:
        (65536,), int64.
    """
    return torch.from_numpy(np.bincount(low, minlength=LOW_BINS))


def count_equal(bits: Tensor, wanted: int) -> int:
    """Return how many of the bit patterns are the wanted one.

    Args:
        bits: (n,), from `magnitude_bits`.
        wanted: The pattern.
    """
    return int(np.count_nonzero(bits.numpy() == wanted))


def locate(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin of the k-th largest value, and its rank among the values of that bin (1 = largest).

    Args:
        counts: (bins,), int64.
        k: Rank from the largest, 1 <= k <= counts.sum().
    """
    above = counts.flip(0).cumsum(0)  # how many lie in the last 1, 2, ... bins
    place = int(torch.searchsorted(above, k))
    found = counts.numel() - 1 - place
    return found, k - (int(above[place]) - int(counts[found]))


def non_finite(counts: Tensor) -> int:
    """Return how many counted values are infinite or NaN.

    Args:
        counts: (32768,), from `high_histogram`.
    """
    return int(counts[_FIRST_NON_FINITE:].sum())


def threshold(high: int, rank: int, low_counts: Tensor) -> Threshold:
    """Return the threshold from the first pass's bin and rank, and the second pass's counts.

    Args:
        high: The bin that `locate` found in the first histogram.
        rank: The rank within it.
        low_counts: (65536,), from `low_histogram`.
    """
    low, keep = locate(low_counts, rank)
    return Threshold((high << 16) | low, keep, int(low_counts[low]))


def as_float(bits: int) -> float:
    """Return the fp32 number with this bit pattern."""
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def trim_(values: Tensor, bits: int, keep_equal: int | None) -> Tensor:
    """Set to zero, in place, every value below the threshold.

    Args:
        values: (n,), fp32.
        bits: Bit pattern of the threshold.
        keep_equal: How many of the values of exactly that magnitude stay, the first ones; None for all.
    """
    if bits == 0:  # what is cut off is zero anyway
        return values
    kept = None
    if keep_equal:
        found = np.flatnonzero(np.abs(values.numpy()) == np.float32(as_float(bits)))[:keep_equal]
        equal = torch.from_numpy(found)
        kept = (equal, values[equal])
    # hardshrink keeps |x| > limit; with the number just below the threshold it keeps |x| >= threshold.
    limit = as_float(bits if keep_equal is not None else bits - 1)
    torch.ops.aten.hardshrink.out(values, limit, out=values)
    if kept is not None:
        values[kept[0]] = kept[1]
    return values
