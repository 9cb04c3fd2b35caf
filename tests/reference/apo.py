"""Accelerated preference optimization on a table of probabilities, from the paper's equations."""

from __future__ import annotations

from torch import Tensor


def iterated_policies(
    reward: Tensor, reference: Tensor, alpha: float, rounds: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the trained and the extrapolated policies of each round, with exact inner solutions, beta = 1.

    Args:
        reward: (A,) of each action.
        reference: (A,) probabilities that the run begins with.
        alpha: Extrapolation coefficient.
        rounds: Number of rounds.
    """
    policy, previous = reference, reference
    hats: list[Tensor] = []
    policies: list[Tensor] = []
    for _ in range(rounds):
        # The DPO solution with the round's policy as its reference: pi_hat ~ pi_t exp(r).
        hat = policy * reward.exp()
        hat = hat / hat.sum()
        # pi_{t+1} ~ pi_hat_{t+1} (pi_hat_{t+1} / pi_hat_t)^alpha
        policy = hat * (hat / previous) ** alpha
        policy = policy / policy.sum()
        previous = hat
        hats.append(hat)
        policies.append(policy)
    return hats, policies


def momentum_increments(alpha: float, rounds: int) -> list[float]:
    """Return d_1 ... d_T of d_{t+1} = 1 + alpha d_t, d_0 = 0."""
    found: list[float] = []
    for _ in range(rounds):
        found.append(1 + alpha * (found[-1] if found else 0.0))
    return found
