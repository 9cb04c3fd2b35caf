"""D2O against gradient ascent and DPO on a model's own samples: fewer bad words, at what cost to good ones.

Run: OMP_NUM_THREADS=1 python benchmarks/d2o.py [--out docs/assets/d2o.json]

The character model learns five-letter words, of which three in ten hold a bad letter (x, y or z). Training
gets 32 prompts with a bad word each, and no good one. DPO takes one sample of the model as `chosen`, D2O
eight as anchors; both have beta 0.1 and see the same negatives, 20 times. Every method is run at every rate.
Its tuned rate is the one with the largest share of good words on two models apart.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _tiny_lab as lab  # before what loads transformers
import torch
from _lab import mean_and_spread, save_json, save_plot, table
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils import logging
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from hf_ext.trainers.d2o import D2OConfig, D2OTrainer

CONSONANTS, VOWELS, BAD = "bdfglmnp", "aeiou", "xyz"
RATES = (1e-5, 2e-5, 5e-5, 1e-4)
ROWS, BATCH, STEPS, LENGTH = 32, 8, 80, 8
TUNING_SEEDS = (100, 101)
KEYS = ("bad", "good", "nll")
ARMS: dict[str, dict[str, Any]] = {
    "gradient ascent": {},
    "DPO, own sample": {},
    "D2O, K = 8": {"num_anchors": 8},
}


def words(count: int, rng: random.Random, *, bad: bool) -> list[str]:
    """Return words of three consonants and two vowels; a bad one has a bad letter for a consonant."""
    found = []
    for _ in range(count):
        letters = [rng.choice((CONSONANTS, VOWELS)[place % 2]) for place in range(5)]
        if bad:
            letters[rng.choice((0, 2, 4))] = rng.choice(BAD)
        found.append("".join(letters))
    return found


def prompts(count: int, rng: random.Random) -> list[str]:
    """Return prompts of two digits, which say nothing about the word."""
    return [f"{rng.randrange(100):02d}:" for _ in range(count)]


def base_model(seed: int, folder: str) -> str:
    """Train and save the model that all methods start from."""
    rng = random.Random(seed)
    good, bad = words(2800, rng, bad=False), words(1200, rng, bad=True)
    texts = list(zip(prompts(4000, rng), good + bad, strict=True))
    model = lab.tiny_model(seed)
    lab.pretrain(model, texts, 500, seed=seed)
    return lab.saved(model, lab.char_tokenizer(), folder)


def is_good(word: str) -> bool:
    """Return whether a word is well formed and holds no bad letter."""
    return len(word) == 5 and all(c in (CONSONANTS, VOWELS)[place % 2] for place, c in enumerate(word))


def measured(model: Any, seed: int) -> dict[str, float]:
    """Return shares of bad and of good words among 1,000 samples, and the NLL of 500 unseen good words."""
    rng, tokenizer = random.Random(seed + 7), lab.char_tokenizer()
    drawn = [one for (one,) in lab.sample(model, tokenizer, prompts(1000, rng), 1, LENGTH, seed=seed)]
    held = words(500, rng, bad=False)
    nll = -lab.log_likelihood(model, tokenizer, prompts(500, rng), held).mean()
    return {
        "bad": sum(any(c in BAD for c in one) for one in drawn) / len(drawn),
        "good": sum(map(is_good, drawn)) / len(drawn),
        "nll": float(nll),
    }


def trained(arm: str, folder: str, rate: float, seed: int) -> Any:
    """Return the model that a method makes of the saved one."""
    rng = random.Random(seed + 1)
    asked, rejected = prompts(ROWS, rng), words(ROWS, rng, bad=True)
    if arm == "gradient ascent":
        return ascended(folder, asked, rejected, rate, seed)
    own = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": rate, "seed": seed}
    own["logging_strategy"] = "no"
    tokenizer = lab.char_tokenizer()
    with tempfile.TemporaryDirectory() as out:
        arguments = lab.trainer_arguments(out, **own)
        data: dict[str, Any] = {"prompt": asked, "rejected": rejected}
        if arm.startswith("DPO"):
            start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            data["chosen"] = [one for (one,) in lab.sample(start, tokenizer, asked, 1, LENGTH, seed=seed)]
            kind, args = DPOTrainer, DPOConfig(**arguments)
        else:
            settings = {"anchor_prefixes": [], "online_after": None, "anchor_max_new_tokens": LENGTH}
            settings |= {"anchor_batch_size": 512, **ARMS[arm]}
            kind, args = D2OTrainer, D2OConfig(**arguments, **settings)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = Dataset.from_dict(data)
        trainer: Any = kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    return trainer.model


def ascended(folder: str, asked: list[str], rejected: list[str], rate: float, seed: int) -> Any:
    """Return the model after gradient ascent on the loss of the bad words, by AdamW as in the trainers."""
    set_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = lab.char_tokenizer()
    rows = torch.tensor(
        [ids(p + r)["input_ids"] + [ids.eos_token_id] for p, r in zip(asked, rejected, strict=True)]
    )
    labels = rows.masked_fill(torch.arange(rows.size(1)) < 3, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    order: list[int] = []
    for _ in range(STEPS):
        order = order or random.sample(range(ROWS), ROWS)
        batch, order = order[:BATCH], order[BATCH:]
        loss = -model(input_ids=rows[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def at_all_rates(seeds: Sequence[int], tag: str) -> dict[str, dict[float, list[dict[str, float]]]]:
    """Return what is measured of each method at each rate for each seed; "start" is before training."""
    found: dict[str, dict[float, list[dict[str, float]]]] = {"start": {0.0: []}}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            start = base_model(seed, folder)
            base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
            found["start"][0.0].append(measured(base, seed))
            for arm, rate in itertools.product(ARMS, RATES):
                runs = found.setdefault(arm, {}).setdefault(rate, [])
                runs.append(measured(trained(arm, start, rate, seed), seed))
                cells = " ".join(f"{key} {runs[-1][key]:.3f}" for key in KEYS)
                print(f"{tag} {seed} {arm:<20} {rate:g} {cells}", flush=True)
    return found


def main() -> None:
    """Run, choose rates, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    tuning = at_all_rates(TUNING_SEEDS, "tuning")
    best = {arm: max(RATES, key=lambda rate: sum(one["good"] for one in tuning[arm][rate])) for arm in ARMS}
    found = at_all_rates(range(options.seeds), "seed")
    rows = {
        arm: {
            rate: {key: mean_and_spread([one[key] for one in runs]) for key in KEYS}
            for rate, runs in by_rate.items()
        }
        for arm, by_rate in found.items()
    }
    cells = [
        [
            f"{arm} (tuned)" if best.get(arm) == rate else arm,
            f"{rate:g}",
            *(f"{row[key]['mean']:.3f} ({row[key]['std']:.3f})" for key in KEYS),
        ]
        for arm, by_rate in rows.items()
        for rate, row in by_rate.items()
    ]
    print(table(cells, ["method", "rate", "bad words", "good words", "NLL of good words"]))
    if options.out:
        content = {arm: {f"{rate:g}": row for rate, row in by.items()} for arm, by in rows.items()}
        save_json(options.out, {"tuned": best, "arms": content, "seeds": options.seeds})
        plot(options.out.with_suffix(".png"), content)


def plot(path: Path, arms: dict[str, Any]) -> None:
    """Draw what a lower share of bad words costs, a line for each method over its rates."""

    def draw(axes: Any) -> None:
        for arm, by_rate in arms.items():
            ordered = [by_rate[rate] for rate in sorted(by_rate, key=float)]
            points = [(row["bad"]["mean"], row["nll"]["mean"]) for row in ordered]
            axes.plot(*zip(*points, strict=True), "o-", label=arm)
        axes.set(xlabel="share of bad words", ylabel="NLL of good words, nats per word", yscale="log")
        axes.minorticks_off()
        axes.set_yticks([10, 12, 15, 20, 25], ["10", "12", "15", "20", "25"])
        axes.legend(title="rates 1e-5 to 1e-4, from right to left")

    save_plot(path, draw)


def quiet() -> None:
    """Keep the bars and warnings of a hundred short runs off the terminal."""
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


if __name__ == "__main__":
    main()
