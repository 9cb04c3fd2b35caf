"""SORSA under transformers' Trainer on two ranks, DDP or FSDP2, and resumed half-way; started by torchrun.

Usage: torchrun --nproc_per_node 2 -m tests.distributed.trainer_worker ddp|fsdp2|fsdp2-rank0 OUT
In mode fsdp2-rank0 only rank 0 reads the base model's weights (cpu_ram_efficient_loading), and the residual
is written into the base: what the other rank computes from its empty weights must not count.
Writes OUT/whole and OUT/resumed (Trainer folders) and OUT/<name>.rank<k>.safetensors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_ext.adapters import SorsaConfig
from tests.conftest import build_tiny_llama, freeze_modules
from tests.distributed.adapters_worker import adapter_state
from tests.distributed.launch import leave

STEPS = 4
ROWS = (torch.arange(16 * 12).reshape(16, 12) * 7 % 251).tolist()


def trainer(mode: str, folder: Path) -> Trainer:
    """Return a Trainer over the small model with SORSA, its penalty strong enough to be seen."""
    fsdp: dict[str, Any] = {}
    if mode != "ddp":
        fsdp = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "state_dict_type": "FULL_STATE_DICT",
                "cpu_ram_efficient_loading": mode == "fsdp2-rank0",
            },
        }
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 if mode == "ddp" else 1,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **fsdp,
    )
    _ = arguments.device  # sets the process group up
    if mode != "ddp":
        # Accelerate switches FSDP on for accelerators only and would run DDP here without a word.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    residual = mode == "fsdp2-rank0"
    config = SorsaConfig(
        r=4,
        gamma=0.05,
        base_mode="residual" if residual else "projected",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    if residual:
        base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
        if dist.get_rank() != 0:  # uninitialised memory can hold anything
            for parameter in base.parameters():
                parameter.data.fill_(float("nan"))
    else:
        base = build_tiny_llama()
    model = get_peft_model(base, config)
    return Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": ROWS, "labels": ROWS}))


def main() -> None:
    """Train in one go, then from the checkpoint in the middle."""
    mode, out = sys.argv[1], Path(sys.argv[2])
    if mode == "fsdp2-rank0":
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --use_fsdp` sets it
    whole = trainer(mode, out / "whole")
    whole.train()
    assert whole.accelerator.num_processes == 2
    rank = dist.get_rank()
    if mode != "ddp":
        assert all(hasattr(p, "full_tensor") for p in whole.model.parameters())
    save_file(
        adapter_state(whole.accelerator.unwrap_model(whole.model)), out / f"whole.rank{rank}.safetensors"
    )
    resumed = trainer(mode, out / "resumed")
    resumed.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-2"))
    save_file(
        adapter_state(resumed.accelerator.unwrap_model(resumed.model)),
        out / f"resumed.rank{rank}.safetensors",
    )
    leave()


if __name__ == "__main__":
    freeze_modules()
    main()
