"""What an adapter can tell about itself during training, in every log."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters._base import AdapterLinear


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
