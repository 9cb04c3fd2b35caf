"""What holds for every registered trainer."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from hf_ext.callbacks import InfiniteLRCallback, WeightAverageCallback
from hf_ext.core.registry import MethodInfo
from hf_ext.core.registry import methods as registered
from tests.callbacks.runs import StopAt, equal
from tests.conftest import REPOSITORY
from tests.registry_cases import methods, refused_settings
from tests.trainers.runs import (
    MIDDLE,
    STEPS,
    build,
    checkpoint,
    columns,
    model_folder,
    parameters,
    parent,
    rows,
    tiny_model,
    training_logs,
)

TRAINERS = methods("trainer")
ADAPTERS = ["lora", *(row.name for row in registered("adapter"))]
PLAIN = methods("trainer", variants=False)


def adapter(name: str) -> Any:
    """Return a small config of an adapter type, ours or PEFT's LoRA, that needs no data for its start."""
    from hf_ext.core.registry import get

    targets = ["q_proj", "o_proj", "up_proj"]
    if name == "lora":
        return LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.0)
    row = get("adapter", name)
    config: Any = row.config
    settings = {**row.test_kwargs, "target_modules": targets, "task_type": "CAUSAL_LM"}
    if "starts_from_data" in row.supports:
        settings["init_weights"] = False
    return config(**settings)


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("info", "bad"), refused_settings("trainer"))
def test_bad_settings_are_refused_by_name(info: MethodInfo, bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"\b{list(bad)[-1]}\b"):
        build(info, tmp_path, settings={**info.test_kwargs, **bad})


@pytest.mark.parametrize("info", PLAIN)
def test_a_config_adds_fields_and_restates_none(info: MethodInfo) -> None:
    config: Any = info.config
    ours = [cls for cls in config.__mro__ if cls.__module__.startswith("hf_ext.")]
    theirs = next(cls for cls in config.__mro__ if cls.__module__.startswith("trl."))
    above = {field.name for field in dataclasses.fields(theirs)}
    for cls in ours:
        assert not set(vars(cls).get("__annotations__", {})) & above
    assert config.__name__ == info.target.__name__.replace("Trainer", "Config")  # pyright: ignore[reportAttributeAccessIssue]


# What is computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("info", [p for p in PLAIN if p.values[0].target.neutral is not None])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_neutral_settings_are_the_parent(info: MethodInfo, accumulation: int, tmp_path: Path) -> None:
    cls: Any = info.target
    data = columns(rows(), cls.inputs.columns[0])
    arguments: dict[str, Any] = {
        "max_steps": 3,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 0.1,
        "gradient_accumulation_steps": accumulation,
    }
    theirs = parent(info, tmp_path / "theirs", data, **arguments)
    theirs.train()
    ours = build(info, tmp_path / "ours", settings=cls.neutral.settings, data=data, **arguments)
    ours.train()
    losses = [[entry["loss"] for entry in training_logs(trainer)] for trainer in (ours, theirs)]
    if cls.neutral.exact:
        assert losses[0] == losses[1]
        assert equal(parameters(ours), parameters(theirs))
    else:
        assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)
        for name, value in parameters(theirs).items():
            torch.testing.assert_close(parameters(ours)[name], value, rtol=0.0, atol=1e-6)
    assert not equal(parameters(ours), dict(tiny_model().named_parameters()))


@pytest.mark.parametrize("info", methods("trainer", lacks=("per_micro_batch", "rounds")))
def test_accumulated_micro_batches_are_one_batch(info: MethodInfo, tmp_path: Path) -> None:
    ends = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = build(
            info,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            save_strategy="no",
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        ends.append(parameters(trainer))
    for end in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(
                end[name], value, rtol=0.0, atol=2e-6, msg=lambda t, n=name: f"{n}: {t}"
            )


@pytest.mark.parametrize("info", TRAINERS)
def test_padding_changes_nothing(info: MethodInfo, tmp_path: Path) -> None:
    ends = []
    for multiple in (None, 32):
        trainer = build(
            info,
            tmp_path / str(multiple),
            pad_to_multiple_of=multiple,
            max_steps=2,
            save_strategy="no",
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        ends.append(parameters(trainer))
    for name, value in ends[0].items():
        torch.testing.assert_close(
            ends[1][name], value, rtol=0.0, atol=2e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize("info", TRAINERS)
def test_evaluation_changes_nothing(info: MethodInfo, tmp_path: Path) -> None:
    ends = []
    for name, arguments in (("no", {}), ("yes", {"eval_strategy": "steps", "eval_steps": 2})):
        trainer = build(info, tmp_path / name, save_strategy="no", **arguments)
        trainer.train()
        ends.append(parameters(trainer))
        evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert bool(evaluated) == bool(arguments)
        assert all(math.isfinite(entry["eval_loss"]) for entry in evaluated)
    assert equal(*ends)


@pytest.mark.parametrize("info", TRAINERS)
def test_metrics_are_logged_and_finite(info: MethodInfo, tmp_path: Path) -> None:
    trainer = build(info, tmp_path, save_strategy="no")
    trainer.train()
    logs = training_logs(trainer)
    assert len(logs) >= STEPS
    numbers = {key: value for entry in logs for key, value in entry.items() if isinstance(value, float)}
    assert all(math.isfinite(value) for value in numbers.values()), numbers
    assert any("/" in key for key in numbers), "the method logs something of its own"


@pytest.mark.parametrize("info", PLAIN)
def test_bf16_and_gradient_checkpointing_train(info: MethodInfo, tmp_path: Path) -> None:
    trainer = build(info, tmp_path, save_strategy="no", max_steps=2, bf16=True, gradient_checkpointing=True)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in training_logs(trainer))
    assert not equal(parameters(trainer), dict(tiny_model().named_parameters()))


# Frozen models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", TRAINERS)
def test_frozen_models_stay_frozen(info: MethodInfo, tmp_path: Path) -> None:
    cls: Any = info.target
    frozen = {name: tiny_model(seed + 1) for seed, name in enumerate(cls.inputs.models)}
    trainer = build(info, tmp_path, given=frozen, save_strategy="no", max_steps=2)
    if getattr(trainer, "ref_model", None) is not None:
        frozen["ref_model"] = trainer.ref_model
    before = {
        name: {n: p.detach().clone() for n, p in model.named_parameters()} for name, model in frozen.items()
    }
    trainer.train()
    for name, model in frozen.items():
        assert equal(dict(model.named_parameters()), before[name])
        assert all(p.grad is None for p in model.parameters())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for model in frozen.values() for p in model.parameters()}


@pytest.mark.parametrize("info", [p for p in PLAIN if p.values[0].target.inputs.models])
def test_a_teacher_that_is_trained_or_of_another_vocabulary_is_refused(
    info: MethodInfo, tmp_path: Path
) -> None:
    cls: Any = info.target
    for name in cls.inputs.models:
        student = tiny_model()
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            build(info, tmp_path, model=student, given={name: student})
        with pytest.raises(ValueError, match="vocab"):
            build(info, tmp_path, given={name: tiny_model(3, vocab_size=4160)})


# Adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("info", PLAIN)
def test_every_adapter_trains_and_loads(info: MethodInfo, kind: str, tmp_path: Path) -> None:
    trainer = build(info, tmp_path, peft_config=adapter(kind), save_strategy="no", max_steps=2)
    before = parameters(trainer)
    logits = logits_of(trainer.model)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in training_logs(trainer))
    assert not torch.equal(logits_of(trainer.model), logits)
    after = parameters(trainer)
    kept = [name for name in before if "base_layer" in name or "embed_tokens" in name]
    assert kept
    assert all(torch.equal(after[name], before[name]) for name in kept)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model), rtol=0.0, atol=2e-5)


def logits_of(model: Any) -> torch.Tensor:
    """Return the logits of a fixed row."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


# Resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", TRAINERS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_interrupted_and_resumed_equals_one_run(info: MethodInfo, accumulation: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulation}
    whole = build(info, tmp_path / "whole", **options)
    whole.train()
    cut = build(info, tmp_path / "cut", others=[StopAt(MIDDLE + 1)], **options)
    with pytest.raises(InterruptedError):
        cut.train()
    resumed = build(info, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert equal(parameters(resumed), parameters(whole))
    assert [e["loss"] for e in training_logs(resumed)] == [e["loss"] for e in training_logs(whole)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run each trainer in a process that is killed after step 4; the checkpoint of step 3 is left."""
    out = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainers.runs", str(out)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("info", TRAINERS)
def test_killed_and_resumed_equals_one_run(
    info: MethodInfo, killed: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole = build(info, tmp_path)
    whole.train()
    folder = killed / request.node.callspec.id
    assert checkpoint(info, folder, MIDDLE).is_dir()
    resumed = build(info, folder)
    resumed.train(resume_from_checkpoint=True)
    assert equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize("info", TRAINERS)
def test_checkpoints_hold_no_pickle_of_ours(info: MethodInfo, tmp_path: Path) -> None:
    build(info, tmp_path).train()
    for path in tmp_path.glob("**/hf_ext_*"):
        assert path.suffix in {".json", ".safetensors"}
    theirs = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert {p.name for p in tmp_path.glob("**/*") if p.suffix in {".pt", ".pth", ".bin", ".pkl"}} <= theirs


# Data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", PLAIN)
def test_a_missing_column_is_named(info: MethodInfo, tmp_path: Path) -> None:
    cls: Any = info.target
    for name in cls.inputs.columns[0]:
        wrong = columns(rows(), set(cls.inputs.columns[0]) - {name}).rename_column("answer", "other")
        with pytest.raises((ValueError, KeyError), match=name):
            build(info, tmp_path, data=wrong)


@pytest.mark.parametrize("info", PLAIN)
def test_an_empty_text_is_named(info: MethodInfo, tmp_path: Path) -> None:
    cls: Any = info.target
    for name in cls.inputs.columns[0]:
        data = columns(rows(), cls.inputs.columns[0])
        emptied = data.map(lambda row, i, name=name: {name: "" if i == 3 else row[name]}, with_indices=True)
        with pytest.raises(ValueError, match=rf"{name}.*\b3\b"):
            build(info, tmp_path, data=emptied)


# Other pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", PLAIN)
def test_callbacks_of_the_library_attach(info: MethodInfo, tmp_path: Path) -> None:
    trainer = build(
        info,
        tmp_path,
        InfiniteLRCallback(),
        WeightAverageCallback(),
        lr_scheduler_type="constant",
    )
    trainer.train()
    folder = checkpoint(info, tmp_path, STEPS)
    assert (folder / "hf_ext_infinite_lr.json").is_file()


@pytest.mark.parametrize("info", PLAIN)
def test_the_saved_model_loads_and_its_card_names_the_method(info: MethodInfo, tmp_path: Path) -> None:
    trainer = build(info, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(trainer.accelerator.unwrap_model(trainer.model)))
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    cls: Any = info.target
    assert cls._name in card
    assert info.paper is None or cls._paper["title"] in card
    assert "hf_ext" in card


def test_the_models_of_these_tests_are_read_from_their_folder() -> None:
    assert equal(dict(tiny_model().named_parameters()), dict(tiny_model().named_parameters()))
    assert Path(tiny_model().config._name_or_path) == model_folder(0)
