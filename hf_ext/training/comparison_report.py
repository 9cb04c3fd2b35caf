"""What a comparison has shown: numbers per method, as a table, JSON and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core.files import write_bytes, write_json
from .comparison_settings import CompareSettings, Method
from .outputs import base_label
from .plot import Band, comparison_plot
from .recipe import Job

NAME = "comparison"
_HEADS = (
    "method",
    "learning rate",
    "held-out loss",
    "range",
    "steps to target",
    "ratio",
    "seconds to target",
    "trainable",
    "optimizer state",
    "step",
    "ratio",
    "start",
)


@dataclass(frozen=True)
class Tuning:
    """The runs that choose one method's learning rate.

    Args:
        records: Run by learning rate, ascending.
    """

    records: Mapping[float, Mapping[str, Any]]

    @property
    def losses(self) -> dict[float, float | None]:
        """Loss at the end by learning rate; None for a run that failed."""
        return {
            rate: record["curve"][-1][1] if record["status"] == "done" else None
            for rate, record in self.records.items()
        }

    @property
    def best(self) -> float | None:
        """The rate of the lowest loss; None where every run failed."""
        finite = {rate: loss for rate, loss in self.losses.items() if loss is not None}
        return min(finite, key=lambda rate: finite[rate]) if finite else None

    @property
    def edge(self) -> str | None:
        """The best rate's place at the edge of the grid: "lowest", "highest" or "only"; None inside it."""
        grid, best = list(self.records), self.best
        if best is None:
            return None
        if len(grid) == 1:
            return "only"
        return {grid[0]: "lowest", grid[-1]: "highest"}.get(best)

    @property
    def failed(self) -> dict[float, str]:
        """Reason by learning rate of the runs that failed."""
        return {
            rate: str(record["reason"]) for rate, record in self.records.items() if record["status"] != "done"
        }

    def notes(self, label: str) -> list[str]:
        """Return lines for what a reader of the tuned rate has to know."""
        lines = [f"{label}: failed at {rate:g}: {reason}" for rate, reason in self.failed.items()]
        if self.edge == "only":
            lines.append(f"{label}: {self.best:g} is the only rate that was tried")
        elif self.edge is not None:
            beyond = "smaller" if self.edge == "lowest" else "larger"
            place = f"the best rate, {self.best:g}, is the {self.edge} of its grid"
            lines.append(f"{label}: {place}: a {beyond} one may be better")
        return lines


@dataclass(frozen=True)
class Results:
    """All runs of a comparison.

    Args:
        job: The recipe.
        settings: Its `compare`.
        methods: What was compared, the baseline first.
        seeds: Those of the reported runs.
        tune_seed: That of the runs which chose the rates.
        rows: Number of rows that the trainer used, by part: train, tune and test.
        dataset: Its name for people.
        tuning: By label.
        tuned: Reported runs at the tuned rates, by label; empty for a method without one.
        shared: The same at the shared rate; None where there is none.
        versions: Of the libraries.
    """

    job: Job
    settings: CompareSettings
    methods: Sequence[Method]
    seeds: Sequence[int]
    tune_seed: int
    rows: Mapping[str, int]
    dataset: str
    tuning: Mapping[str, Tuning]
    tuned: Mapping[str, Sequence[Mapping[str, Any]]]
    shared: Mapping[str, Sequence[Mapping[str, Any]]] | None
    versions: Mapping[str, str | None]


# Numbers ----------------------------------------------------------------------------------------------------


def summarize(results: Results) -> dict[str, Any]:
    """Return the numbers of a comparison as JSON values (`comparison.json`)."""
    r = results
    return {
        "model": base_label(r.job),
        "dataset": r.dataset,
        "rows": dict(r.rows),
        "seeds": list(r.seeds),
        "tune_seed": r.tune_seed,
        "tune_split": r.settings.tune_split,
        "learning_rates": list(r.settings.learning_rates),
        "shared_learning_rate": r.settings.shared_learning_rate,
        "baseline": r.methods[0].label,
        "methods": {method.label: _described(r, method) for method in r.methods},
        "tuned": _rows(r, r.tuned),
        "shared": None if r.shared is None else _rows(r, r.shared),
        "settings": {key: r.job.settings[key] for key in sorted(r.job.settings) if key != "output_dir"},
        "versions": dict(r.versions),
    }


def _described(r: Results, method: Method) -> dict[str, Any]:
    tuning = r.tuning[method.label]
    return {
        "adapter": dict(method.adapter),
        "learning_rates": list(method.learning_rates),
        "own_grid": method.own_grid,
        "tuning": [{"learning_rate": rate, "loss": loss} for rate, loss in tuning.losses.items()],
        "best": tuning.best,
        "edge": tuning.edge,
        "notes": tuning.notes(method.label),
    }


def _rows(r: Results, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    rows = [_row(method, r.tuning[method.label], runs[method.label]) for method in r.methods]
    base = rows[0]
    target = None if base["failed"] else base["mean"]
    base_steps = _first_at(base, target)
    for row in rows:
        reached = _first_at(row, target)
        row["target_steps"] = reached
        row["target_ratio"] = None if reached is None or not base_steps else reached / base_steps
        row["target_seconds"] = (
            None if reached is None else row["start_seconds"] + reached * row["step_seconds"]
        )
        both = not row["failed"] and not base["failed"]
        row["step_ratio"] = row["step_seconds"] / base["step_seconds"] if both else None
    return rows


def _row(method: Method, tuning: Tuning, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not runs:
        rates = "; ".join(f"{rate:g}: {reason}" for rate, reason in tuning.failed.items())
        return {
            "method": method.label,
            "learning_rate": None,
            "failed": f"no rate of its grid works ({rates})",
        }
    row: dict[str, Any] = {"method": method.label, "learning_rate": runs[0]["learning_rate"], "failed": None}
    broken = [run for run in runs if run["status"] != "done"]
    if broken:  # a mean over the seeds that happened to work would flatter the method
        reasons = "; ".join(f"seed {run['seed']}: {run['reason']}" for run in broken)
        return {**row, "failed": f"{len(broken)} of {len(runs)} seeds ({reasons})"}
    curves = [dict(map(tuple, run["curve"])) for run in runs]
    steps = sorted(curves[0])
    ends = [curve[steps[-1]] for curve in curves]
    by_step = [[curve[step] for curve in curves] for step in steps]
    return {
        **row,
        "losses": ends,
        "mean": statistics.mean(ends),
        "min": min(ends),
        "max": max(ends),
        "curve": {
            "steps": steps,
            "mean": [statistics.mean(losses) for losses in by_step],
            "min": [min(losses) for losses in by_step],
            "max": [max(losses) for losses in by_step],
        },
        "trainable_parameters": runs[0]["trainable_parameters"],
        "optimizer_state_bytes": runs[0]["optimizer_state_bytes"],
        "step_seconds": statistics.median(run["step_seconds"] for run in runs),
        "start_seconds": statistics.median(sum(run["start_seconds"].values()) for run in runs),
        "run_seconds": statistics.median(run["seconds"] for run in runs),
    }


def _first_at(row: Mapping[str, Any], target: float | None) -> int | None:
    """Return the first evaluated step at which a method's mean loss is at most the target."""
    if target is None or row["failed"]:
        return None
    curve = row["curve"]
    return next(
        (step for step, loss in zip(curve["steps"], curve["mean"], strict=True) if loss <= target), None
    )


# Text and plot ----------------------------------------------------------------------------------------------


def write_report(folder: Path, summary: Mapping[str, Any]) -> str:
    """Write `comparison.json`, `.md` and, with matplotlib, `.png` into a folder, and return the table.

    Raises:
        OSError: A file cannot be written.
    """
    text = markdown(summary)
    write_json(folder / f"{NAME}.json", summary)
    write_bytes(folder / f"{NAME}.md", text.encode())
    if find_spec("matplotlib") is not None:
        write_bytes(folder / f"{NAME}.png", _plot(summary))
    return text


def markdown(summary: Mapping[str, Any]) -> str:
    """Return the tables of a comparison with what is needed to read them."""
    grid = ", ".join(f"{rate:g}" for rate in summary["learning_rates"])
    rows, seeds = summary["rows"], summary["seeds"]
    tune_rows = f"{rows['tune']} rows of " + (
        f"the split {summary['tune_split']!r}" if summary["tune_split"] else "the train split, held back"
    )
    parts = [
        f"# {', '.join(summary['methods'])}: {summary['model']} on {summary['dataset']}",
        f"Held-out loss in nats per token on {rows['test']} rows, mean of {len(seeds)} seeds "
        f"({', '.join(map(str, seeds))}) after training on {rows['train']} rows. All methods were given the "
        f"same batches in the same order. Each learning rate was chosen from {grid} on {tune_rows}, "
        f"with seed {summary['tune_seed']}.",
        f"## At each method's tuned learning rate\n\n{_table(summary, summary['tuned'], tuned=True)}",
    ]
    if summary["shared"] is not None:
        title = f"## At the shared learning rate {summary['shared_learning_rate']:g}"
        parts.append(f"{title}\n\n{_table(summary, summary['shared'], tuned=False)}")
    parts.append(
        f"Target: the final mean loss of {summary['baseline']} in the same table; steps to it: the first "
        "evaluated step whose mean loss is at most that, as a ratio to the baseline's; seconds to it: the "
        "start and that many median steps. Start: injection and a start from data. Step: median of the "
        "optimizer steps, without evaluations."
    )
    notes = [note for method in summary["methods"].values() for note in method["notes"]]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _table(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, tuned: bool) -> str:
    lines = [f"| {' | '.join(_HEADS)} |", f"|{'---|' * len(_HEADS)}"]
    for row in rows:
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        if tuned:
            rate += _about_grid(summary["methods"][row["method"]])
        cells = [row["method"], rate.strip(), *(_failed(row) if row["failed"] else _measured(row))]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _about_grid(method: Mapping[str, Any]) -> str:
    about = [f"{method['edge']} of the grid"] if method["edge"] is not None else []
    if method["own_grid"]:
        about.append(f"its own: {', '.join(f'{rate:g}' for rate in method['learning_rates'])}")
    return f" ({'; '.join(about)})" if about else ""


def _failed(row: Mapping[str, Any]) -> list[str]:
    return [f"failed: {row['failed']}", *[""] * (len(_HEADS) - 3)]


def _measured(row: Mapping[str, Any]) -> list[str]:
    reached = row["target_steps"]
    return [
        f"{row['mean']:.4f}",
        f"{row['min']:.4f} to {row['max']:.4f}",
        "not reached" if reached is None else str(reached),
        "" if row["target_ratio"] is None else f"{row['target_ratio']:.2f}",
        "" if row["target_seconds"] is None else f"{row['target_seconds']:.1f}",
        f"{row['trainable_parameters']:,}",
        f"{row['optimizer_state_bytes'] / 1e6:.3f} MB",
        f"{row['step_seconds'] * 1e3:.1f} ms",
        "" if row["step_ratio"] is None else f"{row['step_ratio']:.2f}",
        f"{row['start_seconds']:.2f} s",
    ]


def _plot(summary: Mapping[str, Any]) -> bytes:
    panels = {"each at its tuned learning rate": summary["tuned"]}
    if summary["shared"] is not None:
        panels[f"all at learning rate {summary['shared_learning_rate']:g}"] = summary["shared"]
    bands = {
        title: [
            Band(f"{row['method']}, {row['learning_rate']:g}", row["method"], **row["curve"])
            for row in rows
            if not row["failed"]
        ]
        for title, rows in panels.items()
    }
    title = f"{summary['model']} on {summary['dataset']}: mean and range of {len(summary['seeds'])} seeds"
    return comparison_plot(bands, title, list(summary["methods"]))
