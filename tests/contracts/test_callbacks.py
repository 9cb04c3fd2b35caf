"""What holds for every registered callback, under transformers' Trainer and TRL's trainers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import typing
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import hf_ext
from hf_ext import callbacks as exported
from hf_ext.callbacks._base import Callback
from hf_ext.core.registry import MethodInfo
from hf_ext.core.registry import methods as registered
from tests.callbacks.runs import (
    MIDDLE,
    STEPS,
    SaveAt,
    StopAt,
    annealing,
    build,
    build_fp16,
    equal,
    logged,
    make,
    parameters,
    rows,
    tiny_model,
)
from tests.conftest import REPOSITORY
from tests.registry_cases import methods, refused_settings
from tests.trainers import runs as trained

CALLBACKS = methods("callback")
SCHEDULES = [case for case in CALLBACKS if "learning_rate" in case.values[0].target.owns]
PAIRS = [pytest.param(a, b, id=f"{a.name}-{b.name}") for a, b in combinations(registered("callback"), 2)]


def state_files(folder: Path) -> dict[str, bytes]:
    """Return what the callbacks of the library have written into a checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("hf_ext_*"))}


def ways(info: MethodInfo, trainer_args: Any) -> list[bool]:
    """Return whether to attach: True, and False too where the callback can live on events."""
    return [True] if make(info).needs_attach(trainer_args) else [True, False]


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("info", "bad"), refused_settings("callback"))
def test_bad_settings_are_refused_by_name(info: MethodInfo, bad: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"\b{list(bad)[-1]}\b"):
        make(info, **bad)


@pytest.mark.parametrize("info", CALLBACKS)
def test_an_unknown_setting_and_a_wrong_type_are_refused(info: MethodInfo) -> None:
    with pytest.raises(TypeError, match="no_such_setting"):
        make(info, no_such_setting=1)
    name = next(iter(make(info).settings()))
    with pytest.raises((TypeError, ValueError), match=name):
        make(info, **{name: object()})


@pytest.mark.parametrize("info", methods("callback", variants=False))
def test_numbers_are_finite(info: MethodInfo) -> None:
    fields = typing.get_type_hints(info.target)
    numbers = [n for n in make(info).settings() if float in (fields[n], *typing.get_args(fields[n]))]
    for name in numbers:
        for value in (math.inf, math.nan):
            with pytest.raises(ValueError, match=rf"\b{name}\b"):
                make(info, **{**info.test_kwargs, name: value})


@pytest.mark.parametrize("info", CALLBACKS)
def test_settings_survive_json_and_the_text_form(info: MethodInfo) -> None:
    callback = make(info)
    again = type(callback)(**json.loads(json.dumps(callback.settings())))
    assert again.settings() == callback.settings()
    assert eval(repr(callback), vars(exported)).settings() == callback.settings()


# Neutral settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("info", CALLBACKS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_neutral_settings_change_no_bit(info: MethodInfo, accumulation: int, tmp_path: Path) -> None:
    cls: Any = info.target
    arguments = {**cls.neutral.arguments, "gradient_accumulation_steps": accumulation, "save_strategy": "no"}
    plain = build(tmp_path, **arguments)
    plain.train()
    with_it = build(tmp_path, cls(**cls.neutral.settings), **arguments)
    with_it.train()
    assert equal(parameters(with_it), parameters(plain))
    assert logged(with_it, "learning_rate") == logged(plain, "learning_rate")
    assert logged(with_it, "grad_norm") == logged(plain, "grad_norm")


@pytest.mark.parametrize("info", methods("callback", lacks="observes"))
def test_the_test_settings_are_not_neutral(info: MethodInfo, tmp_path: Path) -> None:
    plain = build(tmp_path, save_strategy="no")
    plain.train()
    with_it = build(tmp_path, make(info), save_strategy="no")
    with_it.train()
    assert not equal(parameters(with_it), parameters(plain))


@pytest.mark.parametrize("info", CALLBACKS)
def test_evaluation_changes_nothing(info: MethodInfo, tmp_path: Path) -> None:
    ends = []
    for arguments in ({}, {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}):
        trainer = build(tmp_path, make(info), save_strategy="no", **arguments)
        trainer.train()
        ends.append(parameters(trainer))
    assert equal(*ends)


# Resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", CALLBACKS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_interrupted_and_resumed_equals_one_run(info: MethodInfo, accumulation: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulation}
    whole = build(tmp_path / "whole", make(info), **options)
    whole.train()
    for attach in ways(info, whole.args):
        cut = build(tmp_path / "cut", make(info), attach=attach, others=[StopAt(MIDDLE + 2)], **options)
        with pytest.raises(InterruptedError):
            cut.train()
        # Another folder than the one that the checkpoint is in: nothing may be looked for beside it.
        resumed = build(tmp_path / f"resumed{attach}", make(info), attach=attach, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{MIDDLE}"))
        assert equal(parameters(resumed), parameters(whole))
        assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")
        last = f"checkpoint-{STEPS}"
        files = state_files(tmp_path / f"resumed{attach}" / last)
        assert files == state_files(tmp_path / "whole" / last)
        assert files


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run each callback in a process that is killed after step 7; the checkpoint of step 5 is left."""
    out = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.runs", str(out)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("info", CALLBACKS)
def test_killed_and_resumed_equals_one_run(
    info: MethodInfo, killed: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole = build(tmp_path, make(info))
    whole.train()
    folder = killed / request.node.callspec.id
    resumed = build(folder, make(info))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[MIDDLE - 1]["step"] == MIDDLE
    assert equal(parameters(resumed), parameters(whole))


def test_killed_within_an_anneal_and_resumed_equals_one_run(killed: Path, tmp_path: Path) -> None:
    whole = build(tmp_path, annealing())
    whole.train()
    folder = killed / "annealing"
    resumed = build(folder, annealing())
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "infinite_lr/phase") == [0, 1, 2, *[3] * 6]
    assert resumed.state.log_history[MIDDLE - 1]["step"] == MIDDLE
    assert equal(parameters(resumed), parameters(whole))
    # What it had kept before is whole too.
    branches = [state_files(out / "infinite_branch") for out in (folder, tmp_path)]
    assert branches[0] == branches[1] != {}


@pytest.mark.parametrize("info", CALLBACKS)
@pytest.mark.parametrize("unseen", [False, True])
def test_updates_that_overflow_in_fp16(info: MethodInfo, unseen: bool, tmp_path: Path) -> None:
    """The schedule waits for a skipped update, as the Trainer's own does, and in a resumed run too."""
    overflows = (2, MIDDLE, MIDDLE + 2)
    whole = build_fp16(tmp_path / "whole", make(info), overflows=overflows, unseen=unseen)
    whole.train()
    assert all(value.isfinite().all() for value in parameters(whole).values())
    rates = logged(whole, "learning_rate")
    if not unseen:
        assert all(rates[update] == rates[update - 1] for update in overflows)
    if not make(info).owns & {"batch_size"}:  # which is chosen by the gradients, and with it the rate's pace
        without = build(tmp_path / "without", make(info), save_strategy="no")
        without.train()
        made = [rate for update, rate in enumerate(rates, 1) if unseen or update not in overflows]
        assert made == logged(without, "learning_rate")[: len(made)]
    resumed = build_fp16(tmp_path / "resumed", make(info), overflows=overflows, unseen=unseen)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{MIDDLE}"))
    assert equal(parameters(resumed), parameters(whole))
    assert logged(resumed, "learning_rate") == rates
    last = f"checkpoint-{STEPS}"
    assert state_files(tmp_path / "resumed" / last) == state_files(tmp_path / "whole" / last)


@pytest.mark.parametrize("info", CALLBACKS)
def test_first_added_on_resume(info: MethodInfo, tmp_path: Path) -> None:
    build(tmp_path / "plain", others=[]).train()
    start = str(tmp_path / "plain" / f"checkpoint-{MIDDLE}")
    whole = build(tmp_path / "whole", make(info), others=[SaveAt(8)])
    whole.train(resume_from_checkpoint=start)
    resumed = build(tmp_path / "resumed", make(info))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize("info", CALLBACKS)
def test_first_added_on_resume_with_neutral_settings(info: MethodInfo, tmp_path: Path) -> None:
    cls: Any = info.target
    plain = build(tmp_path / "plain", **cls.neutral.arguments)
    plain.train()
    added = build(tmp_path / "added", cls(**cls.neutral.settings), **cls.neutral.arguments)
    added.train(resume_from_checkpoint=str(tmp_path / "plain" / f"checkpoint-{MIDDLE}"))
    assert equal(parameters(added), parameters(plain))


@pytest.mark.parametrize("info", CALLBACKS)
def test_state_files_hold_no_pickle(info: MethodInfo, tmp_path: Path) -> None:
    build(tmp_path, make(info)).train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    files = state_files(folder)
    assert f"{make(info).file_name()}.json" in files
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors"}
    for name in ("scheduler.pt", "optimizer.pt"):  # upstream's own, read without pickle's freedom
        torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize("info", CALLBACKS)
def test_a_checkpoint_without_its_state_is_refused(info: MethodInfo, tmp_path: Path) -> None:
    build(tmp_path, make(info)).train()
    folder = tmp_path / f"checkpoint-{MIDDLE}"
    (folder / f"{make(info).file_name()}.json").unlink()
    with pytest.raises(ValueError, match=rf"lacks the state of {info.name}"):
        build(tmp_path, make(info)).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("info", CALLBACKS)
def test_a_truncated_state_is_refused(info: MethodInfo, tmp_path: Path) -> None:
    build(tmp_path, make(info)).train()
    folder = tmp_path / f"checkpoint-{MIDDLE}"
    for path in folder.glob("hf_ext_*"):
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"hf_ext_{info.name}"):
        build(tmp_path, make(info)).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("info", CALLBACKS)
def test_a_second_run_starts_afresh(info: MethodInfo, tmp_path: Path) -> None:
    trainer = build(tmp_path, make(info), save_strategy="no")
    trainer.train()
    first = logged(trainer, "learning_rate")
    trainer.train()
    assert logged(trainer, "learning_rate") == first


# Undo ---------------------------------------------------------------------------------------------


def traces(trainer: Any) -> dict[str, Any]:
    """Return what a callback could leave behind: hooks, patched methods, functions of the scheduler."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    model = trainer.model
    return {
        "hooks": {n: [len(getattr(m, hook)) for hook in hooks] for n, m in model.named_modules()},
        "methods": {
            n: sorted(k for k, v in vars(m).items() if callable(v)) for n, m in model.named_modules()
        },
        "scheduler": [getattr(f, "func", f).__module__ for f in trainer.lr_scheduler.lr_lambdas],
        "groups": [sorted(group) for group in trainer.optimizer.param_groups],
        "decay": [group["weight_decay"] for group in trainer.optimizer.param_groups],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "accumulation": trainer.args.gradient_accumulation_steps,
    }


@pytest.mark.parametrize("info", CALLBACKS)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_after_a_run_or_an_exception(info: MethodInfo, fails: bool, tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [make(info)]):
        trainer = build(tmp_path, *callbacks, others=[StopAt(7)] if fails else [], save_strategy="no")
        if fails:
            with pytest.raises(InterruptedError):
                trainer.train()
        else:
            trainer.train()
        found.append(traces(trainer))
    assert found[0] == found[1]


# Attachment ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", CALLBACKS)
def test_events_alone_give_the_same_run_or_the_line_to_type(info: MethodInfo, tmp_path: Path) -> None:
    attached = build(tmp_path, make(info), save_strategy="no")
    attached.train()
    if make(info).needs_attach(attached.args) is None:
        alone = build(tmp_path, make(info), attach=False, save_strategy="no")
        alone.train()
        assert equal(parameters(alone), parameters(attached))
        return
    with pytest.raises(ValueError, match=r"hf_ext\.attach") as error:
        build(tmp_path, make(info), attach=False)
    line = str(error.value).partition(": ")[2]
    trainer = build(tmp_path, save_strategy="no")
    eval(line, {**vars(exported), "hf_ext": hf_ext, "trainer": trainer})
    trainer.train()
    assert equal(parameters(trainer), parameters(attached))


@pytest.mark.parametrize("info", CALLBACKS)
def test_two_of_one_class_are_refused(info: MethodInfo, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a trainer takes one"):
        build(tmp_path, make(info), make(info))
    trainer = build(tmp_path, make(info))
    with pytest.raises(ValueError, match="a trainer takes one"):
        trainer.add_callback(make(info))
    assert sum(isinstance(c, Callback) for c in trainer.callback_handler.callbacks) == 1


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_a_pair_trains_together_or_is_refused(a: MethodInfo, b: MethodInfo, tmp_path: Path) -> None:
    first, second = make(a), make(b)
    if first.owns & second.owns:
        with pytest.raises(ValueError, match="both steer the run's"):
            build(tmp_path, first, second)
        return
    whole = build(tmp_path / "whole", first, second)
    whole.train()
    resumed = build(tmp_path / "resumed", make(b), make(a))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{MIDDLE}"))
    assert equal(parameters(resumed), parameters(whole))


class Reporter(TrainerCallback):
    """Stands where the callbacks of `report_to` stand: before those of the user."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


@pytest.mark.parametrize("info", CALLBACKS)
def test_decisions_are_logged_and_reported(info: MethodInfo, tmp_path: Path) -> None:
    reporter = Reporter()
    trainer = build(tmp_path, make(info), others=[reporter], save_strategy="no")
    trainer.train()
    for entries in (reporter.seen, trainer.state.log_history):
        training = [entry for entry in entries if "loss" in entry]
        assert len(training) == STEPS
        for entry in training:
            own = {key: value for key, value in entry.items() if key.startswith(f"{info.name}/")}
            assert own
            assert all(isinstance(value, float) for value in own.values())


@pytest.mark.parametrize("info", CALLBACKS)
def test_sft_trainer(info: MethodInfo, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    ends = []
    for resume in (None, str(tmp_path / "run" / f"checkpoint-{MIDDLE}")):
        arguments = SFTConfig(
            str(tmp_path / ("run" if resume is None else "resumed")),
            max_steps=STEPS,
            save_steps=MIDDLE,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            tiny_model(),
            arguments,
            train_dataset=rows(),
            processing_class=_Tokenizer.load(),
        )
        hf_ext.attach(trainer, make(info))
        assert type(trainer).__name__ == "SFTTrainer"
        assert isinstance(trainer, SFTTrainer)
        trainer.train(resume_from_checkpoint=resume)
        ends.append(parameters(trainer))
    assert equal(*ends)


def preference_trainer(folder: Path) -> Any:
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    settings = trained.settings_of(DPOConfig, {**trained.ARGUMENTS, "max_steps": STEPS, "save_steps": MIDDLE})
    return DPOTrainer(
        trained.tiny_model(),
        args=DPOConfig(str(folder), **settings),
        train_dataset=trained.columns(trained.rows(), ("prompt", "chosen", "rejected")),
        processing_class=trained.tokenizer(),
    )


def policy_trainer(folder: Path) -> Any:
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    # Each batch of completions serves for two updates of two micro-batches.
    settings: dict[str, Any] = {
        "num_generations": 2,
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
    }
    settings |= trained.settings_of(
        GRPOConfig, {**trained.ARGUMENTS, "max_steps": STEPS, "save_steps": MIDDLE}
    )
    return GRPOTrainer(
        trained.tiny_model(),
        reward_funcs=trained.vowel_share,
        args=GRPOConfig(str(folder), **{**settings, "max_completion_length": 3}),
        train_dataset=trained.columns(trained.rows(), ("prompt",)),
        processing_class=trained.tokenizer(),
    )


@pytest.mark.parametrize("info", SCHEDULES)
@pytest.mark.parametrize("trainer_of", [preference_trainer, policy_trainer])
def test_schedules_in_other_trainers_of_trl(
    info: MethodInfo, trainer_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    plain = build(tmp_path / "plain", make(info), save_strategy="no")
    plain.train()
    rates = logged(plain, "learning_rate")
    assert rates != pytest.approx([1e-2 * (1.0 - step / STEPS) for step in range(STEPS)])
    trainer = hf_ext.attach(trainer_of(tmp_path / "run"), make(info))
    start = parameters(trainer)
    trainer.train()
    assert logged(trainer, "learning_rate") == rates
    own = [key for key in trainer.state.log_history[-2] if key.startswith(f"{info.name}/")]
    assert own
    assert all(len(logged(trainer, key)) == STEPS for key in own)
    ends = parameters(trainer)
    assert all(value.isfinite().all() for value in ends.values())
    assert not equal(ends, start)
    if trainer_of is preference_trainer:  # what a policy generates is no part of a checkpoint
        resumed = hf_ext.attach(trainer_of(tmp_path / "resumed"), make(info))
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{MIDDLE}"))
        assert logged(resumed, "learning_rate") == rates
        assert equal(parameters(resumed), ends)


class _Tokenizer:
    @staticmethod
    def load() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(Path(hf_ext.__file__).parent / "assets" / "tiny-llama")
