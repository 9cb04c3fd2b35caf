"""The annealing law as an object: fitted to traces of runs, it forecasts schedules; see `annealing_law`."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check
from ._annealing_fit import areas, bootstrap_laws, fit_law, law_loss, without_warmup
from ._loss_trace import LossTrace

FEWEST = 20  # points of a fit
SPAN = 4.0  # ratio of the largest to the smallest forward area of a fit
LAMBDAS = (0.99, 0.995, 0.999)
SKIPPED = 0.02  # share of a run after its warm-up that a fit leaves out
NO_RATE = 1e-3  # share of the peak below which an update counts as one without a rate
TAIL = 0.03  # share of a schedule; the last 2 % of a cosine are below NO_RATE, and belong to it
NO_ANNEALING = 1e-9  # annealing area over the peak rate
FAR = 10.0  # ratio of forward areas from which a forecast is an extrapolation to warn of
PEAK = 1.1
STEEPEST = 10.0  # exponent of the forward area; losses that do not fall ask for any, however large


@dataclass(frozen=True)
class Forecast:
    """A schedule's final loss by a law, nats per token.

    Args:
        loss: The law's.
        low: Lower end of the interval.
        high: Upper end.
    """

    loss: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class AnnealingLaw:
    """L(s) = L0 + A S1(s)^-alpha - C S2(s), fitted to the loss curves of one or several runs.

    Args:
        L0: Loss that no training goes below, nats per token.
        A: Factor of the forward area's power.
        C: Factor of the annealing area; None where no fitted run had annealed.
        alpha: Exponent of the forward area.
        lam: Decay of the annealing momentum.
        eta_ref: Largest rate that was fitted.
        forward_range: Smallest and largest forward area that was fitted.
        points: Number of fitted losses.
        delta: Threshold of the Huber loss, in log loss.
        objective: Mean Huber loss of the log residuals.
        condition: Condition number of the fit's linear part, its columns scaled to length 1; from some
            hundreds on the numbers trade off against each other, though forecasts may be good.
        curves: For each run its points, R^2, mean absolute percentage error, and relative residual at the
            last point.
        context: What the runs had in common.
        draws: (B, 5) refits of the bootstrap: L0, A, C and alpha for rates over eta_ref, and a log residual.
    """

    L0: float
    A: float
    C: float | None
    alpha: float
    lam: float
    eta_ref: float
    forward_range: tuple[float, float]
    points: int
    delta: float
    objective: float
    condition: float
    curves: list[dict[str, float]]
    context: dict[str, Any]
    draws: list[list[float]]

    # Fit ------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        traces: LossTrace | Sequence[LossTrace],
        *,
        lam: float = 0.999,
        fit_lambda: bool = False,
        delta: float = 1e-3,
        fit_from: int | None = None,
        resamples: int = 100,
    ) -> AnnealingLaw:
        """Fit the law to runs that differ in their learning rates only.

        Args:
            traces: The runs. To know C, one must have annealed.
            lam: Decay of the annealing momentum, in [0.9, 0.9999].
            fit_lambda: Whether to take the best of 0.99, 0.995 and 0.999 instead.
            delta: Threshold of the Huber loss, above 0.
            fit_from: First update whose loss counts; None for 2 % of the run after its warm-up.
            resamples: Refits of the bootstrap; 0 for a law without intervals.

        Raises:
            ValueError: Fewer than 20 points, or a run without any; forward areas within a factor of 4; a loss
                that is not finite or not above 0; losses that follow no power law; a trace that does not
                begin with its run; a setting outside its range.
        """
        traces = [traces] if isinstance(traces, LossTrace) else list(traces)
        check(bool(traces), "traces", traces, "at least one")
        check_fit_settings(lam, delta, fit_from, resamples)
        eta_ref = max(trace.peak for trace in traces)
        check(eta_ref > 0.0, "rates", eta_ref, "of a run with a rate above 0")
        _warn_of_contexts([trace.context for trace in traces], "the runs differ in")
        names = [trace.name or f"run {i} of {len(traces)}" for i, trace in enumerate(traces, start=1)]
        if len(traces) == 1:  # there is no other that could be meant
            names = [""]
        fits = []
        for decay in LAMBDAS if fit_lambda else (lam,):
            parts = [
                _points(trace, eta_ref, decay, fit_from, name)
                for trace, name in zip(traces, names, strict=True)
            ]
            for name, part in zip(names, parts, strict=True):
                rule = "measured after the warm-up in each run; leave out a run that has none"
                check(not name or len(part[0]) > 0, "losses", "none", rule, where=name)
            x, y, losses = (torch.cat(column) for column in zip(*parts, strict=True))
            _check_points(x, losses)
            anneals = bool(y.abs().max() > NO_ANNEALING)
            law, objective = fit_law(x, y, losses, delta=delta, anneals=anneals)
            fits.append((objective, decay, law, parts, anneals))
            if not anneals:  # the decay makes no difference
                break
        objective, decay, law, parts, anneals = min(fits, key=lambda found: found[0])
        x, y, losses = (torch.cat(column) for column in zip(*parts, strict=True))
        laws, noise = bootstrap_laws(
            law,
            x,
            y,
            losses,
            [len(part[0]) for part in parts],
            delta=delta,
            anneals=anneals,
            resamples=resamples,
        )
        l0, a, c, alpha = law.tolist()
        rule = f"falling along a power law with an exponent of at most {STEEPEST:g}, for a fit"
        check(alpha <= STEEPEST, "losses", f"points with the exponent {alpha:.3g}", rule)
        return cls(
            L0=l0,
            A=a * eta_ref**alpha,
            C=c / eta_ref if anneals else None,
            alpha=alpha,
            lam=decay,
            eta_ref=eta_ref,
            forward_range=(float(x.min()) * eta_ref, float(x.max()) * eta_ref),
            points=len(x),
            delta=delta,
            objective=objective,
            condition=_condition(law, x, y, losses, anneals),
            curves=[_diagnostics(law, *part) for part in parts],
            context=dict(traces[0].context),
            draws=torch.cat([laws, noise[:, None]], dim=1).tolist(),
        )

    # Predict --------------------------------------------------------------------------------------

    def predict(
        self,
        rates: Sequence[float] | Tensor,
        *,
        warmup_steps: int | None = None,
        trim_zero: bool = True,
        allow_peak_change: bool = False,
        context: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return the loss after each update of a schedule.

        Args:
            rates: (T,) rate of each update, in the unit of the fitted ones.
            warmup_steps: Updates of the warm-up; None for the first stretch that rises at each update.
            trim_zero: Whether the loss stays where it is over a long stretch at the end without a rate.
            allow_peak_change: Whether the peak may be above the fitted one: the law always finds that better.
            context: What is known of the run, to compare with that of the fitted ones.

        Returns:
            (T,), float64, nats per token.

        Raises:
            ValueError: The schedule anneals and C is None, its peak is more than 10 % above the fitted one,
                or a rate is negative or not finite.
        """
        rates = self._checked(rates, allow_peak_change)
        _warn_of_contexts([self.context, context or {}], "the law was fitted with another")
        kept = _with_rate(rates)
        if kept < len(rates):
            what = "left out" if trim_zero else "counted as annealing, which the law overrates"
            warnings.warn(
                f"the last {len(rates) - kept} of {len(rates)} updates have next to no rate: {what}",
                stacklevel=2,
            )
        x, y = self._areas(rates, warmup_steps, trim_zero)
        self._warn_of_extrapolation(float(x[-1]) * self.eta_ref)
        curve = law_loss(self._law(), x, y)
        return torch.cat([curve, curve[-1:].expand(len(rates) - len(curve))])

    def forecast(
        self,
        rates: Sequence[float] | Tensor,
        *,
        level: float = 0.9,
        warmup_steps: int | None = None,
        trim_zero: bool = True,
        allow_peak_change: bool = False,
    ) -> Forecast:
        """Return a schedule's final loss with an interval for what a run would measure.

        Args:
            rates: As in `predict`, which also warns; this does not.
            level: Share of the bootstrap's refits within the interval, in (0, 1).
            warmup_steps: As in `predict`.
            trim_zero: As in `predict`.
            allow_peak_change: As in `predict`.

        Raises:
            ValueError: As `predict`, and for a law without draws or a level outside its range.
        """
        check(0.0 < level < 1.0, "level", level, "in (0, 1)")
        check(bool(self.draws), "resamples", 0, "above 0 in the fit, for an interval")
        rates = self._checked(rates, allow_peak_change)
        x, y = self._areas(rates, warmup_steps, trim_zero)
        draws = torch.tensor(self.draws, dtype=torch.float64)
        ends = law_loss(draws[:, :4], x[-1:], y[-1:])[:, 0] * draws[:, 4].exp()
        tails = torch.tensor([(1.0 - level) / 2, (1.0 + level) / 2], dtype=torch.float64)
        low, high = ends.quantile(tails).tolist()
        return Forecast(float(law_loss(self._law(), x[-1:], y[-1:])), low, high)

    def compare(
        self, schedules: Mapping[str, Sequence[float] | Tensor], **options: Any
    ) -> dict[str, Forecast]:
        """Return the final loss of each schedule, the lowest first; options are those of `forecast`."""
        found = {name: self.forecast(rates, **options) for name, rates in schedules.items()}
        return dict(sorted(found.items(), key=lambda item: item[1].loss))

    def _law(self) -> Tensor:
        c = 0.0 if self.C is None else self.C * self.eta_ref
        return torch.tensor([self.L0, self.A / self.eta_ref**self.alpha, c, self.alpha], dtype=torch.float64)

    def _areas(self, rates: Tensor, warmup_steps: int | None, trim_zero: bool) -> tuple[Tensor, Tensor]:
        filled = without_warmup(rates, warmup_steps) / self.eta_ref
        x, y = areas(filled[: _with_rate(rates)] if trim_zero else filled, self.lam)
        if self.C is None:
            rule = "constant: no fitted run has annealed, so that C is unknown; fit a run that has, too"
            check(float(y.abs().max()) <= NO_ANNEALING, "schedule", "one that anneals", rule)
        return x, y

    def _warn_of_extrapolation(self, area: float) -> None:
        low, high = self.forward_range
        if area > FAR * high:
            warnings.warn(
                f"the schedule's forward area is {area / high:.0f} times the fitted one: an extrapolation",
                stacklevel=3,
            )
        if area < low:
            warnings.warn(
                f"the schedule's forward area ends at {area / low:.2g} of where the fitted losses begin: an "
                "extrapolation to the beginning of a run, which the law does not describe",
                stacklevel=3,
            )

    def _checked(self, rates: Sequence[float] | Tensor, allow_peak_change: bool) -> Tensor:
        rates = torch.as_tensor(rates, dtype=torch.float64)
        check(rates.ndim == 1 and len(rates) >= 1, "rates", tuple(rates.shape), "a series of numbers")
        check(bool((rates.isfinite() & (rates >= 0)).all()), "rates", "one that is not", "0 or above")
        peak = float(rates.max())
        check(peak > 0.0, "rates", 0.0, "above 0 in some update")
        within = allow_peak_change or peak <= PEAK * self.eta_ref
        rule = f"at most {PEAK * self.eta_ref:g}, 10 % above the fitted one: the law cannot choose a peak"
        check(within, "peak learning rate", peak, rule)
        return rates

    # JSON -----------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return the law as JSON values."""
        return {**dataclasses.asdict(self), "forward_range": list(self.forward_range)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AnnealingLaw:
        """Return the law of `to_json`.

        Raises:
            ValueError: A field is missing or unknown.
        """
        names = {entry.name for entry in dataclasses.fields(cls)}
        check(set(values) == names, "law", sorted(values), f"an object with the fields {sorted(names)}")
        low, high = values["forward_range"]
        return cls(**{**values, "forward_range": (low, high)})


def check_fit_settings(lam: float, delta: float, fit_from: int | None, resamples: int) -> None:
    """Check what `AnnealingLaw.fit` is given.

    Raises:
        ValueError: A setting is outside its range.
    """
    check(0.9 <= lam <= 0.9999, "lam", lam, "in [0.9, 0.9999]")
    check(delta > 0.0, "delta", delta, "above 0")
    check(fit_from is None or fit_from >= 1, "fit_from", fit_from, "at least 1")
    check(resamples >= 0, "resamples", resamples, "at least 0")


def _points(
    trace: LossTrace, eta_ref: float, lam: float, fit_from: int | None, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the areas and losses (n,) of a trace's points that a fit uses."""
    rule = "1: the trace must be of a run that recorded from its first update on, and continues no other's"
    check(trace.first_step == 1, "first_step", trace.first_step, rule, where=name)
    start = trace.warmup + max(1, math.ceil(SKIPPED * len(trace.rates))) if fit_from is None else fit_from
    used = (trace.steps >= start) & (trace.steps <= _with_rate(trace.rates))
    steps, losses = trace.steps[used], trace.losses[used]
    bad = (~losses.isfinite() | (losses <= 0.0)).nonzero()
    if len(bad):
        step, value = int(steps[bad[0, 0]]), float(losses[bad[0, 0]])
        place = f"{name}, after update {step}" if name else f"after update {step}"
        check(False, "losses", value, "finite and above 0", where=place)
    if not len(steps):
        return losses, losses, losses
    forward, annealing = areas(without_warmup(trace.rates, trace.warmup_steps) / eta_ref, lam)
    x, y = forward[steps - 1], annealing[steps - 1]
    moved = x > 0.0  # before, the power of the area has no value
    return x[moved], y[moved], losses[moved]


def _check_points(x: Tensor, losses: Tensor) -> None:
    rule = f"at least {FEWEST} after the warm-up, for a fit"
    check(len(losses) >= FEWEST, "losses", f"{len(losses)} points", rule)
    span = float(x.max() / x.min())
    rule = f"over a factor of at least {SPAN:g} in the sum of learning rates, for a fit"
    check(span >= SPAN, "losses", f"points over a factor of {span:.2f}", rule)


def _with_rate(rates: Tensor) -> int:
    """Return how many updates are left without a long stretch at the end that has next to no rate."""
    trained = (rates >= NO_RATE * rates.max()).nonzero()
    last = int(trained[-1, 0]) + 1 if len(trained) else 0
    return last if len(rates) - last > TAIL * len(rates) else len(rates)


def _diagnostics(law: Tensor, x: Tensor, y: Tensor, losses: Tensor) -> dict[str, float]:
    residual = law_loss(law, x, y) - losses
    spread = float((losses - losses.mean()).square().sum())
    left = float(residual.square().sum())
    relative = residual / losses
    return {
        "points": len(losses),
        "r2": 1.0 - left / spread if spread > 0.0 else float(left == 0.0),
        "mean_abs_percent": 100.0 * float(relative.abs().mean()),
        "last_residual": float(relative[-1]),
    }


def _condition(law: Tensor, x: Tensor, y: Tensor, losses: Tensor, anneals: bool) -> float:
    columns = [torch.ones_like(x), x ** -law[3], *([y] if anneals else [])]
    design = torch.stack(columns, dim=1) / losses[:, None]
    value = float(torch.linalg.cond(design / design.norm(dim=0)))
    return value if math.isfinite(value) else 1e300  # JSON has no infinity


def _warn_of_contexts(contexts: Sequence[Mapping[str, Any]], text: str) -> None:
    names = sorted({name for context in contexts for name in context})
    several = [
        name
        for name in names
        if len({repr(context[name]) for context in contexts if context.get(name) is not None}) > 1
    ]
    if several:
        found = "; ".join(f"{name} ({', '.join(str(c.get(name)) for c in contexts)})" for name in several)
        warnings.warn(f"the law holds for one setting, but {text} {found}", stacklevel=3)
