"""Curves and the callbacks that own the learning rate, apart from any method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from hf_ext.callbacks import InfiniteLRCallback
from hf_ext.callbacks._schedule import Curve, check_scheduler, follow
from tests.callbacks.runs import build, logged, rows, tiny_model


@dataclass(kw_only=True, eq=False)
class Falling(Curve):
    slope: float = 0.1

    def factor(self, t: float) -> float:
        return 1.0 - self.slope * t


def sgd(lr: Any = 0.5) -> Any:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)


def test_time_runs_at_the_pace_and_does_not_jump() -> None:
    curve = Falling()
    assert [curve.time(s) for s in range(3)] == [0.0, 1.0, 2.0]
    curve.set_pace(2, 2.0)
    assert [curve.time(s) for s in range(2, 5)] == [2.0, 4.0, 6.0]
    curve.set_pace(4, 0.5)
    assert [curve.time(s) for s in range(4, 7)] == [6.0, 6.5, 7.0]
    with pytest.raises(ValueError, match="pace must be above 0"):
        curve.set_pace(5, 0.0)


def test_following_sets_the_rate_of_the_next_update() -> None:
    optimizer = sgd()
    scheduler = LambdaLR(optimizer, lambda _: 1.0)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    follow(scheduler, [Falling()])
    expected = 0.5 * Falling()(3)
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == expected
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5 * Falling()(4)


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(0.5)
    optimizer = sgd(rate)
    scheduler = LambdaLR(optimizer, lambda _: 1.0)
    follow(scheduler, [Falling(anchor_time=5.0)])
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


def test_foreign_schedulers_are_refused() -> None:
    optimizer = sgd()
    with pytest.raises(ValueError, match="got the scheduler StepLR"):
        check_scheduler(StepLR(optimizer, 1))
    with pytest.raises(ValueError, match="both set the learning rate"):
        check_scheduler(LambdaLR(optimizer, lambda _: 1.0))


def test_a_scheduler_that_steps_at_evaluation_is_refused(tmp_path: Path) -> None:
    arguments = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 5}
    trainer = build(tmp_path, InfiniteLRCallback(), metric_for_best_model="loss", **arguments)
    with pytest.raises(ValueError, match="lr_scheduler_type must be one that steps once per update"):
        trainer.train()


def test_the_user_s_own_scheduler_is_refused(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none"),
        train_dataset=rows(),
        optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
        callbacks=[InfiniteLRCallback()],
    )
    with pytest.raises(ValueError, match="both set the learning rate"):
        trainer.train()


@pytest.mark.parametrize("arguments", [{"lr_scheduler_type": "cosine"}, {"warmup_steps": 3}])
def test_unused_arguments_are_warned_of(arguments: dict[str, Any], tmp_path: Path) -> None:
    trainer = build(tmp_path, InfiniteLRCallback(), save_strategy="no", **arguments)
    with pytest.warns(UserWarning, match=rf"sets the learning rate: {next(iter(arguments))}="):
        trainer.train()
    plain = build(tmp_path, InfiniteLRCallback(), save_strategy="no")
    plain.train()
    assert logged(trainer, "learning_rate") == logged(plain, "learning_rate")


def test_another_learning_rate_on_resume_is_warned_of(tmp_path: Path) -> None:
    build(tmp_path, InfiniteLRCallback()).train()
    trainer = build(tmp_path, InfiniteLRCallback(), learning_rate=0.5)
    with pytest.warns(UserWarning, match=r"learning_rate=0\.5 \(the checkpoint's is 0\.01\) is not used"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert max(logged(trainer, "learning_rate")) <= 0.01
