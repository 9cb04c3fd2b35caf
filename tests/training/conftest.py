"""A random tiny Llama with the embedded tokenizer, forty-eight rows, and recipes over both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

Recipes = Callable[..., str]
ASSETS = Path(__file__).resolve().parents[2] / "hf_ext" / "assets" / "tiny-llama"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "prompt": f"def add_{i}(x):\n    return x + {i}\n",
            "completion": f"Return x plus {i}." + " Fast." * (i % 5),
        }
        for i in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def settings(model_folder: Path, rows_file: Path) -> dict[str, Any]:
    """Return a recipe that passes every check, without its output_dir."""
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(rows_file),
        "dataset_test_size": 8,
        "adapter": {"type": "sorsa", "r": 4, "target_modules": "all-linear"},
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 1,
        "learning_rate": "1e-2",
        "max_length": 48,
        "logging_steps": 2,
        "save_steps": 2,
        "seed": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "export_lora": True,
        "merge": True,
        "generate_samples": 1,
        "max_new_tokens": 8,
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "activation_checkpointing": False,
        "ddp_find_unused_parameters": False,
    }


@pytest.fixture
def recipe(tmp_path: Path, settings: dict[str, Any]) -> Recipes:
    """Return a function that writes the recipe with changes (None deletes a key) and returns its path."""

    def write(**changes: Any) -> str:
        merged = {"output_dir": str(tmp_path / "out"), **settings, **changes}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in merged.items() if value is not None}))
        return str(path)

    return write
