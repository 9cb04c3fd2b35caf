"""Rates of schedules, and the trace of a run: its learning rates with the losses measured in it."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from ..core.checks import check, check_fields, refuse_unknown
from ..core.state import load_state
from ._annealing_fit import rising_steps
from ._schedule import Curve

TRACE = "annealing_law_trace"
TRAINING_LOSS = "loss"  # its name in a Trainer's log


@dataclass(frozen=True, eq=False)
class LossTrace:
    """Learning rates of a run, and the losses measured in it.

    Args:
        rates: (T,) rate of each update from the first on, float64.
        steps: (n,) updates made before each loss was measured, in 1 to T, int64.
        losses: (n,) held-out losses, or smoothed training losses, nats per token, float64.
        first_step: Optimizer step of the first rate; a fit needs 1.
        warmup_steps: Updates of the warm-up; None for the first stretch that rises at each update.
        context: What the law depends on: model, optimizer, batch_size, weight_decay, and the like.
        name: What errors call the run, such as its folder; it is not part of what was recorded.
    """

    rates: Tensor
    steps: Tensor
    losses: Tensor
    first_step: int = 1
    warmup_steps: int | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        check(len(self.steps) == len(self.losses), "losses", len(self.losses), f"{len(self.steps)} numbers")
        inside = not len(self.steps) or bool(((self.steps >= 1) & (self.steps <= len(self.rates))).all())
        check(inside, "steps", self.steps.tolist()[-3:], f"in 1 to {len(self.rates)}, the number of rates")

    @property
    def warmup(self) -> int:
        """Updates of the warm-up."""
        return rising_steps(self.rates) if self.warmup_steps is None else self.warmup_steps

    @property
    def peak(self) -> float:
        """Largest rate."""
        return float(self.rates.max()) if len(self.rates) else 0.0

    @classmethod
    def from_log_history(
        cls,
        history: Iterable[Mapping[str, Any]],
        rates: Sequence[float] | Tensor | None = None,
        *,
        metric: str = "eval_loss",
        smooth: float = 0.0,
        context: Mapping[str, Any] | None = None,
    ) -> LossTrace:
        """Return the trace in a Trainer's `state.log_history`.

        Args:
            history: The log.
            rates: Rate of each update, as from `schedule_rates`; None takes those logged, with lines between.
            metric: The loss's name in the log; "loss" is that of training, which must be smoothed.
            smooth: For "loss": weight of the former mean at each log, in (0, 1); see `SmoothedLoss`.
            context: As the class's.

        Raises:
            ValueError: No loss of that name, or no rate, is in the log; a training loss is not smoothed, or
                goes on after the first epoch.
        """
        history = list(history)
        check_smooth(smooth, training=metric == TRAINING_LOSS)
        if metric == TRAINING_LOSS:
            points = _smoothed(history, smooth)
        else:
            points = {int(entry["step"]): float(entry[metric]) for entry in history if metric in entry}
            points.pop(0, None)
        check(bool(points), "metric", metric, "a number of the log")
        if rates is None:
            known = {int(e["step"]): float(e["learning_rate"]) for e in history if "learning_rate" in e}
            check(bool(known), "log_history", f"{len(history)} entries", "one with learning rates")
            rates = _between(known, max(*points, *known))
        steps = torch.tensor(sorted(points))
        losses = torch.tensor([points[step] for step in steps.tolist()], dtype=torch.float64)
        return cls(torch.as_tensor(rates, dtype=torch.float64), steps, losses, context=context or {})


class SmoothedLoss:
    """A running mean of logged training losses, and the update that it stands for.

    A log holds the mean loss of the updates since the last one. Weights fall by `keep` from each log to the
    one before and add up to 1. The loss of update i is that of the weights after i - 1 updates; the mean
    stands for the mean of these numbers with the same weights, so that a loss which falls along a line is
    not delayed by smoothing.

    Args:
        keep: Weight of the former mean, in (0, 1); nearer to 1 is smoother.
    """

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self.weight, self.loss, self.place = 0.0, 0.0, 0.0  # sums that are not divided yet

    def add(self, first: int, last: int, loss: float) -> tuple[float, float]:
        """Take the mean loss of the updates `first` to `last`, from 1.

        Returns:
            The number of updates that the running mean stands for, and the mean.
        """
        new = 1.0 - self.keep
        self.weight = self.keep * self.weight + new
        self.loss = self.keep * self.loss + new * loss
        self.place = self.keep * self.place + new * ((first + last) / 2.0 - 1.0)
        return self.place / self.weight, self.loss / self.weight

    def sums(self) -> Tensor:
        """Return the sums (3,), float64: a tensor, for a loss that is no number is none in JSON."""
        return torch.tensor([self.weight, self.loss, self.place], dtype=torch.float64)

    def restore(self, sums: Tensor) -> None:
        """Go on from the sums of another mean."""
        self.weight, self.loss, self.place = sums.tolist()


def check_smooth(smooth: float, *, training: bool) -> None:
    """Check how a loss is to be smoothed.

    Raises:
        ValueError: A training loss is not smoothed, or another one is.
    """
    if training:
        check(0.0 < smooth < 1.0, "smooth", smooth, "in (0, 1) for the training loss, which is noisy")
    else:
        check(smooth == 0.0, "smooth", smooth, "0 for a held-out loss")


def _smoothed(history: Iterable[Mapping[str, Any]], smooth: float) -> dict[int, float]:
    # The first log after a resume is a mean since the checkpoint, which a log does not tell: it is placed as
    # one since the log before. The callback, which knows, places it right.
    mean, done, points = SmoothedLoss(smooth), 0, {}
    for entry in history:
        if TRAINING_LOSS not in entry:
            continue
        epoch, step = float(entry.get("epoch", 0.0)), int(entry["step"])
        rule = "at most 1 for the training loss: the law does not hold for repeated data"
        check(epoch <= 1.0 + 1e-9, "epoch", epoch, rule, where=f"step {step}")
        place, loss = mean.add(done + 1, step, float(entry[TRAINING_LOSS]))
        points[round(place)], done = loss, step
    points.pop(0, None)
    return points


def _between(known: Mapping[int, float], count: int) -> Tensor:
    places = sorted(known)
    where, values = torch.tensor(places), torch.tensor([known[p] for p in places], dtype=torch.float64)
    steps = torch.arange(1, count + 1)
    if len(places) == 1:
        return values.expand(count).clone()
    right = torch.searchsorted(where, steps).clamp(1, len(places) - 1)
    share = ((steps - where[right - 1]) / (where[right] - where[right - 1])).clamp(0.0, 1.0)
    return values[right - 1] + share * (values[right] - values[right - 1])


def recorded_trace(folder: str | Path) -> LossTrace:
    """Return the trace that `AnnealingLawCallback` has left in a run's folder, or in a checkpoint.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    for name in (TRACE, "hf_ext_annealing_law"):
        try:
            scalars, tensors = load_state(folder, name)
        except FileNotFoundError:
            continue
        scalars = scalars.get("state", scalars)  # a checkpoint's file also has settings
        if {"first_step", "warmup_steps", "context"} <= scalars.keys() and {"rates", "losses"} <= (
            tensors.keys()
        ):
            names = [entry.name for entry in dataclasses.fields(LossTrace)]
            fields = {key: value for key, value in {**tensors, **scalars}.items() if key in names}
            return LossTrace(**{**fields, "name": str(folder)})
        raise ValueError(f"{Path(folder) / name}.json does not hold a trace of learning rates and losses")
    raise ValueError(f"{folder} holds no trace of a run ({TRACE}.json); train with AnnealingLawCallback()")


def curve_rates(curve: Curve, steps: int, peak: float) -> Tensor:
    """Return the rates (steps,) of one of this library's curves, float64."""
    return torch.tensor([peak * curve(step) for step in range(steps)], dtype=torch.float64)


def schedule_rates(name: str, steps: int, peak: float, *, warmup_steps: int = 0, **options: Any) -> Tensor:
    """Return the rates of one of transformers' schedules, or of "wsd".

    Args:
        name: As in `lr_scheduler_type`. "wsd" is "warmup_stable_decay" with a linear decay. Where an option
            is not given, it decays over the last 20 % of the steps, and "cosine_with_min_lr" to 10 %.
        steps: Updates of the run, at least 1.
        peak: Peak rate, above 0.
        warmup_steps: Updates of the warm-up.
        **options: As in `lr_scheduler_kwargs`.

    Returns:
        (steps,), float64.

    Raises:
        ValueError: The name or an option is unknown, the schedule depends on more than the step, or its
            phases are longer than the run.
        TypeError: An option is not of its type.
    """
    check(steps >= 1, "steps", steps, "at least 1")
    check(peak > 0.0, "peak", peak, "above 0")
    check(0 <= warmup_steps < steps, "warmup_steps", warmup_steps, f"in [0, {steps})")
    known = {str(kind.value) for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    if name == "wsd":
        name, options = "warmup_stable_decay", {"decay_type": "linear", **options}
    if name not in known:
        refuse_unknown("schedule", name, {*known, "wsd"})
    options = check_fields(options, _options(name), where=f"schedule {name!r}")
    if name == "warmup_stable_decay":
        options = {"num_decay_steps": max(1, min(round(0.2 * steps), steps - warmup_steps)), **options}
        _check_phases(steps, warmup_steps, options)
    if name.endswith("with_min_lr") and not {"min_lr", "min_lr_rate"} & options.keys():
        options = {"min_lr_rate": 0.1, **options}
    if name == "constant" and warmup_steps:
        name = "constant_with_warmup"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=peak)
    scheduler: Any = get_scheduler(name, optimizer, warmup_steps, steps, options)
    factor = scheduler.lr_lambdas[0]
    return torch.tensor([peak * factor(step) for step in range(steps)], dtype=torch.float64)


def _options(name: str) -> dict[str, Any]:
    """Return the options of one of transformers' schedules, with their types."""
    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
    others = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    # Upstream leaves some annotations out; the default's type says the same.
    return {key: hints.get(key, type(parameters[key].default)) for key in parameters if key not in others}


def _check_phases(steps: int, warmup_steps: int, options: Mapping[str, Any]) -> None:
    before = warmup_steps
    if (stable := options.get("num_stable_steps")) is not None:
        rule = f"in [0, {steps - before}], what the warm-up leaves of {steps} steps"
        check(0 <= stable <= steps - before, "num_stable_steps", stable, rule)
        before += stable
    decay = options["num_decay_steps"]
    rule = f"in [0, {steps - before}], what the phases before it leave of {steps} steps"
    check(0 <= decay <= steps - before, "num_decay_steps", decay, rule)
