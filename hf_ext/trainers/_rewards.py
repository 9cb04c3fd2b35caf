"""Rewards of completions, from functions with the signature of GRPO's."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check
from ._sampling import Prompt

RewardFunction = Callable[..., Any]


def check_rewards(reward_funcs: Any, reward_weights: Sequence[float] | None) -> list[RewardFunction]:
    """Return reward functions as a list.

    Raises:
        TypeError: One is not a function, such as the name of a model or a model itself.
        ValueError: There is none, or not one weight for each.
    """
    found = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    check(bool(found) and found != [None], "reward_funcs", reward_funcs, "at least one function")
    for place, function in enumerate(found):
        if isinstance(function, nn.Module) or not callable(function):
            raise TypeError(
                f"reward_funcs[{place}] must be a function of prompts, completions and completion_ids, got "
                f"{type(function).__name__}; call a reward model within one"
            )
    if reward_weights is not None:
        rule = f"one weight for each of the {len(found)} reward_funcs"
        check(len(reward_weights) == len(found), "reward_weights", reward_weights, rule)
    return found


def call_rewards(
    reward_funcs: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Any]],
    completion_ids: Sequence[Sequence[Sequence[int]]],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    reward_weights: Sequence[float] | None = None,
    some: bool = True,
    **extras: Any,
) -> Tensor:
    """Return the reward of each completion, from functions with the signature of GRPO's.

    Each is called once with flat lists: `prompts`, `completions`, `completion_ids` and the columns, every
    prompt's rows side by side. One that is asynchronous runs together with the others of its kind.

    Args:
        reward_funcs: A function, or several.
        prompts: (P) prompts, texts or lists of messages.
        completions: (P, n) completions, as from `decode_completions`.
        completion_ids: (P, n) lists of token ids.
        columns: (P) values of the data's other columns, given to the functions by name.
        reward_weights: Weight of each function in the sum; None for 1.
        some: Whether a call without any reward is an error, and not a set of rows that have none.
        **extras: Given to the functions as they are, such as `trainer_state`.

    Returns:
        (P, n) fp32 on the CPU, the weighted sum over functions. A function's None or NaN leaves it out of a
        completion's sum; NaN where all left it out: that completion has no reward and is to be excluded.

    Raises:
        TypeError: A function gives something that is no number.
        ValueError: A function gives another count than that of the completions, an infinite reward, or no
            reward at all.
    """
    functions = check_rewards(reward_funcs, reward_weights)
    counts = [len(group) for group in completions]
    check(len(set(counts)) <= 1, "completions", counts, "as many for each prompt")
    flat: dict[str, Any] = {
        "prompts": [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)],
        "completions": [one for group in completions for one in group],
        "completion_ids": [list(one) for group in completion_ids for one in group],
    }
    for name, values in (columns or {}).items():
        if name not in ("prompt", "completion", "prompts", "completions", "completion_ids"):
            flat[name] = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
    total = sum(counts)
    if total == 0:
        return torch.zeros(len(counts), 0)
    answers = _answers(functions, {**flat, **extras})
    rows = [
        _checked(fn, place, answer, total)
        for place, (fn, answer) in enumerate(zip(functions, answers, strict=True))
    ]
    weights = torch.tensor([1.0] * len(rows) if reward_weights is None else list(reward_weights))
    per_function = torch.stack(rows)  # (functions, P n)
    if some and bool(per_function.isnan().all()):
        names = ", ".join(getattr(function, "__name__", type(function).__name__) for function in functions)
        raise ValueError(
            f"reward_funcs ({names}) must give some completion a number, got NaN or None for all"
        )
    summed = (per_function * weights[:, None]).nansum(dim=0)
    summed[per_function.isnan().all(dim=0)] = torch.nan
    return summed.reshape(len(counts), counts[0])


def _answers(functions: Sequence[RewardFunction], given: Mapping[str, Any]) -> list[Any]:
    answers = [function(**given) for function in functions if not _is_async(function)]
    waiting = [function for function in functions if _is_async(function)]

    async def together() -> list[Any]:
        return await asyncio.gather(*(function(**given) for function in waiting))

    late: list[Any] = []
    if waiting:
        # In a thread of its own: a notebook's thread has an event loop already.
        with ThreadPoolExecutor(max_workers=1) as pool:
            late = pool.submit(lambda: asyncio.run(together())).result()
    early, later = iter(answers), iter(late)
    return [next(later) if _is_async(function) else next(early) for function in functions]


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object's own
    )


def _checked(function: Any, place: int, answer: Any, total: int) -> Tensor:
    name = f"reward_funcs[{place}] ({getattr(function, '__name__', type(function).__name__)})"
    values = answer.tolist() if isinstance(answer, Tensor) else list(answer)
    check(
        len(values) == total,
        f"the answer of {name}",
        len(values),
        f"{total} rewards, one for each completion",
    )
    for row, value in enumerate(values):
        if value is None:
            continue
        try:
            values[row] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must give numbers or None, got {value!r} for completion {row}"
            ) from error
    found = torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float32)
    infinite = found.isinf().nonzero().flatten().tolist()
    check(not infinite, f"the answer of {name}", f"infinite for completion {infinite[:1]}", "finite or NaN")
    return found
