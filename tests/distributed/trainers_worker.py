"""Every trainer of the library on two gloo ranks, DDP or FSDP2; started by torchrun.

Usage: torchrun --nproc_per_node 2 -m tests.distributed.trainers_worker ddp|fsdp2 OUT
Writes for each trainer OUT/<name>-<run>.rank<k>.safetensors with the parameters and the losses; the runs are
"whole", and "resumed" from its checkpoint in the middle; with rounds, which have cases with adapters too,
under FSDP2 also "between", resumed after the first round.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hf_ext.core.dist import full_tensor
from hf_ext.core.registry import MethodInfo
from hf_ext.trainers._round_files import Progress
from tests.conftest import freeze_modules
from tests.contracts.test_trainers import adapter
from tests.distributed.launch import leave
from tests.registry_cases import methods
from tests.trainers.runs import build, checkpoint, columns, rows, training_logs

GLOBAL_BATCH, STEPS, MIDDLE = 4, 4, 2


# Adapters in rounds: PEFT's own, and one of ours that stores another base.
ADAPTERS = {"apo": ("lora", "loldu")}


EVALUATED_FIRST = ("aligndistil", "self_distillation", "unlearning")


@dataclass(frozen=True)
class Case:
    """A trainer, the type of its adapter if it has one, and settings other than its test settings."""

    info: MethodInfo
    adapter: str | None = None
    settings: Mapping[str, Any] | None = None


def cases(mode: str = "fsdp2") -> dict[str, Case]:
    """Return every registered trainer on the whole model and, with FSDP2, those with rounds on adapters."""
    found = {str(case.id): Case(case.values[0]) for case in methods("trainer", variants=False)}
    apart = {
        "unlearn_loss": "graddiff",
        "max_forget_loss": 1e4,
        "separate_forward": True,
        "global_norm": True,
    }
    found["unlearning-global"] = Case(found["unlearning"].info, settings=apart)
    # So that the teacher of the last step is older than the model.
    older = {"refresh_epochs": 0.4, "teacher_temperature": 0.05}
    found["self_distillation"] = Case(found["self_distillation"].info, settings=older)
    if mode != "fsdp2":
        return found
    return found | {
        f"{name}-{kind}": Case(found[name].info, kind) for name, kinds in ADAPTERS.items() for kind in kinds
    }


def ways(case: Case, mode: str) -> tuple[str, ...]:
    """Return how a case is cut short and resumed."""
    rounds = "rounds" in case.info.supports and mode == "fsdp2"
    return ("resumed", "between") if rounds else ("resumed",)


def run(folder: Path, case: Case, mode: str, *, resume: bool = False) -> dict[str, Tensor]:
    """Train, and return the whole parameters and the losses of the training logs.

    Modes: "accumulated" on one process, one after the other the batches that two processes have; on two "ddp"
    and "fsdp2". A large epsilon: Adam's normalization would else enlarge the rounding of a sum in another
    order.
    """
    options: dict[str, Any] = {"adam_epsilon": 0.1, "learning_rate": 0.1, "max_steps": STEPS}
    options |= {"per_device_train_batch_size": GLOBAL_BATCH // 2, "save_steps": MIDDLE}
    options["gradient_accumulation_steps"] = 2 if mode == "accumulated" else 1
    if mode == "fsdp2":
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        options.update(fsdp=True, fsdp_config={**wrapped, "state_dict_type": "FULL_STATE_DICT"})
        options["accelerator_config"] = {"use_configured_state": True}  # else it is made anew
        _switch_fsdp_on()
    info = case.info
    target: Any = info.target
    # As many rows, in a round too, as fill whole batches: processes fill up the last one of an epoch.
    data = columns(rows(16), target.inputs.columns[0])
    config = None if case.adapter is None else adapter(case.adapter)
    trainer = build(info, folder, data=data, peft_config=config, settings=case.settings, **options)
    if mode == "ddp" and info.name in EVALUATED_FIRST and not resume:
        trainer.evaluate()  # Accelerate would then leave DDP out
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.accelerator.num_processes == (1 if mode == "accumulated" else 2)
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert any(isinstance(module, FSDPModule) for module in model.modules()) == (mode == "fsdp2")
    if case.adapter is not None:
        trainer.evaluate()
        trainer.save_model(str(folder / "saved"))
    found = {name: full_tensor(p.detach()).clone().contiguous() for name, p in model.named_parameters()}
    losses = [entry["loss"] for entry in training_logs(trainer)]
    figures = [value for entry in trainer.state.log_history for key, value in entry.items() if "apo/" in key]
    return {
        **found,
        "log.loss": torch.tensor(losses).double(),
        "log.figures": torch.tensor(figures).double(),  # sums over shards
    }


def _switch_fsdp_on() -> None:
    # Accelerate switches FSDP on for accelerators only and would run DDP here without a word.
    AcceleratorState._reset_state(reset_partial_state=True)
    _ = PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main() -> None:
    """Train every case in one go, then from the checkpoint in the middle."""
    mode, out = sys.argv[1], Path(sys.argv[2])
    for name, case in cases(mode).items():
        whole = run(out / name, case, mode)
        rank = dist.get_rank()
        save_file(whole, out / f"{name}-whole.rank{rank}.safetensors")
        for way in ways(case, mode):
            cut = out / f"{name}-{way}"
            if rank == 0:
                shutil.copytree(out / name, cut)
                cut_short(case.info, cut, between=way == "between")
            dist.barrier()
            save_file(run(cut, case, mode, resume=True), out / f"{name}-{way}.rank{rank}.safetensors")
    leave()


def cut_short(info: MethodInfo, folder: Path, *, between: bool) -> None:
    """Leave a run as it is when it is cut short after the checkpoint in the middle, or between two rounds."""
    if not between:
        shutil.rmtree(checkpoint(info, folder, STEPS))
    if "rounds" in info.supports:
        progress = Progress.read(folder)
        if between:
            shutil.rmtree(folder / f"round_{progress.round}")
            progress.round -= 1
            progress.figures.pop()
            progress.steps.pop()
        progress.done = between
        last = progress.round + between
        progress.logs = [entry for entry in progress.logs if entry["round"] < last]
        progress.write_alone(folder)


if __name__ == "__main__":
    freeze_modules()
    main()
