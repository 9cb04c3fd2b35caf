"""Scaffold a method: a source file that works, its test, and its page.

Run: make new kind=adapter name=foo   (or: python scripts/new_method.py adapter foo, then `make sync`)

What is written is a complete method, the plain low-rank update, so that its tests pass from the first minute;
each place that is yours to fill says REPLACE.
"""

from __future__ import annotations

import argparse
import keyword
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).resolve().parent / "templates"

sys.path.insert(0, str(ROOT))  # the tree that this script stands in, not an installed copy

from hf_ext.core.registry import FOLDERS  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Write the three files of a new method; 2 and one line on stderr where that is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", help=", ".join(FOLDERS))
    parser.add_argument("name", help="lower-case identifier; also the name of the files")
    arguments = parser.parse_args(argv)
    try:
        written = scaffold(arguments.kind, arguments.name)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"new_method: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"wrote {path.relative_to(ROOT)}")
    print(f"next: make sync; pytest -k {arguments.name}; then search the three files for REPLACE")
    return 0


def scaffold(kind: str, name: str) -> list[Path]:
    """Write a method's source, test and page, and return their paths.

    Args:
        kind: One of `FOLDERS`.
        name: The method's name.

    Raises:
        ValueError: The kind is unknown, or the name is no lower-case identifier or is taken.
        FileNotFoundError: The kind has no base module yet, so that a method of it could not work.
        FileExistsError: A file of that name exists.
    """
    from hf_ext.core.checks import check_choice
    from hf_ext.core.files import write_bytes

    check_choice("kind", kind, FOLDERS)
    _check_name(name)
    folder = FOLDERS[kind]
    base = ROOT / "hf_ext" / folder / "_base.py"
    if not base.exists():
        raise FileNotFoundError(
            f"kind {kind!r} has no base module yet: write hf_ext/{folder}/_base.py first, and templates for "
            f"it in scripts/templates/{kind}"
        )
    if not (TEMPLATES / kind).is_dir():
        raise FileNotFoundError(f"kind {kind!r} has no templates: write them in scripts/templates/{kind}")
    targets = {
        "method.py.tmpl": ROOT / "hf_ext" / folder / f"{name}.py",
        "test.py.tmpl": ROOT / "tests" / folder / f"test_{name}.py",
        "page.md.tmpl": ROOT / "docs" / "methods" / f"{name}.md",
    }
    for path in targets.values():
        if path.exists():
            raise FileExistsError(f"{path.relative_to(ROOT)} exists; choose another name or remove it")
    words = {"name": name, "Name": class_stem(name), "title": name.replace("_", " ")}
    # All are filled before any is written: a fault in a template leaves nothing behind.
    texts = {path: _filled(TEMPLATES / kind / template, words) for template, path in targets.items()}
    for path, text in texts.items():
        write_bytes(path, text.encode())
    return list(texts)


def class_stem(name: str) -> str:
    """Return the CamelCase form that class names start with."""
    return "".join(part.capitalize() for part in name.split("_"))


def _check_name(name: str) -> None:
    from hf_ext._methods import METHODS
    from hf_ext.core.checks import check

    plain = name.isidentifier() and name.isascii() and name.islower() and not keyword.iskeyword(name)
    check(plain and name.strip("_") == name, "name", name, "a lower-case identifier")
    taken = {row.name: row.kind for row in METHODS}
    check(name not in taken, "name", name, "one that no method has", where=f"taken by the {taken.get(name)}")
    from peft import PeftType

    check(name.upper() not in PeftType.__members__, "name", name, "one that PEFT has no type of")


def _filled(template: Path, words: Mapping[str, str]) -> str:
    text = template.read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    return text


if __name__ == "__main__":
    sys.exit(main())
