"""Linear decay, and the schedule refined from a run's own gradient norms.

Source: Defazio et al. 2023, "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement", arXiv
2310.07831 (refinement for SGD and for Adam). Linear decay: lr_t = 1 - t / T. Refined: with G_t the norm of
the gradient of update t (l1 for optimizers of Adam's family, else l2) after a median filter, w_t = G_t^-1
(l1) or G_t^-2 (l2) and lr_t = w_t (w_{t+1} + ... + w_T), divided by its maximum.

Differs from the paper:
- With `drop_zero` the schedule is built for T + 1 updates and its last one, which is 0, is left out. Linear
  decay is then what transformers calls "linear", to the bit.
- Norms are those before clipping, of the loss that the Trainer minimises, one for each optimizer step.
- Non-finite norms, up to 5 %, are interpolated, and norms below 1e-12 of the largest are raised to it.
- Another run length resamples the curve; the numerical refinement of the paper's appendix is left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core import dist
from ..core.checks import check, check_choice
from ..core.state import load_state, save_state
from ._base import Neutral, Run, register_callback, whole
from ._gradients import before_clipping, gradient_norm
from ._polynomial_decay import PolynomialDecay, polynomial_decay
from ._schedule import Curve, LearningRateCallback

__all__ = [
    "LinearDecayCurve",
    "PolynomialDecay",
    "RecordedNorms",
    "RefinedLinearDecayCallback",
    "TableCurve",
    "median_filter",
    "polynomial_decay",
    "recorded_norms",
    "refined_schedule",
]

FILE = "gradient_norms"
FEWEST = 8  # norms that a refinement needs
MOST_BAD = 0.05  # share of norms that may be missing
STRETCH = 4.0  # ratio of lengths from which a resampled curve is worth a warning


@dataclass(kw_only=True, eq=False)
class LinearDecayCurve(Curve):
    """A linear warm-up and a linear decay over a run of known length.

    Args:
        total_steps: T, updates of the run, at least 1.
        warmup_steps: Updates of the warm-up from 0, below T.
        drop_zero: Whether the last update still has a rate, 1 / T of the peak without warm-up.
        floor: Lower bound after the warm-up, in [0, 1).
    """

    total_steps: int
    warmup_steps: int = 0
    drop_zero: bool = True
    floor: float = 0.0

    def __post_init__(self) -> None:
        check(self.total_steps >= 1, "total_steps", self.total_steps, "at least 1")
        within = 0 <= self.warmup_steps < self.total_steps
        check(within, "warmup_steps", self.warmup_steps, f"in [0, the run's {self.total_steps} steps)")
        check(0.0 <= self.floor < 1.0, "floor", self.floor, "in [0, 1)")

    @property
    def length(self) -> int:
        """Updates of the run."""
        return self.total_steps

    def factor(self, t: float) -> float:
        """Return the rate at time t over the peak."""
        if t < self.warmup_steps:
            return t / max(1, self.warmup_steps)
        end = self.total_steps if self.drop_zero else self.total_steps - 1
        return max(self.floor, (end - t) / max(1, end - self.warmup_steps))


@dataclass(kw_only=True, eq=False)
class TableCurve(Curve):
    """A curve through given values; between them a line, after the last of them its value.

    Args:
        factors: (T,) multiples of the peak, float64.
    """

    factors: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))

    @property
    def length(self) -> int:
        """Updates that there are values for."""
        return len(self.factors)

    def factor(self, t: float) -> float:
        """Return the rate at time t over the peak."""
        t = min(max(t, 0.0), float(len(self.factors) - 1))
        low = math.floor(t)
        value = float(self.factors[low])
        return value if t == low else value + (t - low) * (float(self.factors[low + 1]) - value)


def median_filter(norms: Tensor, tau: float) -> Tensor:
    """Return norms under a centred running median.

    The window is the odd number 2 floor(floor(tau T) / 2) + 1, at most T / 2. Before the first value the
    window sees the first value, after the last one the values mirrored at it.

    Args:
        norms: (T,), finite.
        tau: Window as a share of T, in (0, 0.5].

    Returns:
        (T,), float64.
    """
    check(0.0 < tau <= 0.5, "tau", tau, "in (0, 0.5]")
    count = len(norms)
    half = math.floor(tau * count) // 2
    while half and 2 * half + 1 > count / 2:
        half -= 1
    norms = norms.double()
    if not half:
        return norms
    right = F.pad(norms[None], (0, half), mode="reflect")[0]
    padded = torch.cat([norms[:1].expand(half), right])  # (T + 2 half,)
    return padded.unfold(0, 2 * half + 1, 1).median(dim=1).values


def refined_schedule(
    norms: Tensor | Sequence[float],
    *,
    norm: str,
    tau: float = 0.1,
    drop_zero: bool = True,
    floor: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    """Return the schedule that a run's gradient norms ask for.

    Args:
        norms: (T,) norms of updates 1 to T; only their ratios matter.
        norm: "l1" (weights G^-1, for Adam's family) or "l2" (G^-2).
        tau: Window of the median filter as a share of T, in (0, 0.5].
        drop_zero: Whether to leave out the last update's rate of 0, by one more update with the last norm.
        floor: Lower bound after the division by the maximum, in [0, 1).
        normalize: Whether to divide by the maximum; without, the sum of all weights divides.

    Returns:
        (T,), float64, multiples of the peak learning rate.

    Raises:
        ValueError: More than 5 % of the norms are zero, negative or not finite, or a setting is out of range.
    """
    check_choice("norm", norm, ("l1", "l2"))
    check(0.0 <= floor < 1.0, "floor", floor, "in [0, 1)")
    smooth = median_filter(_repaired(torch.as_tensor(norms, dtype=torch.float64)), tau)
    smooth = smooth.clamp_min(1e-12 * float(smooth.max()))
    if drop_zero:
        smooth = torch.cat([smooth, smooth[-1:]])
    relative = smooth / smooth.min()  # the square of an extreme norm stays a number
    weights = relative ** (-1.0 if norm == "l1" else -2.0)
    after = weights.flip(0).cumsum(0).flip(0)  # w_t + ... + w_T
    rates = weights * torch.cat([after[1:], after.new_zeros(1)]) / after[0]
    rates = rates[:-1] if drop_zero else rates
    if not normalize:
        return rates
    return (rates / rates.max()).clamp_min(floor)


def _repaired(norms: Tensor) -> Tensor:
    check(norms.ndim == 1 and len(norms) >= 2, "norms", tuple(norms.shape), "a series of at least 2 numbers")
    finite = norms.isfinite()
    bad = int((~finite | (norms <= 0.0)).sum())
    rule = f"positive and finite but for {MOST_BAD:.0%} of them"
    check(bad <= MOST_BAD * len(norms), "norms", f"{bad} of {len(norms)} that are not", rule)
    if bool(finite.all()):
        return norms.clamp_min(0.0)
    known = finite.nonzero()[:, 0]
    right = torch.searchsorted(known, torch.arange(len(norms))).clamp(1, max(1, len(known) - 1))
    a, b = known[right - 1], known[right]
    share = ((torch.arange(len(norms)) - a) / (b - a)).clamp(0.0, 1.0)
    filled = norms[a] + share * (norms[b] - norms[a])
    return torch.where(finite, norms, filled).clamp_min(0.0)


def resampled(factors: Tensor, count: int) -> Tensor:
    """Return a curve on another number of points of the same interval, with maximum 1.

    From a factor of 4 between the lengths on, a warning says that the curve is stretched.
    """
    if count == len(factors):
        return factors
    if not 1.0 / STRETCH <= count / len(factors) <= STRETCH:
        warnings.warn(
            f"norms of {len(factors)} updates make a schedule for {count}: the curve is stretched",
            stacklevel=2,
        )
    place = torch.linspace(0.0, len(factors) - 1.0, count, dtype=torch.float64)
    low = place.floor().long().clamp(max=len(factors) - 2)
    values = factors[low] + (place - low) * (factors[low + 1] - factors[low])
    return values / values.max()


@dataclass(frozen=True, eq=False)
class RecordedNorms:
    """Gradient norms of a run, before clipping.

    Args:
        step: (T,) optimizer steps, from 1, int64.
        l1: (T,) sums of magnitudes, float64.
        l2: (T,) Euclidean norms, float64.
        optimizer: Class name of the optimizer that the run used.
    """

    step: Tensor
    l1: Tensor
    l2: Tensor
    optimizer: str

    def of(self, norm: str) -> Tensor:
        """Return the norms "l1" or "l2"."""
        return self.l1 if norm == "l1" else self.l2

    def check_enough(self, place: str) -> None:
        """Check that they are enough to refine a schedule.

        Args:
            place: What the settings call them.

        Raises:
            ValueError: There are fewer than 8.
        """
        count = len(self.step)
        check(count >= FEWEST, "norms", place, f"of at least {FEWEST} updates", where=f"it holds {count}")


def recorded_norms(run_dir: str | Path) -> RecordedNorms:
    """Read the norms that a run of `RefinedLinearDecayCallback` has recorded.

    Args:
        run_dir: The run's output folder.

    Raises:
        ValueError: The folder has none, or they are damaged.
    """
    try:
        scalars, tensors = load_state(run_dir, FILE)
    except FileNotFoundError as error:
        raise ValueError(
            f"norms: {run_dir} holds no recorded gradient norms ({FILE}.json and .safetensors); train once "
            "with RefinedLinearDecayCallback(record=True)"
        ) from error
    shapes = {name: tuple(tensors[name].shape) for name in ("step", "l1", "l2") if name in tensors}
    whole_file = len(shapes) == 3 and len(set(shapes.values())) == 1 and "optimizer" in scalars
    check(
        whole_file,
        "norms",
        str(run_dir),
        "a folder with equally long step, l1 and l2",
        where=f"{FILE}: {shapes}",
    )
    every = torch.equal(tensors["step"], torch.arange(1, len(tensors["step"]) + 1))
    rule = "of a run that recorded from its first update on"
    check(every, "norms", str(run_dir), rule, where=f"{FILE}: steps {tensors['step'][:3].tolist()}, ...")
    return RecordedNorms(tensors["step"], tensors["l1"], tensors["l2"], str(scalars["optimizer"]))


def norm_for(optimizer: str) -> str:
    """Return "l1" for an optimizer of Adam's family by its class name, else "l2"."""
    return "l1" if "adam" in optimizer.lower() else "l2"


@register_callback(
    "refined_linear_decay",
    summary="linear decay to zero, and a schedule refined from an earlier run's gradient norms",
    paper="arXiv:2310.07831",
    supports={"bare"},
    neutral=Neutral(settings={}, arguments={"lr_scheduler_type": "linear"}),
    test_kwargs={"warmup_steps": 2, "drop_zero": False, "floor": 0.05},
    bad_kwargs=(
        {"mode": "cosine"},
        {"norm": "l3"},
        {"tau": 0.0},
        {"tau": 0.6},
        {"mode": "refined", "norms": None},
        {"mode": "refined", "norms": [1.0, 2.0, 3.0]},
        {"norms": [1.0] * 8},
        {"mode": "refined", "norms": [1.0] * 8, "warmup_steps": 2},
        {"warmup_steps": -1},
        {"floor": 1.0},
        {"floor": -0.1},
    ),
)
@dataclass(kw_only=True, eq=False, repr=False)
class RefinedLinearDecayCallback(LearningRateCallback):
    """Decay the learning rate linearly, or along a schedule refined from an earlier run; record norms.

    Recording takes the norms before clipping: with `max_grad_norm` above 0 (the Trainer's default) it needs
    `hf_ext.attach`. They are written to `output_dir/gradient_norms.{json,safetensors}`.

    In a checkpoint: the curve and the norms so far (3 numbers per update). The cost of recording is one pass
    over the gradients for each update, two without clipping.

    Args:
        mode: "linear", or "refined" for the schedule that `norms` ask for.
        norm: "l1" or "l2"; "auto" takes l1 for optimizers of Adam's family, else l2.
        tau: Window of the median filter as a share of the recorded run, in (0, 0.5].
        norms: For "refined": output folder of a recorded run, or at least 8 norms, one for each update.
        warmup_steps: Linear warm-up of mode "linear" in optimizer steps, below the run's; a refined schedule
            brings its own.
        drop_zero: Whether the last update still has a rate above 0.
        floor: Lower bound of the rate over its peak, in [0, 1).
        record: Whether to record this run's norms.
    """

    mode: str = "linear"
    norm: str = "auto"
    tau: float = 0.1
    norms: str | list[float] | None = None
    warmup_steps: int = 0
    drop_zero: bool = True
    floor: float = 0.0
    record: bool = True

    def validate(self) -> None:
        """Check the settings."""
        refined = self.mode == "refined"
        check_choice("mode", self.mode, ("linear", "refined"))
        check_choice("norm", self.norm, ("auto", "l1", "l2"))
        check(0.0 < self.tau <= 0.5, "tau", self.tau, "in (0, 0.5]")
        check(not refined or self.norms is not None, "norms", None, "given for mode='refined'")
        check(refined or self.norms is None, "norms", self.norms, "left out unless mode='refined'")
        if isinstance(self.norms, list):
            check(len(self.norms) >= FEWEST, "norms", self.norms, f"at least {FEWEST} numbers")
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        check(
            not refined or self.warmup_steps == 0, "warmup_steps", self.warmup_steps, "0 for mode='refined'"
        )
        check(0.0 <= self.floor < 1.0, "floor", self.floor, "in [0, 1)")

    def needs_attach(self, args: TrainingArguments) -> str | None:
        """Events come after clipping."""
        if not self.record or args.max_grad_norm <= 0.0:
            return None
        limit = f"max_grad_norm={args.max_grad_norm:g}"
        return f"records gradient norms before clipping ({limit}; or set record=False)"

    def reset(self) -> None:
        """Forget an earlier run."""
        super().reset()
        self._optimizer = ""
        self._pending: Tensor | None = None  # (2,) l1 and l2 of the update that is about to be made
        self._recent: list[Tensor] = []
        self._steps: list[int] = []
        self._before = torch.empty((0, 2), dtype=torch.float64)
        self._clipped_from: Any = None

    def check_files(self) -> None:
        """Read the recorded norms, where the settings name a recording."""
        super().check_files()
        if isinstance(self.norms, str):
            recorded_norms(self.norms)

    def begin(self, run: Run) -> None:
        """Follow the curve; refuse to record where gradients cannot be seen."""
        if self.record:
            kind = str(getattr(run.args.distributed_state, "distributed_type", ""))
            check("DEEPSPEED" not in kind, "record", True, "False under DeepSpeed, which frees gradients")
            flat = any(type(p).__name__ == "FlatParameter" for p in run.model.parameters())
            check(not flat, "record", True, "False under FSDP1, which flattens parameters")
        self._optimizer = run.optimizer_name
        super().begin(run)

    def make_curve(self, run: Run) -> Curve:
        """Return the line, or the refined schedule on this run's length."""
        total = run.state.max_steps
        if self.mode == "linear":
            return LinearDecayCurve(
                total_steps=total,
                warmup_steps=self.warmup_steps,
                drop_zero=self.drop_zero,
                floor=self.floor,
            )
        with dist.together():
            norms, norm = self._norms()
            factors = refined_schedule(norms, norm=norm, tau=self.tau, drop_zero=self.drop_zero)
        return TableCurve(factors=resampled(factors, total).clamp_min(self.floor))

    def make_curve_anew(self, run: Run, curve: Curve) -> Curve:
        """Return the line, or the checkpoint's values resampled: the norms may be gone."""
        if not isinstance(curve, TableCurve):
            return self.make_curve(run)
        return TableCurve(factors=resampled(curve.factors, run.state.max_steps).clamp_min(self.floor))

    def curve_from(self, fields: Mapping[str, Any]) -> Curve:
        """Return the saved curve."""
        return TableCurve(**fields) if self.mode == "refined" else LinearDecayCurve(**fields)

    def _norms(self) -> tuple[Tensor, str]:
        here = norm_for(self._optimizer)
        norm = here if self.norm == "auto" else self.norm
        if isinstance(self.norms, list):
            return torch.tensor(self.norms, dtype=torch.float64), norm
        assert self.norms is not None
        recorded = recorded_norms(self.norms)
        rule = f"of a run with an optimizer of the same family as {self._optimizer}"
        same = norm_for(recorded.optimizer) == here
        check(same, "norms", self.norms, rule, where=f"recorded with {recorded.optimizer}")
        recorded.check_enough(self.norms)
        return recorded.of(norm), norm

    # Recording ------------------------------------------------------------------------------------

    def gradient_norm(self, norm: Any) -> None:
        """Take the l2 norm before clipping from an attached trainer."""
        self._clipped_from = norm

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the gradients of the update that is about to be made."""
        if not self.record:
            return
        gradients = list(_gradients(kwargs["model"].parameters()))
        l1 = gradient_norm(gradients, 1)
        if self._clipped_from is None:
            l2 = gradient_norm(gradients, 2)
        else:
            seen = dist.full_tensor(torch.as_tensor(self._clipped_from))
            l2 = seen.detach().to(l1.device, torch.float64)
            l1 = before_clipping(l1, l2, args.max_grad_norm)
        self._pending, self._clipped_from = torch.stack([l1, l2]), None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep them, unless the update was skipped (an overflow in fp16)."""
        skipped = bool(getattr(kwargs["optimizer"], "step_was_skipped", False))
        if self._pending is not None and not skipped:
            self._steps.append(self.step + 1)
            self._recent.append(self._pending)
            if len(self._recent) >= 64:  # on the device they would add up
                self._gather()
        self._pending = None

    def _gather(self) -> Tensor:
        self._before = torch.cat([self._before, whole(self._recent).reshape(-1, 2)])
        self._recent = []
        return self._before

    def recorded(self) -> RecordedNorms:
        """Return the norms of the run so far."""
        both = self._gather()
        step = torch.tensor(self._steps, dtype=torch.int64)
        return RecordedNorms(step, both[:, 0].clone(), both[:, 1].clone(), self._optimizer)

    def saved(self, run: Run, folder: Path) -> None:
        """Write the norms beside the checkpoints, for a later run."""
        self._write_norms(run)

    def finish(self, run: Run) -> None:
        """Write the norms of the whole run."""
        self._write_norms(run)

    def _write_norms(self, run: Run) -> None:
        if self.record and self._steps:
            norms = self.recorded()
            tensors = {"step": norms.step, "l1": norms.l1, "l2": norms.l2}
            dist.on_main(lambda: save_state(run.output_dir, FILE, {"optimizer": self._optimizer}, tensors))

    def scalars(self) -> dict[str, float]:
        """Return the last update's share of the peak rate, and its norms where they are recorded."""
        assert self.curve is not None
        found = {"factor": self.curve(max(self.step - 1, 0))}
        if self.record and self._steps:
            l1, l2 = self._gather()[-1].tolist()
            # Not a number is no JSON, and a log is written as such.
            found.update({name: value for name, value in (("l1", l1), ("l2", l2)) if math.isfinite(value)})
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the curve and the norms so far."""
        norms = self.recorded()
        return {**super().state_dict(), "step": norms.step, "l1": norms.l1, "l2": norms.l2}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self._steps = state["step"].tolist()
        self._before = torch.stack([state["l1"], state["l2"]], dim=1)


def _gradients(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    return (parameter.grad for parameter in parameters if parameter.grad is not None)
