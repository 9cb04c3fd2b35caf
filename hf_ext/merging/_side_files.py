"""What stands beside the weights: config, generation settings, tokenizer, templates and processors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.files import read_json, write_json
from ._checkpoint import Checkpoint

_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)  # fmt: skip
_PATTERNS = ("*.model", "*.tiktoken", "additional_chat_templates/*.jinja")
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def side_files(source: Checkpoint) -> list[str]:
    """Return the files to carry over, by their names relative to the folder.

    Raises:
        ValueError: A file is a link out of the folder.
        FileNotFoundError: A module that config.json names is missing.
    """
    found = [name for name in _FILES if (source.folder / name).exists()]
    for pattern in _PATTERNS:
        found += sorted(str(path.relative_to(source.folder)) for path in source.folder.glob(pattern))
    found += sorted(_modules(source.config))
    for name in found:
        source._inside(name)
    return found


def _modules(config: dict[str, Any]) -> set[str]:
    # Code that the config names is copied as a file; nothing here runs it.
    mapping = config.get("auto_map")
    names: set[str] = set()
    for value in mapping.values() if isinstance(mapping, dict) else ():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and "--" not in item and "." in item:
                module = item.rpartition(".")[0]
                if not module.replace("_", "").isalnum():
                    raise ValueError(
                        f"config.json: auto_map names {item!r}, which is no module of the folder"
                    )
                names.add(f"{module}.py")
    return names


def copy_side_files(
    source: Checkpoint, folder: Path, dtype: str | None, changed: Mapping[str, Any] | None = None
) -> list[str]:
    """Copy the side files and write config.json with the type of the weights; return their names.

    Args:
        source: Where they come from.
        folder: The output.
        dtype: Type of the merged float tensors as safetensors spells it; None where it is mixed.
        changed: What config.json says instead of the source's; None for that.

    Raises:
        OSError: A file cannot be copied.
    """
    names = side_files(source)
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / name, target)
    if (source.folder / "config.json").is_file():
        config = read_json(source.folder / "config.json") if changed is None else dict(changed)
        if dtype is not None:
            # Older readers know it by its earlier name only; both in one file may not contradict each other.
            keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
            config.update(dict.fromkeys(keys, _NAMES[dtype]))
        write_json(folder / "config.json", config)
        names.append("config.json")
    return names


def dtype_of(dtypes: Iterator[str]) -> str | None:
    """Return the only type of the float tensors, or None where there are several."""
    kinds = set(dtypes) & set(_NAMES)
    return kinds.pop() if len(kinds) == 1 else None
