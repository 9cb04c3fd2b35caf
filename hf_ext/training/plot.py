"""Plots of losses: those of a run, and of the methods of a comparison."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.checks import require

Log = Sequence[Mapping[str, Any]]


def loss_points(log_history: Log, key: str) -> list[tuple[int, float]]:
    """Return (optimizer step, value) of one key of a trainer's log, in order."""
    return [
        (int(entry["step"]), float(entry[key])) for entry in log_history if key in entry and "step" in entry
    ]


def loss_plot(log_history: Log, title: str, unit: str = " (nats per token)") -> bytes:
    """Return a PNG of the training and held-out losses over the optimizer steps.

    Args:
        log_history: The trainer's logs.
        title: Of the figure.
        unit: Of the loss, as the axis shows it.

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
    axes.set_ylabel(f"loss{unit}")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return _png(figure)


@dataclass(frozen=True)
class Band:
    """One method's losses over the steps.

    Args:
        label: Its entry in the legend.
        name: What its color goes by, alike in all panels.
        steps: Evaluated optimizer steps.
        mean: Mean loss over the seeds at each of them, nats per token.
        min: The lowest of the seeds.
        max: The highest of the seeds.
    """

    label: str
    name: str
    steps: Sequence[int]
    mean: Sequence[float]
    min: Sequence[float]
    max: Sequence[float]


def comparison_plot(panels: Mapping[str, Sequence[Band]], title: str, names: Sequence[str]) -> bytes:
    """Return a PNG with one panel of held-out losses for each title: mean lines, and bands over the seeds.

    Args:
        panels: Methods by the panel's title.
        title: Of the whole figure.
        names: All methods, in the order of their colors.

    Raises:
        ImportError: matplotlib is not installed; the text holds the install command.
    """
    require("matplotlib", extra="plot")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(panels) + 1.6, 4.8), layout="constrained")
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    color_of = {name: palette(index % palette.N) for index, name in enumerate(names)}
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (caption, bands) in zip(every, panels.items(), strict=True):
        for band in bands:
            color = color_of[band.name]
            axes.plot(band.steps, band.mean, label=band.label, color=color)
            axes.fill_between(band.steps, band.min, band.max, alpha=0.2, color=color, linewidth=0.0)
        axes.set(xlabel="optimizer step", title=caption)
        axes.grid(alpha=0.3)
        if bands:
            axes.legend(fontsize="small")
    every[0].set_ylabel("held-out loss (nats per token)")
    figure.suptitle(title)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
