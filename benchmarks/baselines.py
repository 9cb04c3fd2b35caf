"""SLERP, DARE and greedy soups against what they are compared with: held-out loss of fine-tunes merged.

Run: OMP_NUM_THREADS=1 python benchmarks/baselines.py [--parts slerp,dare,greedy_soup]

slerp: two of three fine-tunes of the embedded model (functions, prose, character tables), at positions t, on
the text of the two; against the straight line between them and a scaled sum of their task vectors.
dare: all three fine-tunes; against task arithmetic of the same scale and TIES, both with the settings that
`ties.py` chose.
greedy_soup: six fine-tunes on functions, of three learning rates and two orders of the data, some of them
bad; against the uniform soup and the run that is best on the blocks which the soup is chosen on.

Scales and densities, and the members of a soup, are chosen on validation text; losses are those of test text,
nats per token. The JSON keeps the parts that are not run.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _lab import MODEL, embedded_model, mean_and_spread, save_json, save_plot, table
from _lab import loss_of as block_loss
from _merge_lab import corpora, expert, experts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_ext.core.files import read_json
from hf_ext.merging import greedy_soup_weights, merge

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
SEEDS = (0, 1)
POSITIONS = (0.25, 0.5, 0.75)
PAIR_SCALES = (0.5, 0.7, 1.0)
SCALE, TIES = 0.5, {"density": 0.5, "lambda": 1.0}  # chosen by ties.py, on validation text
DENSITIES = (0.1, 0.3, 0.5, 0.8)
DARE_SCALES = {"linear": (0.3, 0.5), "ties": (0.3, 0.5, 0.7)}
RATES, RUN_STEPS, POOLS = (3e-4, 1e-3, 3e-3), 24, (0, 1, 2)
Models = Sequence[Path]


def rows_of(kind: str, split: str, every: int) -> Any:
    """Return every n-th block of a split of one kind of text."""
    rows = getattr(corpora()[kind], split)
    return rows.select(range(0, len(rows), every))


def losses(model: Any, kinds: Sequence[str], split: str = "test", every: int = 1) -> dict[str, float]:
    """Return the loss on each kind of text, and their mean."""
    found = {kind: block_loss(model, rows_of(kind, split, every)) for kind in kinds}
    return {**found, "mean": sum(found.values()) / len(found)}


def merged(method: str, models: Models, parameters: dict[str, Any], weights: Any = None, **more: Any) -> Any:
    """Return the merged model.

    Args:
        method: Name of the merge method.
        models: Folders.
        parameters: Of the method.
        weights: A weight for each model; None for 1.
        **more: More fields of the configuration, such as `base_model`.
    """
    found: list[Any] = [{"model": str(model)} for model in models]
    for entry, weight in zip(found, weights or (), strict=False):
        entry["parameters"] = {"weight": weight}
    config = {"merge_method": method, "models": found, "parameters": parameters, "dtype": "float32", **more}
    with tempfile.TemporaryDirectory() as folder:
        merge(config, Path(folder) / "out", progress=False)
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "out", dtype=torch.float32)


def between(way: str, pair: Models, t: float) -> Any:
    """Return the model at position t between two."""
    if way == "linear":
        return merged("linear", pair, {}, [1.0 - t, t])
    if way == "slerp":
        return merged("slerp", pair, {"t": t})
    return merged("slerp", pair, {"t": t, "around_base": True}, base_model=str(MODEL))


def geometry(pair: Models, straight: Any, arc: Any) -> dict[str, Any]:
    """Return the cosines of a pair's tensors and task vectors, and how far arc and line are apart."""
    base, a, b = (load_file(folder / "model.safetensors") for folder in (MODEL, *pair))

    def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(x.double().flatten(), y.double().flatten(), dim=0))

    def distance(x: Any, y: Any) -> float:
        return sum(float((x[name].double() - y[name].double()).square().sum()) for name in base) ** 0.5

    line = straight.state_dict()
    weights = {name: cosine(a[name], b[name]) for name in base}
    changes = sorted(cosine(a[name] - base[name], b[name] - base[name]) for name in base)
    return {
        "tensors": len(base),
        "on the arc": sum(found <= 0.9995 for found in weights.values()),
        "least cosine": min(weights.values()),
        "cosines of changes": [changes[0], changes[len(changes) // 2], changes[-1]],
        "apart, of the line's change": distance(arc.state_dict(), line) / distance(line, base),
    }


def slerp(assets: Path) -> dict[str, Any]:
    """Measure SLERP on the three pairs."""
    found: dict[str, dict[str, list[float]]] = {}
    shape: dict[str, list[Any]] = {}
    chosen: dict[str, Any] = {}

    def scaled(pair: Models, scale: float) -> Any:
        return merged("task_arithmetic", pair, {"lambda": scale}, base_model=str(MODEL))

    for seed in SEEDS:
        models = experts(seed)
        pairs = list(itertools.combinations(models, 2))
        if not chosen:
            scores = {
                scale: sum(
                    losses(scaled([models[kind] for kind in kinds], scale), kinds, "validation", 2)["mean"]
                    for kinds in pairs
                )
                / len(pairs)
                for scale in PAIR_SCALES
            }
            chosen = {"validation": scores, "scale": min(scores, key=scores.__getitem__)}
        for kinds in pairs:
            pair, label = [models[kind] for kind in kinds], " + ".join(kinds)

            def note(arm: str, model: Any, kinds: Any = kinds, label: str = label) -> None:
                found.setdefault(arm, {}).setdefault(label, []).append(losses(model, kinds, every=2)["mean"])

            for t in POSITIONS:
                there = {way: between(way, pair, t) for way in ("linear", "slerp", "slerp around base")}
                for way, model in there.items():
                    note(f"{way}, t {t:g}", model)
                if t == 0.5:
                    shape.setdefault(label, []).append(geometry(pair, there["linear"], there["slerp"]))
            note("task arithmetic, scale tuned", scaled(pair, chosen["scale"]))
            print(
                seed, label, {arm: round(values[label][-1], 5) for arm, values in found.items()}, flush=True
            )
    arms = {arm: {label: mean_and_spread(v) for label, v in values.items()} for arm, values in found.items()}
    labels = list(next(iter(arms.values())))
    cells = [[arm, *(f"{row[label]['mean']:.4f}" for label in labels)] for arm, row in arms.items()]
    print(table(cells, ["merge", *labels]))

    def draw(axes: Any) -> None:
        for way in ("linear", "slerp", "slerp around base"):
            means = [
                sum(arms[f"{way}, t {t:g}"][label]["mean"] for label in labels) / len(labels)
                for t in POSITIONS
            ]
            style = "--x" if way == "slerp" else "-o"
            axes.plot(POSITIONS, means, style, label=way)
        level = sum(row["mean"] for row in arms["task arithmetic, scale tuned"].values()) / len(labels)
        axes.axhline(level, color="gray", linestyle="--", label=f"task arithmetic, scale {chosen['scale']:g}")
        axes.set(xlabel="position t", ylabel="mean test loss of the pairs, nats per token")
        axes.legend()

    save_plot(assets / "slerp.png", draw)
    return {"arms": arms, "geometry": shape, "chosen": chosen, "seeds": list(SEEDS)}


def dare(assets: Path) -> dict[str, Any]:
    """Measure DARE, in both forms, on the three fine-tunes at once."""
    kinds, base = list(corpora()), {"base_model": str(MODEL)}
    first = list(experts(0).values())
    chosen: dict[str, Any] = {}

    def thinned(models: Models, form: str, density: float, scale: float, seed: int) -> Any:
        parameters = {"density": density, "merge": form, "lambda": scale}
        return merged("dare", models, parameters, seed=seed, **base)

    for form, scales in DARE_SCALES.items():
        grid = list(itertools.product(DENSITIES, scales))
        scores = [
            losses(thinned(first, form, *point, seed=0), kinds, "validation", 2)["mean"] for point in grid
        ]
        chosen[form] = {"grid": grid, "validation": scores, "best": grid[scores.index(min(scores))]}
        print(form, dict(zip(grid, scores, strict=True)), flush=True)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        models = list(experts(seed).values())
        arms = {
            "linear": merged("linear", models, {}),
            f"task arithmetic, lambda {SCALE:g}": merged(
                "task_arithmetic", models, {"lambda": SCALE}, **base
            ),
            "TIES, density 0.5, lambda 1": merged("ties", models, dict(TIES), **base),
        }
        for form in DARE_SCALES:
            points = [(density, SCALE) for density in DENSITIES]
            for density, scale in dict.fromkeys([*points, tuple(chosen[form]["best"])]):
                name = f"DARE {form}, density {density:g}, lambda {scale:g}"
                arms[name] = thinned(models, form, density, scale, seed)
        for arm, model in arms.items():
            found.setdefault(arm, []).append(losses(model, kinds))
            print(f"seed {seed} {arm:<40} {found[arm][-1]['mean']:.4f}", flush=True)
    rows = {
        arm: {key: mean_and_spread([one[key] for one in runs]) for key in (*kinds, "mean")}
        for arm, runs in found.items()
    }
    cells = [
        [arm, *(f"{row[key]['mean']:.4f}" for key in (*kinds, "mean")), f"{row['mean']['std']:.4f}"]
        for arm, row in rows.items()
    ]
    print(table(cells, ["merge", *kinds, "mean", "std of seeds"]))

    def draw(axes: Any) -> None:
        for form in DARE_SCALES:
            points = [
                rows[f"DARE {form}, density {density:g}, lambda {SCALE:g}"]["mean"] for density in DENSITIES
            ]
            means, spread = [point["mean"] for point in points], [point["std"] for point in points]
            axes.errorbar(DENSITIES, means, spread, marker="o", label=f"DARE {form}, lambda {SCALE:g}")
        for (arm, row), style in zip(list(rows.items())[:3], (":", "-.", "--"), strict=True):
            axes.axhline(row["mean"]["mean"], color="gray", linestyle=style, label=arm)
        axes.set(xlabel="density", ylabel="mean test loss, nats per token")
        axes.legend(fontsize=8)

    save_plot(assets / "dare.png", draw)
    return {"arms": rows, "chosen": chosen, "seeds": list(SEEDS)}


def greedy_soup(assets: Path) -> dict[str, Any]:
    """Measure greedy soups of pools of runs on one task."""
    pools: list[dict[str, Any]] = []
    for pool in POOLS:
        runs = [(rate, order) for rate in RATES for order in (2 * pool, 2 * pool + 1)]
        folders = [expert("functions", order, RUN_STEPS, rate) for rate, order in runs]
        validation: list[float] = []

        def evaluate(model: Any, scores: list[float] = validation) -> float:
            scores.append(block_loss(model, rows_of("functions", "validation", 2)))
            return scores[-1]

        def test(weights: Sequence[float], folders: Models = folders) -> float:
            model = merged("linear", folders, {}, weights)
            return block_loss(model, rows_of("functions", "test", 1))

        weights = greedy_soup_weights(folders, evaluate, model=embedded_model())
        count = len(folders)
        single = [test([float(i == number) for i in range(count)]) for number in range(count)]
        best = min(range(count), key=validation.__getitem__)
        same_rate = [test([float(rate == own) for rate, _ in runs]) for own in RATES]
        arms = {
            "mean single run": sum(single) / count,
            "best single run": single[best],
            "uniform soup": test([1.0] * count),
            "greedy soup": test(weights),
        }
        pools.append(
            {
                "arms": arms,
                "runs": runs,
                "single": single,
                "validation": validation,
                "weights": weights,
                "two runs of one rate": same_rate,
            }
        )
        print(pool, pools[-1], flush=True)
    rows = {arm: mean_and_spread([pool["arms"][arm] for pool in pools]) for arm in pools[0]["arms"]}
    cells = [[arm, f"{row['mean']:.4f}", f"{row['std']:.4f}"] for arm, row in rows.items()]
    print(table(cells, ["model", "loss", "std of pools"]))

    def draw(axes: Any) -> None:
        for number, pool in enumerate(pools):
            for rate in RATES:
                own = [loss for (r, _), loss in zip(pool["runs"], pool["single"], strict=True) if r == rate]
                label = None if number else f"single run, rate {rate:g}"
                color = f"C{RATES.index(rate) + 2}"
                axes.plot([number] * len(own), own, "_", color=color, label=label, markersize=14)
        places = range(len(pools))
        axes.plot(places, rows["uniform soup"]["values"], "s", color="C0", label="uniform soup")
        axes.plot(places, rows["greedy soup"]["values"], "o", color="C1", label="greedy soup")
        axes.set_xticks(places, [f"pool {place}" for place in places])
        axes.set(ylabel="test loss, nats per token")
        axes.legend(fontsize=8)

    save_plot(assets / "greedy_soup.png", draw)
    return {"arms": rows, "pools": pools, "steps": RUN_STEPS}


PARTS = {"slerp": slerp, "dare": dare, "greedy_soup": greedy_soup}


def main() -> None:
    """Run the parts asked for, and write each when it is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=ASSETS / "baselines.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts.split(","):
        result = PARTS[part](options.out.parent)
        earlier = read_json(options.out) if options.out.exists() else {}
        save_json(options.out, {**{name: earlier[name] for name in PARTS if name in earlier}, part: result})


if __name__ == "__main__":
    main()
