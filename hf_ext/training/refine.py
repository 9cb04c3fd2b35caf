"""`hf-ext schedule refine`: the refined schedule of a recorded run, as numbers and as a plot."""

from __future__ import annotations

import dataclasses
import io
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..callbacks._recorded_norms import SCHEDULE, norm_for
from ..callbacks.refined_linear_decay import (
    PolynomialDecay,
    polynomial_decay,
    recorded_norms,
    refined_schedule,
)
from ..core.checks import check_choice, require
from ..core.files import write_bytes, write_json

NO_PLOT = "no plot without matplotlib: pip install 'hf-ext[plot]'"


@dataclass(frozen=True)
class Refinement:
    """What was made of a run's norms.

    Args:
        polynomial: The schedule in two numbers.
        files: The files written.
        notes: What to mind.
    """

    polynomial: PolynomialDecay
    files: list[Path]
    notes: list[str]

    def summary(self) -> str:
        """Return the two numbers as a line."""
        found = self.polynomial
        if found.power is None:
            return f"nearest polynomial decay: none, the peak is at {found.warmup:.3g} of the run"
        return (
            f"nearest polynomial decay: warm-up over {found.warmup:.3g} of the run, power {found.power:.3g} "
            f"(rms error {found.rms_error:.2g} of the peak)"
        )


def refine_run(
    run_dir: str | Path,
    *,
    norm: str = "auto",
    tau: float = 0.1,
    drop_zero: bool = True,
    allow_partial: bool = False,
) -> Refinement:
    """Write `refined_schedule.json` and, with matplotlib, `refined_schedule.png` into a run's folder.

    The JSON file holds the multiples of the peak rate (`factors`), one for each update, what they were made
    from, and the nearest polynomial decay (`polynomial`), which can be carried to another run length. A later
    run takes the file: `RefinedLinearDecayCallback(mode="refined", norms="run_dir/refined_schedule.json")`.

    Args:
        run_dir: Output folder of a run that recorded its gradient norms.
        norm: "l1", "l2", or "auto" for what suits the run's optimizer.
        tau: Window of the median filter as a share of the run, in (0, 0.5].
        drop_zero: Whether the last update keeps a rate above 0.
        allow_partial: Whether to take the norms of a run that had not come to its end.

    Raises:
        ValueError: The folder has no recorded norms, they are damaged, fewer than 8 or not of a whole run, or
            a setting is out of range.
        OSError: The folder cannot be written.
    """
    check_choice("norm", norm, ("auto", "l1", "l2"))
    recorded = recorded_norms(run_dir)
    recorded.check_enough(str(run_dir))
    if not allow_partial:
        recorded.check_whole(str(run_dir), "give --allow-partial")
    notes = [f"made of {recorded.cut_short} alone"] if recorded.cut_short else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        norm = norm_for(recorded.optimizer) if norm == "auto" else norm
    notes += [str(entry.message) for entry in caught]
    factors = refined_schedule(recorded.of(norm), norm=norm, tau=tau, drop_zero=drop_zero).tolist()
    polynomial = polynomial_decay(factors, drop_zero=drop_zero)
    path = Path(run_dir) / SCHEDULE
    settings = {"norm": norm, "tau": tau, "drop_zero": drop_zero, "optimizer": recorded.optimizer}
    write_json(path, {**settings, "polynomial": dataclasses.asdict(polynomial), "factors": factors})
    if find_spec("matplotlib") is None:
        return Refinement(polynomial, [path], [*notes, NO_PLOT])
    plot = path.with_suffix(".png")
    write_bytes(plot, _plot(recorded.of(norm).tolist(), factors, norm))
    return Refinement(polynomial, [path, plot], notes)


def _plot(norms: list[float], factors: list[float], norm: str) -> bytes:
    require("matplotlib", extra="plot")
    # Not through pyplot: its state is global, and it would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(factors) + 1)
    above.plot(steps, norms)
    above.set_ylabel(f"{norm} norm of the gradient")
    below.plot(steps, factors, label="refined")
    below.plot(steps, [1.0 - (step - 1) / len(factors) for step in steps], "--", label="linear decay")
    below.set_xlabel("optimizer step")
    below.set_ylabel("learning rate over its peak")
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
