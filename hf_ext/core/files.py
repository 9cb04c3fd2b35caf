"""Files that are whole or absent: atomic writes, and safetensors read with errors that name the file."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes

_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


def _failed(path: Path, error: OSError) -> OSError:
    if isinstance(error.__cause__, OSError):  # a file within a folder: the folder is what the user named
        error = error.__cause__
    reason = error.strerror or str(error)
    return type(error)(error.errno, f"cannot write {path}: {reason}; what was there before is unchanged")


@contextmanager
def atomic_folder(folder: str | Path) -> Generator[Path, None, None]:
    """Give an empty folder to write into, and put it in place of `folder` only when the block has succeeded.

    The new folder is made beside the old one, so that the last step is a rename. If the block raises, the
    old folder stays as it was and the new one is removed.

    Raises:
        OSError: The place cannot be written, or the disk is full; the text names the folder.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(20, "a file of that name exists")
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise _failed(folder, error) from error
    try:
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():
                _flush(path)
        _swap(fresh, folder)
    except OSError as error:
        raise _failed(folder, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, folder: Path) -> None:
    fresh.chmod(0o755 & ~_umask())  # mkdtemp makes it private
    if not folder.exists():
        fresh.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    old.rmdir()
    folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Raises:
        OSError: The place cannot be written, or the disk is full; the text names the file.
    """
    path = Path(path)
    fresh: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, fresh = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(fresh).chmod(0o644 & ~_umask())
        Path(fresh).replace(path)
    except OSError as error:
        if fresh is not None:
            Path(fresh).unlink(missing_ok=True)
        raise _failed(path, error) from error


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically: sorted keys, two spaces, a newline at the end; NaN is refused."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: The file is not JSON; the text names it.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically in the safetensors format.

    Args:
        path: The file.
        tensors: Tensors of any device and layout; each is stored contiguous, on its own.
        metadata: Text that the file's header carries, beside the format mark that loaders look for.

    Raises:
        OSError: The place cannot be written, or the disk is full.
    """
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_bytes(path, tensors_to_bytes(whole, metadata={"format": "pt", **(metadata or {})}))


def tensor_header(path: str | Path) -> dict[str, Any]:
    """Return the header of a safetensors file after checking that the file is whole.

    Returns:
        For each tensor name, `dtype`, `shape` and `data_offsets`; without the metadata entry.

    Raises:
        ValueError: The file is truncated, has bytes to spare, or its header is no JSON; the text names it.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError(f"{path} is truncated or is not a safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (UnicodeDecodeError, ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} has a damaged header: {error}") from error
    if size != 8 + length + end:
        raise ValueError(f"{path} is damaged: {size} bytes where its header says {8 + length + end}")
    return header


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a whole safetensors file onto the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated or damaged; the text names it.
    """
    tensor_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def tensor_of_model(folder: str | Path, name: str) -> torch.Tensor:
    """Read one tensor of a saved model, sharded or not, onto the CPU.

    Args:
        folder: Folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.
        name: The tensor's key, such as "model.layers.0.mlp.up_proj.weight".

    Raises:
        FileNotFoundError: The folder holds no safetensors model.
        ValueError: A file is damaged, or the model has no such tensor; the text names it.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    path = folder / (read_json(index)["weight_map"].get(name, "") if index.is_file() else "model.safetensors")
    if not path.exists() or (path.is_dir() and not index.is_file()):
        raise FileNotFoundError(f"{folder} holds no safetensors model ({path.name} is missing)")
    if path.is_dir() or name not in tensor_header(path):
        raise ValueError(f"{folder}: the model has no tensor {name}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
