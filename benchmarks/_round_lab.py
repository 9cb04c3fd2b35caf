"""What the effect scripts of trainers in rounds share: a random character model that is to write one letter.

The reward is the share of the letter "a" among the at most eight characters of a completion: computed, so the
reward of a policy is measured on prompts and samples that no round has seen.
"""

from __future__ import annotations

import random
import string
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _tiny_lab import char_tokenizer, log_likelihood, sample, saved, tiny_model, trainer_arguments
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import TrainOutput

from hf_ext.core.files import read_tensors

LETTER, LENGTH, ROUND = "a", 8, 200
TUNING_SEED = 100
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Return the share of the letter in each completion; an empty one has none of it."""
    return [text.count(LETTER) / max(len(text), 1) for text in completions]


@cache
def prompts(count: int, seed: int) -> tuple[str, ...]:
    """Return distinct prompts of four letters and "="; those to measure on have a seed of their own."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_lowercase, k=4)) + "="] = None
    return tuple(found)


def measure(model: Any, first: Any) -> dict[str, float]:
    """Return a policy's reward, and its KL from the first one in nats per sequence, on unseen prompts."""
    tokenizer, asked = char_tokenizer(), prompts(200, 999)
    model.eval()
    groups = sample(model, tokenizer, asked, 8, LENGTH, seed=1)
    texts = [text for group in groups for text in group]
    flat = [prompt for prompt in asked for _ in range(8)]
    now, then = (log_likelihood(m, tokenizer, flat, texts) for m in (model, first))
    return {"reward": sum(reward(texts)) / len(texts), "kl": float((now - then).mean())}


def run(trainer_class: Any, config: Any, seed: int, rounds: int, **settings: Any) -> dict[str, Any]:
    """Train one arm, and measure the policy after each round.

    Args:
        trainer_class: A trainer in rounds.
        config: Its config.
        seed: Of the first weights, the prompts and the samples.
        rounds: Prompts are ROUND for each.
        **settings: Further fields of the config.

    Returns:
        `rounds`: reward and KL of the policy at the end of each; `hats`: of the trained points, where the
        policy is another; `start`: the reward of the first weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = saved(tiny_model(seed), char_tokenizer(), Path(folder) / "first")
        first = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        given: dict[str, Any] = {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 32,
            "max_completion_length": LENGTH,
            "num_candidates": 4,
            "kl_prompts": 0,
            "generation_batch_size": 256,
            "logging_steps": 1000,
            "seed": seed,
            **settings,
        }
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            args=config(**trainer_arguments(Path(folder) / "run", **given)),
            train_dataset=Dataset.from_dict({"prompt": list(prompts(ROUND * rounds, seed))}),
            processing_class=char_tokenizer(),
            reward_funcs=reward,
        )
        found: dict[str, Any] = {"rounds": [], "hats": [], "start": measure(first, first)["reward"]}
        finish = trainer._finish_round
        probe = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

        def watched(place: Path, current: Path, *args: Any, **kwargs: Any) -> None:
            finish(place, current, *args, **kwargs)
            for name, key in (("policy", "rounds"), ("hat", "hats")):
                file = current / f"{name}.safetensors"
                if file.exists():
                    found[key].append(measure(_with(probe, read_tensors(file)), first))

        trainer._finish_round = watched
        output: TrainOutput = trainer.train()
        found["steps"] = output.global_step
    return found


def _with(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return model
