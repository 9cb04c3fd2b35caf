"""Where every byte of the output will lie, known before the first one is computed."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.checks import check
from ._checkpoint import DTYPES, INDEX, SINGLE

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Slot:
    """The place of one output tensor.

    Args:
        name: Its key.
        dtype: Name of the stored type, such as "BF16".
        shape: Its shape.
        file: Index of the file.
        offset: First byte, from the start of the file.
        nbytes: Its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class File:
    """One output file: its name, its header with the length before it, and its size in bytes."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Layout:
    """The output files and the place of each tensor.

    Args:
        files: In order.
        slots: By tensor name.
    """

    files: tuple[File, ...]
    slots: Mapping[str, Slot]

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def index(self) -> dict[str, object] | None:
        """Return the content of the index file, or None where one file holds all."""
        if len(self.files) == 1:
            return None
        slots = self.slots.values()
        numel = sum(slot.nbytes // DTYPES[slot.dtype].itemsize for slot in slots)
        return {
            "metadata": {"total_size": sum(slot.nbytes for slot in slots), "total_parameters": numel},
            "weight_map": {slot.name: self.files[slot.file].name for slot in slots},
        }


def plan_layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], max_shard_size: int, stem: str = "model"
) -> Layout:
    """Cut tensors into files in the order of their names.

    Args:
        tensors: Name, type and shape of each.
        max_shard_size: Bytes of tensors in a file; a larger tensor gets a file of its own.
        stem: Start of the files' names.
    """
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    filled = 0
    for name, dtype, shape in sorted(tensors):
        nbytes = DTYPES[dtype].itemsize
        for size in shape:
            nbytes *= size
        if shards[-1] and filled + nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape, nbytes))
        filled += nbytes
    files: list[File] = []
    slots: dict[str, Slot] = {}
    for number, shard in enumerate(shards):
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        # Wide types first keeps every tensor aligned to its type, as the format's own writer does.
        ordered = sorted(shard, key=lambda item: (-DTYPES[item[1]].itemsize, item[0]))
        header, size = _header(ordered)
        place = len(header)
        for tensor, dtype, shape, nbytes in ordered:
            slots[tensor] = Slot(tensor, dtype, shape, number, place, nbytes)
            place += nbytes
        files.append(File(name, header, size))
    return Layout(tuple(files), dict(sorted(slots.items())))


def _header(tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> tuple[bytes, int]:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, dtype, shape, nbytes in tensors:
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + nbytes]}
        place += nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + place


def parse_size(field: str, value: int | str) -> int:
    """Return a number of bytes from a number or a text such as "5GB" (10^9 bytes) or "2GiB" (2^30).

    Raises:
        ValueError: It is neither, or less than one million bytes.
    """
    rule = "a size such as '5GB', at least '1MB'"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        check(match is not None and match[2].upper() in _UNITS, field, value, rule)
        assert match is not None
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    else:
        check(type(value) is int, field, value, rule)
        size = value
    check(size >= 10**6, field, value, rule)
    return size


__all__ = ["INDEX", "SINGLE", "File", "Layout", "Slot", "parse_size", "plan_layout"]
