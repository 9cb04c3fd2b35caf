"""Learning-rate curves: one form for the Trainer, for TRL's trainers and for a loop of PyTorch alone.

A curve is a callable that takes a scheduler step and returns a multiple of each parameter group's own peak.
It runs in torch's `LambdaLR`, which is also what the Trainer makes: there the curve takes the place of the
lambdas of the Trainer's own scheduler, on `on_train_begin`, so that nothing of the trainer has to be
overridden. The curve's fields are plain numbers, strings and tensors; `LambdaLR.state_dict` holds them, and
the Trainer reads `scheduler.pt` with `weights_only=True`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from ..core.checks import check
from ..core.registry import methods
from ._base import Callback, Run

_PREFIX = "curve."
_TWO_SCHEDULES = (
    "optimizers=(..., scheduler) and a callback both set the learning rate; leave one of them out"
)


@dataclass(kw_only=True, eq=False)
class Curve(ABC):
    """A learning-rate curve; subclasses are dataclasses of their fields.

    The curve's own time t runs with the scheduler's steps, or at another pace: from step `anchor_step` on it
    is anchor_time + (step - anchor_step) * pace. So a curve made for a fixed batch can be followed by its
    samples while the batch grows.

    Args:
        anchor_step: Scheduler step at which the pace was last set.
        anchor_time: The curve's time at that step.
        pace: Time per scheduler step, above 0.
    """

    anchor_step: int = 0
    anchor_time: float = 0.0
    pace: float = 1.0

    @abstractmethod
    def factor(self, t: float) -> float:
        """Return the multiple of the peak learning rate at time t; t = 0 is the first update."""

    def time(self, step: int) -> float:
        """Return the curve's time at a scheduler step."""
        return self.anchor_time + (step - self.anchor_step) * self.pace

    def set_pace(self, step: int, pace: float) -> None:
        """Let the curve's time run at another pace from a scheduler step on; it does not jump there."""
        check(pace > 0.0, "pace", pace, "above 0")
        self.anchor_time, self.anchor_step, self.pace = self.time(step), step, pace

    def __call__(self, step: int) -> float:
        """Return the factor at a scheduler step: what `LambdaLR` asks for."""
        return self.factor(self.time(step))

    @property
    def length(self) -> int | None:
        """Updates of the run that the curve was made for; None where it does not depend on them."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Return a PyTorch scheduler that follows the curve; its `state_dict` holds the curve too."""
        functions: list[Callable[[int], float]] = [self for _ in optimizer.param_groups]
        return LambdaLR(optimizer, functions)


@dataclass(kw_only=True, eq=False)
class Clock(Curve):
    """Time alone, at a pace: lets a schedule that is not ours run by another count than updates."""

    def factor(self, t: float) -> float:
        """Return the time."""
        return t

    def driving(
        self, function: Callable[[int], float], scale: Callable[[], float] = lambda: 1.0
    ) -> Callable[[int], float]:
        """Return the function of this clock's time in the place of the scheduler's step, times the scale."""

        # A plain function: `LambdaLR.state_dict` leaves it out, so that scheduler.pt holds no code.
        def driven(step: int) -> float:
            time = self(step)
            return function(int(time) if time == int(time) else time) * scale()  # pyright: ignore[reportArgumentType]

        return driven


@dataclass(kw_only=True, eq=False, repr=False)
class LearningRateCallback(Callback):
    """Base of the callbacks that own the learning rate: a method says which curve it follows.

    The Trainer's `lr_scheduler_type` and warm-up are not used. A peak is each parameter group's own learning
    rate, on resume that of the checkpoint. A curve that depends on the run's length is made anew for a run
    that is resumed with another one, as the Trainer's own schedules are.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"learning_rate"})

    @abstractmethod
    def make_curve(self, run: Run) -> Curve:
        """Return the curve of a new run."""

    @abstractmethod
    def curve_from(self, fields: Mapping[str, Any]) -> Curve:
        """Return a curve with the fields of a saved one."""

    def check_arguments(self, args: TrainingArguments) -> None:
        """Refuse a rate that optimizers refuse too, but do not name."""
        rate: Any = args.learning_rate
        check(isinstance(rate, int | float) and rate >= 0.0, "learning_rate", rate, "a number above 0")

    def make_curve_anew(self, run: Run, curve: Curve) -> Curve:
        """Return the curve of a resumed run of another length than the one that the saved curve is for."""
        return self.make_curve(run)

    def reset(self) -> None:
        """Forget the curve of an earlier run."""
        self._learning_rate: float | None = None  # the argument of the run that the curve was made for
        self.curve: Curve | None = None
        self._scheduler: LambdaLR | None = None
        self._replaced: list[Callable[[int], float]] = []

    def begin(self, run: Run) -> None:
        """Put the curve in the place of the Trainer's.

        Raises:
            ValueError: The scheduler is not the Trainer's, no rate is above 0, or the run is resumed from a
                checkpoint of one that followed another callback's curve.
        """
        check_scheduler(run.lr_scheduler)
        if run.own_scheduler:
            raise ValueError(_TWO_SCHEDULES)
        check_rates(run.optimizer)
        resumed = self.curve is not None
        if not resumed and run.state.global_step > 0:
            self._refuse_other_schedule(run)
        if self.curve is None:
            self.curve = self.make_curve(run)
        else:
            self.curve = self._of_length(run, self.curve)
        if not resumed:
            self._learning_rate = run.args.learning_rate
        _warn_of_unused(run.args, run.lr_scheduler, type(self).__name__, self._rate_is_new(run, resumed))
        self._scheduler = run.lr_scheduler
        self._replaced = list(run.lr_scheduler.lr_lambdas)
        follow(run.lr_scheduler, [self.curve] * len(self._replaced))

    def _refuse_other_schedule(self, run: Run) -> None:
        for info in methods("callback"):
            other: Any = info.target
            if other is type(self) or not self.owns & other.owns or not other.marked(run.state):
                continue
            raise ValueError(
                f"the checkpoint of step {run.state.global_step} is one of a run whose learning rate "
                f"{other.__name__} set, and {type(self).__name__} is to set it now: resume with "
                f"{other.__name__}, or, where the schedule is to change, start a new run from the "
                "checkpoint's model, without resume_from_checkpoint"
            )

    def _rate_is_new(self, run: Run, resumed: bool) -> bool:
        """Return whether `learning_rate` was changed, and is not used: the checkpoint's rates are."""
        given, before = run.args.learning_rate, self._learning_rate
        if before is None:  # a checkpoint of an earlier version
            return resumed and given not in run.lr_scheduler.base_lrs
        return given != before and any(float(rate) != given for rate in run.lr_scheduler.base_lrs)

    def _of_length(self, run: Run, curve: Curve) -> Curve:
        before, steps = curve.length, run.state.max_steps
        if before is None or before == steps:
            return curve
        anew = self.make_curve_anew(run, curve)
        anew.anchor_step, anew.anchor_time, anew.pace = curve.anchor_step, curve.anchor_time, curve.pace
        warnings.warn(
            f"{type(self).__name__}: max_steps is {steps}, and {before} in the checkpoint: from step "
            f"{run.state.global_step} on the learning rate is that of a run of {steps} steps",
            stacklevel=2,
        )
        return anew

    def undo(self) -> None:
        """Give the Trainer's scheduler its own lambdas back; the groups' rates stay, as after any run."""
        if self._scheduler is not None and self._replaced:
            self._scheduler.lr_lambdas = self._replaced
        self._scheduler, self._replaced = None, []

    @property
    def step(self) -> int:
        """Scheduler step of the next update."""
        assert self._scheduler is not None
        return int(self._scheduler.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the curve's fields, and the learning rate that the arguments had."""
        fields = {} if self.curve is None else self.curve.state_dict()
        named = {f"{_PREFIX}{name}": value for name, value in fields.items()}
        return {**named, "learning_rate": self._learning_rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._learning_rate = state.get("learning_rate")
        fields = {name: value for name, value in state.items() if name.startswith(_PREFIX)}
        self.curve = self.curve_from({name.removeprefix(_PREFIX): value for name, value in fields.items()})


def check_scheduler(scheduler: Any) -> None:
    """Raise unless a scheduler is one that transformers has made and steps once per optimizer step.

    Raises:
        ValueError: It is of another class, or follows functions of the user's.
    """
    name = type(scheduler).__name__
    if type(scheduler) is not LambdaLR:
        raise ValueError(
            "lr_scheduler_type must be one that steps once per update where a callback sets the learning "
            f"rate, such as 'linear', got the scheduler {name}"
        )
    for function in scheduler.lr_lambdas:
        module = getattr(getattr(function, "func", function), "__module__", "")
        if module != "transformers.optimization":
            raise ValueError(_TWO_SCHEDULES)


def check_rates(optimizer: Any) -> None:
    """Raise unless the peak of at least one parameter group is above 0, and none is below it.

    Raises:
        ValueError: They are not.
    """
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    fits = all(math.isfinite(rate) and rate >= 0.0 for rate in rates) and any(rates)
    check(fits, "learning_rate", rates[0] if len(set(rates)) == 1 else rates, "above 0")


def follow(scheduler: LambdaLR, functions: list[Any]) -> None:
    """Let a scheduler follow other functions from where it stands, in the next update already."""
    scheduler.lr_lambdas = functions
    rates = [
        base * function(scheduler.last_epoch)
        for base, function in zip(scheduler.base_lrs, functions, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if hasattr(group["lr"], "fill_"):  # a tensor, which a compiled optimizer holds on to
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates


def _warn_of_unused(args: TrainingArguments, scheduler: LambdaLR, owner: str, new_rate: bool) -> None:
    chosen = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    unused = [f"lr_scheduler_type={chosen!r}"] if chosen != "linear" else []
    unused += [f"warmup_steps={args.warmup_steps!r}"] if args.warmup_steps else []
    if new_rate:
        kept = ", ".join(f"{rate:g}" for rate in dict.fromkeys(map(float, scheduler.base_lrs)))
        unused.append(f"learning_rate={args.learning_rate:g} (the checkpoint's is {kept})")
    if unused:
        warnings.warn(f"{owner} sets the learning rate: {', '.join(unused)} is not used", stacklevel=2)
