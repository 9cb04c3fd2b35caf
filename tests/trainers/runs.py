"""Small runs of the library's trainers that their tests share, and, as a program, runs that are killed.

Usage: python -m tests.trainers.runs OUT
Runs every registered trainer in OUT/<name>, each in a process that gets SIGKILL after step 4.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import hf_ext
from hf_ext.callbacks._base import Callback
from hf_ext.core.registry import MethodInfo
from tests.callbacks.runs import StopAt
from tests.conftest import build_tiny_llama, freeze_modules
from tests.registry_cases import methods

STEPS, MIDDLE = 6, 3
# Names the folder of models that a process was given by the one that started it.
MODELS = "HF_EXT_TEST_MODELS"
ASSETS = Path(hf_ext.__file__).parent / "assets" / "tiny-llama"
# Fields of any trainer's config; each gets those that it has.
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-2,
    "save_steps": MIDDLE,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "max_length": 48,
    "max_completion_length": 6,
}
_WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "mu")


def tokenizer() -> Any:
    """Return the embedded tokenizer."""
    return AutoTokenizer.from_pretrained(ASSETS)


@cache
def models_root() -> Path:
    """Return the folder of all models: one that another process has made and filled, or a new one."""
    if MODELS in os.environ:
        return Path(os.environ[MODELS])
    root = Path(tempfile.mkdtemp(prefix="hf_ext_tests_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def model_folder(seed: int = 0, **config: Any) -> Path:
    """Return a folder with a model of one small block; TRL reads reference models from where a model came."""
    folder = models_root() / "-".join([str(seed), *(f"{key}{value}" for key, value in config.items())])
    if folder.is_dir():
        return folder
    small = {
        "vocab_size": 4096,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    ids = tokenizer()
    special = {"bos_token_id": ids.bos_token_id, "eos_token_id": ids.eos_token_id, "pad_token_id": None}
    build_tiny_llama(seed=seed, **{**small, **special, **config}).save_pretrained(folder)
    ids.save_pretrained(folder)
    return folder


def tiny_model(seed: int = 0, **config: Any) -> Any:
    """Return a model of one small block over the embedded vocabulary; equal at each call."""
    return AutoModelForCausalLM.from_pretrained(model_folder(seed, **config), dtype=torch.float32)


def rows(count: int = 12, start: int = 0) -> Dataset:
    """Return rows of uneven lengths with every column that a trainer may want; none shared by two starts."""
    found: dict[str, list[str]] = {}
    for number in range(start, start + count):
        words = [_WORDS[(number * 5 + 3 * i) % len(_WORDS)] for i in range(2 + number % 4)]
        text = " ".join(words)
        row = {
            "prompt": f"Say {number}: {text}\n",
            "completion": f"{text[::-1]} {number}",
            "chosen": f"{text} {number}",
            "rejected": f"{words[0]} {' '.join(['no'] * (1 + number % 3))}",
            "answer": f"{text} {number}",
            "refusal": "I do not know.",
        }
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return Dataset.from_dict(found)


def columns(data: Dataset, wanted: Iterable[str]) -> Dataset:
    """Return the data with these columns alone, and `answer`, which reward functions read."""
    kept = [name for name in data.column_names if name in {*wanted, "answer"}]
    return data.select_columns(kept)


def vowel_share(completions: list[str], **kwargs: Any) -> list[float]:
    """Reward: the share of vowels among a completion's characters."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def settings_of(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that a config has a field for."""
    known = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in settings.items() if name in known}


def build(
    info: MethodInfo,
    folder: Path | str,
    *callbacks: Callback,
    others: Iterable[TrainerCallback] = (),
    settings: Mapping[str, Any] | None = None,
    model: Any = None,
    peft_config: Any = None,
    data: Dataset | None = None,
    given: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """Return a registered trainer for six steps that saves every three and logs each.

    Args:
        info: The trainer's row.
        folder: Output folder.
        *callbacks: Callbacks of the library, which are attached.
        others: Callbacks that stand before them.
        settings: The method's own settings; its test settings if left out.
        model: The model; that of `tiny_model()` if left out.
        peft_config: An adapter's config.
        data: Rows to train on; those of `rows()` if left out.
        given: Constructor arguments, over those made here for what the trainer takes.
        **arguments: Training arguments over those of here; what the config lacks is left out.
    """
    cls: Any = info.target
    inputs = cls.inputs
    own = dict(info.test_kwargs if settings is None else settings)
    common = settings_of(info.config, {**ARGUMENTS, **arguments})  # pyright: ignore[reportArgumentType]
    config: Any = info.config
    made: dict[str, Any] = {name: tiny_model(seed + 1) for seed, name in enumerate(inputs.models)}
    made |= {name: columns(rows(8, start=100), inputs.columns[0]) for name in inputs.datasets}
    if inputs.reward:
        made["reward_funcs"] = vowel_share
    made |= {
        "model": tiny_model() if model is None else model,
        "args": config(output_dir=str(folder), **{**common, **own}),
        "train_dataset": columns(rows(), inputs.columns[0]) if data is None else data,
        "eval_dataset": columns(rows(4, start=200), (inputs.test_columns or inputs.columns)[0]),
        "processing_class": tokenizer(),
        "peft_config": peft_config,
        "callbacks": list(others),
    }
    trainer = cls(**{**made, **(given or {})})
    return hf_ext.attach(trainer, *callbacks) if callbacks else trainer


def parent(info: MethodInfo, folder: Path | str, data: Dataset | None = None, **arguments: Any) -> Any:
    """Return TRL's trainer that the method equals under its neutral settings."""
    cls: Any = info.target
    neutral = cls.neutral
    settings = {**settings_of(neutral.config, {**ARGUMENTS, **arguments}), **neutral.parent_settings}
    order = list(cls.inputs.models)
    models = {theirs: tiny_model(order.index(ours) + 1) for ours, theirs in neutral.models.items()}
    return neutral.parent(
        model=tiny_model(),
        args=neutral.config(output_dir=str(folder), **settings),
        train_dataset=columns(rows(), cls.inputs.columns[0]) if data is None else data,
        processing_class=tokenizer(),
        **models,
    )


def checkpoint(info: MethodInfo, folder: Path, step: int) -> Path:
    """Return where a run's checkpoint is; that of the last round where there are rounds."""
    place = max(folder.glob("round_*")) if "rounds" in info.supports else folder
    return place / f"checkpoint-{step}"


def parameters(trainer: Any) -> dict[str, Tensor]:
    """Return copies of the model's parameters."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def training_logs(trainer: Any) -> list[dict[str, Any]]:
    """Return the logs of training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Run every trainer in a process that is killed."""
    out = Path(sys.argv[1])
    for seed in range(3):  # before the forks: they are removed by the process that made them
        model_folder(seed)
    for case in methods("trainer"):
        pid = os.fork()  # before any computation: a fork after it could find locks that nobody opens
        if pid == 0:
            build(case.values[0], out / str(case.id), others=[StopAt(MIDDLE + 1, kill=True)]).train()
            os._exit(1)  # it was not killed
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), case.id
        assert os.WTERMSIG(status) == 9, case.id


if __name__ == "__main__":
    freeze_modules()
    main()
