"""The tiny laboratory of the effect scripts: it builds, learns, samples and scores what it says."""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "_tiny_lab.py"


@cache
def _lab() -> Any:
    spec = importlib.util.spec_from_file_location("_tiny_lab", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_telemetry_is_off_whatever_was_imported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    _lab.__wrapped__()
    assert constants.HF_HUB_DISABLE_TELEMETRY


def test_every_symbol_is_one_token_and_comes_back() -> None:
    lab = _lab()
    tokenizer = lab.char_tokenizer()
    text = "".join(lab.SYMBOLS[3:])
    assert tokenizer(text)["input_ids"] == list(range(3, 49))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("a<eos>")["input_ids"][1:] == [2]
    assert tokenizer.chat_template is None
    with pytest.raises(Exception, match="WordLevel"):
        tokenizer("A")


def test_the_model_has_the_documented_size_and_follows_its_seed() -> None:
    lab = _lab()
    before = torch.get_rng_state()
    first, same, other = lab.tiny_model(0), lab.tiny_model(0), lab.tiny_model(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.numel() for p in first.parameters()) == 88_512
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_saved_model_and_tokenizer_load_from_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lab = _lab()
    model, tokenizer = lab.tiny_model(), lab.char_tokenizer()
    path = lab.saved(model, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.config._name_or_path == path  # from which TRL makes the reference
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    again = AutoTokenizer.from_pretrained(path)
    assert again("12+7=ab c")["input_ids"] == tokenizer("12+7=ab c")["input_ids"]
    assert again.decode(again("12+7=ab c")["input_ids"]) == "12+7=ab c"


def test_pretraining_learns_and_is_repeatable() -> None:
    lab = _lab()
    texts = [(f"{letter}=", letter * 3) for letter in "abcdefgh"]
    runs = []
    for _ in range(2):
        model = lab.tiny_model()
        losses = lab.pretrain(model, texts, 60, batch=8, seed=1)
        runs.append((losses, lab.sample(model, lab.char_tokenizer(), ["a=", "h="], 3, 5, temperature=0)))
    assert runs[0] == runs[1]
    losses, samples = runs[0]
    assert losses[0] == pytest.approx(math.log(49), abs=0.3)  # a random model is near uniform
    assert losses[-1] < 0.1
    assert samples == [["aaa"] * 3, ["hhh"] * 3]


def test_samples_have_the_frequencies_of_the_model() -> None:
    lab = _lab()
    model, tokenizer = lab.tiny_model(), lab.char_tokenizer()
    lab.pretrain(model, [("#", "a")] * 3 + [("#", "b")], 40, batch=4)
    before = torch.get_rng_state()
    (texts,) = lab.sample(model, tokenizer, ["#"], 2000, 3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert lab.sample(model, tokenizer, ["#"], 2000, 3, seed=0) == [texts]
    assert lab.sample(model, tokenizer, ["#"], 2000, 3, seed=1) != [texts]
    probability = float(lab.log_likelihood(model, tokenizer, ["#"], ["a"]).exp())
    assert 0.6 < probability < 0.9
    # Five standard deviations of a share of 2000 draws.
    assert texts.count("a") / 2000 == pytest.approx(probability, abs=5 * 0.5 / 2000**0.5)


def test_a_sample_does_not_depend_on_the_length_of_other_prompts() -> None:
    lab = _lab()
    model, tokenizer = lab.tiny_model(), lab.char_tokenizer()
    lab.pretrain(model, [(f"{letter}=", letter * 3) for letter in "abcdefgh"], 60, batch=8)
    alone = lab.sample(model, tokenizer, ["b="], 1, 5, temperature=0)
    padded = lab.sample(model, tokenizer, ["b=", "hgfedcba="], 1, 5, temperature=0)
    assert padded[0] == alone[0] == ["bbb"]


def test_likelihood_is_the_sum_over_the_completion_and_its_end() -> None:
    lab = _lab()
    model, tokenizer = lab.tiny_model(), lab.char_tokenizer()
    prompts, completions = ["12+7=", "a=", "#"], ["19", "abcde", ""]
    model.train()
    found = lab.log_likelihood(model, tokenizer, prompts, completions)
    assert model.training
    assert not found.requires_grad
    model.requires_grad_(False)
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = tokenizer(prompt + completion + "<eos>", return_tensors="pt")["input_ids"]
        logps = model(ids).logits[0].log_softmax(-1)
        start = len(tokenizer(prompt)["input_ids"])
        wanted = sum(float(logps[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))
        assert float(found[index]) == pytest.approx(wanted, abs=1e-4)
    assert found.shape == (3,)


def test_trainer_arguments_make_a_config_and_can_be_changed(tmp_path: Path) -> None:
    from trl.trainer.dpo_config import DPOConfig

    arguments = _lab().trainer_arguments(tmp_path, logging_steps=1, max_steps=3)
    config = DPOConfig(**arguments)
    assert (config.use_cpu, config.bf16, config.gradient_checkpointing) == (True, False, False)
    assert (config.report_to, config.save_strategy, config.max_steps) == ([], "no", 3)
    assert (config.lr_scheduler_type, config.logging_steps, config.output_dir) == (
        "constant",
        1,
        str(tmp_path),
    )


def test_calibration_error_by_hand() -> None:
    error = _lab().expected_calibration_error
    # Bins of 0.5: (0.2, 0.4) with accuracy 1/2, (0.6, 0.8, 1.0) with accuracy 1/3.
    value = error([0.2, 0.4, 0.6, 0.8, 1.0], [True, False, False, False, True], bins=2)
    assert value == pytest.approx(2 / 5 * abs(0.3 - 1 / 2) + 3 / 5 * abs(0.8 - 1 / 3))
    # An upper edge belongs to its bin: with 0.7 in (0.6, 0.7] the two rows do not cancel.
    assert error([0.7, 0.75], [1.0, 0.0]) == pytest.approx((0.3 + 0.75) / 2)
    assert error(torch.tensor([0.0, 1.0]), torch.tensor([0, 1])) == 0.0


def test_bad_input_is_refused() -> None:
    lab = _lab()
    model, tokenizer = lab.tiny_model(), lab.char_tokenizer()
    with pytest.raises(ValueError, match="batch must be from 1 to 1"):
        lab.pretrain(model, [("a", "b")], 1)
    with pytest.raises(ValueError, match="prompts must not be empty; row 1"):
        lab.log_likelihood(model, tokenizer, ["a", ""], ["b", "b"])
    with pytest.raises(ValueError, match="prompts must not be empty; row 0"):
        lab.sample(model, tokenizer, [""], 1, 2)
    with pytest.raises(ValueError, match="n must be at least 1"):
        lab.sample(model, tokenizer, ["a"], 0, 2)
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        lab.sample(model, tokenizer, ["a"], 1, 2, temperature=-1.0)
    for confidence, correct, message in (
        ([], [], "must be"), ([0.5], [1.0, 0.0], "must be"), ([1.5], [1.0], r"in \[0, 1\]"),
        ([math.nan], [1.0], r"in \[0, 1\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lab.expected_calibration_error(confidence, correct)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        lab.expected_calibration_error([0.5], [1.0], bins=0)
