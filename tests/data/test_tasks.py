"""The tasks: rewards by hand, splits without overlap, rejected completions that are really worse."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hf_ext.data import (
    EMBEDDED,
    SPLITS,
    TASK_END,
    TASKS,
    Problem,
    Task,
    load_docstrings,
    load_preferences,
    load_prompts,
    reward_function,
    split_of,
    tasks,
    win_rate,
)

ROOT = Path(__file__).resolve().parents[2]
ENUMERATED = tuple(name for name in EMBEDDED if name != "docstring")
# The docstrings of the training split take seconds to parse.
QUICK = [(task, split) for task in EMBEDDED for split in SPLITS if (task, split) != ("docstring", "train")]
HARD_TEXTS = [
    "", " ", "\n\n", "\x00", "\ud800", "é½²٣", "-1", "1" * 5000, "a" * 5000, "1.0", "+5", "0x1", "{}", "(",
    "\\", "<|eos|>", "sort:", "=", "\u2028a", "🙂",
]  # fmt: skip


# Rewards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "completion", "answer", "reward"),
    [
        ("addition", "19", "19", 1.0),
        ("addition", " 19\n", "19", 1.0),
        ("addition", "29", "19", 1 / 2),
        ("addition", "9", "19", 1 / 2),
        ("addition", "18", "19", 0.0),  # the left digit alone is worth nothing
        ("addition", "119", "19", 2 / 3),
        ("addition", "019", "19", 2 / 3),
        ("addition", "112", "132", 1 / 3),  # the first digit stands behind a wrong one
        ("addition", "19!", "19", 0.0),
        ("addition", "+19", "19", 0.0),
        ("addition", "١٩", "١٩", 0.0),  # digits, but not 0-9
        ("sorting", "abcd", "abcd", 1.0),
        ("sorting", " abcd ", "abcd", 1.0),
        ("sorting", "abdc", "abcd", 1 / 2),
        ("sorting", "dcba", "abcd", 0.0),
        ("sorting", "abce", "abcd", 0.0),
        ("sorting", "abc", "abcd", 0.0),
        ("sorting", "abcdd", "abcd", 0.0),
        ("copying", "dbca", "dbca", 1.0),
        ("copying", "dbc", "dbca", 3 / 4),
        ("copying", "bca", "dbca", 0.0),
        ("copying", "dbcab", "dbca", 4 / 5),
        ("copying", "dxca", "dbca", 3 / 4),
        ("docstring", "Return the name.\n\nMore.", "Return the name.", 1.0),
        ("docstring", "\n\n  the NAME: return", "Return the name.\nOther text.", 1.0),
        ("docstring", "Return the value", "Return the name.", 2 * 2 / (3 + 3)),
        ("docstring", "the the the the", "the name of the file", 2 * 2 / (4 + 5)),
        ("docstring", "Set it", "Return the name.", 0.0),
        ("docstring", "...", "...", 0.0),
    ],
)
def test_reward_by_hand(task: str, completion: str, answer: str, reward: float) -> None:
    assert TASKS[task].reward("any prompt", completion, answer) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize("name", EMBEDDED)
def test_reward_is_defined_for_every_text_and_is_one_for_the_answer_alone(name: str) -> None:
    task = TASKS[name]
    problem = task.problems("test")[0]
    assert task.reward(problem.prompt, problem.answer, problem.answer) == 1.0
    for text in HARD_TEXTS:
        assert 0.0 <= task.reward(problem.prompt, text, problem.answer) < 1.0
    for completion, answer in itertools.product(HARD_TEXTS, repeat=2):
        assert 0.0 <= task.reward(completion, completion, answer) <= 1.0


@pytest.mark.parametrize("name", ENUMERATED)
def test_every_answer_is_right(name: str) -> None:
    for split in SPLITS:
        for problem in TASKS[name].problems(split):
            given = problem.prompt.removesuffix("=")
            if name == "addition":
                first, second = given.split("+")
                assert int(problem.answer) == int(first) + int(second)
            else:
                verb, letters = given.split(":")
                expected = {"sort": "".join(sorted(letters)), "copy": letters}[verb]
                assert (problem.answer, name[:4]) == (expected, verb)


# Rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "split"), QUICK)
def test_every_rejected_completion_is_worse(task: str, split: str) -> None:
    rows: Any = load_preferences(task, split, count=300, seed=3)
    assert rows.column_names == ["prompt", "chosen", "rejected", "answer", "chosen_reward", "rejected_reward"]
    assert len(set(rows["prompt"])) == len(rows) == 300
    reward = TASKS[task].reward
    for row in rows:
        assert row["chosen"] == row["answer"]
        assert row["rejected"].strip()
        assert row["chosen_reward"] == reward(row["prompt"], row["chosen"], row["answer"]) == 1.0
        assert row["rejected_reward"] == reward(row["prompt"], row["rejected"], row["answer"]) < 1.0
    # Neither all hopeless nor all of one kind.
    assert len(set(rows["rejected_reward"])) >= 3


@pytest.mark.parametrize("task", EMBEDDED)
def test_prompts_are_those_of_the_preferences_and_fewer_rows_are_the_first_of_more(task: str) -> None:
    many, few = (
        load_preferences(task, "test", count=50, seed=1),
        load_preferences(task, "test", count=9, seed=1),
    )
    prompts = load_prompts(task, "test", count=50, seed=1)
    assert prompts.column_names == ["prompt", "completion", "answer"]
    assert list(prompts["prompt"]) == list(many["prompt"])
    assert list(prompts["completion"]) == list(prompts["answer"]) == list(many["answer"])
    assert few.to_list() == many.to_list()[:9]
    assert load_prompts(task, "test", count=50, seed=2).to_list() != prompts.to_list()


@pytest.mark.parametrize("name", ENUMERATED)
def test_splits_are_disjoint_in_families_and_of_the_documented_share(name: str) -> None:
    problems = {split: TASKS[name].problems(split) for split in SPLITS}
    family = {
        "addition": lambda prompt: tuple(sorted(prompt.rstrip("=").split("+"))),
        "sorting": lambda prompt: tuple(sorted(prompt)),
        "copying": lambda prompt: prompt,
    }[name]
    seen: set[Any] = set()
    for split in SPLITS:
        prompts = [problem.prompt for problem in problems[split]]
        families = set(map(family, prompts))
        assert len(set(prompts)) == len(prompts)
        assert not families & seen
        seen |= families
    sizes = {"addition": 100 * 100, "sorting": 210 * 23 + 252 * 119, "copying": 8**3 + 8**4 + 8**5}
    total = sum(map(len, problems.values()))
    assert total == sizes[name]
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert len(problems[split]) / total == pytest.approx(share, abs=0.02)


def test_docstring_rows_are_those_of_the_library_less_the_ones_without_a_rival() -> None:
    library: Any = load_docstrings("validation")
    rows = {row["prompt"]: row for row in library}
    problems = TASKS["docstring"].problems("validation")
    assert 0.95 * len(rows) < len(problems) <= len(rows)
    modules: dict[str, set[str]] = {}
    for row in rows.values():
        modules.setdefault(row["module"], set()).add(row["completion"].removesuffix(TASK_END))
    for problem in problems:
        row = rows[problem.prompt]
        assert split_of(row["module"]) == "validation"
        assert problem.answer == row["completion"].removesuffix(TASK_END)
        assert problem.rivals
        assert set(problem.rivals) < modules[row["module"]]


@pytest.mark.parametrize("name", ENUMERATED)
def test_every_corruption_works_and_all_are_mixed(name: str) -> None:
    task = TASKS[name]
    problems = random.Random(0).sample(list(task.problems("train")), 200)
    for kind, corrupt in task.corruptions.items():
        alone = Task(name, "one kind", task.reward, task.problems, {kind: corrupt})
        spoiled = 0
        for problem in problems:
            try:
                spoiled += bool(alone.reject(random.Random(0), problem))
            except ValueError:
                continue
        assert spoiled > 50, kind
    drawn: Counter[str] = Counter()

    def counted(kind: str) -> Any:
        def corrupt(rng: random.Random, problem: Problem) -> str:
            drawn[kind] += 1
            return task.corruptions[kind](rng, problem)

        return corrupt

    watched = Task(
        name, "watched", task.reward, task.problems, {kind: counted(kind) for kind in task.corruptions}
    )
    load_preferences(watched, "test", count=300)
    assert set(drawn) == set(task.corruptions)
    assert min(drawn.values()) > 300 / len(drawn) / 2


def test_corruptions_by_hand() -> None:
    rng = random.Random(0)
    assert tasks._lost_carry(rng, Problem("17+5=", "22")) == "12"
    assert tasks._lost_carry(rng, Problem("95+5=", "100")) == "90"
    assert tasks._lost_carry(rng, Problem("12+7=", "19")) == "19"  # no carry: another kind is tried
    assert tasks._extra_carry(rng, Problem("12+7=", "19")) == "29"
    assert tasks._off_by_one(rng, Problem("0+0=", "0")) == "1"
    assert tasks._input(rng, Problem("sort:dbca=", "abcd")) == "dbca"
    assert tasks._swapped_neighbors(rng, Problem("copy:aaab=", "aaab")) == "aaba"
    assert tasks._swapped_neighbors(rng, Problem("copy:aaa=", "aaa")) == "aaa"
    assert tasks._dropped_character(rng, Problem("copy:aaa=", "aaa")) == "aa"
    assert tasks._repeated_character(rng, Problem("copy:aaa=", "aaa")) == "aaaa"


# Written out, so that a change of the order or of a corruption, after which old results could not be
# compared with new ones, cannot pass unseen. Also the proof that PYTHONHASHSEED has no part in it.
@pytest.mark.parametrize(
    ("task", "first"),
    [
        ("addition", ("27+29=", "56", "46", 0.5)),
        ("copying", ("copy:daccc=", "daccc", "dacec", 0.8)),
        ("sorting", ("sort:bijeh=", "behij", "bijeh", 0.2)),
    ],
)
def test_rows_are_fixed(task: str, first: tuple[Any, ...]) -> None:
    columns = ("prompt", "chosen", "rejected", "rejected_reward")
    rows: Any = load_preferences(task, "test", count=3)
    assert first in [tuple(row[name] for name in columns) for row in rows]


def test_another_process_with_another_hash_seed_has_the_same_rows() -> None:
    code = (
        "import hashlib, json; from hf_ext.data import EMBEDDED, TASKS, tasks\n"
        "rows = [tasks._preferences(TASKS[name], 'validation', 40, 0) for name in EMBEDDED]\n"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    rows = [load_preferences(name, "validation", count=40).to_dict() for name in EMBEDDED]
    here = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == here


@pytest.mark.parametrize(("task", "split"), QUICK)
def test_prompts_end_on_a_border_of_tokens(task: str, split: str, repository: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(repository / "hf_ext" / "assets" / "tiny-llama")
    rows: Any = load_preferences(task, split, count=300, seed=5)
    alone = tokenizer(list(rows["prompt"]))["input_ids"]
    for column in ("chosen", "rejected"):
        texts = [row["prompt"] + row[column] for row in rows]
        for prompt, both in zip(alone, tokenizer(texts)["input_ids"], strict=True):
            assert both[: len(prompt)] == prompt
            assert len(prompt) < len(both) <= tokenizer.model_max_length


@pytest.mark.parametrize("name", ENUMERATED)
def test_letters_are_those_that_the_module_names(name: str) -> None:
    letters = set("abcdefghijklmnopqrstuvwxyz0123456789+=:")
    rows: Any = load_preferences(name, "validation")
    for row in rows:
        assert set(row["prompt"] + row["chosen"] + row["rejected"]) <= letters


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_preferences, load_prompts])
def test_bad_settings_are_refused(load: Any) -> None:
    with pytest.raises(ValueError, match="task 'aditon' is unknown; did you mean 'addition'"):
        load("aditon")
    with pytest.raises(ValueError, match=r"split must be one of .* did you mean 'test'"):
        load("addition", "tset")
    there = len(TASKS["addition"].problems("test"))
    for count in (0, -1, there + 1, 2.5):
        with pytest.raises(ValueError, match=rf"count must be None or from 1 to {there}, got .*'addition'"):
            load("addition", "test", count=count)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        load("addition", "test", seed="0")
    assert len(load("addition", "test", count=there)) == len(load("addition", "test")) == there


def test_a_task_without_a_worse_completion_is_refused() -> None:
    task = Task("flat", "always right", lambda *_: 1.0, lambda _: [Problem("a", "b")], {"c": lambda *_: "c"})
    with pytest.raises(ValueError, match="task 'flat': no corruption lowers the reward of 'a'"):
        load_preferences(task)
    assert load_prompts(task).to_list() == [{"prompt": "a", "completion": "b", "answer": "b"}]


# Scoring ----------------------------------------------------------------------------------------------------


def test_reward_function_in_the_form_of_grpo() -> None:
    reward = reward_function("addition")
    assert reward.__name__ == "addition_reward"
    columns = {"answer": ["19", "19", "19"], "completion_ids": [[1], [2], [3]], "trainer_state": None}
    assert reward(prompts=["12+7="] * 3, completions=["19", "29", "x"], **columns) == [1.0, 0.5, 0.0]
    messages = [
        [{"role": "assistant", "content": "19"}],
        [
            {"role": "assistant", "content": "0"},
            {"role": "assistant", "content": [{"type": "text", "text": "29"}]},
        ],
        [{"role": "assistant", "content": None}],
    ]
    prompts = [[{"role": "user", "content": "12+7="}]] * 3
    assert reward(prompts=prompts, completions=messages, **columns) == [1.0, 0.5, 0.0]
    assert reward_function(TASKS["copying"])(["copy:ab="], ["ab"], answer=["ab"]) == [1.0]


def test_reward_function_refuses_what_it_cannot_read() -> None:
    reward = reward_function("sorting")
    with pytest.raises(
        ValueError, match=r"sorting_reward reads the column 'answer', which is missing; .*: label"
    ):
        reward(prompts=["a"], completions=["b"], label=["c"])
    with pytest.raises(ValueError, match="answer must be 2 rows long, got 1"):
        reward(prompts=["a", "a"], completions=["b", "b"], answer=["c"])
    with pytest.raises(ValueError, match="prompts must be 1 rows long, got 0"):
        reward(prompts=[], completions=["b"], answer=["c"])
    for field, call in (
        ("answer", {"prompts": ["a"], "completions": ["b"], "answer": [19]}),
        ("completions", {"prompts": ["a"], "completions": [[]], "answer": ["c"]}),
        ("prompts", {"prompts": [None], "completions": ["b"], "answer": ["c"]}),
    ):
        with pytest.raises(TypeError, match=f"{field} must be texts or lists of messages"):
            reward(**call)
    with pytest.raises(ValueError, match="task 'sort' is unknown"):
        reward_function("sort")


def test_win_rate() -> None:
    assert win_rate([1.0, 0.0, 0.5, 0.7], [0.0, 1.0, 0.5, 0.2]) == (1 + 0 + 0.5 + 1) / 4
    assert win_rate([1, 1], [1, 1]) == 0.5
    first, second = [0.1, 0.9, 0.4], [0.3, 0.2, 0.4]
    assert win_rate(first, second) + win_rate(second, first) == 1.0
    with pytest.raises(ValueError, match="rewards_a must be at least one row"):
        win_rate([], [])
    with pytest.raises(ValueError, match="rewards_b must be 1 rows long, got 2"):
        win_rate([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="rewards_b must be numbers, got 'NaN in row 1'"):
        win_rate([1.0, 1.0], [1.0, float("nan")])


def test_tasks_and_their_names() -> None:
    assert EMBEDDED == ("addition", "copying", "docstring", "sorting")
    assert all(task.name == name for name, task in TASKS.items())
    with pytest.raises(TypeError):
        TASKS["mine"] = TASKS["addition"]  # type: ignore[index]
