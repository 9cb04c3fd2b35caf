"""Eight nodes with data of their own: single replicas, their one merge, and batch norms after it.

Run: python benchmarks/global_merge.py [--out docs/assets/global_merge.json]

A network of 32-64-64-8, with and without batch norms, learns which class a noisy point is of. Each node has
its own share of every class (Dirichlet 0.1), trains alone with SGD, and after each round talks as the
schedule says. All nodes are simulated in one process with the library's pairs (`gossip_pairs`); the merge is
`merge_method: global_merge` on eight saved replicas. Accuracies are over points of all classes alike.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from _lab import mean_and_spread, save_json, save_plot, table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_ext.callbacks import gossip_pairs
from hf_ext.merging import merge, recalibrate_batch_norm

NODES, CLASSES, WIDTH, ALPHA = 8, 8, 32, 0.1
STEPS, BATCH, RATE = 20, 32, 0.02
SCHEDULES = {"no gossip": 0.0, "one pair": None, "each pair by 0.2": 0.2, "all pairs": 1.0}
Rows = tuple[Tensor, Tensor]


def points(seed: int) -> tuple[list[Rows], Rows, Rows]:
    """Return each node's points with their classes, all of them together, and held-out ones."""
    draw = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, WIDTH, generator=draw)

    def of(classes: Tensor) -> Rows:
        return centers[classes] + 2.0 * torch.randn(len(classes), WIDTH, generator=draw), classes

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shares = torch.distributions.Dirichlet(torch.full((NODES,), ALPHA)).sample(torch.Size([CLASSES]))
    nodes: list[list[Tensor]] = [[] for _ in range(NODES)]
    for number in range(CLASSES):
        counts = (shares[number] * 250).round().int().tolist()
        for node, count in enumerate(counts):
            nodes[node].append(torch.full((count,), number))
    own = [of(torch.cat(parts) if sum(map(len, parts)) > 1 else torch.arange(CLASSES)) for parts in nodes]
    union = torch.cat([x for x, _ in own]), torch.cat([y for _, y in own])
    return own, union, of(torch.arange(CLASSES).repeat(500))


def network(seed: int, normed: bool) -> nn.Sequential:
    """Return an untrained network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts: list[nn.Module] = []
        for before, after in ((WIDTH, 64), (64, 64)):
            parts += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if normed else []), nn.ReLU()]
        return nn.Sequential(*parts, nn.Linear(64, CLASSES))


def accuracy(model: nn.Module, rows: Rows) -> float:
    """Return the share of points that are put into their class."""
    model.eval()
    with torch.no_grad():
        return float((model(rows[0]).argmax(1) == rows[1]).float().mean())


def trained(
    seed: int, normed: bool, rounds: int, probability: float | None, own: list[Rows]
) -> list[nn.Sequential]:
    """Return the replicas after all rounds; None for one pair in each round."""
    models = [copy.deepcopy(network(seed, normed)) for _ in range(NODES)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9) for model in models]
    draw = torch.Generator().manual_seed(1000 + seed)
    for number in range(rounds):
        for model, optimizer, (x, y) in zip(models, optimizers, own, strict=True):
            model.train()
            for _ in range(STEPS):
                picked = torch.randint(len(x), (BATCH,), generator=draw)
                loss = nn.functional.cross_entropy(model(x[picked]), y[picked])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        pairs = gossip_pairs(NODES, number, 1.0 if probability is None else probability, seed)
        for a, b in pairs[:1] if probability is None else pairs:
            talk(models[a], models[b])
    return models


def talk(a: nn.Module, b: nn.Module) -> None:
    """Give both the mean of their weights and statistics."""
    for ours, theirs in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        if ours.is_floating_point():
            mean = (ours + theirs) / 2
            ours.copy_(mean)
            theirs.copy_(mean)


def merged(models: list[nn.Sequential], bn: str, folder: Path) -> nn.Sequential:
    """Return the merge of the saved replicas."""
    names = []
    for node, model in enumerate(models):
        names.append(str(folder / f"node{node}"))
        Path(names[-1]).mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), Path(names[-1]) / "model.safetensors")
        (Path(names[-1]) / "config.json").write_text("{}")
    out = folder / bn
    config: Any = {"merge_method": "global_merge", "models": names, "parameters": {"bn": bn}}
    merge(config, out)
    result = copy.deepcopy(models[0])
    result.load_state_dict(load_file(out / "model.safetensors"))
    return result


def one_seed(seed: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the accuracies of one seed by network and schedule."""
    own, union, held_out = points(seed)
    found: dict[str, dict[str, float]] = {}
    for normed in (False, True):
        for name, probability in SCHEDULES.items():
            models = trained(seed, normed, rounds, probability, own)
            single = [accuracy(model, held_out) for model in models]
            result = {"mean replica": sum(single) / NODES, "best replica": max(single)}
            with tempfile.TemporaryDirectory() as folder:
                if normed:
                    for bn in ("pool", "average"):
                        result[f"merge, {bn}"] = accuracy(merged(models, bn, Path(folder)), held_out)
                    anew = merged(models, "pool", Path(folder) / "x")
                    recalibrate_batch_norm(anew, list(union[0].split(256)))
                    result["merge, recalibrate"] = accuracy(anew, held_out)
                else:
                    result["merge"] = accuracy(merged(models, "average", Path(folder)), held_out)
            found[f"{'batch norms' if normed else 'plain'}, {name}"] = result
    return found


def main() -> None:
    """Run the seeds, print a table, and write JSON and a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/assets/global_merge.json"))
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        runs.append(one_seed(seed, arguments.rounds))
        print(f"seed {seed} {runs[-1]}", flush=True)
    arms = {
        name: {key: mean_and_spread([run[name][key] for run in runs]) for key in runs[0][name]}
        for name in runs[0]
    }
    cells = [
        [name, key, f"{arm['mean']:.3f}", f"{arm['std']:.3f}"]
        for name in arms
        for key, arm in arms[name].items()
    ]
    print(table(cells, ["run", "model", "accuracy", "std"]))
    settings = {"nodes": NODES, "alpha": ALPHA, "rounds": arguments.rounds, "steps": STEPS, "rate": RATE}
    save_json(arguments.out, {"settings": settings, "arms": arms})

    def draw(axes: Any) -> None:
        keys = (
            "mean replica",
            "best replica",
            "merge",
            "merge, average",
            "merge, pool",
            "merge, recalibrate",
        )
        for index, key in enumerate(keys):
            rows = [(place, arm[key]) for place, arm in enumerate(arms.values()) if key in arm]
            places = [place + 0.14 * index - 0.3 for place, _ in rows]
            means, spread = [arm["mean"] for _, arm in rows], [arm["std"] for _, arm in rows]
            axes.errorbar(means, places, xerr=spread, fmt="o", markersize=4, label=key)
        axes.set_yticks(range(len(arms)), list(arms))
        axes.invert_yaxis()
        axes.set_xlabel("held-out accuracy")
        axes.legend(fontsize=8)

    save_plot(arguments.out.with_suffix(".png"), draw, size=(8.0, 5.6))


if __name__ == "__main__":
    main()
