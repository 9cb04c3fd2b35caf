"""Starts that are computed from data: one call between injecting an adapter and training it.

    model = get_peft_model(base, EvaConfig(r=16))
    initialize_from_data(model, dataloader)

Until then such an adapter is empty (all of its tensors are 0): the model computes what its base does, and a
forward in training mode raises. Each process reads its own share of the data; what is accumulated is a sum
over tokens, so it is added up over processes, and every process ends with the same bits.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ..core.checks import check, refuse_unknown
from ._data_start import LossFunction, StartData, StartsFromData, awaits_data, batches_of

__all__ = ["awaits_data", "initialize_from_data"]


def initialize_from_data(
    model: nn.Module,
    dataloader: Any,
    *,
    adapter_name: str | None = None,
    batch_size: int = 8,
    loss_function: LossFunction | None = None,
    show_progress: bool = True,
) -> nn.Module:
    """Give an adapter that starts from data its start. Call it before training, on every process.

    Args:
        model: A model that carries the adapter (a PeftModel, or a transformers model after `add_adapter`),
            not yet wrapped for several processes.
        dataloader: Batches of model inputs (mappings of tensors; LoRA-GA needs "labels"), or a
            `datasets.Dataset` with a column "input_ids". In a process group each process is given its own
            share of a DataLoader's data by the caller; a Dataset is shared out here.
        adapter_name: Which adapter; None for the only one that waits for data.
        batch_size: Rows in a batch made from a Dataset.
        loss_function: Takes the model and a batch, and returns the mean loss, for a start that needs
            gradients; None for the model's own loss.
        show_progress: Whether to show a progress bar.

    Returns:
        The model. Parameters may have been replaced (ranks that were redistributed): create the optimizer
        after this call.

    Raises:
        ValueError: No adapter waits for data, the data are too few or unfit; the adapter is left empty then.
    """
    waiting = awaits_data(model)
    if adapter_name is None:
        check(
            len(waiting) == 1,
            "adapter_name",
            adapter_name,
            f"given: adapters that wait for data are {', '.join(waiting) or 'none'}",
        )
        adapter_name = waiting[0]
    layers = _layers(model, adapter_name)
    if not layers:
        known = {name for layer in model.modules() for name in getattr(layer, "awaiting", ())}
        refuse_unknown("adapter_name", adapter_name, known)
    check(
        adapter_name in waiting,
        "adapter_name",
        adapter_name,
        "that of an adapter that waits for data; this one has its start, or none to wait for",
    )
    first = next(iter(layers.values()))
    config = first.configs[adapter_name]
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    data = StartData(
        model,
        adapter_name,
        layers,
        config,
        batches_of(dataloader, batch_size),
        loss_function,
        show_progress,
    )
    type(first).start_from_data(data)  # changes nothing before its last, local step
    for layer in layers.values():
        layer.awaiting.discard(adapter_name)
    return model


def _layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, StartsFromData) and adapter_name in cast(Any, layer).configs
    }
