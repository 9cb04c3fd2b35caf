"""Fixtures shared by all tests: small models built from configs, no downloads, one thread per process."""

from __future__ import annotations

import gc
import os

# Before any import of an upstream library: each reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
# Where small models lie, and what a Trainer takes for its own: "side" is that of `tests.second_device`.
DEVICE = torch.device("cpu")
if os.environ.get("HF_EXT_TEST_DEVICE") == "side":
    from tests.second_device.plugin import DEVICE
ModelFactory: TypeAlias = Callable[..., Any]


def freeze_modules() -> None:
    """Take all that is there, the modules above all, out of the garbage collector's sight.

    A Trainer collects garbage at the end of each run: going through the modules was half of a short run.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """Freeze what imports and collection have made."""
    freeze_modules()


@pytest.fixture(autouse=True)
def _seed_everything() -> None:
    """Start every test from the same global random state, whatever ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> ModelFactory:
    """Return a factory of small random Llama models (two blocks, grouped keys and values, fp32).

    `tiny_llama(seed=0, dtype=torch.float32, **config)`: equal arguments give equal weights;
    `config` overrides fields of the model's config.
    """
    return build_tiny_llama


@pytest.fixture
def tiny_gpt2() -> ModelFactory:
    """Return a factory of small random GPT-2 models, whose layers are Conv1D; called as `tiny_llama` is."""
    return build_tiny_gpt2


@pytest.fixture
def embedded_model() -> ModelFactory:
    """Return a factory of the trained model in the package: `embedded_model(dtype=torch.float32)`."""
    return load_embedded_model


@pytest.fixture
def repository() -> Path:
    """Return the root of the source tree."""
    return REPOSITORY


def build_tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Build a random Llama; global random state is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **config,
    }
    return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**settings)), seed, dtype)


def build_tiny_gpt2(*, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Build a random GPT-2 without dropout; global random state is left as it was."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: dict[str, Any] = {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 256,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    return _seeded(lambda: GPT2LMHeadModel(GPT2Config(**settings)), seed, dtype)


def load_embedded_model(*, dtype: torch.dtype = torch.float32) -> Any:
    """Load the embedded model."""
    from transformers import AutoModelForCausalLM

    import hf_ext

    folder = Path(hf_ext.__file__).parent / "assets" / "tiny-llama"
    return placed(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def placed(model: Any) -> Any:
    """Return a model on the device of the tests; on the CPU as it is, without values for one."""
    return model if DEVICE.type == "cpu" else model.to(DEVICE)


def _seeded(build: Callable[[], nn.Module], seed: int, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return placed(build().to(dtype).eval())
