"""Small runs on the disk: folders checkpoint-<step> with what a Trainer writes beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.merging.models import save_model


def write_state(folder: Path, step: int, history: Sequence[Mapping[str, Any]]) -> None:
    """Write a trainer_state.json."""
    content = {"global_step": step, "log_history": [dict(entry) for entry in history]}
    (folder / "trainer_state.json").write_text(json.dumps(content))


def save_run(run: Path, tensors: Sequence[Mapping[str, Tensor]], losses: Sequence[float]) -> list[Path]:
    """Write one checkpoint for each set of tensors, ten steps apart, its loss logged at its step."""
    folders: list[Path] = []
    history: list[dict[str, Any]] = []
    for number, (own, loss) in enumerate(zip(tensors, losses, strict=True), start=1):
        folder = save_model(run / f"checkpoint-{10 * number}", own)
        history.append({"loss": loss, "step": 10 * number, "epoch": 0.1 * number})
        write_state(folder, 10 * number, history)
        folders.append(folder)
    return folders


def scalar_run(run: Path, *values: float, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Write a run of checkpoints with one number `w` each."""
    tensors = [{"w": torch.tensor([value], dtype=dtype)} for value in values]
    return save_run(run, tensors, [1.0] * len(values))


class Scalar(nn.Module):
    """A model of one number."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=dtype))


def distance(target: float) -> Any:
    """Return the metric (w - target)^2."""

    def evaluate(model: Any) -> float:
        return (float(model.w.double()) - target) ** 2

    return evaluate
