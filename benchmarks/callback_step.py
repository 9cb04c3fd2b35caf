"""Time of a training step with each callback, as a ratio to the Trainer without one.

Run: python benchmarks/callback_step.py [--rounds 12] [--steps 6] [--only NAME,...]
     [--out docs/assets/callback_step.json]

The embedded model with batches of 8 x 128 tokens, AdamW, fp32, one thread. All arms take turns within one
process: in each round every arm trains for a few steps, and the ratio is taken within the round, of the mean
time from one step's beginning to the next one's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _lab import embedded_model, fit, functions, save_json, table
from transformers import TrainerCallback

from hf_ext import callbacks

ARMS: dict[str, Any] = {
    "plain": list,
    "infinite_lr": lambda: [callbacks.InfiniteLRCallback()],
    "refined_linear_decay": lambda: [callbacks.RefinedLinearDecayCallback(record=False)],
    "refined_linear_decay, recording": lambda: [callbacks.RefinedLinearDecayCallback(record=True)],
    "annealing_law": lambda: [callbacks.AnnealingLawCallback()],
    "adaptive_batch_size, a test in 1000 updates": lambda: [_adaptive(1000)],
    "adaptive_batch_size, a test in 10 updates": lambda: [_adaptive(10)],
    "adaptive_batch_size, a test in every update": lambda: [_adaptive(1)],
    "hypergradient, rounds of 10": lambda: [callbacks.HypergradientCallback(local_steps=10)],
    "continual_ema": lambda: [callbacks.ContinualEMACallback()],
}


def _adaptive(interval: int) -> Any:
    # A tolerance that no noise reaches: the batch stays as it is.
    return callbacks.AdaptiveBatchSizeCallback(batch_max=16, eta=1e9, test_interval=interval)


class Clock(TrainerCallback):
    """Take the time at each step's beginning."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Take the time."""
        self.times.append(time.perf_counter())


def seconds(arm: str, steps: int, model: Any, folder: Path) -> float:
    """Return the mean seconds of a step, after a first that is not counted."""
    clock = Clock()
    corpus = functions()
    fit(
        corpus.train,
        corpus.validation,
        learning_rate=1e-5,
        seed=0,
        max_steps=steps + 2,
        batch_size=4,
        callbacks=[clock, *ARMS[arm]()],
        model=model,
        folder=folder,
        evaluate=False,
        gradient_accumulation_steps=2,
    )
    return (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", help="arms to measure beside the plain one, by how they begin")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    starts = ("plain", *options.only.split(",")) if options.only else ("",)
    arms = [arm for arm in ARMS if arm.startswith(tuple(starts))]
    model = embedded_model()
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds + 1):
            first = turn % len(arms)  # who comes after whom must not decide
            for arm in arms[first:] + arms[:first]:
                found = seconds(arm, options.steps, model, Path(folder))
                if turn:  # the first round warms up
                    taken[arm].append(found)
    results = {}
    for arm in arms:
        ratios = [a / b for a, b in zip(taken[arm], taken["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[arm] = {
            "seconds": statistics.median(taken[arm]),
            "ratio": middle,
            "ratio_q1": low,
            "ratio_q3": high,
            "ratio_of_fastest": min(taken[arm]) / min(taken["plain"]),
        }
    rows = [
        [arm, *(f"{r[key]:.4f}" for key in ("seconds", "ratio", "ratio_q1", "ratio_q3", "ratio_of_fastest"))]
        for arm, r in results.items()
    ]
    print(table(rows, ["callback", "seconds", "ratio", "lower quartile", "upper", "of the fastest"]))
    if options.out:
        save_json(options.out, {"rounds": options.rounds, "steps": options.steps, "arms": results})


if __name__ == "__main__":
    main()
