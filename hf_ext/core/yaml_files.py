"""Files of settings in YAML: the safe loader, and a key that stands twice is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, which by itself lets the second of two equal keys win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise ValueError(f"{key!r} stands twice (line {node.value[index][0].start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Return the settings that a file holds.

    Args:
        path: The file.
        what: What it is to be, such as "recipe", for error texts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no YAML mapping, or a key stands twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such {what}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is not a valid {what}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(content).__name__}")
    return content
