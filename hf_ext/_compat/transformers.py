"""Seams of transformers' Trainer without a stability promise, checked on 5.23.

A callback of ours may define what is called here; other callbacks are left alone. All are optional:
`added_to(handler)`, `warm_start()`, `gradient_norm(norm)`, `checkpoint_written(folder)`, `abandon()`;
`training_values(values, dataloader)` and `resume_position(place, checkpoint)`, which return what they are
given or correct it; and `around_<method>(call, ...)`, which run in the place of a method of the Trainer and
take it as their first argument: `around_batch_samples`, `around_training_step`,
`around_floating_point_ops`, `around_input_tokens`. `evaluating()` returns a context manager that an
evaluation runs in.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from transformers.trainer_callback import CallbackHandler, TrainerState

__all__ = [
    "TrainerSeams",
    "announce_callbacks",
    "checkpoint_of",
    "date_marks",
    "has_own_scheduler",
    "is_marked",
    "remember_checkpoint",
    "remember_run",
    "run_folder",
    "set_mark",
]

Method: TypeAlias = Callable[..., Any]
_MARK = "_hf_ext_wrapped"
# Attributes of a `TrainerState`, and no fields of it: they are not saved.
_FOLDER = "_hf_ext_checkpoint"
_RUN_FOLDER = "_hf_ext_run_folder"
_OWN_SCHEDULER = "_hf_ext_own_scheduler"
_MARKS = "_hf_ext_marks"


def _wrap(owner: type, name: str, made_of: Callable[[Method], Method]) -> None:
    """Put what is made of a method, or of a class method, in its place, once in a process."""
    found = inspect.getattr_static(owner, name)
    original = found.__func__ if isinstance(found, classmethod) else found
    if not hasattr(original, _MARK):
        wrapper = functools.wraps(original)(made_of(original))
        setattr(wrapper, _MARK, True)
        setattr(owner, name, classmethod(wrapper) if isinstance(found, classmethod) else wrapper)


def remember_checkpoint() -> None:
    """Let a `TrainerState` that was read from a file know the file's folder: callbacks are not told it."""

    def made_of(original: Method) -> Method:
        def load_from_json(cls: type[TrainerState], json_path: str) -> TrainerState:
            state = original(cls, json_path)
            setattr(state, _FOLDER, Path(json_path).resolve().parent)
            return state

        return load_from_json

    _wrap(TrainerState, "load_from_json", made_of)


def checkpoint_of(state: TrainerState) -> Path | None:
    """Return the checkpoint folder that a state was read from, or None for that of a new run."""
    return getattr(state, _FOLDER, None)


def remember_run() -> None:
    """Let a `TrainerState` know of its trainer what callbacks on events are not told."""

    def made_of(original: Method) -> Method:
        def init_training_references(
            self: TrainerState, trainer: Any, max_steps: int, num_train_epochs: int, trial: Any
        ) -> None:
            original(self, trainer, max_steps, num_train_epochs, trial)
            # Called for every trainer of the process, ours or not.
            folder = trainer._get_output_dir(trial) if hasattr(trainer, "_get_output_dir") else None
            setattr(self, _RUN_FOLDER, folder)
            if not hasattr(trainer, _OWN_SCHEDULER):  # a first run's; later ones find what it has left
                made = getattr(trainer, "_created_lr_scheduler", True)
                given = getattr(trainer, "lr_scheduler", None) is not None
                setattr(trainer, _OWN_SCHEDULER, given and not made)
            setattr(self, _OWN_SCHEDULER, getattr(trainer, _OWN_SCHEDULER))

        return init_training_references

    _wrap(TrainerState, "init_training_references", made_of)


def run_folder(state: TrainerState) -> Path | None:
    """Return the folder that a run's checkpoints lie in: that of the trial in a hyperparameter search."""
    folder = getattr(state, _RUN_FOLDER, None)
    return None if folder is None else Path(folder)


def has_own_scheduler(state: TrainerState) -> bool:
    """Return whether the run's scheduler was given to the Trainer, which makes one otherwise."""
    return getattr(state, _OWN_SCHEDULER, False)


def date_marks() -> None:
    """Let each mark that was set in a run be saved with the step that it is saved at."""

    def made_of(original: Method) -> Method:
        def save_to_json(self: TrainerState, json_path: str) -> None:
            marks: Any = self.stateful_callbacks
            for name in getattr(self, _MARKS, ()):
                marks[name] = {"args": {}, "attributes": {"step": self.global_step}}
            original(self, json_path)

        return save_to_json

    _wrap(TrainerState, "save_to_json", made_of)


def set_mark(state: TrainerState, name: str) -> None:
    """Mark each checkpoint that is saved from now on; a run without this call hands old marks on as they are.

    Upstream's restoring of callbacks passes a mark over, as no class has its name.
    """
    marks: Any = state.stateful_callbacks
    marks[name] = {"args": {}, "attributes": {}}
    setattr(state, _MARKS, getattr(state, _MARKS, frozenset()) | {name})


def is_marked(state: TrainerState, name: str) -> bool:
    """Return whether the checkpoint that a state was read from was saved by a run that had set the mark."""
    marks: Any = state.stateful_callbacks or {}
    if name not in marks:
        return False
    # Checkpoints of earlier versions hold no step.
    return marks[name]["attributes"].get("step", state.global_step) == state.global_step


def announce_callbacks() -> None:
    """Call `added_to(handler)` of a callback that has just been added to a Trainer's handler."""

    def made_of(original: Method) -> Method:
        def add_callback(self: CallbackHandler, callback: Any) -> None:
            original(self, callback)
            newest = self.callbacks[-1]
            if hasattr(newest, "added_to"):
                try:
                    newest.added_to(self)
                except BaseException:
                    self.callbacks.remove(newest)
                    raise

        return add_callback

    _wrap(CallbackHandler, "add_callback", made_of)


class TrainerSeams:
    """Overrides for a Trainer's subclass, each a few lines around `super()`; see the module's docstring."""

    callback_handler: CallbackHandler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; whatever ends it early, each callback takes back what it has changed."""
        try:
            return super().train(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            for abandon in self._having("abandon"):
                abandon()

    def _prepare_for_training(
        self: Any, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        # Weights, optimizer and scheduler of another run's checkpoint, without its place in the data.
        start = resume_from_checkpoint
        if start is None:
            found = (warm_start() for warm_start in TrainerSeams._having(self, "warm_start"))
            start = next((folder for folder in found if folder is not None), None)
            if start is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                self._load_from_checkpoint(start)  # sharded models are loaded once they are wrapped
        return super()._prepare_for_training(max_steps, train_dataloader, start)  # pyright: ignore

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        values = super().set_initial_training_values(args, dataloader)  # pyright: ignore[reportAttributeAccessIssue]
        for training_values in self._having("training_values"):
            values = training_values(values, dataloader)
        return values

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        place = super()._init_training_state(  # pyright: ignore[reportAttributeAccessIssue]
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        for resume_position in self._having("resume_position"):
            place = resume_position(place, resume_from_checkpoint)
        return place

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        draw = super().get_batch_samples  # pyright: ignore[reportAttributeAccessIssue]
        return self._through("around_batch_samples", draw, epoch_iterator, num_batches, device)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        step = super().training_step  # pyright: ignore[reportAttributeAccessIssue]
        return self._through("around_training_step", step, model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: Any) -> Any:
        count = super().floating_point_ops  # pyright: ignore[reportAttributeAccessIssue]
        return self._through("around_floating_point_ops", count, inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        track = super()._track_num_input_tokens  # pyright: ignore[reportAttributeAccessIssue]
        self._through("around_input_tokens", track, inputs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, within what each callback's `evaluating` puts in place and takes back."""
        with contextlib.ExitStack() as stack:
            for evaluating in self._having("evaluating"):
                stack.enter_context(evaluating())
            return super().evaluate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # pyright: ignore[reportAttributeAccessIssue]
        for gradient_norm in self._having("gradient_norm"):
            gradient_norm(norm)
        return norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # pyright: ignore[reportAttributeAccessIssue]
        # Before trainer_state.json, which makes a checkpoint whole, and before a push.
        for written in self._having("checkpoint_written"):
            written(Path(output_dir))

    def _through(self, name: str, call: Any, *args: Any) -> Any:
        for around in self._having(name):
            call = functools.partial(around, call)
        return call(*args)

    def _having(self, name: str) -> Iterator[Any]:
        for callback in list(self.callback_handler.callbacks):
            method = getattr(callback, name, None)
            if method is not None:
                yield method
