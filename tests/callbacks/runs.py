"""Small runs of a Trainer that the tests of callbacks share, and, as a program, runs that are killed.

Usage: python -m tests.callbacks.runs OUT
Runs every registered callback in OUT/<name>, and a schedule that anneals then in OUT/annealing, each in a
process that gets SIGKILL after step 7.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hf_ext
from hf_ext.callbacks import InfiniteLRCallback
from hf_ext.callbacks._base import Callback
from hf_ext.core.registry import MethodInfo
from tests.conftest import build_tiny_llama, freeze_modules
from tests.registry_cases import methods

STEPS, MIDDLE = 10, 5
ROWS = (torch.arange(64 * 12).reshape(64, 12) * 7 % 251).tolist()
# Evaluated and saved after each step.
BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def rows(start: int = 0) -> Dataset:
    """Return 64 rows of 12 tokens, other ones for another start."""
    ids = [[(token + start) % 251 for token in row] for row in ROWS]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def tiny_model() -> Any:
    """Return a model of one small block; equal at each call."""
    return build_tiny_llama(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


def build(
    folder: Path | str,
    *callbacks: Callback,
    attach: bool = True,
    others: Iterable[TrainerCallback] = (),
    data: Dataset | None = None,
    model: Any = None,
    prepare: Callable[[TrainingArguments], None] = lambda _: None,
    **arguments: Any,
) -> Trainer:
    """Return a Trainer for ten steps that saves every five and logs each.

    Args:
        folder: Output folder.
        *callbacks: Callbacks of the library.
        attach: Whether they come by `hf_ext.attach`, or by `callbacks=`.
        others: Callbacks that stand before them.
        data: Rows; those of `rows()` if left out.
        model: The model; that of `tiny_model()` if left out.
        prepare: Called with the training arguments before the Trainer is built.
        **arguments: Training arguments over those of here.
    """
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": MIDDLE,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    training_arguments = TrainingArguments(str(folder), **{**settings, **arguments})
    prepare(training_arguments)
    trainer = Trainer(
        tiny_model() if model is None else model,
        training_arguments,
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(3).select(range(4)),
        callbacks=[*others, *(() if attach else callbacks)],
    )
    return hf_ext.attach(trainer, *callbacks) if attach else trainer


def build_fp16(
    folder: Path | str, *callbacks: Callback, overflows: Iterable[int], unseen: bool = False, **options: Any
) -> Trainer:
    """Return a Trainer as `build` does, in fp16 with a scaler of gradients, in which some updates overflow.

    Accelerate makes a scaler on every device but the CPU, where one works as well.

    Args:
        folder: Output folder.
        *callbacks: Callbacks of the library.
        overflows: Updates that overflow, by their numbers from 1.
        unseen: Whether the optimizer leaves them out by itself: with a fused kernel, the Trainer's default,
            Accelerate takes a step for made that was not.
        **options: Those of `build`.
    """
    others = [Overflows(overflows), *options.pop("others", ())]
    optimizer = "adamw_torch_fused" if unseen else "adamw_torch"
    trainer = build(folder, *callbacks, others=others, fp16=True, optim=optimizer, **options)
    accelerator: Any = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=2.0**8)
    accelerator.native_amp = True
    return trainer


class Overflows(TrainerCallback):
    """Let the gradients of some updates overflow, and see that others do not."""

    def __init__(self, updates: Iterable[int]) -> None:
        self.updates = frozenset(updates)
        self._now = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trained = next(p for p in kwargs["model"].parameters() if p.requires_grad)
        self._hook = trained.register_hook(lambda gradient: gradient * torch.inf if self._now else gradient)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._now = state.global_step + 1 in self.updates

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        fused = args.optim == "adamw_torch_fused"
        assert kwargs["optimizer"].step_was_skipped == (self._now and not fused)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._hook.remove()


def make(info: MethodInfo, **settings: Any) -> Callback:
    """Return a registered callback with its test settings, or with these."""
    cls: Any = info.target
    return cls(**(settings or info.test_kwargs))


def annealing() -> InfiniteLRCallback:
    """Return a schedule whose anneal has begun at the checkpoint in the middle, and ends before the run."""
    return InfiniteLRCallback(warmup_steps=1, cooldown_steps=2, anneal_start=3, anneal_steps=5)


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of the model's parameters."""
    model: Any = trainer.model
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether two models have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def logged(trainer: Trainer, key: str) -> list[float]:
    """Return a number of every training log."""
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


class StopAt(TrainerCallback):
    """End a run after a step: by an exception, or by SIGKILL."""

    def __init__(self, step: int, *, kill: bool = False) -> None:
        self.step, self.kill = step, kill

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise InterruptedError("stopped by the test")


class SaveAt(TrainerCallback):
    """Save after a step; a resumed run keeps the `save_steps` of its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            control.should_save = True


class Bumpy:
    """Report losses that are the lowest in the middle of a run, whatever the model."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.seen = trainer, []
        self.evaluate, trainer.evaluation_loop = trainer.evaluation_loop, self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.evaluate(*args, **kwargs)
        self.seen.append(parameters(self.trainer))
        step = self.trainer.state.global_step
        return found._replace(metrics={**found.metrics, "eval_loss": abs(step - MIDDLE) + 1.0})


def main() -> None:
    """Run every callback in a process that is killed."""
    out = Path(sys.argv[1])
    callbacks = {str(case.id): make(case.values[0]) for case in methods("callback")}
    for name, callback in {**callbacks, "annealing": annealing()}.items():
        pid = os.fork()  # before any computation: a fork after it could find locks that nobody opens
        if pid == 0:
            build(out / name, callback, others=[StopAt(7, kill=True)]).train()
            os._exit(1)  # it was not killed
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), name
        assert os.WTERMSIG(status) == signal.SIGKILL, name


if __name__ == "__main__":
    freeze_modules()
    main()
