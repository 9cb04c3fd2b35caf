"""The embedded model, its tokenizer and the numbers beside it belong together."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hf_ext.data import SPLITS, docstring_pairs, split_of

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "hf_ext" / "assets" / "tiny-llama"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads((ASSETS / "training.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_baselines", ROOT / "scripts" / "tiny_llama_baselines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert sum(files.values()) < 8_000_000
    assert files["loss_curve.png"] < 100_000
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "loss_curve.png",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }


def test_weights_are_bf16_safetensors_and_those_of_the_report(report: dict[str, Any]) -> None:
    path = ASSETS / "model.safetensors"
    with safe_open(path, "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors) == report["parameters"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == report["weights_sha256"]


def test_model_loads_in_bf16_and_generates(tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSETS)
    assert model.dtype == torch.bfloat16
    assert 2e6 < model.num_parameters() < 4e6
    inputs = tokenizer("import os\n\ndef", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_recorded_loss_is_the_models(
    report: dict[str, Any], tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    # The texts stand in the report, so the test is the same under every Python version.
    assert len(report["check"]) == 4
    for row in report["check"]:
        assert split_of(row["module"]) == "test"
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        assert ids.shape[1] == row["tokens"] + 1  # the bos token
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        # fp32 over a few hundred tokens differs by the order of sums alone.
        assert loss * row["tokens"] == pytest.approx(row["nats"], rel=1e-4), row["module"]


def test_model_is_ahead_of_the_5_grams(report: dict[str, Any]) -> None:
    bits = report["bits_per_byte"]
    assert bits["model"] < min(bits["5gram_bytes"], bits["5gram_tokens"])
    assert bits["model"] < bits["xz_9e"]
    assert bits["model"] == pytest.approx(
        report["held_out_nats"] / report["corpus"]["test"]["bytes"] / math.log(2)
    )


def test_report_and_card_are_of_this_run(report: dict[str, Any]) -> None:
    steps = [row["step"] for row in report["curve"]]
    assert steps == sorted(steps)
    assert steps[-1] == report["steps"]
    assert report["curve"][-1]["validation_nats_per_token"] < report["curve"][0]["validation_nats_per_token"]
    assert {split_of(module) for module in report["held_out_modules"]} == {"test"}
    assert {split_of(module) for module in report["validation_modules"]} == {"validation"}
    card = (ASSETS / "README.md").read_text()
    for value in report["bits_per_byte"].values():
        assert f"{value:.3f}" in card
    assert "PSF" in card


def test_tokenizer_gives_back_every_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    points = [chr(p) for p in (*range(0x3000), *range(0x1F300, 0x1F700)) if not 0xD800 <= p < 0xE000]
    texts = [
        bytes(range(256)).decode("latin-1"),
        rng.randbytes(2000).decode("latin-1"),
        rng.randbytes(2000).decode("utf-8", errors="replace"),
        "".join(rng.choices(points, k=2000)),
        "e\u0301 \u00e9 \ufb01 \u212b \u0000\ufeff\U0010ffff",  # a normaliser would change these
        " \n\n\t  \r\n  \x0c\v  trailing  ",
        "a , b . c ' s do n't",
        "",
    ]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        with_bos = tokenizer(text)["input_ids"]
        assert with_bos == [tokenizer.bos_token_id, *ids]
        assert tokenizer.decode(with_bos, skip_special_tokens=True) == text


def test_tokenizer_covers_every_byte_and_fits_the_model(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = tokenizer.get_vocab()
    assert len(ByteLevel.alphabet()) == 256
    assert set(ByteLevel.alphabet()) <= set(vocabulary)
    assert len(vocabulary) == model.config.vocab_size == 4096
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3
    config = model.generation_config
    assert {config.bos_token_id, config.eos_token_id, config.pad_token_id} == special


@pytest.mark.parametrize("split", [split for split in SPLITS if split != "train"])
def test_prompt_tokens_are_a_prefix_of_the_pair(tokenizer: PreTrainedTokenizerFast, split: str) -> None:
    pairs = list(docstring_pairs(split))
    prompts = tokenizer([pair.prompt for pair in pairs])["input_ids"]
    both = tokenizer([pair.prompt + pair.completion for pair in pairs])["input_ids"]
    assert all(whole[: len(prompt)] == prompt for prompt, whole in zip(prompts, both, strict=True))


def test_ngram_model_sums_to_one(baselines: ModuleType) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.geometric(0.2, size=300).clip(0, 19) for _ in range(4)]
    model = baselines.KneserNey(vocab_size=20, start=20).fit(sequences)
    seen = [list(sequences[0][i : i + n]) for n in (0, 1, 2, 3, 4) for i in (0, 7, 100)]
    for context in [*seen, [19, 0, 19, 0], [3, 3, 3, 19], [20, 20, 20, 5]]:
        distribution = model.distribution(context)
        assert distribution.min() > 0
        assert distribution.sum() == pytest.approx(1.0, abs=1e-12)


def test_ngram_probabilities_are_those_of_the_distributions(baselines: ModuleType) -> None:
    rng = np.random.default_rng(1)
    model = baselines.KneserNey(vocab_size=8, start=8, order=3).fit([rng.integers(0, 8, size=200)])
    sequence = rng.integers(0, 8, size=30)
    chained = [model.distribution(sequence[:i])[symbol] for i, symbol in enumerate(sequence)]
    np.testing.assert_allclose(model.probabilities(sequence), chained)
    assert model.bits_of([sequence]) == pytest.approx(-np.log2(chained).sum())


def test_ngram_by_hand(baselines: ModuleType) -> None:
    # Bigrams of "0 0 1" after the start 2: 20, 00, 01, once each, so every discount is one half.
    # Left neighbours: 0 has {2, 0}, 1 has {0}. p1(0) = 1.5/3 + (1/3)/2 = 2/3, p1(1) = .5/3 + (1/3)/2 = 1/3.
    # After 0: c = 1, 1 of 2. p(0|0) = .5/2 + .5 * 2/3 = 7/12.
    model = baselines.KneserNey(vocab_size=2, start=2, order=2).fit([np.array([0, 0, 1])])
    np.testing.assert_allclose(model.distribution([0]), [7 / 12, 5 / 12])
    np.testing.assert_allclose(model.distribution([1]), [2 / 3, 1 / 3])  # never seen: the lower order


def test_ngram_learns_and_refuses(baselines: ModuleType) -> None:
    text = np.tile(np.arange(5), 200)
    model = baselines.KneserNey(vocab_size=5, start=5).fit([text])
    assert model.bits_of([text[:100]]) / 100 < 0.1
    with pytest.raises(ValueError, match="63 bits"):
        baselines.KneserNey(vocab_size=1 << 13, start=0, order=5)
