"""What a Trainer has written about a checkpoint: its step and its metrics, from trainer_state.json."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..core.checks import check
from ..core.files import read_json
from ._coefficients import saved_checkpoints, saved_step

STATE = "trainer_state.json"


@dataclass(frozen=True)
class Saved:
    """One checkpoint of a run.

    Args:
        folder: Its folder.
        step: Optimizer steps taken.
        history: What the Trainer had logged by then, in order.
    """

    folder: Path
    step: int
    history: tuple[dict[str, Any], ...]

    def metric(self, key: str, since: int, window: str) -> float:
        """Return a logged number.

        Args:
            key: Its name in the log, such as "loss" or "eval_loss".
            since: Step of the checkpoint before; 0 for the first.
            window: "mean" of what was logged after `since`, or the "last" of it.

        Raises:
            ValueError: Nothing was logged under that name in that window.
        """
        values = [
            float(entry[key])
            for entry in self.history
            if key in entry and since < int(entry.get("step", -1)) <= self.step
        ]
        if not values:
            known = sorted({name for entry in self.history for name in entry} - {"step", "epoch"})
            raise ValueError(
                f"{self.folder / STATE}: no {key!r} was logged after step {since} up to step {self.step}; "
                f"log as often as checkpoints are saved (logged at all: {', '.join(known) or 'nothing'})"
            )
        return values[-1] if window == "last" else math.fsum(values) / len(values)


def read_saved(folders: Sequence[Path]) -> list[Saved]:
    """Read what the Trainer has written into checkpoints.

    Raises:
        FileNotFoundError: Some have no trainer_state.json; the text lists them.
        ValueError: A file is damaged, or has no step.
    """
    lacking = [str(folder) for folder in folders if not (folder / STATE).is_file()]
    if lacking:
        raise FileNotFoundError(
            f"no {STATE} in {', '.join(lacking)}; give the numbers themselves, or merge without them "
            "(weighting: uniform)"
        )
    return [_saved(folder) for folder in folders]


def _saved(folder: Path) -> Saved:
    path = folder / STATE
    content = read_json(path)
    fields = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    step, history = fields.get("global_step"), fields.get("log_history")
    whole = isinstance(step, int) and not isinstance(step, bool)
    check(whole, "global_step", step, "a number of steps", where=str(path))
    rows = cast("list[Any]", history) if isinstance(history, list) else [None]
    rule = "a list of mappings"
    check(all(isinstance(row, dict) for row in rows), "log_history", history, rule, where=str(path))
    return Saved(folder, cast(int, step), tuple(cast("list[dict[str, Any]]", rows)))


def step_before(one: Saved, others: Iterable[Saved]) -> int:
    """Return the step of the checkpoint before one of the same run, given or lying beside it; 0 if none."""
    place = one.folder.resolve().parent
    steps = [other.step for other in others if other.folder.resolve().parent == place]
    steps += [saved_step(path) for path in saved_checkpoints(place)]
    return max((step for step in steps if step < one.step), default=0)


def of_one_run(saved: Sequence[Saved]) -> bool:
    """Whether the log of each checkpoint begins with that of the one before, as in one run and in no two."""
    ordered = sorted(saved, key=lambda one: one.step)
    return all(
        bool(earlier.history) and later.history[: len(earlier.history)] == earlier.history
        for earlier, later in itertools.pairwise(ordered)
    )
