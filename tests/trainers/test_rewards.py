"""Rewards from functions with GRPO's signature: sums, gaps, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.trainers._rewards import call_rewards


def test_rewards_follow_grpos_convention() -> None:
    seen: dict[str, Any] = {}

    def first(**given: Any) -> list[float | None]:
        seen.update(given)
        return [1.0, None, None, 4]

    async def second(completions: list[str], **_: Any) -> list[float | None]:
        return [10.0, 20.0, None, float("nan")]

    found = call_rewards(
        [first, second],
        ["p", "q"],
        [["a", "b"], ["c", "d"]],
        [[[1], [2]], [[3], [4]]],
        {"answer": [7, 8], "prompt": ["no", "no"]},
        reward_weights=[1.0, 0.5],
        trainer_state="state",
    )
    assert found.dtype == torch.float32
    # 1 + 10 / 2; the second's alone; neither's; the first's alone.
    torch.testing.assert_close(found, torch.tensor([[6.0, 10.0], [torch.nan, 4.0]]), equal_nan=True)
    assert seen == {
        "prompts": ["p", "p", "q", "q"],
        "completions": ["a", "b", "c", "d"],
        "completion_ids": [[1], [2], [3], [4]],
        "answer": [7, 7, 8, 8],
        "trainer_state": "state",
    }


def rewards_of(answer: Any) -> Any:
    def reward(**_: Any) -> Any:
        return answer

    return call_rewards(reward, ["p"], [["a", "b"]], [[[1], [2]]])


def test_a_tensor_of_rewards_is_taken() -> None:
    assert rewards_of(torch.tensor([1, 2])).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        ([1.0], ValueError, r"reward_funcs\[0\] \(reward\) must be 2 rewards"),
        ([None, float("nan")], ValueError, r"reward_funcs \(reward\) must give some completion a number"),
        ([1.0, float("inf")], ValueError, "finite or NaN"),
        ([1.0, "good"], TypeError, r"reward_funcs\[0\] \(reward\) must give numbers or None, got 'good'"),
    ],
)
def test_bad_rewards_name_the_function(answer: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        rewards_of(answer)


def test_bad_reward_functions_are_refused() -> None:
    for bad in (torch.nn.Linear(1, 1), "some/model"):
        with pytest.raises(TypeError, match=r"reward_funcs\[0\] must be a function"):
            call_rewards(bad, ["p"], [["a"]], [[[1]]])
    with pytest.raises(ValueError, match="reward_funcs"):
        call_rewards([], ["p"], [["a"]], [[[1]]])
    with pytest.raises(ValueError, match="reward_weights"):
        call_rewards(lambda **_: [1.0], ["p"], [["a"]], [[[1]]], reward_weights=[1.0, 2.0])
