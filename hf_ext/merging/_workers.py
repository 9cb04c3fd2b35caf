"""Where candidates are scored: in this process, or by Ray actors that each hold the checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from ..core.checks import require


class Scorer(Protocol):
    """What scores a candidate: `score(coefficients) -> float`, lower is better."""

    def score(self, coefficients: Sequence[float]) -> float:
        """Return the score."""
        ...


class InProcess:
    """Scores candidates one after another.

    Args:
        build: Makes the scorer.
    """

    def __init__(self, build: Callable[[], Scorer]) -> None:
        self._scorer = build()

    def scores(self, candidates: Sequence[Sequence[float]]) -> Iterator[float]:
        """Yield the scores in the order of the candidates."""
        for candidate in candidates:
            yield self._scorer.score(candidate)

    def close(self) -> None:
        """Nothing is held."""


class RayActors:
    """Scores candidates by actors, each with the model and the checkpoints in its own memory.

    The cluster is the one that Ray is connected to, or a local one that is stopped at the end. Scores come
    back in the order of the candidates, so that results do not depend on which actor is faster.

    Args:
        build: Makes a scorer; sent to every actor.
        count: Number of actors.

    Raises:
        ImportError: Ray is not installed; the text holds the install command.
    """

    def __init__(self, build: Callable[[], Scorer], count: int) -> None:
        self._ray: Any = require("ray", extra="tune")
        self._started = not self._ray.is_initialized()
        if self._started:
            self._ray.init()
        actor = self._ray.remote(_Actor)
        self._actors = [actor.remote(build) for _ in range(count)]

    def scores(self, candidates: Sequence[Sequence[float]]) -> Iterator[float]:
        """Yield the scores in the order of the candidates."""
        waiting = [
            self._actors[number % len(self._actors)].score.remote(list(candidate))
            for number, candidate in enumerate(candidates)
        ]
        for future in waiting:
            yield float(self._ray.get(future))

    def close(self) -> None:
        """End the actors, and the local cluster if this has started it."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()


class _Actor:
    def __init__(self, build: Callable[[], Scorer]) -> None:
        self._scorer = build()

    def score(self, coefficients: Sequence[float]) -> float:
        return self._scorer.score(coefficients)
