"""Averages of the weights along a run: EMA, SWA and LAWA.

Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv
1803.05407, algorithm 1 (SWA): the mean of the weights at every c-th step of the last part of a run. EMA:
Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging", in the form
e_t = beta e_{t-1} + (1 - beta) theta_t, e_0 = theta_0, with theta_t the weights after step t. LAWA: Kaddour
2022, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging", arXiv
2209.14981: the mean of the last k weights of every c-th step.

Differs from the papers:
- The learning rate is the run's own: SWA's constant or cyclic rate is for the Trainer to set.
- EMA's `warmup` lowers beta to min(beta, (1 + t) / (10 + t)) at its t-th update, as is common for EMA;
  `bias_correction` starts at 0 and divides by 1 - beta^t, as Adam does.
- Statistics of batch norms are taken anew from data after averaging, as in SWA, but over all rows at once:
  SWA's code and torch's average the variances of batches (see `hf_ext.core.batch_norm`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core import dist
from ..core.batch_norm import MEAN, VARIANCE, batch_norms
from ..core.checks import check, check_choice
from ..core.registry import Variant
from ._averaged_weights import AVERAGE, LARGE, AveragedWeightsCallback, copied, local, write
from ._base import Neutral, Run, register_callback
from ._recalibration import recalibrate

__all__ = ["WeightAverageCallback"]

SAMPLE = "sample."
START = {"ema": 0.0, "swa": 0.75, "lawa": 0.0}


@register_callback(
    "weight_average",
    summary="EMA, SWA or LAWA of the weights, for evaluations and for the final model",
    paper="arXiv:1803.05407",
    neutral=Neutral(settings={"replace_weights": False}, arguments={}),
    test_kwargs={"every": 2},
    bad_kwargs=(
        {"method": "mean"},
        {"decay": 1.0},
        {"decay": -0.1},
        {"method": "swa", "decay": 0.9},
        {"method": "swa", "warmup": True},
        {"method": "lawa", "bias_correction": True},
        {"start": 1.0},
        {"every": 0},
        {"method": "lawa", "last": 1},
        {"last": 3},
        {"bn": "batch"},
        {"bn_batches": 0},
        {"params": "("},
        {"best_from": "ema"},
        {"use_for_eval": False, "best_from": "average"},
        {"replace_weights": False, "best_from": "average"},
    ),
    variants=(
        Variant(name="swa", test_kwargs={"method": "swa", "start": 0.3}),
        Variant(name="lawa", test_kwargs={"method": "lawa", "last": 3}),
    ),
)
@dataclass(kw_only=True, eq=False, repr=False)
class WeightAverageCallback(AveragedWeightsCallback):
    """Average the trained weights along a run, and leave the average in the model when the run is done.

    The average never feeds back: training is the same to the bit with and without it, and checkpoints hold
    the raw weights, from which a run resumes, and the average beside them. Evaluations during the run are of
    the average, which needs `hf_ext.attach`. After an exception the model has the raw weights.

    In a checkpoint, and in memory: one fp32 copy of the trained tensors for "ema" and "swa"; `last` copies in
    the weights' own type for "lawa", which lie in the memory of the CPU.

    Args:
        method: "ema", "swa" (mean of all samples) or "lawa" (mean of the last few).
        decay: EMA's beta, the weight of the old average, in [0, 1).
        warmup: Whether EMA's beta begins low and grows to `decay`.
        bias_correction: Whether EMA begins at 0 and divides by 1 - beta^t, so that the first weights do not
            count more than others; without it the average begins at the weights before the first update.
        start: Share of the run's optimizer steps before the first sample, in [0, 1); None for 0.75 of SWA,
            0 of the others.
        every: A sample is taken after each optimizer step whose number is a multiple of it; None for 1 of
            EMA, 100 of SWA, and the run's `save_steps` of LAWA.
        last: LAWA's number of samples, at least 2.
        bn: Running statistics of batch norms under averaged weights: "recalibrate" takes them anew from the
            training data (needs `hf_ext.attach`), "pool" those of the mixture of the samples, "average" the
            mean of the samples' variances, without how far their means lie apart. Without batch norms it
            changes nothing.
        bn_batches: Batches of the evaluation's size on each process that "recalibrate" sees.
        params: Pattern that is searched for in the names of the tensors to average; None for all that train.
        use_for_eval: Whether evaluations during the run are of the average.
        replace_weights: Whether the average is in the model after the run.
        best_from: With `load_best_model_at_end`: "average" for the average of the checkpoint whose evaluation
            was the best, or "raw" for what the Trainer loads, which needs both settings above to be False.
    """

    method: str = "ema"
    decay: float = 0.999
    warmup: bool = False
    bias_correction: bool = False
    start: float | None = None
    every: int | None = None
    last: int = 6
    bn: str = "recalibrate"
    bn_batches: int = 100

    def validate(self) -> None:
        """Check the settings."""
        check_choice("method", self.method, tuple(START))
        check(0.0 <= self.decay < 1.0, "decay", self.decay, "in [0, 1)")
        for name, default, owner in (
            ("decay", 0.999, "ema"),
            ("warmup", False, "ema"),
            ("bias_correction", False, "ema"),
            ("last", 6, "lawa"),
        ):
            value = getattr(self, name)
            rule = f"left out for method={self.method!r}"
            check(self.method == owner or value == default, name, value, rule)
        check(self.start is None or 0.0 <= self.start < 1.0, "start", self.start, "in [0, 1)")
        check(self.every is None or self.every >= 1, "every", self.every, "at least 1")
        check(self.last >= 2, "last", self.last, "at least 2")
        check_choice("bn", self.bn, ("recalibrate", "pool", "average"))
        check(self.bn_batches >= 1, "bn_batches", self.bn_batches, "at least 1")
        super().validate()

    def reset(self) -> None:
        """Forget an earlier run."""
        super().reset()
        self._samples: list[dict[str, Tensor]] = []  # LAWA's, the oldest first, on the CPU
        self._taken = 0  # updates of EMA, samples of the others
        self._left = 1.0  # weight of the beginning in EMA: the product of all its betas
        self._every = 1

    # The run --------------------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        """Find the steps of the samples, and take the checkpoint's average.

        Raises:
            ValueError: Weights cannot be seen here, no tensor or no step is averaged, statistics of batch
                norms cannot be taken, the best checkpoint would be loaded at the end, or the checkpoint is of
                other tensors.
        """
        super().begin(run)
        first = self._first(run.state)
        default = {"ema": 1, "swa": 100, "lawa": int(max(1, run.state.save_steps or 1))}
        self._every = self.every or default[self.method]
        last = run.state.max_steps // self._every * self._every
        rule = f"such that a multiple of it lies between {first} and the last step"
        check(last >= max(1, first), "every", self._every, rule, where=f"{run.state.max_steps} steps")
        reads = self.bn == "recalibrate" and (self.use_for_eval or self.replace_weights)
        if reads and batch_norms(run.model):
            rule = "'pool' or 'average' without hf_ext.attach: the model has batch norms"
            check(self.trainer is not None, "bn", self.bn, rule)
        copies = self.last if self.method == "lawa" else 1
        size = copies * sum(4 * local(parameter).numel() for parameter in self._trained().values())
        if size >= LARGE:
            warnings.warn(f"weight_average keeps up to {size / 2**30:.1f} GiB of weights", stacklevel=2)
        if self._saved is not None:
            self.take_average(self._saved)
            self._saved = None
        elif self.method == "ema" and run.state.global_step >= first:
            self._begin_ema()

    def _first(self, state: TrainerState) -> int:
        """Return the first step of a sample; a batch that grows makes the run shorter on its way."""
        share = START[self.method] if self.start is None else self.start
        return math.ceil(share * state.max_steps)

    def _begin_ema(self) -> None:
        values = self._values()
        if self.bias_correction:
            values = {name: torch.zeros_like(value) for name, value in values.items()}
        self._average = values

    def take_average(self, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's average, or its samples, and their counts."""
        super().take_average(state)
        self._taken, self._left = state["taken"], state["left"]
        samples = [
            self.scattered(f"{SAMPLE}{number}.", state)
            for number in range(min(self._taken, self.last) if self.method == "lawa" else 0)
        ]
        self._samples = [{name: value.cpu() for name, value in sample.items()} for sample in samples]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take a sample, where this step has one."""
        step = state.global_step + 1  # it is counted after this event
        if self.method == "ema" and not self._average:
            if step >= self._first(state):
                self._begin_ema()
            return
        if step < self._first(state) or step % self._every:
            return
        if self.method == "ema":
            if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):  # an overflow in fp16
                self._move_ema()
            return
        self._taken += 1
        if self.method == "swa":
            self._toward(1.0 / self._taken)
            return
        sample = {name: value.cpu() for name, value in self._values(keep=True).items()}
        self._samples = [*self._samples, sample][-self.last :]

    def _move_ema(self) -> None:
        self._taken += 1
        beta = self.decay
        if self.warmup:
            beta = min(beta, (1.0 + self._taken) / (10.0 + self._taken))
        # One that has begun to train joins as if it had been as it is now from the start on.
        joined = 1.0 - self._left if self.bias_correction else 1.0
        self._toward(1.0 - beta, joined)
        self._left *= beta

    def _toward(self, weight: float, joined: float = 1.0) -> None:
        now = {name: local(parameter).detach().float() for name, parameter in self._trained().items()}
        for name, value in (now | self._statistics()).items():
            if name not in self._average:
                self._average[name] = value * joined
            self._average[name].lerp_(value, weight)

    # What is averaged -----------------------------------------------------------------------------

    def _values(self, *, keep: bool = False) -> dict[str, Tensor]:
        """Return copies of this process's part of what is averaged; of a variance see `_statistics`."""
        found = {name: copied(parameter, keep=keep) for name, parameter in self._trained().items()}
        return found | self._statistics()

    def _statistics(self) -> dict[str, Tensor]:
        """Return the running statistics of batch norms, in fp32, where they are averaged.

        For "pool" the second moment stands in the variance's place. Processes have statistics of their own;
        all take the mean over them.
        """
        tensors = self._norm_statistics()
        if not tensors:
            return {}
        found = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in tensors.items()}
        if self.bn == "pool":
            for name in found:
                if name.endswith(VARIANCE):
                    found[name] += found[name.removesuffix(VARIANCE) + MEAN] ** 2
        if dist.is_distributed():
            flat = dist.all_reduce_mean_(torch.cat([value.flatten() for value in found.values()]))
            parts = flat.split([value.numel() for value in found.values()])
            found = {name: part.clone() for name, part in zip(found, parts, strict=True)}
        return found

    def _norm_statistics(self) -> dict[str, Tensor]:
        if self.bn == "recalibrate":
            return {}
        return {
            f"{name}.{key}": getattr(norm, key)
            for name, norm in batch_norms(self._model).items()
            for key in (MEAN, VARIANCE)
        }

    def replaced(self) -> dict[str, Tensor]:
        """Return the trained tensors, and the buffers of batch norms."""
        buffers = {
            f"{name}.{key}": value
            for name, norm in batch_norms(self._model).items()
            for key, value in norm.named_buffers(recurse=False)
        }
        return self._trained() | buffers

    def averaged(self) -> Mapping[str, Tensor]:
        """Return the average, in fp32; empty where no sample has been taken."""
        if self.method == "lawa":
            return _mean(self._samples, self.replaced())
        if not self.bias_correction:
            return self._average
        if not self._taken:
            return {}
        return {name: value / (1.0 - self._left) for name, value in self._average.items()}

    def write_averaged(self, values: Mapping[str, Tensor]) -> None:
        """Put an average in the place of the weights, with statistics of batch norms for it."""
        values = dict(values)
        for name, value in values.items():
            if self.bn == "pool" and name.endswith(f".{VARIANCE}"):
                mean = values[name.removesuffix(VARIANCE) + MEAN]
                values[name] = (value - mean**2).clamp_(min=0.0)
        write(self._trained() | self._norm_statistics(), values)
        if self.bn == "recalibrate" and batch_norms(self._model):
            recalibrate(self.trainer, self._model, self.bn_batches)

    def finish(self, run: Run) -> None:
        """Put the average in the place of the weights, and say so where there is none."""
        super().finish(run)
        none = not self._taken and (self.bias_correction or not self._average)
        if self.replace_weights and none:
            warnings.warn(
                f"weight_average: the run ended at step {run.state.global_step} before the first sample: the "
                "model has its raw weights",
                stacklevel=2,
            )

    def undo(self) -> None:
        """Let the buffers go."""
        super().undo()
        self._samples = []

    def scalars(self) -> dict[str, float]:
        """Return the number of samples, and the share of the average that the weights at its start have."""
        if self.method == "ema":
            return {"samples": float(self._taken), "start_share": self._left}
        return {"samples": float(len(self._samples) if self.method == "lawa" else self._taken)}

    # State ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the average or the samples (a collective where they are sharded)."""
        state: dict[str, Any] = self.gathered(AVERAGE, self._average)
        for number, sample in enumerate(self._samples):
            like = self.replaced()
            placed = {name: value.to(like[name].device) for name, value in sample.items() if name in like}
            state.update(self.gathered(f"{SAMPLE}{number}.", placed))
        return {**state, "taken": self._taken, "left": self._left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a checkpoint's state until the model is seen."""
        self._saved = state


def _mean(samples: list[dict[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of each tensor over the samples that have it, fp32, where the model has it."""
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample if name in like):
        values = [sample[name] for sample in samples if name in sample]
        mean = values[0].to(like[name].device, torch.float32, copy=True)
        for number, value in enumerate(values[1:], start=2):
            mean.lerp_(value.to(mean.device, torch.float32), 1.0 / number)
        found[name] = mean
    return found
