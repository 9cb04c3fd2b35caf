"""Settings that may differ between tensors and between parents, and their value for one tensor.

A setting is a number; a list of numbers, anchors that are interpolated linearly over the layers; or a list of
{filter, value}, of which the first whose filter fits the tensor's name counts. These are mergekit's forms and
its rules, so that its files mean the same here: a filter without wildcards fits wherever it occurs in the
name.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, cast

from ..core.checks import check, from_text

Setting: TypeAlias = float | list[float] | list[dict[str, Any]]
_LAYER = re.compile(r"^(.*?\.)?(\d+)\.")


def setting(
    default: Any = dataclasses.MISSING,
    *,
    rule: str = "a finite number",
    fits: Callable[[float], bool] = math.isfinite,
    per_parent: bool = False,
) -> Any:
    """Return the dataclass field of a setting that may differ between tensors.

    Args:
        default: Its default; left out, the setting is required.
        rule: What is accepted, to be read after "must be".
        fits: Whether a number is accepted.
        per_parent: Whether each parent may have a value of its own.
    """
    metadata = {"setting": True, "rule": rule, "fits": fits, "per_parent": per_parent}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def checked(name: str, value: object, field: dataclasses.Field[Any]) -> Setting:
    """Return a setting with number-like text as numbers.

    Raises:
        ValueError: It has none of the three forms, or a number is outside the range; the text names it.
    """
    if isinstance(value, dict):  # mergekit takes one condition without the brackets
        value = [value]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [_condition(name, item, field) for item in cast("list[dict[str, Any]]", value)]
    if isinstance(value, list):
        check(bool(value), name, value, "a number, a list of anchors, or a list of {filter, value}")
        return [_number(name, item, field) for item in cast("list[object]", value)]
    return _number(name, value, field)


def _condition(name: str, item: dict[str, Any], field: dataclasses.Field[Any]) -> dict[str, Any]:
    unknown = sorted(set(item) - {"filter", "value"})
    check(not unknown and "value" in item, name, item, "made of 'filter' and 'value'")
    text = item.get("filter")
    check(text is None or isinstance(text, str), f"{name}.filter", text, "text")
    value = checked(name, item["value"], field)
    nested = isinstance(value, list) and isinstance(value[0], dict)
    check(not nested, f"{name}.value", item["value"], "a number or a list of anchors")
    return {"filter": text, "value": value}


def _number(name: str, value: object, field: dataclasses.Field[Any]) -> float:
    number = from_text(value, float)
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    check(plain and field.metadata["fits"](number), name, value, field.metadata["rule"])
    return float(cast(float, number))


def resolve(value: Setting, name: str, position: float) -> float | None:
    """Return a setting's value for one tensor, or None where no filter fits its name.

    Args:
        value: The setting, checked.
        name: The tensor's key.
        position: Its place among the layers, 0 for the first and 1 for the last.
    """
    if not isinstance(value, list):
        return value
    if isinstance(value[0], dict):
        conditions = cast("list[dict[str, Any]]", value)
        found = next((item["value"] for item in conditions if _fits(item["filter"], name)), None)
        return None if found is None else resolve(found, name, position)
    anchors = cast("list[float]", value)
    place = position * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 1)
    high = min(low + 1, len(anchors) - 1)
    share = place - low
    return (1.0 - share) * anchors[low] + share * anchors[high]


def _fits(pattern: str | None, name: str) -> bool:
    if pattern is None:
        return True
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern in name


def positions(names: Iterable[str]) -> dict[str, float]:
    """Return the place of each tensor among the layers of its stack, in [0, 1].

    The layer is the first number between dots in the name. Tensors outside the layers have 0, and those of an
    only layer 1, as in mergekit.
    """
    layers: dict[str, tuple[str, int]] = {}
    deepest: dict[str, int] = defaultdict(int)
    names = list(names)
    for name in names:
        match = _LAYER.match(name)
        if match:
            stack, index = match[1] or "", int(match[2])
            layers[name] = (stack, index)
            deepest[stack] = max(deepest[stack], index)
    found = dict.fromkeys(names, 0.0)
    for name, (stack, index) in layers.items():
        found[name] = index / deepest[stack] if deepest[stack] else 1.0
    return found


def numbers(value: Setting) -> Iterator[float]:
    """Yield every number that a setting holds."""
    for item in cast("Sequence[Any]", value if isinstance(value, list) else [value]):
        if isinstance(item, dict):
            yield from numbers(item["value"])
        else:
            yield item
