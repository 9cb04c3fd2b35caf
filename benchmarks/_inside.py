"""The share of a loop's processor time that is spent in functions of one's own, and in what they call.

A ratio of two loops' times has the noise of both; what a callback costs is mostly the time in its own
functions, which a profile tells exactly (but for what it does to the caches). Counted are the functions of
the given folders, and the time of functions of torch, of Python's own library and of C in as far as they are
called from there, straight or by way of one another. Functions of other packages that are called from there,
such as the step that a callback wraps, are not.
"""

from __future__ import annotations

import cProfile
import pstats
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

Function = tuple[str, int, str]
_LIBRARIES = (str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"])
_PACKAGES = sysconfig.get_paths()["purelib"]
_ROUNDS = 300  # a call is seldom as deep


class Profile(TrainerCallback):
    """Profiles a number of steps of a loop, by the processor time of the process; the first of its callbacks.

    Args:
        first: Steps before those that are profiled.
        steps: Steps to profile; the loop must have one more.
    """

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.last = first, first + steps
        self._profile = cProfile.Profile(time.process_time)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start, or stop."""
        if state.global_step == self.first:
            self._profile.enable()
        elif state.global_step == self.last:
            self._profile.disable()

    def share(self, folders: Sequence[Path]) -> float:
        """Return the share of the steps' time that was spent in functions of some folders."""
        return share_of(pstats.Stats(self._profile), lambda name: name.startswith(tuple(map(str, folders))))


def share_of(stats: pstats.Stats, ours: Callable[[str], bool]) -> float:
    """Return the share of a profile's time in functions of our files, and in what these call of libraries.

    Args:
        stats: The profile.
        ours: Whether a file's name is.
    """
    calls: dict[Function, Any] = stats.stats  # pyright: ignore[reportAttributeAccessIssue]
    # Of a library's function so much of the time counts as of those who call it, by the time of their calls;
    # they may call one another in circles.
    fractions = {function: float(ours(function[0])) for function in calls}
    shares: dict[Function, dict[Function, float]] = {}
    for function, (_, _, _, _, callers) in calls.items():
        if not ours(function[0]) and _is_library(function[0]):
            times = {caller: entry[3] for caller, entry in callers.items() if caller != function}
            total = sum(times.values())
            shares[function] = {caller: time / total for caller, time in times.items()} if total else {}
    for _ in range(_ROUNDS):
        fractions |= {
            function: sum(share * fractions[caller] for caller, share in callers.items())
            for function, callers in shares.items()
        }
    whole = sum(own for _, _, own, _, _ in calls.values())
    return sum(own * fractions[function] for function, (_, _, own, _, _) in calls.items()) / whole


def _is_library(name: str) -> bool:
    if name == "~":  # written in C
        return True
    return name.startswith(_LIBRARIES[0]) or (
        name.startswith(_LIBRARIES[1]) and not name.startswith(_PACKAGES)
    )
