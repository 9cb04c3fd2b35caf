"""What an adapter can tell about itself during training, in every log."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._compat.peft import BaseTunerLayer
from ..adapters.sorsa import SorsaLinear, orthonormality
from ..core import registry


def adapter_metrics(model: nn.Module) -> dict[str, float]:
    """Return the numbers that the model's adapter methods report, by name.

    A layer class may have a class method `training_metrics(model)` that returns them.
    """
    present = {type(module) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    metrics: dict[str, float] = {}
    for row in registry.methods("adapter"):
        if row.target not in present:
            continue
        report = getattr(row.target, "training_metrics", None)
        if report is not None:
            metrics.update(report(model))
        elif row.target is SorsaLinear and _trains(model, SorsaLinear):
            metrics["orthonormality"] = orthonormality(model)
    return metrics


def _trains(model: nn.Module, layer: type[nn.Module]) -> bool:
    return any(
        p.requires_grad
        for module in model.modules()
        if isinstance(module, layer)
        for p in module.parameters()
    )


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
