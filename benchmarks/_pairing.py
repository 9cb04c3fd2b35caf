"""Two training loops in turns within one process, a step each, and the ratios of their steps' times.

The loops run as they are, each in a thread that waits at the beginning of its steps until it has the turn, so
that one of them computes at a time. Turns go A B, B A, A B, ...: a drift of the machine's speed within a pair
falls on both, and who comes first does not decide. A step is the time from one step's beginning to the next
one's, and so holds the fetching of the next batch, callbacks and logs; the wait is not in it. Both loops are
given the same random state at each of their steps.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

# Seconds that a step may take before a loop is given up.
PATIENCE = 600.0


@dataclass(frozen=True)
class Step:
    """What a step has taken, in seconds.

    Args:
        wall: By the clock.
        process: Processor time of the process: other processes that take the processor do not count.
    """

    wall: float
    process: float


class Lane(TrainerCallback):
    """The callback by which a loop waits for its turn and is timed; it must be the first of its loop.

    Args:
        train: Given this callback and a number of steps, trains for so many with it.
        steps: Steps to time.
    """

    def __init__(self, train: Callable[[Lane, int], Any], steps: int) -> None:
        self.taken: list[Step] = []
        self._turn, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self._since: tuple[float, float] | None = None
        self._failed: BaseException | None = None
        self._number = 0

        def run() -> None:
            torch.set_num_threads(1)  # of this thread
            try:
                train(self, steps + 1)  # the last one has no next beginning
            except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
                self._failed = error
            self._arrived.release()

        self._thread = threading.Thread(target=run, daemon=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time, and wait."""
        if self._since is not None:
            wall, process = self._since
            self.taken.append(Step(time.perf_counter() - wall, time.process_time() - process))
        self._arrived.release()
        self._turn.acquire()
        torch.manual_seed(self._number)
        self._number += 1
        self._since = time.perf_counter(), time.process_time()

    def start(self) -> None:
        """Build the loop and go to the beginning of its first step."""
        self._thread.start()
        self._wait()

    def step(self) -> None:
        """Do one step."""
        self._turn.release()
        self._wait()

    def finish(self) -> None:
        """Let the loop end."""
        self._turn.release()
        self._wait()
        self._thread.join(PATIENCE)

    def _wait(self) -> None:
        if not self._arrived.acquire(timeout=PATIENCE):
            raise TimeoutError(f"a step has taken more than {PATIENCE:g} seconds")
        if self._failed is not None:
            raise self._failed


def in_turns(
    first: Callable[[Lane, int], Any], second: Callable[[Lane, int], Any], pairs: int, warm_up: int
) -> tuple[list[Step], list[Step]]:
    """Return the steps of two loops that were taken in turns.

    Args:
        first: Given its callback and a number of steps, trains for so many.
        second: As `first`.
        pairs: Pairs of steps to return.
        warm_up: Pairs before them.
    """
    lanes = [Lane(train, warm_up + pairs) for train in (first, second)]
    for lane in lanes:
        lane.start()
    for pair in range(warm_up + pairs):
        for lane in lanes if pair % 2 == 0 else reversed(lanes):
            lane.step()
    for lane in lanes:
        lane.finish()
    return lanes[0].taken[warm_up:], lanes[1].taken[warm_up:]


def summary(ratios: Sequence[float], draws: int = 4000) -> dict[str, float]:
    """Return the median of paired ratios, their quartiles and a 95 % bootstrap interval of the median.

    Args:
        ratios: At least two.
        draws: Resamples of the bootstrap (percentile method), with a fixed seed.
    """
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    stream = random.Random(0)
    medians = sorted(statistics.median(stream.choices(ratios, k=len(ratios))) for _ in range(draws))
    edges = {"low": medians[int(0.025 * draws)], "high": medians[int(0.975 * draws) - 1]}
    return {"ratio": middle, "ratio_q1": low, "ratio_q3": high, **{f"ratio_{k}": v for k, v in edges.items()}}


def compared(plain: Sequence[Step], other: Sequence[Step]) -> dict[str, float]:
    """Return the figures of a comparison, by wall time and, with the prefix `process_`, by processor time.

    Args:
        plain: Steps of the loop that is divided by.
        other: Steps of the other loop, pair by pair.
    """
    found = {"pairs": float(len(plain)), "seconds": statistics.median(step.wall for step in other)}
    for prefix, kind in (("", "wall"), ("process_", "process")):
        ratios = [getattr(b, kind) / getattr(a, kind) for a, b in zip(plain, other, strict=True)]
        found |= {prefix + name: value for name, value in summary(ratios).items()}
    return found


COLUMNS = (
    *("seconds", "ratio", "ratio_low", "ratio_high", "ratio_q1", "ratio_q3"),
    *("process_ratio", "process_ratio_low", "process_ratio_high"),
)
HEADS = (
    *("seconds", "median ratio", "95 % from", "to", "lower quartile", "upper"),
    *("of processor time", "95 % from", "to"),
)


def decides(figures: dict[str, float], bar: float) -> str:
    """Return on which side of a bar the interval of processor time's ratio is: "below", "above" or "open"."""
    if figures["process_ratio_high"] <= bar:
        return "below"
    return "above" if figures["process_ratio_low"] > bar else "open"
