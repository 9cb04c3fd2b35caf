"""What a method is and what its fields mean, read from its registry row and its docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

from ..core import registry
from ..core.checks import refuse_unknown

_ENTRY = re.compile(r"^ {4}(\w+): (.*)$")


def argument_docs(cls: type) -> dict[str, str]:
    """Return the text of each argument from the Google-style docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        found.update(_arguments(inspect.cleandoc(owner.__dict__.get("__doc__") or "")))
    return found


def _arguments(doc: str) -> Iterator[tuple[str, str]]:
    _, _, block = doc.partition("\nArgs:\n")
    name, text = "", ""
    for line in block.split("\n"):
        if line and not line.startswith(" "):  # the next section
            break
        entry = _ENTRY.match(line)
        if entry:
            if name:
                yield name, text
            name, text = entry[1], entry[2]
        elif name and line.strip():
            text = f"{text} {line.strip()}"
    if name:
        yield name, text


def find(name: str) -> registry.MethodInfo:
    """Return a method's row, of whatever kind.

    Raises:
        ValueError: There is no such method; close matches are offered.
    """
    from .. import adapters, callbacks, merging  # noqa: F401 (they register)

    rows = {row.name: row for row in registry.methods()}
    if name not in rows:
        refuse_unknown("method", name, rows)
    return rows[name]


def describe(name: str) -> str:
    """Return everything that is known of a method, as text for a terminal.

    Raises:
        ValueError: There is no such method.
    """
    row = find(name)
    lines = [f"{row.name} ({row.kind}): {row.summary}"]
    lines += [f"paper: {row.paper}"] if row.paper else []
    lines += [f"supports: {', '.join(sorted(row.supports))}"] if row.supports else []
    lines.append(f"page: docs/methods/{row.name}.md")
    settings = row.target if row.config is None else row.config  # a callback takes its settings itself
    if isinstance(settings, type) and dataclasses.is_dataclass(settings):
        lines += ["", f"{settings.__module__.rpartition('.')[0]}.{settings.__name__}:"]
        lines += _fields(settings)
    return "\n".join(lines)


def _fields(config: type) -> Iterator[str]:
    docs = argument_docs(config)
    for f in dataclasses.fields(config):
        # PEFT's own bookkeeping fields have no entry in the docstrings of ours.
        if f.init and f.name in docs:
            default = (
                f.default
                if f.default is not dataclasses.MISSING
                else ""
                if f.default_factory is dataclasses.MISSING
                else f.default_factory()
            )
            yield f"  {f.name} = {default!r}"
            yield f"      {docs[f.name]}"
