"""PACED against uniform distillation and against the filter 0 < p < 1, on sums of three difficulties.

Run: OMP_NUM_THREADS=1 python benchmarks/paced_distillation.py [--out docs/assets/paced_distillation.json]

A teacher of width 128 has learned easy and frontier sums. Students of width 48 have mastered sums of one
digit and seen some of two digits and one. The pool has 200 easy sums (one digit), 400 frontier sums (two
digits and one) and 400 far ones (three digits, beyond the teacher too), with right answers as reference
completions; 200 updates of 32. Forward KL on the answers, and the same number of updates in two stages. Each
arm has the best of the rates on a seed of its own. Reported is the greedy accuracy on all 900 frontier sums,
and on the easy ones.
"""

from __future__ import annotations

import argparse
import random
import tempfile
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
from transformers import AutoModelForCausalLM

from hf_ext.trainers.paced_distillation import PacedDistillationConfig, PacedDistillationTrainer

STEPS, BATCH = 200, 32
RATES = (2e-4, 5e-4, 1e-3)
# A tiny exponent is the filter: 0^x = 0, and p^x = 1 else.
UNIFORM, FILTER = {"paced_alpha": 0.0, "paced_beta": 0.0}, {"paced_alpha": 1e-9, "paced_beta": 1e-9}
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {**UNIFORM, "stage_split": 1.0},
    "filter 0 < p < 1": {**FILTER, "stage_split": 1.0},
    "p (1 - p)": {"stage_split": 1.0},
    "uniform, two stages": {**UNIFORM, "stage_split": 0.5},
    "p (1 - p), two stages": {"stage_split": 0.5},
}
Sum = tuple[int, int]


def text(pair: Sum) -> tuple[str, str]:
    """Return prompt and answer."""
    return f"{pair[0]}+{pair[1]}=", str(sum(pair))


def easy() -> list[Sum]:
    """Return all sums of one digit."""
    return [(a, b) for a in range(10) for b in range(10)]


def frontier() -> list[Sum]:
    """Return all sums of two digits and one."""
    return [(a, b) for a in range(10, 100) for b in range(10)]


def correct(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """Reward: whether the completion is the answer."""
    return [float(given == right) for given, right in zip(completions, answer, strict=True)]


def accuracy(model: Any, pairs: list[Sum]) -> float:
    """Return the share of sums that greedy decoding gets right."""
    prompts, answers = zip(*map(text, pairs), strict=True)
    given = sample(model, char_tokenizer(), list(prompts), 1, 6, temperature=0.0)
    return sum(one[0] == right for one, right in zip(given, answers, strict=True)) / len(pairs)


def pool(seed: int) -> Dataset:
    """Return the problems."""
    rng = random.Random(seed)
    far = [(rng.randrange(100, 1000), rng.randrange(100, 1000)) for _ in range(400)]
    chosen = rng.choices(easy(), k=200) + rng.sample(frontier(), 400) + far
    rows = [dict(zip(("prompt", "completion"), text(pair), strict=True)) for pair in chosen]
    return Dataset.from_list([{**row, "answer": row["completion"]} for row in rows])


def load(folder: str) -> Any:
    """Return a model from its folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def run(arm: str, rate: float, seed: int, start: str, teacher: str) -> dict[str, Any]:
    """Return what a student comes to."""
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_arguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            seed=seed,
            max_completion_length=6,
            rollout_batch_size=256,
            **ARMS[arm],
        )
        trainer = PacedDistillationTrainer(
            load(start),
            load(teacher),
            PacedDistillationConfig(**settings),
            pool(seed),
            processing_class=char_tokenizer(),
            reward_funcs=correct,
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "paced/ess" in entry]
        found = {"frontier": accuracy(trainer.model, frontier()), "easy": accuracy(trainer.model, easy())}
        return {**found, "ess": [logs[0]["paced/ess"], logs[-1]["paced/ess"]] if logs else None}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    seeds, results = list(range(options.seeds)), {}
    with tempfile.TemporaryDirectory() as folder:
        rng = random.Random(5)
        known = [text((rng.randrange(100), rng.randrange(100))) for _ in range(1000)]
        known += list(map(text, easy() * 10 + frontier() * 5))
        model = tiny_model(7, 128)
        pretrain(model, known, 600, seed=7)
        pretrain(model, known, 200, lr=5e-4, seed=8)
        of_teacher = {"frontier": accuracy(model, frontier()), "easy": accuracy(model, easy())}
        teacher = saved(model, char_tokenizer(), f"{folder}/teacher")
        print("teacher", of_teacher, flush=True)
        starts: dict[int, str] = {}
        before: dict[int, Any] = {}
        for seed in [TUNING_SEED, *seeds]:
            model = tiny_model(seed, 48)
            seen = random.Random(2000 + seed).sample(frontier(), 200)
            pretrain(model, list(map(text, easy() * 4 + seen)), 500, seed=seed)
            before[seed] = {"frontier": accuracy(model, frontier()), "easy": accuracy(model, easy())}
            starts[seed] = saved(model, char_tokenizer(), f"{folder}/{seed}")
        print("students", before, flush=True)
        rates: dict[str, Any] = {}
        for arm in ARMS:
            rates[arm] = {
                rate: run(arm, rate, TUNING_SEED, starts[TUNING_SEED], teacher)["frontier"] for rate in RATES
            }
            best = max(rates[arm], key=lambda one: rates[arm][one])
            results[arm] = [run(arm, best, seed, starts[seed], teacher) for seed in seeds]
            print(arm, rates[arm], results[arm], flush=True)
    rows = [["start", "", *_cells([before[seed] for seed in seeds])]]
    rows += [
        [arm, f"{max(rates[arm], key=lambda one: rates[arm][one]):g}", *_cells(results[arm])] for arm in ARMS
    ]
    print(table(rows, ["arm", "rate", "frontier", "std", "seeds", "easy"]))
    if options.out:
        students = [before[seed] for seed in seeds]
        save_json(
            options.out, {"teacher": of_teacher, "students": students, "rates": rates, "results": results}
        )

        def draw(axes: Any) -> None:
            for place, arm in enumerate(ARMS):
                values = [one["frontier"] for one in results[arm]]
                axes.bar(place, sum(values) / len(values), color=f"C{place}", alpha=0.5)
                axes.plot([place] * len(values), values, "o", color=f"C{place}")
            axes.set_xticks(range(len(ARMS)), [arm.replace(", ", ",\n") for arm in ARMS], fontsize=7)
            level = sum(one["frontier"] for one in students) / len(students)
            axes.axhline(level, ls=":", color="gray", label="start")
            axes.set(ylabel="accuracy on frontier sums")
            axes.legend(fontsize=8)

        save_plot(options.out.with_suffix(".png"), draw, (7.0, 3.6))


def _cells(found: list[dict[str, Any]]) -> list[str]:
    spread = mean_and_spread([one["frontier"] for one in found])
    kept = mean_and_spread([one["easy"] for one in found])
    each = " ".join(f"{value:.3f}" for value in spread["values"])
    return [f"{spread['mean']:.3f}", f"{spread['std']:.3f}", each, f"{kept['mean']:.3f}"]


if __name__ == "__main__":
    main()
