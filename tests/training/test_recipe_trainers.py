"""Every trainer runs from a recipe by its name, resumes, and names what it lacks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from hf_ext.cli import main
from hf_ext.core.files import read_tensors
from hf_ext.core.registry import MethodInfo
from hf_ext.training.causal_lm import _tokenized
from hf_ext.training.recipe import read_recipe
from hf_ext.training.run import build_trainer, check_job
from hf_ext.training.trainers import NAMES, kind_of
from tests.registry_cases import methods
from tests.trainers.runs import rows

Recipes = Callable[..., str]
TRAINERS = methods("trainer", variants=False)


@pytest.fixture(scope="session")
def every_column(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return files of rows with every column that a trainer may want: to train on, to retain."""
    folder = tmp_path_factory.mktemp("rows")
    files = {"train": rows(24), "other": rows(8, start=100)}
    for name, data in files.items():
        data.to_json(str(folder / f"{name}.jsonl"))
    return {name: str(folder / f"{name}.jsonl") for name in files}


def settings_of(name: str, model: Path, data: dict[str, str], **changes: Any) -> dict[str, Any]:
    """Return a recipe's keys for a kind of training, over those of the fixture."""
    kind = kind_of(name)
    known = {field.name for field in dataclasses.fields(kind.config)}
    keys: dict[str, Any] = {
        "trainer": name,
        "dataset_name": data["train"],
        "dataset_test_size": 4,
        "export_lora": False,
        "merge": False,
        "generate_samples": 0,
        "max_steps": 4,
        "save_steps": 2,
        "max_completion_length": 4,
        "other_models": {role: str(model) for role in kind.inputs.models},
        "other_datasets": dict.fromkeys(kind.inputs.datasets, data["other"]),
        "reward_funcs": "tests.trainers.runs.vowel_share" if kind.inputs.reward else None,
        **changes,
    }
    unknown = {"max_completion_length"} - known
    dropped = {"max_length"} - known
    kept = {key: value for key, value in keys.items() if key not in unknown}
    return {**kept, **dict.fromkeys(dropped)}


@pytest.mark.parametrize("info", TRAINERS)
def test_every_trainer_runs_and_resumes_by_its_name(
    info: MethodInfo, tmp_path: Path, recipe: Recipes, model_folder: Path, every_column: dict[str, str]
) -> None:
    path = recipe(**settings_of(info.name, model_folder, every_column, **json_settings(info)))
    assert main(["train", path]) == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["trainer"] == info.name
    assert metrics["eval_loss_after"] is not None
    card = ModelCard.load(out / "adapter" / "README.md")
    assert {info.name, "hf_ext"} <= set(card.data.tags)
    whole = read_tensors(out / "adapter" / "adapter_model.safetensors")
    rounds = sorted(out.glob("round_*"))
    last = rounds[-1] if rounds else out
    shutil.rmtree(last / "checkpoint-4")
    shutil.rmtree(out / "adapter")
    if rounds:  # as a run is left that was killed within its last round
        progress = json.loads((out / "rounds.json").read_text())
        progress["done"] = False
        progress["logs"] = [entry for entry in progress["logs"] if entry["round"] < len(rounds) - 1]
        (out / "rounds.json").write_text(json.dumps(progress))
    assert main(["train", path, "--resume_from_checkpoint", "true"]) == 0
    again = read_tensors(out / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(whole[name].equal(tensor) for name, tensor in again.items())


def json_settings(info: MethodInfo) -> dict[str, Any]:
    return json.loads(json.dumps(dict(info.test_kwargs)))


UPSTREAM = ["trainer", "dpo", "kto", "reward", "grpo", "rloo", "distillation"]


def settings_upstream(name: str, model: Path, data: dict[str, str], folder: Path) -> dict[str, Any]:
    """Return a recipe's keys for one of upstream's trainers, with rows of its own where it needs them."""
    keys = settings_of(name, model, data)
    made = {
        "trainer": [{"text": f"{number} and {number + 1} are numbers"} for number in range(24)],
        "kto": [
            {
                "prompt": f"{number} is",
                "completion": " even" if number % 2 else " odd",
                "label": number % 3 > 0,
            }
            for number in range(24)
        ],
    }
    if name in made:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made[name]))
        keys["dataset_name"] = str(path)
    if name in ("grpo", "rloo"):
        keys |= {"num_generations": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    return keys


@pytest.mark.parametrize("name", UPSTREAM)
@pytest.mark.parametrize("adapter", [True, False])
def test_trainers_of_upstream_run_too(
    name: str,
    adapter: bool,
    tmp_path: Path,
    recipe: Recipes,
    model_folder: Path,
    every_column: dict[str, str],
) -> None:
    keys = settings_upstream(name, model_folder, every_column, tmp_path)
    keys |= {"export_lora": True, "merge": True} if adapter else {"adapter": None}
    assert main(["train", recipe(**keys)]) == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["trainer"] == name
    # Each folder was reloaded and compared with the trained model before it was put in place.
    assert set(metrics["logit_difference"]) == ({"adapter", "lora", "merged"} if adapter else {"model"})
    before, after = (
        read_tensors(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
        for folder in (model_folder, out / ("merged" if adapter else "model"))
    )
    if name != "distillation":  # where the teacher is the model itself: there is nothing to learn
        assert not before.equal(after)


def test_a_reward_model_has_one_score_and_its_card_tells_how_to_load_it(
    tmp_path: Path,
    recipe: Recipes,
    model_folder: Path,
    every_column: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = settings_upstream("reward", model_folder, every_column, tmp_path)
    assert main(["train", recipe(**{**keys, "generate_samples": 1})]) != 0
    assert "generate_samples must be 0 for a reward model" in capsys.readouterr().err
    assert main(["train", recipe(**{**keys, "merge": True})]) == 0
    text = (tmp_path / "out" / "merged" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(" in text
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged")
    assert model.config.num_labels == 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    card = ModelCard.load(tmp_path / "out" / "adapter" / "README.md")
    assert "num_labels=1" in card.text
    assert card.data.pipeline_tag == "text-classification"
    told = {result.metric_name for result in card.data.eval_results}
    assert told == {"held-out loss"}
    assert 0.0 <= metrics["eval_accuracy_before"] <= 1.0
    assert f"| eval_accuracy_after | {metrics['eval_accuracy_after']:.6g} |" in card.text
    assert "accuracy" in capsys.readouterr().out


def test_plain_training_ends_each_row_and_cuts_it_at_the_context(
    tmp_path: Path, recipe: Recipes, model_folder: Path, every_column: dict[str, str]
) -> None:
    keys = settings_upstream("trainer", model_folder, every_column, tmp_path)
    job = read_recipe(recipe(**keys))
    ready = check_job(job)
    trainer = build_trainer(ready)
    limit, end = trainer.model.config.max_position_embeddings, ready.prepared.tokenizer.eos_token_id
    row = trainer.train_dataset[0]["input_ids"]
    text = ready.prepared.train[0]["text"]
    assert row[-1] == end
    assert ready.prepared.tokenizer.decode(row[:-1], skip_special_tokens=True) == text
    batch = trainer.data_collator([{"input_ids": [5, end]}, {"input_ids": [5, 6, 7, end]}])
    assert batch["labels"][1].tolist() == [5, 6, 7, end]
    assert batch["labels"][0].tolist()[2:] == [-100, -100]
    ready.prepared.tokenizer.pad_token = ready.prepared.tokenizer.eos_token  # as GPT-2's is made
    batch = trainer.data_collator([{"input_ids": [5, end]}, {"input_ids": [5, 6, 7, end]}])
    assert batch["labels"].tolist()[1] == [5, 6, 7, end]
    assert sorted(batch["labels"].tolist()[0]) == [-100, -100, *sorted([5, end])]
    long = ready.prepared.train.from_dict({"text": [text * limit]})
    assert len(_tokenized(long, ready.prepared.tokenizer, limit)[0]["input_ids"]) == limit


def test_an_embedded_task_brings_pairs_prompts_and_its_reward(
    tmp_path: Path, recipe: Recipes, model_folder: Path, every_column: dict[str, str]
) -> None:
    keys = settings_of(
        "online_iterative_dpo",
        model_folder,
        every_column,
        dataset_name="embedded:copying",
        dataset_train_split="train",
        dataset_test_split="validation",
        dataset_test_size=None,
        max_train_samples=16,
        max_eval_samples=4,
        reward_funcs="copying",
        num_rounds=2,
        num_candidates=4,
    )
    # A random model copies nothing: every candidate scores 0, and a round without pairs trains nothing.
    assert main(["train", recipe(**keys, min_pairs=1)]) == 0
    figures = json.loads((tmp_path / "out" / "rounds.json").read_text())["figures"]
    assert [entry["pairs"] + entry["dropped"] for entry in figures] == [8.0, 8.0]


def bad_keys() -> dict[str, tuple[str, dict[str, Any], list[str]]]:
    return {
        "kind": ("sft", {"trainer": "dqo"}, ["trainer", "'dqo'", "'dpo'"]),
        "field of another trainer": ("sft", {"num_rounds": 2}, ["'num_rounds'"]),
        "no reward": ("online_iterative_dpo", {"reward_funcs": None}, ["reward_funcs", "given"]),
        "no such reward": (
            "online_iterative_dpo",
            {"reward_funcs": "additions"},
            ["reward_funcs", "'additions'", "addition, copying"],
        ),
        "reward for nothing": ("dpo", {"reward_funcs": "addition"}, ["reward_funcs", "'dpo' takes none"]),
        "no teacher": ("distillation", {"other_models": {}}, ["other_models.teacher_model", "given"]),
        "another model": ("dpo", {"other_models": {"teacher": "x"}}, ["other_models", "'teacher'", "none"]),
        "no such model": (
            "distillation",
            {"other_models": {"teacher_model": "./no/model"}},
            ["other_models.teacher_model", "./no/model"],
        ),
        "columns": (
            "dpo",
            {"dataset_columns": {"rejected": "reject"}},
            ["dataset_columns.rejected", "'reject'"],
        ),
        "value": ("online_iterative_dpo", {"num_rounds": 0}, ["num_rounds", "at least 1"]),
        "resume": (
            "online_iterative_dpo",
            {"resume_from_checkpoint": True},
            ["resume_from_checkpoint", "rounds.json"],
        ),
    }


@pytest.mark.parametrize("case", bad_keys())
def test_what_does_not_fit_is_one_line(
    case: str,
    recipe: Recipes,
    model_folder: Path,
    every_column: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, changes, words = bad_keys()[case]
    assert main(["train", recipe(**{**settings_of(name, model_folder, every_column), **changes})]) != 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-ext")]
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines[0]


def test_a_function_beside_the_recipe_gives_the_reward_and_prompts_alone_are_completed(
    tmp_path: Path, recipe: Recipes, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def score(completions, **kwargs):\n    return [float(len(set(text))) for text in completions]\n"
    )
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {number}\n"}) + "\n" for number in range(8))
    )
    monkeypatch.chdir(tmp_path)
    keys = settings_of(
        "online_iterative_dpo",
        model_folder,
        {"train": str(tmp_path / "rows.jsonl"), "other": ""},
        dataset_test_size=None,
        reward_funcs="my_rewards.score",
        generate_samples=1,
        num_rounds=1,
        num_candidates=2,
    )
    assert main(["train", recipe(**keys)]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["samples"][0]["prompt"] == "Say 0\n"


def test_what_extrapolated_rounds_return_is_a_lora_and_exported_as_one(
    tmp_path: Path, recipe: Recipes, model_folder: Path, every_column: dict[str, str]
) -> None:
    keys = settings_of("apo", model_folder, every_column, num_rounds=2, num_candidates=2, export_lora=True)
    assert main(["train", recipe(**keys)]) == 0
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_every_registered_trainer_has_a_kind() -> None:
    assert {case.values[0].name for case in TRAINERS} <= set(NAMES)


def test_what_a_trainer_can_do_without_may_be_left_out(
    tmp_path: Path, recipe: Recipes, model_folder: Path, every_column: dict[str, str]
) -> None:
    keys = settings_of("unlearning", model_folder, every_column, other_datasets={}, max_steps=1)
    assert main(["train", recipe(**keys, unlearn_loss="ga", retain_loss="none", max_forget_loss=1e4)]) == 0
