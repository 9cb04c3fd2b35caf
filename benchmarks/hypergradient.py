"""Local training with hypergradient rates against plain averaging and against DDP, on two processes.

Run: python benchmarks/hypergradient.py [--steps 150] [--only ARM ...] [--out docs/assets/hypergradient.json]

A Llama of 89 thousand parameters from random weights learns the English of Python's language reference by
characters: AdamW, linear decay, batches of 8 x 64 characters on each of two processes (gloo, CPU), which draw
from the same text. DDP averages gradients in each of the steps; the other arms train apart for 10 steps and
exchange weights then, a tenth as often. Each arm has the best of the rates, by the loss on held-out text and
on a seed of their own. Then all arms train at the best rate of plain averaging, at a tenth and at ten times
of it. Losses are of the averaged weights on other held-out text. Since a factor that rises from 1 is also a
warm-up, plain averaging is there with one too, over the first fifth of the run.

With `--only` some arms are measured, and those that the file of `--out` has beside them are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
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
    "plain averaging, warm-up": {"variant": "none"},
    "G": {"variant": "G"},
    "GM": {"variant": "GM"},
    "CL": {"variant": "none", "local": "CL"},
    "G and CL": {"variant": "G", "local": "CL"},
    "SL": {"variant": "SL"},
    "G, raw": {"variant": "G", "agreement": "raw"},
    "GM, raw": {"variant": "GM", "agreement": "raw"},
    "CL, raw": {"variant": "none", "local": "CL", "agreement": "raw"},
    "G and CL, raw": {"variant": "G", "local": "CL", "agreement": "raw"},
    "SL, raw": {"variant": "SL", "agreement": "raw"},
}
PLAIN = "plain averaging"
# A control for factors that rise from 1: the plain arm with a learning rate that does.
WARMED = "plain averaging, warm-up"
WARM_UP = 0.2  # of the run
RAW = ", raw"  # ends the names of arms with the paper's products
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
        warmup_steps=round(WARM_UP * steps) if arm == WARMED else 0,
        logging_strategy="steps",
        logging_steps=LOCAL_STEPS // 2,
    )


def measured(arm: str, rate: float, seeds: int, steps: int, corpus: Corpus) -> dict[str, Any]:
    """Return final losses over the seeds, the mean curve, and what the factors came to."""
    runs = [run(arm, rate, seed, steps, corpus, "test", curve=True) for seed in range(seeds)]
    curve = {step: sum(one.losses[step] for one in runs) / seeds for step in runs[0].losses}
    found: dict[str, Any] = {"learning_rate": rate, **mean_and_spread([one.final for one in runs])}
    found["curve"] = curve
    # The outer factor after the last round, the local one in its middle: with CL each round begins at 1.
    for key, behind in (("alpha", 1), ("beta_mean", 2)):
        logs = [one.trainer.state.log_history for one in runs]
        values = [[e[f"hypergradient/{key}"] for e in log if f"hypergradient/{key}" in e] for log in logs]
        if all(values):
            found[key] = [series[-behind] for series in values]
    return found


def rounds_to(curve: dict[int, float], loss: float) -> int | None:
    """Return the rounds after which a curve is at a loss for the first time, or None."""
    return next((step // LOCAL_STEPS for step, value in curve.items() if value <= loss), None)


def measure(seeds: int, steps: int, only: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """Return arms at their best rates, and at bad ones.

    Args:
        seeds: Runs of each.
        steps: Optimizer steps of a run.
        only: Arms to measure.
        known: What an earlier run of the script has returned, for the arms beside them; may be empty.
    """
    corpus = text()
    started = time.process_time()
    tuned: dict[str, Any] = dict(known.get("tuned", {}))
    for arm in only:
        rate = best_rate(
            lambda rate, arm=arm: run(arm, rate, TUNING_SEED, steps, corpus, "validation").final, RATES, arm
        )
        tuned[arm] = measured(arm, rate, seeds, steps, corpus)
        print(arm, {name: value for name, value in tuned[arm].items() if name != "curve"}, flush=True)
    off: dict[str, Any] = {}
    for multiple in MULTIPLES:
        rate = multiple * tuned[PLAIN]["learning_rate"]
        off[f"{multiple:g}"] = dict(known.get("off", {}).get(f"{multiple:g}", {})) | {
            arm: tuned[arm]
            if tuned[arm]["learning_rate"] == rate
            else measured(arm, rate, seeds, steps, corpus)
            for arm in only
        }
    seconds = time.process_time() - started + known.get("processor_seconds", 0.0)
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
        for arm in (arm for arm in ARMS if arm in arms):
            values = arms[arm]
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
            for index, arm in enumerate(arm for arm in ARMS if arm in found["off"][multiple]):
                if arm == WARMED or arm.endswith(RAW):  # in the tables
                    continue
                curve = found["off"][multiple][arm]["curve"]
                label = arm if style == "-" else None
                axes.plot(list(curve), list(curve.values()), style, color=f"C{index}", label=label)
        axes.set_xlabel("optimizer step (solid: best rate of plain averaging, dotted: a tenth of it)")
        axes.set_ylabel("held-out loss, nats per character")
        axes.set_ylim(1.95, 3.0)
        axes.legend(ncols=3, fontsize="small", loc="lower left")

    save_plot(out.with_suffix(".png"), draw)


def _known(out: Path | None, steps: int) -> dict[str, Any]:
    if out is None or not out.is_file():
        return {}
    known = json.loads(out.read_text(encoding="utf-8"))
    if known["steps"] != steps or tuple(known["rates"]) != RATES:
        raise ValueError(f"{out} is of {known['steps']} steps and rates {known['rates']}")
    # JSON has no whole numbers for keys.
    for arms in (known["tuned"], *known["off"].values()):
        for values in arms.values():
            values["curve"] = {int(step): loss for step, loss in values["curve"].items()}
    return known


def main() -> None:
    """Start two processes of this script, or, as one of them, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=ARMS, help="an arm to measure; several times")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.only and PLAIN not in options.only and not (options.out and options.out.is_file()):
        parser.error(f"--only without {PLAIN!r} needs the file of an earlier run as --out")
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *sys.argv], env=environment, check=True, timeout=LIMIT)
        return
    torch.set_num_threads(1)
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    warnings.filterwarnings("ignore", category=FutureWarning)
    known = _known(options.out, options.steps) if options.only else {}
    found = measure(options.seeds, options.steps, options.only or list(ARMS), known)
    if os.environ["RANK"] == "0":
        report(found, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
