"""Verifiable preference data: small tasks whose answers are known and whose reward is a documented formula.

Each task has one right answer per prompt and a pure function that scores any completion against it, so that
margins, accuracies and win rates are computed, not guessed. The letter and digit tasks are made by
enumeration, the docstring task from the standard library of the running Python; nothing is downloaded.

Splits are disjoint in prompts. Of the enumerated tasks whole families go to one side, by a checksum: 12+7 and
7+12 are one family, and so are all orders of the same letters. The docstring task keeps the module-level
splits of `hf_ext.data.stdlib`. The same call gives the same rows in every process; for the docstring task
under the same Python version.

Prompts end, and completions start, on a border of tokens of the embedded tokenizer, and in the three
enumerated tasks every symbol is one of `abcdefghijklmnopqrstuvwxyz0123456789+=:`.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hf_ext.core.checks import check, check_choice, refuse_unknown
from hf_ext.data.stdlib import COMPLETION_END, PROMPT_END, SPLITS, TASK_FORM, docstring_pairs

if TYPE_CHECKING:
    from datasets import Dataset

# Shares in per cent of the families of an enumerated task.
_TEST_SHARE = 10
_VALIDATION_SHARE = 10
_SALT = "hf_ext/tasks/"

_LARGEST = 99  # operand of an addition
_SORTING_LETTERS, _SORTING_LENGTHS = "abcdefghij", (4, 5)
_COPYING_LETTERS, _COPYING_LENGTHS = "abcdefgh", (3, 4, 5)


@dataclass(frozen=True)
class Problem:
    """One prompt and its right answer.

    Args:
        prompt: Text to complete.
        answer: The right completion, not empty.
        rivals: Right answers of related problems that are wrong for this one; only some tasks have them.
    """

    prompt: str
    answer: str
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task with known answers, a reward, and ways of being wrong.

    Args:
        name: Name under which the task is loaded.
        summary: One line.
        reward: `reward(prompt, completion, answer)` in [0, 1]; 1 for the answer itself. Pure, deterministic
            and defined for every text.
        problems: Takes a split and returns its problems, always in the same order, with unique prompts.
        corruptions: Ways of being wrong by name. Each takes a generator and a problem and returns a
            completion; one that cannot spoil a problem returns its answer or the empty text, and another is
            tried.
    """

    name: str
    summary: str
    reward: Callable[[str, str, str], float]
    problems: Callable[[str], Sequence[Problem]]
    corruptions: Mapping[str, Callable[[random.Random, Problem], str]]

    def reject(self, rng: random.Random, problem: Problem) -> str:
        """Return a completion with a lower reward than the answer's, by a corruption drawn at random.

        Raises:
            ValueError: No corruption lowers the reward.
        """
        best = self.reward(problem.prompt, problem.answer, problem.answer)
        for kind in rng.sample(list(self.corruptions), len(self.corruptions)):
            wrong = self.corruptions[kind](rng, problem)
            if wrong and self.reward(problem.prompt, wrong, problem.answer) < best:
                return wrong
        raise ValueError(f"task {self.name!r}: no corruption lowers the reward of {problem.prompt!r}")


# Loading ----------------------------------------------------------------------------------------------------


def load_preferences(
    task: str | Task, split: str = "train", *, count: int | None = None, seed: int = 0
) -> Dataset:
    """Return right answers and worse completions of a task, for preference trainers and reward models.

    The rejected completion comes from one of the task's corruptions, drawn anew for every row. With one
    seed, fewer rows are the first of more rows, and the prompts are those of `load_prompts`.

    Args:
        task: Name in `TASKS`, or a task of your own.
        split: "train", "validation" or "test".
        count: Rows, at least 1; None for all there are.
        seed: Of the order of the rows and of the corruptions.

    Returns:
        Columns `prompt`, `chosen`, `rejected`, `answer` (text, `chosen` equal to `answer`), `chosen_reward`
        and `rejected_reward` (in [0, 1], the first higher in every row).

    Raises:
        ValueError: The task or split is unknown, or there are fewer than `count` rows.
    """
    from datasets import Dataset

    return Dataset.from_dict(_preferences(_task(task), split, count, seed))


def load_prompts(
    task: str | Task, split: str = "train", *, count: int | None = None, seed: int = 0
) -> Dataset:
    """Return prompts and right answers of a task, for supervised fine-tuning, distillation and sampling.

    Args:
        task: Name in `TASKS`, or a task of your own.
        split: "train", "validation" or "test".
        count: Rows, at least 1; None for all there are.
        seed: Of the order of the rows.

    Returns:
        Columns `prompt`, `completion` and `answer`, all text; `completion` is the answer.

    Raises:
        ValueError: The task or split is unknown, or there are fewer than `count` rows.
    """
    from datasets import Dataset

    problems = _draw(_task(task), split, count, seed)
    answers = [one.answer for one in problems]
    return Dataset.from_dict(
        {"prompt": [one.prompt for one in problems], "completion": answers, "answer": answers}
    )


def _preferences(task: Task, split: str, count: int | None, seed: int) -> dict[str, list[Any]]:
    problems = _draw(task, split, count, seed)
    # Another generator than the one that shuffles, so that the rows of load_prompts are these.
    rng = random.Random(f"{seed}/rejected")
    rejected = [task.reject(rng, one) for one in problems]
    pairs = list(zip(problems, rejected, strict=True))
    return {
        "prompt": [one.prompt for one in problems],
        "chosen": [one.answer for one in problems],
        "rejected": rejected,
        "answer": [one.answer for one in problems],
        "chosen_reward": [task.reward(one.prompt, one.answer, one.answer) for one in problems],
        "rejected_reward": [task.reward(one.prompt, wrong, one.answer) for one, wrong in pairs],
    }


def _task(task: str | Task) -> Task:
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        refuse_unknown("task", task, TASKS)
    return TASKS[task]


def _draw(task: Task, split: str, count: int | None, seed: int) -> list[Problem]:
    check_choice("split", split, SPLITS)
    check(isinstance(seed, int), "seed", seed, "a whole number")
    problems = list(task.problems(split))
    if count is not None:
        rule = f"None or from 1 to {len(problems)}"
        fits = isinstance(count, int) and 1 <= count <= len(problems)
        check(fits, "count", count, rule, where=f"the {split} split of {task.name!r}")
    random.Random(seed).shuffle(problems)
    return problems[:count]


# Scoring ----------------------------------------------------------------------------------------------------


def reward_function(task: str | Task) -> Callable[..., list[float]]:
    """Return a task's reward in the form that TRL's GRPO and RLOO trainers call.

    The function is called as `f(prompts, completions, **columns)` and reads the column `answer`; of a
    conversational prompt or completion it reads the content of the last message. It is named after the
    task: "addition_reward".

    Args:
        task: Name in `TASKS`, or a task of your own.

    Raises:
        ValueError: The task is unknown. The function itself raises it when the column `answer` is missing
            or the lengths differ.
        TypeError: Raised by the function for a prompt, completion or answer that is no text.
    """
    found = _task(task)
    name = f"{found.name}_reward"

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        if columns.get("answer") is None:
            given = ", ".join(sorted(columns)) or "none"
            raise ValueError(f"{name} reads the column 'answer', which is missing; columns given: {given}")
        answers = columns["answer"]
        for field, values in (("prompts", prompts), ("answer", answers)):
            check(len(values) == len(completions), field, len(values), f"{len(completions)} rows long")
        rows = zip(
            _texts("prompts", prompts),
            _texts("completions", completions),
            _texts("answer", answers),
            strict=True,
        )
        return [found.reward(*row) for row in rows]

    reward.__name__ = reward.__qualname__ = name
    return reward


def win_rate(rewards_a: Sequence[float], rewards_b: Sequence[float]) -> float:
    """Return the share of rows in which `a` has the higher reward; a tie counts as half.

    Args:
        rewards_a: Rewards of one model, one per prompt.
        rewards_b: Rewards of the other, for the same prompts in the same order.

    Raises:
        ValueError: There are no rows, the lengths differ, or a reward is NaN.
    """
    check(len(rewards_a) > 0, "rewards_a", [], "at least one row")
    check(len(rewards_a) == len(rewards_b), "rewards_b", len(rewards_b), f"{len(rewards_a)} rows long")
    first, second = [float(value) for value in rewards_a], [float(value) for value in rewards_b]
    for field, values in (("rewards_a", first), ("rewards_b", second)):
        bad = [index for index, value in enumerate(values) if math.isnan(value)]
        check(not bad, field, f"NaN in row {bad[0] if bad else 0}", "numbers")
    points = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(first, second, strict=True))
    return points / len(first)


def _texts(field: str, values: Sequence[Any]) -> list[str]:
    return [_text(field, value) for value in values]


def _text(field: str, value: Any) -> str:
    """Return a text, or the text of the last message of a conversation."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        content = value[-1].get("content")
        if content is None:  # a message that only calls tools
            return ""
        if isinstance(content, str):
            return content
        if isinstance(content, list):
            return "".join(part["text"] for part in content if part.get("type") == "text")
    raise TypeError(f"{field} must be texts or lists of messages, got {type(value).__name__} {value!r:.80}")


# Addition ---------------------------------------------------------------------------------------------------


def addition_reward(prompt: str, completion: str, answer: str) -> float:
    """Return the share of the digits that are right, counted from the right up to the first wrong one.

    With n equal characters at the ends of completion and answer, n / (length of the longer): 1 for the
    exact number, 1/2 for 29 or 9 instead of 19. 0 unless the completion, apart from white space around it,
    consists of the digits 0-9.
    """
    given = completion.strip()
    if not re.fullmatch("[0-9]+", given):
        return 0.0
    same = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(reversed(given), reversed(answer), strict=False)
    )
    return sum(1 for _ in same) / max(len(given), len(answer))


@cache
def _additions(split: str) -> tuple[Problem, ...]:
    numbers = range(_LARGEST + 1)
    return tuple(
        Problem(f"{a}+{b}=", str(a + b))
        for a, b in itertools.product(numbers, repeat=2)
        if _split_of("addition", f"{min(a, b)}+{max(a, b)}") == split
    )


def _lost_carry(rng: random.Random, problem: Problem) -> str:
    a, b = (int(text) for text in problem.prompt.rstrip("=").split("+"))
    return str(sum((a // unit + b // unit) % 10 * unit for unit in (1, 10)))


def _extra_carry(rng: random.Random, problem: Problem) -> str:
    return str(int(problem.answer) + 10)


def _off_by_one(rng: random.Random, problem: Problem) -> str:
    return str(abs(int(problem.answer) + rng.choice((-1, 1))))


def _wrong_digit(rng: random.Random, problem: Problem) -> str:
    return _replace_one(rng, problem.answer, "0123456789")


# Sorting ----------------------------------------------------------------------------------------------------


def sorting_reward(prompt: str, completion: str, answer: str) -> float:
    """Return the share of letters in their right place, 0 unless the letters are those of the answer.

    White space around the completion is ignored. A completion with a letter lost, added or changed gets 0
    and not a part, so that no fixed text collects reward.
    """
    given = completion.strip()
    return _share_in_place(given, answer) if sorted(given) == sorted(answer) else 0.0


@cache
def _sortings(split: str) -> tuple[Problem, ...]:
    families = (
        letters for length in _SORTING_LENGTHS for letters in itertools.combinations(_SORTING_LETTERS, length)
    )
    return tuple(
        Problem(f"sort:{''.join(order)}=", "".join(letters))
        for letters in families
        if _split_of("sorting", "".join(letters)) == split
        for order in itertools.permutations(letters)
        if order != letters  # nothing to do, and copying the input would be right
    )


def _input(rng: random.Random, problem: Problem) -> str:
    return problem.prompt.removeprefix("sort:").removesuffix("=")


def _reversed(rng: random.Random, problem: Problem) -> str:
    return problem.answer[::-1]


def _wrong_sorting_letter(rng: random.Random, problem: Problem) -> str:
    return _replace_one(rng, problem.answer, _SORTING_LETTERS)


# Copying ----------------------------------------------------------------------------------------------------


def copying_reward(prompt: str, completion: str, answer: str) -> float:
    """Return the number of places with the right letter / (length of the longer of completion and answer).

    White space around the completion is ignored.
    """
    return _share_in_place(completion.strip(), answer)


@cache
def _copies(split: str) -> tuple[Problem, ...]:
    words = (
        "".join(letters)
        for length in _COPYING_LENGTHS
        for letters in itertools.product(_COPYING_LETTERS, repeat=length)
    )
    return tuple(Problem(f"copy:{word}=", word) for word in words if _split_of("copying", word) == split)


def _wrong_copying_letter(rng: random.Random, problem: Problem) -> str:
    return _replace_one(rng, problem.answer, _COPYING_LETTERS)


# Docstrings -------------------------------------------------------------------------------------------------


def docstring_reward(prompt: str, completion: str, answer: str) -> float:
    """Return the word F1 of the first lines of completion and answer: 2 n / (words of both lines).

    n is the number of words they share, a word repeated counting as often as it stands in both. Words are
    runs of letters, digits and underscores without regard to case; white space before the first line is
    ignored. 0 where either line has no word.
    """
    given, wanted = _first_words(completion), _first_words(answer)
    if not given or not wanted:
        return 0.0
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


@cache
def _docstrings(split: str) -> tuple[Problem, ...]:
    """Return the functions of a split, less those without a rival and those whose first line has no word."""
    modules: defaultdict[str, list[tuple[str, str, Counter[str]]]] = defaultdict(list)
    for pair in docstring_pairs(split):
        prompt = TASK_FORM.format(source=pair.prompt.removesuffix(PROMPT_END))
        docstring = pair.completion.removesuffix(COMPLETION_END)
        words = _first_words(docstring)
        if words:
            modules[pair.module].append((prompt, docstring, words))
    found = []
    for functions in modules.values():
        for prompt, docstring, words in functions:
            # F1 is 1 exactly for equal counts of words.
            rivals = tuple(other for _, other, theirs in functions if theirs != words)
            if rivals:
                found.append(Problem(prompt, docstring, rivals))
    return tuple(found)


def _another_function(rng: random.Random, problem: Problem) -> str:
    return rng.choice(problem.rivals)


def _first_words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lstrip().split("\n", 1)[0].lower()))


# Shared -----------------------------------------------------------------------------------------------------


def _split_of(task: str, family: str) -> str:
    # crc32 and not hash(), which changes with PYTHONHASHSEED.
    place = zlib.crc32(f"{_SALT}{task}/{family}".encode()) % 100
    if place < _TEST_SHARE:
        return "test"
    return "validation" if place < _TEST_SHARE + _VALIDATION_SHARE else "train"


def _share_in_place(given: str, answer: str) -> float:
    return sum(a == b for a, b in zip(given, answer, strict=False)) / max(len(given), len(answer), 1)


def _replace_one(rng: random.Random, text: str, symbols: str) -> str:
    place = rng.randrange(len(text))
    other = rng.choice([symbol for symbol in symbols if symbol != text[place]])
    return text[:place] + other + text[place + 1 :]


def _swapped_neighbors(rng: random.Random, problem: Problem) -> str:
    text = problem.answer
    places = [place for place in range(len(text) - 1) if text[place] != text[place + 1]]
    if not places:
        return text
    place = rng.choice(places)
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


def _dropped_character(rng: random.Random, problem: Problem) -> str:
    place = rng.randrange(len(problem.answer))
    return problem.answer[:place] + problem.answer[place + 1 :]


def _repeated_character(rng: random.Random, problem: Problem) -> str:
    place = rng.randrange(len(problem.answer))
    return problem.answer[: place + 1] + problem.answer[place:]


_ALL = (
    Task(
        "addition",
        "add two numbers from 0 to 99: '12+7=' -> '19'",
        addition_reward,
        _additions,
        {
            "lost carry": _lost_carry,
            "extra carry": _extra_carry,
            "off by one": _off_by_one,
            "wrong digit": _wrong_digit,
            "swapped neighbors": _swapped_neighbors,
            "dropped character": _dropped_character,
        },
    ),
    Task(
        "sorting",
        "sort four or five different letters: 'sort:dbca=' -> 'abcd'",
        sorting_reward,
        _sortings,
        {
            "swapped neighbors": _swapped_neighbors,
            "input": _input,
            "reversed": _reversed,
            "wrong letter": _wrong_sorting_letter,
            "dropped character": _dropped_character,
        },
    ),
    Task(
        "copying",
        "repeat three to five letters: 'copy:dbca=' -> 'dbca'",
        copying_reward,
        _copies,
        {
            "swapped neighbors": _swapped_neighbors,
            "wrong letter": _wrong_copying_letter,
            "dropped character": _dropped_character,
            "repeated character": _repeated_character,
        },
    ),
    Task(
        "docstring",
        "write the docstring of a function of the standard library",
        docstring_reward,
        _docstrings,
        {"another function's": _another_function},
    ),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
EMBEDDED = tuple(sorted(TASKS))
