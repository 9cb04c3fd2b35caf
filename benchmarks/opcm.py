"""OPCM against linear merging where models arrive one by one: held-out loss, over all orders of arrival.

Run: OMP_NUM_THREADS=1 python benchmarks/opcm.py

Three fine-tunes of the embedded model (functions, prose, character tables) arrive in each of the six orders.
Arms: the running mean of the models; half the merged model and half the new one; task arithmetic with a fixed
scale, 0.3 as in the paper's comparison and the best on validation text; OPCM with the paper's alpha 0.5 and
with the best alpha on validation text. Loss is the mean over the three kinds of test text.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _lab import ASSETS as _MODELS
from _lab import MODEL, mean_and_spread, save_json, save_plot, table
from _merge_lab import corpora, experts, losses, losses_of_state
from safetensors.torch import load_file

from hf_ext.merging import merge

DOCS = Path(__file__).resolve().parents[1] / "docs" / "assets"
SEEDS = (0, 1)
ALPHAS = (0.0, 0.2, 0.5, 0.8)
SCALES = (0.3, 0.5, 0.7)
State = dict[str, torch.Tensor]


def opcm(models: Sequence[Path], alpha: float, split: str) -> dict[str, float]:
    """Return the losses of models merged in this order."""
    config = {
        "merge_method": "opcm",
        "base_model": str(MODEL),
        "models": [str(model) for model in models],
        "parameters": {"alpha": alpha},
        "dtype": "float32",
    }
    with tempfile.TemporaryDirectory() as folder:
        merge(config, Path(folder) / "out", progress=False)
        return losses(Path(folder) / "out", split)


def state_of(folder: Path) -> State:
    """Return a model's weights in fp32."""
    return {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}


def combined(states: Sequence[State], weights: Sequence[float]) -> State:
    """Return a weighted sum of weights."""
    return {
        name: sum(weight * state[name] for state, weight in zip(states, weights, strict=True))
        for name in states[0]
    }  # type: ignore[return-value]


def task_arithmetic(base: State, states: Sequence[State], scale: float) -> State:
    """Return base + scale * sum of task vectors."""
    return combined([base, *states], [1.0 - scale * len(states), *[scale] * len(states)])


def main() -> None:
    """Run all arms and write JSON, PNG and a table."""
    base, kinds = state_of(MODEL), list(corpora())
    found: dict[str, list[dict[str, float]]] = {}
    chosen: dict[str, Any] = {}

    def note(arm: str, result: Mapping[str, float]) -> None:
        found.setdefault(arm, []).append(dict(result))
        print(f"{arm:<34} {result['mean']:.4f}", flush=True)

    for seed in SEEDS:
        folders = list(experts(seed).values())
        states = [state_of(folder) for folder in folders]
        own = [losses(folder) for folder in folders]
        note("each model on its own text", _diagonal(own, kinds))
        note("mean of single models", _average(own))
        if seed == SEEDS[0]:
            scores = {a: opcm(folders, a, "validation")["mean"] for a in ALPHAS}
            chosen["opcm alpha"] = {"validation": scores, "best": min(scores, key=scores.__getitem__)}
            scores = {
                s: losses_of_state(task_arithmetic(base, states, s), "validation")["mean"] for s in SCALES
            }
            chosen["scale"] = {"validation": scores, "best": min(scores, key=scores.__getitem__)}
        note("running mean", losses_of_state(combined(states, [1 / 3] * 3)))
        for scale in dict.fromkeys((0.3, chosen["scale"]["best"])):
            note(f"task arithmetic, scale {scale}", losses_of_state(task_arithmetic(base, states, scale)))
        for last in range(3):  # the first two enter alike
            weights = [0.5 if index == last else 0.25 for index in range(3)]
            note("half merged, half new", losses_of_state(combined(states, weights)))
        for order in itertools.permutations(folders):
            for alpha in dict.fromkeys((0.5, chosen["opcm alpha"]["best"])):
                note(f"opcm, alpha {alpha}", opcm(order, alpha, "test"))
    base_loss = losses(_MODELS / "tiny-llama")
    rows = {
        arm: {key: mean_and_spread([one[key] for one in results]) for key in results[0]}
        for arm, results in found.items()
    }
    save_json(DOCS / "opcm.json", {"base": base_loss, "arms": rows, "chosen": chosen, "seeds": list(SEEDS)})
    cells = [["base", *(f"{base_loss[k]:.4f}" for k in (*kinds, "mean")), ""]]
    cells += [
        [arm, *(f"{row[k]['mean']:.4f}" for k in (*kinds, "mean")), f"{row['mean']['std']:.4f}"]
        for arm, row in rows.items()
    ]
    print(table(cells, ["arm", *kinds, "mean", "std over orders and seeds"]))
    shown = [arm for arm in rows if arm != "mean of single models"]

    def draw(axes: Any) -> None:
        axes.barh(
            shown,
            [rows[arm]["mean"]["mean"] for arm in shown],
            xerr=[rows[arm]["mean"]["std"] for arm in shown],
        )
        axes.axvline(base_loss["mean"], color="gray", linestyle="--", label="base")
        axes.set(
            xlabel="mean test loss over three kinds of text (nats per token)",
            xlim=(min(rows[arm]["mean"]["mean"] for arm in shown) - 0.2, base_loss["mean"] + 0.1),
        )
        axes.invert_yaxis()
        axes.legend()

    save_plot(DOCS / "opcm.png", draw, (8.0, 3.6))


def _average(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in results) / len(results) for key in results[0]}


def _diagonal(results: Sequence[Mapping[str, float]], kinds: Sequence[str]) -> dict[str, float]:
    own = {kind: result[kind] for kind, result in zip(kinds, results, strict=True)}
    return {**own, "mean": sum(own.values()) / len(own)}


if __name__ == "__main__":
    main()
