"""Forgetting over three tasks, one after the other: plain LoRA, constant averages, and continual EMA.

Run: python benchmarks/continual_ema.py [--steps 90] [--out docs/assets/continual_ema.json]

The embedded model with LoRA (r = 16, all linear layers) learns to copy a string of letters, then to reverse
one, then to move its first letter to the end; each task is a run of its own from the weights that the former
has left. All arms see the same batches. Reported is the accuracy over the tokens of held-out answers, given
the ones before: its mean over the tasks after the last one, and forgetting, the mean over the earlier tasks
of the best accuracy after any task minus the last.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from _lab import embedded_model, fit, mean_and_spread, save_json, save_plot, table, tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_ext.callbacks import ContinualEMACallback

TASKS = {
    "copy": lambda letters: letters,
    "reverse": lambda letters: letters[::-1],
    "rotate": lambda letters: letters[1:] + letters[:1],
}
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "constant 0.01": {"coefficient": 0.01},
    "constant 0.05": {"coefficient": 0.05},
    "auto": {},
}
RATE, BATCH, LETTERS = 4e-3, 16, 6


def examples(task: str, count: int, seed: int) -> Dataset:
    """Return examples of a task; labels are set on the answer alone."""
    draw = random.Random(f"{task} {seed}")
    rows = []
    for _ in range(count):
        letters = [draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(LETTERS)]
        prompt = _ids(f"{task}:" + "".join(f" {letter}" for letter in letters) + " =")
        answer = _ids("".join(f" {letter}" for letter in TASKS[task](letters)))
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    length = max(len(row["input_ids"]) for row in rows)
    if any(len(row["input_ids"]) != length for row in rows):
        raise ValueError("the tokenizer gives some letter more than one token")
    return Dataset.from_list(rows)


def _ids(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


def accuracy(model: Any, rows: Dataset) -> float:
    """Return the share of answer tokens that are the likeliest, given those before."""
    model.eval()
    ids, labels = torch.tensor(rows["input_ids"]), torch.tensor(rows["labels"])[:, 1:]
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits[:, :-1].argmax(-1)
    model.train()
    asked = labels != -100
    return float((likeliest == labels)[asked].float().mean())


def sequence(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train the tasks one after the other, and return the accuracies after each."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(
        embedded_model(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    held_out = {task: examples(task, 128, 10_000 + seed) for task in TASKS}
    after, shares = [], []
    for task in TASKS:
        settings = ARMS[arm]
        ema = None if settings is None else ContinualEMACallback(**settings)
        rows = examples(task, steps * BATCH, seed)
        fit(
            rows,
            held_out[task],
            learning_rate=RATE,
            seed=seed,
            max_steps=steps,
            batch_size=BATCH,
            callbacks=[] if ema is None else [ema],
            model=model,
            evaluate=False,
        )
        if ema is not None:
            shares.append(ema.scalars()["adaptive_share"])
        after.append({name: accuracy(model, rows) for name, rows in held_out.items()})
    last = after[-1]
    earlier = list(TASKS)[:-1]
    forgetting = sum(max(row[t] for row in after) - last[t] for t in earlier) / len(earlier)
    found = {
        "after": after,
        "mean_accuracy": sum(last.values()) / len(last),
        "forgetting": forgetting,
        "learned": sum(row[t] for row, t in zip(after, TASKS, strict=True)) / len(TASKS),
        "adaptive_share": sum(shares) / len(shares) if shares else None,
    }
    rounded = {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}
    print(f"seed {seed} {arm}: {rounded}", flush=True)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm in ARMS:
            runs[arm].append(sequence(arm, seed, options.steps))
    results: dict[str, Any] = {}
    for arm, found in runs.items():
        keys = ["mean_accuracy", "forgetting", "learned"] + (["adaptive_share"] if arm == "auto" else [])
        results[arm] = {key: mean_and_spread([run[key] for run in found]) for key in keys}
        results[arm]["after_each_task"] = [run["after"] for run in found]

    def cell(arm: str, key: str) -> str:
        value = results[arm].get(key)
        return "" if value is None else f"{value['mean']:.3f} ± {value['std']:.3f}"

    keys = ["learned", "mean_accuracy", "forgetting", "adaptive_share"]
    header = ["arm", "right after learning", "after the last task", "forgetting", "adaptive share"]
    print(table([[arm, *(cell(arm, key) for key in keys)] for arm in ARMS], header))
    if options.out is None:
        return
    content = {
        "model": "embedded tiny-llama, LoRA r = 16",
        "tasks": list(TASKS),
        "steps_per_task": options.steps,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "results": results,
        "seconds": time.perf_counter() - start,
    }
    save_json(options.out, content)

    def draw(axes: Any) -> None:
        places = range(len(ARMS))
        for offset, key, label in (
            (-0.2, "learned", "right after learning it"),
            (0.2, "mean_accuracy", "after the last task"),
        ):
            means = [results[arm][key]["mean"] for arm in ARMS]
            spreads = [results[arm][key]["std"] for arm in ARMS]
            axes.bar([place + offset for place in places], means, 0.38, yerr=spreads, capsize=3, label=label)
        axes.set_xticks(list(places), list(ARMS))
        axes.set_ylabel("accuracy, mean over the tasks")
        axes.set_ylim(0.0, 1.2)
        axes.legend(loc="upper center", ncols=2)

    save_plot(options.out.with_suffix(".png"), draw)


if __name__ == "__main__":
    main()
