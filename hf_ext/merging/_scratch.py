"""Intermediate fp32 tensors beside an unfinished merge; they vanish with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor


def put(path: Path, value: Tensor) -> None:
    """Write a tensor so that a reader sees all of it or nothing."""
    data = value.detach().float().contiguous()
    head = json.dumps(list(data.shape)).encode()
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        if data.numel():
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def get(path: Path) -> Tensor:
    """Read what `put` has written.

    Raises:
        FileNotFoundError: Nothing has been kept under this key.
        ValueError: The file is damaged.
    """
    with path.open("rb") as file:
        shape = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = torch.empty(shape, dtype=torch.float32)
        if data.numel():
            count = file.readinto(data.reshape(-1).view(torch.uint8).numpy().data)
            if count != data.numel() * 4:
                raise ValueError(f"{path} is damaged")
    return data
