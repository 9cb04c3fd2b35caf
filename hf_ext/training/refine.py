"""`hf-ext schedule refine`: the refined schedule of a recorded run, as numbers and as a plot."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

from ..callbacks.refined_linear_decay import norm_for, recorded_norms, refined_schedule
from ..core.checks import check_choice, require
from ..core.files import write_bytes, write_json

NAME = "refined_schedule"


def refine_run(
    run_dir: str | Path, *, norm: str = "auto", tau: float = 0.1, drop_zero: bool = True
) -> list[Path]:
    """Write `refined_schedule.json` and, with matplotlib, `refined_schedule.png` into a run's folder.

    The JSON file holds the multiples of the peak rate (`factors`), one for each update, and what they were
    made from. A later run takes the folder: `RefinedLinearDecayCallback(mode="refined", norms=run_dir)`.

    Args:
        run_dir: Output folder of a run that recorded its gradient norms.
        norm: "l1", "l2", or "auto" for what suits the run's optimizer.
        tau: Window of the median filter as a share of the run, in (0, 0.5].
        drop_zero: Whether the last update keeps a rate above 0.

    Returns:
        The files written.

    Raises:
        ValueError: The folder has no recorded norms, they are damaged, or a setting is out of range.
        OSError: The folder cannot be written.
    """
    check_choice("norm", norm, ("auto", "l1", "l2"))
    recorded = recorded_norms(run_dir)
    norm = norm_for(recorded.optimizer) if norm == "auto" else norm
    factors = refined_schedule(recorded.of(norm), norm=norm, tau=tau, drop_zero=drop_zero).tolist()
    path = Path(run_dir) / f"{NAME}.json"
    settings = {"norm": norm, "tau": tau, "drop_zero": drop_zero, "optimizer": recorded.optimizer}
    write_json(path, {**settings, "factors": factors})
    if find_spec("matplotlib") is None:
        return [path]
    plot = path.with_suffix(".png")
    write_bytes(plot, _plot(recorded.of(norm).tolist(), factors, norm))
    return [path, plot]


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
