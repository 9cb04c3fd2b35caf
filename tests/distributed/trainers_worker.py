"""Every trainer of the library on two gloo ranks, DDP or FSDP2; started by torchrun.

Usage: torchrun --nproc_per_node 2 -m tests.distributed.trainers_worker ddp|fsdp2 OUT
Writes for each trainer OUT/<name>-<run>.rank<k>.safetensors with the parameters and the losses; the runs are
"whole", and "resumed" from its checkpoint in the middle.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor

from hf_ext.core.dist import full_tensor
from hf_ext.core.registry import MethodInfo
from tests.registry_cases import methods
from tests.trainers.runs import build, checkpoint, columns, rows, training_logs

GLOBAL_BATCH, STEPS, MIDDLE = 4, 4, 2


def cases(mode: str = "ddp") -> dict[str, MethodInfo]:
    """Return every registered trainer that runs in a mode: rounds need whole replicas."""
    whole = "rounds" if mode == "fsdp2" else ()
    return {str(case.id): case.values[0] for case in methods("trainer", lacks=whole, variants=False)}


def run(folder: Path, info: MethodInfo, mode: str, *, resume: bool = False) -> dict[str, Tensor]:
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
        _switch_fsdp_on()
    target: Any = info.target
    # As many rows, in a round too, as fill whole batches: processes fill up the last one of an epoch.
    data = columns(rows(16), target.inputs.columns[0])
    trainer = build(info, folder, data=data, **options)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.accelerator.num_processes == (1 if mode == "accumulated" else 2)
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {name: full_tensor(p.detach()).clone().contiguous() for name, p in model.named_parameters()}
    losses = [entry["loss"] for entry in training_logs(trainer)]
    return {**found, "log.loss": torch.tensor(losses).double()}


def _switch_fsdp_on() -> None:
    # Accelerate switches FSDP on for accelerators only and would run DDP here without a word.
    _ = PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main() -> None:
    """Train every case in one go, then from the checkpoint in the middle."""
    mode, out = sys.argv[1], Path(sys.argv[2])
    for name, info in cases(mode).items():
        whole = run(out / name, info, mode)
        rank = dist.get_rank()
        save_file(whole, out / f"{name}-whole.rank{rank}.safetensors")
        cut = out / f"{name}-resumed"
        if rank == 0:
            # The run as it is left when it is cut short after the checkpoint in the middle.
            shutil.copytree(out / name, cut)
            shutil.rmtree(checkpoint(info, cut, STEPS))
            rewind(info, cut)
        dist.barrier()
        resumed = run(cut, info, mode, resume=True)
        save_file(resumed, out / f"{name}-resumed.rank{rank}.safetensors")
    dist.destroy_process_group()


def rewind(info: MethodInfo, folder: Path) -> None:
    """Set the record of a run in rounds back into its last round."""
    if "rounds" in info.supports:
        from hf_ext.trainers._round_files import Progress

        progress = Progress.read(folder)
        progress.done = False
        progress.logs = [entry for entry in progress.logs if entry["round"] < progress.round]
        progress.write_alone(folder)


if __name__ == "__main__":
    main()
