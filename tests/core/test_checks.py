from __future__ import annotations

from typing import Any, Literal

import pytest

from hf_ext.core.checks import (
    check,
    check_choice,
    check_fields,
    from_text,
    refuse_unknown,
    require,
    suggest,
)

HINTS: dict[str, Any] = {
    "r": int,
    "lr": float,
    "name": str,
    "flag": bool,
    "alpha": float | None,
    "targets": list[str] | str | None,
    "pattern": dict[str, int],
    "mode": Literal["a", "b"],
    "anything": Any,
}


def test_check_passes_in_silence_and_else_names_field_rule_value_and_place() -> None:
    check(True, "r", 3, "at least 1")
    with pytest.raises(ValueError, match=r"^r must be at least 1, got 0$"):
        check(False, "r", 0, "at least 1")
    with pytest.raises(ValueError, match=r"^r must be at most 4, got 9 \(layers\.0\)$"):
        check(False, "r", 9, "at most 4", where="layers.0")


def test_text_is_quoted_so_that_an_empty_value_is_seen() -> None:
    with pytest.raises(ValueError, match=r"got ''$"):
        check(False, "name", "", "not empty")


def test_choice_lists_the_choices_and_the_close_one() -> None:
    check_choice("mode", "exact", ("auto", "exact"))
    with pytest.raises(
        ValueError, match=r"mode must be one of 'auto', 'exact', got 'exat'; did you mean 'exact'\?"
    ):
        check_choice("mode", "exat", ("auto", "exact"))
    with pytest.raises(ValueError, match=r"got 3$"):
        check_choice("mode", 3, ("auto", "exact"))


def test_suggestions_are_silent_where_nothing_is_close() -> None:
    assert suggest("qqqq", ["sorsa", "pissa"]) == ""
    assert suggest("sorsas", ["sorsa", "bone"]) == "; did you mean 'sorsa'?"


def test_an_unknown_name_lists_the_known_ones_sorted() -> None:
    with pytest.raises(ValueError, match=r"adapter 'q' is unknown.*Known: bone, sorsa\."):
        refuse_unknown("adapter", "q", ["sorsa", "bone"])
    with pytest.raises(ValueError, match=r"Known: none\."):
        refuse_unknown("adapter", "q", [])


def test_require_returns_the_module_itself() -> None:
    import json

    assert require("json", extra="plot") is json


def test_require_names_the_install_command_for_what_is_absent() -> None:
    with pytest.raises(ImportError, match=r"pip install 'hf-ext\[plot\]'"):
        require("a_module_that_is_not_there", extra="plot")
    with pytest.raises(ImportError, match=r"a_module_that_is_not_there\.sub is not installed"):
        require("a_module_that_is_not_there.sub", extra="tune")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 3),
        ("lr", 1),  # a whole number is a float
        ("lr", 1e-3),
        ("alpha", None),
        ("alpha", 2.0),
        ("targets", None),
        ("targets", "all-linear"),
        ("targets", ["q", "v"]),
        ("targets", {"q", "v"}),  # PEFT turns lists into sets
        ("pattern", {"q": 2}),
        ("mode", "b"),
        ("flag", True),
        ("anything", object),
    ],
)
def test_values_of_the_field_type_come_back_as_they_are(name: str, value: object) -> None:
    assert check_fields({name: value}, HINTS, where="here") == {name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", True),  # a bool is an int in Python, not in a recipe
        ("r", 1.5),
        ("r", None),
        ("lr", True),
        ("lr", "fast"),
        ("name", 3),
        ("flag", 1),
        ("flag", "yes"),
        ("targets", 3),
        ("pattern", [1]),
        ("mode", "c"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(
        TypeError, match=rf"recipe\.yaml: adapter\.{name} must be .*, got {type(value).__name__}"
    ):
        check_fields({name: value}, HINTS, where="recipe.yaml", prefix="adapter.")


def test_an_unknown_field_is_refused_with_the_close_one() -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml: unknown field 'targts'; did you mean 'targets'\?"):
        check_fields({"targts": "q"}, HINTS, where="recipe.yaml")


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("1e-3", float, 1e-3),  # YAML 1.1 reads this as text
        ("1e-3", float | None, 1e-3),
        ("12", int, 12),
        ("12", float, 12.0),
        ("12", str, "12"),
        ("12", str | int, "12"),  # a field that takes text keeps text
        ("12", int | float, 12),  # the exact one of two
        ("1.5", int | float, 1.5),
        ("x", float, "x"),
        ("1.5", int, "1.5"),  # not silently 1
        (7, float, 7),
    ],
)
def test_number_like_text_becomes_a_number_only_where_the_field_is_one(
    text: object, hint: Any, value: object
) -> None:
    found = from_text(text, hint)
    assert found == value
    assert type(found) is type(value)
