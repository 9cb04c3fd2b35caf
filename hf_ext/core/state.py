"""State inside a checkpoint folder: scalars as JSON, tensors as safetensors, both or neither."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from .files import read_json, read_tensors, write_json, write_tensors

# Where a run in rounds notes how far it is.
ROUNDS_FILE = "rounds.json"


def save_state(
    folder: str | Path,
    name: str,
    scalars: Mapping[str, object],
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write one part's state as `<name>.json` and, where there are tensors, `<name>.safetensors`.

    The JSON file is written last and lists the tensors: without it there is no state, so that a process
    killed between the two files leaves nothing that loads and is wrong.

    Args:
        folder: The checkpoint folder.
        name: Base name of the files.
        scalars: JSON values.
        tensors: Tensors by name.

    Raises:
        OSError: The folder cannot be written.
    """
    tensors = tensors or {}
    folder = Path(folder)
    if tensors:
        write_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / f"{name}.json", {"scalars": dict(scalars), "tensors": sorted(tensors)})


def load_state(folder: str | Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what `save_state` wrote.

    Returns:
        The scalars and the tensors (on the CPU).

    Raises:
        FileNotFoundError: There is no such state in the folder.
        ValueError: A file is damaged, or the tensors are not those that the JSON file lists.
    """
    content = _read(Path(folder) / f"{name}.json")
    path = Path(folder) / f"{name}.safetensors"
    tensors = read_tensors(path) if content["tensors"] else {}
    if sorted(tensors) != content["tensors"]:
        differing = sorted(set(tensors) ^ set(content["tensors"]))
        raise ValueError(f"{path} does not match {name}.json: {', '.join(differing)}")
    return content["scalars"], tensors


def load_scalars(folder: str | Path, name: str) -> dict[str, Any]:
    """Read the scalars of what `save_state` wrote, and leave the tensors where they are.

    Raises:
        FileNotFoundError: There is no such state in the folder.
        ValueError: The file is damaged.
    """
    return _read(Path(folder) / f"{name}.json")["scalars"]


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not _is_state(content):
        raise ValueError(f"{path} does not hold a saved state (expected the keys 'scalars' and 'tensors')")
    return content


def _is_state(content: Any) -> bool:
    if not isinstance(content, dict) or set(cast(dict[str, object], content)) != {"scalars", "tensors"}:
        return False
    listed = cast(dict[str, object], content)["tensors"]
    names = isinstance(listed, list) and all(isinstance(name, str) for name in cast(list[object], listed))
    return names and isinstance(content["scalars"], dict)
