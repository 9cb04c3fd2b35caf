"""AlignDistil against DPO and plain distillation: how much of what is preferred, and how well formed.

Run: OMP_NUM_THREADS=1 python benchmarks/aligndistil.py [--out docs/assets/aligndistil.json]

A character model is trained on strings of six letters from a to f; of two strings the one with more `a` is
preferred. A DPO model and a reverse one take 80 updates each (beta 0.1, the best rate for DPO); a distilled
student starts where they did and takes 80 updates of 32 chosen strings (or of its own samples). DPO with 160
updates has as many as DPO and student together. Each arm has the best of the rates on three seeds of their
own, by the mean share of `a` with badly formed outputs counted as none: which rate leaves DPO's outputs well
formed differs from seed to seed.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _tiny_lab import (  # first: it turns off TRL's telemetry
    char_tokenizer,
    pretrain,
    sample,
    saved,
    tiny_model,
    trainer_arguments,
)

# isort: split
import datasets
import torch
from _lab import TUNING_SEED, mean_and_spread, save_json, save_plot, table
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from hf_ext.trainers.aligndistil import AlignDistilConfig, AlignDistilTrainer, reverse_preferences

PROMPT, LETTERS, LENGTH, PAIRS = "#", "abcdef", 6, 2560
STEPS, BATCH = 80, 32
RATES = (5e-5, 1e-4, 2e-4, 3e-4)
TUNING_SEEDS = (TUNING_SEED, TUNING_SEED + 1, TUNING_SEED + 2)
SAMPLES = 512
ARMS: dict[str, dict[str, Any]] = {
    "plain distillation": {"teacher_type": "gkd"},
    "constant w=5": {"teacher_type": "theorem1_contrast", "ad_weight": 5.0},
    "AlignDistil": {},
    "AlignDistil, on-policy": {"on_policy": True},
}
LONG = f"DPO, {2 * STEPS} updates"
MARKS = (10, 20, 40, 80)


def strings(rng: random.Random, count: int) -> list[str]:
    """Return random strings."""
    return ["".join(rng.choices(LETTERS, k=LENGTH)) for _ in range(count)]


def pairs(seed: int) -> Dataset:
    """Return pairs of strings, the one with more `a` chosen; ties are left out."""
    rng, rows = random.Random(seed), []
    while len(rows) < PAIRS:
        one, two = strings(rng, 2)
        if one.count("a") != two.count("a"):
            chosen, rejected = sorted((one, two), key=lambda text: -text.count("a"))
            rows.append({"prompt": PROMPT, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def measure(model: Any) -> dict[str, float]:
    """Return the share of `a` among letters, that of well-formed outputs, and both together."""
    texts = sample(model, char_tokenizer(), [PROMPT], SAMPLES, 12, temperature=1.0, seed=7)[0]
    good = [bool(re.fullmatch(f"[{LETTERS}]{{{LENGTH}}}", text)) for text in texts]
    letters = sum(map(len, texts))
    return {
        "share of a": sum(text.count("a") for text in texts) / max(letters, 1),
        "well formed": sum(good) / len(good),
        "both": sum(text.count("a") / LENGTH for text, ok in zip(texts, good, strict=True) if ok)
        / len(texts),
    }


class Measure(TrainerCallback):
    """Measures after the marked steps."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is asked for."""
        if state.global_step in MARKS:
            self.found[state.global_step] = measure(kwargs["model"])


def load(folder: str) -> Any:
    """Return a model from its folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def arguments(folder: str, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """Return what all trainers share."""
    return trainer_arguments(
        folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate, seed=seed
    )


def dpo(start: str, data: Dataset, seed: int, rate: float, steps: int) -> Any:
    """Return a model trained by DPO."""
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(**arguments(folder, seed, rate, steps), beta=0.1, max_length=32)
        trainer = DPOTrainer(load(start), args=config, train_dataset=data, processing_class=char_tokenizer())
        trainer.train()
        return trainer.model


def distilled(arm: str, start: str, models: dict[str, Any], data: Dataset, seed: int, rate: float) -> Any:
    """Return what a distilled student was measured at, by update."""
    watch = Measure()
    with tempfile.TemporaryDirectory() as folder:
        config = AlignDistilConfig(
            **arguments(folder, seed, rate, STEPS), max_completion_length=12, **ARMS[arm]
        )
        AlignDistilTrainer(
            load(start),
            models["dpo"],
            config,
            reverse_model=models["reverse"],
            train_dataset=data,
            processing_class=char_tokenizer(),
            callbacks=[watch],
        ).train()
    return watch.found


def mean_on_tuning_seeds(run: Callable[[int], dict[str, float]]) -> float:
    """Return the mean of what a rate is chosen by."""
    return sum(run(seed)["both"] for seed in TUNING_SEEDS) / len(TUNING_SEEDS)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    seeds, results = list(range(options.seeds)), {}
    with tempfile.TemporaryDirectory() as folder:
        starts, data = {}, {seed: pairs(seed) for seed in [*TUNING_SEEDS, *seeds]}
        for seed in [*TUNING_SEEDS, *seeds]:
            model = tiny_model(seed)
            texts = [(PROMPT, text) for text in strings(random.Random(1000 + seed), 4096)]
            pretrain(model, texts, 1600, seed=seed)
            starts[seed] = saved(model, char_tokenizer(), f"{folder}/{seed}")
        rates: dict[str, Any] = {
            name: {
                rate: mean_on_tuning_seeds(
                    lambda s, rate=rate, steps=steps: measure(dpo(starts[s], data[s], s, rate, steps))
                )
                for rate in RATES
            }
            for name, steps in (("DPO", STEPS), (LONG, 2 * STEPS))
        }
        rate, long_rate = (max(found, key=lambda one: found[one]) for found in rates.values())
        print(rates, flush=True)
        teachers = {}
        for seed in [*TUNING_SEEDS, *seeds]:
            teachers[seed] = {
                "dpo": dpo(starts[seed], data[seed], seed, rate, STEPS),
                "reverse": dpo(starts[seed], reverse_preferences(data[seed]), seed, rate, STEPS),
            }
        results["start"] = [measure(load(starts[seed])) for seed in seeds]
        results["DPO"] = [measure(teachers[seed]["dpo"]) for seed in seeds]
        results["reverse DPO"] = [measure(teachers[seed]["reverse"]) for seed in seeds]
        results[LONG] = [measure(dpo(starts[seed], data[seed], seed, long_rate, 2 * STEPS)) for seed in seeds]
        curves: dict[str, Any] = {}
        for arm in ARMS:
            tried = {
                one: mean_on_tuning_seeds(
                    lambda s, one=one, arm=arm: distilled(arm, starts[s], teachers[s], data[s], s, one)[STEPS]
                )
                for one in RATES
            }
            best = max(tried, key=lambda one: tried[one])
            rates[arm] = tried
            runs = [distilled(arm, starts[s], teachers[s], data[s], s, best) for s in seeds]
            results[arm], curves[arm] = [found[STEPS] for found in runs], runs
            print(arm, tried, [one["both"] for one in results[arm]], flush=True)
    rows = []
    for arm, found in results.items():
        spread = {name: mean_and_spread([one[name] for one in found]) for name in found[0]}
        best = max(rates[arm], key=lambda one: rates[arm][one]) if arm in rates else None
        each = " ".join(f"{one['share of a']:.2f}/{one['well formed']:.2f}" for one in found)
        rows.append([arm, f"{best:g}" if best else "", *(f"{v['mean']:.3f}" for v in spread.values()), each])
    print(table(rows, ["arm", "rate", "share of a", "well formed", "both", "seeds"]))
    if options.out:
        save_json(options.out, {"results": results, "rates": rates, "curves": curves})

        def draw(axes: Any) -> None:
            for index, (arm, runs) in enumerate(curves.items()):
                means = [sum(run[m]["both"] for run in runs) / len(runs) for m in MARKS]
                axes.plot(MARKS, means, "--" if "on-policy" in arm else "-", color=f"C{index}", label=arm)
            for name, style in (("DPO", ":"), ("start", "-.")):
                level = sum(one["both"] for one in results[name]) / len(seeds)
                axes.axhline(level, ls=style, color="gray", label=name)
            axes.set(xlabel="updates of the student", ylabel="share of a in well-formed outputs")
            axes.legend(fontsize=7)

        save_plot(options.out.with_suffix(".png"), draw, (7.0, 3.6))


if __name__ == "__main__":
    main()
