"""Vocabularies of saved tokenizers, and embeddings and heads whose rows are matched by their tokens.

A token that a model lacks gets there the row of the only model that has it, or else that of the base, or
else the mean of those that have it: the rules of mergekit's `tokenizer_source`. Rows that no token stands
for, which pad an embedding, are those of the model that the vocabulary is of.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.files import read_json
from ._checkpoint import Checkpoint, Entry
from ._operands import Stored, Workspace

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
# Further tensors with a row for each token, by the end of their names, a whole name with a dot before it.
_ROWS = (
    *(".shared.weight", ".tok_embeddings.weight", ".embeddings.weight", ".embed_tokens_per_layer.weight"),
    *(".lm_head.weight", ".lm_head.bias", ".lm_head.decoder.weight", ".lm_head.decoder.bias"),
    *(".predictions.bias", ".predictions.decoder.weight", ".predictions.decoder.bias"),
)
# Where a size that is that of the vocabulary by chance is no sign of rows of tokens.
_ELSEWHERE = re.compile(r"\.(layers?|h|blocks?)\.\d+\.|norm|\bln_|_ln\b|position|\bwpe\b", re.IGNORECASE)
_MEAN = -1  # in the place of a model's number


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Return the number of each token of a saved tokenizer, or None where the folder has none to read.

    Raises:
        ValueError: A tokenizer file is damaged.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        try:
            return _of_tokenizer(content)
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error
    if (folder / "vocab.json").is_file():
        content = read_json(folder / "vocab.json")
        return {**content, **_added(folder)} if isinstance(content, dict) else None
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return {**{token: number for number, token in enumerate(lines)}, **_added(folder)}
    return None


def _added(folder: Path) -> dict[str, int]:
    """Return the tokens that were added to a tokenizer without a tokenizer.json."""
    plain, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    try:
        found = {token: int(number) for token, number in read_json(plain).items()} if plain.is_file() else {}
        more = read_json(config).get("added_tokens_decoder") if config.is_file() else None
        return found | {item["content"]: int(number) for number, item in (more or {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the added tokens in {folder} cannot be read: {error!r}") from error


def _of_tokenizer(content: Any) -> dict[str, int]:
    held = content["model"]["vocab"]
    tokens = {item[0]: number for number, item in enumerate(held)} if isinstance(held, list) else dict(held)
    tokens.update({item["content"]: item["id"] for item in content.get("added_tokens") or []})
    return tokens


@dataclass(frozen=True, eq=False)
class Matched:
    """Models whose rows of the vocabulary are taken in the order of one model's tokens.

    Args:
        models: The checkpoints.
        entries: Each one's tensors by output key, as they are stored.
        names: The tensors whose rows are tokens.
        rows: Number of rows of the output.
        of: For each model, the number of the model that each row is read from, or `_MEAN`.
        at: For each model, the row there.
        ends: For each model, the row after the last one that lies behind a row in the same model.
        means: For each row that is a mean, the models and rows that it is the mean of.
    """

    models: Sequence[Checkpoint]
    entries: Sequence[Mapping[str, Entry]]
    names: frozenset[str]
    rows: int
    of: Sequence[list[int]]
    at: Sequence[list[int]]
    ends: Sequence[list[int]]
    means: Mapping[int, Sequence[tuple[int, int]]]

    def operand(self, number: int, name: str) -> MatchedRows:
        """Return a tensor of a model with the output's rows."""
        stored = [Stored(model, own[name]) for model, own in zip(self.models, self.entries, strict=True)]
        shape = (self.rows, *stored[number].entry.shape[1:])
        entry = replace(stored[number].entry, shape=shape)
        return MatchedRows(entry, tuple(stored), number, self)

    def seen(self) -> list[dict[str, Entry]]:
        """Return each model's tensors with the shapes that they have in the output."""
        return [
            {
                name: replace(entry, shape=(self.rows, *entry.shape[1:])) if name in self.names else entry
                for name, entry in own.items()
            }
            for own in self.entries
        ]

    def digest(self) -> str:
        """Return what tells these rows from others."""
        content = [self.rows, self.of, self.at, sorted(self.means.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class MatchedRows:
    """A model's embedding or head with the rows of another vocabulary.

    Args:
        entry: What it looks like: the model's own entry with the output's shape.
        stored: The tensor in every model.
        number: The model's.
        matched: Where the rows are.
    """

    entry: Entry
    stored: tuple[Stored, ...]
    number: int
    matched: Matched

    @property
    def label(self) -> str:
        """Name of the model."""
        return self.stored[self.number].label

    def read(self, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
        """Fill `out` (fp32, flat) with the elements start .. stop - 1."""
        width = self.entry.numel // self.entry.shape[0]
        of, at, ends = (one[self.number] for one in (self.matched.of, self.matched.at, self.matched.ends))
        place = start
        while place < stop:
            row, inside = divmod(place, width)
            end = min(stop, ends[row] * width)
            part = out[place - start : end - start]
            if of[row] == _MEAN:
                self._mean(row, inside, part, workspace)
            else:
                begin = at[row] * width + inside
                self.stored[of[row]].read(begin, begin + end - place, part, workspace)
            place = end

    def _mean(self, row: int, inside: int, out: Tensor, workspace: Workspace) -> None:
        width, count = self.entry.numel // self.entry.shape[0], out.numel()
        out.zero_()
        more = workspace.take("matched row", count)
        for number, at in self.matched.means[row]:
            begin = at * width + inside
            self.stored[number].read(begin, begin + count, more, workspace)
            out.add_(more)
        out.div_(len(self.matched.means[row]))


def match(
    models: Sequence[Checkpoint],
    entries: Sequence[Mapping[str, Entry]],
    source: int,
    base: int | None,
    problems: list[str],
) -> Matched | None:
    """Return the models with the vocabulary of one of them, or None where all have it.

    Args:
        models: The checkpoints.
        entries: Each one's tensors by output key.
        source: Number of the model whose vocabulary the output has.
        base: Number of the base, or None.
        problems: Why the tokens cannot be matched is added to it.
    """
    found = [vocabulary(model.folder) for model in models]
    names = frozenset(name for own in entries for name in own if _has_rows(name))
    rows = [sorted({own[name].shape[0] for name in names if name in own}) for own in entries]
    alike = all(one == found[source] for one in found)
    if alike and all(one == rows[source] for one in rows):
        return None
    if not names:
        problems.append(f"tokens cannot be matched: no embedding is known in {models[source].label}")
        return None
    lacking = [model.label for model, one in zip(models, found, strict=True) if one is None]
    if lacking:
        problems.append(f"tokens cannot be matched without a tokenizer, which is not in {', '.join(lacking)}")
    uneven = [model.label for model, one in zip(models, rows, strict=True) if len(one) != 1]
    if uneven:
        problems.append(
            f"tokens cannot be matched where embedding and head have unlike rows: {', '.join(uneven)}"
        )
    unknown = [] if uneven else _unknown(entries, names, [one[0] for one in rows])
    if unknown:
        problems.append(
            f"tokens cannot be matched: whether {', '.join(unknown)} has a row for each token is not known"
        )
    if lacking or uneven or unknown:
        return None
    return _matched(models, entries, names, [one or {} for one in found], [r[0] for r in rows], source, base)


def _has_rows(name: str) -> bool:
    return name in HEADS or name.endswith(EMBEDDINGS) or f".{name}".endswith(_ROWS)


def _unknown(entries: Sequence[Mapping[str, Entry]], names: frozenset[str], rows: Sequence[int]) -> list[str]:
    """Return the tensors that may have something for each token, and are not among the known ones."""
    held = {name for own in entries for name in own} - names
    suspect = (name for name in sorted(held) if not _ELSEWHERE.search(f".{name}"))
    each = list(zip(entries, rows, strict=True))
    return [name for name in suspect if all(count in own[name].shape for own, count in each if name in own)]


def _matched(
    models: Sequence[Checkpoint],
    entries: Sequence[Mapping[str, Entry]],
    names: frozenset[str],
    found: Sequence[Mapping[str, int]],
    rows: Sequence[int],
    source: int,
    base: int | None,
) -> Matched:
    count = rows[source]
    of: list[list[int]] = [[] for _ in models]
    at: list[list[int]] = [[] for _ in models]
    tokens = {number: token for token, number in found[source].items()}
    means: dict[int, list[tuple[int, int]]] = {}
    lacked = [0] * len(models)
    for row in range(count):
        token = tokens.get(row)
        has: dict[int, int] = {source: row}
        for number, (own, limit) in enumerate(zip(found, rows, strict=True)):
            if token is not None and number != source and own.get(token, limit) < limit:
                has[number] = own[token]
        default = next(iter(has)) if len(has) == 1 else base if base in has else _MEAN
        assert default is not None
        for number in range(len(models)):
            taken = number if number in has else default
            of[number].append(taken)
            at[number].append(has.get(taken, 0))
            lacked[number] += number not in has and token is not None
        if default == _MEAN and len(has) < len(models):
            means[row] = sorted(has.items())
    for model, lacks in zip(models, lacked, strict=True):
        if lacks:
            text = f"{model.label} lacks {lacks} of the {len(found[source])} tokens of {models[source].label}"
            warnings.warn(f"{text}: it gets their rows from models that have them", stacklevel=2)
    ends = [_ends(*pair) for pair in zip(of, at, strict=True)]
    return Matched(models, entries, names, count, of, at, ends, means)


def _ends(of: Sequence[int], at: Sequence[int]) -> list[int]:
    ends = list(range(1, len(of) + 1))
    for row in range(len(of) - 2, -1, -1):
        if of[row] == of[row + 1] != _MEAN and at[row] + 1 == at[row + 1]:
            ends[row] = ends[row + 1]
    return ends
