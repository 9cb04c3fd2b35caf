"""An adaptive batch against a fixed small and a fixed large one, at equal samples; and its cost.

Run: python benchmarks/adaptive_batch_size.py [--samples 512] [--out docs/assets/adaptive_batch_size.json]

All weights of the embedded model are trained on (source, docstring) pairs: AdamW, samples of 64 tokens, a
linear decay to zero with a warm-up over the first sixteenth of the samples. The small batch is 4, the large
one 32; the adaptive one starts at 4 and may grow to 32, by the norm test with a tolerance of 0.7 at every
fourth update, at most twofold. Each arm has the best of the rates, by the loss on held-out samples of their
own and on another seed. Losses are reported on other held-out samples.

Times are processor times of this process, so that other programs change them little; the runs that are
compared take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from _lab import (
    TUNING_SEED,
    Corpus,
    Fit,
    best_rate,
    fit,
    functions,
    mean_and_spread,
    save_json,
    save_plot,
    table,
)
from datasets import Dataset
from transformers import TrainerCallback

from hf_ext.callbacks import AdaptiveBatchSizeCallback

SMALL, LARGE, TOKENS, TOLERANCE = 4, 32, 64, 0.7
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
ARMS = ("fixed 4", "fixed 32", "adaptive")


def short(rows: Dataset) -> Dataset:
    """Return the rows' first tokens."""
    cut = [row[:TOKENS] for row in rows["input_ids"]]
    return Dataset.from_dict({"input_ids": cut, "labels": cut})


def corpus() -> Corpus:
    """Return the data in samples of TOKENS tokens."""
    whole = functions()
    return Corpus(short(whole.train), short(whole.validation), short(whole.test))


def run(arm: str, rate: float, seed: int, samples: int, data: Corpus, split: str, points: int = 0) -> Fit:
    """Train one arm on a number of samples; evaluate at the end, and `points` times before it."""
    batch = LARGE if arm == "fixed 32" else SMALL
    callbacks: list[TrainerCallback] = []
    if arm == "adaptive":
        settings: dict[str, Any] = {"eta": TOLERANCE, "test_interval": 4, "growth_cap": 2.0}
        callbacks.append(AdaptiveBatchSizeCallback(batch_max=LARGE, **settings))
    return fit(
        data.train,
        getattr(data, split),
        learning_rate=rate,
        seed=seed,
        max_steps=samples // batch,
        batch_size=min(batch, 16),
        gradient_accumulation_steps=max(1, batch // 16),
        callbacks=callbacks,
        warmup_steps=samples // batch // 16,
        logging_strategy="steps",
        logging_steps=1,
        # The adaptive arm makes fewer updates, and not known how many: more often than the fixed ones.
        eval_steps=max(1, samples // (LARGE if arm == "adaptive" else batch) // points) if points else None,
    )


class Clock(TrainerCallback):
    """Processor time of each step, seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self._start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.times.append(time.process_time() - self._start)


def cost(data: Corpus, steps: int = 14, rounds: int = 3) -> dict[str, float]:
    """Return the ratios of the median step time to the plain Trainer's, in updates of 2 x 4 samples."""
    forms: dict[str, Any] = {
        "plain": None,
        "between tests": {"test_interval": 10**6},
        "tested, norm": {"eta": 1e6},
        "tested, augmented": {"test": "augmented", "theta": 1e6, "nu": 1e6},
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, settings in forms.items():
            clock = Clock()
            own = [] if settings is None else [AdaptiveBatchSizeCallback(batch_max=LARGE, **settings)]
            fit(
                data.train,
                data.test,
                learning_rate=1e-4,
                seed=0,
                max_steps=steps,
                batch_size=SMALL,
                gradient_accumulation_steps=2,
                callbacks=[*own, clock],
                evaluate=False,
            )
            times[name] += clock.times[2:]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: medians[name] / medians["plain"] for name in forms if name != "plain"}


def curve(fitted: Fit, batch: int) -> list[tuple[int, float]]:
    """Return (samples, held-out loss)."""
    history = [entry for entry in fitted.trainer.state.log_history if "loss" in entry]
    key = "adaptive_batch_size/samples"
    samples = {e["step"]: int(e.get(key, e["step"] * batch)) for e in history}
    return [(samples[step], loss) for step, loss in fitted.losses.items()]


def draw(axes: Any, curves: dict[str, Any], paths: list[Any]) -> None:
    """Draw held-out loss, and the batch of the adaptive arm, by samples."""
    for arm, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{arm}, loss")
    axes.set(xlabel="samples", ylabel="held-out loss, nats per token")
    batch = axes.twinx()
    batch.step(*zip(*paths, strict=True), color="grey", alpha=0.6)
    batch.set(ylabel="batch of the adaptive arm, samples", ylim=(0, LARGE * 1.1))
    axes.legend()


def main() -> None:
    """Tune, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512, help="samples of a run, a multiple of 32")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm")
    parser.add_argument("--out", type=Path, default=Path("docs/assets/adaptive_batch_size.json"))
    options = parser.parse_args()
    data = corpus()
    ratios = cost(data)
    print(ratios, flush=True)
    results: dict[str, Any] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    paths: list[tuple[int, int]] = []
    for arm in ARMS:

        def tuned(rate: float, arm: str = arm) -> float:
            return run(arm, rate, TUNING_SEED, options.samples, data, "validation").final

        rate = best_rate(tuned, RATES, arm)
        fits = []
        for seed in range(options.seeds):
            fitted = run(arm, rate, seed, options.samples, data, "test", points=4 if seed == 0 else 0)
            print(f"{arm} seed {seed}: {fitted.final:.4f}, {fitted.steps} steps", flush=True)
            fits.append(fitted)
        curves[arm] = curve(fits[0], LARGE if arm == "fixed 32" else SMALL)
        if arm == "adaptive":
            own = "adaptive_batch_size/"
            logs = [entry for entry in fits[0].trainer.state.log_history if "loss" in entry]
            paths = [(int(e[own + "samples"]), int(e[own + "batch"])) for e in logs]
        results[arm] = {
            "learning_rate": rate,
            "loss": mean_and_spread([fitted.final for fitted in fits]),
            "steps": mean_and_spread([fitted.steps for fitted in fits]),
        }
    rows = [
        [
            arm,
            f"{found['learning_rate']:g}",
            f"{found['loss']['mean']:.4f} +- {found['loss']['std']:.4f}",
            f"{found['steps']['mean']:.1f}",
        ]
        for arm, found in results.items()
    ]
    print(table(rows, ("batch", "rate", "held-out loss", "optimizer steps")))
    save_json(
        options.out,
        {
            "samples": options.samples,
            "tokens": TOKENS,
            "eta": TOLERANCE,
            "rates": RATES,
            "arms": results,
            "step_time_ratio": ratios,
            "batches": paths,
            "curves": curves,
        },
    )
    save_plot(options.out.with_suffix(".png"), lambda axes: draw(axes, curves, paths))


if __name__ == "__main__":
    main()
