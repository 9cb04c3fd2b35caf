"""APO against iterative DPO: the reward after each round, for several coefficients.

Run: OMP_NUM_THREADS=1 python benchmarks/apo.py [--out docs/assets/apo.json]

At each learning rate of a grid, four rounds without extrapolation and with alpha 0.3 and 0.6; the same first
weights and prompts. "hat" is the point trained last, "policy" the extrapolated one. The rate that is best for
iterative DPO is chosen on a seed of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _lab import mean_and_spread, save_json, save_plot, table
from _round_lab import RATES, TUNING_SEED, run

from hf_ext.trainers import APOConfig, APOTrainer

ROUNDS = 4
ALPHAS = (0.0, 0.3, 0.6)


def trained(alpha: float, seed: int, rate: float) -> dict[str, Any]:
    """Return what `run` measured of an arm."""
    settings = {"num_rounds": ROUNDS, "extrapolation_alpha": alpha, "learning_rate": rate}
    return run(APOTrainer, APOConfig, seed, ROUNDS, **settings)


def main() -> None:
    """Choose a rate, measure at all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tuning = {rate: trained(0.0, TUNING_SEED, rate)["rounds"][-1]["reward"] for rate in RATES}
    best = max(tuning, key=lambda rate: tuning[rate])
    print(f"iterative DPO's best rate {best:g}: {tuning}", flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for rate in RATES:
        for alpha in ALPHAS:
            name = f"rate {rate:g}, alpha {alpha:g}"
            found[name] = [trained(alpha, seed, rate) for seed in range(options.seeds)]
            print(name, [round(one["rounds"][-1]["reward"], 4) for one in found[name]], flush=True)
    rows = {
        name: {
            kind: [mean_and_spread([one[kind][t]["reward"] for one in runs]) for t in range(ROUNDS)]
            for kind in ("rounds", "hats")
            if runs[0][kind]
        }
        for name, runs in found.items()
    }
    cells = [
        [name, kind.replace("rounds", "policy").removesuffix("s"), *(f"{v['mean']:.4f}" for v in values)]
        for name, row in rows.items()
        for kind, values in row.items()
    ]
    print(table(cells, ["arm", "point", *(f"round {t + 1}" for t in range(ROUNDS))]))
    if options.out:
        content = {"arms": rows, "runs": found, "seeds": options.seeds, "best_rate": best, "tuning": tuning}
        save_json(options.out, content)

        def draw(axes: Any) -> None:
            for alpha, color in zip(ALPHAS, ("gray", "tab:blue", "tab:orange"), strict=True):
                for rate, style in zip(RATES, (":", "-.", "-", "--"), strict=True):
                    values = [v["mean"] for v in rows[f"rate {rate:g}, alpha {alpha:g}"]["rounds"]]
                    label = f"alpha {alpha:g}, rate {rate:g}"
                    axes.plot(range(1, ROUNDS + 1), values, style, color=color, marker=".", label=label)
            axes.set(xlabel="round", ylabel="reward of the policy", yscale="log")
            axes.set_xticks(range(1, ROUNDS + 1))
            axes.legend(fontsize=7)

        save_plot(options.out.with_suffix(".png"), draw)


if __name__ == "__main__":
    main()
