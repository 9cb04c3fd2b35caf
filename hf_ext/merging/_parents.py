"""From names to checkpoints: local folders, or snapshots of the Hub."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..core.checks import check
from ._base import MergeMethod, Setting
from ._checkpoint import Checkpoint
from ._config import MergeConfig, ParentConfig, SliceConfig, SourceConfig, split_revision

# What a merge reads: never code, and no pickles.
_PATTERNS = [
    "*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.py",
    "additional_chat_templates/*",
]  # fmt: skip


Find: TypeAlias = Callable[[str, str | None], Checkpoint]


@dataclass(frozen=True)
class Parent:
    """A model in its part of a merge.

    Args:
        model: The checkpoint.
        own: Its own settings of the method.
        name: What the user called it.
        layers: First of its layers that are taken, and the one after the last; None for all.
    """

    model: Checkpoint
    own: dict[str, Setting]
    name: str
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """Some layers of the output.

    Args:
        where: Its place in the file.
        parents: What the layers are made of.
        base: What task vectors are taken from, or the first model of a method that has one; None for none.
        shared: The settings of the slice.
    """

    where: str
    parents: tuple[Parent, ...]
    base: Parent | None
    shared: dict[str, Setting]

    @property
    def length(self) -> int:
        """Number of layers."""
        start, stop = self.parents[0].layers or (0, 0)
        return stop - start


@dataclass(frozen=True)
class Parents:
    """The checkpoints of a merge.

    Args:
        models: In order.
        base: The base, or None; it may be one of the models.
        side: Where side files come from.
        own: Each model's own settings of the method.
        names: What the user called each model.
        slices: What the output's layers are made of; empty where whole models are merged.
    """

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    side: Checkpoint
    own: tuple[dict[str, Setting], ...]
    names: tuple[str, ...]
    slices: tuple[Slice, ...] = ()

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint that the output is like: the base, or the first model."""
        return self.base if self.base is not None else self.models[0]

    def all(self) -> list[Checkpoint]:
        """Return each checkpoint once, the reference first."""
        bases = [one.base.model for one in self.slices if one.base is not None]
        found = [self.reference, *self.models, *bases, self.side]
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

    if config.slices:
        return _of_slices(config, method, checkpoint)
    base = None if config.base_model is None else checkpoint(config.base_model, None)
    given = _given(config.models, method, checkpoint, "models")
    of_base = None if base is None else Parent(base, {}, config.base_model or "")
    given = _arranged(given, of_base, method)
    models = [one.model for one in given]
    needs = f"given, since {method.info.name} merges what differs from a base"
    check(bool(models), "models", [parent.model for parent in config.models], "others than the base")
    is_adapters = all(model.is_adapter for model in models)
    check(base is not None or not method.needs_base or is_adapters, "base_model", None, needs)
    side = _side(config, base, models, checkpoint)
    own, names = tuple(one.own for one in given), tuple(one.name for one in given)
    return Parents(tuple(models), base, side, own, names)


def _given(models: Sequence[ParentConfig], method: MergeMethod, find: Find, where: str) -> list[Parent]:
    found: list[Parent] = []
    for parent in models:
        layers: tuple[int, int] | None = None
        if isinstance(parent, SourceConfig):
            layers = (parent.layer_range[0], parent.layer_range[1])
        own = method.parse_parent(parent.parameters, f"{where}: {parent.model}")
        found.append(Parent(find(parent.model, parent.revision), own, parent.model, layers))
    return found


def _arranged(given: Sequence[Parent], base: Parent | None, method: MergeMethod) -> list[Parent]:
    """Return the parents without the base or with it at the start, as the method wants it."""
    found: list[Parent] = []
    for one in given:
        if base is not None and one.model is base.model and not method.base_is_parent:
            # In mergekit's files the base often stands among the models; its task vector is zero.
            if one.own:
                warnings.warn(f"{one.name} is the base: it has no vote, and is dropped", stacklevel=4)
            continue
        if any(one.model is other.model and one.layers == other.layers for other in found):
            warnings.warn(f"{one.name} is given twice", stacklevel=4)
        found.append(one)
    if base is not None and method.base_is_first:
        first = next((one for one in found if one.model is base.model), base)
        found = [first, *(one for one in found if one is not first)]
    return found


def _of_slices(config: MergeConfig, method: MergeMethod, find: Find) -> Parents:
    base = None if config.base_model is None else find(config.base_model, None)
    slices = tuple(
        _slice(one, f"slices[{number}]", one.base_model or config.base_model, method, find)
        for number, one in enumerate(config.slices)
    )
    if base is None and slices[0].base is not None:
        base = slices[0].base.model
    every = [parent for one in slices for parent in one.parents]
    distinct = [one for number, one in enumerate(every) if one.model not in [o.model for o in every[:number]]]
    models = tuple(one.model for one in distinct)
    adapters = [model.label for model in (*models, *([base] if base else [])) if model.is_adapter]
    check(not adapters, "slices", adapters, "made of models, not of adapters")
    side = _side(config, base, models, find)
    return Parents(models, base, side, ({},) * len(models), tuple(one.name for one in distinct), slices)


def _slice(config: SliceConfig, where: str, base: str | None, method: MergeMethod, find: Find) -> Slice:
    given = _given(config.sources, method, find, f"{where}.sources")
    found: Parent | None = None
    if base is not None and (method.needs_base or method.base_is_first):
        model = find(base, None)
        among = [one for one in given if one.model is model]
        rule = (
            "once among the slice's sources, with its layer_range, or left out where theirs are all the same"
        )
        ranges = {one.layers for one in given}
        check(len(among) == 1 or (not among and len(ranges) == 1), f"{where}.base_model", base, rule)
        found = among[0] if among else Parent(model, {}, base, given[0].layers)
    needs = f"given, since {method.info.name} merges what differs from a base"
    check(found is not None or not method.needs_base, f"{where}.base_model", None, needs)
    parents = _arranged(given, found, method)
    check(bool(parents), f"{where}.sources", [one.name for one in given], "others than the base")
    shared = method.parse_shared(config.parameters, f"{where}.parameters")
    return Slice(where, tuple(parents), found, shared)


def _side(
    config: MergeConfig, base: Checkpoint | None, models: Sequence[Checkpoint], find: Find
) -> Checkpoint:
    source = config.tokenizer_source
    reference = base if base is not None else models[0]
    if source in (None, "union"):  # vocabularies that are merged are equal, so that each is their union
        return reference
    if source == "base":
        check(base is not None, "tokenizer_source", source, "a model, where there is no base_model")
        return reference
    chosen = find(source, None)
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
