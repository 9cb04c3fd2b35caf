"""Two training loops in turns within one process, a step each, and the ratios of their steps' times.

The loops run as they are, each in a thread that waits at the beginning of its steps until it has the turn, so
that one of them computes at a time. Turns go A B, B A, A B, ...: a drift of the machine's speed within a pair
falls on both, and who comes first does not decide. A step is the time from one step's beginning to the next
one's, and so holds the fetching of the next batch, callbacks and logs; the wait is not in it. Both loops are
given the same random state at each of their steps.

Which loop is built first can matter too: where memory comes to lie, which threads it gets. So the loops are
built several times, in either order by turns, and each of these builds is a block of pairs.
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


# The steps of two loops that took turns, pair by pair.
Block = tuple[list[Step], list[Step]]


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
    first: Callable[[Lane, int], Any],
    second: Callable[[Lane, int], Any],
    pairs: int,
    warm_up: int,
    blocks: int = 1,
) -> list[Block]:
    """Return the steps of two loops that were taken in turns, by blocks.

    Args:
        first: Given its callback and a number of steps, trains for so many.
        second: As `first`.
        pairs: Pairs of steps of each block to return.
        warm_up: Pairs before them.
        blocks: Times that both loops are built; in every second one `second` is built first.
    """
    found = []
    for block in range(blocks):
        swapped = block % 2 == 1
        lanes = [Lane(train, warm_up + pairs) for train in ((second, first) if swapped else (first, second))]
        for lane in lanes:
            lane.start()
        for pair in range(warm_up + pairs):
            for lane in lanes if pair % 2 == 0 else reversed(lanes):
                lane.step()
        for lane in lanes:
            lane.finish()
        steps = [lane.taken[warm_up:] for lane in (reversed(lanes) if swapped else lanes)]
        found.append((steps[0], steps[1]))
    return found


def summary(blocks: Sequence[Sequence[float]], draws: int = 2000) -> dict[str, float]:
    """Return the median of paired ratios, their quartiles and a 95 % bootstrap interval of the median.

    Args:
        blocks: Ratios, by the block that they were taken in; at least two in all.
        draws: Resamples of the bootstrap (percentile method, with a fixed seed). Each draws blocks, and from
            each of them ratios: what a block's ratios have in common is in the interval.
    """
    low, middle, high = statistics.quantiles([x for block in blocks for x in block], n=4, method="inclusive")
    stream = random.Random(0)
    medians = sorted(
        statistics.median(
            x for block in stream.choices(blocks, k=len(blocks)) for x in stream.choices(block, k=len(block))
        )
        for _ in range(draws)
    )
    edges = {"low": medians[int(0.025 * draws)], "high": medians[int(0.975 * draws) - 1]}
    return {"ratio": middle, "ratio_q1": low, "ratio_q3": high, **{f"ratio_{k}": v for k, v in edges.items()}}


def compared(blocks: Sequence[Block]) -> dict[str, float]:
    """Return the figures of a comparison, by wall time and, with the prefix `process_`, by processor time.

    Args:
        blocks: As `in_turns` returns them: the steps of the loop that is divided by, and of the other.
    """
    found = {
        "pairs": float(sum(len(plain) for plain, _ in blocks)),
        "blocks": float(len(blocks)),
        "seconds": statistics.median(step.wall for _, other in blocks for step in other),
    }
    for prefix, kind in (("", "wall"), ("process_", "process")):
        ratios = [
            [getattr(b, kind) / getattr(a, kind) for a, b in zip(plain, other, strict=True)]
            for plain, other in blocks
        ]
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
