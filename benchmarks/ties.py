"""TIES against linear merging and task arithmetic: held-out loss of three fine-tunes in one model.

Run: OMP_NUM_THREADS=1 python benchmarks/ties.py [--out docs/assets/ties.json]

Three fine-tunes of the embedded model (functions, prose, character tables) are merged through the engine.
Scales and densities are chosen on validation text with the first seed; loss is the mean over the three kinds
of test text.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _lab import MODEL, mean_and_spread, save_json, save_plot, table
from _merge_lab import corpora, experts, losses

from hf_ext.merging import merge

SCALES = (0.3, 0.5, 0.7, 1.0)
GRIDS: dict[str, list[dict[str, float]]] = {
    "linear": [{}],
    "task_arithmetic": [{"lambda": scale} for scale in SCALES],
    "ties": [
        {"density": density, "lambda": scale}
        for density, scale in itertools.product((0.2, 0.5, 0.8), (0.7, 1.0, 1.4))
    ],
}


def merged(method: str, models: Sequence[Path], parameters: dict[str, float], split: str) -> dict[str, float]:
    """Return the losses of a merge."""
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [str(model) for model in models],
        "parameters": parameters,
        "dtype": "float32",
    }
    if method != "linear":
        config["base_model"] = str(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        merge(config, Path(folder) / "out", progress=False)
        return losses(Path(folder) / "out", split)


def main() -> None:
    """Choose, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first = list(experts(0).values())
    arms: dict[str, tuple[str, dict[str, float]]] = {"ties, defaults": ("ties", {})}
    chosen: dict[str, Any] = {}
    for method, grid in GRIDS.items():
        scores = [merged(method, first, point, "validation")["mean"] for point in grid]
        best = grid[scores.index(min(scores))]
        chosen[method] = {"grid": grid, "validation": scores}
        arms[", ".join([method, *(f"{name} {value:g}" for name, value in best.items())])] = (method, best)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        folders = list(experts(seed).values())
        for arm, (method, parameters) in arms.items():
            found.setdefault(arm, []).append(merged(method, folders, parameters, "test"))
            print(f"seed {seed} {arm:<40} {found[arm][-1]['mean']:.4f}", flush=True)
    kinds = [*corpora(), "mean"]
    rows = {
        arm: {key: mean_and_spread([one[key] for one in runs]) for key in kinds}
        for arm, runs in found.items()
    }
    base = losses(MODEL)
    cells = [["base", *(f"{base[key]:.4f}" for key in kinds), ""]]
    cells += [
        [arm, *(f"{row[key]['mean']:.4f}" for key in kinds), f"{row['mean']['std']:.4f}"]
        for arm, row in rows.items()
    ]
    print(table(cells, ["merge", *kinds, "std of seeds"]))
    if options.out:
        save_json(options.out, {"base": base, "arms": rows, "chosen": chosen, "seeds": options.seeds})

        def draw(axes: Any) -> None:
            axes.barh(list(rows), [row["mean"]["mean"] for row in rows.values()])
            lowest = min(row["mean"]["mean"] for row in rows.values())
            axes.axvline(base["mean"], color="gray", linestyle="--", label="base")
            axes.set(xlabel="mean test loss, nats per token", xlim=(lowest - 0.1, base["mean"] + 0.05))
            axes.legend()

        save_plot(options.out.with_suffix(".png"), draw, (8.0, 2.8))


if __name__ == "__main__":
    main()
