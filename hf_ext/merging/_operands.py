"""What a block is read from, and the buffers it is read into."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ._base import TensorInfo
from ._checkpoint import DTYPES, Checkpoint, Entry
from ._layout import Slot

Made: TypeAlias = tuple[list[tuple[Slot, Tensor]], dict[str, float]]


class Workspace(threading.local):
    """Buffers that a thread uses again for every block, by purpose and type."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, key: str, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a flat buffer; its content is what it was last used for."""
        held = self._buffers.get((key, dtype))
        if held is None or held.numel() < numel:
            held = self._buffers[key, dtype] = torch.empty(numel, dtype=dtype)
        return held[:numel]


class Operand(Protocol):
    """A tensor of which blocks can be read as fp32."""

    @property
    def label(self) -> str:
        """Name of the model that it belongs to."""
        ...

    def read(self, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
        """Fill `out` (fp32, flat) with the elements start .. stop - 1."""
        ...


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        entry: The tensor.
    """

    checkpoint: Checkpoint
    entry: Entry

    @property
    def label(self) -> str:
        """Name of the checkpoint."""
        return self.checkpoint.label

    def read(self, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
        dtype = DTYPES[self.entry.dtype]
        if dtype == torch.float32:
            self.checkpoint.read(self.entry, start, out)
            return
        raw = workspace.take("raw", stop - start, dtype)
        self.checkpoint.read(self.entry, start, raw)
        out.copy_(raw)


@dataclass(frozen=True, eq=False)
class Task:
    """One output tensor and what it is made of.

    Args:
        info: The tensor as the method sees it.
        slot: Its place in the output; None where `make` or `finish` says where results go.
        operands: Those of the method; a single one is copied where `merged` is false.
        base: The base's tensor, or None.
        merged: Whether the method is asked, or the operand is copied.
        subtract: Whether operands are weights of which the base is to be taken, for task vectors.
        add_base: Whether the base is to be added to what the method returns.
        make: Returns what to write, and numbers for the manifest, without the method's `map`.
        finish: Returns the same from the method's result for the whole tensor.
    """

    info: TensorInfo
    slot: Slot | None
    operands: tuple[Operand, ...]
    base: Operand | None
    merged: bool = True
    subtract: bool = False
    add_base: bool = False
    make: Callable[[Task], Made] | None = None
    finish: Callable[[Task, Tensor], Made] | None = None
