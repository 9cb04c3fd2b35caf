"""Files of a refinement: the gradient norms that a run has left, and the schedule made of them.

A run of `RefinedLinearDecayCallback` leaves `gradient_norms.{json,safetensors}` in its folder;
`hf-ext schedule refine` writes `refined_schedule.json` beside them.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..core.checks import check
from ..core.files import read_json
from ..core.state import load_state

FILE = "gradient_norms"
SCHEDULE = "refined_schedule.json"
FEWEST = 8  # norms that a refinement needs

# Parts of optimizers' class names, in lower case. The first are looked for first: AdaLomo has both.
COORDINATE_WISE = (
    "adam",  # AdamW, Adamax, NAdam, RAdam, their 8-bit, paged, GaLore and APOLLO forms
    "ademamix",
    "adafactor",
    "adagrad",
    "adadelta",
    "adabelief",
    "adalomo",
    "adan",
    "lamb",
    "lion",
    "prodigy",
    "rmsprop",
    "rprop",
    "signsgd",
    "signum",
    "sophia",
)
EUCLIDEAN = ("sgd", "lars", "lomo")


def family(optimizer: str) -> str | None:
    """Return the norm of an optimizer's family by its class name: "l1", "l2", or None for an unknown one.

    Coordinate-wise methods, which divide each coordinate by its own size or take its sign, go with the l1
    norm; steps along the gradient itself with the l2 norm.
    """
    name = optimizer.lower()
    if any(part in name for part in COORDINATE_WISE):
        return "l1"
    return "l2" if any(part in name for part in EUCLIDEAN) else None


def norm_for(optimizer: str) -> str:
    """Return the norm of an optimizer's family; l2 with a warning for an optimizer of none that is known."""
    found = family(optimizer)
    if found is None:
        warnings.warn(
            f"norm='auto' does not know the optimizer {optimizer} and takes l2, the norm for SGD: give "
            "norm='l1' for a coordinate-wise method, as those of Adam's family are",
            stacklevel=2,
        )
    return found or "l2"


def same_family(one: str, other: str) -> bool:
    """Return whether two optimizers take the same norm; unknown ones do where their names are equal."""
    return one == other or (family(one) == family(other) and family(one) is not None)


@dataclass(frozen=True, eq=False)
class RecordedNorms:
    """Gradient norms of a run, before clipping.

    Args:
        step: (T,) optimizer steps, from 1, int64.
        l1: (T,) sums of magnitudes, float64.
        l2: (T,) Euclidean norms, float64.
        optimizer: Class name of the optimizer that the run used.
        done_steps: Optimizer steps made when they were written, with those that an overflow left out; None
            where the file does not say.
        total_steps: Optimizer steps that the run was to make; None where the file does not say.
    """

    step: Tensor
    l1: Tensor
    l2: Tensor
    optimizer: str
    done_steps: int | None = None
    total_steps: int | None = None

    def of(self, norm: str) -> Tensor:
        """Return the norms "l1" or "l2"."""
        return self.l1 if norm == "l1" else self.l2

    def check_enough(self, place: str) -> None:
        """Check that they are enough to refine a schedule.

        Args:
            place: What the settings call them.

        Raises:
            ValueError: There are fewer than 8.
        """
        count = len(self.step)
        check(count >= FEWEST, "norms", place, f"of at least {FEWEST} updates", where=f"it holds {count}")

    @property
    def cut_short(self) -> str:
        """How many of the run's updates there are, where they are not all; else empty."""
        if self.done_steps is None or self.total_steps is None or self.done_steps >= self.total_steps:
            return ""
        return f"the norms of {self.done_steps} of {self.total_steps} updates"

    def check_whole(self, place: str, way_out: str) -> None:
        """Check that they are those of a whole run: the schedule of a part would be stretched over all.

        Args:
            place: What the settings call them.
            way_out: What to do instead of going on with the run.

        Raises:
            ValueError: The run had not come to its end when they were written.
        """
        rule = f"of a run that has come to its end (resume it, or {way_out})"
        check(not self.cut_short, "norms", place, rule, where=f"it holds {self.cut_short}")


def recorded_norms(run_dir: str | Path) -> RecordedNorms:
    """Read the norms that a run of `RefinedLinearDecayCallback` has recorded.

    Args:
        run_dir: The run's output folder.

    Raises:
        ValueError: The folder has none, they are damaged, or the run's batch has grown.
    """
    try:
        scalars, tensors = load_state(run_dir, FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"norms: {run_dir} holds no recorded gradient norms ({FILE}.json and .safetensors); train once "
            "with RefinedLinearDecayCallback(record=True)"
        ) from error
    shapes = {name: tuple(tensors[name].shape) for name in ("step", "l1", "l2") if name in tensors}
    whole_file = len(shapes) == 3 and len(set(shapes.values())) == 1 and "optimizer" in scalars
    check(
        whole_file,
        "norms",
        str(run_dir),
        "a folder with equally long step, l1 and l2",
        where=f"{FILE}: {shapes}",
    )
    every = torch.equal(tensors["step"], torch.arange(1, len(tensors["step"]) + 1))
    rule = "of a run that recorded from its first update on"
    check(every, "norms", str(run_dir), rule, where=f"{FILE}: steps {tensors['step'][:3].tolist()}, ...")
    grew = bool(scalars.get("batch_grew"))
    rule = "of a run whose updates are of one size: a schedule has them at equal times"
    check(not grew, "norms", str(run_dir), rule, where=f"{FILE}: its batch has grown")
    steps = {name: scalars.get(name) for name in ("done_steps", "total_steps")}
    return RecordedNorms(tensors["step"], tensors["l1"], tensors["l2"], str(scalars["optimizer"]), **steps)


@dataclass(frozen=True, eq=False)
class SavedSchedule:
    """What `hf-ext schedule refine` has written: a schedule, and what it was made from.

    Args:
        factors: (T,) multiples of the peak rate, float64.
        norm: "l1" or "l2".
        tau: Window of the median filter as a share of the recorded run.
        drop_zero: Whether the last update has a rate above 0.
        optimizer: Class name of the optimizer that the recorded run used.
    """

    factors: Tensor
    norm: str
    tau: float
    drop_zero: bool
    optimizer: str

    def differing(self, other: SavedSchedule) -> str:
        """Return the settings it was made with, as far as another's are different; else empty."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in ("norm", "tau", "drop_zero")}
        return ", ".join(
            f"{name}={own!r} (not {asked!r})" for name, (own, asked) in pairs.items() if own != asked
        )


def saved_schedule(path: str | Path) -> SavedSchedule:
    """Read a file that `hf-ext schedule refine` has written.

    Args:
        path: The file, which may have been moved or renamed.

    Raises:
        ValueError: There is none, or it does not hold a schedule.
    """
    try:
        content: Any = read_json(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(
            f"norms: there is no refined schedule {path}; hf-ext schedule refine writes one"
        ) from error
    found = cast(dict[str, Any], content) if isinstance(content, dict) else {}
    factors = found.get("factors")
    numbers = isinstance(factors, list) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in cast(list[Any], factors)
    )
    made_from = (
        found.get("norm") in ("l1", "l2")
        and isinstance(found.get("tau"), float)
        and isinstance(found.get("drop_zero"), bool)
        and isinstance(found.get("optimizer"), str)
    )
    table = torch.tensor(factors if numbers else [], dtype=torch.float64)
    good = made_from and len(table) >= FEWEST and bool((table >= 0.0).all()) and float(table.max()) > 0.0
    check(good, "norms", str(path), f"a file of hf-ext schedule refine, such as {SCHEDULE}")
    return SavedSchedule(table, found["norm"], found["tau"], found["drop_zero"], found["optimizer"])


def refuse_other(path: Path, schedule: SavedSchedule) -> None:
    """Refuse a schedule beside a file that says another: who has looked at the file expects what is in it.

    Args:
        path: A file of `hf-ext schedule refine`, in the folder that the norms were read from.
        schedule: The schedule made of them.

    Raises:
        ValueError: The file was made with other settings, or of other norms, or holds no schedule.
    """
    saved = saved_schedule(path)
    differing = saved.differing(schedule)
    if differing:
        raise ValueError(
            f"norms: {path} was made with {differing}: give norms={str(path)!r} to follow it, or refine with "
            "the settings that you want here"
        )
    same = len(saved.factors) == len(schedule.factors)
    if not same or not torch.allclose(saved.factors, schedule.factors, rtol=1e-6, atol=1e-9):
        raise ValueError(
            f"norms: {path} is not of the norms that its folder holds now: give norms={str(path)!r} to "
            "follow it, or refine again (hf-ext schedule refine)"
        )
