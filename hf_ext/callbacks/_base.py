"""What every callback of the library shares: settings, state in checkpoints, exact resume, undo, logs.

A callback is a dataclass over transformers' TrainerCallback: its fields are its settings, plain JSON values.
A method overrides `validate`, `reset`, `begin`, `undo`, `state_dict`, `load_state_dict` and `scalars` as far
as it needs them, and any of transformers' events but `on_train_begin`, `on_train_end`, `on_save` and
`on_log`, which are the base's.

In a checkpoint: `hf_ext_<name>.json`, with `hf_ext_<name>.safetensors` where the state has tensors; a
callback with `per_rank` has one such pair for each process. `trainer_state.json` marks, with the step, that
they belong to it, so that a checkpoint which was cut short is told from one of a run without the callback.
"""

from __future__ import annotations

import dataclasses
import math
import typing
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from .._compat.transformers import (
    announce_callbacks,
    checkpoint_of,
    date_marks,
    has_own_scheduler,
    is_marked,
    remember_checkpoint,
    remember_run,
    run_folder,
    set_mark,
)
from ..core import dist
from ..core.checks import check, check_fields
from ..core.devices import stacked
from ..core.registry import MethodInfo, Variant, register
from ..core.state import load_state, save_state

remember_checkpoint()
remember_run()
date_marks()
announce_callbacks()

C = TypeVar("C", bound="type[Callback]")


@dataclass(frozen=True)
class Run:
    """What a callback sees of a run when it begins.

    Args:
        args: The trainer's settings.
        state: Its progress; `max_steps` is known.
        control: Its flags.
        model: The model, unwrapped where the Trainer unwraps it.
        optimizer: The optimizer, in Accelerate's wrapper.
        lr_scheduler: The learning-rate scheduler.
        warm_start: Folder that weights, optimizer and scheduler were read from at step 0; None for none.
    """

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    model: Any
    optimizer: Any
    lr_scheduler: Any
    warm_start: Path | None = None

    @property
    def output_dir(self) -> Path:
        """Folder of the run, in which its checkpoints lie."""
        return run_folder(self.state) or Path(self.args.output_dir or ".")

    @property
    def own_scheduler(self) -> bool:
        """Whether the learning-rate scheduler was given to the Trainer, and not made by it."""
        return has_own_scheduler(self.state)

    @property
    def optimizer_name(self) -> str:
        """Class name of the optimizer inside Accelerate's wrapper."""
        return type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__


@dataclass(frozen=True)
class Neutral:
    """Settings under which a run is that of a Trainer without the callback, to the bit.

    Args:
        settings: The callback's.
        arguments: Those of the Trainer, in both runs.
    """

    settings: Mapping[str, Any]
    arguments: Mapping[str, Any]


@dataclass(kw_only=True, eq=False)
class Callback(TrainerCallback):
    """Base of the library's callbacks; a subclass is a `@dataclass(kw_only=True, eq=False)` of its settings.

    Raises:
        ValueError: A setting is outside its range; the text names it.
        TypeError: A setting does not have its field's type.
    """

    info: ClassVar[MethodInfo]
    neutral: ClassVar[Neutral]
    # What only one callback of a run may steer, such as "learning_rate".
    owns: ClassVar[frozenset[str]] = frozenset()
    # Settings that may differ from those of the checkpoint that a run is resumed from.
    may_change: ClassVar[frozenset[str]] = frozenset()
    # Whether each process has a state of its own.
    per_rank: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        hints = typing.get_type_hints(type(self))
        hints = {name: hints[name] for name in given}
        for name, value in check_fields(given, hints, where=type(self).__name__).items():
            infinite = isinstance(value, float) and not math.isfinite(value)  # no JSON, no checkpoint
            check(not infinite, name, value, "a finite number")
            setattr(self, name, value)
        self.validate()
        self._trainer: Callable[[], Any] = lambda: None
        self._running = False
        self._written = False
        self.reset()

    # What a method fills in -----------------------------------------------------------------------

    def validate(self) -> None:
        """Check the settings against each other and their ranges."""

    def needs_attach(self, args: TrainingArguments) -> str | None:
        """Return why `hf_ext.attach` is needed with these settings, or None where events are enough."""
        return None

    def check_arguments(self, args: TrainingArguments) -> None:
        """Look at a trainer's arguments when the callback joins it, by `attach` or by `callbacks=`.

        Raises:
            ValueError: One does not fit.
        """

    def batch_has_grown(self) -> None:
        """Take note that the coming update is of more samples than the first ones; called at each such."""

    def check_files(self) -> None:
        """Look at the files that the settings name, before a model is read for the run.

        Raises:
            ValueError: One does not fit, or is missing.
        """
        self.warm_start()

    def reset(self) -> None:
        """Set the run-time state to that of a new run; called at construction and when a run begins."""

    def begin(self, run: Run) -> None:
        """Start work on a run; the state has been restored if there was one."""

    def finish(self, run: Run) -> None:
        """Write or report what a run that came to its end has found."""

    def undo(self) -> None:
        """Take back every change made to the model, the optimizer or the trainer since `begin`."""

    def saved(self, run: Run, folder: Path) -> None:
        """Do what is to be done once a checkpoint is whole."""

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values and tensors by name: all that the rest of the run depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def scalars(self) -> dict[str, float]:
        """Return what the callback has decided, for the log of a training step."""
        return {}

    # Settings -------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __repr__(self) -> str:
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    # Attachment -----------------------------------------------------------------------------------

    @property
    def trainer(self) -> Any:
        """The trainer that `hf_ext.attach` joined the callback to; None where it lives on events alone."""
        return self._trainer()

    def join(self, trainer: Any) -> None:
        """Remember the trainer, without keeping it alive."""
        self._trainer = weakref.ref(trainer)

    def added_to(self, handler: CallbackHandler) -> None:
        """Take the place before the reporting callbacks, so that they see what is logged here.

        Raises:
            ValueError: A callback of this class, or one that steers the same thing, is there already.
        """
        refuse_conflicts([c for c in handler.callbacks if isinstance(c, Callback)])
        others = [callback for callback in handler.callbacks if callback is not self]
        before = (DefaultFlowCallback, Callback)
        place = max((i + 1 for i, other in enumerate(others) if isinstance(other, before)), default=0)
        handler.callbacks[:] = [*others[:place], self, *others[place:]]

    def warm_start(self) -> str | None:
        """Return the checkpoint of another run to take weights, optimizer and scheduler from, or None."""
        return None

    def _refuse_events_alone(self, args: TrainingArguments) -> None:
        reason = None if self.trainer is not None else self.needs_attach(args)
        if reason is not None:
            raise ValueError(
                f"{type(self).__name__} {reason}. Take it out of `callbacks=` and type, before train(): "
                f"hf_ext.attach(trainer, {self!r})"
            )

    # Events ---------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop where the callback was passed to `callbacks=` and cannot live on events, or does not fit."""
        self._refuse_events_alone(args)
        self.check_arguments(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the state of a resumed run, and begin."""
        self._refuse_events_alone(args)
        self.abandon()  # what a run that ended in an exception has left
        self.reset()
        warm = self.warm_start() if state.global_step == 0 else None
        run = self._run(args, state, control, kwargs, None if warm is None else Path(warm))
        if state.global_step > 0:
            self._restore(run)
        set_mark(state, self._mark())
        self._running = True
        try:
            self.begin(run)
        except BaseException:
            self.abandon()
            raise

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish, and undo."""
        try:
            self.finish(self._run(args, state, control, kwargs))
        finally:
            self.abandon()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the state into the checkpoint, unless `attach` has done so earlier."""
        run = self._run(args, state, control, kwargs)
        folder = run.output_dir / f"checkpoint-{state.global_step}"
        if not self._written:
            self._write(folder, state.global_step)
        self._written = False
        self.saved(run, folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Extend the log of a training step; evaluation and end-of-run logs carry no training loss."""
        if logs is None or "loss" not in logs:
            return
        found = {f"{self.info.name}/{key}": value for key, value in self.scalars().items()}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def abandon(self) -> None:
        """Undo what a run has left; nothing where none has."""
        if self._running:
            self._running = False
            self._written = False
            self.undo()

    def checkpoint_written(self, folder: Path) -> None:
        """Write the state into a checkpoint that the attached trainer has not finished yet."""
        self._write(folder, self.trainer.state.global_step)
        self._written = True

    @staticmethod
    def _run(
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: Mapping[str, Any],
        warm_start: Path | None = None,
    ) -> Run:
        parts = {name: kwargs.get(name) for name in ("model", "optimizer", "lr_scheduler")}
        return Run(args, state, control, **parts, warm_start=warm_start)

    # State ----------------------------------------------------------------------------------------

    @classmethod
    def _mark(cls) -> str:
        return f"hf_ext.{cls.info.name}"

    @classmethod
    def marked(cls, state: TrainerState) -> bool:
        """Return whether the checkpoint that a trainer's state was read from is one of a run with this."""
        return is_marked(state, cls._mark())

    def file_name(self) -> str:
        return f"hf_ext_{self.info.name}" + (f".rank{dist.rank()}" if self.per_rank else "")

    def _write(self, folder: Path, step: int) -> None:
        state = self.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        scalars = {
            "step": step,
            "world_size": dist.world_size(),
            "settings": self.settings(),
            "state": {name: value for name, value in state.items() if name not in tensors},
        }

        def write() -> None:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is gone: {self.info.name} has no checkpoint to write into")
            save_state(folder, self.file_name(), scalars, tensors)

        if self.per_rank:
            dist.barrier()  # the first process makes the folder
            with dist.together():
                if not dist.is_main():
                    folder.mkdir(parents=True, exist_ok=True)  # on another host
                write()
        else:
            dist.on_main(write)

    def _restore(self, run: Run) -> None:
        folder = checkpoint_of(run.state)
        if folder is None:
            raise ValueError(
                f"{self.info.name}: training starts at step {run.state.global_step}, but not from a "
                "checkpoint's trainer_state.json"
            )
        if self.marked(run.state):
            self.load_state_dict(self.read_state(folder, run.state.global_step))

    def read_state(
        self, folder: Path, step: int | None = None, *, of_other_run: bool = False
    ) -> dict[str, Any]:
        """Read this callback's state from a checkpoint, and check that it fits.

        Args:
            folder: The checkpoint.
            step: Optimizer steps that the checkpoint was taken after; None for any.
            of_other_run: Whether settings that were left at their defaults are those of the checkpoint.

        Raises:
            ValueError: The state is missing, of another step, of other settings, or of another number of
                processes where each has its own.
        """
        try:
            scalars, tensors = load_state(folder, self.file_name())
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} lacks the state of {self.info.name} ({self.file_name()}.json, or its tensors): it "
                "was cut short while it was written; take an older checkpoint"
            ) from error
        place = str(folder)
        if step is not None:
            check(scalars["step"] == step, "step", scalars["step"], f"{step}", where=place)
        for field in dataclasses.fields(self):
            # A checkpoint of an earlier version lacks fields that were added since.
            value, saved = getattr(self, field.name), scalars["settings"].get(field.name, field.default)
            free = field.name in self.may_change or (of_other_run and value == field.default)
            check(free or saved == value, field.name, value, f"{saved!r}, as in the checkpoint", where=place)
        if self.per_rank:
            world, here = scalars["world_size"], dist.world_size()
            check(world == here, "world size", here, f"{world}, as in the checkpoint", where=place)
        return {**scalars["state"], **tensors}


def refuse_conflicts(callbacks: list[Callback]) -> None:
    """Raise unless the callbacks can work in one run.

    Raises:
        ValueError: Two are of one class, or steer the same thing.
    """
    for index, callback in enumerate(callbacks):
        for other in callbacks[:index]:
            if type(other) is type(callback):
                raise ValueError(f"a trainer takes one {type(callback).__name__}, and it has two")
            shared = sorted(other.owns & callback.owns)
            if shared:
                raise ValueError(
                    f"{type(other).__name__} and {type(callback).__name__} both steer the run's "
                    f"{shared[0].replace('_', ' ')}; a trainer takes one of them"
                )


def register_callback(
    name: str,
    *,
    summary: str,
    paper: str | None,
    neutral: Neutral,
    supports: set[str] | frozenset[str] = frozenset(),
    test_kwargs: Mapping[str, object] | None = None,
    bad_kwargs: tuple[Mapping[str, object], ...] = (),
    variants: tuple[Variant, ...] = (),
) -> Callable[[C], C]:
    """Register a callback class under a name; the row is its `info`.

    Args:
        name: Name that users type; also that of the source file, the test and the page.
        summary: One line of what a user gets.
        paper: Identifier such as "arXiv:2404.02948", or None.
        neutral: Settings that change nothing; see `Neutral`.
        supports: Flags. "bare": the method also works in a loop of PyTorch alone; "local_updates": processes
            do not average their gradients; "whole_replica": each process needs all of the model; "observes":
            nothing in the run is changed.
        test_kwargs: Settings that the contract suite runs for ten optimizer steps.
        bad_kwargs: Settings that must be refused with an error that names the (last) field.
        variants: Further forms of the method, for the contract suite.
    """

    def add(cls: C) -> C:
        cls.info = MethodInfo(
            name=name,
            kind="callback",
            summary=summary,
            paper=paper,
            target=cls,
            supports=frozenset(supports),
            test_kwargs=dict(test_kwargs or {}),
            bad_kwargs=bad_kwargs,
            variants=variants,
        )
        cls.neutral = neutral
        register(cls.info)
        return cls

    return add


def whole(values: list[Tensor]) -> Tensor:
    """Return scalars of any device as one float64 tensor (n,) on the CPU, with one copy."""
    return stacked(values).to("cpu", torch.float64) if values else torch.empty(0, dtype=torch.float64)
