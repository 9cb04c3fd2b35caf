"""Infinite learning rate: warm-up, cooldown, an open constant phase to continue from, annealing on demand.

Source: Singh et al. 2025, "Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for
Continual Pre-training", arXiv 2503.02844. With s the index of the update and positions W <= C <= A:
s < W: lr = max s / W; W <= s < C: from max to const along a cosine, a reciprocal root or a line; C <= s < A:
const; A <= s <= A + N: const (min / const)^((s - A) / N), and min after it.

Differs from the paper:
- The curve is a function of s and of the marks W, C, A and N alone. Shares of the run are turned into steps
  once, in the first run, and kept in checkpoints; a later run of another length does not move them.
- Rates are shares of each parameter group's own peak.
- The anneal may also be linear, or 1 - sqrt (`anneal`).
- Before an anneal the checkpoint to continue from is kept as `infinite_branch`, and training ends with it.
- A checkpoint that has been annealed is refused, unless asked for: the rate then rises to its constant again.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..core.checks import check, check_choice
from ._base import Neutral, Run, register_callback
from ._branch import check_trained, keep, resumed_from, trained_tensors
from ._infinite_curve import PHASES, InfiniteLRCurve, check_levels
from ._schedule import LearningRateCallback

__all__ = ["InfiniteLRCallback", "InfiniteLRCurve"]

BRANCH = "infinite_branch"


@register_callback(
    "infinite_lr",
    summary="open-ended learning rate: continue on new data from its constant phase, anneal on demand",
    paper="arXiv:2503.02844",
    supports={"bare"},
    neutral=Neutral(
        settings={"warmup_steps": 0, "cooldown_steps": 0, "const_lr_ratio": 1.0, "min_lr_ratio": 1.0},
        arguments={"lr_scheduler_type": "constant"},
    ),
    test_kwargs={"warmup_steps": 2, "cooldown_steps": 4, "anneal_start": 7, "anneal_steps": 2},
    bad_kwargs=(
        {"warmup_steps": -1},
        {"warmup_end": 1.0},
        {"warmup_steps": 5, "cooldown_steps": 4},
        {"cooldown_end": 1.5},
        {"warmup_end": 0.2, "cooldown_end": 0.1},
        {"cooldown": "square"},
        {"rsqrt_scale": 0.0},
        {"const_lr_ratio": 0.0},
        {"const_lr_ratio": 1.5},
        {"min_lr_ratio": 0.2},
        {"min_lr_ratio": 0.0},
        {"anneal_start": 0.0},
        {"anneal_start": -3},
        {"anneal_steps": 0},
        {"anneal": "sudden"},
        {"start_phase": "anneal"},
        {"allow_annealed": True, "rewarm_steps": -1},
        {"rewarm_steps": 5},
    ),
)
@dataclass(kw_only=True, eq=False, repr=False)
class InfiniteLRCallback(LearningRateCallback):
    """Follow the infinite schedule; anneal when asked to, and keep the checkpoint to continue from.

    Before an anneal the checkpoint is saved, whatever `save_strategy` says, and a copy of it is kept, with
    optimizer and scheduler, as `output_dir/infinite_branch`; it is as large as a checkpoint, and only a
    later run in that folder that begins its anneal puts another in its place, one that is resumed at that
    step among them. The anneal ends the run with a last checkpoint. New data continue from the branch:
    `hf_ext.attach(trainer, InfiniteLRCallback(continue_from="out/infinite_branch"))` starts with its
    weights, its optimizer state and the constant rate, from the first batch of the new data.

    In a checkpoint: the curve's marks and ratios, where the run began on it and how long it was to be, the
    optimizer's class name, names and shapes of the trained tensors, and how many annealed checkpoints the
    weights have been continued from.

    Args:
        warmup_steps: End of the warm-up in optimizer steps, at least 0; None for `warmup_end`.
        warmup_end: The same as a share of the first run, in [0, 1).
        cooldown_steps: End of the cooldown (a position) in optimizer steps; None for `cooldown_end`.
        cooldown_end: The same as a share of the first run, in [warmup_end, 1].
        cooldown: Shape from peak to constant rate: "cosine", "rsqrt" or "linear".
        rsqrt_scale: a in 1 / sqrt(1 + a x), above 0; larger falls earlier.
        const_lr_ratio: Constant rate over peak, in (0, 1].
        min_lr_ratio: Rate after an anneal over peak, in (0, const_lr_ratio]; 0 unless it is exponential.
        anneal_start: First step of a planned anneal: an int counts optimizer steps since the first run began,
            a float in (0, 1) is a share of this run. None leaves the schedule open.
        anneal_steps: Length of the planned anneal, at least 1; None for the rest of the run.
        anneal: Shape of the anneal: "exponential", "linear" or "one_minus_sqrt".
        start_phase: "warmup", or "constant" to begin in the constant phase without a checkpoint of one.
        continue_from: Checkpoint of the constant phase to continue on new data from; needs `attach`.
        allow_annealed: Whether `continue_from` may be a checkpoint in or after an anneal. The rate then rises
            from where the anneal had left it, which undoes what the anneal was for; a warning says so.
        rewarm_steps: Optimizer steps of that rise to the constant rate, on a line, at least 0; 0 for the
            constant rate from the first update on. Only with an annealed checkpoint.
    """

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"anneal_start", "anneal_steps", "anneal", "continue_from", "allow_annealed", "rewarm_steps"}
    )

    warmup_steps: int | None = None
    warmup_end: float = 0.05
    cooldown_steps: int | None = None
    cooldown_end: float = 0.15
    cooldown: str = "cosine"
    rsqrt_scale: float = 10.0
    const_lr_ratio: float = 0.1
    min_lr_ratio: float = 0.01
    anneal_start: int | float | None = None
    anneal_steps: int | None = None
    anneal: str = "exponential"
    start_phase: str = "warmup"
    continue_from: str | None = None
    allow_annealed: bool = False
    rewarm_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        # What a run has continued from, and the model that it has trained to the end.
        self._ended: tuple[str | None, Callable[[], Any]] = (None, lambda: None)

    def validate(self) -> None:
        """Check the settings."""
        check_levels(self)
        w, c, start = self.warmup_steps, self.cooldown_steps, self.anneal_start
        check(w is None or w >= 0, "warmup_steps", w, "at least 0")
        check(0.0 <= self.warmup_end < 1.0, "warmup_end", self.warmup_end, "in [0, 1)")
        check(c is None or c >= (w or 0), "cooldown_steps", c, f"at least warmup_steps ({w or 0})")
        low = self.warmup_end if w is None else 0.0
        check(low <= self.cooldown_end <= 1.0, "cooldown_end", self.cooldown_end, f"in [{low}, 1]")
        if isinstance(start, float):
            check(
                0.0 < start < 1.0, "anneal_start", start, "a share of the run in (0, 1), or an int of steps"
            )
        check(start is None or start >= 0, "anneal_start", start, "at least 0")
        check(
            self.anneal_steps is None or self.anneal_steps >= 1,
            "anneal_steps",
            self.anneal_steps,
            "at least 1",
        )
        check_choice("start_phase", self.start_phase, ("warmup", "constant"))
        rise = self.rewarm_steps
        check(rise >= 0, "rewarm_steps", rise, "at least 0")
        check(rise == 0 or self.allow_annealed, "rewarm_steps", rise, "0 unless allow_annealed=True")

    def needs_attach(self, args: TrainingArguments) -> str | None:
        """Continuing on new data loads another run's state before training begins."""
        return (
            None if self.continue_from is None else "loads a checkpoint (continue_from) before the first step"
        )

    def warm_start(self) -> str | None:
        """Return the branch, once it is known to be one.

        Raises:
            ValueError: It is no checkpoint of this schedule's constant phase, nor an annealed one that is
                allowed; its run trained other tensors than the trainer's model does; or this trainer has
                trained from it before.
        """
        if self.continue_from is None:
            return None
        folder = Path(self.continue_from)
        for name in ("trainer_state.json", "scheduler.pt", f"{self.file_name()}.json"):
            rule = f"a checkpoint of a run with {type(self).__name__}"
            check((folder / name).is_file(), "continue_from", self.continue_from, rule, where=f"no {name}")
        state = self.read_state(folder, of_other_run=True)
        phase = state["phase"]
        annealed = phase in ("anneal", "annealed")
        rule = "a checkpoint of the constant phase, such as infinite_branch"
        rule += "" if not annealed else ", unless allow_annealed=True"
        fits = phase == "constant" or (annealed and self.allow_annealed)
        check(fits, "continue_from", self.continue_from, rule, where=f"it is of the phase {phase}")
        rule = "0 where continue_from is a checkpoint of the constant phase, which needs no rise"
        check(annealed or self.rewarm_steps == 0, "rewarm_steps", self.rewarm_steps, rule)
        if self.trainer is not None:
            model, (origin, ended) = self.trainer.model, self._ended
            first = ended() is not model or origin != self.continue_from
            rule = "None, or another checkpoint, in a second train() of a trainer"
            why = "the weights that the first has trained would be lost; to go on from them, resume"
            check(first, "continue_from", self.continue_from, rule, where=why)
            here = trained_tensors(model, self.trainer.optimizer)
            check_trained(state.get("trained"), here, "continue_from", self.continue_from)
        return self.continue_from

    def reset(self) -> None:
        """Forget an earlier run."""
        super().reset()
        self._asked: int | None = None
        self._optimizer: str | None = None
        self._plan: list[Any] = []
        self._can_branch = True
        self._reopened = 0  # annealed checkpoints that the weights have been continued from
        self._demanded = False  # whether the anneal on the curve is one that start_anneal asked for
        self._run_start: float | None = None  # time of this run's first update
        self._run_steps: int | None = None  # its max_steps
        self._trained: dict[str, Any] | None = None
        self._loosened: TrainingArguments | None = None

    def begin(self, run: Run) -> None:
        """Follow the curve, from where the checkpoint stands where there is one."""
        if run.warm_start is not None:
            self.load_state_dict(self.read_state(run.warm_start, of_other_run=True))
            self._asked = None  # in the other run
            self._reopen(run)
        optimizer = run.optimizer_name
        known = self._optimizer in (None, optimizer)
        check(known, "optimizer", optimizer, f"{self._optimizer}, as in the checkpoint")
        self._optimizer, self._can_branch = optimizer, not run.args.save_only_model
        self._trained = trained_tensors(run.model, run.optimizer)
        new = self.curve is None or run.warm_start is not None
        super().begin(run)
        if new or self._run_start is None:  # checkpoints of before it was kept have none
            self._run_start = self._curve().time(self.step) - run.state.global_step
        before, self._run_steps = self._run_steps, run.state.max_steps
        plan = [self.anneal_start, self.anneal_steps, self.anneal]
        if new or plan != self._plan:
            self._plan_anneal()
        elif before is not None and before != self._run_steps:
            self._fit_anneal(before)
        self._plan = plan
        checkpoint = resumed_from(run.state)
        # Its run may have ended before it was kept; one of a run without this schedule is no branch.
        if checkpoint is not None and (checkpoint / f"{self.file_name()}.json").is_file():
            self._keep(checkpoint, run.output_dir)

    def _reopen(self, run: Run) -> None:
        """Leave the anneal of the checkpoint that a run continues from, where it has been annealed."""
        curve = self._curve()
        now = curve.time(int(run.lr_scheduler.last_epoch))
        if not _annealing(curve, now):
            return
        curve.reopen(now, self.rewarm_steps)
        self._reopened += 1
        over = f"over {self.rewarm_steps} steps" if self.rewarm_steps else "at once"
        warnings.warn(
            f"continue_from is a checkpoint that has been annealed: the learning rate rises from "
            f"{curve.rewarm_from:g} to {curve.const_lr_ratio:g} of the peak {over}; infinite_branch needs "
            "no rise",
            stacklevel=2,
        )

    def make_curve(self, run: Run) -> InfiniteLRCurve:
        """Resolve shares of the run into steps; an anneal is planned later."""
        total = run.state.max_steps
        warmup = round(self.warmup_end * total) if self.warmup_steps is None else self.warmup_steps
        cooldown = round(self.cooldown_end * total) if self.cooldown_steps is None else self.cooldown_steps
        if self.start_phase == "constant":
            warmup = cooldown = 0
        check(warmup <= total, "warmup_steps", warmup, f"at most the run's {total} steps")
        check(cooldown <= total, "cooldown_steps", cooldown, f"at most the run's {total} steps")
        if 0 < cooldown == warmup and self.const_lr_ratio < 1.0:
            warnings.warn("cooldown_steps equals warmup_steps: the learning rate drops at once", stacklevel=2)
        return InfiniteLRCurve(
            warmup_steps=warmup,
            cooldown_steps=cooldown,
            const_lr_ratio=self.const_lr_ratio,
            min_lr_ratio=self.min_lr_ratio,
            cooldown=self.cooldown,
            rsqrt_scale=self.rsqrt_scale,
            anneal=self.anneal,
        )

    def curve_from(self, fields: Mapping[str, Any]) -> InfiniteLRCurve:
        """Return the saved curve."""
        return InfiniteLRCurve(**fields)

    def _plan_anneal(self) -> None:
        """Set the marks of the anneal that the settings ask for; none are left of an earlier plan."""
        assert self._run_start is not None
        assert self._run_steps is not None
        curve = self._curve()
        now = curve.time(self.step)
        check(
            not _annealing(curve, now),
            "anneal_start",
            self.anneal_start,
            "left as it was once an anneal has begun",
        )
        last = self._run_start + self._run_steps - 1
        start = self.anneal_start
        curve.anneal, curve.anneal_start, curve.anneal_steps = self.anneal, None, None
        self._demanded = False
        if start is None:
            check(
                self.anneal_steps is None,
                "anneal_steps",
                self.anneal_steps,
                "left out without an anneal_start",
            )
            return
        self._check_branch()
        first = max(curve.cooldown_steps, now)
        if curve.rewarm_start is not None:
            first = max(first, curve.rewarm_start + curve.rewarm_steps)
        share = isinstance(start, float)
        mark = round(self._run_start + start * self._run_steps) if share else start
        rule = f"in the constant phase of this run, {first:g} to {last - 1:g}"
        check(first <= mark < last, "anneal_start", start, rule, where=f"step {mark}")
        curve.anneal_start = mark
        curve.anneal_steps = round(last) - mark if self.anneal_steps is None else self.anneal_steps
        _warn_if_cut(curve, last)

    def _fit_anneal(self, before: int) -> None:
        """Plan the anneal for another length of the run than the checkpoint's, unless it has begun."""
        curve, start, steps = self._curve(), self._run_start, self._run_steps
        if curve.anneal_start is None or curve.anneal_steps is None or start is None or steps is None:
            return
        marks = (curve.anneal_start, curve.anneal_steps)
        if self._demanded or _annealing(curve, curve.time(self.step)):
            last, end = start + steps - 1, sum(marks)
            cut = f"is cut short at {curve.factor(last):g} of the peak rate"
            change = f"has begun, and {cut if end > last else f'ends the run at step {end - start + 1:g}'}"
        else:
            self._plan_anneal()
            if marks == (curve.anneal_start, curve.anneal_steps):
                return
            change = f"begins after {curve.anneal_start - start:g} steps and takes {curve.anneal_steps:g}, "
            change += f"where it was to begin after {marks[0] - start:g} and take {marks[1]:g}"
        name = type(self).__name__
        warnings.warn(
            f"{name}: max_steps is {steps}, and {before} in the checkpoint: the anneal {change}", stacklevel=2
        )

    def start_anneal(self, steps: int) -> None:
        """Ask for an anneal; it begins at the end of an update, from a checkpoint that is kept.

        From another callback, a signal handler or a thread; on every process, before the same update. What is
        asked for during an update holds from the next one on. What is asked for after this callback's own
        `on_step_end`, as from that of a callback which stands behind it, holds one update later.

        Args:
            steps: Length in optimizer steps, at least 1.

        Raises:
            ValueError: No run is on, an anneal has been asked for or has begun, or steps is below 1.
        """
        check(
            self.curve is not None and self._scheduler is not None,
            "start_anneal",
            steps,
            "called during training",
        )
        check(steps >= 1, "anneal_steps", steps, "at least 1")
        planned = self._asked is not None or _annealing(self._curve(), self._curve().time(self.step))
        check(not planned, "start_anneal", steps, "called once: an anneal is on")
        self._check_branch()
        self._asked = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin an anneal, save what comes before it, and stop after it."""
        curve = self._curve()
        now = curve.time(self.step)
        # After an overflow in fp16 the schedule stands where it stood, and what is due there has been done.
        arrived = not getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        if self._asked is not None and curve.phase(now) not in ("warmup", "cooldown", "rewarm"):
            curve.anneal_start = curve.anneal_steps = None  # one that was planned for later
            curve.start_anneal(round(now), self._asked)
            self._asked, self._demanded, arrived = None, True, True
            _warn_if_cut(curve, curve.time(self.step + state.max_steps - state.global_step - 1))
        if curve.anneal_start is None or curve.anneal_steps is None:
            return
        if curve.time(self.step - 1) < curve.anneal_start < now:
            # A batch that has grown steps over the mark: the anneal begins here, and ends where it was to.
            curve.anneal_steps = max(curve.anneal_steps - (now - curve.anneal_start), 1)
            curve.anneal_start = now
        ended = curve.time(self.step - 1) >= curve.anneal_start + curve.anneal_steps
        cut = now > curve.anneal_start and state.global_step >= state.max_steps  # short, as by overflows
        if ended:
            control.should_training_stop = True
        if ended or cut or (now == curve.anneal_start and arrived):
            control.should_save = True
            self._save_whatever_is_best(args)

    def _save_whatever_is_best(self, args: TrainingArguments) -> None:
        """Keep an evaluation of this step from taking the save back, until the save."""
        if args.save_strategy == SaveStrategy.BEST:
            args.save_strategy, self._loosened = SaveStrategy.STEPS, args

    def _tighten(self) -> None:
        if self._loosened is not None:
            self._loosened.save_strategy, self._loosened = SaveStrategy.BEST, None

    def undo(self) -> None:
        """Give the Trainer's scheduler and its settings back."""
        self._tighten()
        super().undo()

    def finish(self, run: Run) -> None:
        """Remember what has been trained, and tell of an anneal that there was no time for."""
        if self.trainer is not None and self.continue_from is not None:
            self._ended = (self.continue_from, weakref.ref(self.trainer.model))
        if self._asked is not None:
            phase = self._curve().phase(self._curve().time(self.step))
            warnings.warn(
                f"the anneal that was asked for has not begun: the run ended in the {phase} phase",
                stacklevel=2,
            )

    def saved(self, run: Run, folder: Path) -> None:
        """Keep the checkpoint that an anneal starts from, where no rotation finds it."""
        self._tighten()
        self._keep(folder, run.output_dir)

    def _keep(self, checkpoint: Path, output_dir: Path) -> None:
        start = self._curve().anneal_start
        if self._can_branch and start is not None and self._curve().time(self.step) == start:
            # There it has never been annealed, whatever the settings that it is resumed with.
            plan = [None, None, self.anneal]
            unplanned = {"curve.anneal_start": None, "curve.anneal_steps": None, "plan": plan}
            keep(checkpoint, output_dir / BRANCH, self.file_name(), unplanned)

    def _check_branch(self) -> None:
        rule = "False where an anneal is to come: the checkpoint to continue from needs the optimizer's state"
        check(self._can_branch, "save_only_model", True, rule)

    def _curve(self) -> InfiniteLRCurve:
        assert isinstance(self.curve, InfiniteLRCurve)
        return self.curve

    def scalars(self) -> dict[str, float]:
        """Return the phase of the last update (0 to 5, as in `PHASES`) and its time on the curve.

        Once an annealed checkpoint was continued from, also how many of them were.
        """
        time = self._curve().time(max(self.step - 1, 0))
        found = {"phase": float(PHASES.index(self._curve().phase(time))), "time": time}
        return found | ({"reopened": float(self._reopened)} if self._reopened else {})

    def state_dict(self) -> dict[str, Any]:
        """Return the curve, its phase, the plan that the settings asked for, and what is trained."""
        curve = self._curve()
        now = curve.time(self.step)
        phase = "constant" if now == curve.anneal_start else curve.phase(now)
        own = {"phase": phase, "plan": self._plan, "asked": self._asked, "demanded": self._demanded}
        run = {"run_start": self._run_start, "run_steps": self._run_steps}
        weights = {"optimizer": self._optimizer, "trained": self._trained, "reopened": self._reopened}
        return {**super().state_dict(), **own, **run, **weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them; checkpoints of earlier versions have fewer."""
        super().load_state_dict(state)
        self._plan, self._asked, self._optimizer = list(state["plan"]), state["asked"], state["optimizer"]
        self._reopened, self._demanded = state.get("reopened", 0), state.get("demanded", False)
        self._run_start, self._run_steps = state.get("run_start"), state.get("run_steps")


def _annealing(curve: InfiniteLRCurve, now: float) -> bool:
    """Return whether an update has been made in the anneal; the one at its start is next otherwise."""
    return curve.anneal_start is not None and now > curve.anneal_start


def _warn_if_cut(curve: InfiniteLRCurve, last: float) -> None:
    """Warn of an anneal that is not over at the time of the run's last update."""
    assert curve.anneal_start is not None
    assert curve.anneal_steps is not None
    if curve.anneal_start + curve.anneal_steps > last:
        rate = curve.factor(last)
        warnings.warn(
            f"anneal_steps reaches beyond the run, which ends at {rate:g} of the peak rate", stacklevel=2
        )
