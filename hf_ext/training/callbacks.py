"""Callbacks of a run: those that its recipe names, and what an adapter tells about itself in every log."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import callbacks  # noqa: F401 (they register)
from ..adapters._base import AdapterLinear
from ..callbacks._base import Callback, refuse_conflicts
from ..core import registry
from ..core.checks import check_fields, refuse_unknown

if TYPE_CHECKING:
    from .recipe import Job


def build_callbacks(job: Job, checkpoint: Path | None) -> list[Callback]:
    """Return the callbacks that a recipe names.

    Args:
        job: The recipe.
        checkpoint: Folder to resume from, or None. A callback with a state in it reads no other files again.

    Raises:
        ValueError: A name or a field is unknown (close matches are offered), a value is out of range, what a
            field points to is missing, or two callbacks steer the same thing.
        TypeError: A value does not have its field's type.
    """
    built = [_build(job, checkpoint, name, given or {}) for name, given in job.recipe.callbacks.items()]
    try:
        refuse_conflicts(built)
    except ValueError as error:
        raise ValueError(f"{job.where}: callbacks: {error}") from error
    return built


def _build(job: Job, checkpoint: Path | None, name: str, given: dict[str, Any]) -> Callback:
    prefix, known = f"callbacks.{name}", registry.names("callback")
    try:
        if name not in known:
            refuse_unknown("callbacks:", name, known)
    except ValueError as error:
        raise ValueError(f"{job.where}: {error}") from error
    cls = typing.cast("type[Callback]", registry.get("callback", name).target)
    hints = typing.get_type_hints(cls)
    own = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    settings = check_fields(given, own, where=job.where, prefix=f"{prefix}.")
    try:
        callback = cls(**settings)
        if checkpoint is None or not (checkpoint / f"{callback.file_name()}.json").is_file():
            callback.check_files()
    except (ValueError, TypeError, OSError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{job.where}: {prefix}.{error}") from error
    return callback


def adapter_metrics(model: nn.Module) -> dict[str, float]:
    """Return the numbers that the model's adapter methods report, by name."""
    present = {type(module) for module in model.modules() if isinstance(module, AdapterLinear)}
    metrics: dict[str, float] = {}
    for layer in sorted(
        present, key=lambda cls: cls.__name__
    ):  # one order on all ranks: it may be a collective
        metrics.update(layer.training_metrics(model))
    return metrics


class AdapterMetricsCallback(TrainerCallback):
    """Add the adapter's own numbers, such as SORSA's orthonormality, to each training log.

    They appear in `log_history`; in what `report_to` names, if this stands before the reporting callbacks:
    `trainer.callback_handler.callbacks.insert(0, AdapterMetricsCallback())`. Costs nothing between logs.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Extend the log of a training step; evaluation and end-of-run logs carry no training loss."""
        if model is None or logs is None or "loss" not in logs:
            return
        # On every rank: gathering sharded factors is a collective.
        found = adapter_metrics(model)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)
