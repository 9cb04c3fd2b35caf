"""Transformers' own Trainer on text, with the arguments that TRL's trainers take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import DataCollatorWithPadding, Trainer

from ..core.checks import check

if TYPE_CHECKING:
    from datasets import Dataset

_INPUTS = ("input_ids", "attention_mask")


class CausalLMTrainer(Trainer):
    """Next-token training on every token of each row.

    Args:
        model: The causal language model.
        args: Transformers' own settings.
        train_dataset: Rows with `text`, or with `input_ids`. Text is tokenized, ended with the
            end-of-sequence token where there is one, and cut at the model's max_position_embeddings.
        eval_dataset: Held-out rows of the same form.
        processing_class: The tokenizer.
        peft_config: Adapter to inject, or None.

    Raises:
        ValueError: The tokenizer has neither a padding nor an end-of-sequence token.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if processing_class.pad_token is None:
            rule = "given where the tokenizer has no padding token to take its place"
            check(processing_class.eos_token is not None, "eos_token", None, rule)
            processing_class.pad_token = processing_class.eos_token
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        super().__init__(
            model=model,
            args=args,
            train_dataset=_tokenized(train_dataset, processing_class, limit),
            eval_dataset=None if eval_dataset is None else _tokenized(eval_dataset, processing_class, limit),
            processing_class=processing_class,
            data_collator=NextTokenCollator(processing_class),
            **kwargs,
        )


class NextTokenCollator(DataCollatorWithPadding):
    """Pads rows; every token of theirs is a label, padding is none.

    By position: transformers' own collator leaves out each token that is the padding one, and so the end of
    every row where the end-of-sequence token pads.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask and labels, each (rows, longest row)."""
        batch = super().__call__(features)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch


def _tokenized(rows: Dataset, tokenizer: Any, limit: int | None) -> Dataset:
    if "input_ids" in rows.column_names:
        return rows.select_columns(
            [name for name in ("input_ids", "attention_mask") if name in rows.column_names]
        )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], add_special_tokens=True)["input_ids"]
        ended = [row if row[-1:] == end else [*row, *end] for row in ids]
        return {"input_ids": [row[:limit] for row in ended]}

    return rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc="Tokenizing")
