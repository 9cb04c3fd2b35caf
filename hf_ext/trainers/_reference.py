"""The frozen policy that a loss compares with, and log-probabilities of completions."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .._compat.trl import disable_gradient_checkpointing, prepare_deepspeed, use_adapter
from ._base import place_for_deepspeed, zero_stage

# Keys of a batch that no model takes.
NOT_FOR_THE_MODEL = frozenset({"completion_mask", "labels"})


@contextlib.contextmanager
def reference_model(trainer: Any) -> Generator[Any]:
    """Yield the model that computes the reference; nothing inside records gradients.

    It is the trainer's `ref_model` where there is one; else, with PEFT, the model itself under its frozen
    adapter "ref" (made by TRL where an adapter's training is taken up again) or without any adapter.

    Raises:
        ValueError: There is neither.
    """
    model = trainer.model
    frozen = getattr(trainer, "ref_model", None)
    context: Any = contextlib.nullcontext()
    if frozen is None:
        unwrapped = trainer.accelerator.unwrap_model(model)
        if not isinstance(unwrapped, PeftModel):
            raise ValueError("ref_model is missing: without an adapter a frozen copy is needed")
        context = use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)  # type: ignore[arg-type]
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(model, trainer.args.gradient_checkpointing_kwargs),
        context,
    ):
        yield model if frozen is None else frozen


def before_training(trainer: Any) -> Any:
    """Return what computes with a trainer's model before it trains, which DeepSpeed's stage 3 shards."""
    place_for_deepspeed(trainer)
    if zero_stage(trainer) < 3:
        return trainer.model
    return prepare_deepspeed(trainer.model, trainer.accelerator)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Put a model in evaluation mode; each module then gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def model_inputs(inputs: Mapping[str, Any], drop: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return what of a batch goes to the model, without a cache of keys and values."""
    kept = {key: value for key, value in inputs.items() if key not in NOT_FOR_THE_MODEL | drop}
    return {**kept, "use_cache": False}


def completion_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return labels (B, L): the tokens where `completion_mask` (B, L) is 1, else -100."""
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)


def token_logps(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Return the log-probability of each label after the first.

    Args:
        model: A causal language model with TRL's fused head.
        inputs: Its inputs, as from `model_inputs`.
        labels: (B, L); -100 where nothing is asked.

    Returns:
        (B, L - 1) nats, zero where the label is -100.
    """
    outputs = model(**inputs, labels=labels, fused_lm_head=True)
    # Prompt-learning adapters put virtual tokens before the real ones.
    return outputs.log_probs[:, -(labels.size(1) - 1) :]


def sum_of_tokens(per_token_logps: Tensor) -> Tensor:
    """Return the log-probability (B,) of each row in fp32: sums of bf16 drift over long completions."""
    return per_token_logps.float().sum(dim=1)
