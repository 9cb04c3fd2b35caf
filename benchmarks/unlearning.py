"""Unlearning memorized facts: gradient ascent, NPO alone, gradient difference, NPO with retain terms.

Run: OMP_NUM_THREADS=1 python benchmarks/unlearning.py [--out docs/assets/unlearning.json]

A character model of width 96 memorizes 96 facts: three letters and a three-digit answer. A tenth of them is
to be forgotten; one update has all of these and two retain facts for each. Each arm has the best of the
rates on a seed of its own: the least retained loss at the end if no forget fact is answered then, else the
fewest answered. An answer is right if greedy decoding gives its three digits.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from _tiny_lab import (  # first: it turns off TRL's telemetry
    char_tokenizer,
    log_likelihood,
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

from hf_ext.trainers.unlearning import UnlearningConfig, UnlearningTrainer

FACTS, FORGET, PER_FORGET = 96, 10, 2
MARKS = (5, 10, 20, 40, 80, 160)
RATES = (3e-4, 1e-3)
WORST = 1e4  # loss at which gradient ascent stops: beyond any of these runs
ARMS: dict[str, dict[str, Any]] = {
    "gradient ascent": {"unlearn_loss": "ga"},
    "NPO alone": {"unlearn_loss": "npo", "retain_loss": "none"},
    "gradient difference": {"unlearn_loss": "graddiff"},
    "NPO + retain": {"unlearn_loss": "npo"},
    "NPO + KL to the start": {"unlearn_loss": "npo", "retain_loss": "kl"},
}


def facts(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (forget, retain) pairs of prompt and completion."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompts: dict[str, None] = {}
    while len(prompts) < FACTS:
        prompts["".join(rng.choices(letters, k=3)) + "="] = None
    pairs = [(prompt, str(rng.randrange(100, 1000))) for prompt in prompts]
    return pairs[:FORGET], pairs[FORGET:]


def measure(model: Any, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Return the share of facts answered, and the mean loss of answers with their end, nats per token."""
    prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    given = sample(model, char_tokenizer(), prompts, 1, 4, temperature=0.0)
    right = sum(found[0] == answer for found, answer in zip(given, answers, strict=True))
    loss = -float(log_likelihood(model, char_tokenizer(), prompts, answers).mean()) / 4
    return {"accuracy": right / len(pairs), "loss": loss}


class Measure(TrainerCallback):
    """Measures both sets after the marked steps."""

    def __init__(self, forget: list[tuple[str, str]], retain: list[tuple[str, str]]) -> None:
        self.sets, self.found = {"forget": forget, "retain": retain}, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is asked for."""
        if state.global_step in MARKS:
            model = kwargs["model"]
            self.found[state.global_step] = {name: measure(model, pairs) for name, pairs in self.sets.items()}


def run(arm: str, rate: float, seed: int, start: str) -> dict[int, dict[str, dict[str, float]]]:
    """Return what was measured after the marked steps."""
    forget, retain = facts(seed)
    watch = Measure(forget, retain)
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_arguments(
            folder,
            max_steps=max(MARKS),
            per_device_train_batch_size=FORGET,
            learning_rate=rate,
            seed=seed,
            retain_per_forget=PER_FORGET,
            max_forget_loss=WORST,
            **ARMS[arm],
        )
        UnlearningTrainer(
            AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
            UnlearningConfig(**settings),
            train_dataset=_rows(forget),
            retain_dataset=_rows(retain),
            processing_class=char_tokenizer(),
            callbacks=[watch],
        ).train()
    return watch.found


def _rows(pairs: list[tuple[str, str]]) -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])


def memorized(seed: int, folder: str) -> tuple[str, dict[str, dict[str, float]]]:
    """Return a folder with a model that knows all facts, and what it is measured at."""
    forget, retain = facts(seed)
    model = tiny_model(seed, 96)
    pretrain(model, forget + retain, 400, batch=48, seed=seed)
    found = {"forget": measure(model, forget), "retain": measure(model, retain)}
    return saved(model, char_tokenizer(), folder), found


def forgotten(found: dict[int, Any]) -> int | None:
    """Return the first marked step at which no forget fact is answered, or None."""
    return next((step for step in MARKS if step in found and found[step]["forget"]["accuracy"] == 0.0), None)


def score(found: dict[int, Any]) -> tuple[float, float]:
    """Return what a rate is chosen by; less is better."""
    last = found[max(MARKS)]
    return last["forget"]["accuracy"], last["retain"]["loss"]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        seeds = [TUNING_SEED, *range(options.seeds)]
        starts = {seed: memorized(seed, f"{folder}/{seed}") for seed in seeds}
        results: dict[str, Any] = {}
        for arm in ARMS:
            tried = {rate: score(run(arm, rate, TUNING_SEED, starts[TUNING_SEED][0])) for rate in RATES}
            rate = min(tried, key=lambda one: tried[one])
            runs = [run(arm, rate, seed, starts[seed][0]) for seed in range(options.seeds)]
            results[arm] = {
                "learning_rate": rate,
                "tried": {f"{k:g}": v for k, v in tried.items()},
                "runs": runs,
            }
            print(arm, f"rate {rate:g}", flush=True)
            for found in runs:
                cells = [
                    f"{step}: {one['forget']['accuracy']:.2f}/{one['retain']['accuracy']:.2f} "
                    f"({one['retain']['loss']:.3f})"
                    for step, one in found.items()
                ]
                print("   ", "  ".join(cells), flush=True)
    base = [starts[seed][1]["retain"]["loss"] for seed in range(options.seeds)]
    rows = []
    for arm, found in results.items():
        last = [one[max(MARKS)] for one in found["runs"]]
        summary = {
            f"{name} {what}": mean_and_spread([one[name][what] for one in last])
            for name in ("forget", "retain")
            for what in ("accuracy", "loss")
        }
        found["last"] = summary
        found["steps to forget"] = [forgotten(one) for one in found["runs"]]
        rows.append(
            [arm, f"{found['learning_rate']:g}", str(found["steps to forget"])]
            + [f"{value['mean']:.4f}" for value in summary.values()]
        )
    print("retained loss before:", base)
    print(table(rows, ["arm", "rate", "steps", "forget acc", "forget loss", "retain acc", "retain loss"]))
    if options.out:
        save_json(options.out, {"retained loss before": base, "arms": results, "rates": RATES})

        def draw(axes: Any) -> None:
            for index, (arm, found) in enumerate(results.items()):
                for name, style in (("forget", "--"), ("retain", "-")):
                    means = [
                        sum(one[step][name]["accuracy"] for one in found["runs"]) / len(found["runs"])
                        for step in MARKS
                    ]
                    axes.plot(MARKS, means, style, color=f"C{index}", label=f"{arm}: {name}")
            axes.set(xlabel="updates", ylabel="share of facts answered", xscale="log")
            axes.legend(fontsize=7)

        save_plot(options.out.with_suffix(".png"), draw, (7.0, 3.6))


if __name__ == "__main__":
    main()
