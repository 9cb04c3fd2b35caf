"""The infinite schedule: the paper's curve, the anneal, and continuing from the constant phase."""

from __future__ import annotations

import dataclasses
import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_ext.callbacks import InfiniteLRCallback, InfiniteLRCurve
from hf_ext.callbacks._branch import check_trained, trained_tensors
from hf_ext.callbacks._infinite_curve import ANNEALS, COOLDOWNS
from tests.callbacks.runs import (
    BEST,
    MIDDLE,
    Bumpy,
    SaveAt,
    StopAt,
    build,
    equal,
    logged,
    parameters,
    rows,
    tiny_model,
)
from tests.reference.infinite_lr import learning_rate

MARKS: dict[str, Any] = {"warmup_steps": 4, "cooldown_steps": 8, "anneal_start": 20, "anneal_steps": 10}
PAPER = {"eta_max": 1e-3, "eta_const": 1e-4, "eta_min": 1e-5, "W": 4, "C": 8, "A": 20, "N": 10}
SHORT: dict[str, Any] = {"warmup_steps": 2, "cooldown_steps": 4}


def rates(curve: InfiniteLRCurve, steps: int, peak: float = 1e-3) -> list[float]:
    return [peak * curve(s) for s in range(steps)]


# The curve ----------------------------------------------------------------------------------------


def test_the_paper_s_points() -> None:
    curve = InfiniteLRCurve(**MARKS)
    points = {
        0: 0.0,
        2: 5e-4,
        4: 1e-3,
        6: 5.5e-4,
        8: 1e-4,
        12: 1e-4,
        19: 1e-4,
        20: 1e-4,
        25: 3.162278e-5,
        30: 1e-5,
    }
    for s, rate in points.items():
        assert 1e-3 * curve(s) == pytest.approx(rate, rel=1e-6), s
    assert 1e-3 * curve(31) == pytest.approx(1e-5, rel=1e-12)
    assert curve(1000) == curve(30)


@pytest.mark.parametrize(
    ("cooldown", "middle"), [("cosine", 5.5e-4), ("linear", 5.5e-4), ("rsqrt", 2.375302e-4)]
)
def test_cooldown_shapes_meet_at_their_ends(cooldown: str, middle: float) -> None:
    curve = InfiniteLRCurve(**MARKS, cooldown=cooldown)
    assert 1e-3 * curve(6) == pytest.approx(middle, rel=1e-6)
    assert (curve(4), curve(8)) == (1.0, 0.1)


@pytest.mark.parametrize("cooldown", COOLDOWNS)
@pytest.mark.parametrize("anneal", ANNEALS)
def test_equals_the_reference(cooldown: str, anneal: str) -> None:
    curve = InfiniteLRCurve(**MARKS, cooldown=cooldown, anneal=anneal, rsqrt_scale=7.0)
    expected = [learning_rate(s, **PAPER, cooldown=cooldown, anneal=anneal, a=7.0) for s in range(40)]
    # Both are double precision, in another order of operations.
    assert rates(curve, 40) == pytest.approx(expected, rel=1e-13, abs=1e-18)


def test_the_exponential_anneal_is_geometric() -> None:
    curve = InfiniteLRCurve(**MARKS)
    for s in range(20, 30):
        assert curve(s + 1) / curve(s) == pytest.approx(0.1 ** (1 / 10), rel=1e-12)


@pytest.mark.parametrize("cooldown", COOLDOWNS)
@pytest.mark.parametrize("anneal", ANNEALS)
def test_no_jump_at_the_joints(cooldown: str, anneal: str) -> None:
    values = rates(InfiniteLRCurve(**MARKS, cooldown=cooldown, anneal=anneal), 40)
    steps = [abs(b - a) for a, b in pairwise(values)]
    phases = [(0, 4), (4, 8), (8, 20), (20, 30)]
    for joint, left, right in zip((4, 8, 20), phases, phases[1:], strict=False):
        allowed = max(steps[slice(*left)] + steps[slice(*right)])
        assert steps[joint - 1] <= allowed


def test_one_curve_for_every_peak() -> None:
    optimizer = torch.optim.SGD(
        [
            {"params": [nn.Parameter(torch.ones(1))], "lr": 1.0},
            {"params": [nn.Parameter(torch.ones(1))], "lr": 4.0},
        ]
    )
    scheduler = InfiniteLRCurve(**MARKS).scheduler(optimizer)
    for s in range(40):
        assert [group["lr"] for group in optimizer.param_groups] == [
            InfiniteLRCurve(**MARKS)(s) * p for p in (1, 4)
        ]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"cooldown_steps": 3}, "cooldown_steps"),
        ({"anneal_start": 7}, "anneal_start"),
        ({"anneal_steps": 0}, "anneal_steps"),
        ({"anneal_steps": None}, "anneal_steps"),
        ({"min_lr_ratio": 0.0}, "min_lr_ratio"),
        ({"rewarm_start": 7.0}, "rewarm_start"),
        ({"rewarm_steps": -1}, "rewarm_steps"),
        ({"rewarm_from": 0.2}, "rewarm_from"),
    ],
)
def test_a_curve_refuses_bad_fields(bad: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        InfiniteLRCurve(**{**MARKS, **bad})


def test_a_linear_anneal_may_end_at_zero() -> None:
    assert InfiniteLRCurve(**MARKS, anneal="linear", min_lr_ratio=0.0)(30) == 0.0


def test_an_annealed_curve_can_be_opened_again() -> None:
    curve = InfiniteLRCurve(**MARKS)
    curve.reopen(25, 5)  # in the middle of the anneal, whose rate is 0.1 * 0.1 ** (5 / 10) of the peak
    low = 0.1 * 0.1**0.5
    points = {25: low, 26: low + (0.1 - low) / 5, 29: low + (0.1 - low) * 4 / 5, 30: 0.1, 1000: 0.1}
    for s, rate in points.items():
        assert curve(s) == pytest.approx(rate, rel=1e-12), s
    assert [curve.phase(s) for s in (25, 29, 30)] == ["rewarm", "rewarm", "constant"]
    curve.start_anneal(40, 10)
    assert curve(50) == pytest.approx(0.01, rel=1e-12)
    at_once = InfiniteLRCurve(**MARKS)
    at_once.reopen(31, 0)
    assert (at_once(31), at_once.phase(31)) == (0.1, "constant")
    with pytest.raises(ValueError, match=r"reopen must be in or after an anneal, got 31 \(now in constant"):
        at_once.reopen(31, 0)


def test_an_anneal_that_begins_where_a_run_without_the_callback_was_saved(tmp_path: Path) -> None:
    build(tmp_path, lr_scheduler_type="constant").train()
    late = InfiniteLRCallback(start_phase="constant", const_lr_ratio=1.0, anneal_start=MIDDLE)
    trainer = build(tmp_path, late)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{MIDDLE}"))
    assert not (tmp_path / "infinite_branch").exists()  # of a checkpoint without the schedule
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[MIDDLE] == rates[0]
    assert rates[-1] < 0.5 * rates[0]


def test_resumes_in_a_bare_loop(tmp_path: Path) -> None:
    def start() -> tuple[Any, Any, Any]:
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=1e-2)
        return weight, optimizer, InfiniteLRCurve(warmup_steps=2, cooldown_steps=5).scheduler(optimizer)

    def train(weight: Any, optimizer: Any, scheduler: Any, first: int, last: int) -> None:
        for s in range(first, last):
            if s == 7:
                scheduler.lr_lambdas[0].start_anneal(s, 4)
            (weight * torch.arange(3.0) * (s + 1)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    whole = start()
    train(*whole, 0, 14)
    cut = start()
    train(*cut, 0, 9)
    torch.save([cut[1].state_dict(), cut[2].state_dict()], tmp_path / "state.pt")
    resumed = start()
    optimizer_state, scheduler_state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed[0].data.copy_(cut[0].data)
    resumed[1].load_state_dict(optimizer_state)
    resumed[2].load_state_dict(scheduler_state)
    assert resumed[2].lr_lambdas[0].anneal_start == 7
    train(*resumed, 9, 14)
    assert torch.equal(resumed[0], whole[0])


# In a trainer -------------------------------------------------------------------------------------


def test_the_learning_rates_of_a_run(tmp_path: Path) -> None:
    trainer = build(tmp_path, InfiniteLRCallback(**SHORT, anneal_start=6, anneal_steps=3), attach=False)
    trainer.train()
    expected = [
        learning_rate(s, eta_max=1e-2, eta_const=1e-3, eta_min=1e-4, W=2, C=4, A=6, N=3) for s in range(10)
    ]
    assert logged(trainer, "learning_rate") == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert logged(trainer, "infinite_lr/phase") == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]


def test_shares_of_the_first_run_are_kept(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"warmup_end": 0.2, "cooldown_end": 0.4}
    trainer = build(tmp_path, InfiniteLRCallback(**settings))
    trainer.train()
    # Resumed for twice the length: the shares would now be other steps.
    longer = build(tmp_path, InfiniteLRCallback(**settings), max_steps=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # an open schedule has no length
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert logged(longer, "learning_rate")[:10] == logged(trainer, "learning_rate")
    assert set(logged(longer, "learning_rate")[4:]) == {1e-2 * 0.1}


def test_start_phase_constant(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, InfiniteLRCallback(start_phase="constant", anneal_start=0.6), save_strategy="no"
    )
    trainer.train()
    found = logged(trainer, "learning_rate")
    assert set(found[:7]) == {1e-2 * 0.1}
    assert found[9] == pytest.approx(1e-4, rel=1e-12)
    assert sorted(found[6:], reverse=True) == found[6:]


class AnnealAt(StopAt):
    """Ask for an anneal after a step."""

    callback: InfiniteLRCallback

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.callback.start_anneal(3)


def test_anneal_on_demand_saves_a_branch_and_ends_the_run(tmp_path: Path) -> None:
    callback, ask = InfiniteLRCallback(**SHORT), AnnealAt(5)
    ask.callback = callback
    # Of its saves only the last is kept: the branch must outlive the rotation.
    trainer = build(tmp_path, callback, others=[ask], max_steps=30, save_steps=4, save_total_limit=1)
    trainer.train()
    found = logged(trainer, "learning_rate")
    # The request comes after ours has run in step 5: the anneal begins one update later.
    assert len(found) == 10
    assert found[6] == 1e-2 * 0.1
    assert found[9] == pytest.approx(1e-4, rel=1e-12)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"checkpoint-10", "infinite_branch"}
    names = {p.name for p in (tmp_path / "infinite_branch").iterdir()}
    assert {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    } <= names
    assert json.loads((tmp_path / "infinite_branch" / "trainer_state.json").read_text())["global_step"] == 6
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("event", "first"), [("on_step_begin", 6), ("on_step_end", 7)])
def test_when_an_anneal_that_is_asked_for_begins(event: str, first: int, tmp_path: Path) -> None:
    callback = InfiniteLRCallback(**SHORT)

    class Ask(TrainerCallback):
        pass

    def ask(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # In the sixth update, or after it.
        if state.global_step == (5 if event == "on_step_begin" else 6):
            callback.start_anneal(30)

    setattr(Ask, event, ask)
    trainer = build(tmp_path, callback, others=[Ask()], save_strategy="no")
    end = 0.1 * 0.1 ** ((9 - first) / 30)
    with pytest.warns(UserWarning, match=rf"beyond the run, which ends at {end:g} of the peak"):
        trainer.train()
    assert logged(trainer, "infinite_lr/phase").index(3.0) == first
    assert logged(trainer, "learning_rate")[-1] == pytest.approx(1e-2 * end, rel=1e-12)


def test_an_anneal_that_never_begins_is_told(tmp_path: Path) -> None:
    callback, ask = InfiniteLRCallback(**SHORT), AnnealAt(5)
    ask.callback = callback
    trainer = build(tmp_path, callback, others=[ask], max_steps=5, save_strategy="no")
    with pytest.warns(UserWarning, match="has not begun: the run ended in the constant phase"):
        trainer.train()


class FailAt(TrainerCallback):
    """Fail in the evaluation after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError("stopped by the test")


def test_an_anneal_is_saved_where_the_best_are(tmp_path: Path) -> None:
    def saving_the_best(fail: int) -> Any:
        callback = InfiniteLRCallback(**SHORT, anneal_start=7, anneal_steps=1)
        best = {"save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": False}
        trainer = build(tmp_path, callback, others=[FailAt(fail)], **{**BEST, **best})
        Bumpy(trainer)  # each is the best so far up to the fifth
        return trainer

    failing = saving_the_best(7)
    with pytest.raises(InterruptedError):
        failing.train()
    assert failing.args.save_strategy == "best"
    trainer = saving_the_best(99)
    trainer.train()
    steps = {int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")}
    assert steps == {1, 2, 3, 4, 5, 7, 9}
    state = json.loads((tmp_path / "infinite_branch" / "trainer_state.json").read_text())
    assert (state["global_step"], state["best_global_step"]) == (7, 5)
    assert trainer.args.save_strategy == "best"


class Hurry(TrainerCallback):
    """Let the schedule's time run three times as fast from the third update on, as a larger batch would."""

    def __init__(self, schedule: InfiniteLRCallback) -> None:
        self.schedule = schedule

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and self.schedule.curve is not None:
            self.schedule.curve.set_pace(2, 3.0)


def test_an_anneal_whose_first_step_is_stepped_over_begins_at_once(tmp_path: Path) -> None:
    schedule = InfiniteLRCallback(warmup_steps=0, cooldown_steps=1, anneal_start=7)
    trainer = build(tmp_path, schedule, others=[Hurry(schedule)], max_steps=10)
    trainer.train()
    # Times 0, 1, 2, 5, 8, 11: the fifth update is the first at or past 7, and the anneal's end is kept.
    assert isinstance(schedule.curve, InfiniteLRCurve)
    assert (schedule.curve.anneal_start, schedule.curve.anneal_steps) == (8.0, 1.0)
    branch = json.loads((tmp_path / "infinite_branch" / "trainer_state.json").read_text())
    assert branch["global_step"] == 4
    assert schedule.read_state(tmp_path / "infinite_branch")["phase"] == "constant"
    assert trainer.state.global_step == 6  # the anneal ended the run


def test_an_interrupted_anneal_goes_on(tmp_path: Path) -> None:
    ends = []
    for stop in ([], [StopAt(8)]):
        callback, ask = InfiniteLRCallback(**SHORT), AnnealAt(4)
        ask.callback = callback
        folder = tmp_path / str(len(stop))
        trainer = build(folder, callback, others=[ask, *stop], max_steps=30, save_steps=7)
        if stop:
            with pytest.raises(InterruptedError):
                trainer.train()
            trainer = build(folder, InfiniteLRCallback(**SHORT), max_steps=30, save_steps=7)
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-7"))
        else:
            trainer.train()
        ends.append(parameters(trainer))
        assert trainer.state.global_step == 9
    assert equal(*ends)


def test_a_second_or_an_early_anneal(tmp_path: Path) -> None:
    callback = InfiniteLRCallback(**SHORT)
    with pytest.raises(ValueError, match="called during training"):
        callback.start_anneal(3)
    ask = AnnealAt(1)
    ask.callback = callback
    trainer = build(tmp_path, callback, others=[ask, second := AnnealAt(2)])
    second.callback = callback
    with pytest.raises(ValueError, match="an anneal is on"):
        trainer.train()
    # Asked for in the warm-up, it begins with the constant phase.
    callback, ask = InfiniteLRCallback(**SHORT), AnnealAt(1)
    ask.callback = callback
    trainer = build(tmp_path, callback, others=[ask])
    trainer.train()
    assert logged(trainer, "infinite_lr/phase") == [0, 0, 1, 1, 3, 3, 3, 3]


# Runs of another length ---------------------------------------------------------------------------

SHARE: dict[str, Any] = {**SHORT, "anneal_start": 0.8}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of ten steps that anneals after eight."""
    folder = tmp_path_factory.mktemp("planned")
    build(folder, InfiniteLRCallback(**SHARE)).train()
    return folder


@pytest.mark.parametrize(("checkpoint", "steps"), [(5, 20), (8, 20), (5, 8)])
def test_an_anneal_fits_a_resumed_run_s_length(
    checkpoint: int, steps: int, planned: Path, tmp_path: Path
) -> None:
    whole = build(tmp_path, InfiniteLRCallback(**SHARE), max_steps=steps, save_strategy="no")
    whole.train()
    start = round(0.8 * steps)
    text = (
        rf"max_steps is {steps}, and 10 in the checkpoint: the anneal begins after {start} steps and takes "
    )
    text += rf"{steps - start - 1}, where it was to begin after 8 and take 1"
    resumed = build(tmp_path, InfiniteLRCallback(**SHARE), max_steps=steps, save_steps=1000)
    with pytest.warns(UserWarning, match=text):
        resumed.train(resume_from_checkpoint=str(planned / f"checkpoint-{checkpoint}"))
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")
    assert len(logged(resumed, "learning_rate")) == steps
    assert equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize(
    ("steps", "end"), [(20, "ends the run at step 10"), (7, r"is cut short at 0\.0398107 of the peak")]
)
def test_an_anneal_that_has_begun_keeps_its_length(steps: int, end: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"warmup_steps": 1, "cooldown_steps": 2, "anneal_start": 0.4}
    whole = build(tmp_path, InfiniteLRCallback(**settings))
    whole.train()
    resumed = build(tmp_path, InfiniteLRCallback(**settings), max_steps=steps)
    with pytest.warns(UserWarning, match=f"in the checkpoint: the anneal has begun, and {end}"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")[: min(steps, 10)]


def test_an_anneal_that_was_asked_for_is_not_planned_anew(tmp_path: Path) -> None:
    callback, ask = InfiniteLRCallback(**SHARE), AnnealAt(4)
    ask.callback = callback
    whole = build(tmp_path, callback, others=[ask])
    whole.train()
    # The checkpoint is of the moment before its first update.
    resumed = build(tmp_path, InfiniteLRCallback(**SHARE), max_steps=20)
    with pytest.warns(UserWarning, match="the anneal has begun, and ends the run at step 9"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert equal(parameters(resumed), parameters(whole))
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")


# Continuing ---------------------------------------------------------------------------------------


def first_run(folder: Path, **settings: Any) -> Any:
    trainer = build(folder, InfiniteLRCallback(**SHORT, **settings))
    trainer.train()
    return trainer


def test_new_data_continue_from_the_branch(tmp_path: Path) -> None:
    first_run(tmp_path / "one", anneal_start=6, anneal_steps=3)
    branch = tmp_path / "one" / "infinite_branch"
    seen: dict[str, Any] = {}

    class Look(StopAt):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                seen["state"] = [
                    {k: v.clone() for k, v in s.items()}
                    for s in kwargs["optimizer"].state_dict()["state"].values()
                ]
                seen["weights"] = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters()}

    class FirstBatch:
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            ids = torch.tensor([f["input_ids"] for f in features])
            seen.setdefault("batch", ids)
            return {"input_ids": ids, "labels": ids}

    new = build(
        tmp_path / "two",
        InfiniteLRCallback(continue_from=str(branch)),
        others=[Look(99)],
        data=rows(50),
        max_steps=6,
    )
    new.data_collator = FirstBatch()
    new.train()
    assert logged(new, "learning_rate") == [1e-2 * 0.1] * 6
    assert new.state.global_step == 6
    saved = torch.load(branch / "optimizer.pt", weights_only=True)["state"]
    for here, there in zip(seen["state"], saved.values(), strict=True):
        assert all(torch.equal(value, there[name]) for name, value in here.items())
    from safetensors.torch import load_file

    stored = load_file(branch / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in seen["weights"].items() if name in stored)
    # The first batch is that of a run which begins on these data.
    plain = build(tmp_path / "plain", data=rows(50), max_steps=1, save_strategy="no")
    again, seen["ours"] = FirstBatch(), seen.pop("batch")
    plain.data_collator = again
    plain.train()
    assert torch.equal(seen["ours"], seen["batch"])


def test_a_continued_run_resumes_to_the_bit(tmp_path: Path) -> None:
    first_run(tmp_path / "one")
    start = InfiniteLRCallback(continue_from=str(tmp_path / "one" / "checkpoint-5"), anneal_start=0.6)
    settings = start.settings()
    whole = build(tmp_path / "two", start, data=rows(50))
    whole.train()
    resumed = build(tmp_path / "three", InfiniteLRCallback(**settings), data=rows(50))
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-5"))
    assert equal(parameters(resumed), parameters(whole))
    # 0.6 of this run's ten steps, after the five that the checkpoint had seen.
    assert logged(whole, "infinite_lr/phase") == [2.0] * 6 + [3.0] * 4


def test_continuing_from_the_branch_equals_a_run_that_never_annealed(tmp_path: Path) -> None:
    first_run(tmp_path / "annealed", anneal_start=6, anneal_steps=3)
    never = first_run(tmp_path / "open")
    back = build(tmp_path / "back", InfiniteLRCallback(**SHORT))
    back.train(resume_from_checkpoint=str(tmp_path / "annealed" / "infinite_branch"))
    assert equal(parameters(back), parameters(never))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_later_run_in_the_folder_leaves_the_branch(tmp_path: Path) -> None:
    first_run(tmp_path, anneal_start=5)
    branch = tmp_path / "infinite_branch"
    before = contents(branch)
    start = InfiniteLRCallback(continue_from=str(branch))
    later = build(tmp_path, start, data=rows(50))  # it saves a checkpoint-5 too
    later.train()
    assert contents(branch) == before
    assert contents(tmp_path / "checkpoint-5").keys() == before.keys()
    assert contents(tmp_path / "checkpoint-5")["optimizer.pt"] != before["optimizer.pt"]


def test_a_run_that_is_resumed_where_its_anneal_begins_keeps_the_branch(
    planned: Path, tmp_path: Path
) -> None:
    # As one is that was killed between the checkpoint and the copy.
    out = tmp_path / "out"
    build(out, InfiniteLRCallback(**SHARE)).train(resume_from_checkpoint=str(planned / "checkpoint-8"))
    branch = out / "infinite_branch"
    assert contents(branch) == contents(planned / "infinite_branch")
    # One that is resumed from the branch itself leaves it as it is.
    place = branch.stat().st_ino
    build(out, InfiniteLRCallback(**SHARE)).train(resume_from_checkpoint=str(branch))
    assert branch.stat().st_ino == place
    # An anneal that only the resumed run plans, for where it stands.
    settings: dict[str, Any] = {**SHORT, "anneal_start": 5}
    build(out, InfiniteLRCallback(**settings)).train(resume_from_checkpoint=str(planned / "checkpoint-5"))
    assert json.loads((branch / "trainer_state.json").read_text())["global_step"] == 5
    assert InfiniteLRCallback(**SHORT).read_state(branch)["curve.anneal_start"] is None


def test_other_trained_tensors_are_refused_before_weights_are_read(planned: Path, tmp_path: Path) -> None:
    def refused(model: Any, text: str, optimizer: Any = None) -> None:
        callback = InfiniteLRCallback(continue_from=str(planned / "infinite_branch"))
        trainer = build(tmp_path, callback, model=model)
        trainer.optimizer = optimizer
        with torch.no_grad():
            model.lm_head.weight.fill_(0.5)
        with pytest.raises(ValueError, match=text):
            trainer.train()
        assert (model.lm_head.weight == 0.5).all()

    frozen = tiny_model()
    frozen.model.norm.weight.requires_grad_(False)
    same = "continue_from must be a checkpoint of a run that trained the same tensors"
    refused(frozen, rf"{same}, got .*infinite_branch' \(trained there alone: model\.norm\.weight\)")
    wide = tiny_model()
    wide.model.layers[0].mlp.down_proj = nn.Linear(48, 16, bias=True)
    down = r"model\.layers\.0\.mlp\.down_proj"
    shapes = r"\[16, 24\] there, \[16, 48\] here"
    refused(wide, rf"trained here alone: {down}\.bias; of another shape: {down}\.weight {shapes}")
    model = tiny_model()
    one_group = torch.optim.AdamW(model.parameters(), lr=1e-2)
    count = len(list(model.parameters()))
    text = (
        rf"optimizer must be one with parameter groups of \[\d+, 3\] tensors, .*got 'groups of \[{count}\]'"
    )
    refused(model, text, one_group)


def test_wrappers_do_not_count_as_other_tensors() -> None:
    model = tiny_model()
    model.model.norm.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    noted = trained_tensors(torch.compile(model), torch.optim.SGD(trained, lr=0.1))
    assert noted == trained_tensors(model, torch.optim.SGD(trained, lr=0.1))
    assert noted is not None
    assert noted["groups"] == [len(trained)]
    assert noted["shapes"]["lm_head.weight"] == list(model.lm_head.weight.shape)
    # Where an optimizer holds one tensor for many, its groups say nothing.
    flat = trained_tensors(model, torch.optim.SGD([torch.zeros(5, requires_grad=True)], lr=0.1))
    assert flat == {**noted, "groups": None}
    check_trained(noted, flat, "continue_from", "x")


def test_a_second_train_does_not_throw_the_first_s_weights_away(planned: Path, tmp_path: Path) -> None:
    stop = StopAt(2)
    callback = InfiniteLRCallback(continue_from=str(planned / "infinite_branch"))
    trainer = build(tmp_path, callback, others=[stop], max_steps=3, save_strategy="no")
    with pytest.raises(InterruptedError):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train()  # the first has not come to its end
    assert logged(trainer, "infinite_lr/time") == [8.0, 9.0, 10.0]
    before = parameters(trainer)
    with pytest.raises(ValueError, match=r"continue_from must be None, or another .* in a second train\(\)"):
        trainer.train()
    assert equal(parameters(trainer), before)
    # Another model has none to lose.
    other = build(tmp_path, callback, max_steps=1, save_strategy="no")
    other.train()
    assert logged(other, "infinite_lr/time") == [8.0]


def test_what_another_run_had_asked_for_is_not_taken_along(tmp_path: Path) -> None:
    callback, ask = InfiniteLRCallback(**SHORT), AnnealAt(5)
    ask.callback = callback
    build(tmp_path / "one", callback, others=[ask]).train()
    start = InfiniteLRCallback(continue_from=str(tmp_path / "one" / "checkpoint-5"))
    trainer = build(tmp_path / "two", start, max_steps=5, save_strategy="no")
    trainer.train()
    assert logged(trainer, "infinite_lr/phase") == [2.0] * 5


@pytest.mark.parametrize("on_demand", [False, True])
def test_an_annealed_checkpoint_is_no_place_to_continue_from(on_demand: bool, tmp_path: Path) -> None:
    callback = InfiniteLRCallback(**SHORT, **({} if on_demand else {"anneal_start": 6, "anneal_steps": 3}))
    ask = AnnealAt(5 if on_demand else 99)
    ask.callback = callback
    build(tmp_path / "one", callback, others=[ask]).train()
    again = build(tmp_path / "two", InfiniteLRCallback(continue_from=str(tmp_path / "one" / "checkpoint-10")))
    before = parameters(again)
    with pytest.raises(ValueError, match="continue_from must be a checkpoint of the constant phase"):
        again.train()
    assert equal(parameters(again), before)
    replan = build(
        tmp_path / "three", InfiniteLRCallback(**SHORT, anneal_start=9, anneal_steps=1), max_steps=20
    )
    with pytest.raises(ValueError, match="anneal_start must be left as it was"):
        replan.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-10"))


@pytest.fixture(scope="module")
def annealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of ten steps that anneals in its last four."""
    folder = tmp_path_factory.mktemp("annealed")
    others = [SaveAt(8)]
    build(folder, InfiniteLRCallback(**SHORT, anneal_start=6, anneal_steps=3), others=others).train()
    return folder


def test_an_annealed_checkpoint_may_be_allowed(annealed: Path, tmp_path: Path) -> None:
    def again(name: str) -> Any:
        start = InfiniteLRCallback(
            continue_from=str(annealed / "checkpoint-10"),
            allow_annealed=True,
            rewarm_steps=3,
            anneal_start=16,
            anneal_steps=2,
        )
        return build(tmp_path / name, start, data=rows(50), save_steps=2)

    whole = again("whole")
    text = r"annealed: the learning rate rises from 0\.01 to 0\.1 of the peak over 3 steps"
    with pytest.warns(UserWarning, match=text):
        whole.train()
    # Times 10 to 18: the anneal had ended at 0.01 of the peak.
    rise = [0.01, 0.04, 0.07, 0.1, 0.1, 0.1]
    fall = [0.1, 0.1 * 0.1**0.5, 0.01]
    expected = [1e-2 * share for share in rise + fall]
    assert logged(whole, "learning_rate") == pytest.approx(expected, rel=1e-12)
    assert logged(whole, "infinite_lr/phase") == [5, 5, 5, 2, 2, 2, 3, 3, 3]
    assert logged(whole, "infinite_lr/reopened") == [1.0] * 9
    # Its optimizer goes on too, and a run that is cut in the rise is the same to the bit.
    resumed = again("resumed")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert equal(parameters(resumed), parameters(whole))
    assert logged(resumed, "infinite_lr/phase") == logged(whole, "infinite_lr/phase")
    # The new branch is of the constant phase again, and says what it comes from.
    branch = InfiniteLRCallback().read_state(tmp_path / "whole" / "infinite_branch", of_other_run=True)
    assert (branch["phase"], branch["reopened"]) == ("constant", 1)
    third = build(
        tmp_path / "third",
        InfiniteLRCallback(continue_from=str(tmp_path / "whole" / "infinite_branch")),
        max_steps=2,
    )
    third.train()
    assert logged(third, "learning_rate") == [1e-2 * 0.1] * 2
    assert logged(third, "infinite_lr/reopened") == [1.0] * 2


def test_a_checkpoint_within_an_anneal_may_be_allowed(annealed: Path, tmp_path: Path) -> None:
    start = InfiniteLRCallback(continue_from=str(annealed / "checkpoint-8"), allow_annealed=True)
    trainer = build(tmp_path, start, max_steps=2, save_strategy="no")
    with pytest.warns(UserWarning, match=r"rises from 0\.0215443 to 0\.1 of the peak at once"):
        trainer.train()  # 0.1 * 0.1 ** (2 / 3) would have been the next
    assert logged(trainer, "learning_rate") == [1e-2 * 0.1] * 2


def test_a_rise_is_refused_where_none_is_needed(annealed: Path, tmp_path: Path) -> None:
    callback = InfiniteLRCallback(
        continue_from=str(annealed / "infinite_branch"), allow_annealed=True, rewarm_steps=3
    )
    with pytest.raises(ValueError, match="rewarm_steps must be 0 where continue_from is a checkpoint of the"):
        build(tmp_path, callback).train()
    early = InfiniteLRCallback(
        continue_from=str(annealed / "checkpoint-10"), allow_annealed=True, rewarm_steps=3, anneal_start=12
    )
    with (
        pytest.warns(UserWarning, match="has been annealed"),
        pytest.raises(ValueError, match="anneal_start must be in the constant phase of this run, 13 to 18"),
    ):
        build(tmp_path, early).train()


def test_an_anneal_that_is_asked_for_waits_for_the_rise(annealed: Path, tmp_path: Path) -> None:
    checkpoint = str(annealed / "checkpoint-10")
    callback = InfiniteLRCallback(continue_from=checkpoint, allow_annealed=True, rewarm_steps=4)
    ask = AnnealAt(1)
    ask.callback = callback
    trainer = build(tmp_path, callback, others=[ask])
    with pytest.warns(UserWarning, match="has been annealed"):
        trainer.train()
    assert logged(trainer, "infinite_lr/phase") == [5, 5, 5, 5, 3, 3, 3, 3]


def test_a_folder_that_is_no_branch_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "plain").train()
    trainer = build(
        tmp_path / "two", InfiniteLRCallback(continue_from=str(tmp_path / "plain" / "checkpoint-5"))
    )
    with pytest.raises(
        ValueError, match=r"continue_from must be a checkpoint of a run with InfiniteLRCallback"
    ):
        trainer.train()


def test_continuing_needs_attach(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"attach\(trainer, InfiniteLRCallback\(continue_from='x'\)\)"):
        build(tmp_path, InfiniteLRCallback(continue_from="x"), attach=False)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    first_run(tmp_path / "one")
    callback = InfiniteLRCallback(continue_from=str(tmp_path / "one" / "checkpoint-5"))
    trainer = build(tmp_path / "two", callback, optim="sgd")
    with pytest.raises(ValueError, match="optimizer must be AdamW, as in the checkpoint"):
        trainer.train()


# Refusals and warnings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"warmup_steps": 11, "cooldown_steps": 12}, "warmup_steps"),
        ({"cooldown_steps": 11}, "cooldown_steps"),
        ({"cooldown_steps": 4, "anneal_start": 3}, "anneal_start"),
        ({"cooldown_steps": 4, "anneal_start": 10}, "anneal_start"),
        ({"anneal_steps": 3}, "anneal_steps"),
    ],
)
def test_phases_longer_than_the_run(settings: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        build(tmp_path, InfiniteLRCallback(**settings)).train()


def test_an_anneal_needs_whole_checkpoints(tmp_path: Path) -> None:
    trainer = build(tmp_path, InfiniteLRCallback(**SHORT, anneal_start=6), save_only_model=True)
    with pytest.raises(ValueError, match="save_only_model must be False"):
        trainer.train()


def test_an_anneal_beyond_the_run_is_warned_of(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, InfiniteLRCallback(**SHORT, anneal_start=6, anneal_steps=30), save_strategy="no"
    )
    with pytest.warns(UserWarning, match=r"ends at 0\.0794328 of the peak"):  # 0.1 * 0.1 ** (3 / 30)
        trainer.train()


def test_a_jump_is_warned_of(tmp_path: Path) -> None:
    trainer = build(tmp_path, InfiniteLRCallback(warmup_steps=2, cooldown_steps=2), save_strategy="no")
    with pytest.warns(UserWarning, match="drops at once"):
        trainer.train()


def test_other_settings_on_resume_are_refused_by_name(tmp_path: Path) -> None:
    first_run(tmp_path)
    trainer = build(tmp_path, InfiniteLRCallback(**SHORT, const_lr_ratio=0.2))
    with pytest.raises(ValueError, match=r"const_lr_ratio must be 0\.1, as in the checkpoint, got 0\.2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_run_without_conflicts_warns_of_nothing(tmp_path: Path) -> None:
    trainer = build(tmp_path, InfiniteLRCallback(**SHORT), save_strategy="no", max_steps=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()


def test_every_setting_is_described() -> None:
    doc = InfiniteLRCallback.__doc__ or ""
    assert [f.name for f in dataclasses.fields(InfiniteLRCallback) if f"        {f.name}: " not in doc] == []


def test_the_model_of_the_tests_is_the_same_each_time() -> None:
    first, second = tiny_model(), tiny_model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
