"""Whether checkpoints can be merged: all differences of names, shapes, types, vocabularies in one error."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ._checkpoint import Checkpoint, Entry
from ._operands import Stored
from ._vocabulary import EMBEDDINGS, HEADS, Matched, MatchedRows, match, vocabulary

_SHOWN = 40  # differences of one kind that a text lists


@dataclass
class Aligned:
    """The tensors of the output and where each checkpoint has them.

    Args:
        names: Keys of the output, sorted.
        entries: For each checkpoint in order, its entry by output key, with the shape of the output.
        mixed: Keys of float tensors whose type differs between checkpoints.
        models: The checkpoints.
        matched: The rows of embeddings and heads, where vocabularies differ.
    """

    names: list[str]
    entries: list[dict[str, Entry]]
    mixed: list[str] = field(default_factory=list)
    models: Sequence[Checkpoint] = ()
    matched: Matched | None = None

    def operand(self, number: int, name: str) -> Stored | MatchedRows:
        """Return a tensor of a checkpoint, to be read."""
        if self.matched is not None and name in self.matched.names:
            return self.matched.operand(number, name)
        return Stored(self.models[number], self.entries[number][name])


def align(
    models: Sequence[Checkpoint],
    *,
    untied: bool,
    dtype_given: bool,
    source: int | None = None,
    base: int | None = None,
) -> Aligned:
    """Compare checkpoints with the first one, the reference.

    Args:
        models: The reference, then the others.
        untied: Whether the output stores its head apart from its embeddings.
        dtype_given: Whether the user has said what type the output has; parents may then differ in theirs.
        source: Number of the checkpoint to whose tokens those of the others are matched; None for equal ones.
        base: Number of the base, or None.

    Raises:
        ValueError: They differ; the text lists all differences.
    """
    problems: list[str] = []
    entries = [_with_head(model, models, untied, problems) for model in models]
    matched = None if source is None else match(models, entries, source, base, problems)
    entries = entries if matched is None else matched.seen()
    found, mixed = differences([model.label for model in models], entries, dtype_given=dtype_given)
    problems += [*found, *_kinds(models), *(_vocabularies(models) if source is None else [])]
    refuse(problems)
    return Aligned(sorted(entries[0]), entries, sorted(mixed), models, matched)


def refuse(problems: Sequence[str]) -> None:
    """Raise the ValueError that lists all problems, where there are any."""
    if problems:
        note = ""
        if any("lacks" in text or "only" in text for text in problems):
            note = " (versions of a library may name the same tensors differently: save all with one)"
        raise ValueError(f"the models cannot be merged: {'; '.join(problems)}{note}")


def differences(
    labels: Sequence[str], entries: Sequence[Mapping[str, Entry]], *, dtype_given: bool
) -> tuple[list[str], set[str]]:
    """Return how sets of tensors differ from the first one, and the names of those whose float types differ.

    Args:
        labels: How texts name each set.
        entries: Each set by output key.
        dtype_given: Whether float types may differ.
    """
    problems: list[str] = []
    reference = entries[0]
    mixed: set[str] = set()
    for label, own in zip(labels[1:], entries[1:], strict=True):
        problems += _listed(f"{label} lacks", [name for name in reference if name not in own])
        problems += _listed(f"only {label} has", [name for name in own if name not in reference])
        both = [name for name in reference if name in own]
        problems += _listed(
            f"shapes differ from {labels[0]}'s in {label}",
            [
                f"{name} {list(own[name].shape)} instead of {list(reference[name].shape)}"
                for name in both
                if own[name].shape != reference[name].shape
            ],
        )
        other = [name for name in both if own[name].dtype != reference[name].dtype]
        floats = [name for name in other if own[name].is_float and reference[name].is_float]
        mixed.update(floats)
        refused = [name for name in other if name not in floats or not dtype_given]
        hint = "" if dtype_given else " (set dtype to merge different float types)"
        problems += _listed(
            f"types differ from {labels[0]}'s in {label}{hint}",
            [f"{name} {own[name].dtype} instead of {reference[name].dtype}" for name in refused],
        )
    return problems, mixed


def _listed(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return [f"{title}: {', '.join(items[:_SHOWN])}{more}"]


# Tied heads -------------------------------------------------------------------------------------------------


def _with_head(
    model: Checkpoint, models: Sequence[Checkpoint], untied: bool, problems: list[str]
) -> dict[str, Entry]:
    """Return a checkpoint's entries with its head stored or left out as the output will have it."""
    own = dict(model.tensors)
    head = next((name for name in _heads(models) if any(name in other.tensors for other in models)), None)
    embedding = _embedding(own)
    if head is None or embedding is None:
        return own
    if untied:
        if head not in own and model.config.get("tie_word_embeddings", True):
            own[head] = own[embedding]
    elif head in own and any(head not in other.tensors for other in models):
        if _equal(model, own[head], own[embedding]):
            del own[head]
        else:
            problems.append(
                f"{model.label} has a {head} of its own, which the output would tie to {embedding} "
                "(let an untied model be the tokenizer_source, the base or the first one)"
            )
    return own


def _heads(models: Sequence[Checkpoint]) -> list[str]:
    names = {name for model in models for name in model.tensors}
    return sorted(name for name in names if name in HEADS or name.endswith(tuple(f".{h}" for h in HEADS[:1])))


def _embedding(entries: Mapping[str, Entry]) -> str | None:
    found = [name for name in entries if name.endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def _equal(model: Checkpoint, a: Entry, b: Entry) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return same_bytes(model, a, model, b)


def same_bytes(one: Checkpoint, a: Entry, other: Checkpoint, b: Entry) -> bool:
    """Whether two tensors of one size hold the same bytes."""
    size, step = a.numel * a.itemsize, 1 << 20
    places = range(0, size, step)
    return all(
        one.read_raw(a, place, min(step, size - place)) == other.read_raw(b, place, min(step, size - place))
        for place in places
    )


# Configs and vocabularies -----------------------------------------------------------------------------------


def _kinds(models: Sequence[Checkpoint]) -> list[str]:
    problems: list[str] = []
    kinds = {model.label: model.config.get("model_type") for model in models}
    if len({kind for kind in kinds.values() if kind}) > 1:
        problems.append(
            "model types differ: " + ", ".join(f"{label} is {kind}" for label, kind in kinds.items())
        )
    for model in models:
        if model.config.get("quantization_config"):
            problems.append(f"{model.label} is quantized (quantization_config); dequantize it first")
    return problems


def _vocabularies(models: Sequence[Checkpoint]) -> list[str]:
    reference, problems = vocabulary(models[0].folder), []
    if reference is None:
        return []
    for model in models[1:]:
        own = vocabulary(model.folder)
        if own is None or own == reference:
            continue
        wrong = sorted(t for t in {*own, *reference} if own.get(t) != reference.get(t))
        shown = ", ".join(f"{t!r} ({reference.get(t)} and {own.get(t)})" for t in wrong[:8])
        both = f"vocabularies of {models[0].label} and {model.label}"
        hint = "tokenizer_source: base, or one of the models, matches them"
        problems.append(f"{both} differ in {len(wrong)} tokens, such as {shown} ({hint})")
    return problems


def excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
