"""Ways to replace a lost layer in the middle of a run, right after it and after further steps.

Run: python benchmarks/checkfree.py [--out docs/assets/checkfree.json]

The embedded model (four layers, each a stage) learns (source, docstring) pairs. After some steps the third
layer is lost; every arm puts other weights there, forgets its optimizer state and raises its learning rate by
`lr_scale`, all by StageRecoveryCallback, and trains on with the same batches. First the loss with the layer
passing on what it gets (zero) is measured: where it is not at least 10 % above the loss before, a comparison
would say nothing, and the script stops.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _lab import embedded_model, fit, functions, loss_of, mean_and_spread, save_json, save_plot, table
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_ext.callbacks import StageRecoveryCallback

STAGE, RATE, BATCH = 3, 5e-4, 4
NEEDED = 0.10  # by how much zero must raise the loss
ARMS = ("nothing lost", "weighted mean", "uniform mean", "copy", "random", "zero")


class Lose(TrainerCallback):
    """Lose the stage after a step, have it rebuilt, and note held-out losses from there on."""

    def __init__(self, arm: str, at: int, every: int, rows: Any, seed: int) -> None:
        self.arm, self.at, self.every, self.rows, self.seed = arm, at, every, rows, seed
        self.recovery = StageRecoveryCallback(norm_power=0 if arm == "uniform mean" else 1)
        self.before, self.losses = 0.0, {}
        self.weights: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        if step < self.at or (step - self.at) % self.every:
            return
        if step == self.at:
            self.before = loss_of(model, self.rows)
            if self.arm != "nothing lost":
                self.replace(model)
        self.losses[step - self.at] = loss_of(model, self.rows)

    def replace(self, model: Any) -> None:
        """Put the arm's weights in the place of the lost ones."""
        layers = model.model.layers
        found = self.recovery.recover(STAGE)  # all arms: the mean, a fresh optimizer state, the raised rate
        self.weights = {int(k): v for k, v in found.layers[STAGE - 1].items()}
        if self.arm == "copy":
            layers[STAGE - 1].load_state_dict(layers[STAGE - 2].state_dict())
        elif self.arm in ("random", "zero"):
            with torch.random.fork_rng():
                torch.manual_seed(1000 + self.seed)
                fresh: Any = AutoModelForCausalLM.from_config(model.config)
            layers[STAGE - 1].load_state_dict(fresh.model.layers[STAGE - 1].state_dict())
        if self.arm == "zero":  # the layer passes on what it gets
            with torch.no_grad():
                layers[STAGE - 1].self_attn.o_proj.weight.zero_()
                layers[STAGE - 1].mlp.down_proj.weight.zero_()


def main() -> None:
    """Run the seeds, print a table, and write JSON and a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="before the loss")
    parser.add_argument("--further", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/assets/checkfree.json"))
    arguments = parser.parse_args()
    corpus, every = functions(), arguments.further // 4
    rows = corpus.test.select(range(24))
    found: dict[str, list[dict[int, float]]] = {arm: [] for arm in ARMS}
    before: list[float] = []
    weights: list[dict[int, float]] = []
    for seed in range(arguments.seeds):
        for arm in ("zero", *(arm for arm in ARMS if arm != "zero")):
            lose = Lose(arm, arguments.steps, every, rows, seed)
            fit(
                corpus.train,
                rows,
                model=embedded_model(),
                learning_rate=RATE,
                seed=seed,
                max_steps=arguments.steps + arguments.further,
                batch_size=BATCH,
                callbacks=[lose, lose.recovery],
                lr_scheduler_type="constant",
                evaluate=False,
            )
            raised = lose.losses[0] / lose.before - 1.0
            if arm == "zero" and raised < NEEDED:
                raise SystemExit(f"seed {seed}: zero raises the loss by {raised:.1%} only")
            found[arm].append(lose.losses)
            if arm == "weighted mean":
                before.append(lose.before)
                weights.append(lose.weights)
            print(f"seed {seed} {arm}: " + " ".join(f"{v:.4f}" for v in lose.losses.values()), flush=True)
    steps = [every * k for k in range(5)]
    arms = {
        arm: {str(step): mean_and_spread([run[step] for run in runs]) for step in steps}
        for arm, runs in found.items()
    }
    cells = [
        [arm, *(f"{arms[arm][str(s)]['mean']:.4f} ± {arms[arm][str(s)]['std']:.4f}" for s in (0, steps[-1]))]
        for arm in ARMS
    ]
    print(table(cells, ["arm", "right after", f"{steps[-1]} steps later"]))
    settings = {"steps": arguments.steps, "further": arguments.further, "rate": RATE, "batch": BATCH}
    noted = {"before": mean_and_spread(before), "weights": weights, "arms": arms}
    save_json(arguments.out, {"settings": {**settings, "stage": STAGE}, **noted})

    def draw(axes: Any) -> None:
        for arm in ARMS:
            means = [arms[arm][str(step)]["mean"] for step in steps]
            axes.plot(steps, means, "k--" if arm == "nothing lost" else "-o", markersize=3, label=arm)
        axes.set_xlabel("optimizer steps after the loss")
        axes.set_ylabel("held-out loss, nats per token")
        axes.legend()

    save_plot(arguments.out.with_suffix(".png"), draw)


if __name__ == "__main__":
    main()
