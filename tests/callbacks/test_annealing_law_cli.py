"""`hf-ext schedule predict`: recorded runs in, ranked schedules out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ext.callbacks import (
    AnnealingLaw,
    InfiniteLRCurve,
    curve_rates,
    recorded_trace,
    refined_schedule,
    schedule_rates,
)
from hf_ext.cli import main
from hf_ext.core.state import save_state
from hf_ext.training.refine import refine_run
from tests.reference import annealing_law as reference

PEAK, LENGTH, LAM = 1e-3, 1000, 0.99
TRUE = {"L0": 2.0, "A": 0.5, "C": 20.0, "alpha": 0.5}


def record(folder: Path, schedule: str, warmup: int = 10, **changes: Any) -> Path:
    """Write the trace of a run that follows a law."""
    folder.mkdir(exist_ok=True)
    rates = schedule_rates(schedule, LENGTH, PEAK, warmup_steps=warmup)
    filled = rates.clone()
    filled[:warmup] = PEAK
    s1, s2 = reference.areas(filled.tolist(), LAM)
    steps = list(range(25, LENGTH + 1, 25))
    losses = [reference.loss(s1[s - 1], s2[s - 1], **TRUE) for s in steps]
    tensors = {"rates": rates, "steps": torch.tensor(steps), "losses": torch.tensor(losses).double()}
    scalars = {"first_step": 1, "warmup_steps": None, "context": {"batch_size": 8}}
    tensors.update({name: value for name, value in changes.items() if name in tensors})
    scalars.update({name: value for name, value in changes.items() if name in scalars})
    save_state(folder, "annealing_law_trace", scalars, tensors)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return record(tmp_path / "cosine", "cosine")


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("predict", "refine"):
        monkeypatch.setattr(f"hf_ext.training.{module}.find_spec", lambda _: None)


def predict(*arguments: object) -> int:
    return main(["schedule", "predict", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line with which a command is refused, and nothing is written."""
    assert predict(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-ext: error: ")
    assert error.count("\n") == 1
    assert not list(Path(str(arguments[0])).glob("schedule_forecast*"))
    return error


def test_it_ranks_prints_and_writes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(run_dir, "--lam", LAM, "--schedules", "cosine,wsd,linear,constant,infinite_lr") == 0
    found = json.loads((run_dir / "schedule_forecast.json").read_text())
    law = AnnealingLaw.fit(recorded_trace(run_dir), lam=LAM)
    marks: Any = {"warmup_steps": 10, "cooldown_steps": 150, "anneal_start": 800, "anneal_steps": 199}
    rates = {
        name: schedule_rates(name, LENGTH, PEAK, warmup_steps=10)
        for name in ("cosine", "wsd", "linear", "constant")
    }
    rates["infinite_lr"] = curve_rates(InfiniteLRCurve(**marks), LENGTH, PEAK)
    expected = law.compare(rates)
    assert [row["schedule"] for row in found["schedules"]] == list(expected)
    for row in found["schedules"]:
        assert (row["loss"], row["low"], row["high"]) == tuple(vars(expected[row["schedule"]]).values())
    assert (found["steps"], found["learning_rate"], found["warmup_steps"]) == (LENGTH, PEAK, 10)
    assert found["law"]["C"] == pytest.approx(TRUE["C"], rel=1e-3)
    assert "draws" not in found["law"]
    assert (run_dir / "schedule_forecast.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    ranked = [line.split()[1] for line in lines if line[:1].isdigit()]
    assert ranked == list(expected)
    assert lines[0].split()[:3] == ["schedule", "final", "loss"]
    assert sum(line.startswith("wrote ") for line in lines) == 2


def test_several_runs_are_fitted_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constant = record(tmp_path / "constant", "constant")
    assert "C is unknown" in refused(capsys, constant, "--schedules", "constant,linear")
    assert predict(constant, record(tmp_path / "wsd", "wsd"), "--lam", LAM) == 0
    found = json.loads((constant / "schedule_forecast.json").read_text())
    assert found["law"]["points"] > 60
    assert found["law"]["alpha"] == pytest.approx(TRUE["alpha"], rel=1e-3)
    assert not (tmp_path / "wsd" / "schedule_forecast.json").exists()


def test_options_reach_the_schedules(run_dir: Path) -> None:
    options = ("--steps", 500, "--learning-rate", 5e-4, "--warmup-steps", 0, "--lam", LAM, "--level", 0.5)
    schedules = "wsd:num_decay_steps=50:decay_type=cosine,infinite_lr:anneal_start=400:const_lr_ratio=0.5"
    assert predict(run_dir, "--schedules", schedules, *options) == 0
    found = json.loads((run_dir / "schedule_forecast.json").read_text())
    rows = {row["schedule"].partition(":")[0]: row for row in found["schedules"]}
    law = AnnealingLaw.fit(recorded_trace(run_dir), lam=LAM)
    wsd = schedule_rates("warmup_stable_decay", 500, 5e-4, num_decay_steps=50, decay_type="cosine")
    curve = InfiniteLRCurve(
        warmup_steps=0, cooldown_steps=75, anneal_start=400, anneal_steps=99, const_lr_ratio=0.5
    )
    assert rows["wsd"]["loss"] == law.forecast(wsd, level=0.5).loss
    assert rows["wsd"]["low"] == law.forecast(wsd, level=0.5).low
    assert rows["infinite_lr"]["loss"] == law.forecast(curve_rates(curve, 500, 5e-4)).loss


def record_norms(folder: Path, count: int = LENGTH, **scalars: int) -> torch.Tensor:
    """Write norms that fall over the first tenth of a run and are constant after it, and return the l1."""
    l1 = 1.0 + 3.0 * (1.0 - torch.arange(count) / (0.1 * count)).clamp_min(0.0).double()
    tensors = {"step": torch.arange(1, count + 1), "l1": l1, "l2": l1.flip(0)}
    save_state(folder, "gradient_norms", {"optimizer": "AdamW", **scalars}, tensors)
    return l1


def test_the_refined_schedule_is_a_candidate(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norms = record_norms(run_dir)
    assert predict(run_dir, "--lam", LAM, "--schedules", "refined,refined:norm=l2:floor=0.1,linear") == 0
    found = json.loads((run_dir / "schedule_forecast.json").read_text())
    rows = {row["schedule"]: row["loss"] for row in found["schedules"]}
    law = AnnealingLaw.fit(recorded_trace(run_dir), lam=LAM)
    rates = PEAK * refined_schedule(norms, norm="l1")
    rise = int(rates.argmax())
    assert 80 < rise < 120
    # By the plain loops: the rise counts at the peak, the rest as it is.
    s1, s2 = reference.areas([PEAK] * rise + rates[rise:].tolist(), law.lam)
    expected = law.L0 + law.A * s1[-1] ** -law.alpha - (law.C or 0.0) * s2[-1]
    assert rows["refined"] == pytest.approx(expected, rel=1e-9)
    assert f"refined rises over its first {rise} of {LENGTH} updates" in capsys.readouterr().out
    other = PEAK * refined_schedule(norms.flip(0), norm="l2").clamp_min(0.1)
    options: Any = {"warmup_steps": int(other.argmax())}
    assert rows["refined:norm=l2:floor=0.1"] == law.forecast(other, **options).loss
    # At another length the curve is resampled.
    assert predict(run_dir, "--lam", LAM, "--schedules", "refined", "--steps", 300) == 0
    assert json.loads((run_dir / "schedule_forecast.json").read_text())["notes"] == [
        f"refined rises over its first {round(rise * 0.3)} of 300 updates: they count as a warm-up, at "
        "its peak"
    ]


@pytest.mark.usefixtures("without_plots")
def test_other_refined_schedules_and_parts_of_runs_are_noted(run_dir: Path) -> None:
    record_norms(run_dir, done_steps=LENGTH, total_steps=LENGTH)
    refine_run(run_dir, tau=0.2)
    saved = run_dir / "refined_schedule.json"
    text = f"refined is not what {saved} holds, which was made with tau=0.2 (not 0.1)"
    for tau, count, notes in (("", LENGTH, [text]), (":tau=0.2", LENGTH, []), (":tau=0.2", 2 * LENGTH, None)):
        record_norms(run_dir, done_steps=LENGTH, total_steps=count)
        assert predict(run_dir, "--lam", LAM, "--schedules", f"refined{tau}") == 0
        found = json.loads((run_dir / "schedule_forecast.json").read_text())["notes"]
        part = ["refined is made of the norms of 1000 of 2000 updates, stretched over a whole run"]
        assert [note for note in found if "rises over" not in note] == (part if notes is None else notes)


def test_the_refined_schedule_needs_norms(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, run_dir, "--schedules", "cosine,refined")
    assert f"refined: norms: {run_dir} holds no recorded gradient norms" in error
    record_norms(run_dir, 7)
    error = refused(capsys, run_dir, "--schedules", "refined")
    assert f"refined: norms must be of at least 8 updates, got '{run_dir}' (it holds 7)" in error
    record_norms(run_dir)
    assert "refined:norm=l3: norm must be one of" in refused(
        capsys, run_dir, "--schedules", "refined:norm=l3"
    )
    assert "refined:x=1: " in refused(capsys, run_dir, "--schedules", "refined:x=1")
    assert "floor must be in" in refused(capsys, run_dir, "--schedules", "refined:floor=1.0")


def test_the_decay_can_be_fitted(run_dir: Path) -> None:
    assert predict(run_dir, "--fit-lambda") == 0
    assert json.loads((run_dir / "schedule_forecast.json").read_text())["law"]["lam"] == LAM


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--schedules", "cosin"], "did you mean"),
        (["--schedules", " , "], "schedules must be names with commas between"),
        (["--schedules", "wsd:num_decay_steps"], "must be an option as key=value"),
        (["--schedules", "wsd:no_such=1"], "no_such"),
        (["--schedules", "infinite_lr:no_such=1"], "no_such"),
        (["--schedules", "constant:no_such=1"], "no_such"),
        (["--schedules", "wsd:num_decay_steps=2000"], "num_decay_steps must be in [0, 990]"),
        (
            ["--schedules", "wsd:num_decay_steps=9:num_stable_steps=991"],
            "num_stable_steps must be in [0, 990",
        ),
        (["--schedules", "wsd:num_decay_steps=a"], "num_decay_steps must be int, got str 'a'"),
        (
            ["--schedules", "polynomial:power=a"],
            "polynomial:power=a: schedule 'polynomial': power must be flo",
        ),
        (["--schedules", "infinite_lr:const_lr_ratio=abc"], "const_lr_ratio must be float, got str 'abc'"),
        (["--schedules", "infinite_lr:cooldown_steps=1001"], "cooldown_steps must be at most 1000"),
        (["--schedules", "infinite_lr:anneal_start=999"], "anneal_start must be in [150, 999)"),
        (["--schedules", "infinite_lr", "--warmup-steps", "1000"], "warmup_steps must be in [0, 1000)"),
        (
            ["--schedules", "infinite_lr", "--steps", "11"],
            "infinite_lr: steps must be at least 12: the warm-up",
        ),
        (["--schedules", "infinite_lr", "--steps", "0"], "error: steps must be at least 1"),
        (["--schedules", "refined:tau=x"], "tau must be float, got str 'x'"),
        (["--schedules", "infinite_lr:anneal_start=3"], "infinite_lr:anneal_start=3: anneal_start must be"),
        (["--learning-rate", "0.0012"], "constant: peak learning rate must be at most"),
        (["--learning-rate", "0"], "peak must be above 0"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--warmup-steps", "1000"], "warmup_steps must be in [0, 1000)"),
        (["--lam", "0.5"], "lam must be in"),
        (["--level", "1"], "level must be in"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], text: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refused(capsys, run_dir, *options)


def test_a_higher_peak_can_be_allowed(run_dir: Path) -> None:
    assert predict(run_dir, "--learning-rate", 0.0012, "--allow-peak-change") == 0


def test_an_extrapolation_is_noted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(run_dir, "--steps", 20 * LENGTH, "--schedules", "constant") == 0
    assert "times the fitted one: an extrapolation" in capsys.readouterr().out
    notes = json.loads((run_dir / "schedule_forecast.json").read_text())["notes"]
    assert len(notes) == 1


@pytest.mark.usefixtures("without_plots")
def test_the_very_beginning_is_noted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(run_dir, "--steps", 3, "--schedules", "linear") == 0
    assert "of where the fitted losses begin: an extrapolation to the beginning" in capsys.readouterr().out
    assert predict(run_dir, "--steps", 100, "--schedules", "linear") == 0
    assert "extrapolation" not in capsys.readouterr().out


@pytest.mark.usefixtures("without_plots")
def test_an_anneal_that_the_run_cuts_off_is_noted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(run_dir, "--schedules", "infinite_lr:anneal_start=900:anneal_steps=198") == 0
    text = (
        "note: anneal_steps=198 from step 900 on reaches beyond the 1000 steps of infinite_lr, which ends at "
    )
    assert f"{text}{0.1 * 0.1**0.5:g} of the peak rate" in capsys.readouterr().out


@pytest.mark.usefixtures("without_plots")
def test_without_matplotlib_the_plot_is_noted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(run_dir, "--schedules", "cosine") == 0
    assert "note: no plot without matplotlib: pip install 'hf-ext[plot]'\n" in capsys.readouterr().out
    assert not (run_dir / "schedule_forecast.png").exists()


def test_runs_without_what_a_law_needs_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no trace of a run" in refused(capsys, tmp_path)
    losses = recorded_trace(record(tmp_path / "few", "cosine")).losses
    short = torch.arange(25, 476, 25)
    few = record(tmp_path / "few", "cosine", steps=short, losses=losses[: len(short)])
    assert "losses must be at least 20 after the warm-up" in refused(capsys, few)
    losses[3] = math.nan
    broken = record(tmp_path / "broken", "cosine", losses=losses)
    assert "losses must be finite and above 0, got nan (after update 100)" in refused(capsys, broken)
    late = record(tmp_path / "late", "cosine", first_step=6)
    assert "first_step must be 1" in refused(capsys, late)
    empty = record(tmp_path / "empty", "cosine", steps=short[:0], losses=losses[:0])
    good = record(tmp_path / "good", "constant")
    error = refused(capsys, good, empty)
    assert "losses must be measured after the warm-up in each run; leave out a run that has none" in error
    assert f"({empty})" in error
    assert f"got nan ({broken}, after update 100)" in refused(capsys, good, broken)


def test_other_settings_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [record(tmp_path / f"{size}", "cosine", context={"batch_size": size}) for size in (8, 16)]
    assert predict(*runs) == 0
    assert "note: the law holds for one setting, but the runs differ in batch_size (8, 16)" in (
        capsys.readouterr().out
    )
