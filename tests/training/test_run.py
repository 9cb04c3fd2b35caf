"""The whole job on a random tiny model: outputs, card, resume after kill -9, two processes, failures."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hf_ext.cli import main
from hf_ext.core.files import read_tensors

Recipes = Callable[..., str]
DEADLINE = 300  # seconds; a process that hangs fails the test


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    """Run the recipe once, and return its output_dir."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**settings, "output_dir": str(folder / "out")}))
    assert main(["train", str(path)]) == 0
    return folder / "out"


def start(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the checkout on its path, and return what it did."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=environment,
        check=False,
    )


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("hf-ext: error:")]


def test_metrics(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.1
    assert metrics["world_size"] == 1
    assert metrics["steps"] == 10
    assert metrics["seed"] == 3
    assert metrics["resumed_from"] is None
    assert set(metrics["logit_difference"]) == {"adapter", "lora", "merged"}
    assert metrics["logit_difference"]["adapter"] == 0.0
    assert max(metrics["logit_difference"].values()) < 1e-4
    assert len(metrics["samples"]) == 1
    assert metrics["versions"]["trl"]


def test_folders(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"adapter", "lora", "merged", "metrics.json", "checkpoint-10"} <= names
    assert "README.md" not in names  # TRL's card
    assert json.loads((finished / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for name in ("adapter", "lora", "merged"):
        assert {"README.md", "loss.png", "tokenizer.json"} <= {p.name for p in (finished / name).iterdir()}
        assert (finished / name / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_logs_carry_the_adapters_own_numbers(finished: Path) -> None:
    history = json.loads((finished / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 5
    assert all(0.0 < entry["orthonormality"] < 10.0 for entry in logged)
    assert not any("orthonormality" in entry for entry in history if "eval_loss" in entry)


def test_card(finished: Path, model_folder: Path) -> None:
    card = ModelCard.load(finished / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder of this machine
    assert {"sorsa", "hf_ext", "sft"} <= set(card.data.tags)
    assert not any(tag.startswith("base_model:") for tag in card.data.tags)
    assert card.data.eval_results[0].metric_value > 0
    for part in (
        "import hf_ext",
        "PeftModel.from_pretrained",
        "loss.png",
        "| adapter.r | 4 |",
        "| eval_loss_after |",
    ):
        assert part in card.text
    assert str(model_folder) not in card.content
    merged = ModelCard.load(finished / "merged" / "README.md")
    assert merged.data.library_name == "transformers"
    assert "import hf_ext" not in merged.text
    assert "import hf_ext" not in ModelCard.load(finished / "lora" / "README.md").text


def test_the_merged_model_needs_no_library_of_ours(finished: Path) -> None:
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder = sys.argv[1]\nmodel = AutoModelForCausalLM.from_pretrained(folder)\n"
        "ids = AutoTokenizer.from_pretrained(folder)('def f(x):', return_tensors='pt')['input_ids']\n"
        "assert torch.isfinite(model(ids).logits).all() and 'hf_ext' not in sys.modules"
    )
    assert start(["-c", script, str(finished / "merged")]).returncode == 0


def test_export_lora_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export-lora", str(finished / "adapter"), str(tmp_path / "lora")]) == 0
    ours, run = (
        read_tensors(d / "adapter_model.safetensors") for d in (tmp_path / "lora", finished / "lora")
    )
    assert ours.keys() == run.keys()
    assert all(torch.equal(tensor, run[name]) for name, tensor in ours.items())
    assert main(["export-lora", str(finished / "adapter"), str(tmp_path / "lora"), "--rank", "0"]) == 2
    assert "rank must be None or at least 1, got 0" in error_lines(capsys.readouterr().err)[0]
    assert main(["export-lora", str(tmp_path / "nothing"), str(tmp_path / "lora")]) == 2
    assert str(tmp_path / "nothing") in error_lines(capsys.readouterr().err)[0]


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from hf_ext.training import run

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:  # one step after checkpoint-4
            os.kill(os.getpid(), signal.SIGKILL)

build = run.build_trainer
def with_kill(ready):
    trainer = build(ready)
    trainer.add_callback(Kill())
    return trainer
run.build_trainer = with_kill
from hf_ext.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    """Kill the same run in the middle, and return its recipe."""
    folder = tmp_path_factory.mktemp("killed")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**settings, "output_dir": str(folder / "out")}))
    assert start(["-c", KILLED, "train", str(path)]).returncode == -signal.SIGKILL
    assert {p.name for p in (folder / "out").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    return path


def test_resume_after_kill_is_bit_equal(
    killed: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = killed.parent / "out"
    # A save that the kill would have torn: a newer checkpoint without its last part.
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-6")
    torn = out / "checkpoint-6" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-200])
    assert main(["train", str(killed), "--resume_from_checkpoint", "true"]) == 0
    printed = capfd.readouterr().out
    assert f"{torn} is truncated or damaged" in printed
    assert f"resuming from {out / 'checkpoint-4'}" in printed
    ours, whole = (read_tensors(d / "adapter" / "adapter_model.safetensors") for d in (out, finished))
    assert ours.keys() == whole.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, whole[name]), name
    here, there = (json.loads((d / "metrics.json").read_text()) for d in (out, finished))
    assert here["resumed_from"] == "checkpoint-4"
    for key in ("eval_loss_before", "eval_loss_after", "samples"):
        assert here[key] == there[key]


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"],
)
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(
    finished: Path, tmp_path: Path, recipe: Recipes, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / "checkpoint-4"
    shutil.copytree(finished / "checkpoint-4", path)
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: len(whole) // 2])
    assert main(["train", recipe(resume_from_checkpoint=str(path))]) == 2
    assert f"{path / name}" in error_lines(capsys.readouterr().err)[0]
    (path / name).unlink()
    assert main(["train", recipe(resume_from_checkpoint=str(path))]) == 2
    assert f"{name} is missing" in error_lines(capsys.readouterr().err)[0]


def test_a_fresh_run_does_not_mix_with_an_old_one(
    tmp_path: Path, recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "out" / "checkpoint-80"
    old.mkdir(parents=True)
    assert main(["train", recipe()]) == 2
    assert "already holds checkpoint-80" in error_lines(capsys.readouterr().err)[0]
    quick = {
        "overwrite_output_dir": True,
        "max_steps": 1,
        "adapter": None,
        "export_lora": None,
        "merge": None,
    }
    assert main(["train", recipe(**quick)]) == 0
    assert not old.exists()
    # Full fine-tuning writes a model instead of an adapter.
    card = ModelCard.load(tmp_path / "out" / "model" / "README.md")
    assert card.data.library_name == "transformers"
    assert "AutoModelForCausalLM.from_pretrained" in card.text


def test_pefts_own_adapters_run_too(tmp_path: Path, recipe: Recipes) -> None:
    adapter = {"type": "lora", "r": 2, "target_modules": ["q_proj"]}
    assert (
        main(["train", recipe(adapter=adapter, max_steps=2, export_lora=None, dataset_test_size=None)]) == 0
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["adapter"] == "lora"
    assert set(metrics["logit_difference"]) == {"adapter", "merged"}
    assert "import hf_ext" not in (tmp_path / "out" / "adapter" / "README.md").read_text()


# Failures of the work


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Make writes beyond a size fail as on a full disk (Python ignores the signal that goes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def with_old_results(finished: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    for name in ("adapter", "lora", "merged"):
        shutil.copytree(finished / name, out / name)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_full_disk_leaves_the_old_results(
    with_old_results: Path, recipe: Recipes, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    before = contents(with_old_results)
    path = recipe(max_steps=2, save_strategy=strategy)
    with files_of_at_most(20_000):
        assert main(["train", path]) == 1
    errors = error_lines(capsys.readouterr().err)
    assert len(errors) == 1
    assert str(with_old_results) in errors[0]
    after = contents(with_old_results)
    assert {name: data for name, data in after.items() if not name.startswith("checkpoint-")} == before


def test_an_inexact_export_is_not_put_in_place(
    with_old_results: Path,
    recipe: Recipes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hf_ext.adapters import export

    exact = export.export_to_lora
    monkeypatch.setattr(export, "export_to_lora", lambda source, out: exact(source, out, rank=1))
    before = contents(with_old_results / "lora")
    assert main(["train", recipe(max_steps=4, learning_rate=0.3)]) == 1
    errors = error_lines(capsys.readouterr().err)
    assert str(with_old_results / "lora") in errors[0]
    assert "logits are off by" in errors[0]
    assert contents(with_old_results / "lora") == before


def test_a_diverged_run_writes_nothing(
    with_old_results: Path, recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(with_old_results)
    assert (
        main(["train", recipe(max_steps=6, learning_rate=1e30, max_grad_norm=0.0, save_strategy="no")]) == 1
    )
    assert "must be finite" in error_lines(capsys.readouterr().err)[0]
    assert contents(with_old_results) == before


def test_push_sends_what_the_run_has_saved(
    tmp_path: Path, recipe: Recipes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[Path, str, dict[str, Any]]] = []

    def push(folder: Path, repo_id: str, **options: Any) -> str:
        sent.append((folder, repo_id, options))
        return "https://hub/me/quick/commit/1"

    monkeypatch.setattr("hf_ext.hub.push_to_hub", push)
    wanted = {"push_to_hub": True, "hub_model_id": "me/quick", "hub_token": "hf_x", "max_steps": 1}
    path = recipe(**wanted, merge=None, export_lora=None, dataset_test_size=None)
    assert main(["train", path]) == 2
    assert "HF_HUB_OFFLINE" in error_lines(capsys.readouterr().err)[0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert main(["train", path]) == 0
    assert sent[0][:2] == (tmp_path / "out" / "adapter", "me/quick")
    assert sent[0][2]["base_model"] is None
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "me/quick")' in card
    assert "hf_x" not in card
    assert "pushed to https://hub/me/quick/commit/1" in capsys.readouterr().out


# Processes


@pytest.mark.distributed
def test_two_processes_equal_one(finished: Path, tmp_path: Path, recipe: Recipes) -> None:
    path = recipe(per_device_train_batch_size=2, export_lora=None, merge=None, generate_samples=0)
    done = start(["-m", "hf_ext.cli", "train", path, "--num_processes", "2"])
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "out" / "metrics.json").read_text())
    one = json.loads((finished / "metrics.json").read_text())
    assert two["world_size"] == 2
    assert two["steps"] == one["steps"]
    # The same global batches, summed in another order: fp32 rounding, grown over ten steps.
    assert two["eval_loss_before"] == pytest.approx(one["eval_loss_before"], abs=1e-5)
    assert two["eval_loss_after"] == pytest.approx(one["eval_loss_after"], abs=1e-4)
    ours, whole = (
        read_tensors(d / "adapter" / "adapter_model.safetensors") for d in (tmp_path / "out", finished)
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, whole[name], rtol=0.0, atol=1e-3)
    assert done.stdout.count("rows to train on") == 1


@pytest.mark.distributed
def test_a_launcher_that_starts_one_process_is_noticed(recipe: Recipes) -> None:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_ext.cli"]
    done = start([*launch, "train", recipe(expected_processes=2)])
    assert done.returncode != 0
    assert "expected_processes asks for 2 processes, but 1 run" in error_lines(done.stderr)[0]


FAILING = """
import os, sys
from hf_ext.training import run
from hf_ext.training.trainers import kind_of

class Failing(run.recipe_trainer(kind_of("sft").trainer)):
    def training_step(self, *args, **kwargs):
        if os.environ["RANK"] == "1" and self.state.global_step == 2:
            raise OSError("the disk of the second process is gone")
        return super().training_step(*args, **kwargs)

run.recipe_trainer = lambda cls: Failing
from hf_ext.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.distributed
def test_a_process_that_fails_ends_the_others(tmp_path: Path, recipe: Recipes) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = start([*run, "train", recipe(per_device_train_batch_size=2)], ACCELERATE_USE_CPU="true")
    assert done.returncode != 0
    assert "[process 1] the disk of the second process is gone" in "\n".join(error_lines(done.stderr))
    assert not (tmp_path / "out" / "adapter").exists()
