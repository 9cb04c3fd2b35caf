"""Linear decay and the refined schedule against cosine: held-out loss of the embedded model at equal steps.

Run: python benchmarks/refined_linear_decay.py [--steps 160] [--out docs/assets/refined_linear_decay.json]

All weights are fine-tuned on (source, docstring) pairs with AdamW, batches of 8 x 128 tokens. Each arm has
the best of the rates on a seed and on held-out blocks of their own; then three seeds. The refined schedule
comes from the gradient norms that the linear run of the same seed and rate has recorded.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _lab import TUNING_SEED, best_rate, fit, functions, mean_and_spread, save_json, save_plot, table

from hf_ext.callbacks import RefinedLinearDecayCallback

ARMS = ("cosine", "linear", "refined")
RATES = (1e-4, 3e-4, 1e-3)


def run(arm: str, rate: float, seed: int, steps: int, held_out: Any, evaluations: int | None = None) -> Any:
    """Return one arm's run; for "refined" the second of its two."""
    corpus = functions()
    settings: dict[str, Any] = {
        "learning_rate": rate,
        "seed": seed,
        "max_steps": steps,
        "eval_steps": evaluations,
    }
    if arm == "cosine":
        return fit(corpus.train, held_out, lr_scheduler_type="cosine", **settings)
    with tempfile.TemporaryDirectory() as folder:
        linear = RefinedLinearDecayCallback(record=True)
        if arm == "linear":
            return fit(corpus.train, held_out, callbacks=[linear], folder=folder, **settings)
        first = {**settings, "eval_steps": None}
        fit(corpus.train, held_out, callbacks=[linear], folder=folder, evaluate=False, **first)
        refined = RefinedLinearDecayCallback(mode="refined", norms=folder)
        return fit(corpus.train, held_out, callbacks=[refined], **settings)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus, steps = functions(), options.steps
    results: dict[str, Any] = {}
    curves: dict[str, dict[int, float]] = {}
    for arm in ARMS:
        rate = best_rate(
            lambda lr, arm=arm: run(arm, lr, TUNING_SEED, steps, corpus.validation).final, RATES, arm
        )
        fits = [run(arm, rate, seed, steps, corpus.test, max(1, steps // 8)) for seed in range(options.seeds)]
        curves[arm] = fits[0].losses
        results[arm] = {"learning_rate": rate, **mean_and_spread([one.final for one in fits])}
        print(arm, results[arm], flush=True)
    rows = [
        [arm, f"{r['learning_rate']:g}", f"{r['mean']:.4f}", f"{r['std']:.4f}"] for arm, r in results.items()
    ]
    print(table(rows, ["schedule", "best rate", "held-out loss", "std of seeds"]))
    if options.out:
        save_json(options.out, {"steps": steps, "rates": RATES, "arms": results, "losses of seed 0": curves})

        def draw(axes: Any) -> None:
            for arm, losses in curves.items():
                axes.plot(list(losses), list(losses.values()), marker=".", label=arm)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel("held-out loss, nats per token")
            axes.legend()

        save_plot(options.out.with_suffix(".png"), draw)


if __name__ == "__main__":
    main()
