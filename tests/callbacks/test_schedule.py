"""Curves and the callbacks that own the learning rate, apart from any method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

import hf_ext
from hf_ext.callbacks import AnnealingLawCallback, InfiniteLRCallback, RefinedLinearDecayCallback
from hf_ext.callbacks._base import Callback
from hf_ext.callbacks._schedule import Curve, check_scheduler, follow
from tests.callbacks.runs import MIDDLE, SaveAt, build, logged, rows, tiny_model


@dataclass(kw_only=True, eq=False)
class Falling(Curve):
    slope: float = 0.1

    def factor(self, t: float) -> float:
        return 1.0 - self.slope * t


def sgd(lr: Any = 0.5) -> Any:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)


def grouped(folder: Path, rates: tuple[float, float], **arguments: Any) -> Trainer:
    """Return a trainer for two steps whose optimizer has two groups of parameters."""
    model = tiny_model()
    weights = list(model.parameters())
    groups = [{"params": weights[:3], "lr": rates[0]}, {"params": weights[3:], "lr": rates[1]}]
    settings: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": "none"}
    return Trainer(
        model,
        TrainingArguments(str(folder), disable_tqdm=True, **settings, **arguments),
        train_dataset=rows(),
        optimizers=(torch.optim.SGD(groups), None),
        callbacks=[InfiniteLRCallback(warmup_steps=0, cooldown_steps=0)],
    )


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


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("made_by", ["user", "transformers"])
def test_the_user_s_own_scheduler_is_refused(made_by: str, attach: bool, tmp_path: Path) -> None:
    model, schedule = tiny_model(), InfiniteLRCallback()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = LambdaLR(optimizer, lambda _: 1.0)
    if made_by == "transformers":  # with the very functions that the Trainer's own would have
        own = get_linear_schedule_with_warmup(optimizer, 0, 2)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none"),
        train_dataset=rows(),
        optimizers=(optimizer, own),
        callbacks=[] if attach else [schedule],
    )
    if attach:
        hf_ext.attach(trainer, schedule)
    for _ in range(2):
        with pytest.raises(ValueError, match="both set the learning rate"):
            trainer.train()


def test_a_scheduler_that_a_trainer_s_own_method_makes_is_not(tmp_path: Path) -> None:
    class Makes(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = get_linear_schedule_with_warmup(self.optimizer, 0, num_training_steps)
            return self.lr_scheduler

    trainer = build(tmp_path, InfiniteLRCallback(), max_steps=2, save_strategy="no")
    trainer.__class__ = Makes
    for _ in range(2):
        trainer.train()


def test_the_user_s_own_optimizer_is_not(tmp_path: Path) -> None:
    trainer: Any = grouped(tmp_path, (0.3, 0.6))
    for _ in range(2):
        trainer.train()
        assert trainer.lr_scheduler.base_lrs == [0.3, 0.6]


@pytest.mark.parametrize(("rates", "given"), [((0.0, 0.0), r"0\.0"), ((0.1, torch.nan), r"\[0\.1, nan\]")])
def test_a_run_without_a_learning_rate_is_refused(rates: Any, given: str, tmp_path: Path) -> None:
    trainer = grouped(tmp_path, rates)
    with pytest.raises(ValueError, match=f"learning_rate must be (a number )?above 0, got {given}"):
        trainer.train()
    grouped(tmp_path, (0.1, 0.0)).train()  # a group that is held back


@pytest.mark.parametrize(
    "callback", [InfiniteLRCallback(), RefinedLinearDecayCallback(), AnnealingLawCallback()]
)
def test_a_learning_rate_of_zero_is_refused(callback: Callback, tmp_path: Path) -> None:
    trainer = build(tmp_path, callback, learning_rate=0.0)
    with pytest.raises(ValueError, match=r"learning_rate must be above 0, got 0\.0"):
        trainer.train()


@pytest.mark.parametrize("attach", [True, False])
def test_a_negative_learning_rate_is_refused_before_training(attach: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"learning_rate must be a number above 0, got -0\.001"):
        build(tmp_path, InfiniteLRCallback(), attach=attach, learning_rate=-1e-3)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0)])
def test_a_checkpoint_of_another_schedule_is_refused(before: int, after: int, tmp_path: Path) -> None:
    def schedule(which: int) -> Callback:
        return (InfiniteLRCallback(), RefinedLinearDecayCallback(record=False))[which]

    build(tmp_path, schedule(before)).train()
    start, names = str(tmp_path / f"checkpoint-{MIDDLE}"), [type(schedule(i)).__name__ for i in (0, 1)]
    said = f"learning rate {names[before]} set, and {names[after]} is to set it now: resume with"
    with pytest.raises(ValueError, match=said):
        build(tmp_path, schedule(after)).train(resume_from_checkpoint=start)
    # A run in between followed neither: what came before it does not bind.
    build(tmp_path / "plain", others=[SaveAt(8)]).train(resume_from_checkpoint=start)
    build(tmp_path, schedule(after)).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-8"))


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


def test_rates_of_groups_are_no_other_learning_rate(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    grouped(tmp_path, (0.3, 0.6)).train()
    start = str(tmp_path / "checkpoint-1")
    grouped(tmp_path, (0.3, 0.6)).train(resume_from_checkpoint=start)
    assert not [str(w.message) for w in recwarn if "sets the learning rate" in str(w.message)]
    changed = grouped(tmp_path, (0.3, 0.6), learning_rate=0.3)
    said = r"learning_rate=0\.3 \(the checkpoint's is 0\.3, 0\.6\) is not used"
    with pytest.warns(UserWarning, match=said):
        changed.train(resume_from_checkpoint=start)


# A run of another length than its checkpoint's -----------------------------------------------------

LINEAR: dict[str, Any] = {"record": False}
REFINED: dict[str, Any] = {"mode": "refined", "norms": [1.0] * 10, "record": False}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return checkpoints of the middle of a plain run, a linear and a refined one."""
    found = {}
    for name, callbacks in {
        "plain": [],
        "linear": [RefinedLinearDecayCallback(**LINEAR)],
        "refined": [RefinedLinearDecayCallback(**REFINED)],
    }.items():
        folder = tmp_path_factory.mktemp(name)
        build(folder, *callbacks).train()
        found[name] = str(folder / f"checkpoint-{MIDDLE}")
    return found


@pytest.mark.parametrize("changed", [{"max_steps": 20}, {"max_steps": 7}, {"num_train_epochs": 1}])
def test_a_resumed_run_of_another_length_has_the_trainer_s_linear_decay(
    changed: dict[str, int], halves: dict[str, str], tmp_path: Path
) -> None:
    arguments = {"max_steps": -1, "save_strategy": "no", **changed}
    plain = build(tmp_path, **arguments)
    plain.train(resume_from_checkpoint=halves["plain"])
    trainer = build(tmp_path, RefinedLinearDecayCallback(**LINEAR), **arguments)
    steps = changed.get("max_steps", 32)
    said = f"max_steps is {steps}, and 10 in the checkpoint: from step 5 on the learning rate is that"
    with pytest.warns(UserWarning, match=said):
        trainer.train(resume_from_checkpoint=halves["linear"])
    assert len(logged(plain, "learning_rate")) == steps
    rates, expected = logged(trainer, "learning_rate"), logged(plain, "learning_rate")
    # The Trainer's own schedule makes one more update at the old length's rate.
    expected[MIDDLE] = 1e-2 * (1.0 - MIDDLE / steps)
    assert rates == expected


def test_a_refined_schedule_is_resampled_for_another_length(halves: dict[str, str], tmp_path: Path) -> None:
    trainer = build(tmp_path, RefinedLinearDecayCallback(**REFINED), max_steps=19)
    with pytest.warns(UserWarning, match="max_steps is 19, and 10 in the checkpoint"):
        trainer.train(resume_from_checkpoint=halves["refined"])
    rates = logged(trainer, "learning_rate")
    new = build(tmp_path / "new", RefinedLinearDecayCallback(**REFINED), max_steps=19, save_strategy="no")
    new.train()
    assert rates[MIDDLE:] == pytest.approx(logged(new, "learning_rate")[MIDDLE:], rel=1e-12)
    assert len(set(rates[MIDDLE:])) == 14
    # Its own checkpoints are those of the new length.
    again = build(tmp_path / "again", RefinedLinearDecayCallback(**REFINED), max_steps=19, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert logged(again, "learning_rate") == rates


def test_a_curve_made_anew_keeps_its_clock() -> None:
    run: Any = SimpleNamespace(state=SimpleNamespace(max_steps=20, global_step=5))
    owner = RefinedLinearDecayCallback(**LINEAR)
    saved = owner.curve_from({"total_steps": 10})
    saved.set_pace(3, 2.0)
    with pytest.warns(UserWarning, match="max_steps is 20"):
        anew = owner._of_length(run, saved)
    assert [anew.time(step) for step in (3, 4, 5)] == [3.0, 5.0, 7.0]
    assert anew(5) == 1.0 - 7.0 / 20.0
