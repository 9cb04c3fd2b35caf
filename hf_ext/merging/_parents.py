"""From names to checkpoints: local folders, or snapshots of the Hub."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.checks import check
from ._base import MergeMethod, Setting
from ._checkpoint import Checkpoint
from ._config import MergeConfig, split_revision

# What a merge reads: never code, and no pickles.
_PATTERNS = [
    "*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.py",
    "additional_chat_templates/*",
]  # fmt: skip


@dataclass(frozen=True)
class Parents:
    """The checkpoints of a merge.

    Args:
        models: In order.
        base: The base, or None; it may be one of the models.
        side: Where side files come from.
        own: Each model's own settings of the method.
        names: What the user called each model.
    """

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    side: Checkpoint
    own: tuple[dict[str, Setting], ...]
    names: tuple[str, ...]

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint that the output is like: the base, or the first model."""
        return self.base if self.base is not None else self.models[0]

    def all(self) -> list[Checkpoint]:
        """Return each checkpoint once, the reference first."""
        found = [self.reference, *self.models, self.side]
        return [model for index, model in enumerate(found) if model not in found[:index]]

    def close(self) -> None:
        """Close all files."""
        for checkpoint in self.all():
            checkpoint.close()


def open_parents(config: MergeConfig, method: MergeMethod) -> Parents:
    """Find and open what a merge reads; no weight is read yet.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        ValueError: A folder cannot be used; the text says why.
    """
    opened: dict[tuple[str, str | None], Checkpoint] = {}

    def checkpoint(name: str, revision: str | None) -> Checkpoint:
        plain, tail = split_revision(name, revision)
        key = (os.path.realpath(plain) if Path(plain).is_dir() else plain, tail)
        if key not in opened:
            opened[key] = _open(plain, tail)
        return opened[key]

    base = None if config.base_model is None else checkpoint(config.base_model, None)
    models: list[Checkpoint] = []
    own: list[dict[str, Setting]] = []
    names: list[str] = []
    for parent in config.models:
        model = checkpoint(parent.model, parent.revision)
        if model is base and not method.base_is_parent:
            # In mergekit's files the base often stands among the models; its task vector is zero.
            if parent.parameters:
                warnings.warn(f"{parent.model} is the base: it has no vote, and is dropped", stacklevel=2)
            continue
        if model in models:
            warnings.warn(f"{parent.model} is given twice", stacklevel=2)
        models.append(model)
        own.append(method.parse_parent(parent.parameters, f"models: {parent.model}"))
        names.append(parent.model)
    if base is not None and method.base_is_first:
        place = models.index(base) if base in models else None
        first = ({}, config.base_model or "") if place is None else (own.pop(place), names.pop(place))
        if place is not None:
            models.pop(place)
        models, own, names = [base, *models], [first[0], *own], [first[1], *names]
    needs = f"given, since {method.info.name} merges what differs from a base"
    check(bool(models), "models", [parent.model for parent in config.models], "others than the base")
    is_adapters = all(model.is_adapter for model in models)
    check(base is not None or not method.needs_base or is_adapters, "base_model", None, needs)
    return Parents(tuple(models), base, _side(config, base, models, checkpoint), tuple(own), tuple(names))


def _side(
    config: MergeConfig, base: Checkpoint | None, models: Sequence[Checkpoint], find: object
) -> Checkpoint:
    source = config.tokenizer_source
    reference = base if base is not None else models[0]
    if source is None:
        return reference
    if source == "base":
        check(base is not None, "tokenizer_source", source, "a model, where there is no base_model")
        return reference
    check(
        source != "union",
        "tokenizer_source",
        source,
        "'base' or one of the models: vocabularies are not joined",
    )
    chosen = find(source, None)  # pyright: ignore[reportCallIssue]
    check(chosen is base or chosen in models, "tokenizer_source", source, "'base' or one of the models")
    return chosen


def _open(name: str, revision: str | None) -> Checkpoint:
    if Path(name).is_dir():
        check(revision is None, "revision", revision, "left out for a folder", where=name)
        return Checkpoint(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise FileNotFoundError(f"{name}: there is no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        at = f" at {revision}" if revision else ""
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name}{at} is neither a folder nor to be had from the Hub: {reason}"
        ) from error
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    return Checkpoint(folder, name, commit)
