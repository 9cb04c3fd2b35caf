"""A saved model seen through its headers: which tensor lies where. Nothing is loaded or run.

Files are read with `pread` into the caller's buffer and never mapped: a file that another process cuts
short is then an error of this library and not a bus error, and what has been read counts as the caller's
memory alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..core.files import read_json, tensor_header

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHERS = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
DTYPES = {**FLOATS, **_OTHERS}
SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Args:
        name: Its key.
        path: The file.
        dtype: Name of the type as the format spells it, such as "BF16".
        shape: Its shape.
        offset: First byte, from the start of the file.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def is_float(self) -> bool:
        """Whether it can be merged, rather than copied only."""
        return self.dtype in FLOATS


class Checkpoint:
    """The safetensors files of a folder, a model's or an adapter's.

    Args:
        folder: The folder.
        label: How texts name it; None for the folder's name.
        revision: Commit on the Hub, where it came from there.

    Raises:
        FileNotFoundError: The folder, or a shard that the index names, does not exist.
        ValueError: The folder has pickle files only, a file is damaged, or a path leads out of the folder;
            the text names the file.
    """

    def __init__(self, folder: str | Path, label: str | None = None, revision: str | None = None) -> None:
        self.folder = Path(folder)
        self.label = label or self.folder.resolve().name
        self.revision = revision
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: there is no such folder")
        self.is_adapter, names, weight_map = self._weight_files()
        self.files = tuple(self._inside(name) for name in names)
        self.tensors = self._index(weight_map)
        self.config = self._json("adapter_config.json" if self.is_adapter else "config.json")

    def _weight_files(self) -> tuple[bool, list[str], Mapping[str, str] | None]:
        if (self.folder / SINGLE).exists():
            return False, [SINGLE], None
        if (self.folder / INDEX).exists():
            weight_map = _weight_map(self._inside(INDEX))
            return False, sorted(set(weight_map.values())), weight_map
        if (self.folder / ADAPTER).exists():
            return True, [ADAPTER], None
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{self.folder} holds pickle files ({', '.join(pickles)}), which run code when they are "
                "read; save the model as safetensors first"
            )
        raise FileNotFoundError(f"{self.folder} holds neither {SINGLE}, {INDEX} nor {ADAPTER}")

    def _inside(self, name: str) -> Path:
        path, root = self.folder / name, self.folder.resolve()
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing")
        real = path.resolve()
        allowed = [root]
        if root.parent.name == "snapshots":  # the Hub's cache links into its own folder of blobs
            allowed.append(root.parent.parent / "blobs")
        if not any(real.is_relative_to(folder) for folder in allowed):
            raise ValueError(f"{path} leads out of its folder, to {real}; it is not followed")
        if not real.is_file():
            raise ValueError(f"{path} is not a file")
        return path

    def _index(self, weight_map: Mapping[str, str] | None) -> dict[str, Entry]:
        tensors: dict[str, Entry] = {}
        for path in self.files:
            for entry in _entries(path):
                if entry.name in tensors:
                    raise ValueError(f"{self.folder}: {entry.name} stands in two files")
                tensors[entry.name] = entry
        if weight_map is not None:
            wrong = sorted(
                name
                for name in {*weight_map, *tensors}
                if name not in tensors or tensors[name].path.name != weight_map.get(name)
            )
            if wrong:
                raise ValueError(f"{self.folder / INDEX} and its shards disagree about: {', '.join(wrong)}")
        return dict(sorted(tensors.items()))

    def _json(self, name: str) -> dict[str, Any]:
        if not (self.folder / name).exists():
            return {}
        content = read_json(self._inside(name))
        if not isinstance(content, dict):
            raise ValueError(f"{self.folder / name} must hold a JSON object, got {type(content).__name__}")
        return cast(dict[str, Any], content)

    def view(self, tensors: Mapping[str, Entry]) -> Checkpoint:
        """Return the checkpoint with some of its tensors, under these names; its files are shared."""
        found = copy.copy(self)
        found.tensors = dict(sorted(tensors.items()))
        return found

    # Reading --------------------------------------------------------------------------------------

    def read(self, entry: Entry, start: int, out: Tensor) -> None:
        """Fill a contiguous buffer of the entry's own dtype with its elements from `start` on.

        Raises:
            ValueError: The file ends too early.
            OSError: The file cannot be read.
        """
        view = out.view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        place, end = entry.offset + start * entry.itemsize, len(view)
        descriptor, done = self._descriptor(entry.path), 0
        while done < end:
            count = os.preadv(descriptor, [view[done:]], place + done)
            if count == 0:
                raise ValueError(f"{entry.path} was cut short while it was read ({entry.name})")
            done += count

    def read_raw(self, entry: Entry, start: int, nbytes: int) -> bytes:
        """Return bytes of an entry, from byte `start` of it on."""
        return os.pread(self._descriptor(entry.path), nbytes, entry.offset + start)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    # Identity -------------------------------------------------------------------------------------

    def state(self) -> list[list[object]]:
        """Return names, sizes and times of the weight files: what tells whether they have been changed."""
        found = [(path, path.stat()) for path in self.files]
        return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in found]

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of a weight file; the Hub's cache has it as the name of the blob."""
        real = path.resolve()
        if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
            return real.name
        return file_digest(path)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _weight_map(path: Path) -> dict[str, str]:
    content = read_json(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map")
    for name, file in cast(dict[str, object], weight_map).items():
        plain = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
        if not plain or "\\" in str(file):
            raise ValueError(
                f"{path}: {name} points to {file!r}, which is no safetensors file of this folder"
            )
    return cast(dict[str, str], weight_map)


def _entries(path: Path) -> Iterator[Entry]:
    header = tensor_header(path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    end = 0
    spans = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    for name, fields in spans:
        dtype, shape = fields.get("dtype"), fields.get("shape")
        low, high = fields["data_offsets"]
        if dtype not in DTYPES:
            raise ValueError(
                f"{path}: {name} has the type {dtype}, which cannot be merged; dequantize the model first"
            )
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        entry = Entry(name, path, dtype, tuple(shape) if sizes else (), start + low)
        if not sizes or high - low != entry.numel * entry.itemsize or low != end:
            raise ValueError(f"{path} has a damaged header: {name} is {json.dumps(fields)}")
        end = high
        yield entry
