"""The annealing law with every variable of the paper: areas by plain loops, the fit by torch's L-BFGS."""

from __future__ import annotations

from itertools import pairwise

import torch


def momentum(eta: list[float], lam: float) -> list[float]:
    """Return m_1 = 0, m_i = lam m_{i-1} + (eta_{i-1} - eta_i)."""
    m = [0.0]
    for before, now in pairwise(eta):
        m.append(lam * m[-1] + (before - now))
    return m


def areas(eta: list[float], lam: float) -> tuple[list[float], list[float]]:
    """Return S1 and S2 after each update."""
    s1, s2, forward, annealing = [], [], 0.0, 0.0
    for rate, m in zip(eta, momentum(eta, lam), strict=True):
        forward += rate
        annealing += m
        s1.append(forward)
        s2.append(annealing)
    return s1, s2


def loss(s1: float, s2: float, *, L0: float, A: float, C: float, alpha: float) -> float:
    """Return L0 + A S1^-alpha - C S2."""
    return L0 + A * s1**-alpha - C * s2


def objective(
    law: tuple[float, ...], s1: list[float], s2: list[float], losses: list[float], delta: float
) -> float:
    """Return the mean Huber loss of log residuals of a law (L0, A, C, alpha)."""
    fitted = torch.tensor(
        [loss(x, y, L0=law[0], A=law[1], C=law[2], alpha=law[3]) for x, y in zip(s1, s2, strict=True)],
        dtype=torch.float64,
    )
    target = torch.tensor(losses, dtype=torch.float64)
    return float(torch.nn.functional.huber_loss(fitted.log(), target.log(), delta=delta))


def fit(
    start: tuple[float, ...], s1: list[float], s2: list[float], losses: list[float], delta: float
) -> tuple[float, ...]:
    """Minimise the objective by L-BFGS over the logarithms of (L0, A, C, alpha), from a start."""
    x, y, target = (torch.tensor(values, dtype=torch.float64) for values in (s1, s2, losses))
    logs = torch.tensor(start, dtype=torch.float64).log().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [logs],
        max_iter=500,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        l0, a, c, alpha = logs.exp()
        residual = (l0 + a * x**-alpha - c * y).log() - target.log()
        value = 1e6 * torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), delta=delta)
        value.backward()
        return value

    optimizer.step(closure)
    return tuple(logs.detach().exp().tolist())
