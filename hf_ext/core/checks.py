"""One shape of error for every setting: field, rule, given value, and close matches for names."""

from __future__ import annotations

import difflib
import importlib.util
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

_INSTALL = "pip install 'hf-ext[{extra}]'"


def check(condition: bool, field: str, value: object, rule: str, *, where: str = "") -> None:
    """Raise a ValueError naming the field, its rule and the given value unless the condition holds.

    Args:
        condition: Whether the value is accepted.
        field: Name of the setting, as the user typed it.
        value: What was given.
        rule: What is accepted, to be read after "must be".
        where: Module, tensor or file that the rule comes from; empty for none.

    Raises:
        ValueError: The condition is false.
    """
    if not condition:
        place = f" ({where})" if where else ""
        raise ValueError(f"{field} must be {rule}, got {value!r}{place}")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'a' or 'b'?" for the close matches of a name, or "" where there are none."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def refuse_unknown(field: str, name: str, known: Iterable[str]) -> NoReturn:
    """Raise the ValueError for a name that is not among the known ones, with close matches."""
    known = sorted(known)
    raise ValueError(
        f"{field} {name!r} is unknown{suggest(name, known)} Known: {', '.join(known) or 'none'}."
    )


def check_choice(field: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ValueError with close matches unless the value is one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        hint = suggest(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"{field} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def require(module: str, *, extra: str) -> types.ModuleType:
    """Import an optional package, or raise an ImportError that holds the install command.

    Args:
        module: Import name of the package (not its distribution name).
        extra: The extra of this distribution that brings it.

    Raises:
        ImportError: The package is not installed.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ImportError(f"{module} is not installed; install it with: {_INSTALL.format(extra=extra)}")
    return importlib.import_module(module)


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is not None:
        return isinstance(origin, type) and isinstance(value, _stand_in(origin)) and _holds(value, arguments)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:  # a YAML or JSON integer is a float that happens to be whole
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _holds(value: Any, arguments: tuple[Any, ...]) -> bool:
    if isinstance(value, Mapping) and len(arguments) == 2:
        return all(_fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items())
    if isinstance(value, list | set) and len(arguments) == 1:
        return all(_fits(item, arguments[0]) for item in value)
    return True


def _stand_in(origin: type) -> type | tuple[type, ...]:
    # Files have lists where Python code has sets and tuples.
    return (list, set, tuple) if origin in (list, set, tuple, frozenset) else origin


def _spell(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return "nothing" if hint is type(None) else hint.__name__
    return str(hint).replace("typing.", "").replace("Optional", "optional ")


def from_text(value: object, hint: Any) -> object:
    """Return a number for text that spells one where the field is a number: YAML 1.1 reads 1e-3 as text."""
    wanted = typing.get_args(hint) or (hint,)
    if isinstance(value, str) and str not in wanted:
        for kind in (int, float):
            if kind in wanted:
                try:
                    return kind(value)
                except ValueError:
                    continue
    return value


def check_fields(
    given: Mapping[str, object], hints: Mapping[str, Any], *, where: str, prefix: str = ""
) -> dict[str, object]:
    """Check names and types of settings from a file, and return them with number-like text as numbers.

    Args:
        given: Settings as read from the file.
        hints: Accepted names with their type annotations.
        where: The file, for the error text.
        prefix: Put before each name in an error, such as "adapter.".

    Returns:
        The settings, each with the type its field has.

    Raises:
        ValueError: A name is unknown (close matches are offered).
        TypeError: A value does not have its field's type.
    """
    checked: dict[str, object] = {}
    for name, value in given.items():
        if name not in hints:
            raise ValueError(f"{where}: unknown field {prefix}{name!r}{suggest(str(name), hints)}")
        checked[name] = from_text(value, hints[name])
        if not _fits(checked[name], hints[name]):
            spelled = _spell(hints[name])
            raise TypeError(
                f"{where}: {prefix}{name} must be {spelled}, got {type(value).__name__} {value!r}"
            )
    return checked
