"""Macro-batches: an effective batch that grows during a run, in a Trainer that goes on counting rightly.

The Trainer's `gradient_accumulation_steps` G must not change during a run: the test that ends an update runs
on a counter of the epoch, and one loss would be divided by another update's count. Here an update draws k G
micro-batches instead of G and hands them on as G lists, which the Trainer takes for micro-batches; a list's
parts are run one after another. So losses, token counts, clipping and logs are those of a run that
accumulates over k G.

Time is counted in starting updates: those that a run whose batch stays as the settings say would have made
with the same samples. Learning-rate schedules and the end of the run follow it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..core.checks import check
from ._base import Callback, Run
from ._gradients import steps_in_backward
from ._schedule import Clock, Curve, LearningRateCallback, check_scheduler, follow

_CLOCK = "clock."
# Trainers that make their batches themselves, by a plan that depends on the accumulation steps.
ONLINE = frozenset(
    {
        "AsyncDistillationTrainer",
        "AsyncGRPOTrainer",
        "GKDTrainer",
        "GOLDTrainer",
        "NashMDTrainer",
        "OnlineDPOTrainer",
        "PPOTrainer",
        "XPOTrainer",
    }
)


class MacroBatch(list[Any]):
    """Micro-batches that the Trainer takes for one."""


def regroup(batches: Sequence[Any], count: int) -> list[MacroBatch]:
    """Return consecutive batches in `count` groups of nearly equal size; only leading ones can be empty.

    The last group ends the update, so that it must not be empty.
    """
    total = len(batches)
    bounds = [-(-index * total // count) for index in range(count + 1)]
    if total < count:
        bounds = [max(0, total - count + index) for index in range(count + 1)]
    return [MacroBatch(batches[a:b]) for a, b in itertools.pairwise(bounds)]


def groups_of_update(done: int, accumulation: int, in_epoch: int) -> int:
    """Return how many groups the Trainer still takes until it makes an update.

    Args:
        done: Groups that it has taken in the epoch.
        accumulation: `gradient_accumulation_steps`: it makes an update after every so many groups,
        in_epoch: and after this many.
    """
    count = accumulation - done % accumulation
    return min(count, in_epoch - done) if done < in_epoch else count


def updates_left(time_left: int, used: int, length: int | None, accumulation: int, factor: int) -> int:
    """Return the updates to the end of a run whose batch grows no more.

    Args:
        time_left: Starting updates whose samples are left.
        used: Micro-batches of the epoch that have been used.
        length: Those of an epoch; None for a data set without a length.
        accumulation: Micro-batches of a starting update, G.
        factor: Multiple k of the batch.
    """

    def updates(micro_batches: int) -> int:
        return math.ceil(micro_batches / (factor * accumulation))

    if length is None:
        return updates(time_left * accumulation)
    in_epoch = math.ceil(length / accumulation)
    here = in_epoch - math.ceil(used / accumulation)
    if time_left <= here:
        return updates(min(time_left * accumulation, length - used))
    full, rest = divmod(time_left - here, in_epoch)
    last = min(rest * accumulation, length)
    return updates(length - used) + full * updates(length) + updates(last)


@dataclass(frozen=True)
class Geometry:
    """The run that the settings ask for, in micro-batches of one process.

    Args:
        rows: Samples of a micro-batch.
        world: Processes.
        accumulation: Micro-batches of an update, G.
        length: Those of an epoch; None for a data set without a length.
        in_epoch: Groups after which the Trainer ends an epoch.
        max_steps: Updates.
        examples: Samples of the data set, on all processes.
    """

    rows: int
    world: int
    accumulation: int
    length: int | None
    in_epoch: int
    max_steps: int
    examples: int

    @property
    def unit(self) -> int:
        """Samples of an update on all processes: the batch of the settings."""
        return self.rows * self.world * self.accumulation

    def samples(self, micro_batches: int) -> int:
        """Return the samples of an epoch's first micro-batches on all processes; the last can be short."""
        one = self.rows * self.world
        whole = micro_batches * one
        if self.length is None or not (self.length - 1) * one < self.examples <= self.length * one:
            return whole  # a stream, or a sampler that draws another number than the data's
        return min(whole, self.examples)


@dataclass(kw_only=True, eq=False, repr=False)
class MacroBatchCallback(Callback):
    """Base of the callbacks that choose the effective batch: k times that of the settings, k whole.

    A method says how large k can get, sets `factor` for the next update, and may look at gradients in
    `run_group`. Counters, learning rate and the place in the data are kept here.

    In a checkpoint: k, the place in the data, the time, the samples used, the batch of the settings, and the
    learning rate's clock.
    """

    # Gradients are averaged over the processes, and their noise over the processes is looked at.
    owns: ClassVar[frozenset[str]] = frozenset({"batch_size", "gradient_averaging"})

    def __post_init__(self) -> None:
        self._geometry: Geometry | None = None  # before a run begins, and not reset by its beginning
        super().__post_init__()

    # What a method fills in -----------------------------------------------------------------------

    @abstractmethod
    def factors(self, unit: int) -> tuple[int, int]:
        """Return the first and the largest k where the settings' batch is of `unit` samples."""

    @abstractmethod
    def counts_samples(self) -> bool:
        """Return whether the run ends, and learning rates fall, by samples; by updates otherwise."""

    def rate_scale(self) -> float:
        """Return a factor of the learning rate."""
        return 1.0

    def scales_rate(self) -> bool:
        """Return whether `rate_scale` can be other than 1."""
        return False

    def begin_update(self, batches: Sequence[Any], items: Any) -> None:
        """Take note that an update begins.

        Args:
            batches: Its micro-batches on this process, `update_size` of them.
            items: `num_items_in_batch`.
        """

    def gathers_groups(self) -> bool:
        """Return whether the whole update is to come to `run_group` as one group."""
        return False

    def run_group(self, run: Callable[[Any], Tensor], model: Any, group: MacroBatch, items: Any) -> Tensor:
        """Run forward and backward for each micro-batch of a group, and return the sum of the losses.

        Args:
            run: What does it for one micro-batch.
            model: The model as it is wrapped.
            group: The micro-batches; there may be none.
            items: `num_items_in_batch`.
        """
        total = self._zero()
        for index, batch in enumerate(group):
            with contextlib.nullcontext() if index == len(group) - 1 else self.no_sync(model):
                total = total + run(batch)
        return total

    # Of use to a method ---------------------------------------------------------------------------

    @property
    def geometry(self) -> Geometry:
        """The run that the settings ask for."""
        assert self._geometry is not None
        return self._geometry

    @property
    def update_size(self) -> int:
        """Micro-batches of the current update on this process."""
        return self._drawn

    @property
    def batch(self) -> int:
        """Samples of the next update on all processes."""
        return self.factor * self.geometry.unit

    @property
    def first_factor(self) -> int:
        """First k: never more than the largest."""
        return min(self.factors(self.geometry.unit)[0], self.largest_factor)

    @property
    def largest_factor(self) -> int:
        """Largest k: never more than an epoch."""
        plan = self.geometry
        largest = self.factors(plan.unit)[1]
        return largest if plan.length is None else min(largest, math.ceil(plan.length / plan.accumulation))

    @property
    def group_ends_update(self) -> bool:
        """Whether the group that runs is the last of its update."""
        return self._groups_left == 0

    def no_sync(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which a backward does not reduce gradients over the processes."""
        accelerator = self.trainer.accelerator
        if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            return contextlib.nullcontext()
        return accelerator.no_sync(model)

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.trainer.args.device)

    # The run --------------------------------------------------------------------------------------

    def needs_attach(self, args: TrainingArguments) -> str | None:
        """The batches of an update are drawn by the Trainer itself."""
        return "draws the batches of an update"

    def reset(self) -> None:
        """Forget an earlier run."""
        self.factor = 0
        self._epoch, self._used, self._time, self._samples = 0, 0, 0, 0
        self._drawn, self._taken, self._groups_left, self._last_batch = 0, 0, 0, 0
        self._resumed = self._first_epoch = False
        self._clock: Clock | None = None
        self._scheduler: Any = None
        self._replaced: list[Any] = []

    def training_values(self, values: Sequence[Any], dataloader: Any) -> tuple[Any, ...]:
        """Take note of the run that the settings ask for; allow for more passes over the data."""
        epochs, in_epoch, examples, samples, batch, length, max_steps = values
        args = self.trainer.args
        known = has_length(dataloader)
        self._geometry = Geometry(
            rows=self.trainer._train_batch_size,
            world=args.world_size,
            accumulation=args.gradient_accumulation_steps,
            length=length if known else None,
            in_epoch=length,
            max_steps=max_steps,
            examples=examples,
        )
        largest = self.largest_factor
        if not known and largest > 1:  # the Trainer takes `max_steps` updates for an epoch
            in_epoch, length = in_epoch * largest, length * largest
            self._geometry = Geometry(**{**vars(self._geometry), "in_epoch": length})
        elif known and not self.counts_samples():
            fewest = math.ceil(length / (largest * args.gradient_accumulation_steps))
            epochs = max(epochs, min(sys.maxsize, math.ceil(max_steps / max(fewest, 1))))
        return epochs, in_epoch, examples, samples, batch, length, max_steps

    def resume_position(self, place: tuple[int, int], checkpoint: str | None) -> tuple[int, int]:
        """Return passes over the data and micro-batches in the current one, at the checkpoint."""
        state = self.trainer.state
        if checkpoint is None or not self.marked(state):
            return place
        saved = self.read_state(Path(checkpoint), state.global_step)
        return saved["epoch"], 0 if self.trainer.args.ignore_data_skip else saved["used"]

    def begin(self, run: Run) -> None:
        """Check that the trainer can do it, and take over the learning rate's clock."""
        refuse_trainer(self.trainer, run.optimizer_name)
        if not self._resumed:
            self.factor = self.first_factor
            self._take_place(run.state.global_step)
        if run.args.ignore_data_skip and run.state.global_step > 0:
            self._used = 0
        self._first_epoch = True
        self._warn_of_a_short_epoch()
        self._follow_time(run)

    def _take_place(self, step: int) -> None:
        """Set the place in the data to that of a run of `step` starting updates."""
        plan = self.geometry
        in_epoch = math.ceil((plan.length or plan.max_steps * plan.accumulation) / plan.accumulation)
        self._time = step
        self._epoch, updates = divmod(step, in_epoch)
        self._used = updates * plan.accumulation
        whole = plan.length or in_epoch * plan.accumulation
        self._samples = self._epoch * plan.samples(whole) + plan.samples(self._used)

    def _warn_of_a_short_epoch(self) -> None:
        plan = self.geometry
        start, largest = self.factors(plan.unit)
        if self.largest_factor < largest:
            name = self.info.name
            wanted = f"may grow to {largest * plan.unit}"
            if start > self.largest_factor:
                wanted = f"is to start at {start * plan.unit}"
            warnings.warn(
                f"{name}: an update is at most an epoch of the data, {self.largest_factor * plan.unit} "
                f"samples or less, where the batch {wanted}",
                stacklevel=2,
            )

    def _follow_time(self, run: Run) -> None:
        if not (self.counts_samples() or self.scales_rate()):
            return
        owner = self._rate_owner()
        if owner is not None:
            check(
                not self.scales_rate(),
                "scale_lr",
                self.settings().get("scale_lr"),
                f"0 where {type(owner).__name__} sets the learning rate",
            )
            return
        check_scheduler(run.lr_scheduler)
        clock = self._clock or Clock()
        self._clock, self._scheduler = clock, run.lr_scheduler
        self._replaced = list(run.lr_scheduler.lr_lambdas)
        follow(run.lr_scheduler, [clock.driving(function, self.rate_scale) for function in self._replaced])

    def _rate_owner(self) -> Callback | None:
        callbacks = self.trainer.callback_handler.callbacks
        return next((c for c in callbacks if isinstance(c, Callback) and "learning_rate" in c.owns), None)

    def _curve(self) -> Curve | None:
        """Return what the learning rate's time is set in, or None where it runs by updates."""
        owner = self._rate_owner() if self.counts_samples() else None
        if owner is not None:
            return owner.curve if isinstance(owner, LearningRateCallback) else None
        return self._clock if self.counts_samples() else None

    def undo(self) -> None:
        """Give the scheduler its own functions back."""
        if self._scheduler is not None:
            self._scheduler.lr_lambdas = self._replaced
        self._scheduler, self._replaced = None, []

    # Events and overrides -------------------------------------------------------------------------

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go to the start of the data, unless the run has just been resumed within them."""
        if not self._first_epoch:
            self._epoch, self._used = self._epoch + 1, 0
        self._first_epoch = False
        self._taken = self._used

    def around_batch_samples(
        self, draw: Any, iterator: Any, count: int, device: Any
    ) -> tuple[list[Any], Any]:
        """Draw the micro-batches of an update, in as many groups as the Trainer takes for one."""
        plan = self.geometry
        wanted = self.factor * plan.accumulation
        if plan.length is not None:
            wanted = min(wanted, plan.length - self._used)
        if self.counts_samples():
            wanted = min(wanted, (plan.max_steps - self._time) * plan.accumulation)
        batches, items = draw(iterator, wanted, device)
        self._drawn = len(batches)
        if not batches:
            return [], items
        groups = groups_of_update(self._taken, plan.accumulation, plan.in_epoch)
        self._taken, self._groups_left = self._taken + groups, groups
        self.begin_update(batches, items)
        if self.gathers_groups():
            return [*(MacroBatch() for _ in range(groups - 1)), MacroBatch(batches)], items
        return list(regroup(batches, groups)), items

    def around_training_step(self, step: Any, model: Any, inputs: Any, items: Any) -> Tensor:
        """Run a group of micro-batches."""
        if not isinstance(inputs, MacroBatch):
            return step(model, inputs, items)
        self._groups_left -= 1
        # What the Trainer divides a loss by that has not been divided by a count of items.
        self.trainer.current_gradient_accumulation_steps = self._drawn
        return self.run_group(lambda batch: step(model, batch, items), model, inputs, items)

    def around_floating_point_ops(self, count: Any, inputs: Any) -> Any:
        """Return the sum over a group."""
        return sum(count(batch) for batch in inputs) if isinstance(inputs, MacroBatch) else count(inputs)

    def around_input_tokens(self, track: Any, inputs: Any) -> None:
        """Track each batch of a group."""
        for batch in inputs if isinstance(inputs, MacroBatch) else [inputs]:
            track(batch)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set how far the learning rate's time goes in this update, and when the run ends."""
        if self.factor > self.first_factor:
            for other in self.trainer.callback_handler.callbacks:
                if isinstance(other, Callback):
                    other.batch_has_grown()
        curve, pace = self._curve(), float(self._time_of(self._drawn))
        if curve is not None and curve.pace != pace:
            curve.set_pace(int(kwargs["lr_scheduler"].last_epoch), pace)
        if self.counts_samples():
            plan = self.geometry
            left = plan.max_steps - self._time - self._time_of(self._drawn)
            used = self._used + self._drawn
            state.max_steps = (
                state.global_step + 1 + updates_left(left, used, plan.length, plan.accumulation, self.factor)
            )
            self._show_end(state.max_steps)

    def _time_of(self, micro_batches: int) -> int:
        """Return the starting updates that the next micro-batches of the epoch would have made."""
        accumulation = self.geometry.accumulation
        end = self._used + micro_batches
        return math.ceil(end / accumulation) - math.ceil(self._used / accumulation)

    def _show_end(self, max_steps: int) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            bar = callback.training_bar if isinstance(callback, ProgressCallback) else None
            if bar is not None and bar.total != max_steps:
                bar.total = max_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what the update has used."""
        plan = self.geometry
        self._time += self._time_of(self._drawn)
        self._last_batch = plan.samples(self._used + self._drawn) - plan.samples(self._used)
        self._used += self._drawn
        self._samples += self._last_batch
        whole = plan.length or plan.max_steps * plan.accumulation
        state.epoch = self._epoch + self._used / whole

    # State ----------------------------------------------------------------------------------------

    def scalars(self) -> dict[str, float]:
        """Return the samples of the last update, and of all so far."""
        return {"batch": float(self._last_batch), "samples": float(self._samples)}

    def state_dict(self) -> dict[str, Any]:
        """Return the batch, the place in the data and the times."""
        plan = self.geometry
        ended = self._used == plan.length
        clock = {} if self._clock is None else self._clock.state_dict()
        return {
            "factor": self.factor,
            "samples": self._samples,
            "epoch": self._epoch + ended,
            "used": 0 if ended else self._used,
            "time": self._time,
            "rows": plan.rows,
            "world": plan.world,
            "accumulation": plan.accumulation,
            **{f"{_CLOCK}{name}": value for name, value in clock.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: The settings' batch is not that of the checkpoint: places and times count in it.
        """
        plan = self.geometry
        for name, field in (
            ("rows", "per_device_train_batch_size"),
            ("world", "the number of processes"),
            ("accumulation", "gradient_accumulation_steps"),
        ):
            found, saved = getattr(plan, name), state[name]
            check(found == saved, field, found, f"{saved}, as in the checkpoint, where the batch has changed")
        self.factor, self._samples = state["factor"], state["samples"]
        self._epoch, self._used, self._time = state["epoch"], state["used"], state["time"]
        clock = {name.removeprefix(_CLOCK): value for name, value in state.items() if name.startswith(_CLOCK)}
        self._clock = Clock(**clock) if clock else None
        self._resumed = True


def refuse_trainer(trainer: Any, optimizer: str) -> None:
    """Raise unless an update's micro-batches can be drawn and run from outside.

    Raises:
        ValueError: They cannot with this trainer, engine or optimizer; the text names it.
    """
    names = [cls.__name__ for cls in type(trainer).__mro__]
    plans = hasattr(trainer.args, "steps_per_generation") or hasattr(trainer, "_buffered_inputs")
    accelerator = trainer.accelerator
    parallel = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size()}
    parallel["sequence"] = trainer.get_sp_size()
    reasons: Iterable[tuple[bool, str]] = (
        (
            plans or not ONLINE.isdisjoint(names),
            f"{names[0]} generates its batches by a plan that depends on gradient_accumulation_steps",
        ),
        (trainer.is_deepspeed_enabled, "DeepSpeed (ZeRO) accumulates gradients by its own count"),
        (
            trainer.is_fsdp_enabled and not accelerator.is_fsdp2,
            "FSDP version 1 has no gradients by parameter; use fsdp_config={'version': 2}",
        ),
        (
            trainer.is_distributed_loading_by_transformers,
            "a model that was sharded at load time reduces its gradients without Accelerate; use fsdp=True",
        ),
        (trainer.args.n_gpu > 1, "torch.nn.DataParallel splits each batch; start one process per GPU"),
        (bool(accelerator.split_batches), "accelerator_config's split_batches cuts batches by processes"),
        (
            steps_in_backward(optimizer),
            f"{optimizer} steps within the backward pass",
        ),
        *(
            (size > 1, f"{kind} parallelism shares a batch between processes")
            for kind, size in parallel.items()
        ),
    )
    for refused, reason in reasons:
        if refused:
            raise ValueError(f"the effective batch cannot change here: {reason}")
