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
- Another run length resamples the curve, with the rate of 0 after its last update where `drop_zero` has left
  that out, so that constant norms give linear decay at any length.
- The numerical refinement of the paper's appendix is left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core import dist
from ..core.checks import check, check_choice
from ..core.state import save_state
from ._base import Neutral, Run, register_callback, whole
from ._gradients import before_clipping, gradient_norm
from ._polynomial_decay import PolynomialDecay, polynomial_decay
from ._recorded_norms import (
    FEWEST,
    FILE,
    SCHEDULE,
    RecordedNorms,
    SavedSchedule,
    norm_for,
    recorded_norms,
    refuse_other,
    same_family,
    saved_schedule,
)
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

MOST_BAD = 0.05  # share of norms that may be missing
WINDOWS = 1024  # of the median filter that are in memory together
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
    windows = padded.unfold(0, 2 * half + 1, 1)  # a view; its median copies it
    return torch.cat([part.median(dim=1).values for part in windows.split(WINDOWS)])


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


def resampled(factors: Tensor, count: int, *, drop_zero: bool) -> Tensor:
    """Return a curve on another number of points of the same interval, with maximum 1.

    From a factor of 4 between the lengths on, a warning says that the curve is stretched.

    Args:
        factors: (T,), float64.
        count: Number of points.
        drop_zero: Whether the interval ends after the last value, at the 0 that `refined_schedule` has left
            out; else it ends with the last value.
    """
    if count == len(factors):
        return factors
    if not 1.0 / STRETCH <= count / len(factors) <= STRETCH:
        warnings.warn(
            f"norms of {len(factors)} updates make a schedule for {count}: the curve is stretched",
            stacklevel=2,
        )
    if drop_zero:
        factors, count = torch.cat([factors, factors.new_zeros(1)]), count + 1
    place = torch.linspace(0.0, len(factors) - 1.0, count, dtype=torch.float64)
    place = place[:-1] if drop_zero else place
    low = place.floor().long().clamp(max=len(factors) - 2)
    values = factors[low] + (place - low) * (factors[low + 1] - factors[low])
    return values / values.max()


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

    In a checkpoint: the curve and the norms so far (3 numbers per update); a resumed run follows that curve,
    and `norms` are not read again. The cost of recording is one pass
    over the gradients for each update, two without clipping.

    Args:
        mode: "linear", or "refined" for the schedule that `norms` ask for.
        norm: "l1" or "l2"; "auto" takes l1 for coordinate-wise optimizers (Adam's family, Lion, Adafactor and
            the like), l2 for SGD and its like, and l2 with a warning for an optimizer that it does not know.
        tau: Window of the median filter as a share of the recorded run, in (0, 0.5].
        norms: For "refined": output folder of a recorded run; or a `refined_schedule.json` that
            `hf-ext schedule refine` has written, with the `norm`, `tau` and `drop_zero` that stand in it; or
            at least 8 norms, one for each update, None for one that is missing.
        warmup_steps: Linear warm-up of mode "linear" in optimizer steps, below the run's; a refined schedule
            brings its own.
        drop_zero: Whether the last update still has a rate above 0.
        floor: Lower bound of the rate over its peak, in [0, 1).
        record: Whether to record this run's norms.
    """

    may_change: ClassVar[frozenset[str]] = frozenset({"norms"})  # a folder; see `load_state_dict`

    mode: str = "linear"
    norm: str = "auto"
    tau: float = 0.1
    norms: str | list[float] | list[float | None] | None = None
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
            # Settings are saved as JSON, which has no other word for what is no number.
            self.norms = [None if norm is None or not math.isfinite(norm) else norm for norm in self.norms]
            _repaired(_listed(self.norms))
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
        self._drop_zero = self.drop_zero  # of the schedule that is followed
        self._batch_grew = False

    def check_files(self) -> None:
        """Read what the settings name."""
        super().check_files()
        if isinstance(self.norms, str):
            self._read(self.norms)

    def begin(self, run: Run) -> None:
        """Follow the curve; refuse to record where gradients cannot be seen."""
        if self.record:
            kind = str(getattr(run.args.distributed_state, "distributed_type", ""))
            check("DEEPSPEED" not in kind, "record", True, "False under DeepSpeed, which frees gradients")
            flat = any(type(p).__name__ == "FlatParameter" for p in run.model.parameters())
            check(not flat, "record", True, "False under FSDP1, which flattens parameters")
        if self.curve is None:
            with dist.together():
                self._check_folder(run)
        self._optimizer = run.optimizer_name
        super().begin(run)

    def _check_folder(self, run: Run) -> None:
        """Let no recording that is still needed be replaced, or be taken for this run's."""
        if not (run.output_dir / f"{FILE}.json").is_file():
            return
        source = Path(self.norms) if isinstance(self.norms, str) else None
        folder = source.parent if source is not None and source.suffix == ".json" else source
        needed = folder is not None and folder.resolve() == run.output_dir.resolve()
        rule = (
            "False, or output_dir another folder, where norms are those in output_dir: they would be replaced"
        )
        check(not (self.record and needed), "record", self.record, rule, where=str(run.output_dir))
        if not self.record and not needed and dist.is_main():
            warnings.warn(
                f"{run.output_dir / FILE}.json holds gradient norms of an earlier run; record=False leaves "
                "them there",
                stacklevel=2,
            )

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
            found = self._schedule()
        self._drop_zero = found.drop_zero
        factors = resampled(found.factors, total, drop_zero=found.drop_zero)
        return TableCurve(factors=factors.clamp_min(self.floor))

    def make_curve_anew(self, run: Run, curve: Curve) -> Curve:
        """Return the line, or the checkpoint's values resampled: the norms may be gone."""
        if not isinstance(curve, TableCurve):
            return self.make_curve(run)
        factors = resampled(curve.factors, run.state.max_steps, drop_zero=self._drop_zero)
        return TableCurve(factors=factors.clamp_min(self.floor))

    def curve_from(self, fields: Mapping[str, Any]) -> Curve:
        """Return the saved curve."""
        return TableCurve(**fields) if self.mode == "refined" else LinearDecayCurve(**fields)

    def _schedule(self) -> SavedSchedule:
        """Return the schedule that `norms` ask for, with what it is made from."""
        if isinstance(self.norms, list):
            norm = norm_for(self._optimizer) if self.norm == "auto" else self.norm
            return self._refined(_listed(self.norms), norm, self._optimizer)
        assert self.norms is not None
        found = self._read(self.norms)
        same = same_family(found.optimizer, self._optimizer)
        rule = f"of a run with an optimizer of the same family as {self._optimizer}"
        check(same, "norms", self.norms, rule, where=f"recorded with {found.optimizer}")
        return found

    def _refined(self, norms: Tensor, norm: str, optimizer: str) -> SavedSchedule:
        factors = refined_schedule(norms, norm=norm, tau=self.tau, drop_zero=self.drop_zero)
        return SavedSchedule(factors, norm, self.tau, self.drop_zero, optimizer)

    def _read(self, place: str) -> SavedSchedule:
        """Return the schedule of a file, or of a folder with norms; a file in that must not contradict it."""
        if Path(place).suffix == ".json":
            found = saved_schedule(place)
            for name in ("norm", "tau", "drop_zero"):
                own, default = getattr(self, name), type(self).__dataclass_fields__[name].default
                saved = getattr(found, name)
                check(
                    own in (default, saved), name, own, f"{saved!r}, as in the file, or left out", where=place
                )
            return found
        recorded = recorded_norms(place)
        recorded.check_enough(place)
        saved = Path(place) / SCHEDULE
        recorded.check_whole(place, f"follow {saved} of hf-ext schedule refine --allow-partial")
        norm = norm_for(recorded.optimizer) if self.norm == "auto" else self.norm
        found = self._refined(recorded.of(norm), norm, recorded.optimizer)
        if saved.is_file():
            refuse_other(saved, found)
        return found

    # Recording ------------------------------------------------------------------------------------

    def batch_has_grown(self) -> None:
        """Remember that updates are not alike: their norms make no schedule."""
        self._batch_grew = True

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
            done, total = run.state.global_step, run.state.max_steps
            scalars = {"optimizer": self._optimizer, "done_steps": done, "total_steps": total}
            scalars["batch_grew"] = self._batch_grew
            dist.on_main(lambda: save_state(run.output_dir, FILE, scalars, tensors))

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
        """Return the curve, the norms that were listed for it, and the norms so far."""
        norms = self.recorded()
        listed = _listed(self.norms) if isinstance(self.norms, list) else _listed(())
        made = {**super().state_dict(), "drop_zero": self._drop_zero, "listed": listed}
        made["batch_grew"] = self._batch_grew
        return {**made, "step": norms.step, "l1": norms.l1, "l2": norms.l2}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: `norms` are listed, and others than those of the checkpoint; of a folder, which may
                have been moved or removed since, the checkpoint has the curve.
        """
        super().load_state_dict(state)
        self._drop_zero = state.get("drop_zero", self.drop_zero)
        self._batch_grew = state.get("batch_grew", False)
        listed = _listed(self.norms) if isinstance(self.norms, list) else _listed(())
        saved = state.get("listed", listed)  # checkpoints of before it was kept have none
        same = torch.equal(saved.nan_to_num(-1.0), listed.nan_to_num(-1.0))
        rule = "those of the checkpoint: the same list, or a folder or file as there"
        check(same, "norms", self.norms, rule)
        self._steps = state["step"].tolist()
        self._before = torch.stack([state["l1"], state["l2"]], dim=1)


def _listed(norms: Sequence[float | None]) -> Tensor:
    """Return norms (T,) as float64, NaN where one is missing."""
    return torch.tensor([math.nan if norm is None else norm for norm in norms], dtype=torch.float64)


def _gradients(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    return (parameter.grad for parameter in parameters if parameter.grad is not None)
