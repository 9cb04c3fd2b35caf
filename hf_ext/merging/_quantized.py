"""Tensors in few bits: uniform codes with one range for a tensor, packed without gaps.

"symmetric" has an exact zero and one scale; "minmax" spreads its levels from the least to the largest value;
"log" stores a sign and the logarithm of the magnitude, for values of very different sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check, check_choice

MODES = ("symmetric", "minmax", "log")
BITS = (*range(2, 9), 16, 32)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized tensor.

    Args:
        codes: Packed codes, uint8; int16 for 16 bits; the fp32 values themselves for 32.
        limits: (2,), fp32: the range that the codes cover; both 0 where all values are 0.
        shape: Of the tensor.
        bits: Bits of a code.
        mode: One of `MODES`.
    """

    codes: Tensor
    limits: Tensor
    shape: tuple[int, ...]
    bits: int
    mode: str

    @property
    def nbytes(self) -> int:
        """Bytes of codes and range."""
        return self.codes.numel() * self.codes.element_size() + 8

    def values(self) -> Tensor:
        """Return the tensor, fp32."""
        if self.bits == 32:
            return self.codes.view(self.shape).clone()
        numel = torch.Size(self.shape).numel()
        codes = _unpacked(self.codes, self.bits, numel)
        low, high = self.limits.double().tolist()
        return _decoded(codes, low, high, 1 << self.bits, self.mode).float().view(self.shape)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return what to store under a name."""
        return {f"{name}.codes": self.codes, f"{name}.limits": self.limits}


def stored(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], bits: int, mode: str
) -> Quantized:
    """Return what `Quantized.tensors` has stored."""
    return Quantized(tensors[f"{name}.codes"], tensors[f"{name}.limits"], shape, bits, mode)


def quantize(values: Tensor, bits: int, mode: str = "symmetric") -> Quantized:
    """Return a tensor in few bits.

    Args:
        values: fp32, finite.
        bits: 2 to 8, 16, or 32 for fp32 as it is.
        mode: One of `MODES`.

    Raises:
        ValueError: A setting is outside its range.
    """
    check(bits in BITS, "bits", bits, "2 to 8, 16 or 32")
    check_choice("quant_mode", mode, MODES)
    flat, shape = values.detach().float().reshape(-1).contiguous(), tuple(values.shape)
    if bits == 32:
        return Quantized(flat.clone(), torch.zeros(2), shape, bits, mode)
    codes, low, high = encoded(flat.double(), 1 << bits, mode)
    return Quantized(_packed(codes, bits), torch.tensor([low, high]), shape, bits, mode)


def encoded(values: Tensor, levels: int, mode: str) -> tuple[Tensor, float, float]:
    """Return codes from 0 to levels - 1 and the range that they cover.

    Args:
        values: (n,), fp64.
        levels: At least 3.
        mode: One of `MODES`.
    """
    empty = not values.numel()
    if mode == "minmax":
        low, high = (0.0, 0.0) if empty else (float(values.min()), float(values.max()))
        if high == low:
            return torch.zeros(values.shape, dtype=torch.int64), low, high
        return ((values - low) / (high - low) * (levels - 1)).round().long(), low, high
    half = (levels - 1) // 2  # codes of one sign
    largest = 0.0 if empty else float(values.abs().max())
    if largest == 0.0:
        return torch.full(values.shape, half), 0.0, 0.0
    if mode == "symmetric":
        return (values / largest * half).round().long() + half, -largest, largest
    logs = values.abs().log2()
    present = values != 0.0
    low, high = float(logs[present].min().float()), float(logs[present].max().float())
    place = (logs - low) / (high - low) * (half - 1) if high > low else torch.zeros_like(logs)
    size = torch.where(present, place, 0.0).round().long() + 1
    return torch.where(present, size * values.sign().long(), 0) + half, low, high


def _decoded(codes: Tensor, low: float, high: float, levels: int, mode: str) -> Tensor:
    if mode == "minmax":
        return codes.double() / (levels - 1) * (high - low) + low
    half = (levels - 1) // 2
    steps = codes - half
    if mode == "symmetric":
        return steps.double() / half * high
    span = (high - low) / (half - 1) if half > 1 else 0.0
    return torch.where(steps != 0, steps.sign() * torch.exp2((steps.abs() - 1) * span + low), 0.0)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Return codes one after another, the lowest bit first."""
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 16:
        return (codes - (1 << 15)).to(torch.int16)
    flags = (codes[:, None] >> torch.arange(bits)) & 1
    flags = torch.nn.functional.pad(flags.reshape(-1), (0, -flags.numel() % 8)).view(-1, 8)
    return (flags << torch.arange(8)).sum(dim=1).to(torch.uint8)


def _unpacked(codes: Tensor, bits: int, numel: int) -> Tensor:
    if bits == 8:
        return codes.long()
    if bits == 16:
        return codes.long() + (1 << 15)
    flags = (codes.long()[:, None] >> torch.arange(8)) & 1
    return (flags.reshape(-1)[: numel * bits].view(numel, bits) << torch.arange(bits)).sum(dim=1)
