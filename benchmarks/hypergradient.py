"""Local training with hypergradient rates against plain averaging and against DDP, on two processes.

Run: python benchmarks/hypergradient.py [--steps 150] [--out docs/assets/hypergradient.json]

A Llama of 89 thousand parameters from random weights learns the English of Python's language reference by
characters: AdamW, linear decay, batches of 8 x 64 characters on each of two processes (gloo, CPU), which draw
from the same text. DDP averages gradients in each of the steps; the other arms train apart for 10 steps and
exchange weights then, a tenth as often. Each arm has the best of the rates, by the loss on held-out text and
on a seed of their own. Then all arms train at the best rate of plain averaging, at a tenth and at ten times
of it. Losses are of the averaged weights on other held-out text.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _lab import TUNING_SEED, Corpus, Fit, best_rate, fit, mean_and_spread, save_json, save_plot, table
from _tiny_lab import SYMBOLS, tiny_model
from datasets import Dataset

from hf_ext.callbacks import HypergradientCallback

LENGTH, BATCH, LOCAL_STEPS = 64, 8, 10
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
# Settings of the callback in each arm; None for DDP.
ARMS: dict[str, dict[str, Any] | None] = {
    "DDP": None,
    "plain averaging": {"variant": "none"},
    "G": {"variant": "G"},
    "GM": {"variant": "GM"},
    "CL": {"variant": "none", "local": "CL"},
    "G and CL": {"variant": "G", "local": "CL"},
}
PLAIN = "plain averaging"
MULTIPLES = (0.1, 1.0, 10.0)  # of the plain arm's best rate
LIMIT = 3600  # seconds for both processes


def text() -> Corpus:
    """Return the language reference in blocks of LENGTH characters, lower case; others are spaces."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(0).shuffle(names)
    parts = {"train": names[24:], "validation": names[:12], "test": names[12:24]}
    known = {symbol: index for index, symbol in enumerate(SYMBOLS)}
    found = {}
    for split, chosen in parts.items():
        stream = [known.get(letter, known[" "]) for name in chosen for letter in topics[name].lower()]
        rows = [stream[i : i + LENGTH] for i in range(0, len(stream) - LENGTH + 1, LENGTH)]
        random.Random(1).shuffle(rows)
        rows = rows if split == "train" else rows[:256]
        found[split] = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return Corpus(**found)


def run(arm: str, rate: float, seed: int, steps: int, corpus: Corpus, split: str, curve: bool = False) -> Fit:
    """Train one arm on both processes; weights and the order of the data depend on the seed."""
    settings = ARMS[arm]
    callbacks = [] if settings is None else [HypergradientCallback(local_steps=LOCAL_STEPS, **settings)]
    return fit(
        corpus.train,
        getattr(corpus, split),
        learning_rate=rate,
        seed=seed,
        max_steps=steps,
        batch_size=BATCH,
        model=tiny_model(seed),
        callbacks=callbacks,
        eval_steps=LOCAL_STEPS if curve else None,
        logging_strategy="steps",
        logging_steps=LOCAL_STEPS // 2,
    )


def measured(arm: str, rate: float, seeds: int, steps: int, corpus: Corpus) -> dict[str, Any]:
    """Return final losses over the seeds, the mean curve, and what the factors came to."""
    runs = [run(arm, rate, seed, steps, corpus, "test", curve=True) for seed in range(seeds)]
    curve = {step: sum(one.losses[step] for one in runs) / seeds for step in runs[0].losses}
    found: dict[str, Any] = {"learning_rate": rate, **mean_and_spread([one.final for one in runs])}
    found["curve"] = curve
    # The outer factor after the last round, the local one in its middle: each round begins at 1.
    for key, behind in (("alpha", 1), ("beta_mean", 2)):
        logs = [one.trainer.state.log_history for one in runs]
        values = [[e[f"hypergradient/{key}"] for e in log if f"hypergradient/{key}" in e] for log in logs]
        if all(values):
            found[key] = [series[-behind] for series in values]
    return found


def rounds_to(curve: dict[int, float], loss: float) -> int | None:
    """Return the rounds after which a curve is at a loss for the first time, or None."""
    return next((step // LOCAL_STEPS for step, value in curve.items() if value <= loss), None)


def measure(seeds: int, steps: int) -> dict[str, Any]:
    """Return all arms at their best rates, and at bad ones."""
    corpus = text()
    started = time.process_time()
    tuned: dict[str, Any] = {}
    for arm in ARMS:
        rate = best_rate(
            lambda rate, arm=arm: run(arm, rate, TUNING_SEED, steps, corpus, "validation").final, RATES, arm
        )
        tuned[arm] = measured(arm, rate, seeds, steps, corpus)
        print(arm, {name: value for name, value in tuned[arm].items() if name != "curve"}, flush=True)
    off: dict[str, Any] = {}
    for multiple in MULTIPLES:
        rate = multiple * tuned[PLAIN]["learning_rate"]
        off[f"{multiple:g}"] = {
            arm: found if found["learning_rate"] == rate else measured(arm, rate, seeds, steps, corpus)
            for arm, found in tuned.items()
        }
    seconds = time.process_time() - started
    return {"steps": steps, "rates": RATES, "tuned": tuned, "off": off, "processor_seconds": seconds}


def report(found: dict[str, Any], out: Path | None) -> None:
    """Print the tables, and write numbers and plot."""
    groups = {
        "tuned": found["tuned"],
        **{f"{m} times the plain arm's rate": arms for m, arms in found["off"].items()},
    }
    for title, arms in groups.items():
        goal = arms[PLAIN]["mean"]
        rows = []
        for arm, values in arms.items():
            factors = " / ".join(
                f"{sum(values[key]) / len(values[key]):.2f}" if key in values else "-"
                for key in ("alpha", "beta_mean")
            )
            rounds = rounds_to(values["curve"], goal)
            rows.append([arm, f"{values['learning_rate']:g}", f"{values['mean']:.4f}", f"{values['std']:.4f}",
                         "-" if rounds is None else rounds, factors])  # fmt: skip
        header = ["arm", "rate", "loss", "std of seeds", "rounds to the plain arm's loss", "alpha / beta"]
        print(f"\n{title}\n{table(rows, header)}")
    if out is None:
        return
    save_json(out, found)

    def draw(axes: Any) -> None:
        for style, multiple in (("-", "1"), (":", "0.1")):
            for index, (arm, values) in enumerate(found["off"][multiple].items()):
                label = arm if style == "-" else None
                axes.plot(
                    list(values["curve"]),
                    list(values["curve"].values()),
                    style,
                    color=f"C{index}",
                    label=label,
                )
        axes.set_xlabel("optimizer step (solid: best rate of plain averaging, dotted: a tenth of it)")
        axes.set_ylabel("held-out loss, nats per character")
        axes.set_ylim(1.95, 3.0)
        axes.legend(ncols=3, fontsize="small", loc="lower left")

    save_plot(out.with_suffix(".png"), draw)


def main() -> None:
    """Start two processes of this script, or, as one of them, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *sys.argv], env=environment, check=True, timeout=LIMIT)
        return
    torch.set_num_threads(1)
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    warnings.filterwarnings("ignore", category=FutureWarning)
    found = measure(options.seeds, options.steps)
    if os.environ["RANK"] == "0":
        report(found, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
