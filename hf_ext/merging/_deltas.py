"""What training has changed, as an object: two models' files, of which single tensors are read on demand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check
from ..core.lowrank import TruncatedSVD, truncated_svd
from ._checkpoint import DTYPES, Checkpoint
from ._quantized import Quantized, quantize
from ._reductions import chunk_dots


@dataclass(frozen=True, eq=False)
class TaskVector:
    """Tuned minus start.

    Args:
        tuned: The trained model.
        start: What it was trained from.
    """

    tuned: Checkpoint
    start: Checkpoint

    def names(self) -> list[str]:
        """Return the float tensors.

        Raises:
            ValueError: The models differ in names or shapes of tensors.
        """
        own, other = self.tuned.tensors, self.start.tensors
        differing = sorted(
            name
            for name in {*own, *other}
            if name not in own or name not in other or own[name].shape != other[name].shape
        )
        where = f"{self.tuned.label} and {self.start.label}"
        check(not differing, "tensors", differing[:5], "of the same names and shapes in both", where=where)
        return [name for name in own if own[name].is_float and other[name].is_float]

    def __getitem__(self, name: str) -> Tensor:
        """Return the change of one tensor, fp32."""
        return tensor_of(self.tuned, name).sub_(tensor_of(self.start, name))

    def dot(self, other: TaskVector, names: Sequence[str] | None = None) -> float:
        """Return the inner product with another one over tensors, all of them by default; fp64."""
        chosen = self.names() if names is None else names
        return math.fsum(x for name in chosen for x in chunk_dots(self[name].view(-1), other[name].view(-1)))

    def norm(self, names: Sequence[str] | None = None) -> float:
        """Return the norm over tensors, all of them by default."""
        return math.sqrt(self.dot(self, names))

    def off(self, other: TaskVector, name: str) -> Tensor:
        """Return the part of one tensor that is orthogonal to another change of it, fp32."""
        return orthogonal_part(self[name], other[name])

    def truncated(self, name: str, rank: int) -> TruncatedSVD:
        """Return the leading singular triplets of the change of a matrix."""
        return truncated_svd(self[name], rank, name=name)

    def quantized(self, name: str, bits: int, mode: str = "symmetric") -> Quantized:
        """Return the change of one tensor in few bits."""
        return quantize(self[name], bits, mode)


def tensor_of(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return one tensor of a checkpoint, fp32."""
    entry = checkpoint.tensors[name]
    raw = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
    checkpoint.read(entry, 0, raw)
    return raw.to(torch.float32, copy=True).view(entry.shape)


def orthogonal_part(change: Tensor, direction: Tensor) -> Tensor:
    """Return change - <change, direction> / <direction, direction> direction; the change where that is 0.

    Args:
        change: fp32, of any shape.
        direction: Of the same shape.
    """
    share = projection(
        math.fsum(chunk_dots(change.reshape(-1), direction.reshape(-1))),
        math.fsum(chunk_dots(direction.reshape(-1), direction.reshape(-1))),
    )
    return (change.double() - share * direction.double()).float() if share else change.clone()


def projection(product: float, square: float) -> float:
    """Return the coefficient of a projection: product / square, or 0 where there is no direction."""
    return product / square if square > 0.0 else 0.0
