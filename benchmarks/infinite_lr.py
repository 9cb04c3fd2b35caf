"""The infinite schedule against cosine that is warmed up again, on two corpora in sequence.

Run: python benchmarks/infinite_lr.py [--steps 80] [--out docs/assets/infinite_lr.json]

All weights of the embedded model are trained on (source, docstring) pairs, then on the English text of
Python's language reference: AdamW, batches of 8 x 128 tokens, equal steps on each. Repeated cosine starts
each corpus with a warm-up and fresh optimizer state; the infinite schedule goes on from its constant phase,
with its optimizer, and anneals over the last fifth of the second corpus. Both fall to 0.01 of the peak. Each
arm has the best of the rates, by the mean loss over both corpora, on a seed and on held-out blocks of their
own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _lab import (
    TUNING_SEED,
    best_rate,
    embedded_model,
    fit,
    functions,
    loss_of,
    mean_and_spread,
    prose,
    save_json,
    save_plot,
    table,
)

from hf_ext.callbacks import InfiniteLRCallback

# Constant rate over peak of each infinite arm; None for repeated cosine.
ARMS = {"repeated cosine": None, "infinite": 0.1, "infinite, constant at 0.3 of the peak": 0.3}
RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def run(arm: str, rate: float, seed: int, steps: int, split: str) -> dict[str, list[float]]:
    """Return the losses on (functions, prose) after each of the two stages."""
    model, corpora = embedded_model(), (functions(), prose())
    held_out = [getattr(corpus, split) for corpus in corpora]
    settings: dict[str, Any] = {
        "learning_rate": rate,
        "seed": seed,
        "max_steps": steps,
        "model": model,
        "evaluate": False,
    }
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage, corpus in enumerate(corpora):
            place = Path(folder) / str(stage)
            ratio = ARMS[arm]
            if ratio is not None:
                fit(
                    corpus.train,
                    held_out[stage],
                    callbacks=[_infinite(Path(folder) / f"0/checkpoint-{steps}" if stage else None, ratio)],
                    folder=place,
                    save_strategy="steps",
                    save_steps=steps,
                    **settings,
                )
            else:
                fit(
                    corpus.train,
                    held_out[stage],
                    folder=place,
                    lr_scheduler_type="cosine_with_min_lr",
                    lr_scheduler_kwargs={"min_lr_rate": 0.01},
                    warmup_steps=round(0.05 * steps),
                    **settings,
                )
            losses[f"after {stage + 1}"] = [loss_of(model, rows) for rows in held_out]
    return losses


def _infinite(branch: Path | None, ratio: float) -> InfiniteLRCallback:
    if branch is None:
        return InfiniteLRCallback(const_lr_ratio=ratio)
    return InfiniteLRCallback(const_lr_ratio=ratio, continue_from=str(branch), anneal_start=0.8)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rate", action="append", metavar="ARM=RATE", help="measure this arm at this rate, without a choice"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    given = {arm: float(rate) for arm, _, rate in (text.rpartition("=") for text in options.rate or ())}
    torch.set_num_threads(1)
    steps = options.steps
    results: dict[str, Any] = {}
    for arm in given or ARMS:

        def tuned(rate: float, arm: str = arm) -> float:
            return sum(run(arm, rate, TUNING_SEED, steps, "validation")["after 2"]) / 2

        rate = given.get(arm) or best_rate(tuned, RATES, arm)
        runs = [run(arm, rate, seed, steps, "test") for seed in range(options.seeds)]
        results[arm] = {
            "learning_rate": rate,
            **mean_and_spread([sum(one["after 2"]) / 2 for one in runs]),
            "functions, prose after 1": [one["after 1"] for one in runs],
            "functions, prose after 2": [one["after 2"] for one in runs],
        }
        print(arm, results[arm], flush=True)
    rows = []
    for arm, found in results.items():
        first, second = [
            sum(pair[i] for pair in found["functions, prose after 2"]) / options.seeds for i in (0, 1)
        ]
        rows.append([arm, f"{found['learning_rate']:g}", f"{first:.4f}", f"{second:.4f}",
                     f"{found['mean']:.4f}", f"{found['std']:.4f}"])  # fmt: skip
    print(table(rows, ["schedule", "best rate", "functions", "prose", "mean", "std of seeds"]))
    if options.out:
        save_json(options.out, {"steps": steps, "rates": RATES, "arms": results})
        plot(options.out.with_suffix(".png"), results)


def plot(path: Path, results: dict[str, Any]) -> None:
    """Draw the losses on both corpora after each stage."""

    def draw(axes: Any) -> None:
        for index, arm in enumerate(ARMS):
            if arm not in results:
                continue
            stages = [results[arm][f"functions, prose after {stage}"] for stage in (1, 2)]
            for corpus, name in enumerate(("functions", "prose")):
                means = [sum(pair[corpus] for pair in stage) / len(stage) for stage in stages]
                style = "o-" if corpus else "s--"
                axes.plot([1, 2], means, style, color=f"C{index}", label=f"{arm}: {name}")
        axes.set_xticks([1, 2], ["after functions", "after prose"])
        axes.set_ylabel("held-out loss, nats per token")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(0.0, 0.42))

    save_plot(path, draw)


if __name__ == "__main__":
    main()
