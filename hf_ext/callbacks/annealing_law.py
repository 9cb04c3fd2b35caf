"""A scaling law with learning-rate annealing: the loss of any schedule from the loss of another one.

Source: Tissue, Wang and Wang 2024, "Scaling Law with Learning Rate Annealing", arXiv 2408.11029. With eta_i
the rate of update i: the forward area S1(s) = sum_{i<=s} eta_i; the annealing momentum m_1 = 0,
m_i = lam m_{i-1} + (eta_{i-1} - eta_i); the annealing area S2(s) = sum_{i<=s} m_i; the law
L(s) = L0 + A S1(s)^-alpha - C S2(s). Updates of the warm-up count as if at the rate that it rises to.

Differs from the paper:
- The fit works on rates over their largest one and starts from a grid over alpha, where the rest is linear;
  objective and optimum are the paper's (Huber loss of log residuals), see `_annealing_fit`.
- Without annealing in the data C cannot be known: it is None, and schedules that anneal are refused.
- Forecasts have an interval, from a bootstrap of residual blocks. It holds the noise of the points and what
  they leave open in the four numbers; it does not hold the law's own error for the run at hand.
- A trailing stretch without a rate is left out: the law would let the loss fall there.
- Where nothing is held out, the smoothed training loss can be fitted, each mean at the mean of its updates.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core import dist
from ..core.checks import check, check_choice
from ..core.files import write_json
from ..core.state import save_state
from ._base import Callback, Neutral, Run, register_callback
from ._forecast import AnnealingLaw, Forecast, check_fit_settings
from ._loss_trace import (
    TRACE,
    TRAINING_LOSS,
    LossTrace,
    SmoothedLoss,
    check_smooth,
    curve_rates,
    recorded_trace,
    schedule_rates,
)

__all__ = [
    "AnnealingLaw",
    "AnnealingLawCallback",
    "Forecast",
    "LossTrace",
    "curve_rates",
    "recorded_trace",
    "schedule_rates",
]

LAW = "annealing_law.json"
TARGETS = ("eval_loss", "smoothed_train_loss")
POINTS = 50  # smoothed training losses of a run, unless `stride` says otherwise
# Settings of trainers with a language-modelling loss; of those of the libraries below no others.
LAW_FOR = ("TrainingArguments", "Seq2SeqTrainingArguments", "SFTConfig")
LIBRARIES = ("transformers", "trl", "hf_ext")


@register_callback(
    "annealing_law",
    summary="forecasts the final loss of the current schedule, and of others, by a fitted scaling law",
    paper="arXiv:2408.11029",
    supports={"observes"},
    neutral=Neutral(settings={}, arguments={}),
    test_kwargs={"lam": 0.99},
    bad_kwargs=(
        {"lam": 0.5},
        {"lam": 1.0},
        {"delta": 0.0},
        {"fit_from": 0},
        {"level": 1.0},
        {"resamples": 0},
        {"metric": ""},
        {"target": "loss"},
        {"target": "smoothed_train_loss", "smooth": 0.0},
        {"target": "smoothed_train_loss", "smooth": 1.0},
        {"smooth": 0.9},
        {"target": "smoothed_train_loss", "smooth": 0.9, "metric": "eval_other"},
        {"target": "smoothed_train_loss", "smooth": 0.9, "stride": 0},
        {"stride": 5},
    ),
)
@dataclass(kw_only=True, eq=False, repr=False)
class AnnealingLawCallback(Callback):
    """Record learning rates and losses, and forecast the final loss while the run goes on.

    The run itself is not touched. After each evaluation from the 20th on, the law is fitted to the run so
    far; logs have `annealing_law/final_loss` with `final_loss_low` and `final_loss_high` for the schedule
    that the run follows. At the end the run's folder gets the trace (`annealing_law_trace`) and the fit
    (`annealing_law.json`), for `hf-ext schedule predict`.

    Where nothing is held out, `target="smoothed_train_loss"` takes a running mean of the logged training
    losses instead, in one pass over the data. It forecasts that mean; noise and a lag that smoothing leaves
    make it the less certain target.

    In a checkpoint: the trace, 8 bytes for each update and 16 for each loss, and the running mean.

    Args:
        metric: Held-out loss in the evaluation's metrics.
        target: "eval_loss" for the evaluations' losses, or "smoothed_train_loss".
        smooth: For the training loss: weight of the former mean at each log, in (0, 1); 1 / (1 - smooth) logs
            count. 0 for held-out losses.
        stride: For the training loss: updates between the means that are fitted, at least 1; None for a
            fiftieth of the run. Logs that are further apart are all taken.
        lam: Decay of the annealing momentum, in [0.9, 0.9999].
        fit_lambda: Whether to take the best of 0.99, 0.995 and 0.999 instead.
        delta: Threshold of the Huber loss, in log loss, above 0.
        fit_from: First update whose loss counts, at least 1; None for 2 % of the run after its warm-up.
        level: Share of the bootstrap's refits within the interval, in (0, 1).
        resamples: Refits of the bootstrap, at least 1.
    """

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"metric", "stride", "lam", "fit_lambda", "delta", "fit_from", "level", "resamples"}
    )

    metric: str = "eval_loss"
    target: str = "eval_loss"
    smooth: float = 0.0
    stride: int | None = None
    lam: float = 0.999
    fit_lambda: bool = False
    delta: float = 1e-3
    fit_from: int | None = None
    level: float = 0.9
    resamples: int = 100

    def validate(self) -> None:
        """Check the settings."""
        check(bool(self.metric), "metric", self.metric, "a name")
        check_choice("target", self.target, TARGETS)
        check_smooth(self.smooth, training=self._of_training)
        if self._of_training:
            check(self.metric == "eval_loss", "metric", self.metric, f"left out for target={self.target!r}")
        rule = "at least 1, and left out unless the target is the training loss"
        fits = self.stride is None or (self._of_training and self.stride >= 1)
        check(fits, "stride", self.stride, rule)
        check_fit_settings(self.lam, self.delta, self.fit_from, self.resamples)
        check(0.0 < self.level < 1.0, "level", self.level, "in (0, 1)")
        check(self.resamples >= 1, "resamples", self.resamples, "at least 1")

    def reset(self) -> None:
        """Forget an earlier run."""
        self._rates: list[float] = []
        self._evals: dict[int, float] = {}  # loss by the number of updates before it
        self._mean = SmoothedLoss(self.smooth)
        self._logged = self._kept = 0  # updates before the last log, and before the last mean that is fitted
        self._stride, self._passes, self._repeats = 1, 0, False
        self._first_step = 1
        self._context: dict[str, Any] = {}
        self._scheduler: Any = None
        self._areas = _RunningAreas(self.lam)
        self.law: AnnealingLaw | None = None
        self.forecast: Forecast | None = None
        self._why = "no loss has been logged" if self._of_training else "no evaluation has been made"
        self._batch_grew = False

    def batch_has_grown(self) -> None:
        """Say once that the law does not hold for it."""
        if not self._batch_grew:
            warnings.warn(
                "annealing_law: the batch has grown; the law counts updates of one size, and a fit that goes "
                "beyond those made so far does not hold",
                stacklevel=2,
            )
        self._batch_grew = True

    @property
    def _of_training(self) -> bool:
        return self.target == "smoothed_train_loss"

    def begin(self, run: Run) -> None:
        """Note what the law depends on.

        Raises:
            ValueError: The trainer's loss is none that the law holds for, or the training loss is to be
                fitted and the data are seen more than once.
        """
        kind = _arguments(run.args)
        rule = f"{', '.join(LAW_FOR[:-1])} or {LAW_FOR[-1]}, or a class of your own of one of them: no power"
        rule += " law is known for losses other than that of language modelling"
        check(kind in LAW_FOR, "training arguments", kind, rule)
        rate = run.args.learning_rate  # optimizers with a rate of their own, or none yet, are all right
        check(rate is None or rate > 0.0, "learning_rate", rate, "above 0")
        self._scheduler = getattr(run.lr_scheduler, "scheduler", run.lr_scheduler)
        if not self._rates:
            # A run that continues another's weights is at step 0, but its scheduler is not.
            done = max(run.state.global_step, int(getattr(self._scheduler, "last_epoch", 0)))
            self._first_step = done + 1
        # A stream says that it has no end, whatever its length: its second pass is seen when it begins.
        epochs = run.state.num_train_epochs
        rule = "'eval_loss' where data are repeated, for which the law does not hold"
        once = not self._of_training or epochs <= 1 or epochs >= sys.maxsize
        check(once, "target", self.target, rule, where=f"{epochs} epochs")
        self._stride = max(1, round(run.state.max_steps / POINTS)) if self.stride is None else self.stride
        self._context = {**_context(run), "loss": self.target if self._of_training else self.metric}

    def undo(self) -> None:
        """Let the scheduler go; the trace and the law stay readable."""
        self._scheduler = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rate of the update, unless it was skipped (an overflow in fp16)."""
        optimizer = kwargs["optimizer"]
        if not getattr(optimizer, "step_was_skipped", False):
            rate = float(optimizer.param_groups[0]["lr"])
            self._rates.append(rate)
            self._areas.add(rate)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the loss, and forecast the final one."""
        metrics = kwargs.get("metrics") or {}
        if self._of_training or not self._running or not self._rates or self.metric not in metrics:
            return
        self._evals[len(self._rates)] = float(metrics[self.metric])
        self._fit(state.max_steps - state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take no more training losses once the data begin again."""
        self._passes += 1
        self._repeats = self._repeats or self._passes > 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the training loss, where it is fitted, before the log is extended."""
        if self._of_training and self._running and not self._repeats and TRAINING_LOSS in (logs or {}):
            assert logs is not None
            self._note(float(logs[TRAINING_LOSS]), state.max_steps - state.global_step)
        super().on_log(args, state, control, logs=logs, **kwargs)

    def _note(self, loss: float, left: int) -> None:
        done = len(self._rates)
        if done == self._logged:  # all of its updates were skipped
            return
        place, mean = self._mean.add(self._logged + 1, done, loss)
        self._logged = done
        if done - self._kept >= self._stride and round(place) >= 1:
            self._kept = done
            self._evals[round(place)] = mean
            self._fit(left)

    def trace(self) -> LossTrace:
        """Return the run so far."""
        return LossTrace(
            torch.tensor(self._rates, dtype=torch.float64),
            torch.tensor(list(self._evals), dtype=torch.int64),
            torch.tensor(list(self._evals.values()), dtype=torch.float64),
            first_step=self._first_step,
            context=self._context,
        )

    def _fit(self, left: int) -> None:
        self.law = self.forecast = None
        try:
            self.law = AnnealingLaw.fit(
                self.trace(),
                lam=self.lam,
                fit_lambda=self.fit_lambda,
                delta=self.delta,
                fit_from=self.fit_from,
                resamples=self.resamples,
            )
            rates = self._coming(left)
            if rates is not None:
                self.forecast = self.law.forecast(rates, level=self.level)
        except ValueError as error:  # too early, or nothing that a law fits: no reason to end a run
            self._why = str(error)

    def _coming(self, left: int) -> list[float] | None:
        """Return the rates of the whole run; None where those to come are not a function of the step."""
        if not isinstance(self._scheduler, LambdaLR):
            return self._rates if left <= 0 else None
        base, factor = float(self._scheduler.base_lrs[0]), self._scheduler.lr_lambdas[0]
        start = self._scheduler.last_epoch
        return [*self._rates, *(base * factor(step) for step in range(start, start + left))]

    def scalars(self) -> dict[str, float]:
        """Return the areas so far, and the forecast once there is one."""
        found = {"forward_area": self._areas.forward, "annealing_area": self._areas.annealing}
        if self.forecast is not None:
            found["final_loss"] = self.forecast.loss
            found["final_loss_low"] = self.forecast.low
            found["final_loss_high"] = self.forecast.high
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def finish(self, run: Run) -> None:
        """Write the trace, and the law where there is one."""
        if self.law is None and dist.is_main():
            missing = f"no evaluation of this run reported {self.metric!r}"
            why = self._why if self._evals or self._of_training else missing
            warnings.warn(f"annealing_law: the run ended without a fit: {why}", stacklevel=2)

        def write() -> None:
            state = self._trace_fields()
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            scalars = {name: value for name, value in state.items() if name not in tensors}
            save_state(run.output_dir, TRACE, scalars, tensors)
            if self.law is not None:
                write_json(run.output_dir / LAW, self.law.to_json())
            else:  # one of an earlier run in this folder
                (run.output_dir / LAW).unlink(missing_ok=True)

        dist.on_main(write)

    def _trace_fields(self) -> dict[str, Any]:
        trace = self.trace()
        names = [field.name for field in dataclasses.fields(trace) if field.name != "name"]
        return {name: getattr(trace, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return the trace, and where the training loss's mean stands."""
        own: dict[str, Any] = {"repeats": self._repeats, "kept": self._kept, "mean": self._mean.sums()}
        return {**self._trace_fields(), **(own if self._of_training else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._rates = state["rates"].tolist()
        self._evals = dict(zip(state["steps"].tolist(), state["losses"].tolist(), strict=True))
        self._first_step = state["first_step"]
        if self._of_training:
            mean = state["mean"]
            if isinstance(mean, Mapping):  # checkpoints of an earlier version
                mean = torch.tensor([mean[name] for name in ("weight", "loss", "place")], dtype=torch.float64)
            self._mean.restore(mean)
            # The Trainer begins the mean of its next log anew, too.
            self._logged, self._kept, self._repeats = len(self._rates), state["kept"], state["repeats"]
        for rate in self._rates:
            self._areas.add(rate)


class _RunningAreas:
    """Both areas after each update, with no look ahead: while a warm-up rises, its last rate is the peak."""

    def __init__(self, lam: float) -> None:
        self.lam, self.forward, self.annealing = lam, 0.0, 0.0
        self._momentum, self._last, self._count, self._rising = 0.0, 0.0, 0, True

    def add(self, rate: float) -> None:
        self._count += 1
        self._rising = self._rising and (self._count == 1 or rate > self._last)
        if self._rising:
            self.forward = self._count * rate
        else:
            self._momentum = self.lam * self._momentum + (self._last - rate)
            self.forward += rate
            self.annealing += self._momentum
        self._last = rate


def _arguments(args: TrainingArguments) -> str:
    """Return the nearest class of training arguments that is of a library with trainers of its own."""
    known = (cls for cls in type(args).__mro__ if cls.__module__.partition(".")[0] in LIBRARIES)
    return next(known).__name__


def _context(run: Run) -> dict[str, Any]:
    args, model = run.args, run.model
    config = getattr(model, "config", None)
    return {
        "model": getattr(config, "name_or_path", "") or type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "optimizer": run.optimizer_name,
        # The Trainer may have found a smaller one (auto_find_batch_size), which its settings do not show.
        "batch_size": (run.state.train_batch_size or args.train_batch_size)
        * args.gradient_accumulation_steps
        * dist.world_size(),
        "max_length": getattr(args, "max_length", None),
        "weight_decay": args.weight_decay,
    }
