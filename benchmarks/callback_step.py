"""Time of a training step with each callback, as a ratio to the Trainer without one.

Run: OMP_NUM_THREADS=1 python benchmarks/callback_step.py [--pairs 60] [--blocks 6] [--warm-up 5]
     [--only NAME,...] [--out docs/assets/callback_step.json]

The embedded model with batches of 8 x 128 tokens, AdamW, fp32, one thread. Each callback takes turns with a
run without one within one process, a step each (`_pairing.py`); the arm "plain" is two runs without one, and
shows what the measurement itself can tell apart.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _lab import fit, functions, save_json, table
from _pairing import COLUMNS, HEADS, Lane, compared, decides, in_turns

from hf_ext import callbacks

# Of the ratio to the step without the callback.
BAR = 1.005
PLAIN = "plain"
ARMS: dict[str, Any] = {
    PLAIN: list,
    "infinite_lr": lambda: [callbacks.InfiniteLRCallback()],
    "refined_linear_decay": lambda: [callbacks.RefinedLinearDecayCallback(record=False)],
    "refined_linear_decay, recording": lambda: [callbacks.RefinedLinearDecayCallback(record=True)],
    "annealing_law": lambda: [callbacks.AnnealingLawCallback()],
    "adaptive_batch_size, a test in 1000 updates": lambda: [_adaptive(1000)],
    "adaptive_batch_size, a test in 10 updates": lambda: [_adaptive(10)],
    "adaptive_batch_size, a test in every update": lambda: [_adaptive(1)],
    "hypergradient, rounds of 10": lambda: [callbacks.HypergradientCallback(local_steps=10)],
    "continual_ema": lambda: [callbacks.ContinualEMACallback()],
    "stage_recovery, recording": lambda: [callbacks.StageRecoveryCallback()],
}


def _adaptive(interval: int) -> Any:
    # A tolerance that no noise reaches: the batch stays as it is.
    return callbacks.AdaptiveBatchSizeCallback(batch_max=16, eta=1e9, test_interval=interval)


def training(arm: str, folder: Path) -> Callable[[Lane, int], Any]:
    """Return what trains the embedded model with an arm's callbacks for some steps."""

    def train(lane: Lane, steps: int) -> None:
        corpus = functions()
        fit(
            corpus.train,
            corpus.validation,
            learning_rate=1e-5,
            seed=0,
            max_steps=steps,
            batch_size=4,
            callbacks=[lane, *ARMS[arm]()],
            folder=folder,
            evaluate=False,
            gradient_accumulation_steps=2,
        )

    return train


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60, help="of steps, in each block")
    parser.add_argument("--blocks", type=int, default=6, help="times that both loops are built")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--only", help="callbacks to measure, by how their names begin")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    starts = tuple(options.only.split(",")) if options.only else ("",)
    results: dict[str, Any] = {}
    for arm in (name for name in ARMS if name.startswith(starts)):
        with tempfile.TemporaryDirectory() as folder:
            plain, other = (training(which, Path(folder)) for which in (PLAIN, arm))
            figures = compared(in_turns(plain, other, options.pairs, options.warm_up, options.blocks))
        results[arm] = {**figures, "bar": BAR, "is": decides(figures, BAR)}
        shown = {k: round(v, 5) if isinstance(v, float) else v for k, v in results[arm].items()}
        print(arm, shown, flush=True)
    rows = [[arm, *(f"{row[key]:.4f}" for key in COLUMNS), row["is"]] for arm, row in results.items()]
    print(table(rows, ["callback", *HEADS, f"{BAR}"]))
    if options.out:
        save_json(options.out, {"pairs_of_steps": options.pairs, "callbacks": results})


if __name__ == "__main__":
    main()
