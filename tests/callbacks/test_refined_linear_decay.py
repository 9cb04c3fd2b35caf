"""Linear decay and its refinement: the paper's numbers, the recording before clipping, a second run."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

import hf_ext
from hf_ext.callbacks import (
    LinearDecayCurve,
    RefinedLinearDecayCallback,
    TableCurve,
    median_filter,
    polynomial_decay,
    recorded_norms,
    refined_schedule,
    schedule_rates,
)
from hf_ext.callbacks._recorded_norms import family, norm_for, same_family
from hf_ext.callbacks.refined_linear_decay import resampled
from hf_ext.core.state import load_state, save_state
from hf_ext.training.refine import refine_run
from tests.callbacks.runs import build, equal, logged, parameters, rows, tiny_model
from tests.reference.refined_linear_decay import median_filtered, schedule

G = [4.0, 2.0, 1.0, 1.0, 2.0]


def refined(norms: Any, **settings: Any) -> list[float]:
    return refined_schedule(norms, **{"norm": "l2", "drop_zero": False, **settings}).tolist()


# The schedule -------------------------------------------------------------------------------------


def test_constant_norms_give_linear_decay() -> None:
    assert refined([3.0] * 5, normalize=False) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert refined([3.0] * 5) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert refined([3.0] * 5, drop_zero=True) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_the_hand_computed_case() -> None:
    assert refined(G, norm="l2") == pytest.approx([0.125, 0.45, 1.0, 0.2, 0.0])
    assert refined(G, norm="l1") == pytest.approx([0.5, 5 / 6, 1.0, 1 / 3, 0.0])


def test_the_median_filter_takes_spikes_out() -> None:
    norms = torch.tensor([9.0, 8, 1, 7, 6, 5, 20, 4, 3, 2])
    assert median_filter(norms, 0.3).tolist() == [9, 8, 7, 6, 6, 6, 5, 4, 3, 3]


def test_the_median_filter_goes_through_a_long_run_in_pieces() -> None:
    draw = random.Random(0)
    norms = [draw.random() for _ in range(2500)]
    assert median_filter(torch.tensor(norms, dtype=torch.float64), 0.004).tolist() == median_filtered(
        norms, 0.004
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_equals_the_reference(seed: int, norm: str) -> None:
    draw = random.Random(seed)
    count, tau, drop = draw.randint(8, 70), draw.uniform(0.02, 0.5), draw.random() < 0.5
    norms = [draw.lognormvariate(0.0, 1.5) for _ in range(count)]
    assert median_filter(torch.tensor(norms, dtype=torch.float64), tau).tolist() == median_filtered(
        norms, tau
    )
    expected = schedule(norms, norm=norm, tau=tau, drop_zero=drop)
    # Sums of up to 71 doubles in another order.
    assert refined(norms, norm=norm, tau=tau, drop_zero=drop) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("scale", [1e-30, 0.3, 1e30])
def test_only_ratios_of_norms_matter(norm: str, scale: float) -> None:
    assert refined([scale * g for g in G], norm=norm) == pytest.approx(refined(G, norm=norm), rel=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_rates_over_weights_do_not_rise(norm: str) -> None:
    draw = random.Random(3)
    norms = [draw.lognormvariate(0.0, 1.0) for _ in range(40)]
    smooth = median_filter(torch.tensor(norms, dtype=torch.float64), 0.1).tolist()
    rates = refined(norms, norm=norm, normalize=False)
    ratio = [rate * g ** (1 if norm == "l1" else 2) for rate, g in zip(rates, smooth, strict=True)]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(ratio))
    assert rates[-1] == 0.0


def test_falling_norms_bring_a_warmup() -> None:
    norms = [4.0 ** (1 - min(1.0, t / 50)) for t in range(100)]
    for norm in ("l1", "l2"):
        rates = refined(norms, norm=norm)
        assert 10 < rates.index(max(rates)) < 60


def test_floor_and_extremes() -> None:
    assert min(refined(G, floor=0.3)) == 0.3
    extreme = refined([1e-200, 1e200, 1.0, 1.0, 1.0], norm="l2")
    assert all(math.isfinite(rate) for rate in extreme)


def test_a_few_missing_norms_are_interpolated() -> None:
    norms = [float(1 + t) for t in range(40)]
    broken = [*norms]
    broken[7] = math.nan
    assert refined(broken) == pytest.approx(refined(norms), rel=1e-12)
    broken[0] = math.inf
    assert all(math.isfinite(rate) for rate in refined(broken))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_many_missing_norms_are_refused(bad: float) -> None:
    with pytest.raises(
        ValueError, match=r"norms must be positive and finite but for 5% of them, got '3 of 40"
    ):
        refined([bad] * 3 + [1.0] * 37)


@pytest.mark.parametrize("norms", [[], [1.0], [[1.0, 2.0]]])
def test_what_is_no_series_is_refused(norms: Any) -> None:
    with pytest.raises(ValueError, match="norms must be a series"):
        refined(norms)


# Curves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 3])
def test_linear_decay_is_that_of_transformers(warmup: int) -> None:
    from transformers import get_linear_schedule_with_warmup

    optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3) for _ in range(2)]
    curve = LinearDecayCurve(total_steps=10, warmup_steps=warmup)
    schedulers = [curve.scheduler(optimizers[0]), get_linear_schedule_with_warmup(optimizers[1], warmup, 10)]
    for _ in range(12):
        assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()


def test_linear_decay_to_zero_and_to_a_floor() -> None:
    assert [LinearDecayCurve(total_steps=5, drop_zero=False)(s) for s in range(6)] == [
        1,
        0.75,
        0.5,
        0.25,
        0,
        0,
    ]
    assert LinearDecayCurve(total_steps=5, floor=0.3)(4) == 0.3


def test_a_table_between_and_beyond_its_points() -> None:
    curve = TableCurve(factors=torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    assert [curve.factor(t) for t in (0.0, 0.5, 1.0, 1.5, 2.0, 9.0)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    curve.set_pace(1, 0.5)
    assert [curve(s) for s in range(1, 4)] == [0.5, 0.25, 0.0]


def test_resumes_in_a_bare_loop(tmp_path: Path) -> None:
    factors = refined_schedule([4.0, 3, 2, 2, 1, 1, 1, 2, 1, 1], norm="l1")

    def start(curve: TableCurve) -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, curve.scheduler(optimizer)

    optimizer, scheduler = start(TableCurve(factors=factors))
    seen = []
    for step in range(10):
        if step == 4:
            torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == [0.1 * rate for rate in factors.tolist()]
    # Neither the norms nor the table are given again: the scheduler's state holds it.
    optimizer, scheduler = start(TableCurve())
    for part, state in zip(
        (optimizer, scheduler), torch.load(tmp_path / "state.pt", weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    for step in range(4, 10):
        assert optimizer.param_groups[0]["lr"] == seen[step]
        optimizer.step()
        scheduler.step()


# Recording ----------------------------------------------------------------------------------------


def true_norms(folder: Path, limit: float, accumulation: int = 1) -> tuple[list[float], list[float]]:
    """Return l1 and l2 norms of every update, taken from gradients before `clip_grad_norm_` by hand."""
    from transformers import Trainer

    class Watching(Trainer):
        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            grads = [p.grad.double() for p in model.parameters()]
            scale = 1.0 if grad_norm is None else min(1.0, limit / (float(grad_norm) + 1e-6))
            l1.append(sum(float(g.abs().sum()) for g in grads) / scale)
            l2.append(math.sqrt(sum(float(g.square().sum()) for g in grads)) / scale)
            return super()._get_grad_norm(model, grad_norm=grad_norm)

    l1: list[float] = []
    l2: list[float] = []
    trainer: Any = build(
        folder, save_strategy="no", max_grad_norm=limit, gradient_accumulation_steps=accumulation
    )
    trainer.__class__ = type("Watching", (Watching, type(trainer)), {})
    trainer.train()
    return l1, l2


@pytest.mark.parametrize(("limit", "attach"), [(0.0, False), (0.0, True), (0.3, True), (50.0, True)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_norms_are_those_before_clipping(
    limit: float, attach: bool, accumulation: int, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"max_grad_norm": limit, "gradient_accumulation_steps": accumulation}
    trainer = build(tmp_path, RefinedLinearDecayCallback(), attach=attach, **arguments)
    trainer.train()
    norms, (l1, l2) = recorded_norms(tmp_path), true_norms(tmp_path / "by hand", limit, accumulation)
    assert norms.step.tolist() == list(range(1, 11))
    # Clipped and divided back in single precision.
    assert norms.l1.tolist() == pytest.approx(l1, rel=1e-5)
    assert norms.l2.tolist() == pytest.approx(l2, rel=1e-5)
    assert norms.l2.tolist() == pytest.approx(logged(trainer, "grad_norm"), rel=1e-6)
    assert norms.optimizer == "AdamW"
    assert logged(trainer, "refined_linear_decay/l1") == norms.l1.tolist()


def test_a_resumed_recording_is_that_of_one_run(tmp_path: Path) -> None:
    build(tmp_path / "whole", RefinedLinearDecayCallback()).train()
    resumed = build(tmp_path / "resumed", RefinedLinearDecayCallback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    one, two = recorded_norms(tmp_path / "whole"), recorded_norms(tmp_path / "resumed")
    assert torch.equal(one.l1, two.l1)
    assert torch.equal(one.l2, two.l2)


def test_recording_changes_no_bit(tmp_path: Path) -> None:
    ends = []
    for record in (True, False):
        trainer = build(
            tmp_path, RefinedLinearDecayCallback(record=record), max_grad_norm=0.3, save_strategy="no"
        )
        trainer.train()
        ends.append(parameters(trainer))
    assert equal(*ends)


def test_without_recording_nothing_is_written(tmp_path: Path) -> None:
    build(tmp_path, RefinedLinearDecayCallback(record=False), attach=False).train()
    assert not list(tmp_path.glob("gradient_norms*"))


def test_skipped_updates_are_left_out(tmp_path: Path) -> None:
    callback = RefinedLinearDecayCallback()
    trainer = build(tmp_path, callback, max_grad_norm=0.0)
    state, control = trainer.state, trainer.control
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([3.0, -4.0])

    class Model:
        def parameters(self) -> list[nn.Parameter]:
            return [parameter]

    class Optimizer:
        step_was_skipped = True

    callback._scheduler = type("Scheduler", (), {"last_epoch": 0})()  # pyright: ignore[reportAttributeAccessIssue]
    for skipped in (True, False):
        Optimizer.step_was_skipped = skipped
        callback.on_pre_optimizer_step(trainer.args, state, control, model=Model())
        callback.on_optimizer_step(trainer.args, state, control, optimizer=Optimizer())
    norms = callback.recorded()
    assert (norms.step.tolist(), norms.l1.tolist(), norms.l2.tolist()) == ([1], [7.0], [5.0])


# A second run -------------------------------------------------------------------------------------


class EndAt(TrainerCallback):
    """End a run in good order after a step, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("hf_ext.training.refine.find_spec", lambda _: None)  # no plots
    build(tmp_path / "first", RefinedLinearDecayCallback()).train()
    return tmp_path / "first"


@pytest.mark.parametrize(("optimizer", "norm"), [("adamw_torch", "l1"), ("sgd", "l2")])
def test_a_second_run_follows_the_refined_schedule(optimizer: str, norm: str, tmp_path: Path) -> None:
    build(tmp_path / "first", RefinedLinearDecayCallback(), optim=optimizer).train()
    run = str(tmp_path / "first")
    second = build(
        tmp_path / "second", RefinedLinearDecayCallback(mode="refined", norms=run), optim=optimizer
    )
    second.train()
    factors = refined_schedule(recorded_norms(run).of(norm), norm=norm)
    assert logged(second, "learning_rate") == [1e-2 * rate for rate in factors.tolist()]
    given = recorded_norms(run).of(norm).tolist()
    listed = build(
        tmp_path / "listed", RefinedLinearDecayCallback(mode="refined", norms=given), optim=optimizer
    )
    listed.train()
    assert equal(parameters(listed), parameters(second))


def test_resuming_needs_no_norms(first: Path, tmp_path: Path) -> None:
    callback = RefinedLinearDecayCallback(mode="refined", norms=str(first))
    settings = callback.settings()
    second = build(tmp_path / "second", callback)
    second.train()
    for path in first.glob("gradient_norms*"):
        path.unlink()
    settings["norms"] = str(tmp_path / "moved")  # where nothing is
    resumed = build(tmp_path / "resumed", RefinedLinearDecayCallback(**settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-5"))
    assert equal(parameters(resumed), parameters(second))


def test_another_length_resamples_the_curve(first: Path, tmp_path: Path) -> None:
    callback = RefinedLinearDecayCallback(mode="refined", norms=str(first), drop_zero=False, record=False)
    second = build(tmp_path / "second", callback, max_steps=19, save_strategy="no")
    second.train()
    short = refined(recorded_norms(first).l1, norm="l1")
    rates = [rate / 1e-2 for rate in logged(second, "learning_rate")]
    assert rates[::2] == pytest.approx(short, rel=1e-9, abs=1e-12)
    assert rates[1] == pytest.approx((short[0] + short[1]) / 2)
    with pytest.warns(UserWarning, match="the curve is stretched"):
        build(
            tmp_path / "third", type(callback)(**callback.settings()), max_steps=2, save_strategy="no"
        ).train()


@pytest.mark.parametrize("count", [3, 7, 10, 19, 40])
def test_constant_norms_give_linear_decay_at_any_length(count: int) -> None:
    """The rate of 0 that `drop_zero` leaves out is after the last update, however many there are."""
    factors = refined_schedule([3.0] * 10, norm="l2")
    expected = [1.0 - step / count for step in range(count)]
    assert resampled(factors, count, drop_zero=True).tolist() == pytest.approx(expected)
    ends = refined_schedule([3.0] * 10, norm="l2", drop_zero=False)
    expected = [1.0 - step / (count - 1) for step in range(count)]
    assert resampled(ends, count, drop_zero=False).tolist() == pytest.approx(expected)


def test_a_list_with_missing_norms(tmp_path: Path) -> None:
    given: list[float | None] = [2.0 + math.cos(step) for step in range(40)]
    given[3], given[7] = math.nan, None
    callback = RefinedLinearDecayCallback(mode="refined", norms=given)
    second = build(tmp_path / "second", callback)
    second.train()
    settings = load_state(tmp_path / "second" / "checkpoint-5", "hf_ext_refined_linear_decay")[0]["settings"]
    assert settings == callback.settings()
    assert (settings["norms"][3], settings["norms"][7], settings["norms"][8]) == (None, None, given[8])
    repaired = refined_schedule([math.nan if norm is None else norm for norm in given], norm="l1")
    expected = resampled(repaired, 10, drop_zero=True)
    assert logged(second, "refined_linear_decay/factor") == expected.tolist()
    resumed = build(tmp_path / "resumed", RefinedLinearDecayCallback(**settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-5"))
    assert equal(parameters(resumed), parameters(second))
    for other in ([1.0] * 40, str(tmp_path)):
        trainer = build(tmp_path / "other", RefinedLinearDecayCallback(mode="refined", norms=other))
        with pytest.raises(ValueError, match="norms must be those of the checkpoint"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-5"))
    with pytest.raises(ValueError, match="norms must be positive and finite but for 5% of them"):
        RefinedLinearDecayCallback(mode="refined", norms=[*given[:4], None, *given[5:]])


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        ("l1", "AdamW Adamax PagedAdamW8bit AdEMAMix AdEMAMix8bit Adafactor GaLoreAdafactor Lion PagedLion"),
        ("l1", "RMSprop8bit Adagrad LAMB PytorchLAMB AdaLomo Adadelta RAdamScheduleFree Rprop SignSGD"),
        ("l2", "SGD SGD8bit SGDScheduleFree ASGD LARS Lomo"),
    ],
)
def test_optimizers_have_the_norm_of_their_family(norm: str, names: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {name: norm_for(name) for name in names.split()} == dict.fromkeys(names.split(), norm)


def test_every_optimizer_of_the_trainer_has_a_family() -> None:
    found = {str(name.value): family(str(name.value)) for name in OptimizerNames}
    assert {name for name, norm in found.items() if norm != "l1"} == {"sgd", "lomo", "schedule_free_sgd"}
    assert None not in found.values()


def test_an_unknown_optimizer_is_not_guessed_without_a_word() -> None:
    with pytest.warns(UserWarning, match=r"does not know the optimizer Muon and takes l2.* give norm='l1'"):
        assert norm_for("Muon") == "l2"
    assert same_family("Muon", "Muon")
    assert not same_family("Muon", "SGD")
    assert not same_family("Muon", "Shampoo")


def test_norms_of_another_optimizer_family_are_refused(first: Path, tmp_path: Path) -> None:
    trainer = build(tmp_path, RefinedLinearDecayCallback(mode="refined", norms=str(first)), optim="sgd")
    with pytest.raises(
        ValueError, match=r"norms must be of a run with an optimizer of the same family as SGD"
    ):
        trainer.train()


def test_a_run_without_norms_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path / "b", RefinedLinearDecayCallback(mode="refined", norms=str(tmp_path)))
    with pytest.raises(ValueError, match=r"norms: .* holds no recorded gradient norms"):
        trainer.train()


def test_a_short_or_late_recording_is_refused(first: Path, tmp_path: Path) -> None:
    scalars, tensors = load_state(first, "gradient_norms")
    save_state(first, "gradient_norms", scalars, {name: value[:5] for name, value in tensors.items()})
    callback = RefinedLinearDecayCallback(mode="refined", norms=str(first))
    with pytest.raises(ValueError, match="norms must be of at least 8 updates"):
        build(tmp_path / "b", callback).train()
    save_state(first, "gradient_norms", scalars, {name: value[3:] for name, value in tensors.items()})
    with pytest.raises(ValueError, match="norms must be of a run that recorded from its first update"):
        recorded_norms(first)
    save_state(first, "gradient_norms", scalars, {"step": tensors["step"]})
    with pytest.raises(ValueError, match="equally long step, l1 and l2"):
        recorded_norms(first)


def test_a_recording_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    """Ended after 12 of 40 updates; refined as it is, the curve of a third of the run would be stretched."""
    stopped = build(tmp_path / "first", RefinedLinearDecayCallback(), max_steps=40, others=[EndAt(12)])
    stopped.train()
    assert len(recorded_norms(tmp_path / "first").step) == 12
    callback = RefinedLinearDecayCallback(mode="refined", norms=str(tmp_path / "first"))
    text = r"norms must be of a run that has come to its end .*allow-partial.* the norms of 12 of 40"
    for refused in (callback.check_files, build(tmp_path / "second", callback).train):
        with pytest.raises(ValueError, match=text):
            refused()


def test_a_recording_is_not_replaced_by_the_run_that_is_made_from_it(first: Path) -> None:
    before = recorded_norms(first).l1
    same = RefinedLinearDecayCallback(mode="refined", norms=str(first / ".." / first.name))
    with pytest.raises(ValueError, match=r"record must be False, or output_dir another folder"):
        build(first, same).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(first, type(same)(**{**same.settings(), "record": False}), save_strategy="no").train()
    assert torch.equal(recorded_norms(first).l1, before)


def test_norms_of_an_earlier_run_are_pointed_out(first: Path) -> None:
    with pytest.warns(UserWarning, match=r"gradient_norms.json holds gradient norms of an earlier run"):
        build(first, RefinedLinearDecayCallback(record=False), save_strategy="no").train()


# What the command has written ---------------------------------------------------------------------


def test_what_the_command_has_written_is_followed(first: Path, tmp_path: Path) -> None:
    refine_run(first, norm="l2", tau=0.3, drop_zero=False)
    saved = first / "refined_schedule.json"
    with pytest.raises(
        ValueError, match=r"was made with norm='l2' \(not 'l1'\), tau=0.3 \(not 0.1\), drop_zero=F"
    ):
        build(tmp_path / "no", RefinedLinearDecayCallback(mode="refined", norms=str(first))).train()
    callback = RefinedLinearDecayCallback(mode="refined", norms=str(saved), record=False)
    second = build(tmp_path / "second", callback, max_steps=19, attach=False)
    second.train()
    factors = refined(recorded_norms(first).l2, norm="l2", tau=0.3)
    rates = [rate / 1e-2 for rate in logged(second, "learning_rate")]
    assert rates[::2] == pytest.approx(factors, rel=1e-9, abs=1e-12)  # it ends with a rate of 0, as the file
    saved.unlink()
    resumed = build(tmp_path / "resumed", type(callback)(**callback.settings()), max_steps=37, attach=False)
    with pytest.warns(UserWarning, match="max_steps is 37, and 19 in the checkpoint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-15"))
    late = logged(resumed, "learning_rate")[16::2]
    assert late == pytest.approx(logged(second, "learning_rate")[8:], rel=1e-9, abs=1e-12)


def test_settings_that_contradict_the_file_are_refused(first: Path, tmp_path: Path) -> None:
    refine_run(first, tau=0.3)
    settings: dict[str, Any] = {"mode": "refined", "norms": str(first / "refined_schedule.json")}
    RefinedLinearDecayCallback(**settings, norm="l1", tau=0.3).check_files()
    others: list[dict[str, Any]] = [{"norm": "l2"}, {"tau": 0.2}, {"drop_zero": False}]
    for other in others:
        with pytest.raises(ValueError, match=f"^{next(iter(other))} must be .*, as in the file, or left out"):
            RefinedLinearDecayCallback(**settings, **other).check_files()
    with pytest.raises(ValueError, match="of the same family as SGD"):
        build(tmp_path / "b", RefinedLinearDecayCallback(**settings), optim="sgd").train()
    # The same settings, but of other norms: the run in the folder was made again.
    scalars, tensors = load_state(first, "gradient_norms")
    save_state(first, "gradient_norms", scalars, {**tensors, "l1": tensors["l1"].flip(0)})
    with pytest.raises(ValueError, match="is not of the norms that its folder holds now"):
        RefinedLinearDecayCallback(mode="refined", norms=str(first), tau=0.3).check_files()


def test_a_file_that_is_no_schedule_is_refused(first: Path) -> None:
    refine_run(first)
    path = first / "refined_schedule.json"
    good, short = json.loads(path.read_text()), {"factors": [1.0]}
    for change in (short, {"factors": ["x"] * 9}, {"norm": "l3"}, {"tau": None}, {"optimizer": 3}):
        path.write_text(json.dumps({**good, **change}))
        for norms in (first, path):
            with pytest.raises(ValueError, match="norms must be a file of hf-ext schedule refine"):
                RefinedLinearDecayCallback(mode="refined", norms=str(norms)).check_files()
    path.write_text("[")
    with pytest.raises(ValueError, match="is not a JSON file"):
        RefinedLinearDecayCallback(mode="refined", norms=str(path)).check_files()
    path.unlink()
    with pytest.raises(ValueError, match="there is no refined schedule"):
        RefinedLinearDecayCallback(mode="refined", norms=str(path)).check_files()


def test_a_warmup_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^warmup_steps must be in \[0, the run's 10 steps\)"):
        build(tmp_path, RefinedLinearDecayCallback(warmup_steps=10)).train()


def test_recording_in_the_sft_trainer_sees_the_whole_batch(tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        arguments = SFTConfig(
            str(tmp_path),
            max_steps=3,
            save_strategy="no",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(Path(hf_ext.__file__).parent / "assets" / "tiny-llama")
        trainer = SFTTrainer(tiny_model(), arguments, train_dataset=rows(), processing_class=tokenizer)
        hf_ext.attach(trainer, RefinedLinearDecayCallback())
        trainer.train()
        found.append(recorded_norms(tmp_path).l1.tolist())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_logs_and_files_are_json(tmp_path: Path) -> None:
    build(tmp_path, RefinedLinearDecayCallback()).train()
    json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert json.loads((tmp_path / "gradient_norms.json").read_text())["scalars"] == {
        "optimizer": "AdamW",
        "batch_grew": False,
        "done_steps": 10,
        "total_steps": 10,
    }


# In two numbers -----------------------------------------------------------------------------------


def test_a_polynomial_is_recovered() -> None:
    # Two updates of warm-up, then the squares of 1, 3/4, 1/2, 1/4.
    found = polynomial_decay([0.0, 0.5, 1.0, 0.5625, 0.25, 0.0625])
    assert found.warmup == 2 / 6
    assert found.power == pytest.approx(2.0, rel=1e-7)
    assert found.rms_error == pytest.approx(0.0, abs=1e-7)
    # The paper's form ends at 0: squares of 1, 2/3, 1/3, 0.
    ends = polynomial_decay([0.0, 3.0, 4 / 3, 1 / 3, 0.0], drop_zero=False)
    assert (ends.warmup, ends.power) == (0.2, pytest.approx(2.0, rel=1e-7))
    linear = polynomial_decay(refined_schedule([3.0] * 50, norm="l2"))
    assert (linear.warmup, linear.power) == (0.0, pytest.approx(1.0, rel=1e-7))


@pytest.mark.parametrize("seed", range(4))
def test_the_power_has_the_least_squares(seed: int) -> None:
    draw = random.Random(seed)
    norms = [draw.uniform(1.0, 2.0) * math.exp(-3 * seed * step / 60) for step in range(60)]
    factors = refined(norms, norm="l1", drop_zero=True)
    found = polynomial_decay(factors)
    peak = max(range(60), key=factors.__getitem__)
    assert found.warmup == peak / 60

    def missed(power: float, first: int) -> float:
        form = [k / peak if k < peak else (1 - (k - peak) / (60 - peak)) ** power for k in range(60)]
        return sum((a - b) ** 2 for a, b in list(zip(form, factors, strict=True))[first:])

    assert found.power is not None
    assert found.rms_error == pytest.approx(math.sqrt(missed(found.power, 0) / 60), rel=1e-9)
    others = [0.02 * 1.05**k for k in range(170)]  # 0.02 to 76
    assert missed(found.power, peak) <= min(missed(power, peak) for power in others)
    assert missed(found.power, peak) < min(missed(found.power * f, peak) for f in (0.999, 1.001))


def test_transformers_has_the_same_curve() -> None:
    """What the summary is for: the two numbers give the curve at another length by upstream's own name."""
    rates = schedule_rates("polynomial", 90, 1.0, warmup_steps=18, power=1.7, lr_end=0.0)
    found = polynomial_decay(rates)
    assert (found.warmup, found.power) == (0.2, pytest.approx(1.7, rel=1e-7))
    assert found.rms_error == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("bad", [[1.0], [0.0, 0.0], [1.0, -0.1], [1.0, math.nan], [[1.0, 0.5]]])
def test_what_is_no_schedule_has_no_polynomial(bad: Any) -> None:
    with pytest.raises(ValueError, match="factors must be"):
        polynomial_decay(bad)


def test_every_setting_is_described() -> None:
    doc = RefinedLinearDecayCallback.__doc__ or ""
    assert [
        f.name for f in dataclasses.fields(RefinedLinearDecayCallback) if f"        {f.name}: " not in doc
    ] == []
