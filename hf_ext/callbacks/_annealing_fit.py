"""Mathematics of the annealing law: areas under a schedule, the fit of the law's numbers, their spread.

A law is a tensor (..., 4) of L0, A, C and alpha in units of the fitted rates: L = L0 + A x^-alpha - C y, with
x the forward area and y the annealing area. Without annealing in the data C is 0 and not fitted.

The fit minimises the sum of Huber_delta(log L_fit - log L) over log L0, log A, log alpha and log C by
Levenberg-Marquardt with Huber's weights. It works on a batch: all the starts of a fit, and all the refits of
a bootstrap, which a loop over `torch.optim.LBFGS` would take seconds for, are one call of milliseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # steps of one matrix product in the recurrence
SMALLEST = 1e-4  # what a start that is not positive is raised to
ITERATIONS, SETTLED = 400, 1e-10  # a step that gains less than this share of the objective is the last
# A refit starts from the fit and need not know its own numbers better than their spread.
REFIT_ITERATIONS, REFIT_SETTLED = 50, 1e-5
STIFF = 1e6  # damping at which not even a step of a millionth is a gain


def annealing_momentum(rates: Tensor, lam: float) -> Tensor:
    """Return m with m_1 = 0 and m_i = lam m_{i-1} + (rate_{i-1} - rate_i).

    Blocks are products with the powers of lam within a block; between blocks one number is carried. A closed
    form over the whole run would divide by powers of lam that are 0 in floating point.

    Args:
        rates: (T,) learning rates, float64, T at least 1.
        lam: Decay, in [0, 1].

    Returns:
        (T,), float64.
    """
    falls = torch.zeros_like(rates)
    falls[1:] = rates[:-1] - rates[1:]
    count = len(falls)
    size = min(BLOCK, count)
    blocks = torch.nn.functional.pad(falls, (0, -count % size)).reshape(-1, size)
    # A negative power of a small decay is inf, and inf times 0 is no 0.
    lag = torch.arange(size)[:, None] - torch.arange(size)[None, :]
    powers = torch.tensor(lam, dtype=rates.dtype) ** lag.clamp_min(0)
    within = blocks @ (powers * (lag >= 0)).T  # (blocks, size)
    carried, decay = [0.0], lam**size
    for last in within[:, -1].tolist()[:-1]:
        carried.append(decay * carried[-1] + last)
    reach = torch.tensor(lam, dtype=rates.dtype) ** torch.arange(1, size + 1)
    return (within + torch.tensor(carried, dtype=rates.dtype)[:, None] * reach).flatten()[:count]


def areas(rates: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Return the forward area S1 and the annealing area S2 after each update, (T,) each."""
    return rates.cumsum(0), annealing_momentum(rates, lam).cumsum(0)


def rising_steps(rates: Tensor) -> int:
    """Return how many updates a schedule rises for before its first one that is not below the next."""
    still = (rates[1:] <= rates[:-1]).nonzero()
    return int(still[0, 0]) if len(still) else max(0, len(rates) - 1)


def without_warmup(rates: Tensor, warmup_steps: int | None) -> Tensor:
    """Return rates with those of the warm-up at the rate that it rises to; None finds it."""
    steps = rising_steps(rates) if warmup_steps is None else warmup_steps
    if not steps:
        return rates
    filled = rates.clone()
    filled[:steps] = rates[min(steps, len(rates) - 1)]
    return filled


def law_loss(law: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of laws (..., 4) at areas (n,), shape (..., n)."""
    l0, a, c, alpha = law[..., None].unbind(-2)
    return l0 + a * x**-alpha - c * y


def fit_law(x: Tensor, y: Tensor, losses: Tensor, *, delta: float, anneals: bool) -> tuple[Tensor, float]:
    """Return the law that fits points best, and its objective.

    Starts are the weighted linear least squares solutions for alpha = 0.05, 0.10, ..., 1.20.

    Args:
        x: (n,) forward areas, above 0.
        y: (n,) annealing areas.
        losses: (n,) losses, above 0.
        delta: Threshold of the Huber loss, in log loss.
        anneals: Whether to fit C.

    Returns:
        The law (4,) and the mean Huber loss of its log residuals.
    """
    alphas = torch.arange(0.05, 1.2001, 0.05, dtype=torch.float64)
    columns = [torch.ones_like(x).expand(len(alphas), -1), x ** -alphas[:, None]]
    columns += [-y.expand(len(alphas), -1)] if anneals else []
    design = torch.stack(columns, dim=-1) / losses[:, None]  # (24, n, 2 or 3), weighted to relative errors
    # The driver that copes with columns that are multiples of one another.
    target = torch.ones_like(losses).expand(len(alphas), -1)[..., None]
    found = torch.linalg.lstsq(design, target, driver="gelsd").solution[..., 0]
    found = found.clamp_min(SMALLEST)
    c = found[:, 2] if anneals else torch.zeros_like(alphas)
    starts = torch.stack([found[:, 0], found[:, 1], c, alphas], dim=-1)
    laws, objective = polish(starts, x, y, losses.expand(len(alphas), -1), delta=delta, anneals=anneals)
    best = int(objective.argmin())
    return laws[best], float(objective[best])


def polish(
    starts: Tensor,
    x: Tensor,
    y: Tensor,
    losses: Tensor,
    *,
    delta: float,
    anneals: bool,
    iterations: int = ITERATIONS,
    settled: float = SETTLED,
) -> tuple[Tensor, Tensor]:
    """Minimise the Huber loss of the log residuals from each start.

    Args:
        starts: (B, 4) laws.
        x: (n,) forward areas.
        y: (n,) annealing areas.
        losses: (B, n) losses, one series for each start.
        delta: Threshold of the Huber loss.
        anneals: Whether C is fitted.
        iterations: Steps at most.
        settled: Share of the objective; a step that gains less is the last.

    Returns:
        Laws (B, 4) and mean Huber losses (B,).
    """
    free = [0, 1, 2, 3] if anneals else [0, 1, 3]
    law, target = starts.clone(), losses.log()
    value = _objective(law, x, y, target, delta)
    damping = torch.full_like(value, 1e-3)
    done = torch.zeros_like(value, dtype=torch.bool)
    eye = torch.eye(len(free), dtype=law.dtype)
    for _ in range(iterations):
        fitted = law_loss(law, x, y)
        residual = fitted.log() - target
        power = law[:, 1:2] * x ** -law[:, 3:4]
        parts = [
            law[:, :1].expand_as(power),
            power,
            -law[:, 2:3] * y,
            -law[:, 3:4] * x.log() * power,
        ]
        jacobian = torch.stack([parts[i] for i in free], dim=-1) / fitted[..., None]  # (B, n, free)
        weight = delta / residual.abs().clamp_min(delta)
        weighted = jacobian * weight[..., None]
        gradient = (weighted * residual[..., None]).sum(1)
        hessian = weighted.transpose(1, 2) @ jacobian
        scale = hessian.diagonal(dim1=1, dim2=2)
        damped = hessian + (damping[:, None] * scale + 1e-30)[..., None] * eye
        step = torch.linalg.solve_ex(damped, gradient).result.nan_to_num(0.0).clamp(-1.0, 1.0)
        new = law.clone()
        new[:, free] = law[:, free] * (-step).exp()
        new_value = _objective(new, x, y, target, delta)
        better = new_value < value
        done |= torch.where(better, value - new_value <= settled * value, damping >= STIFF)
        law = torch.where(better[:, None], new, law)
        value = torch.where(better, new_value, value)
        damping = torch.where(better, damping / 5, damping * 8).clamp_min(1e-12)
        if bool(done.all()):
            break
    return law, value


def _objective(law: Tensor, x: Tensor, y: Tensor, target: Tensor, delta: float) -> Tensor:
    fitted = law_loss(law, x, y)
    size = (fitted.clamp_min(1e-300).log() - target).abs()
    huber = torch.where(size <= delta, size.square() / 2, delta * (size - delta / 2)).mean(-1)
    # A law is one of losses above 0 at all points.
    return torch.where((fitted > 0).all(-1), huber, torch.inf).nan_to_num(torch.inf, torch.inf)


def bootstrap_laws(
    law: Tensor,
    x: Tensor,
    y: Tensor,
    losses: Tensor,
    curves: list[int],
    *,
    delta: float,
    anneals: bool,
    resamples: int,
) -> tuple[Tensor, Tensor]:
    """Refit the law to its own curves plus residuals that are drawn in blocks of 5 % of a curve.

    Args:
        law: (4,) the fit.
        x: (n,) forward areas, curve after curve.
        y: (n,) annealing areas.
        losses: (n,) losses.
        curves: Points of each curve; they add to n.
        delta: Threshold of the Huber loss.
        anneals: Whether C was fitted.
        resamples: B, refits.

    Returns:
        Laws (B, 4), and one drawn residual of the log loss for each (B,).
    """
    fitted = law_loss(law, x, y).log()
    free = 4 if anneals else 3
    # What the fit has taken out of the residuals.
    scale = (len(x) / max(1, len(x) - free)) ** 0.5
    residual = (losses.log() - fitted) * scale
    generator = torch.Generator().manual_seed(0)
    drawn: list[Tensor] = []
    for part in residual.split(curves):
        size = max(1, round(0.05 * len(part)))
        blocks = part.unfold(0, size, 1)  # (n - size + 1, size)
        chosen = torch.randint(len(blocks), (resamples, -(-len(part) // size)), generator=generator)
        drawn.append(blocks[chosen].flatten(1)[:, : len(part)])
    series = (fitted + torch.cat(drawn, dim=1)).exp()
    laws, _ = polish(
        law.expand(resamples, -1),
        x,
        y,
        series,
        delta=delta,
        anneals=anneals,
        iterations=REFIT_ITERATIONS,
        settled=REFIT_SETTLED,
    )
    picked = torch.randint(len(residual), (resamples,), generator=generator)
    return laws, residual[picked]
