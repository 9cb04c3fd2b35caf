"""The loss plot of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.checks import require

Log = Sequence[Mapping[str, Any]]


def loss_points(log_history: Log, key: str) -> list[tuple[int, float]]:
    """Return (optimizer step, value) of one key of a trainer's log, in order."""
    return [
        (int(entry["step"]), float(entry[key])) for entry in log_history if key in entry and "step" in entry
    ]


def loss_plot(log_history: Log, title: str) -> bytes:
    """Return a PNG of the training and held-out losses over the optimizer steps.

    Raises:
        ImportError: matplotlib is not installed; the text holds the install command.
    """
    require("matplotlib", extra="plot")
    # Not through pyplot: its state is global, and it would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o--")):
        points = loss_points(log_history, key)
        if points:
            axes.plot([step for step, _ in points], [value for _, value in points], style, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
