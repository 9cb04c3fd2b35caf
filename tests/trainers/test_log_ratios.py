"""The seam over DPO: tokens as DPO cuts them, references, chunks of rows, what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from hf_ext.trainers._log_ratios import as_messages, encode_completions, refuse_dpos_losses
from tests.trainers.runs import ARGUMENTS, rows, settings_of, tiny_model, tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def dpo_rows(data: Any, folder: Path, processing_class: Any) -> Any:
    settings = settings_of(DPOConfig, {**ARGUMENTS, "max_length": None})
    args = DPOConfig(output_dir=str(folder), precompute_ref_log_probs=False, **settings)
    trainer = DPOTrainer(model=tiny_model(), args=args, train_dataset=data, processing_class=processing_class)
    return trainer.train_dataset


@pytest.mark.parametrize("chat", [False, True])
def test_completions_are_cut_as_dpo_cuts_them(chat: bool, tmp_path: Path) -> None:
    data, ids = rows(6).select_columns(["prompt", "chosen", "rejected"]), tokenizer()
    data = data.map(lambda row: {"prompt": row["prompt"].rstrip()})  # tokens merge across the border
    if chat:
        ids.chat_template = CHAT
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        data = data.map(
            lambda row: {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
        )
    theirs = dpo_rows(data, tmp_path, ids)
    for row, expected in zip(data, theirs, strict=True):
        found = encode_completions(row, [row["chosen"], row["rejected"]], ids)
        assert found["prompt_ids"] == expected["prompt_ids"]
        assert found["completion_ids"] == [expected["chosen_ids"], expected["rejected_ids"]]


def test_a_text_is_the_assistants_message() -> None:
    message = {"role": "assistant", "content": "yes"}
    assert as_messages("yes") == as_messages([message]) == [message]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0.5),
        ("loss_type", ["sigmoid", "ipo"]),
        ("loss_weights", [2.0]),
        ("ld_alpha", 0.5),
        ("f_divergence_type", "js_divergence"),
        ("label_smoothing", 0.1),
        ("use_weighting", True),
    ],
)
def test_settings_of_dpos_losses_are_refused_by_name(field: str, value: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{field: value})
    with pytest.raises(ValueError, match=field):
        refuse_dpos_losses(args)
    refuse_dpos_losses(DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
