"""Online iterative DPO against offline DPO: the reward reached with as many prompts and updates.

Run: OMP_NUM_THREADS=1 python benchmarks/online_iterative_dpo.py [--out docs/assets/online_iterative_dpo.json]

Offline, all pairs are sampled from the first policy; online, in three rounds, each from the policy of the one
before. Each arm has the learning rate that gave it the highest reward on a seed of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _lab import mean_and_spread, save_json, save_plot, table
from _round_lab import RATES, TUNING_SEED, run

from hf_ext.trainers import OnlineIterativeDPOConfig, OnlineIterativeDPOTrainer

ROUNDS = 3
ARMS: dict[str, dict[str, Any]] = {
    "offline": {"num_rounds": 1},
    "online": {"num_rounds": ROUNDS},
    "online, first policy as reference": {"num_rounds": ROUNDS, "reference": "initial"},
    "online, n = 2": {"num_rounds": ROUNDS, "num_candidates": 2},
    "online, n = 8": {"num_rounds": ROUNDS, "num_candidates": 8},
}


def trained(arm: str, seed: int, rate: float) -> dict[str, Any]:
    """Return what `run` measured of an arm."""
    return run(
        OnlineIterativeDPOTrainer, OnlineIterativeDPOConfig, seed, ROUNDS, learning_rate=rate, **ARMS[arm]
    )


def main() -> None:
    """Choose rates, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    rates: dict[str, float] = {}
    for arm in ARMS:
        scores = {rate: trained(arm, TUNING_SEED, rate)["rounds"][-1]["reward"] for rate in RATES}
        rates[arm] = max(scores, key=lambda rate: scores[rate])
        found[arm] = [trained(arm, seed, rates[arm]) for seed in range(options.seeds)]
        ends = ", ".join(f"{one['rounds'][-1]['reward']:.4f}" for one in found[arm])
        print(f"{arm:<36} rate {rates[arm]:g} {scores}: {ends}", flush=True)
    rows: dict[str, Any] = {}
    for arm, runs in found.items():
        count = len(runs[0]["rounds"])
        rows[arm] = {
            "rate": rates[arm],
            "steps": runs[0]["steps"],
            "start": mean_and_spread([one["start"] for one in runs]),
            "reward": [mean_and_spread([one["rounds"][t]["reward"] for one in runs]) for t in range(count)],
            "kl": [mean_and_spread([one["rounds"][t]["kl"] for one in runs]) for t in range(count)],
        }
    cells = [
        [
            arm,
            f"{row['rate']:g}",
            row["steps"],
            f"{row['start']['mean']:.4f}",
            *(" -> ".join(f"{value['mean']:.4f}" for value in row["reward"]),),
            f"{row['reward'][-1]['std']:.4f}",
            f"{row['kl'][-1]['mean']:.2f}",
        ]
        for arm, row in rows.items()
    ]
    print(table(cells, ["arm", "rate", "steps", "start", "reward by round", "std of seeds", "KL, nats"]))
    if options.out:
        save_json(options.out, {"arms": rows, "runs": found, "seeds": options.seeds})

        def draw(axes: Any) -> None:
            for arm, row in rows.items():
                values = [row["start"]["mean"], *(value["mean"] for value in row["reward"])]
                places = range(ROUNDS + 1) if len(values) > 2 else (0, ROUNDS)
                axes.plot(places, values, marker="o", linestyle="--" if arm == "offline" else "-", label=arm)
            axes.set(xlabel="prompts seen, rounds of 200", ylabel="reward of the policy")
            axes.set_xticks(range(ROUNDS + 1))
            axes.legend(fontsize=8)

        save_plot(options.out.with_suffix(".png"), draw)


if __name__ == "__main__":
    main()
