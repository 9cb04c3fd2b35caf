"""Files that come with the package: `embedded:NAME` stands for the folder NAME beside this file."""

from __future__ import annotations

from pathlib import Path

from ..core.checks import refuse_unknown

PREFIX = "embedded:"
_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the sorted names of the embedded models, each with its prefix."""
    return sorted(PREFIX + path.parent.name for path in _FOLDER.glob("*/config.json"))


def resolve(name: str) -> str:
    """Return the installed folder of an embedded model, and any other name as it is.

    Args:
        name: `embedded:NAME`, or anything that `from_pretrained` takes.

    Raises:
        ValueError: There is no embedded model of that name; close matches are offered.
    """
    if not name.startswith(PREFIX):
        return name
    if name not in names():
        refuse_unknown("model_name_or_path", name, names())
    return str(_FOLDER / name.removeprefix(PREFIX))
