"""Every trainer of the library under DeepSpeed's ZeRO on two gloo ranks; started by torchrun.

Usage: torchrun --nproc_per_node 2 -m tests.distributed.deepspeed_worker OUT
Writes OUT/<trainer>-plain.rank<k>.safetensors with the parameters and the losses of a run without DeepSpeed;
OUT/<name>-<run>.rank<k>.safetensors with those of a case's runs under it, "whole" and those of `Case.ways`;
OUT/saved-half<whether in bf16>/saved with a model as it is saved after extrapolation;
and OUT/refused.json with the errors of what is refused.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_ext.core.registry import get
from tests.contracts.test_trainers import adapter
from tests.distributed.launch import leave
from tests.distributed.trainers_worker import GLOBAL_BATCH, MIDDLE, STEPS, cut_short
from tests.trainers.runs import build, columns, parameters, rows, tiny_model, training_logs


@dataclass(frozen=True)
class Case:
    """A trainer under a stage of ZeRO.

    Args:
        trainer: Its name.
        stage: DeepSpeed's `zero_optimization.stage`.
        adapter: The type of its adapter if it has one.
        settings: Settings over its test settings; those of a trainer's several cases have the same results.
        zero: More of DeepSpeed's `zero_optimization`.
        ways: How it is cut short and resumed: "resumed" from a checkpoint, "between" two rounds.
        middle: Step of that checkpoint.
    """

    trainer: str
    stage: int
    adapter: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)
    ways: tuple[str, ...] = ()
    middle: int = MIDDLE


# Else every tensor of so small a model would stay whole on each process.
KEPT_WHOLE = {"stage3_param_persistence_threshold": 100}
# Tensors of which two processes have no halves.
ODD = {"hidden_size": 15, "intermediate_size": 25, "num_attention_heads": 1, "head_dim": 6}
# A refresh before the last step but one alone: in the last the teacher is older than the model.
OLDER = {"refresh_epochs": 0.4, "teacher_temperature": 0.05}
BY_ROW = {"loss_reduction": "sequence"}
CASES = {
    "aligndistil": Case("aligndistil", 3),
    "apo": Case("apo", 2, "lora", ways=("resumed", "between")),
    "apo-sharded": Case("apo", 3, "lora", ways=("resumed", "between")),
    "d2o-chunks": Case("d2o", 2, settings={"anchor_microbatch": 2}),
    "d2o": Case("d2o", 3),
    "online_iterative_dpo": Case("online_iterative_dpo", 1),
    "online_iterative_dpo-sharded": Case(
        "online_iterative_dpo",
        3,
        settings={"ds3_gather_for_generation": False},
        ways=("resumed", "between"),
    ),
    # Its optimizer is reset where it is cut.
    "paced_distillation": Case("paced_distillation", 2, settings=BY_ROW, ways=("resumed",)),
    "paced_distillation-sharded": Case("paced_distillation", 3, settings=BY_ROW),
    "self_distillation": Case("self_distillation", 2, settings=OLDER),
    "self_distillation-sharded": Case(
        "self_distillation", 3, settings=OLDER, ways=("resumed",), middle=STEPS - 1
    ),
    "unlearning": Case("unlearning", 3, "lora"),
}
REFUSED: dict[str, tuple[Case, str]] = {
    "optimizer": (Case("online_iterative_dpo", 1, settings={"reset_optimizer": False}), "reset_optimizer"),
    "retain": (
        Case("unlearning", 3, settings={"retain_loss": "kl"}),
        "zero_optimization.stage",
    ),
    "secondary": (
        Case("self_distillation", 3, zero={"zero_hpz_partition_size": 2}),
        "zero_hpz_partition_size",
    ),
    "quantized": (Case("apo", 3, zero={"zero_quantized_weights": True}), "zero_quantized_weights"),
    "disk": (Case("apo", 3, zero={"offload_param": {"device": "nvme"}}), "offload_param.device"),
    "chunks": (Case("d2o", 3, settings={"anchor_microbatch": 2}), "anchor_microbatch"),
    "closed": (
        Case("self_distillation", 2, settings={"pskd_schedule": "closed_form"}),
        "pskd_schedule",
    ),
    "folding": (Case("apo", 2, "lora"), "bf16 or fp16"),
    "half": (Case("apo", 0), "zero_optimization.stage"),
}


def make(folder: Path, case: Case, stage: int | None, **options: Any) -> Any:
    """Return a case's trainer under a stage, or without DeepSpeed."""
    # Accelerate keeps what the run before was made with.
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    given: dict[str, Any] = {"adam_epsilon": 0.1, "learning_rate": 0.1, "max_steps": STEPS}
    given |= {"per_device_train_batch_size": GLOBAL_BATCH // 2, "save_steps": case.middle}
    if not case.ways:
        given["save_strategy"] = "no"
    info = get("trainer", case.trainer)
    settings = {**info.test_kwargs, **case.settings}
    if stage is not None:
        zero = {"stage": stage, **(KEPT_WHOLE if stage == 3 else {}), **case.zero}
        engine = {"zero_optimization": zero, "bf16": {"enabled": "auto"}}
        sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        given["deepspeed"] = engine | dict.fromkeys(sizes, "auto")
    data = columns(rows(16), info.target.inputs.columns[0])  # type: ignore[attr-defined]
    config = None if case.adapter is None else adapter(case.adapter)
    if "model" not in options:
        options["model"] = tiny_model(**ODD)
    return build(info, folder, data=data, peft_config=config, settings=settings, **{**given, **options})


def run(folder: Path, case: Case, stage: int | None, *, resume: bool = False) -> dict[str, Tensor]:
    """Train, and return the whole parameters and the losses of the training logs."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    trainer = make(folder, case, stage)
    before = _engines()  # of earlier trainers, whose models DeepSpeed keeps
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.accelerator.num_processes == 2
    assert isinstance(trainer.deepspeed, deepspeed.DeepSpeedEngine) == (stage is not None)
    if case.trainer == "apo":  # whose model is no longer the engine's
        trainer.evaluate()
        trainer.save_model(str(folder / "saved"))
    model = trainer.accelerator.unwrap_model(trainer.model)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found = parameters(trainer)
    losses = [entry["loss"] for entry in training_logs(trainer)]
    if "rounds" in get("trainer", case.trainer).supports:
        assert _engines() <= before + 1, "the engines of earlier rounds are kept"
    trainer.accelerator.free_memory()
    return {**found, "log.loss": torch.tensor(losses).double()}


def _engines() -> int:
    import deepspeed  # pyright: ignore[reportMissingImports]

    gc.collect()
    return sum(isinstance(one, deepspeed.DeepSpeedEngine) for one in gc.get_objects())


def run_in_half_precision(folder: Path, stage: int) -> dict[str, Tensor]:
    """Train a round in bf16 at a rate of zero, and return the policy that it leaves in its file."""
    trainer = make(
        folder, Case("online_iterative_dpo", stage), stage, bf16=True, learning_rate=0.0, max_steps=1
    )
    trainer.train()
    assert trainer.model.dtype == torch.bfloat16
    trainer.accelerator.free_memory()
    return load_file(folder / "round_1" / "policy.safetensors")


def run_taught(folder: Path, stage: int | None) -> dict[str, Tensor]:
    """Return what self-distillation trains with a teacher given before the model is split, and its losses."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    case = Case("self_distillation", 3, settings={"pskd_schedule": "constant"})
    trainer = make(folder, case, stage, max_steps=2)
    torch.manual_seed(3)
    named = trainer.model.named_parameters()
    trainer.teach({name: p.detach() + 0.3 * torch.randn_like(p) for name, p in named})
    trainer.train()
    held = trainer._held.whole()
    assert all(value.device.type == "cpu" for value in held.values())
    assert bool(held) == (dist.get_rank() == 0)  # a copy for the file alone
    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
        found = parameters(trainer)
    losses = [entry["loss"] for entry in training_logs(trainer)]
    trainer.accelerator.free_memory()
    return {**found, "log.loss": torch.tensor(losses).double()}


def save_extrapolated(folder: Path, *, half: bool) -> None:
    """Train a round of APO with all weights under stage 3, and save the model beside its files."""
    case = Case("apo", 3, settings={"num_rounds": 1})
    trainer = make(folder, case, 3, bf16=half, max_steps=1)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    trainer.accelerator.free_memory()


def main() -> None:
    """Train every case without DeepSpeed and under it, and try what is refused."""
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])

    def keep(name: str, label: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, out / f"{name}-{label}.rank{rank}.safetensors")

    # Engines that collection ends must end in all processes at once.
    gc.disable()
    gc.freeze()
    start = tiny_model(**ODD).named_parameters()
    keep("half", "plain", {name: p.detach().clone() for name, p in start})
    for trainer, case in {case.trainer: case for case in CASES.values()}.items():
        keep(trainer, "plain", run(out / f"{trainer}-plain", case, None))
    for stage in (1, 3):
        keep("half", f"stage{stage}", run_in_half_precision(out / f"half{stage}", stage))
    for label, stage in (("plain", None), ("stage3", 3)):
        keep("taught", label, run_taught(out / f"taught-{label}", stage))
    for half in (False, True):
        save_extrapolated(out / f"saved-half{half}", half=half)
    for name, case in sorted(CASES.items(), key=lambda item: item[1].stage):
        keep(name, "whole", run(out / name, case, case.stage))
        for way in case.ways:
            cut = out / f"{name}-{way}"
            if rank == 0:
                shutil.copytree(out / name, cut)
                cut_short(get("trainer", case.trainer), cut, between=way == "between")
            dist.barrier()
            keep(name, way, run(cut, case, case.stage, resume=True))
    errors: dict[str, str] = {}
    for name, (case, _) in REFUSED.items():
        try:
            make(out / f"refused-{name}", case, case.stage, bf16=name in ("folding", "half"))
        except ValueError as error:
            errors[name] = str(error)
    if rank == 0:
        (out / "refused.json").write_text(json.dumps(errors), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main()
