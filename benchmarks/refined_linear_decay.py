"""Linear decay and the refined schedule against cosine: held-out loss of the embedded model at equal steps.

Run: python benchmarks/refined_linear_decay.py [--steps 120] [--out docs/assets/refined_linear_decay.json]

All weights are fine-tuned on (source, docstring) pairs with AdamW, batches of 8 x 128 tokens. Each arm has
the best of the rates on a seed and on held-out blocks of their own; then three seeds. The refined schedule
keeps the rate of the linear arm, and comes from the gradient norms that its run of the same seed recorded.
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
RATES = (3e-5, 1e-4, 3e-4)


def run(rate: float, seed: int, held_out: Any, steps: int, schedule: Any, folder: Path) -> Any:
    """Return one run; the schedule is the Trainer's, by name, or a callback."""
    settings: dict[str, Any] = {"learning_rate": rate, "seed": seed, "max_steps": steps, "folder": folder}
    settings["eval_steps"] = None if seed == TUNING_SEED else max(1, steps // 8)
    if isinstance(schedule, str):
        return fit(functions().train, held_out, lr_scheduler_type=schedule, **settings)
    return fit(functions().train, held_out, callbacks=[schedule], **settings)


def measure(arm: str, steps: int, seeds: int, records: Path, rate: float | None) -> dict[str, Any]:
    """Return an arm's rate and final losses; "linear" leaves its recordings in `records`."""
    corpus = functions()

    def schedule(seed: int) -> Any:
        if arm == "refined":
            return RefinedLinearDecayCallback(mode="refined", norms=str(records / str(seed)))
        return arm if arm == "cosine" else RefinedLinearDecayCallback()

    def folder(seed: int) -> Path:
        return records / (str(seed) if arm == "linear" else f"{arm}-{seed}")

    if rate is None:
        rate = best_rate(
            lambda lr: (
                run(
                    lr, TUNING_SEED, corpus.validation, steps, schedule(TUNING_SEED), folder(TUNING_SEED)
                ).final
            ),
            RATES,
            arm,
        )
    fits = [run(rate, seed, corpus.test, steps, schedule(seed), folder(seed)) for seed in range(seeds)]
    result = {"learning_rate": rate, **mean_and_spread([one.final for one in fits])}
    print(arm, result, flush=True)
    return {**result, "losses of seed 0": fits[0].losses}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rate", type=float, help="of all arms, instead of the best for cosine and for linear"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as records:
        for arm in ARMS:
            rate = results["linear"]["learning_rate"] if arm == "refined" else options.rate
            results[arm] = measure(arm, options.steps, options.seeds, Path(records), rate)
    rows = [
        [arm, f"{r['learning_rate']:g}", f"{r['mean']:.4f}", f"{r['std']:.4f}"] for arm, r in results.items()
    ]
    print(table(rows, ["schedule", "rate", "held-out loss", "std of seeds"]))
    if options.out:
        save_json(options.out, {"steps": options.steps, "rates": RATES, "arms": results})

        def draw(axes: Any) -> None:
            for arm, found in results.items():
                losses = found["losses of seed 0"]
                axes.plot(list(losses), list(losses.values()), marker=".", label=arm)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel("held-out loss, nats per token")
            axes.legend()

        save_plot(options.out.with_suffix(".png"), draw)


if __name__ == "__main__":
    main()
