"""The infinite schedule's curve: which phase an update is in, and its rate; see `infinite_lr`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..core.checks import check, check_choice
from ._schedule import Curve

COOLDOWNS = ("cosine", "rsqrt", "linear")
ANNEALS = ("exponential", "linear", "one_minus_sqrt")
PHASES = ("warmup", "cooldown", "constant", "anneal", "annealed", "rewarm")


@dataclass(kw_only=True, eq=False)
class InfiniteLRCurve(Curve):
    """The infinite schedule as a function of the update's index.

    `InfiniteLRCurve(warmup_steps=100, cooldown_steps=300).scheduler(optimizer)` is a PyTorch scheduler.

    Args:
        warmup_steps: W, end of the warm-up, at least 0.
        cooldown_steps: C, end of the cooldown (a position, not a length), at least W.
        const_lr_ratio: Constant rate over peak, in (0, 1].
        min_lr_ratio: Rate at the end of the anneal over peak, in (0, const_lr_ratio]; 0 is allowed unless the
            anneal is exponential.
        cooldown: "cosine", "rsqrt" or "linear".
        rsqrt_scale: a in 1 / sqrt(1 + a x), above 0.
        anneal: "exponential", "linear" or "one_minus_sqrt".
        anneal_start: A, or None while no anneal is planned; at least C.
        anneal_steps: N, at least 1; None while no anneal is planned.
        rewarm_start: Time at which an annealed curve was opened again, or None; see `reopen`.
        rewarm_steps: Length of the rise to the constant rate from there, at least 0.
        rewarm_from: Rate at its start over peak, in [0, const_lr_ratio].

    Raises:
        ValueError: A field is outside its range.
    """

    warmup_steps: int
    cooldown_steps: int
    const_lr_ratio: float = 0.1
    min_lr_ratio: float = 0.01
    cooldown: str = "cosine"
    rsqrt_scale: float = 10.0
    anneal: str = "exponential"
    anneal_start: float | None = None
    anneal_steps: float | None = None
    rewarm_start: float | None = None
    rewarm_steps: float = 0
    rewarm_from: float = 0.0

    def __post_init__(self) -> None:
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        rule = f"at least warmup_steps ({self.warmup_steps})"
        check(self.cooldown_steps >= self.warmup_steps, "cooldown_steps", self.cooldown_steps, rule)
        check_levels(self)
        if self.anneal_start is not None:
            rule = f"at least cooldown_steps ({self.cooldown_steps})"
            check(self.anneal_start >= self.cooldown_steps, "anneal_start", self.anneal_start, rule)
            given = self.anneal_steps is not None and self.anneal_steps >= 1
            check(given, "anneal_steps", self.anneal_steps, "at least 1")
        if self.rewarm_start is not None:
            rule = f"at least cooldown_steps ({self.cooldown_steps})"
            check(self.rewarm_start >= self.cooldown_steps, "rewarm_start", self.rewarm_start, rule)
        check(self.rewarm_steps >= 0, "rewarm_steps", self.rewarm_steps, "at least 0")
        rule = f"in [0, const_lr_ratio = {self.const_lr_ratio}]"
        check(0.0 <= self.rewarm_from <= self.const_lr_ratio, "rewarm_from", self.rewarm_from, rule)

    def factor(self, t: float) -> float:
        """Return the rate at time t over the peak."""
        phase = self.phase(t)
        if phase == "warmup":
            return t / self.warmup_steps
        if phase == "cooldown":
            x = (t - self.warmup_steps) / (self.cooldown_steps - self.warmup_steps)
            return 1.0 + (self.const_lr_ratio - 1.0) * self._cooled(x)
        if phase == "constant":
            return self.const_lr_ratio
        if phase == "rewarm":
            assert self.rewarm_start is not None
            share = max(0.0, (t - self.rewarm_start) / self.rewarm_steps)
            return self.rewarm_from + (self.const_lr_ratio - self.rewarm_from) * share
        assert self.anneal_start is not None
        assert self.anneal_steps is not None
        y = min(1.0, (t - self.anneal_start) / self.anneal_steps)
        return self._annealed(y)

    def _cooled(self, x: float) -> float:
        """Return the share of the way from peak to constant rate, 0 at x = 0 and 1 at x = 1."""
        if self.cooldown == "cosine":
            return (1.0 - math.cos(math.pi * x)) / 2.0
        if self.cooldown == "rsqrt":
            a = self.rsqrt_scale
            return (1.0 / math.sqrt(1.0 + a * x) - 1.0) / (1.0 / math.sqrt(1.0 + a) - 1.0)
        return x

    def _annealed(self, y: float) -> float:
        top, bottom = self.const_lr_ratio, self.min_lr_ratio
        if self.anneal == "exponential":
            return top * math.exp(y * math.log(bottom / top))
        return bottom + (top - bottom) * (1.0 - (y if self.anneal == "linear" else math.sqrt(y)))

    def phase(self, t: float) -> str:
        """Return which of `PHASES` time t lies in."""
        if t < self.warmup_steps:
            return "warmup"
        if t < self.cooldown_steps:
            return "cooldown"
        if self.rewarm_start is not None and t < self.rewarm_start + self.rewarm_steps:
            return "rewarm"
        if self.anneal_start is None or self.anneal_steps is None or t < self.anneal_start:
            return "constant"
        return "anneal" if t <= self.anneal_start + self.anneal_steps else "annealed"

    def start_anneal(self, t: int, steps: int) -> None:
        """Begin an anneal of some steps at time t.

        Raises:
            ValueError: The constant phase has not been reached, an anneal has begun, or steps is below 1.
        """
        phase = self.phase(t)
        check(phase == "constant", "start_anneal", t, "in the constant phase", where=f"now in {phase}")
        check(steps >= 1, "anneal_steps", steps, "at least 1")
        self.anneal_start, self.anneal_steps = t, steps

    def reopen(self, t: float, steps: int) -> None:
        """Leave an anneal at time t: the rate rises on a line to the constant one, and stays there.

        Args:
            t: Time of the next update, in or after an anneal.
            steps: Length of the rise, at least 0; 0 for the constant rate from time t on.

        Raises:
            ValueError: No anneal has begun, or steps is below 0.
        """
        phase = self.phase(t)
        check(phase in ("anneal", "annealed"), "reopen", t, "in or after an anneal", where=f"now in {phase}")
        check(steps >= 0, "rewarm_steps", steps, "at least 0")
        self.rewarm_from = self.factor(t)
        self.rewarm_start, self.rewarm_steps = t, steps
        self.anneal_start = self.anneal_steps = None


def check_levels(settings: Any) -> None:
    """Check what the curve and the callback have in common: rates and shapes.

    Raises:
        ValueError: A field is outside its range.
    """
    const, low = settings.const_lr_ratio, settings.min_lr_ratio
    check(0.0 < const <= 1.0, "const_lr_ratio", const, "in (0, 1]")
    check_choice("cooldown", settings.cooldown, COOLDOWNS)
    check(settings.rsqrt_scale > 0.0, "rsqrt_scale", settings.rsqrt_scale, "above 0")
    check_choice("anneal", settings.anneal, ANNEALS)
    if settings.anneal == "exponential":
        check(
            0.0 < low <= const,
            "min_lr_ratio",
            low,
            f"in (0, const_lr_ratio = {const}] (0 needs anneal='linear')",
        )
    check(0.0 <= low <= const, "min_lr_ratio", low, f"in [0, const_lr_ratio = {const}]")
