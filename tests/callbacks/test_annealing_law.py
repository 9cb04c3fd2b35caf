"""The annealing law: its areas, exact recovery, refusals; the recorder and its forecast in a run."""

from __future__ import annotations

import importlib
import json
import math
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from torch import Tensor
from transformers import (
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import hf_ext
from hf_ext.callbacks import (
    AnnealingLaw,
    AnnealingLawCallback,
    InfiniteLRCallback,
    InfiniteLRCurve,
    LossTrace,
    curve_rates,
    recorded_trace,
    schedule_rates,
)
from hf_ext.callbacks._annealing_fit import annealing_momentum, areas, fit_law, rising_steps
from hf_ext.callbacks._base import Run
from hf_ext.callbacks._loss_trace import SmoothedLoss
from hf_ext.core.state import load_state, save_state
from tests.callbacks.runs import MIDDLE, STEPS, StopAt, build, equal, logged, parameters, rows, tiny_model
from tests.reference import annealing_law as reference

TRUE = {"L0": 2.6, "A": 0.3, "C": 120.0, "alpha": 0.47}
LAM, PEAK, LENGTH = 0.99, 2e-4, 2000


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def measured(
    rates: Tensor, *, every: int = 50, noise: float = 0.0, scale: float = 1.0, **law: float
) -> LossTrace:
    """Return a trace whose losses are those of a law, by the plain loops."""
    numbers = {**TRUE, **law}
    s1, s2 = reference.areas(rates.tolist(), LAM)
    steps = list(range(every, len(rates) + 1, every))
    draw = random.Random(0)
    losses = [
        reference.loss(s1[s - 1], s2[s - 1], **numbers) * (1.0 + noise * draw.gauss(0.0, 1.0)) for s in steps
    ]
    return LossTrace(rates * scale, torch.tensor(steps), double(losses))


def two_runs(**options: Any) -> list[LossTrace]:
    rates = (schedule_rates(name, LENGTH, PEAK) for name in ("constant", "cosine"))
    return [measured(values, **options) for values in rates]


@pytest.fixture(scope="module")
def law() -> AnnealingLaw:
    return AnnealingLaw.fit(two_runs(), lam=LAM)


# Areas --------------------------------------------------------------------------------------------


def test_the_hand_computed_case() -> None:
    rates = double([1.0, 1.0, 0.5, 0.5, 0.0])
    s1, s2 = areas(rates, 0.9)
    assert s1.tolist() == [1.0, 2.0, 2.5, 3.0, 3.0]
    assert annealing_momentum(rates, 0.9).tolist() == pytest.approx([0.0, 0.0, 0.5, 0.45, 0.905])
    assert s2.tolist() == pytest.approx([0.0, 0.0, 0.5, 0.95, 1.855])
    values = {"L0": 2.0, "A": 1.0, "alpha": 0.5, "C": 0.1, "lam": 0.9, "eta_ref": 1.0}
    rest = {"forward_range": (1.0, 3.0), "points": 5, "delta": 1e-3, "objective": 0.0, "condition": 1.0}
    law = AnnealingLaw(**values, **rest, curves=[], context={}, draws=[])
    with pytest.warns(UserWarning, match="next to no rate"):
        found = law.predict(rates, trim_zero=False)
    assert found.tolist() == pytest.approx([3.0, 2.707107, 2.582456, 2.482350, 2.391850], abs=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.9, 0.99, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000])
def test_the_scan_equals_the_recurrence(lam: float, count: int) -> None:
    draw = random.Random(count)
    eta = [draw.random() for _ in range(count)]
    # Sums of up to a thousand doubles of order 1, in another order.
    assert annealing_momentum(double(eta), lam).tolist() == pytest.approx(
        reference.momentum(eta, lam), abs=1e-12
    )
    s1, s2 = reference.areas(eta, lam)
    found = areas(double(eta), lam)
    assert found[0].tolist() == pytest.approx(s1, rel=1e-12)
    assert found[1].tolist() == pytest.approx(s2, abs=1e-9)


def test_limits_of_the_decay() -> None:
    eta = double([0.7, 1.0, 0.4, 0.4, 0.9, 0.1])
    assert areas(torch.full((300,), 0.3, dtype=torch.float64), 0.99)[1].tolist() == [0.0] * 300
    assert areas(eta, 0.0)[1].tolist() == pytest.approx((eta[0] - eta).tolist(), abs=1e-15)
    s1, s2 = areas(eta, 1.0)
    expected = torch.arange(1, 7) * eta[0] - s1
    assert s2.tolist() == pytest.approx(expected.tolist(), abs=1e-14)


def test_a_warmup_counts_as_its_end() -> None:
    assert rising_steps(double([1.0, 1.0, 2.0])) == 0
    assert rising_steps(double([0.0, 0.5, 1.0, 1.0, 0.5])) == 2
    assert rising_steps(double([0.0, 0.5, 1.0])) == 2
    assert rising_steps(double([0.3])) == 0
    steady = schedule_rates("cosine", 400, 1.0)
    warm = schedule_rates("cosine", 400, 1.0, warmup_steps=30)
    assert warm[0] == 0.0
    ramps = [
        torch.cat([ramp, steady[20:]])
        for ramp in (torch.linspace(0.0, 0.9, 20), torch.linspace(0.5, 0.6, 20))
    ]
    law = AnnealingLaw.fit(two_runs(), lam=LAM)
    curves = [law.predict(PEAK * ramp.double(), warmup_steps=20) for ramp in ramps]
    assert torch.equal(*curves)
    flat = law.predict(PEAK * torch.cat([steady[20:21].expand(20), steady[20:]]))
    assert torch.equal(curves[0], flat)


# Fit ----------------------------------------------------------------------------------------------


def test_exact_data_are_recovered(law: AnnealingLaw) -> None:
    for name, value in TRUE.items():
        assert getattr(law, name) == pytest.approx(value, rel=1e-4), name
    wsd = schedule_rates("wsd", LENGTH, PEAK)
    s1, s2 = reference.areas(wsd.tolist(), LAM)
    expected = [reference.loss(x, y, **TRUE) for x, y in zip(s1, s2, strict=True)]
    assert law.predict(wsd).tolist() == pytest.approx(expected, abs=1e-6)
    assert all(curve["r2"] == pytest.approx(1.0) for curve in law.curves)
    assert law.points == 80


def test_the_unit_of_the_rates_does_not_matter(law: AnnealingLaw) -> None:
    scaled = AnnealingLaw.fit(two_runs(scale=1e3), lam=LAM)
    assert pytest.approx(law.A * 1e3**law.alpha, rel=1e-6) == scaled.A
    assert pytest.approx((law.C or 0.0) / 1e3, rel=1e-6) == scaled.C
    rates = schedule_rates("linear", LENGTH, PEAK)
    assert scaled.predict(1e3 * rates).tolist() == pytest.approx(law.predict(rates).tolist(), rel=1e-9)


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 5e-3])
def test_the_optimum_is_that_of_lbfgs(noise: float) -> None:
    s1, s2, losses = [], [], []
    for trace in two_runs(noise=noise):
        x, y = reference.areas((trace.rates / PEAK).tolist(), LAM)
        s1 += [x[s - 1] for s in trace.steps.tolist()]
        s2 += [y[s - 1] for s in trace.steps.tolist()]
        losses += trace.losses.tolist()
    found, value = fit_law(double(s1), double(s2), double(losses), delta=1e-3, anneals=True)
    start = (TRUE["L0"], TRUE["A"] / PEAK ** TRUE["alpha"], TRUE["C"] * PEAK, TRUE["alpha"])
    other = reference.fit(start, s1, s2, losses, 1e-3)
    best = reference.objective(other, s1, s2, losses, 1e-3)
    assert value == pytest.approx(reference.objective(tuple(found.tolist()), s1, s2, losses, 1e-3), rel=1e-9)
    # Either may stop a little above the optimum, which is flat; L-BFGS gives nan where Huber's kinks are met.
    assert math.isnan(best) or value <= best * (1 + 1e-6)
    if not math.isnan(best):
        assert found.tolist() == pytest.approx(list(other), rel=1e-3)


def test_the_decay_can_be_fitted() -> None:
    assert AnnealingLaw.fit(two_runs(), fit_lambda=True, resamples=0).lam == LAM


def test_intervals_hold_what_repeated_measurements_give() -> None:
    wsd = schedule_rates("wsd", LENGTH, PEAK)
    true_end = float(measured(wsd).losses[-1])
    noisy = AnnealingLaw.fit(two_runs(noise=2e-3), lam=LAM)
    wide = noisy.forecast(wsd, level=0.9)
    assert wide.low < true_end < wide.high
    assert wide.low < wide.loss < wide.high
    narrow = noisy.forecast(wsd, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high
    # Two thirds of a normal noise of 0.2 % lie within its size; the fit's own error adds little.
    assert 0.002 < (wide.high - wide.low) / wide.loss < 0.02
    quiet = AnnealingLaw.fit(two_runs(noise=2e-5), lam=LAM).forecast(wsd)
    assert quiet.high - quiet.low < 0.1 * (wide.high - wide.low)


def test_the_law_without_annealing_is_worse_where_runs_anneal(law: AnnealingLaw) -> None:
    """The baseline: the same law fitted to the constant run alone, C = 0."""
    import dataclasses

    constant = AnnealingLaw.fit(two_runs()[0], lam=LAM)
    assert constant.C is None
    wsd = schedule_rates("wsd", LENGTH, PEAK)
    true_end = float(measured(wsd).losses[-1])
    without = float(dataclasses.replace(constant, C=0.0).predict(wsd)[-1])
    assert abs(without - true_end) > 1000 * abs(float(law.predict(wsd)[-1]) - true_end)


def test_json_keeps_the_law(law: AnnealingLaw) -> None:
    again = AnnealingLaw.from_json(json.loads(json.dumps(law.to_json(), allow_nan=False)))
    assert again == law
    with pytest.raises(ValueError, match="law must be an object with the fields"):
        AnnealingLaw.from_json({"L0": 1.0})


def test_compare_ranks_by_the_final_loss(law: AnnealingLaw) -> None:
    schedules = {name: schedule_rates(name, LENGTH, PEAK) for name in ("constant", "wsd", "cosine")}
    found = law.compare(schedules)
    ends = {name: float(measured(rates).losses[-1]) for name, rates in schedules.items()}
    assert list(found) == sorted(ends, key=ends.__getitem__)
    assert list(found)[-1] == "constant"


# Refusals and warnings ----------------------------------------------------------------------------


def test_too_little_is_refused() -> None:
    rates = schedule_rates("cosine", LENGTH, PEAK)
    with pytest.raises(ValueError, match=r"losses must be at least 20 .* got '19 points'"):
        AnnealingLaw.fit(measured(rates, every=104), lam=LAM)
    late = measured(rates, every=20)
    with pytest.raises(ValueError, match="over a factor of at least 4 in the sum of learning rates"):
        AnnealingLaw.fit(late, lam=LAM, fit_from=1000)
    with pytest.raises(ValueError, match="traces must be at least one"):
        AnnealingLaw.fit([])


def test_a_run_without_points_beside_a_good_one_is_named() -> None:
    good = two_runs()[1]
    rates = schedule_rates("constant", LENGTH, PEAK)
    none = LossTrace(rates, torch.tensor([], dtype=torch.int64), double([]))
    still = LossTrace(torch.zeros_like(rates), good.steps, good.losses)  # it has never moved
    early = LossTrace(rates, torch.tensor([3]), double([5.0]), name="early")
    for bad, name in ((none, "run 2 of 2"), (still, "run 2 of 2"), (early, "early")):
        with pytest.raises(ValueError, match=rf"losses must be measured after the warm-up .*\({name}\)$"):
            AnnealingLaw.fit([good, bad], lam=LAM)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_losses_that_are_none_are_refused(bad: float) -> None:
    trace = measured(schedule_rates("cosine", LENGTH, PEAK))
    trace.losses[7] = bad
    with pytest.raises(ValueError, match=r"losses must be finite and above 0.*after update 400"):
        AnnealingLaw.fit(trace)


def test_a_trace_without_its_beginning_is_refused() -> None:
    import dataclasses

    trace = dataclasses.replace(two_runs()[0], first_step=6)
    with pytest.raises(ValueError, match="first_step must be 1: the trace must be of a run that recorded"):
        AnnealingLaw.fit(trace)


def test_steps_without_a_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be in 1 to 3"):
        LossTrace(double([1.0] * 3), torch.tensor([4]), double([1.0]))
    with pytest.raises(ValueError, match="losses must be 1 numbers"):
        LossTrace(double([1.0] * 3), torch.tensor([2]), double([1.0, 2.0]))


def test_annealing_is_refused_where_c_is_unknown() -> None:
    law = AnnealingLaw.fit(two_runs()[0], lam=LAM)
    assert law.predict(schedule_rates("constant", LENGTH, PEAK)).shape == (LENGTH,)
    with pytest.raises(ValueError, match="no fitted run has annealed, so that C is unknown"):
        law.predict(schedule_rates("wsd", LENGTH, PEAK))


def test_a_higher_peak_is_refused(law: AnnealingLaw) -> None:
    law.predict(schedule_rates("cosine", LENGTH, 1.09 * PEAK))
    higher = schedule_rates("cosine", LENGTH, 1.11 * PEAK)
    with pytest.raises(ValueError, match=r"peak learning rate must be at most 0\.00022"):
        law.predict(higher)
    law.predict(higher, allow_peak_change=True)


def test_the_beginning_of_a_run_is_an_extrapolation(law: AnnealingLaw) -> None:
    first = law.forward_range[0] / PEAK
    assert 40 < first <= 50  # of a run whose first loss is measured after 50 updates
    with pytest.warns(UserWarning, match="an extrapolation to the beginning of a run"):
        law.predict(schedule_rates("constant", round(first) - 1, PEAK))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        law.predict(schedule_rates("constant", round(first) + 1, PEAK))


def test_an_extrapolation_warns(law: AnnealingLaw) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        law.predict(schedule_rates("cosine", 10 * LENGTH, PEAK))
    with pytest.warns(UserWarning, match="11 times the fitted one: an extrapolation"):
        law.predict(schedule_rates("constant", 11 * LENGTH, PEAK))


@pytest.mark.parametrize("extra", [100, 700])
def test_zeros_at_the_end(law: AnnealingLaw, extra: int) -> None:
    rates = schedule_rates("linear", 1000, PEAK)
    padded = torch.cat([rates, torch.zeros(extra, dtype=torch.float64)])
    before = float(law.predict(rates)[-1])
    with pytest.warns(UserWarning, match=rf"last {extra} of {1000 + extra} updates .* left out"):
        trimmed = law.predict(padded)
    assert trimmed.shape == padded.shape
    assert float(trimmed[-1]) == before
    with pytest.warns(UserWarning, match="counted as annealing"):
        untrimmed = float(law.predict(padded, trim_zero=False)[-1])
    # After the last rate, m decays from what the fall to 0 has made of it.
    m = LAM * reference.momentum(rates.tolist(), LAM)[-1] + float(rates[-1])
    assert before - untrimmed == pytest.approx((law.C or 0.0) * m * (1 - LAM**extra) / (1 - LAM), rel=1e-9)


def test_a_cosine_keeps_its_last_steps(law: AnnealingLaw) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("cosine", "linear", "wsd", "polynomial"):
            for steps in (150, 777, 20000):
                law.predict(schedule_rates(name, steps, PEAK))


@pytest.mark.parametrize("bad", [[], [1e-4, -1e-4], [1e-4, math.nan], [0.0, 0.0], [[1e-4]]])
def test_what_is_no_schedule_is_refused(bad: Any, law: AnnealingLaw) -> None:
    with pytest.raises(ValueError, match="rates must be"):
        law.predict(bad)


def test_other_settings_warn(law: AnnealingLaw) -> None:
    import dataclasses

    traces = two_runs()
    traces[0] = dataclasses.replace(traces[0], context={"batch_size": 8, "model": "a"})
    traces[1] = dataclasses.replace(traces[1], context={"batch_size": 16, "model": "a"})
    with pytest.warns(UserWarning, match=r"the runs differ in batch_size \(8, 16\)"):
        mixed = AnnealingLaw.fit(traces, lam=LAM, resamples=0)
    rates = schedule_rates("cosine", LENGTH, PEAK)
    with pytest.warns(UserWarning, match=r"fitted with another model \(a, b\)"):
        mixed.predict(rates, context={"model": "b", "batch_size": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        law.predict(rates, context={"model": "b"})


@pytest.mark.parametrize(
    ("setting", "value"), [("lam", 0.8), ("delta", 0.0), ("fit_from", 0), ("resamples", -1)]
)
def test_bad_settings_of_a_fit(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be"):
        AnnealingLaw.fit(two_runs(), **{setting: value})


def test_an_interval_needs_draws_and_a_level(law: AnnealingLaw) -> None:
    rates = schedule_rates("cosine", LENGTH, PEAK)
    with pytest.raises(ValueError, match="level must be in"):
        law.forecast(rates, level=1.0)
    with pytest.raises(ValueError, match="resamples must be above 0 in the fit"):
        AnnealingLaw.fit(two_runs(), lam=LAM, resamples=0).forecast(rates)


# Schedules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "constant_with_warmup", "inverse_sqrt"])
def test_rates_are_those_that_a_trainer_uses(name: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, lr_scheduler_type=name, warmup_steps=3, save_strategy="no")
    trainer.train()
    assert schedule_rates(name, STEPS, 1e-2, warmup_steps=3).tolist() == logged(trainer, "learning_rate")


def test_wsd_is_constant_and_then_a_line() -> None:
    rates = schedule_rates("wsd", 10, 2.0, warmup_steps=2).tolist()
    assert rates == pytest.approx([0, 1, 2, 2, 2, 2, 2, 2, 2, 1])
    half = schedule_rates("wsd", 10, 2.0, num_decay_steps=4, min_lr_ratio=0.5).tolist()
    assert half == pytest.approx([2] * 6 + [2, 1.75, 1.5, 1.25])


def test_phases_fit_in_the_run() -> None:
    assert schedule_rates("wsd", 10, 2.0, warmup_steps=9).tolist()[-2:] == pytest.approx([2 * 8 / 9, 2.0])
    with pytest.raises(ValueError, match=r"num_decay_steps must be in \[0, 8\]"):
        schedule_rates("wsd", 10, 2.0, warmup_steps=2, num_decay_steps=9)
    with pytest.raises(ValueError, match=r"num_decay_steps must be in \[0, 3\]"):
        schedule_rates("warmup_stable_decay", 10, 2.0, warmup_steps=2, num_stable_steps=5, num_decay_steps=4)
    with pytest.raises(ValueError, match="schedule 'linear': unknown field 'power'"):
        schedule_rates("linear", 10, 2.0, power=2.0)
    with pytest.raises(TypeError, match="schedule 'polynomial': lr_end must be float"):
        schedule_rates("polynomial", 10, 2.0, lr_end="low")


@pytest.mark.parametrize("name", ["greedy", "reduce_lr_on_plateau", "cosin"])
def test_unknown_schedules_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"schedule '{name}' is unknown"):
        schedule_rates(name, 10, 1.0)


def test_rates_of_a_curve() -> None:
    curve = InfiniteLRCurve(warmup_steps=2, cooldown_steps=4, anneal_start=6, anneal_steps=2)
    assert curve_rates(curve, 9, 2.0).tolist() == [2.0 * curve(step) for step in range(9)]


def test_a_trace_from_a_log() -> None:
    log = [
        {"step": 1, "loss": 3.0, "learning_rate": 1.0},
        {"step": 3, "loss": 3.0, "learning_rate": 0.5},
        {"step": 4, "eval_loss": 2.5},
        {"step": 0, "eval_loss": 9.0},
    ]
    trace = LossTrace.from_log_history(log)
    assert trace.rates.tolist() == [1.0, 0.75, 0.5, 0.5]
    assert (trace.steps.tolist(), trace.losses.tolist()) == ([4], [2.5])
    assert LossTrace.from_log_history(log, [4.0] * 5).rates.tolist() == [4.0] * 5
    with pytest.raises(ValueError, match="metric must be a number of the log"):
        LossTrace.from_log_history(log, metric="eval_other")
    with pytest.raises(ValueError, match="log_history must be one with learning rates"):
        LossTrace.from_log_history([{"step": 4, "eval_loss": 2.5}])


# The training loss --------------------------------------------------------------------------------


def test_a_smoothed_loss_by_hand() -> None:
    mean = SmoothedLoss(0.5)
    assert mean.add(1, 2, 4.0) == (0.5, 4.0)  # of the weights after 0 and after 1 update
    # Weights 1/3 and 2/3.
    assert mean.add(3, 4, 2.0) == pytest.approx((0.5 / 3 + 2.5 * 2 / 3, 4 / 3 + 4 / 3))
    again = SmoothedLoss(0.5)
    again.restore(mean.sums())
    assert again.add(5, 5, 1.0) == mean.add(5, 5, 1.0)


def test_a_mean_of_an_earlier_version_s_checkpoint() -> None:
    callback = AnnealingLawCallback(target="smoothed_train_loss", smooth=0.5)
    state = {**callback.state_dict(), "mean": {"weight": 0.5, "loss": 2.0, "place": 1.5}}
    callback.load_state_dict(state)
    assert callback._mean.sums().tolist() == [0.5, 2.0, 1.5]


def test_an_optimizer_that_has_no_rate_yet_is_observed(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), lambda _: 1.0)
    trainer = build(tmp_path, AnnealingLawCallback(), model=model, save_strategy="no", max_steps=2)
    trainer.optimizer, trainer.lr_scheduler = optimizer, rates
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_smoothing_does_not_delay_a_line(keep: float) -> None:
    draw, mean, done = random.Random(0), SmoothedLoss(keep), 0
    for _ in range(200):
        count = draw.randint(1, 9)
        losses = [5.0 - 0.01 * i for i in range(done, done + count)]  # of the weights after i updates
        place, loss = mean.add(done + 1, done + count, sum(losses) / count)
        assert loss == pytest.approx(5.0 - 0.01 * place, rel=1e-12)
        done += count


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-3), (0.02, 1e-2)])
def test_a_law_is_found_in_training_losses(noise: float, tolerance: float) -> None:
    """What the target is for: a cosine run's end, from the training losses of a run that anneals late."""
    numbers = {**TRUE, "C": 20.0}
    rates = torch.cat([torch.full((1600,), PEAK).double(), torch.linspace(PEAK, 0.0, 400).double()])
    s1, s2 = reference.areas(rates.tolist(), LAM)
    draw = random.Random(0)
    log: list[dict[str, Any]] = []
    for i in range(4, len(rates), 4):  # one log for each four updates
        losses = [reference.loss(s1[k - 1], s2[k - 1], **numbers) for k in range(max(1, i - 4), i)]
        log.append({"step": i, "loss": sum(losses) / len(losses) * (1.0 + noise * draw.gauss(0.0, 1.0))})
    trace = LossTrace.from_log_history(log, rates, metric="loss", smooth=0.5)
    found = AnnealingLaw.fit(trace, lam=LAM, resamples=0)
    cosine = schedule_rates("cosine", LENGTH, PEAK)
    true_end = float(measured(cosine, C=20.0).losses[-1])
    assert float(found.predict(cosine)[-1]) == pytest.approx(true_end, rel=tolerance)


@pytest.mark.parametrize("bottom", [3.0, 2.9999])
def test_losses_that_do_not_fall_have_no_law(bottom: float) -> None:
    """Only the first loss is higher than the rest: any exponent is too small."""
    rates = torch.full((LENGTH,), PEAK, dtype=torch.float64)
    steps = torch.arange(50, LENGTH + 1, 50)
    losses = torch.linspace(3.0, bottom, len(steps), dtype=torch.float64)
    losses[0] = 3.5
    with pytest.raises(ValueError, match="losses must be falling along a power law with an exponent of at"):
        AnnealingLaw.fit(LossTrace(rates, steps, losses), resamples=0)


def test_a_training_loss_in_a_log_is_smoothed_and_not_repeated() -> None:
    log = [{"step": s, "loss": 4.0 / s, "learning_rate": 1.0, "epoch": s / 4} for s in range(1, 6)]
    with pytest.raises(ValueError, match=r"smooth must be in \(0, 1\) for the training loss"):
        LossTrace.from_log_history(log[:4], metric="loss")
    with pytest.raises(ValueError, match=r"epoch must be at most 1 for the training loss.*step 5"):
        LossTrace.from_log_history(log, metric="loss", smooth=0.5)
    with pytest.raises(ValueError, match="smooth must be 0 for a held-out loss"):
        LossTrace.from_log_history(log, smooth=0.5)
    trace = LossTrace.from_log_history(log[:4], metric="loss", smooth=0.5)
    # Places 0, 2/3, 10/7 and 34/15, of which the first is before any update.
    assert trace.steps.tolist() == [1, 2]
    assert trace.losses.tolist() == pytest.approx(
        [(0.25 * 4 + 0.5 * 2 + 4 / 3) / 1.75, (0.125 * 4 + 0.25 * 2 + 0.5 * 4 / 3 + 1) / 1.875]
    )


def trained(folder: Path, callback: AnnealingLawCallback, **arguments: Any) -> Any:
    """Return a run of sixty steps, one epoch of its data, that logs each step and evaluates nothing."""
    settings = {"max_steps": 60, "save_steps": 30, "learning_rate": 1e-3, "per_device_train_batch_size": 1}
    return build(folder, callback, **{**settings, **arguments})


def test_a_run_without_evaluations_is_forecast(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target": "smoothed_train_loss", "smooth": 0.8, "stride": 2}
    callback = AnnealingLawCallback(**settings, lam=0.99, resamples=2)
    trainer = trained(tmp_path / "whole", callback)
    trainer.train()
    trace = recorded_trace(tmp_path / "whole")
    # A plain loop over the log, in which the mean is made anew from all of its losses.
    losses, expected = logged(trainer, "loss"), {}
    for count in range(2, 61, 2):
        weights = [0.8 ** (count - 1 - i) for i in range(count)]
        place = sum(w * i for i, w in enumerate(weights)) / sum(weights)
        if round(place) >= 1:
            expected[round(place)] = sum(w * x for w, x in zip(weights, losses, strict=False)) / sum(weights)
    assert dict(zip(trace.steps.tolist(), trace.losses.tolist(), strict=True)) == pytest.approx(expected)
    assert trace.context["loss"] == "smoothed_train_loss"
    assert callback.law == AnnealingLaw.fit(trace, lam=0.99, resamples=2)
    assert trainer.state.log_history[-2]["annealing_law/final_loss"] > 0.0
    # Resumed, one trace to the bit.
    resumed = trained(tmp_path / "cut", AnnealingLawCallback(**settings, lam=0.99, resamples=2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-30"))
    for name in ("annealing_law.json", "annealing_law_trace.json", "annealing_law_trace.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert recorded_trace(tmp_path / "whole" / "checkpoint-30").rates.tolist() == trace.rates[:30].tolist()


def test_means_stand_apart_by_the_stride(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target": "smoothed_train_loss", "smooth": 0.2, "resamples": 1}
    callback = AnnealingLawCallback(**settings, stride=7)
    with pytest.warns(UserWarning, match="losses must be at least 20"):
        trained(tmp_path, callback, logging_steps=2).train()
    steps = recorded_trace(tmp_path).steps.tolist()
    # Kept after 8, 16, ... updates: the last log stands for 1.5 updates less, the mean for a quarter of a log
    # less than that.
    assert steps == [6, 14, 22, 30, 38, 46, 54]


def test_the_training_loss_of_repeated_data_is_refused(tmp_path: Path) -> None:
    callback = AnnealingLawCallback(target="smoothed_train_loss", smooth=0.9)
    with pytest.raises(ValueError, match=r"target must be 'eval_loss' where data are repeated.*2 epochs"):
        trained(tmp_path, callback, max_steps=65).train()
    # Of a stream nobody knows the length; its second pass is left out.
    stream = AnnealingLawCallback(target="smoothed_train_loss", smooth=0.1, stride=1, resamples=1)
    data: Any = rows().select(range(30)).to_iterable_dataset()
    trained(tmp_path, stream, data=data, max_steps=40).train()
    assert stream.trace().steps.tolist() == list(range(1, 30))


# In a run -----------------------------------------------------------------------------------------


def evaluated(folder: Path, callback: AnnealingLawCallback, **arguments: Any) -> Any:
    """Return a run of sixty steps with an evaluation after each second one."""
    settings = {
        "max_steps": 60,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 30,
        "learning_rate": 1e-3,
    }
    return build(folder, callback, **{**settings, **arguments})


def test_a_run_is_recorded_and_forecast(tmp_path: Path) -> None:
    callback = AnnealingLawCallback(lam=0.99, resamples=20)
    trainer = evaluated(tmp_path, callback, lr_scheduler_type="cosine", warmup_steps=4)
    trainer.train()
    trace = recorded_trace(tmp_path)
    assert trace.rates.tolist() == logged(trainer, "learning_rate")
    assert trace.rates.tolist() == schedule_rates("cosine", 60, 1e-3, warmup_steps=4).tolist()
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert trace.steps.tolist() == [e["step"] for e in evaluations]
    assert trace.losses.tolist() == [e["eval_loss"] for e in evaluations]
    assert trace.warmup == 4
    assert trace.context["batch_size"] == 2

    law = AnnealingLaw.from_json(json.loads((tmp_path / "annealing_law.json").read_text()))
    assert law == callback.law
    assert law == AnnealingLaw.fit(trace, lam=0.99, resamples=20)
    training = [e for e in trainer.state.log_history if "loss" in e]
    first = next(e["step"] for e in training if "annealing_law/final_loss" in e)
    assert 2 * 20 + 4 <= first <= 52  # twenty points after the warm-up and 2 %
    last = training[-1]
    assert last["annealing_law/final_loss_low"] < last["annealing_law/final_loss_high"]
    x, y = areas(torch.cat([trace.rates[4:5].expand(4), trace.rates[4:]]), 0.99)
    assert last["annealing_law/forward_area"] == pytest.approx(float(x[-1]), rel=1e-12)
    assert last["annealing_law/annealing_area"] == pytest.approx(float(y[-1]), rel=1e-9)
    # Of the run that was made: its own last loss is among the points that were fitted.
    assert callback.forecast is not None
    assert callback.forecast.loss == pytest.approx(trace.losses[-1].item(), rel=0.02)


def test_the_forecast_is_of_the_schedule_to_come(tmp_path: Path) -> None:
    seen: dict[int, list[float]] = {}
    callback = AnnealingLawCallback(lam=0.99, resamples=1, fit_from=1)
    coming = callback._coming
    callback._coming = lambda left: seen.setdefault(60 - left, coming(left))  # type: ignore[method-assign]
    schedule = InfiniteLRCallback(warmup_steps=4, cooldown_steps=8, anneal_start=40)
    trainer = evaluated(tmp_path, callback)
    hf_ext.attach(trainer, schedule)
    trainer.train()
    assert len(seen) >= 5
    assert all(rates == pytest.approx(logged(trainer, "learning_rate")) for rates in seen.values())


def test_the_forecast_changes_no_bit(tmp_path: Path) -> None:
    plain = build(tmp_path / "plain", max_steps=60, learning_rate=1e-3, save_strategy="no")
    plain.train()
    with_it = evaluated(tmp_path / "with", AnnealingLawCallback(lam=0.99, resamples=5))
    with_it.train()
    assert equal(parameters(with_it), parameters(plain))


def test_a_resumed_run_has_one_trace(tmp_path: Path) -> None:
    whole, cut, resumed = (AnnealingLawCallback(lam=0.99, resamples=5) for _ in range(3))
    evaluated(tmp_path / "whole", whole).train()
    trainer = evaluated(tmp_path / "cut", cut)
    trainer.add_callback(StopAt(41))
    with pytest.raises(InterruptedError):
        trainer.train()
    assert not (tmp_path / "cut" / "annealing_law.json").exists()
    evaluated(tmp_path / "cut", resumed).train(resume_from_checkpoint=True)
    for name in ("annealing_law.json", "annealing_law_trace.json", "annealing_law_trace.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    at_checkpoint = recorded_trace(tmp_path / "cut" / "checkpoint-30")
    assert at_checkpoint.rates.tolist() == recorded_trace(tmp_path / "whole").rates[:30].tolist()
    assert at_checkpoint.steps.tolist() == list(range(2, 31, 2))


def test_first_added_on_resume_it_says_that_the_beginning_is_missing(tmp_path: Path) -> None:
    build(tmp_path / "plain").train()
    late = AnnealingLawCallback()
    trainer = build(tmp_path / "late", late, eval_strategy="steps", eval_steps=1)
    with pytest.warns(UserWarning, match="ended without a fit: first_step must be 1"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / f"checkpoint-{MIDDLE}"))
    assert len(late.trace().rates) == STEPS - MIDDLE


@pytest.mark.parametrize(
    ("settings", "arguments", "text"),
    [
        ({}, {}, "no evaluation of this run reported 'eval_loss'"),
        ({"metric": "eval_x"}, {"eval_strategy": "steps", "eval_steps": 2}, "reported 'eval_x'"),
        ({}, {"eval_strategy": "steps", "eval_steps": 2}, "losses must be at least 20"),
    ],
)
def test_a_run_without_a_fit_says_why(settings: Any, arguments: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "annealing_law.json").write_text("{}")  # of an earlier run in the folder
    with pytest.warns(UserWarning, match=text):
        build(tmp_path, AnnealingLawCallback(**settings), **arguments).train()
    assert not (tmp_path / "annealing_law.json").exists()
    assert len(recorded_trace(tmp_path).rates) == STEPS


def test_losses_that_are_none_do_not_end_a_run(tmp_path: Path) -> None:
    callback = AnnealingLawCallback()
    trainer = evaluated(tmp_path, callback)
    trainer.compute_loss_func = lambda outputs, labels, **_: (
        outputs.logits.mean() * (1.0 if trainer.model.training else math.nan)
    )
    with pytest.warns(UserWarning, match="losses must be finite"):
        trainer.train()
    assert math.isnan(recorded_trace(tmp_path).losses[-1])
    _, tensors = load_state(tmp_path / "checkpoint-60", "hf_ext_annealing_law")
    assert math.isnan(tensors["losses"][-1])


def test_training_losses_that_are_none_do_not_end_a_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target": "smoothed_train_loss", "smooth": 0.8, "stride": 1, "resamples": 1}

    def run(folder: str, **resume: Any) -> LossTrace:
        trainer = trained(tmp_path / folder, AnnealingLawCallback(**settings), logging_nan_inf_filter=False)
        trainer.compute_loss_func = lambda outputs, labels, **_: (
            outputs.logits.mean() * (math.inf if trainer.state.global_step == 20 else 1.0)
        )
        with pytest.warns(UserWarning, match="losses must be finite and above 0"):
            trainer.train(**resume)
        return recorded_trace(tmp_path / folder)

    whole = run("whole")
    assert len(whole.rates) == 60
    assert whole.losses.isfinite().tolist()[:10] == [True] * 10
    assert not whole.losses[-1].isfinite()
    resumed = run("cut", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-30"))
    assert torch.equal(resumed.losses.nan_to_num(-1.0), whole.losses.nan_to_num(-1.0))


def test_skipped_updates_are_not_recorded() -> None:
    callback = AnnealingLawCallback()
    group = [{"lr": torch.tensor(0.5)}]
    optimizer = SimpleNamespace(param_groups=group, step_was_skipped=True)
    for skipped in (True, False, True):
        optimizer.step_was_skipped = skipped
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)  # type: ignore[arg-type]
    assert callback.trace().rates.tolist() == [0.5]


class OwnConfig(trl.SFTConfig):
    """Settings of a user's own trainer."""


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        (Seq2SeqTrainingArguments, False),
        (trl.SFTConfig, False),
        (OwnConfig, False),
        (trl.DPOConfig, True),
        (trl.GRPOConfig, True),
        (trl.RewardConfig, True),
        (trl.DistillationConfig, True),
        ("trl.experimental.tpo.TPOConfig", True),
        ("hf_ext.trainers.unlearning.UnlearningConfig", True),
        ("hf_ext.trainers.aligndistil.AlignDistilConfig", True),
    ],
)
def test_only_losses_of_language_modelling_have_a_law(kind: Any, refused: bool, tmp_path: Path) -> None:
    if isinstance(kind, str):
        module, _, name = kind.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
    # Without what its trainer would ask for: the class alone is looked at.
    arguments = kind.__new__(kind)
    vars(arguments).update(vars(TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)))
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(arguments, TrainerState(), TrainerControl(), model, optimizer, None)
    if not refused:
        AnnealingLawCallback().begin(run)
        return
    text = f"training arguments must be .*SFTConfig, or a class of your own of one of them.*'{kind.__name__}'"
    with pytest.raises(ValueError, match=text):
        AnnealingLawCallback().begin(run)


def test_the_batch_size_is_that_which_the_trainer_has_found(tmp_path: Path) -> None:
    class OutOfMemory(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            if state.train_batch_size == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    law = AnnealingLawCallback()
    settings: dict[str, Any] = {
        "auto_find_batch_size": True,
        "gradient_accumulation_steps": 3,
        "max_steps": 2,
    }
    with pytest.warns(UserWarning, match="ended without a fit"):
        build(tmp_path, law, others=[OutOfMemory()], save_strategy="no", **settings).train()
    assert recorded_trace(tmp_path).context["batch_size"] == 3
    assert len(law.trace().rates) == 2


def test_a_run_that_continues_another_s_weights_has_no_fit(tmp_path: Path) -> None:
    first = InfiniteLRCallback(warmup_steps=1, cooldown_steps=2, anneal_start=5)
    build(tmp_path / "first", first).train()
    branch = str(tmp_path / "first" / "infinite_branch")
    law = AnnealingLawCallback(lam=0.99, resamples=1, fit_from=1)
    later = InfiniteLRCallback(warmup_steps=1, cooldown_steps=2, continue_from=branch)
    settings: dict[str, Any] = {"max_steps": 30, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.warns(UserWarning, match=r"first_step must be 1: .*, got 6"):
        build(tmp_path / "later", later, law, save_strategy="no", **settings).train()
    assert len(law.trace().losses) == 30
    assert law.law is None


# Files --------------------------------------------------------------------------------------------


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no trace of a run"):
        recorded_trace(tmp_path)
    save_state(tmp_path, "annealing_law_trace", {"first_step": 1}, {"rates": torch.ones(3)})
    with pytest.raises(ValueError, match="does not hold a trace"):
        recorded_trace(tmp_path)
    (tmp_path / "annealing_law_trace.json").write_text('{"scalars"')
    with pytest.raises(ValueError, match="is not a JSON file"):
        recorded_trace(tmp_path)
