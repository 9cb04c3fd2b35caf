"""A tiny comparison end to end: its numbers, resume after kill -9, one order for all methods, refusals."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_ext.cli import main
from hf_ext.training import comparison_runs, comparison_settings
from hf_ext.training.compare import Comparison, check_comparison, run_comparison
from hf_ext.training.comparison_report import Tuning, markdown
from hf_ext.training.comparison_runs import Bench, Record, Run, RunStore, WatchedTrainer, evaluation_steps
from hf_ext.training.comparison_settings import Method, read_methods, read_settings
from hf_ext.training.recipe import read_recipe

Recipes = Callable[..., str]
ROOT = Path(__file__).resolve().parents[2]
RATES = (1e-3, 1e-2)
SHARED = 3e-3
SEEDS = (3, 4)
COMPARE: dict[str, Any] = {
    "methods": ["lora", "sorsa"],
    "seeds": 2,
    "learning_rates": ["1e-2", 1e-3],
    "shared_learning_rate": SHARED,
    "tune_size": 6,
    "eval_points": 2,
}
TIMES = ("seconds", "step_seconds", "start_seconds")
PLANNED = 2 * len(RATES) + 2 * 2 * len(SEEDS)


@pytest.fixture(scope="session")
def compare_settings(settings: dict[str, Any]) -> dict[str, Any]:
    adapter = {"r": 4, "target_modules": "all-linear"}
    return {**settings, "adapter": adapter, "max_steps": 3, "compare": COMPARE, "logging_steps": 1}


@pytest.fixture
def compare_recipe(recipe: Recipes, compare_settings: dict[str, Any]) -> Recipes:
    """Return a function that writes the recipe with changes, also of keys of `compare`."""

    def write(compare: Any = None, **changes: Any) -> str:
        keys = {**COMPARE, **compare} if isinstance(compare, dict) else compare or COMPARE
        return recipe(**{**compare_settings, "compare": keys, **changes})

    return write


Batches = dict[tuple[str, float, int], list[torch.Tensor]]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, compare_settings: dict[str, Any]
) -> tuple[Path, Batches]:
    """Run the comparison once; return its folder, and the batches of each reported run."""
    folder = tmp_path_factory.mktemp("comparison")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**compare_settings, "output_dir": str(folder / "out")}))
    seen: Batches = defaultdict(list)
    train_step = WatchedTrainer.training_step

    def watched(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.args.eval_on_start:
            method = "sorsa" if any("sorsa" in name for name, _ in model.named_parameters()) else "lora"
            seen[method, self.args.learning_rate, self.args.seed].append(inputs["input_ids"].clone())
        return train_step(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WatchedTrainer, "training_step", watched)
        assert main(["compare", str(path)]) == 0
    return folder / "out", seen


def runs_in(folder: Path) -> dict[str, Record]:
    return json.loads((folder / "runs.json").read_text())["runs"]


def without_times(runs: dict[str, Record]) -> dict[str, Record]:
    return {key: {k: v for k, v in run.items() if k not in TIMES} for key, run in runs.items()}


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-ext: error:")]
    assert len(lines) == 1
    return lines[0]


# Results


def test_what_is_written(finished: tuple[Path, Batches]) -> None:
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {"runs.json", "comparison.json", "comparison.md", "comparison.png"}
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    runs = runs_in(folder).values()
    assert len(runs) == PLANNED
    assert {run["status"] for run in runs} == {"done"}
    assert all([step for step, _ in run["curve"]] == ([0, 2, 3] if run["split"] == "test" else [3])
               for run in runs)  # fmt: skip
    assert all(run["step_seconds"] > 0 and run["seconds"] > 3 * run["step_seconds"] for run in runs)
    assert {run["seed"] for run in runs if run["split"] == "tune"} == {1003}
    text = (folder / "comparison.md").read_text()
    assert "8 rows, mean of 2 seeds (3, 4) after training on 34 rows" in text
    assert "chosen from 0.001, 0.01 on 6 rows of the train split, held back, with seed 1003" in text


def test_the_numbers_follow_from_the_runs(finished: tuple[Path, Batches]) -> None:
    folder, _ = finished
    runs = list(runs_in(folder).values())
    summary = json.loads((folder / "comparison.json").read_text())
    assert summary["seeds"] == list(SEEDS)
    best: dict[str, float] = {}
    for method in ("lora", "sorsa"):
        tuning = [run for run in runs if run["split"] == "tune" and run["method"] == method]
        assert sorted(run["learning_rate"] for run in tuning) == list(RATES)
        best[method] = min(tuning, key=lambda run: run["curve"][0][1])["learning_rate"]
        assert summary["methods"][method]["best"] == best[method]
    for part, rate_of in (("tuned", best), ("shared", dict.fromkeys(best, SHARED))):
        assert [row["method"] for row in summary[part]] == ["lora", "sorsa"]
        means: dict[str, dict[int, float]] = {}
        for row in summary[part]:
            method = row["method"]
            own = [
                run
                for run in runs
                if run["split"] == "test" and run["method"] == method
                and run["learning_rate"] == rate_of[method]
            ]  # fmt: skip
            assert sorted(run["seed"] for run in own) == list(SEEDS)
            means[method] = {
                step: sum(dict(map(tuple, run["curve"]))[step] for run in own) / 2 for step in (0, 2, 3)
            }
            ends = [run["curve"][-1][1] for run in own]
            assert row["mean"] == pytest.approx(means[method][3], abs=1e-12)
            assert (row["min"], row["max"]) == (min(ends), max(ends))
            assert row["curve"]["mean"] == pytest.approx(list(means[method].values()), abs=1e-12)
            assert row["trainable_parameters"] == own[0]["trainable_parameters"]
            step = statistics.median(run["step_seconds"] for run in own)
            start = statistics.median(
                r["start_seconds"]["injection"] + r["start_seconds"]["data"] for r in own
            )
            reached = [step for step in (0, 2, 3) if means[method][step] <= means["lora"][3]]
            assert row["target_steps"] == (reached[0] if reached else None)
            if reached:
                assert row["target_seconds"] == pytest.approx(start + reached[0] * step)
                assert row["target_ratio"] == reached[0] / summary[part][0]["target_steps"]
            assert row["step_ratio"] == pytest.approx(step / summary[part][0]["step_seconds"])
        assert summary[part][0]["target_steps"] == 3  # the losses fall, so only the end reaches the end


def test_counts_of_parameters_and_optimizer_state(finished: tuple[Path, Batches]) -> None:
    folder, _ = finished
    # Per block of the tiny model: q and o 32x32, k and v 16x32, gate, up and down 64x32.
    sides = 2 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (64 + 32))
    matrices = {"lora": 2 * 7 * 2, "sorsa": 2 * 7 * 3}
    wanted = {"lora": 4 * sides, "sorsa": 4 * sides + 4 * 14}
    for run in runs_in(folder).values():
        assert run["trainable_parameters"] == wanted[run["method"]]
        # Two fp32 moments for each number, and Adam's step count for each tensor.
        expected = 8 * wanted[run["method"]] + 4 * matrices[run["method"]]
        assert run["optimizer_state_bytes"] == expected


def test_all_methods_are_given_the_same_batches(finished: tuple[Path, Batches]) -> None:
    folder, seen = finished
    assert {method for method, _, _ in seen} == {"lora", "sorsa"}
    by_seed: dict[int, list[list[torch.Tensor]]] = defaultdict(list)
    for (_, _, seed), batches in seen.items():
        assert len(batches) == 3
        by_seed[seed].append(batches)
    assert set(by_seed) == set(SEEDS)
    for first, *others in by_seed.values():
        assert others
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(by_seed[3][0][0], by_seed[4][0][0])
    digests = {(run["seed"], run["batches"]) for run in runs_in(folder).values()}
    assert len(digests) == 3  # one for each seed: two reported, one for the rates


def test_a_method_that_is_given_other_batches_ends_the_comparison(
    compare_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = comparison_runs.start_from_data

    def disturb(trainer: Any) -> None:
        start(trainer)
        if trainer.args.learning_rate == 1e-2:
            trainer.accelerator.dataloader_config.data_seed += 1

    monkeypatch.setattr(comparison_runs, "start_from_data", disturb)
    assert main(["compare", compare_recipe()]) == 1
    assert "tune lora lr 0.01 seed 1003 was given other batches than tune lora lr 0.001" in error_of(capsys)


def test_a_run_is_that_of_train(finished: tuple[Path, Batches], recipe: Recipes, tmp_path: Path) -> None:
    adapter = {"type": "lora", "r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
    changes = {"adapter": adapter, "learning_rate": SHARED, "max_steps": 3, "save_strategy": "no"}
    # Without the rows that the comparison has held back: the same training rows, cut in the same way.
    rows = [json.loads(line) for line in Path(str(yaml.safe_load(
        Path(recipe()).read_text())["dataset_name"])).read_text().splitlines()]  # fmt: skip
    from datasets import Dataset

    parts = Dataset.from_list(rows).train_test_split(test_size=8, seed=3)
    kept = parts["train"].train_test_split(test_size=6, seed=3)["train"]
    folder = tmp_path / "data"
    folder.mkdir()
    from datasets import DatasetDict

    DatasetDict({"train": kept, "test": parts["test"]}).save_to_disk(str(folder))
    changes |= {"dataset_name": str(folder), "dataset_test_size": None, "dataset_test_split": "test"}
    path = recipe(**changes, export_lora=None, merge=None, generate_samples=None, verify_outputs=False)
    assert main(["train", path]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (run,) = [
        run
        for run in runs_in(finished[0]).values()
        if (run["method"], run["learning_rate"], run["seed"]) == ("lora", SHARED, 3)
    ]
    assert run["train_loss"] == metrics["train_loss"]
    # The rows are evaluated one at a time in both, in another order: one rounding of their mean.
    assert run["curve"][0][1] == pytest.approx(metrics["eval_loss_before"], abs=1e-6)
    assert run["curve"][-1][1] == pytest.approx(metrics["eval_loss_after"], abs=1e-6)
    assert run["curve"][-1][1] < run["curve"][0][1]


# Resume


def killed_in_run(number: int, arguments: list[str]) -> int:
    """Run the command in a forked process that kills itself in the middle of one run; return how it ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    begun = 0
    train_once, training_step = Bench.train_once, WatchedTrainer.training_step

    def counted(self: Bench, run: Run) -> Record:
        nonlocal begun
        begun += 1
        return train_once(self, run)

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if begun == number and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *args, **kwargs)

    try:
        Bench.train_once, WatchedTrainer.training_step = counted, killed  # type: ignore[method-assign]
        main(arguments)
    finally:
        os._exit(1)  # pytest is the parent's


def test_resume_after_kill_repeats_nothing(
    finished: tuple[Path, Batches],
    compare_recipe: Recipes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = compare_recipe()
    assert os.WTERMSIG(killed_in_run(6, ["compare", path])) == signal.SIGKILL
    kept = runs_in(tmp_path / "out")
    assert len(kept) == 5
    done: list[str] = []
    train_once = Bench.train_once
    monkeypatch.setattr(Bench, "train_once", lambda self, run: done.append(str(run)) or train_once(self, run))
    assert main(["compare", path, "--disable_tqdm", "false"]) == 0
    assert len(done) == PLANNED - 5
    ours = runs_in(tmp_path / "out")
    assert {key: ours[key] for key in kept} == kept
    # Equal seeds, equal results, in another process too.
    assert without_times(ours) == without_times(runs_in(finished[0]))
    printed, progress = capsys.readouterr()
    assert f"{PLANNED}/{PLANNED} [" in progress
    assert len(re.findall(r"^(?:tune|test) \w+ lr .* seed \d+: \d\.\d{4} \(\d+\.\d s\)$", printed, re.M)) == 7
    assert main(["compare", path]) == 0
    assert len(done) == PLANNED - 5


@pytest.fixture(scope="module")
def bench(finished: tuple[Path, Batches], compare_settings: dict[str, Any]) -> tuple[Comparison, Bench]:
    path = finished[0].parent / "recipe.yaml"
    comparison = check_comparison(read_recipe(path))
    return comparison, bench_of(comparison)


def bench_of(c: Comparison) -> Bench:
    return Bench(
        c.job, c.args, c.tokenizer, c.train, {"tune": c.tune, "test": c.test}, c.settings.eval_points
    )


def keys_of(c: Comparison) -> set[str]:
    ready = bench_of(c)
    return {
        ready.key(Run(method, rate, seed, "test"))
        for method in c.methods for rate in method.learning_rates for seed in SEEDS
    }  # fmt: skip


CHANGED: dict[str, tuple[dict[str, Any], bool]] = {
    "steps": ({"max_steps": 4}, False),
    "batch size": ({"per_device_train_batch_size": 2}, False),
    "schedule": ({"lr_scheduler_type": "cosine"}, False),
    "rank": ({"adapter": {"r": 2, "target_modules": "all-linear"}}, False),
    "targets": ({"adapter": {"r": 4, "target_modules": ["q_proj"]}}, False),
    "length": ({"max_length": 24}, False),
    "rows held back": ({"compare": {"tune_size": 5}}, False),
    "evaluations": ({"compare": {"eval_points": 1}}, False),
    "dtype": ({"dtype": "bfloat16"}, False),
    "place": ({"output_dir": "elsewhere"}, True),
    "logging": ({"logging_steps": 7, "save_steps": 9, "report_to": "none"}, True),
    "grid": ({"compare": {"learning_rates": [1e-3, 1e-2, 1e-1]}}, True),
    "labels": ({"compare": {"methods": {"lora": None, "mine": {"type": "sorsa"}}}}, True),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_recipe_reuses_only_what_it_does_not_change(
    bench: tuple[Comparison, Bench], compare_recipe: Recipes, case: str
) -> None:
    changes, same = CHANGED[case]
    before = {
        bench[1].key(Run(method, rate, seed, "test"))
        for method in bench[0].methods for rate in RATES for seed in SEEDS
    }  # fmt: skip
    assert len(before) == 8
    after = keys_of(check_comparison(read_recipe(compare_recipe(**changes))))
    assert (before <= after) if same else not (before & after)


def test_changed_rows_and_changed_weights_are_not_reused(
    bench: tuple[Comparison, Bench],
    rows_file: Path,
    model_folder: Path,
    compare_recipe: Recipes,
    tmp_path: Path,
) -> None:
    before = {bench[1].key(Run(m, rate, 3, "test")) for m in bench[0].methods for rate in RATES}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows_file.read_text().replace("Return x plus 7.", "Return x plus seven."))
    assert not before & keys_of(check_comparison(read_recipe(compare_recipe(dataset_name=str(rows)))))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    changed = compare_recipe(model_name_or_path=str(tmp_path / "model"))
    assert not before & keys_of(check_comparison(read_recipe(changed)))


def test_a_damaged_file_of_runs_is_refused(
    tmp_path: Path, compare_recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out" / "runs.json"
    place.parent.mkdir()
    for text in ('{"format": 1, "ru', '{"format": 0, "runs": {}}', "[]"):
        place.write_text(text)
        assert main(["compare", compare_recipe()]) == 2
        assert str(place) in error_of(capsys)
        assert place.read_text() == text


def test_an_error_is_tried_again_and_a_divergence_is_not(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs.json")
    for status in ("done", "diverged", "error"):
        store.put(status, {"status": status})
    again = RunStore(tmp_path / "runs.json")
    assert again.get("done") == {"status": "done"}
    assert again.get("diverged") == {"status": "diverged"}
    assert again.get("error") is None
    assert again.get("other") is None


# Failures


def test_a_rate_that_diverges_is_recorded_and_passed_over(
    compare_recipe: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"methods": {"lora": None, "wild": {"type": "lora", "learning_rates": [1e30]}}}
    keys |= {"learning_rates": [1e-3, 1e30], "seeds": 1, "shared_learning_rate": None}
    assert main(["compare", compare_recipe(keys, max_grad_norm=0.0)]) == 0
    tuning = [run for run in runs_in(tmp_path / "out").values() if run["split"] == "tune"]
    assert [run["status"] for run in tuning if run["learning_rate"] == 1e30] == ["diverged", "diverged"]
    assert all("loss nan" in run["reason"] or "loss inf" in run["reason"] for run in tuning
               if run["learning_rate"] == 1e30)  # fmt: skip
    summary = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert summary["methods"]["lora"]["best"] == 1e-3
    assert summary["tuned"][0]["failed"] is None
    assert "no rate of its grid works (1e+30:" in summary["tuned"][1]["failed"]
    assert summary["shared"] is None
    printed = capsys.readouterr().out
    for place in (printed, (tmp_path / "out" / "comparison.md").read_text()):
        assert re.search(r"lora: failed at 1e\+30: (training|held-out) loss", place)
        assert "lora: the best rate, 0.001, is the lowest of its grid: a smaller one may be better" in place
        assert "| wild | (its own: 1e+30) | failed: no rate of its grid works" in place


def test_no_method_at_all(
    compare_recipe: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"methods": ["lora"], "learning_rates": [1e30], "seeds": 1}
    assert main(["compare", compare_recipe(keys, max_grad_norm=0.0)]) == 1
    assert "no method has finished: no rate of its grid works" in error_of(capsys)
    assert "failed" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_method_that_raises_does_not_end_the_others(
    compare_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = comparison_runs.start_from_data

    def broken(trainer: Any) -> None:
        if any("sorsa" in name for name, _ in trainer.model.named_parameters()):
            raise RuntimeError("no decomposition")
        start(trainer)

    path = compare_recipe({"seeds": 1, "learning_rates": [1e-3], "shared_learning_rate": None})
    with monkeypatch.context() as patch:
        patch.setattr(comparison_runs, "start_from_data", broken)
        assert main(["compare", path]) == 0
    row = json.loads((tmp_path / "out" / "comparison.json").read_text())["tuned"][1]
    assert "RuntimeError: no decomposition" in row["failed"]
    # Mended, it runs.
    assert main(["compare", path]) == 0
    row = json.loads((tmp_path / "out" / "comparison.json").read_text())["tuned"][1]
    assert row["failed"] is None


def test_a_full_disk_ends_the_comparison(
    compare_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(28, f"cannot write {path}: No space left on device")

    monkeypatch.setattr(comparison_runs, "write_json", full)
    assert main(["compare", compare_recipe()]) == 1
    assert "runs.json: No space left on device" in error_of(capsys)


# Numbers by hand


def test_evaluation_steps() -> None:
    assert evaluation_steps(60, 6) == [10, 20, 30, 40, 50, 60]
    assert evaluation_steps(7, 3) == [3, 5, 7]
    assert evaluation_steps(2, 5) == [1, 2]
    assert evaluation_steps(5, 1) == [5]


def run_of(loss: float | None, seed: int = 0, curve: list[list[float]] | None = None) -> Record:
    return {
        "status": "diverged" if loss is None else "done",
        "reason": "training loss nan at step 1", "seed": seed,
        "curve": curve or [[4, loss]], "learning_rate": 1e-3, "trainable_parameters": 12, "seconds": 9.0,
        "optimizer_state_bytes": 100, "step_seconds": 0.5, "start_seconds": {"injection": 1.0, "data": 2.0},
    }  # fmt: skip


def test_the_edge_of_a_grid() -> None:
    for losses, best, edge in (
        ((2.0, 1.0, 3.0), 2.0, None),
        ((1.0, 2.0, 3.0), 1.0, "lowest"),
        ((3.0, 2.0, 1.0), 3.0, "highest"),
        ((None, 2.0, None), 2.0, None),
        ((None, None, None), None, None),
    ):
        tuning = Tuning({float(rate): run_of(loss) for rate, loss in zip((1, 2, 3), losses, strict=True)})
        assert (tuning.best, tuning.edge) == (best, edge)
    assert Tuning({1.0: run_of(2.0)}).edge == "only"
    assert Tuning({1.0: run_of(2.0)}).notes("a") == ["a: 1 is the only rate that was tried"]


def test_time_to_target_by_hand(bench: tuple[Comparison, Bench]) -> None:
    from hf_ext.training.comparison_report import Results, summarize

    c = bench[0]
    methods = [Method(name, {"type": name}, RATES, False) for name in ("lora", "fast", "slow", "dead")]
    curves = {
        "lora": ([[0, 4.0], [2, 3.0], [4, 2.0]], [[0, 4.0], [2, 3.0], [4, 1.0]]),  # ends at 1.5
        "fast": ([[0, 4.0], [2, 1.0], [4, 1.0]], [[0, 4.0], [2, 2.0], [4, 3.0]]),  # 1.5 at step 2
        "slow": ([[0, 4.0], [2, 3.0], [4, 2.0]], [[0, 4.0], [2, 3.0], [4, 2.0]]),
    }
    runs = {
        name: [run_of(1.0, seed, curve) for seed, curve in enumerate(both)] for name, both in curves.items()
    }
    runs["dead"] = [run_of(1.0, 0, curves["slow"][0]), run_of(None, 1)]
    tuning = {method.label: Tuning({1e-3: run_of(1.0)}) for method in methods}
    results = Results(
        job=c.job, settings=replace(c.settings, shared_learning_rate=None), methods=methods, seeds=[0, 1],
        tune_seed=9, rows={"train": 1, "tune": 1, "test": 1}, dataset="rows", tuning=tuning, tuned=runs,
        shared=None, versions={},
    )  # fmt: skip
    summary = summarize(results)
    rows = {row["method"]: row for row in summary["tuned"]}
    assert [rows[name].get("mean") for name in ("lora", "fast", "slow")] == [1.5, 2.0, 2.0]
    assert rows["fast"]["curve"] == {"steps": [0, 2, 4], "mean": [4.0, 1.5, 2.0], "min": [4.0, 1.0, 1.0],
                                     "max": [4.0, 2.0, 3.0]}  # fmt: skip
    assert [rows[name]["target_steps"] for name in rows] == [4, 2, None, None]
    assert [rows[name]["target_ratio"] for name in rows] == [1.0, 0.5, None, None]
    assert [rows[name]["target_seconds"] for name in rows] == [5.0, 4.0, None, None]
    assert rows["dead"]["failed"] == "1 of 2 seeds (seed 1: training loss nan at step 1)"
    text = markdown(summary)
    assert "| fast | 0.001 (only of the grid) | 2.0000 | 1.0000 to 3.0000 | 2 | 0.50 | 4.0 | 12 |" in text
    assert "| slow | 0.001 (only of the grid) | 2.0000 | 2.0000 to 2.0000 | not reached |" in text


# Settings


def test_the_methods_settings(compare_recipe: Recipes) -> None:
    methods = {
        "lora": None,
        "dora": {"r": 2},
        "sorsa": {"gamma": 0.0, "learning_rates": ["3e-2"]},
        "full": None,
    }
    methods |= {"mine": {"type": "lora", "use_rslora": True}, "ia3": None}
    job = read_recipe(compare_recipe({"methods": methods}))
    found = {method.label: method for method in read_methods(job, read_settings(job))}
    shared = {"target_modules": "all-linear"}
    assert {label: method.adapter for label, method in found.items()} == {
        "lora": {"type": "lora", "r": 4, "lora_alpha": 4, **shared},
        "dora": {"type": "lora", "use_dora": True, "r": 2, "lora_alpha": 2, **shared},
        "sorsa": {"type": "sorsa", "gamma": 0.0, "r": 4, **shared},
        "full": {"type": "none"},
        "mine": {"type": "lora", "r": 4, "use_rslora": True, **shared},
        "ia3": {"type": "ia3", **shared},  # it has no r
    }
    assert found["lora"].learning_rates == RATES
    assert (found["sorsa"].learning_rates, found["sorsa"].own_grid) == ((3e-2,), True)
    chosen = read_methods(job, read_settings(job), ["full", "mine", "pissa"])
    assert [method.label for method in chosen] == ["full", "mine", "pissa"]


def test_an_ordinary_recipe_compares_its_adapter_with_lora(recipe: Recipes) -> None:
    job = read_recipe(recipe(adapter={"type": "sorsa", "r": 4, "gamma": 0.5}))
    settings = read_settings(job)
    lora, own = read_methods(job, settings)
    assert lora.adapter == {"type": "lora", "r": 4, "lora_alpha": 4}
    assert own.adapter == {"type": "sorsa", "r": 4, "gamma": 0.5}
    assert (settings.seeds, settings.learning_rates) == (3, [1e-4, 3e-4, 1e-3, 3e-3])


def test_the_example_says_what_it_means() -> None:
    job = read_recipe(ROOT / "examples" / "compare.yaml")
    settings = read_settings(job)
    assert isinstance(settings.methods, dict)
    wanted = "lora dora pissa sorsa bone bone_mini bone_bat loldu eva lora_ga full"
    assert " ".join(settings.methods) == wanted
    assert (settings.tune_split, job.recipe.dataset_test_split) == ("validation", "test")
    found = read_methods(job, settings, ["lora", "full"])
    assert found[0].adapter == {"type": "lora", "r": 16, "target_modules": "all-linear", "lora_alpha": 16}


def test_every_known_method_passes_the_checks(compare_recipe: Recipes) -> None:
    # LoLDU's checkpoints leave out what is computed from the weights, of which there are none yet.
    example = read_recipe(ROOT / "examples" / "compare.yaml").recipe.compare or {}
    job = read_recipe(compare_recipe({"methods": list(example["methods"])}))
    comparison = check_comparison(job)
    assert [method.label for method in comparison.methods] == list(example["methods"])
    assert (len(comparison.train), len(comparison.tune), len(comparison.test)) == (34, 6, 8)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"compare": {"seed": 1}}, ["compare.'seed'", "'seeds'"]),
    "type": ({"compare": {"seeds": "many"}}, ["compare.seeds must be int", "'many'"]),
    "not a mapping": ({"compare": ["lora"]}, ["compare must be", "list ['lora']"]),
    "no seeds": ({"compare": {"seeds": 0}}, ["compare.seeds must be at least 1, got 0"]),
    "no points": ({"compare": {"eval_points": 0}}, ["compare.eval_points must be at least 1"]),
    "empty grid": ({"compare": {"learning_rates": []}}, ["compare.learning_rates must be at least one"]),
    "zero in the grid": (
        {"compare": {"learning_rates": [1e-3, 0.0]}},
        ["compare.learning_rates", "positive"],
    ),
    "infinite": ({"compare": {"learning_rates": [float("inf")]}}, ["compare.learning_rates", "finite"]),
    "twice": ({"compare": {"learning_rates": [1e-3, "1e-3"]}}, ["compare.learning_rates", "repetitions"]),
    "text in the grid": (
        {"compare": {"learning_rates": ["fast"]}},
        ["compare.learning_rates must be", "fast"],
    ),
    "a number for a grid": ({"compare": {"learning_rates": 1e-3}}, ["compare.learning_rates must be list"]),
    "shared rate": (
        {"compare": {"shared_learning_rate": -1.0}},
        ["compare.shared_learning_rate", "positive"],
    ),
    "tune on the test split": (
        {
            "dataset_test_size": None,
            "dataset_test_split": "test",
            "compare": {"tune_size": None, "tune_split": "test"},
        },
        ["compare.tune_split must be another split than dataset_test_split"],
    ),
    "tune on the train split": (
        {"compare": {"tune_size": None, "tune_split": "train"}},
        ["compare.tune_split must be another split than dataset_train_split"],
    ),
    "split and size": (
        {"compare": {"tune_split": "validation"}},
        ["compare.tune_size", "compare.tune_split"],
    ),
    "no such split": (
        {"compare": {"tune_size": None, "tune_split": "valid"}},
        ["compare.tune_split 'valid'"],
    ),
    "too many rows to tune": ({"compare": {"tune_size": 40}}, ["compare.tune_size must be below 40", "40"]),
    "tuning with a reported seed": ({"compare": {"tune_seed": 4}}, ["compare.tune_seed", "[3, 4]"]),
    "no held-out rows": ({"dataset_test_size": None}, ["dataset_test_split must be given"]),
    "no methods": ({"compare": {"methods": []}}, ["compare.methods must be at least one"]),
    "method": ({"compare": {"methods": ["lora", "sorso"]}}, ["method 'sorso' is unknown", "'sorsa'"]),
    "method twice": ({"compare": {"methods": ["lora", "lora"]}}, ["compare.methods", "repetitions"]),
    "unknown label": ({"compare": {"methods": {"full_": None}}}, ["method 'full_' is unknown", "'full'"]),
    "label without type": (
        {"compare": {"methods": {"mine": {"r": 2}}}},
        ["compare.methods.mine.type must be"],
    ),
    "label's type": (
        {"compare": {"methods": {"mine": {"type": "lorra"}}}},
        ["compare.methods.mine.type 'lorra' is unknown", "'lora'"],
    ),
    "type of a known name": (
        {"compare": {"methods": {"lora": {"type": "sorsa"}}}},
        ["compare.methods.lora.type must be left out"],
    ),
    "settings of a method": (
        {"compare": {"methods": {"lora": 3}}},
        ["compare.methods.lora must be settings"],
    ),
    "field of a method": (
        {"compare": {"methods": {"sorsa": {"gama": 1.0}}}},
        ["compare.methods.sorsa.'gama'", "'gamma'"],
    ),
    "value of a method": (
        {"compare": {"methods": {"sorsa": {"gamma": -1.0}}}},
        ["compare.methods.sorsa.gamma must be at least 0"],
    ),
    "field of full": ({"compare": {"methods": {"full": {"r": 4}}}}, ["compare.methods.full", "'r'"]),
    "own grid": (
        {"compare": {"methods": {"lora": {"learning_rates": []}}}},
        ["compare.methods.lora.learning_rates must be at least one"],
    ),
    "own grid's type": (
        {"compare": {"methods": {"lora": {"learning_rates": "1e-3"}}}},
        ["compare.methods.lora.learning_rates must be list"],
    ),
    "field that reaches no method": (
        {"adapter": {"r": 4, "gamma": 1.0}},
        ["adapter.gamma would reach no method"],
    ),
    "shared field": (
        {"adapter": {"r": 4, "target_modules": ["v_prj"]}},
        ["compare.methods.lora.target_modules", "'v_prj' matches no layer", "'v_proj'"],
    ),
    "rank": (
        {"adapter": {"r": 17, "target_modules": "all-linear"}, "compare": {"methods": ["sorsa"]}},
        ["compare.methods.sorsa.r must be at most 16", "17"],
    ),
    "resume": ({"resume_from_checkpoint": True}, ["resume_from_checkpoint must be left out"]),
    "length": ({"max_length": 65}, ["max_length must be at most 64"]),
    "key of the trainer": ({"learning_rte": 1.0}, ["'learning_rte'", "'learning_rate'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_fault_is_one_line_that_names_the_field(
    case: str, compare_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    changes, named = BAD[case]
    path = compare_recipe(**copy.deepcopy(changes))
    assert main(["compare", path]) == 2
    error = error_of(capsys)
    for part in named:
        assert part in error
    assert not Path(path).with_name("out").exists()


def test_the_command_line(compare_recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    path = compare_recipe()
    for arguments, named in (
        (["--methods", "lora,sorsaa"], "--methods: method 'sorsaa' is unknown; did you mean 'sorsa'"),
        (["--methods", "lora,,sorsa"], "--methods must be names with commas between them"),
        (["--methods", "lora,lora"], "given once"),
        (["--compare.sed", "3"], "unknown field compare.'sed'; did you mean 'seeds'"),
        (["--compare.seeds", "0"], "compare.seeds must be at least 1"),
        (["--num_processes", "2"], "unknown field 'num_processes'"),
    ):
        assert main(["compare", path, *arguments]) == 2
        assert named in error_of(capsys)
    job = read_recipe(path, ["--compare.seeds", "5", "--compare.learning_rates", "[1e-4, 1e-3]"])
    settings = read_settings(job)
    assert (settings.seeds, settings.learning_rates, settings.eval_points) == (5, [1e-4, 1e-3], 2)


def test_a_method_that_is_not_installed_is_named(
    compare_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    types = {name: config for name, config in comparison_settings.adapter_types().items() if name != "eva"}
    monkeypatch.setattr(comparison_settings, "adapter_types", lambda: types)
    assert main(["compare", compare_recipe(), "--methods", "lora,eva"]) == 2
    assert "compare.methods.eva: the adapter type 'eva' is not installed" in error_of(capsys)


def test_more_processes_are_refused(
    compare_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trl.trainer.sft_config import SFTConfig

    monkeypatch.setattr(SFTConfig, "world_size", property(lambda self: 2))
    assert main(["compare", compare_recipe()]) == 2
    assert "world size must be 1: a comparison runs in one process" in error_of(capsys)


def test_train_refuses_the_key(compare_recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = {"type": "sorsa", "r": 4, "target_modules": "all-linear"}
    assert main(["train", compare_recipe(adapter=adapter)]) == 2
    assert "compare must be left out of a recipe to train" in error_of(capsys)


def test_a_start_from_data_is_part_of_the_run(compare_recipe: Recipes, tmp_path: Path) -> None:
    keys = {
        "methods": {"lora_ga": {"r": 2}},
        "seeds": 1,
        "learning_rates": [1e-3],
        "shared_learning_rate": None,
    }
    comparison = check_comparison(read_recipe(compare_recipe(keys)))
    summary = run_comparison(comparison)
    assert summary["tuned"][0]["failed"] is None
    runs = runs_in(tmp_path / "out").values()
    assert all(run["start_seconds"]["data"] > run["start_seconds"]["injection"] / 100 > 0 for run in runs)
    assert summary["tuned"][0]["curve"]["mean"][-1] < summary["tuned"][0]["curve"]["mean"][0]
