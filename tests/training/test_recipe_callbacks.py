"""Callbacks in a recipe: by name, with their fields, on the command line, resumed, and refused by field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_ext.callbacks import RefinedLinearDecayCallback
from hf_ext.cli import main
from hf_ext.core.files import read_tensors
from hf_ext.core.registry import MethodInfo
from tests.callbacks.runs import build
from tests.registry_cases import methods

Recipes = Callable[..., str]
BARE = {"export_lora": False, "merge": False, "generate_samples": 0}


def history_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("info", methods("callback"))
def test_every_callback_runs_by_its_name(tmp_path: Path, recipe: Recipes, info: MethodInfo) -> None:
    fields = json.loads(json.dumps(dict(info.test_kwargs)))
    path = recipe(
        **BARE,
        adapter={"type": "lora", "r": 4, "target_modules": "all-linear"},
        callbacks={info.name: fields},
        save_total_limit=1,
        eval_steps=1,
        eval_strategy="steps",
    )
    assert main(["train", path]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["callbacks"]) == {info.name}
    assert {key: metrics["callbacks"][info.name][key] for key in fields} == fields
    state = json.loads(
        (sorted((tmp_path / "out").glob("checkpoint-*"))[-1] / "trainer_state.json").read_text()
    )
    assert any(key.startswith(f"{info.name}/") for entry in state["log_history"] for key in entry)


def test_fields_on_the_command_line_win_and_the_card_tells_them(tmp_path: Path, recipe: Recipes) -> None:
    path = recipe(**BARE, callbacks={"infinite_lr": {"anneal_start": 0.5, "const_lr_ratio": 0.2}})
    assert main(["train", path, "--callbacks.infinite_lr.anneal_start", "7"]) == 0
    out = tmp_path / "out"
    # The constant phase until step 7: the rate of the seventh update is a fifth of the peak.
    rates = {entry["step"]: entry["learning_rate"] for entry in history_of(out) if "learning_rate" in entry}
    assert rates[6] == pytest.approx(0.2e-2)
    assert rates[10] < 0.2e-2
    assert (out / "infinite_branch" / "trainer_state.json").is_file()
    text = ModelCard.load(out / "adapter" / "README.md").text
    assert "callbacks.infinite_lr" in text
    assert "0.2" in text


def test_a_resumed_recipe_is_bit_equal_and_reads_no_norms_again(
    tmp_path: Path, recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    build(first, RefinedLinearDecayCallback(), save_strategy="no").train()
    path = recipe(**BARE, callbacks={"refined_linear_decay": {"mode": "refined", "norms": str(first)}})
    assert main(["train", path]) == 0
    out = tmp_path / "out"
    whole = read_tensors(out / "adapter" / "adapter_model.safetensors")
    for folder in (first, out / "checkpoint-10", out / "adapter"):
        shutil.rmtree(folder)
    resume = ["train", path, "--resume_from_checkpoint", str(out / "checkpoint-8")]
    assert main(resume) == 0
    again = read_tensors(out / "adapter" / "adapter_model.safetensors")
    assert all(whole[name].equal(tensor) for name, tensor in again.items())
    assert set(whole) == set(again)
    # A checkpoint without the curve needs the norms.
    (out / "checkpoint-8" / "hf_ext_refined_linear_decay.json").unlink()
    capsys.readouterr()
    assert main(resume) == 2
    assert "callbacks.refined_linear_decay.norms" in capsys.readouterr().err


BAD: dict[str, tuple[Any, list[str]]] = {
    "name": ({"infinit_lr": {}}, ["callbacks:", "'infinit_lr' is unknown", "'infinite_lr'"]),
    "field": ({"infinite_lr": {"anneal_strt": 1}}, ["callbacks.infinite_lr.'anneal_strt'", "'anneal_start'"]),
    "value": ({"infinite_lr": {"const_lr_ratio": 0.0}}, ["callbacks.infinite_lr.const_lr_ratio", "0.0"]),
    "type": ({"infinite_lr": {"const_lr_ratio": [1]}}, ["callbacks.infinite_lr.const_lr_ratio", "float"]),
    "file": (
        {"infinite_lr": {"continue_from": "no/branch"}},
        ["callbacks.infinite_lr.continue_from", "no/branch"],
    ),
    "recording": (
        {"refined_linear_decay": {"mode": "refined", "norms": "no/run"}},
        ["callbacks.refined_linear_decay.norms", "no/run"],
    ),
    "two schedules": ({"infinite_lr": {}, "refined_linear_decay": None}, ["callbacks:", "learning rate"]),
    "no mapping": (["infinite_lr"], ["callbacks must be"]),
    "no fields": ({"infinite_lr": 3}, ["callbacks must be"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_fault_names_the_field(
    case: str, tmp_path: Path, recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks, named = BAD[case]
    assert main(["train", recipe(callbacks=callbacks)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-ext: error:")]
    assert len(lines) == 1
    for part in ["recipe.yaml", *named]:
        assert part in lines[0]
    assert not (tmp_path / "out").exists()
