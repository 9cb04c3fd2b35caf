"""Calibration after training on wrong labels: SFT and progressive self-distillation.

Run: OMP_NUM_THREADS=1 python benchmarks/self_distillation.py [--out docs/assets/self_distillation.json]

The character model learns one digit for each of 1024 prompts (two letters and a digit; the last digit of the
sum of the first letter's number and the digit) from 640 rows, of which a fifth carry a wrong digit: 30
epochs, batches of 32. The other 384 prompts are held out. A calibrated model gives the right digit there the
share of 0.8 that it has in the data, so calibration is measured on digits drawn as in training, and on right
digits alone as well: expected calibration error over 10 bins, negative log-likelihood of the digit, accuracy.
Each arm has the rate with the lowest negative log-likelihood of digits drawn as in training, on a seed of its
own.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

from _tiny_lab import (  # first: it turns off TRL's telemetry
    char_tokenizer,
    expected_calibration_error,
    tiny_model,
    trainer_arguments,
)

# isort: split
import datasets
import torch
from _lab import TUNING_SEED, mean_and_spread, save_json, save_plot, table
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hf_ext.trainers.self_distillation import SelfDistillationConfig, SelfDistillationTrainer

LETTERS, DIGITS, TRAIN, WRONG = "abcdefghijklmnop", "0123", 640, 0.2
EPOCHS, BATCH, ALPHA = 30, 32, 0.8
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
ARMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SFT": (SFTTrainer, SFTConfig, {}),
    "PS-KD, weights of the last epoch": (
        SelfDistillationTrainer,
        SelfDistillationConfig,
        {"pskd_alpha": ALPHA},
    ),
    "PS-KD, cache of the last epoch": (
        SelfDistillationTrainer,
        SelfDistillationConfig,
        {"pskd_alpha": ALPHA, "teacher": "cache", "cache_top_k": 20},
    ),
}


def rows(seed: int) -> dict[str, list[tuple[str, str]]]:
    """Return pairs of prompt and digit: "train", and held out "drawn" as in training and "right"."""
    rng = random.Random(seed)
    found = [
        (f"{a}{b}{c}=", str((LETTERS.index(a) + int(c)) % 10))
        for a, b, c in itertools.product(LETTERS, LETTERS, DIGITS)
    ]
    rng.shuffle(found)

    def drawn(digit: str) -> str:
        return rng.choice([d for d in "0123456789" if d != digit]) if rng.random() < WRONG else digit

    given = [(prompt, drawn(digit)) for prompt, digit in found]
    return {"train": given[:TRAIN], "drawn": given[TRAIN:], "right": found[TRAIN:]}


@torch.no_grad()
def measure(model: Any, held_out: list[tuple[str, str]]) -> dict[str, float]:
    """Return calibration error, loss and accuracy of the digit, over the whole vocabulary."""
    tokenizer = char_tokenizer()
    ids = tokenizer([prompt for prompt, _ in held_out], return_tensors="pt")["input_ids"]
    wanted = torch.tensor(tokenizer.convert_tokens_to_ids([digit for _, digit in held_out]))
    model.eval()
    logps = model(input_ids=ids).logits[:, -1].float().log_softmax(-1)
    best, given = logps.max(-1)
    right = given == wanted
    return {
        "ece": expected_calibration_error(best.exp(), right),
        "nll": -float(logps.gather(1, wanted[:, None]).mean()),
        "accuracy": float(right.float().mean()),
    }


def run(arm: str, rate: float, seed: int) -> dict[str, float]:
    """Return what is measured after training."""
    trainer, config, settings = ARMS[arm]
    sets = rows(seed)
    model = tiny_model(seed)
    data = Dataset.from_list([{"prompt": prompt, "completion": digit} for prompt, digit in sets["train"]])
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            seed=seed,
            logging_steps=1000,
            **settings,
        )
        trainer(
            model=model, args=config(**arguments), train_dataset=data, processing_class=char_tokenizer()
        ).train()
    found = {name: measure(model, sets[name]) for name in ("drawn", "right")}
    return {f"{what}, {name}": value for name, one in found.items() for what, value in one.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    results: dict[str, Any] = {}
    for arm in ARMS:
        tried = {rate: run(arm, rate, TUNING_SEED) for rate in RATES}
        rate = min(tried, key=lambda one: tried[one]["nll, drawn"])
        runs = [run(arm, rate, seed) for seed in range(options.seeds)]
        results[arm] = {
            "learning_rate": rate,
            "tried": {f"{key:g}": value for key, value in tried.items()},
            "runs": runs,
            **{key: mean_and_spread([one[key] for one in runs]) for key in runs[0]},
        }
        print(arm, f"rate {rate:g}", [{k: round(v, 3) for k, v in one.items()} for one in runs], flush=True)
    cells = [
        [
            arm,
            f"{found['learning_rate']:g}",
            " ".join(f"{one['ece, drawn']:.3f}" for one in found["runs"]),
            *(f"{found[key]['mean']:.3f}" for key in found["runs"][0]),
        ]
        for arm, found in results.items()
    ]
    print(table(cells, ["arm", "rate", "ECE of each seed", *next(iter(results.values()))["runs"][0]]))
    if options.out:
        save_json(options.out, {"arms": results, "rates": RATES, "epochs": EPOCHS, "wrong": WRONG})

        def draw(axes: Any) -> None:
            places = range(len(results))
            axes.bar(
                places, [found["ece, drawn"]["mean"] for found in results.values()], color="C0", alpha=0.5
            )
            for place, found in zip(places, results.values(), strict=True):
                axes.plot([place] * len(found["runs"]), [one["ece, drawn"] for one in found["runs"]], "ko")
            axes.set_xticks(list(places), [arm.replace(", ", "\n") for arm in results], fontsize=8)
            axes.set_ylabel("expected calibration error,\nheld out, digits as in training")

        save_plot(options.out.with_suffix(".png"), draw, (7.0, 3.4))


if __name__ == "__main__":
    main()
