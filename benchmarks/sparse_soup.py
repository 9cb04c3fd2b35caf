"""Sparse soups against their copies and against iterative magnitude pruning, on points around centers.

Run: python benchmarks/sparse_soup.py [--out docs/assets/sparse_soup.json]

A network of 64-128-128-8 learns which class a noisy point is of (4 centers in each of 8 classes). It is
pruned in phases; each copy is retrained for the same number of steps with another order of the data, at two
rates. IMP is the workflow with one copy, which has as many steps as one copy of the soup; "IMP, 3 x steps"
has as many as all of them.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from _lab import mean_and_spread, save_json, save_plot, table
from torch import Tensor, nn

from hf_ext.merging import prune_retrain_average

CLASSES, CENTERS, WIDTH = 8, 4, 64
STEPS, COPIES, SPARSITY, RATES = 200, 3, 0.9, (0.05, 0.2)


def data(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return points (n, 64) with their classes (n,), to train on and to report on."""
    draw = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES * CENTERS, WIDTH, generator=draw)

    def points(count: int) -> tuple[Tensor, Tensor]:
        which = torch.randint(len(centers), (count,), generator=draw)
        noise = 1.6 * torch.randn(count, WIDTH, generator=draw)
        return centers[which] + noise, which % CLASSES

    return points(2000), points(4000)


def network(seed: int) -> nn.Sequential:
    """Return an untrained network."""
    torch.manual_seed(seed)
    layers = [nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES)]
    return nn.Sequential(*layers)


def train(model: nn.Module, rows: tuple[Tensor, Tensor], seed: int, steps: int, rate: float) -> None:
    """Train with SGD, linear decay; the seed orders the data."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        picked = torch.randint(len(rows[0]), (64,), generator=draw)
        loss = nn.functional.cross_entropy(model(rows[0][picked]), rows[1][picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, rows: tuple[Tensor, Tensor]) -> float:
    """Return the share of points that are put into their class."""
    with torch.no_grad():
        return float((model(rows[0]).argmax(1) == rows[1]).float().mean())


def one_seed(seed: int, rate: float, phases: int) -> dict[str, Any]:
    """Return the accuracies of one seed's arms."""
    rows, held_out = data(seed)
    dense = network(seed)
    train(dense, rows, seed, 2 * STEPS, RATES[0])
    found: dict[str, Any] = {"dense": accuracy(dense, held_out)}
    start = dense.state_dict()
    for name, copies, steps in (
        ("soup", COPIES, STEPS),
        ("IMP", 1, STEPS),
        ("IMP, 3 x steps", 1, COPIES * STEPS),
    ):
        model = network(seed)
        model.load_state_dict(start)

        def retrain(network: nn.Module, phase: int, copy: int, steps: int = steps) -> None:
            train(network, rows, 1000 * seed + 10 * phase + copy + 1, steps, rate)

        result = prune_retrain_average(
            model,
            retrain,
            sparsity=SPARSITY,
            phases=phases,
            copies=copies,
            score=lambda network: accuracy(network, held_out),
        )
        found[name] = result.scores[-1][-1]
        for mask_name, mask in result.masks.items():
            zeros = model.get_parameter(mask_name) == 0
            if not torch.equal(zeros, ~mask):
                raise RuntimeError(f"{mask_name}: the zeros are not those of the mask")
        if name == "soup":
            found["phases"] = [
                {"copies": statistics.mean(scores[:-1]), "best": max(scores[:-1]), "soup": scores[-1]}
                for scores in result.scores
            ]
    return found


def main() -> None:
    """Run the seeds at the rates, print tables, and write JSON and a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--phases", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/assets/sparse_soup.json"))
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for rate in RATES:
        runs = [one_seed(seed, rate, arguments.phases) for seed in range(arguments.seeds)]
        arms = {
            name: mean_and_spread([run[name] for run in runs])
            for name in ("dense", "IMP", "IMP, 3 x steps", "soup")
        }
        for phase in range(arguments.phases):
            for kind in ("copies", "best", "soup"):
                arms[f"phase {phase + 1}, {kind}"] = mean_and_spread(
                    [run["phases"][phase][kind] for run in runs]
                )
        found[str(rate)] = arms
        rows = [[name, f"{arm['mean']:.4f}", f"{arm['std']:.4f}"] for name, arm in arms.items()]
        print(f"rate {rate}\n{table(rows, ['arm', 'accuracy', 'std'])}", flush=True)
    save_json(arguments.out, {"steps": STEPS, "copies": COPIES, "sparsity": SPARSITY, "rates": found})

    def draw(axes: Any) -> None:
        phases = range(1, arguments.phases + 1)
        for rate, arms in found.items():
            for kind, style in (("copies", "--"), ("soup", "-")):
                means = [arms[f"phase {phase}, {kind}"]["mean"] for phase in phases]
                label = f"{kind if kind == 'soup' else 'mean copy'}, rate {rate}"
                axes.plot(list(phases), means, style, marker="o", label=label)
        axes.set_xticks(list(phases))
        axes.set_xlabel("phase")
        axes.set_ylabel("held-out accuracy")
        axes.legend()

    save_plot(arguments.out.with_suffix(".png"), draw)


if __name__ == "__main__":
    main()
