"""`hf-ext schedule predict`: candidate schedules ranked by a law that is fitted to recorded runs."""

from __future__ import annotations

import dataclasses
import io
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..callbacks._recorded_norms import SCHEDULE, SavedSchedule, norm_for, saved_schedule
from ..callbacks.annealing_law import (
    AnnealingLaw,
    Forecast,
    LossTrace,
    curve_rates,
    recorded_trace,
    schedule_rates,
)
from ..callbacks.infinite_lr import InfiniteLRCurve
from ..callbacks.refined_linear_decay import recorded_norms, refined_schedule, resampled
from ..core.checks import check, check_fields, require
from ..core.files import write_bytes, write_json
from .refine import NO_PLOT

NAME = "schedule_forecast"
SCHEDULES = "constant,linear,cosine,wsd,infinite_lr"
DRAWN = 1000  # points of a curve in the plot


@dataclass(frozen=True)
class Ranking:
    """What a law says of candidate schedules.

    Args:
        law: The law.
        steps: Updates of each schedule.
        level: Share within the intervals.
        forecasts: Final losses by schedule, the lowest first.
        notes: What to mind.
        files: The files written.
    """

    law: AnnealingLaw
    steps: int
    level: float
    forecasts: dict[str, Forecast]
    notes: list[str]
    files: list[Path]

    def table(self) -> str:
        """Return the ranking as aligned text."""
        best = next(iter(self.forecasts.values())).loss
        share = f"{self.level:.0%} interval"
        lines = [["", "schedule", "final loss", share, "over the best"]]
        for place, (name, found) in enumerate(self.forecasts.items(), start=1):
            interval = f"{found.low:.4f} to {found.high:.4f}"
            lines.append([f"{place}", name, f"{found.loss:.4f}", interval, f"{found.loss - best:+.4f}"])
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def predict_runs(
    run_dirs: Sequence[str | Path],
    schedules: str = SCHEDULES,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    warmup_steps: int | None = None,
    lam: float = 0.999,
    fit_lambda: bool = False,
    level: float = 0.9,
    allow_peak_change: bool = False,
) -> Ranking:
    """Fit the annealing law to recorded runs, rank schedules by it, and write the ranking.

    `schedule_forecast.json` and, with matplotlib, `schedule_forecast.png` go into the first run's folder.

    Args:
        run_dirs: Output folders of runs with `AnnealingLawCallback`; they may differ in learning rates only.
        schedules: Names with commas between: those of transformers, "wsd", "infinite_lr" (annealing over the
            last 20 %), "refined" (from the gradient norms that the first run has recorded; its rise counts as
            a warm-up). Options follow a colon: "wsd:num_decay_steps=100:min_lr_ratio=0.1,refined:tau=0.2".
        steps: Updates of each schedule; None for those of the first run.
        learning_rate: Their peak; None for the fitted one.
        warmup_steps: Updates of their warm-up; None for those of the first run.
        lam: Decay of the annealing momentum.
        fit_lambda: Whether to take the best of three decays instead.
        level: Share within the intervals, in (0, 1).
        allow_peak_change: Whether the peak may be above the fitted one.

    Raises:
        ValueError: A folder holds no trace, the law cannot be fitted or does not reach a schedule, a schedule
            or one of its options is unknown, its phases are longer than the run, or "refined" finds no
            recorded norms.
        TypeError: An option is not of its type.
        OSError: The folder cannot be written.
    """
    check(bool(run_dirs), "RUN_DIR", list(run_dirs), "at least one folder")
    names = [name.strip() for name in schedules.split(",") if name.strip()]
    check(bool(names), "schedules", schedules, "names with commas between")
    traces = [recorded_trace(folder) for folder in run_dirs]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        law = AnnealingLaw.fit(traces, lam=lam, fit_lambda=fit_lambda)
        count = len(traces[0].rates) if steps is None else steps
        check(count >= 1, "steps", count, "at least 1")
        warmup = min(traces[0].warmup, count - 1) if warmup_steps is None else warmup_steps
        peak = law.eta_ref if learning_rate is None else learning_rate
        rates = {name: _rates(name, count, peak, warmup, run_dirs[0]) for name in names}
        curves: dict[str, Tensor] = {}
        forecasts: dict[str, Forecast] = {}
        for name, values in rates.items():
            with _named(name):
                rise = int(values.argmax()) if _is_refined(name) else warmup
                if rise > warmup:
                    warnings.warn(
                        f"{name} rises over its first {rise} of {count} updates: they count as a warm-up, at "
                        "its peak",
                        stacklevel=2,
                    )
                options: Any = {"warmup_steps": rise, "allow_peak_change": allow_peak_change}
                curves[name] = law.predict(values, **options)
                forecasts[name] = law.forecast(values, level=level, **options)
    forecasts = dict(sorted(forecasts.items(), key=lambda item: item[1].loss))
    notes = list(dict.fromkeys(str(entry.message) for entry in caught))
    content = {
        "runs": [str(folder) for folder in run_dirs],
        "law": {name: value for name, value in law.to_json().items() if name != "draws"},
        "steps": count,
        "learning_rate": peak,
        "warmup_steps": warmup,
        "level": level,
        "notes": notes,
        "schedules": [{"schedule": name, **vars(found)} for name, found in forecasts.items()],
    }
    path = Path(run_dirs[0]) / f"{NAME}.json"
    write_json(path, content)
    files = [path]
    if find_spec("matplotlib") is None:
        notes = [*notes, NO_PLOT]
    else:
        files.append(path.with_suffix(".png"))
        write_bytes(files[-1], _plot(traces, curves, rates, forecasts))
    return Ranking(law, count, level, forecasts, notes, files)


class _named:
    """Put a schedule's name before what is wrong with it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | TypeError):
            raise type(error)(f"{self.name}: {error}") from error


def _is_refined(text: str) -> bool:
    return text.partition(":")[0] == "refined"


def _rates(text: str, steps: int, peak: float, warmup: int, run_dir: str | Path) -> Tensor:
    name, *given = text.split(":")
    options: dict[str, Any] = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        check(bool(key and equals and value), "schedules", entry, "an option as key=value", where=text)
        options[key] = _value(value)
    with _named(text):
        if name == "infinite_lr":
            return curve_rates(_infinite(steps, warmup, options), steps, peak)
        if _is_refined(name):
            given = check_fields(options, {"norm": str, "tau": float, "floor": float}, where=name)
            return peak * _refined(run_dir, steps, **cast(Any, given))
        return schedule_rates(name, steps, peak, warmup_steps=warmup, **options)


def _refined(
    run_dir: str | Path, steps: int, *, norm: str = "auto", tau: float = 0.1, floor: float = 0.0
) -> Tensor:
    """Return the refined schedule of a recorded run, (steps,) multiples of the peak."""
    recorded = recorded_norms(run_dir)
    recorded.check_enough(str(run_dir))
    if recorded.cut_short:
        warnings.warn(f"refined is made of {recorded.cut_short}, stretched over a whole run", stacklevel=2)
    norm = norm_for(recorded.optimizer) if norm == "auto" else norm
    factors = refined_schedule(recorded.of(norm), norm=norm, tau=tau)
    check(0.0 <= floor < 1.0, "floor", floor, "in [0, 1)")
    saved = Path(run_dir) / SCHEDULE
    if saved.is_file():
        here = SavedSchedule(factors, norm, tau, True, recorded.optimizer)
        differing = saved_schedule(saved).differing(here)
        if differing:
            warnings.warn(f"refined is not what {saved} holds, which was made with {differing}", stacklevel=2)
    return resampled(factors, steps, drop_zero=True).clamp_min(floor)


def _infinite(steps: int, warmup: int, options: Mapping[str, Any]) -> InfiniteLRCurve:
    """Return the infinite schedule with its options, which must fit in the run as the callback's must."""
    hints = typing.get_type_hints(InfiniteLRCurve)
    known = {field.name: hints[field.name] for field in dataclasses.fields(InfiniteLRCurve)}
    given: dict[str, Any] = check_fields(options, known, where="infinite_lr")
    last = steps - 1
    warmup = given.get("warmup_steps", warmup)
    check(0 <= warmup < steps, "warmup_steps", warmup, f"in [0, {steps})")
    cooldown = given.get("cooldown_steps", max(warmup, round(0.15 * steps)))
    check(cooldown <= steps, "cooldown_steps", cooldown, f"at most {steps}, the steps of the run")
    room = "anneal_start" in given or cooldown < last
    rule = f"at least {cooldown + 2}: the warm-up and the cooldown take {cooldown}, and an anneal follows"
    check(room, "steps", steps, rule)
    start = given.get("anneal_start", max(cooldown, min(round(0.8 * steps), last - 1)))
    rule = f"in [{cooldown}, {last}), in the constant phase of a run of {steps} steps"
    check(cooldown <= start < last, "anneal_start", start, rule)
    length = given.get("anneal_steps", last - start)
    marks = {"warmup_steps": warmup, "cooldown_steps": cooldown}
    marks |= {"anneal_start": start, "anneal_steps": length}
    curve = InfiniteLRCurve(**{**given, **marks})
    if start + length > last:
        warnings.warn(
            f"anneal_steps={length} from step {start} on reaches beyond the {steps} steps of infinite_lr, "
            f"which ends at {curve.factor(last):g} of the peak rate",
            stacklevel=2,
        )
    return curve


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _plot(
    traces: Sequence[LossTrace],
    curves: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    forecasts: Mapping[str, Forecast],
) -> bytes:
    require("matplotlib", extra="plot")
    # Not through pyplot: its state is global, and it would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for index, trace in enumerate(traces):
        label = "measured" if index == 0 else None
        above.plot(trace.steps.tolist(), trace.losses.tolist(), ".", color="0.6", label=label)
    drawn = []
    for name in forecasts:
        count = len(rates[name])
        places = list(range(0, count, max(1, count // DRAWN)))
        places += [] if places[-1] == count - 1 else [count - 1]
        first = max(1, count // 50)  # the law says nothing of the very beginning
        shown = [place for place in places if place >= first] or places
        above.plot([p + 1 for p in shown], curves[name][shown].tolist(), label=name)
        below.plot([p + 1 for p in places], rates[name][places].tolist())
        drawn += curves[name][shown].tolist()
    spread = max(drawn) - min(drawn)
    above.set_ylim(min(drawn) - 0.05 * spread - 1e-9, max(drawn) + 0.05 * spread + 1e-9)
    held_out = traces[0].context.get("loss") != "smoothed_train_loss"
    above.set_ylabel(f"{'held-out' if held_out else 'smoothed training'} loss (nats per token)")
    below.set_xlabel("optimizer step")
    below.set_ylabel("learning rate")
    above.legend(fontsize="small")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
