"""One run's checkpoints combined: the last one, averages, metrics-weighted, LCSC; held-out loss.

Run: OMP_NUM_THREADS=1 python benchmarks/lcsc.py

The embedded model is fine-tuned on functions at a constant rate, the better of two for its last checkpoint
on another seed, and saved every fourth step. All arms combine the same checkpoints, the later half. 40
validation blocks are what LCSC searches with and what the rate of the exponential average is chosen on; 40
others decide between LCSC's finalists. Losses are those of test blocks, which nothing was chosen on, in nats
per token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
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
    save_json,
    save_plot,
    table,
    with_weights,
)
from safetensors.torch import load_file

from hf_ext.core.files import read_json
from hf_ext.merging import lcsc_search, merge, merge_run, metrics_weights

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
SEEDS = (0, 1, 2)
STEPS, EVERY, RATES = 48, 4, (3e-4, 1e-3)
ITERATIONS = 28
ROWS = 80  # validation blocks, half of them held out
ARMS = {
    "last": "last checkpoint",
    "ema": "exponential average, rate tuned",
    "uniform": "uniform average",
    "loss 1": "loss-weighted, p = 1",
    "loss 2": "loss-weighted, p = 2",
    "step 1": "step-weighted, p = 1",
    "lcsc": "LCSC",
}


def measure(folder: Path) -> float:
    """Return the test loss of a merged model."""
    return loss_of(with_weights(load_file(folder / "model.safetensors")), functions().test)


def train(rate: float, seed: int, folder: Path | None = None) -> float:
    """Fine-tune, with checkpoints where a folder is given, and return the final validation loss."""
    saved: dict[str, Any] = {"evaluate": folder is None}
    if folder is not None:
        saved.update(save_strategy="steps", save_steps=EVERY, save_only_model=True)
    return fit(
        functions().train,
        functions().validation,
        learning_rate=rate,
        lr_scheduler_type="constant",
        seed=seed,
        max_steps=STEPS,
        folder=folder,
        logging_strategy="steps",
        logging_steps=EVERY,
        **saved,
    ).losses.get(STEPS, 0.0)


def arm(rate: float, seed: int, work: Path) -> dict[str, Any]:
    """Return the test losses of one run's arms, and what was found."""
    run = work / "run"
    train(rate, seed, run)
    start = time.perf_counter()
    rows = list(functions().validation)[:ROWS]
    found = lcsc_search(
        run, data=rows, model=embedded_model(), iterations=ITERATIONS, seed=seed, progress=False
    )
    seconds = time.perf_counter() - start
    emas = {name: score for name, score in found.start_scores.items() if name.startswith("ema")}
    best = min(emas, key=emas.__getitem__)
    losses: dict[str, float] = {}

    def weighted(name: str, weights: Any) -> None:
        models = [
            {"model": str(folder), "parameters": {"weight": weight}}
            for folder, weight in zip(found.checkpoints, weights, strict=True)
            if weight
        ]
        merge({"merge_method": "linear", "models": models}, work / name, progress=False)
        losses[name] = measure(work / name)

    count = len(found.checkpoints)
    ema = float(best.removeprefix("ema "))
    powers = [ema ** (count - 1 - index) for index in range(count)]
    weighted("last", [0.0] * (count - 1) + [1.0])
    weighted("ema", [power / sum(powers) for power in powers])
    weighted("lcsc", found.coefficients)
    weighted("uniform", metrics_weights([1.0] * count))
    for name in ("loss 1", "loss 2", "step 1"):
        weighting, penalty = name.split()
        merge_run(found.checkpoints, work / name, progress=False, weighting=weighting, penalty=float(penalty))
        losses[name] = measure(work / name)
    state = read_json(found.checkpoints[-1] / "trainer_state.json")
    return {
        "test": losses,
        "coefficients": list(found.coefficients),
        "ema": best,
        "training_losses": [entry["loss"] for entry in state["log_history"] if "loss" in entry],
        "search": {"score": found.score, "holdout": found.holdout_score, "best": list(found.best)},
        "search_seconds": seconds,
        "evaluations": len(found.best),
    }


def main() -> None:
    """Run the seeds that are missing in the JSON, and write it with the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS / "lcsc.json")
    out = parser.parse_args().out
    earlier = read_json(out) if out.exists() else {}
    runs: dict[str, Any] = earlier.get("runs", {})
    rate = (
        earlier["settings"]["learning_rate"] if earlier else best_rate(lambda r: train(r, TUNING_SEED), RATES)
    )
    for seed in SEEDS:
        if str(seed) not in runs:
            with tempfile.TemporaryDirectory() as folder:
                runs[str(seed)] = arm(rate, seed, Path(folder))
            print(seed, runs[str(seed)]["test"], flush=True)
    names = [name for name in ARMS if name in runs["0"]["test"]]
    summary = {name: mean_and_spread([run["test"][name] for run in runs.values()]) for name in names}
    settings = {"steps": STEPS, "save_steps": EVERY, "learning_rate": rate, "iterations": ITERATIONS}
    save_json(out, {"settings": settings, "summary": summary, "runs": runs})
    save_plot(out.with_suffix(".png"), lambda axes: draw(axes, runs, names), (8.0, 4.0))
    last = summary["last"]["values"]
    rows = []
    for name in names:
        gains = [value - reference for value, reference in zip(summary[name]["values"], last, strict=True)]
        gain = mean_and_spread(gains)
        rows.append(
            (ARMS[name], f"{summary[name]['mean']:.4f}", f"{gain['mean']:+.4f}", f"{gain['std']:.4f}")
        )
    print(table(rows, ("arm", "test loss", "against the last", "std of that")))


def draw(axes: Any, runs: dict[str, Any], names: list[str]) -> None:
    """Draw each arm's difference to the last checkpoint, run by run."""
    for place, name in enumerate(names):
        values = [run["test"][name] - run["test"]["last"] for run in runs.values()]
        axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
        axes.plot([sum(values) / len(values)], [place], "|", color="black", markersize=18)
    axes.axvline(0.0, color="gray", linewidth=1)
    axes.set_yticks(range(len(names)), [ARMS[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("test loss minus that of the last checkpoint, nats per token")
    axes.set_title("Combinations of six checkpoints of a run, three seeds")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
