"""Where candidates are scored: in this process, or by Ray actors that each hold the checkpoints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from ..core.checks import require

_RESTARTS = 3  # of an actor, and for a candidate


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

    The cluster is the one that Ray is connected to or that RAY_ADDRESS names, or a local one that is stopped
    at the end. Scores come back in the order of the candidates, and actors compute with as many threads as
    this process, so that results do not depend on how many actors there are or which is faster. An actor
    whose process dies is started again, and scores again what it had not yet scored.

    Args:
        build: Makes a scorer; sent to every actor.
        count: Number of actors.

    Raises:
        ImportError: Ray is not installed; the text holds the install command.
    """

    def __init__(self, build: Callable[[], Scorer], count: int) -> None:
        self._ray: Any = require("ray", extra="tune")
        self._actors: list[Any] = []
        self._started = not self._ray.is_initialized()
        if self._started:
            self._ray.init()
        try:
            actor = self._ray.remote(_Actor).options(max_restarts=_RESTARTS, max_task_retries=_RESTARTS)
            # Held here, for actors that start again; in a list, it is not unpacked before they ask for it.
            self._boxed = [self._ray.put(build)]
            path = [os.path.abspath(one) for one in sys.path]
            self._actors = [actor.remote(path, torch.get_num_threads()) for _ in range(count)]
        except BaseException:
            self.close()
            raise

    def scores(self, candidates: Sequence[Sequence[float]]) -> Iterator[float]:
        """Yield the scores in the order of the candidates.

        Raises:
            RuntimeError: An actor could not be started, or has died too often.
            Exception: What the metric has raised in an actor.
        """
        waiting = [
            self._actors[number % len(self._actors)].score.remote(self._boxed, list(candidate))
            for number, candidate in enumerate(candidates)
        ]
        for future in waiting:
            yield self._score(future)

    def _score(self, future: Any) -> float:
        try:
            return float(self._ray.get(future))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise
        except self._ray.exceptions.RayActorError as error:
            text = f"a Ray worker could not be started, or has died more than {_RESTARTS} times: {error}"
            raise RuntimeError(text) from error

    def close(self) -> None:
        """End the actors, and the local cluster if this has started it."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()


class _Actor:
    def __init__(self, path: Sequence[str], threads: int) -> None:
        # What the scorer is made of must be found before it can be unpacked.
        sys.path.extend(one for one in path if one not in sys.path)
        torch.set_num_threads(threads)
        self._scorer: Scorer | None = None

    def score(self, boxed: Sequence[Any], coefficients: Sequence[float]) -> float:
        if self._scorer is None:
            self._scorer = require("ray", extra="tune").get(boxed[0])()
        assert self._scorer is not None
        return self._scorer.score(coefficients)
