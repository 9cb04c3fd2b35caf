"""What averages of the weights are worth: one run at a constant rate, several averages of it.

Run: python benchmarks/weight_average.py [--steps 60] [--out docs/assets/weight_average.json]

The embedded model learns (source, docstring) pairs with AdamW at a constant rate and a small batch. Beside
that run stand several averages of it, which change nothing in it; and a run of the same batches with the
Trainer's linear decay. Reported is the held-out loss of each in the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _lab import fit, functions, loss_of, mean_and_spread, save_json, save_plot, table
from transformers import TrainerCallback

from hf_ext.callbacks import WeightAverageCallback

ARMS: dict[str, dict[str, Any]] = {
    "EMA 0.9": {"decay": 0.9},
    "EMA 0.98, bias correction": {"decay": 0.98, "bias_correction": True},
    "EMA 0.999 (default)": {},
    "SWA, last half": {"method": "swa", "start": 0.5, "every": 2},
    "LAWA, 6 of every 4": {"method": "lawa", "every": 4},
}
RATE, BATCH = 1e-3, 4


class Several(TrainerCallback):
    """Several averages beside one run, and the losses of all of them at its end."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.averages = {name: WeightAverageCallback(**settings) for name, settings in ARMS.items()}
        self.losses: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for average in self.averages.values():
            average.on_train_begin(args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for average in self.averages.values():
            average.on_optimizer_step(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.losses["constant rate, last weights"] = loss_of(model, self.rows)
        for name, average in self.averages.items():
            with average.evaluating():
                self.losses[name] = loss_of(model, self.rows)
            average.abandon()


def main() -> None:
    """Run the seeds, print a table, and write JSON and a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/assets/weight_average.json"))
    arguments = parser.parse_args()
    corpus = functions()
    rows = corpus.test.select(range(48))
    found: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        several = Several(rows)
        common: dict[str, Any] = {
            "learning_rate": RATE,
            "seed": seed,
            "max_steps": arguments.steps,
            "batch_size": BATCH,
            "evaluate": False,
        }
        fit(corpus.train, rows, callbacks=[several], lr_scheduler_type="constant", **common)
        decayed = fit(corpus.train, rows, lr_scheduler_type="linear", **common)
        losses = {**several.losses, "linear decay": loss_of(decayed.trainer.model, rows)}
        for name, loss in losses.items():
            found.setdefault(name, []).append(loss)
            print(f"seed {seed} {name}: {loss:.4f}", flush=True)
    arms = {name: mean_and_spread(values) for name, values in found.items()}
    print(
        table([[n, f"{a['mean']:.4f}", f"{a['std']:.4f}"] for n, a in arms.items()], ["arm", "loss", "std"])
    )
    settings = {"steps": arguments.steps, "rate": RATE, "batch": BATCH, "blocks": len(rows)}
    save_json(arguments.out, {"settings": settings, "arms": arms})

    def draw(axes: Any) -> None:
        names = list(arms)
        axes.barh(names, [arms[n]["mean"] for n in names], xerr=[arms[n]["std"] for n in names])
        low = min(arm["mean"] for arm in arms.values())
        axes.set_xlim(low - 0.1, max(arm["mean"] for arm in arms.values()) + 0.1)
        axes.set_xlabel("held-out loss, nats per token")
        axes.invert_yaxis()

    save_plot(arguments.out.with_suffix(".png"), draw, size=(7.2, 3.6))


if __name__ == "__main__":
    main()
