"""Comparing two training loops in benchmarks: turns, times, ratios, and the time in functions of ours."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import _inside as inside
from benchmarks import _pairing as pairing


def loop(log: list[Any], name: str, seconds: float) -> Any:
    def train(lane: Any, steps: int) -> None:
        for step in range(steps):
            lane.on_step_begin(None, None, None)
            log.append((name, step, float(torch.rand(()))))
            until = time.process_time() + seconds
            while time.process_time() < until:
                pass

    return train


def test_loops_take_turns_with_the_same_random_state_and_their_own_times() -> None:
    log: list[Any] = []
    blocks = pairing.in_turns(loop(log, "a", 0.004), loop(log, "b", 0.008), 4, 1, blocks=2)
    # The last turn of each lets the loops end; the second block has b first.
    assert [name for name, _, _ in log] == list("abbaabbaabab" + "baabbaabbaba")
    drawn = {name: [value for other, _, value in log if other == name] for name in "ab"}
    assert drawn["a"] == drawn["b"]
    assert len(set(drawn["a"])) == 6
    for first, second in blocks:
        assert [len(first), len(second)] == [4, 4]
        for steps, seconds in ((first, 0.004), (second, 0.008)):
            assert min(step.process for step in steps) >= seconds
    figures = pairing.compared(blocks)
    assert (figures["pairs"], figures["blocks"]) == (8, 2)
    assert 1.2 < figures["process_ratio"] < 2.5


def test_an_error_in_a_loop_is_raised() -> None:
    def broken(lane: Any, steps: int) -> None:
        lane.on_step_begin(None, None, None)
        raise ArithmeticError("in the loop")

    with pytest.raises(ArithmeticError, match="in the loop"):
        pairing.in_turns(loop([], "a", 0.0), broken, 3, 0)


def test_figures_of_ratios_by_hand() -> None:
    figures = pairing.summary([[1.0, 1.1, 1.2, 1.3, 9.0]])
    assert figures["ratio"] == pytest.approx(1.2)
    assert (figures["ratio_q1"], figures["ratio_q3"]) == pytest.approx((1.1, 1.3))
    # The median of five draws is the largest with probability P(Bin(5, 1/5) >= 3) = 0.058, the smallest too.
    assert (figures["ratio_low"], figures["ratio_high"]) == (1.0, 9.0)
    many = pairing.summary([[1.0 + 0.01 * (i % 11 - 5) for i in range(440)]])
    assert many["ratio"] == pytest.approx(1.0)
    assert 0.99 <= many["ratio_low"] <= 1.0 <= many["ratio_high"] <= 1.01
    # Blocks that differ as wholes leave the median open, however many pairs they have.
    apart = pairing.summary([[1.0] * 200, [1.2] * 200])
    assert (apart["ratio_low"], apart["ratio_high"]) == (1.0, 1.2)
    assert pairing.decides({"process_ratio_low": 0.99, "process_ratio_high": 1.01}, 1.02) == "below"
    assert pairing.decides({"process_ratio_low": 1.03, "process_ratio_high": 1.05}, 1.02) == "above"
    assert pairing.decides({"process_ratio_low": 1.01, "process_ratio_high": 1.03}, 1.02) == "open"


# The time in functions of one's own ---------------------------------------------------------------


def test_the_share_of_functions_of_one_s_own() -> None:
    step, own, helper = (
        ("/other/trainer.py", 1, "step"),
        ("/ours/a.py", 1, "own"),
        ("/ours/b.py", 9, "helper"),
    )
    wrapper, product = (torch.__file__, 5, "no_grad"), ("~", 0, "mm")
    clock, far = ("~", 0, "time"), ("~", 0, "far")
    # By function: calls, primitive calls, own seconds, seconds with all it calls, and the same by caller.
    stats: Any = SimpleNamespace(
        stats={
            step: (1, 1, 4.0, 10.0, {}),
            own: (1, 1, 1.0, 5.0, {step: (1, 1, 1.0, 5.0)}),
            helper: (1, 1, 0.5, 0.5, {wrapper: (1, 1, 0.5, 0.5)}),  # called back by torch
            wrapper: (2, 2, 1.0, 4.0, {own: (1, 1, 0.5, 3.0), step: (1, 1, 0.5, 1.0)}),
            product: (9, 9, 2.5, 2.5, {wrapper: (8, 8, 2.0, 2.0), step: (1, 1, 0.5, 0.5)}),
            # Of a function that calls itself, by way of another one too, its callers from outside decide.
            clock: (3, 1, 1.0, 1.0, {clock: (1, 1, 0.5, 0.5), own: (1, 1, 0.3, 0.3), far: (1, 1, 0.2, 0.2)}),
            far: (1, 1, 0.0, 0.5, {clock: (1, 1, 0.0, 0.5)}),
        }
    )
    # Of torch's wrapper 3 of 4 seconds are ours, of the product that share of 2 in 2.5, of the clock all.
    counted = 1.0 + 0.5 + 0.75 * 1.0 + (0.75 * 2.0 / 2.5) * 2.5 + 1.0
    found = inside.share_of(stats, lambda name: name.startswith("/ours"))
    assert found == pytest.approx(counted / 10.0)
    assert inside.share_of(stats, lambda name: name == "nobody's") == 0.0


def test_a_profile_of_a_loop_leaves_out_what_the_loop_does() -> None:
    def busy() -> None:
        until = time.process_time() + 0.01
        while time.process_time() < until:
            torch.ones(100).sum()

    profile = inside.Profile(1, 2)
    for step in range(4):
        profile.on_step_begin(None, SimpleNamespace(global_step=step), None)
        busy()
    assert profile.share([Path(__file__).parent]) > 0.9
    assert profile.share([Path("/nowhere")]) == 0.0
