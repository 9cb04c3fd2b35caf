"""`hf-ext schedule refine`: the schedule that a second run would follow, as a file and a plot."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from hf_ext.callbacks import polynomial_decay, recorded_norms, refined_schedule
from hf_ext.cli import main
from hf_ext.core.state import save_state


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return a run's folder with the norms of forty updates, which fall and then rise."""
    l2 = [2.0 + math.cos(step / 6) for step in range(40)]
    tensors = {
        "step": torch.arange(1, 41),
        "l2": torch.tensor(l2).double(),
        "l1": 9 * torch.tensor(l2).double(),
    }
    save_state(tmp_path, "gradient_norms", {"optimizer": "AdamW"}, tensors)
    return tmp_path


def test_it_writes_the_schedule_and_a_plot(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "refine", str(run_dir)]) == 0
    found = json.loads((run_dir / "refined_schedule.json").read_text())
    expected = refined_schedule(recorded_norms(run_dir).l1, norm="l1").tolist()
    polynomial = vars(polynomial_decay(expected))
    assert found == {
        "norm": "l1",
        "tau": 0.1,
        "drop_zero": True,
        "optimizer": "AdamW",
        "polynomial": polynomial,
        "factors": expected,
    }
    assert (run_dir / "refined_schedule.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["nearest", "wrote", "wrote"]
    assert f"power {polynomial['power']:.3g} " in lines[0]


def test_options_reach_the_schedule(run_dir: Path) -> None:
    assert main(["schedule", "refine", str(run_dir), "--norm", "l2", "--tau", "0.3", "--keep-zero"]) == 0
    found = json.loads((run_dir / "refined_schedule.json").read_text())["factors"]
    norms = recorded_norms(run_dir).l2
    assert found == refined_schedule(norms, norm="l2", tau=0.3, drop_zero=False).tolist()
    assert found[-1] == 0.0
    whole = json.loads((run_dir / "refined_schedule.json").read_text())
    assert whole["polynomial"] == vars(polynomial_decay(found, drop_zero=False))


def test_a_peak_at_the_end_has_no_polynomial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Norms that fall by a factor of 4 with each update: most of the weight is on the last one.
    l2 = 4.0 ** -torch.arange(20.0).double()
    tensors = {"step": torch.arange(1, 21), "l1": l2, "l2": l2}
    save_state(tmp_path, "gradient_norms", {"optimizer": "AdamW"}, tensors)
    assert main(["schedule", "refine", str(tmp_path), "--tau", "0.01"]) == 0
    found = json.loads((tmp_path / "refined_schedule.json").read_text())
    assert found["polynomial"] == {"warmup": 0.95, "power": None, "rms_error": None}
    assert capsys.readouterr().out.startswith("nearest polynomial decay: none, the peak is at 0.95")


@pytest.mark.parametrize(
    ("options", "text"), [(["--tau", "0.9"], "tau must be in"), (["--norm", "l3"], "norm must be one of")]
)
def test_bad_options_are_one_line(
    options: list[str], text: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", "refine", str(run_dir), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hf-ext: error: {text}")
    assert error.count("\n") == 1


def record(folder: Path, count: int, **scalars: object) -> None:
    tensors = {name: torch.arange(1, count + 1) for name in ("step", "l1", "l2")}
    tensors |= {name: tensors[name].double() for name in ("l1", "l2")}
    save_state(folder, "gradient_norms", {"optimizer": "AdamW", **scalars}, tensors)


def test_norms_that_no_later_run_would_take_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 7)
    assert main(["schedule", "refine", str(tmp_path)]) == 2
    assert f"norms must be of at least 8 updates, got '{tmp_path}' (it holds 7)" in capsys.readouterr().err
    record(tmp_path, 30, done_steps=30, total_steps=40)
    assert main(["schedule", "refine", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "of a run that has come to its end (resume it, or give --allow-partial)" in error
    assert "(it holds the norms of 30 of 40 updates)" in error
    assert [path.suffix for path in tmp_path.glob("refined*")] == []
    assert main(["schedule", "refine", str(tmp_path), "--allow-partial"]) == 0
    assert capsys.readouterr().out.startswith("note: made of the norms of 30 of 40 updates alone\n")
    # Two updates were left out for overflows, but the run is whole.
    record(tmp_path, 38, done_steps=40, total_steps=40)
    assert main(["schedule", "refine", str(tmp_path)]) == 0
    assert "note" not in capsys.readouterr().out


def test_an_unknown_optimizer_and_a_missing_plot_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, 20, optimizer="Muon")
    monkeypatch.setattr("hf_ext.training.refine.find_spec", lambda _: None)
    assert main(["schedule", "refine", str(tmp_path)]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "does not know the optimizer Muon and takes l2" in notes[0]
    assert notes[1:] == ["note: no plot without matplotlib: pip install 'hf-ext[plot]'"]
    assert not (tmp_path / "refined_schedule.png").exists()


def test_a_folder_without_norms_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "refine", str(tmp_path)]) == 2
    assert "holds no recorded gradient norms" in capsys.readouterr().err
