"""A refined schedule in two numbers, to carry to a run of another length; see `refined_linear_decay`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check

LOW, HIGH = 0.01, 100.0  # powers that are looked at
GRID = 400  # starts of the search; the sum of squares need not have one valley
HALVINGS = 60  # each leaves 0.62 of the interval


@dataclass(frozen=True)
class PolynomialDecay:
    """A linear warm-up to 1, then (1 - (t - t_w) / (T - t_w))^power with t_w the updates of the warm-up.

    transformers has the same curve: `lr_scheduler_type="polynomial"` with `lr_scheduler_kwargs={"power": ...,
    "lr_end": 0.0}` and `warmup_steps` the warm-up's share of the run.

    Args:
        warmup: Share of the run before the peak, in [0, 1).
        power: Exponent, in [0.01, 100]; None where the peak is so late that nothing after it tells.
        rms_error: Root mean square of what the form and the schedule differ by, over the whole run and in
            shares of the peak; None without a power.
    """

    warmup: float
    power: float | None
    rms_error: float | None


def polynomial_decay(factors: Tensor | Sequence[float], *, drop_zero: bool = True) -> PolynomialDecay:
    """Return the polynomial decay that is nearest to a schedule after its peak, by least squares.

    Args:
        factors: (T,) rates of updates 1 to T, at least 0; only their ratios matter.
        drop_zero: Whether the rate that would be 0 is the one after the last update, as in
            `refined_schedule`.

    Raises:
        ValueError: A rate is negative or not finite, or all are 0.
    """
    rates = torch.as_tensor(factors, dtype=torch.float64)
    check(rates.ndim == 1 and len(rates) >= 2, "factors", tuple(rates.shape), "a series of at least 2 rates")
    good = bool((rates.isfinite() & (rates >= 0.0)).all()) and float(rates.max()) > 0.0
    check(good, "factors", "others", "finite, at least 0, and above 0 in some update")
    rates = rates / rates.max()
    count, peak = len(rates), int(rates.argmax())
    end = count if drop_zero else count - 1
    left = 1.0 - (torch.arange(peak, count, dtype=torch.float64) - peak) / max(1, end - peak)
    after = rates[peak:]
    inner = (left > 0.0) & (left < 1.0)
    if not bool(inner.any()):
        return PolynomialDecay(peak / count, None, None)
    power = _best_power(left[inner], after[inner])
    rise = torch.arange(peak, dtype=torch.float64) / max(1, peak)
    fitted = torch.cat([rise, left**power])
    return PolynomialDecay(peak / count, power, float((fitted - rates).square().mean().sqrt()))


def _best_power(left: Tensor, rates: Tensor) -> float:
    """Return the power in [LOW, HIGH] with the least sum of (left^power - rate)^2."""

    def missed(logs: Tensor) -> Tensor:
        return (left ** logs.exp()[:, None] - rates).square().sum(1)

    grid = torch.linspace(math.log(LOW), math.log(HIGH), GRID, dtype=torch.float64)
    best = int(missed(grid).argmin())
    low, high = float(grid[max(0, best - 1)]), float(grid[min(GRID - 1, best + 1)])
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(HALVINGS):
        width = golden * (high - low)
        a, b = high - width, low + width
        of_a, of_b = missed(torch.tensor([a, b], dtype=torch.float64)).tolist()
        low, high = (low, b) if of_a < of_b else (a, high)
    return math.exp((low + high) / 2.0)
