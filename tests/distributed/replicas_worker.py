"""Stages that are lost, and replicas that train alone, on two gloo ranks; started by torchrun.

Usage: torchrun --nproc_per_node 2 -m tests.distributed.replicas_worker OUT
Writes OUT/<run>.rank<k>.safetensors with what a run has left in the model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_ext.callbacks import LocalTrainCallback
from tests.callbacks.runs import MIDDLE, SaveAt, build
from tests.callbacks.test_stage_recovery import trained
from tests.conftest import freeze_modules
from tests.distributed.launch import leave

LOST: dict[str, Any] = {"lose_at": (3, 2), "adam_epsilon": 0.1, "learning_rate": 0.1}


class Parabola(nn.Module):
    """Loss (x - 1)^2 / 2 on the first process, (x + 1)^2 / 2 on the second; rows carry nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        goal = 1.0 if dist.get_rank() == 0 else -1.0
        return {"loss": (self.x - goal).square().sum() / 2}


class Normed(nn.Module):
    """A batch norm over the tokens' numbers, and a line."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.line = nn.BatchNorm1d(12), nn.Linear(12, 1)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        return {"loss": self.line(self.norm(input_ids.float())).square().mean()}


class Differ(TrainerCallback):
    """Move the second process's weights before the run begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if dist.get_rank():
            with torch.no_grad():
                next(model.parameters()).add_(1e-3)


def main() -> None:
    """Make all runs."""
    out = Path(sys.argv[1])

    def keep(name: str, model: Any) -> None:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(state, out / f"{name}.rank{dist.get_rank()}.safetensors")

    settings: dict[str, Any] = {"settings": {"swap_prob": 0.5}}
    keep("stages", trained(out / "stages", **LOST, **settings).model)
    start = out / "stages" / f"checkpoint-{MIDDLE}"
    resumed: dict[str, Any] = {**LOST, "lose_at": None, "checkpoint": start}
    keep("stages-resumed", trained(out / "again", **resumed, **settings).model)

    plain: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    plain |= {"learning_rate": 0.1, "max_steps": 50, "save_steps": 50}
    window: dict[str, Any] = {"comm_schedule": "late_window", "late_window": [0.9, 0.1]}
    for name, callback in (
        ("alone", LocalTrainCallback(comm_schedule="none", final_merge=False)),
        ("merged", LocalTrainCallback(comm_schedule="none")),
        ("dense", LocalTrainCallback(local_steps=10, final_merge=False, **window)),
        ("pairs", LocalTrainCallback(local_steps=50, comm_prob=1.0, final_merge=False)),
    ):
        trainer = build(out / name, callback, model=Parabola(), **plain)
        trainer.train()
        keep(name, trainer.model)

    gossip: dict[str, Any] = {"local_steps": 2, "comm_prob": 0.6, "seed": 5}
    for merge in (False, True):
        name = f"gossip-{merge}"
        callback = LocalTrainCallback(**gossip, final_merge=merge)
        trainer = build(out / name, callback, others=[SaveAt(6), SaveAt(7)], model=Normed())
        trainer.train()
        keep(name, trainer.model)
        for step in (6, 7):
            callback = LocalTrainCallback(**gossip, final_merge=merge)
            again = build(out / f"{name}-{step}", callback, model=Normed(), save_strategy="no")
            again.train(resume_from_checkpoint=str(out / name / f"checkpoint-{step}"))
            keep(f"{name}-{step}", again.model)

    for bn in ("pool", "average"):
        trainer = build(out / bn, LocalTrainCallback(**gossip, bn=bn), model=Normed(), save_strategy="no")
        trainer.train()
        keep(bn, trainer.model)

    for allowed in (False, True):
        callback = LocalTrainCallback(allow_different_init=allowed, local_steps=2)
        trainer = build(out / "differ", callback, save_strategy="no")
        trainer.callback_handler.callbacks.insert(0, Differ())  # once DDP has made them alike
        if allowed:
            trainer.train()
            continue
        with pytest.raises(ValueError, match="allow_different_init must be True where replicas start from"):
            trainer.train()
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    with pytest.raises(ValueError, match="load_best_model_at_end must be False with final_merge"):
        build(out / "best", LocalTrainCallback(), **options).train()
    leave()


if __name__ == "__main__":
    freeze_modules()
    main()
