"""Completions for held-out rows, beside the real ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One held-out row and what the model makes of it.

    Args:
        title: Where the row is from, as far as the data say.
        prompt: What the model was given.
        reference: The real completion.
        generated: The model's.
    """

    title: str
    prompt: str
    reference: str
    generated: str

    def as_dict(self) -> dict[str, str]:
        """Return a JSON value."""
        return asdict(self)


def generate_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    text_field: str,
    count: int,
    limit: int,
) -> list[Sample]:
    """Generate greedily for rows taken evenly over a split, skipping those that leave the completion no room.

    Args:
        model: A causal language model with `generate`.
        tokenizer: Its tokenizer.
        rows: Held-out rows with TRL's columns.
        text_field: Column of plain text, where there is no prompt; its second half is then the completion.
        count: Number of samples.
        limit: Longest completion, tokens.
    """
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    samples: list[Sample] = []
    for start in range(count):
        begin, end = start * len(rows) // count, (start + 1) * len(rows) // count
        for index in range(begin, end):
            prompt, reference = _split(rows[index], tokenizer, text_field)
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not _has_template(rows[index]))[
                "input_ids"
            ]
            if room is None or ids.shape[1] + limit <= room:
                text = _complete(model, tokenizer, ids, limit)
                samples.append(Sample(_title(rows[index]), prompt, reference, text))
                break
    return samples


@torch.no_grad()
def _complete(model: Any, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, limit: int) -> str:
    device = next(model.parameters()).device
    ids = ids.to(device)
    model.eval()
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def _has_template(row: dict[str, Any]) -> bool:
    # A chat template writes the special tokens itself.
    return not isinstance(row.get("prompt", row.get("messages", "")), str)


def _split(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, text_field: str) -> tuple[str, str]:
    known = next((name for name in ("completion", "chosen") if name in row), None)
    if "prompt" in row and (known is not None or "rejected" in row):
        prompt, completion = row["prompt"], row[known or "rejected"]
        if isinstance(prompt, str):
            return prompt, str(completion)
        return _templated(tokenizer, prompt), str(completion[-1]["content"])
    if "prompt" in row:  # the completions are the policy's own
        prompt = row["prompt"]
        return (prompt if isinstance(prompt, str) else _templated(tokenizer, prompt)), ""
    if "chosen" in row and not isinstance(row["chosen"], str):
        return _templated(tokenizer, row["chosen"][:-1]), str(row["chosen"][-1]["content"])
    if "messages" in row:
        return _templated(tokenizer, row["messages"][:-1]), str(row["messages"][-1]["content"])
    text = str(row["chosen"] if "chosen" in row else row[text_field])
    return text[: len(text) // 2], text[len(text) // 2 :]


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _title(row: dict[str, Any]) -> str:
    return ".".join(str(row[name]) for name in ("module", "qualname") if row.get(name))
