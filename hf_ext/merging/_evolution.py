"""The evolutionary search over coefficients of sum one: pure numbers, the same for the same seed and scores.

What is proposed depends on the seed, the number of the proposal and the scores before it, so that a search
is gone on with by giving it the scores that it had.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Coefficients: TypeAlias = tuple[float, ...]
# Scores of several candidates, in their order; lower is better.
Scores: TypeAlias = Callable[[Sequence[Coefficients]], Iterator[float]]


@dataclass(frozen=True)
class Member:
    """A candidate that has been evaluated.

    Args:
        coefficients: One for each checkpoint, of sum one.
        score: Lower is better.
    """

    coefficients: Coefficients
    score: float


@dataclass(frozen=True)
class Evolution:
    """Settings of the search.

    Args:
        population: Members that are kept.
        parents: How many of the best may have children.
        iterations: Children.
        sigma: Standard deviation of the noise on each coefficient but the first.
        ema_rates: Rates of the averages that the search starts from.
        max_l2: Bound of the norm of all coefficients but the first.
        generation: Children that are proposed before their scores are known.
        seed: Of parents, crossover and noise.
    """

    population: int
    parents: int
    iterations: int
    sigma: float
    ema_rates: Sequence[float]
    max_l2: float
    generation: int
    seed: int

    def run(self, count: int, scores: Scores) -> tuple[list[Member], dict[str, Member], list[float]]:
        """Search.

        Args:
            count: Number of checkpoints.
            scores: Evaluates candidates.

        Returns:
            The last population from the best on, the members of the start by name, and the best score after
            each evaluation.
        """
        known: dict[Coefficients, float] = {}
        best: list[float] = []

        def evaluated(candidates: Sequence[Coefficients]) -> list[Member]:
            new: dict[Coefficients, Coefficients] = {}
            for candidate in candidates:
                if _rounded(candidate) not in known:
                    new.setdefault(_rounded(candidate), candidate)
            for key, score in zip(new, scores(list(new.values())), strict=True):
                known[key] = score
                best.append(min(score, best[-1]) if best else score)
            return [Member(new[key], known[key]) for key in new]

        named = starts(count, self.ema_rates)
        start = dict(zip(named, evaluated(list(named.values())), strict=True))
        members = sorted(start.values(), key=lambda member: member.score)[: self.population]
        for first in range(0, self.iterations, self.generation):
            numbers = range(first, min(first + self.generation, self.iterations))
            children = evaluated([self.child(members, number) for number in numbers])
            members = sorted([*members, *children], key=lambda member: member.score)[: self.population]
        return members, start, best

    def child(self, members: Sequence[Member], number: int) -> Coefficients:
        """Return proposal `number` from members that are sorted by their score."""
        draw = random.Random(f"{self.seed}/{number}")
        pool = members[: self.parents]
        one, other = draw.sample(pool, 2) if len(pool) > 1 else (pool[0], pool[0])
        pairs = list(zip(one.coefficients[1:], other.coefficients[1:], strict=True))
        if draw.random() < 0.5:
            free = [(a + b) / 2.0 for a, b in pairs]
        else:
            free = [a if draw.random() < 0.5 else b for a, b in pairs]
        free = [value + draw.gauss(0.0, self.sigma) for value in free]
        norm = math.hypot(*free)
        if norm > self.max_l2:
            free = [value * self.max_l2 / norm for value in free]
        return (1.0 - math.fsum(free), *free)


def starts(count: int, rates: Sequence[float]) -> dict[str, Coefficients]:
    """Return the combinations that a search starts from by name, each once.

    They are the last checkpoint, the uniform average, and exponential averages, whose weight falls by a rate
    with each checkpoint before the last.

    Args:
        count: Number of checkpoints.
        rates: In [0, 1].
    """
    found: dict[str, Coefficients] = {}
    for name, rate in (("last", 0.0), ("uniform", 1.0), *((f"ema {rate:g}", rate) for rate in rates)):
        powers = [rate ** (count - 1 - index) for index in range(count)]
        total = math.fsum(powers)
        coefficients = tuple(power / total for power in powers)
        if _rounded(coefficients) not in map(_rounded, found.values()):
            found[name] = coefficients
    return found


def _rounded(coefficients: Coefficients) -> Coefficients:
    return tuple(round(value, 6) + 0.0 for value in coefficients)  # + 0.0: no negative zero
