"""transformers' Trainer with each callback on two gloo ranks, DDP or FSDP2; started by torchrun.

Usage: torchrun --nproc_per_node 2 -m tests.distributed.callbacks_worker ddp|fsdp2 OUT
Writes for each callback OUT/<name>-<run>.rank<k>.safetensors with the parameters and what was logged; the
runs are "whole", and "resumed" from its checkpoint in the middle. Of infinite_lr there is "continued" too: on
other data, from OUT/annealed/infinite_branch, which another run has kept.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainingArguments

from hf_ext.callbacks import InfiniteLRCallback
from hf_ext.callbacks._base import Callback
from hf_ext.core.dist import full_tensor
from hf_ext.core.registry import MethodInfo
from tests.callbacks.runs import MIDDLE, build, make, rows
from tests.conftest import freeze_modules
from tests.distributed.launch import leave
from tests.registry_cases import methods

GLOBAL_BATCH = 4


def cases(mode: str = "one") -> dict[str, MethodInfo]:
    """Return every registered callback, and each of its forms, that runs in a mode."""
    whole = ("local_updates", "whole_replica") if mode == "fsdp2" else ()  # both are refused there
    return {str(case.id): case.values[0] for case in methods("callback", lacks=whole)}


def _switch_fsdp_on(arguments: TrainingArguments) -> None:
    _ = arguments.device  # sets the process group up
    # Accelerate switches FSDP on for accelerators only and would run DDP here without a word.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def prepared(folder: Path, callback: Callback, mode: str, **more: Any) -> Any:
    """Return a trainer for a mode.

    Modes on one process: "one" for a whole batch at once, "accumulated" for one after the other the batches
    that two processes have; on two: "ddp" and "fsdp2".

    A large epsilon: Adam's normalization would else enlarge the rounding of a sum in another order. (Not SGD:
    FSDP2 cannot load the state of an optimizer that has none.)
    """
    options: dict[str, Any] = {"adam_epsilon": 0.1, "learning_rate": 0.1, "max_grad_norm": 0.5, **more}
    options["per_device_train_batch_size"] = GLOBAL_BATCH if mode == "one" else GLOBAL_BATCH // 2
    options["gradient_accumulation_steps"] = 2 if mode == "accumulated" else 1
    if mode == "fsdp2":
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        options.update(fsdp=True, fsdp_config={**wrapped, "state_dict_type": "FULL_STATE_DICT"})
    return build(folder, callback, prepare=_switch_fsdp_on if mode == "fsdp2" else lambda _: None, **options)


def found(trainer: Any, name: str, mode: str) -> dict[str, Tensor]:
    """Return the whole parameters after training, and the numbers of the training logs."""
    assert trainer.accelerator.num_processes == (1 if mode in ("one", "accumulated") else 2)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if mode == "fsdp2":
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
    whole = {key: full_tensor(p.detach()).clone().contiguous() for key, p in model.named_parameters()}
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    own = {key for entry in entries for key in entry if key.startswith(f"{name}/")} | {"learning_rate"}
    return whole | {
        f"log.{key}": torch.tensor([entry[key] for entry in entries]).double() for key in sorted(own)
    }


def run(
    folder: Path, info: MethodInfo, mode: str = "one", checkpoint: str | None = None
) -> dict[str, Tensor]:
    """Train, and return what was `found`."""
    trainer = prepared(folder, make(info), mode)
    trainer.train(resume_from_checkpoint=checkpoint)
    return found(trainer, info.name, mode)


def anneal(folder: Path, mode: str) -> None:
    """Keep the checkpoint of step 2, of which the second process writes its part late."""
    schedule = InfiniteLRCallback(warmup_steps=0, cooldown_steps=1, anneal_start=2, anneal_steps=1)
    trainer = prepared(folder, schedule, mode, save_strategy="no")
    save = trainer._save_rng_state

    def late(checkpoint: str) -> None:
        threading.Event().wait(0.5)
        save(checkpoint)

    if dist.get_rank() == 1:
        trainer._save_rng_state = late
    trainer.train()


def continued(folder: Path, branch: Path, mode: str) -> dict[str, Tensor]:
    """Train on other data from a branch, and return what was `found`."""
    schedule = InfiniteLRCallback(continue_from=str(branch))
    trainer = prepared(folder, schedule, mode, data=rows(50), max_steps=3, save_strategy="no")
    trainer.train()
    return found(trainer, "infinite_lr", mode)


def main() -> None:
    """Train every case in one go, then from the checkpoint in the middle."""
    mode, out = sys.argv[1], Path(sys.argv[2])
    for name in cases().keys() - cases(mode).keys():
        with pytest.raises(ValueError, match="whole replica"):
            run(out / name, cases()[name], mode)
    for name, info in cases(mode).items():
        whole = run(out / name, info, mode)
        rank = dist.get_rank()
        save_file(whole, out / f"{name}-whole.rank{rank}.safetensors")
        resumed = run(out / f"{name}-resumed", info, mode, str(out / name / f"checkpoint-{MIDDLE}"))
        save_file(resumed, out / f"{name}-resumed.rank{rank}.safetensors")
    anneal(out / "annealed", mode)
    after = continued(out / "continued", out / "annealed" / "infinite_branch", mode)
    save_file(after, out / f"infinite_lr-continued.rank{dist.get_rank()}.safetensors")
    leave()


if __name__ == "__main__":
    freeze_modules()
    main()
