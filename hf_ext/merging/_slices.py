"""A model whose layers are made of any layers of the models: mergekit's `slices`, for passthrough and others.

Layer by layer, what a slice's sources have there is merged as whole models are. Tensors outside the layers
come from the first slice's sources where they stand before the layers, and from the last one's where they
follow them, as with mergekit. The layers are those of the models' only numbered list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.checks import check
from ._align import Aligned, align, differences, excluded, refuse, same_bytes
from ._base import MergeMethod, Models, TensorInfo
from ._checkpoint import Checkpoint, Entry
from ._config import MergeConfig
from ._layer_config import layered_config, stated_layers
from ._layout import Slot, parse_size, plan_layout
from ._operands import Stored, Task
from ._parents import Parent, Parents, Slice
from ._plan import Plan, refuse_doubles, source_of
from ._vocabulary import MatchedRows

_LAYER = re.compile(r"^(.*?\.)?(\d+)\.(.+)$")
_BEFORE = re.compile(r"(^|[._])(?!embed_out\b|embedding_norm\b)(embed\w*|\w*embeddings?\w*|wte|wpe)([._]|$)")
_AFTER = re.compile(
    r"(^|\.)(lm_head|embed_out|output|score|classifier|norm|ln_f|final_\w*norm|\w*norm_f|embedding_norm)\."
)


@dataclass(frozen=True)
class Stack:
    """A checkpoint's tensors by layer.

    Args:
        prefix: What stands before a layer's number in a name, such as "model.layers.".
        layers: For each layer, its tensors by what follows the number.
        outside: The other tensors by name.
    """

    prefix: str
    layers: Sequence[Mapping[str, Entry]]
    outside: Mapping[str, Entry]


@dataclass(frozen=True)
class Part:
    """A model's tensor that one of the output is made of; `matched` is read where its rows are matched."""

    checkpoint: Checkpoint
    entry: Entry
    name: str
    matched: MatchedRows | None = None

    @property
    def operand(self) -> Stored | MatchedRows:
        """The tensor, to be read."""
        return self.matched or Stored(self.checkpoint, self.entry)


@dataclass(frozen=True)
class Piece:
    """A tensor of the output.

    Args:
        name: Its key.
        position: Its place among the layers of its slice, in [0, 1].
        of: Its slice.
        parts: What it is made of, one for each of the slice's parents.
        base: The base's tensor, where the slice has a base.
    """

    name: str
    position: float
    of: Slice
    parts: tuple[Part, ...]
    base: Part | None

    @property
    def first(self) -> Part:
        """The part that the output is like: the base's, or the first one."""
        return self.base or self.parts[0]


def plan_slices(config: MergeConfig, method: MergeMethod, parents: Parents) -> Plan:
    """Check everything and lay out an output that is made of slices.

    Raises:
        ValueError: The models cannot be put together so; the text lists why.
    """
    check(config.space in ("auto", "full"), "space", config.space, "'full' for models")
    check(config.out_rank is None, "out_rank", config.out_rank, "left out outside product space")
    models = parents.all()
    stacks = {id(model): layer_stack(model) for model in models}
    prefixes = {model.label: stacks[id(model)].prefix for model in models}
    check(len(set(prefixes.values())) == 1, "slices", prefixes, "of models that name their layers alike")
    _check_ranges(parents.slices, stacks)
    pieces, rows = _pieces(config, parents, models, stacks)
    stored = config.stored_dtype()
    dtypes = {
        piece.name: stored if stored is not None and piece.first.entry.is_float else piece.first.entry.dtype
        for piece in pieces
    }
    refuse_doubles(dtypes)
    tensors = [(piece.name, dtypes[piece.name], piece.first.entry.shape) for piece in pieces]
    layout = plan_layout(tensors, parse_size("max_shard_size", config.max_shard_size))
    tasks: list[Task] = []
    by_slice: dict[str, list[TensorInfo]] = {one.where: [] for one in parents.slices}
    for index, piece in enumerate(sorted(pieces, key=lambda piece: piece.name)):
        task = _task(config, method, piece, index, layout.slots[piece.name])
        tasks.append(task)
        if task.merged:
            by_slice[piece.of.where].append(task.info)
    for one in parents.slices:
        labels = tuple(parent.model.label for parent in one.parents)
        base = None if one.base is None else one.base.model.label
        try:
            method.check_models(Models(labels, base, "full", by_slice[one.where]))
        except ValueError as error:
            raise ValueError(f"{one.where}: {error}") from error
    sources = [
        [(parent.model, (parent.layers or (0, 0))[0] + number) for parent in _all(one)]
        for one in parents.slices
        for number in range(one.length)
    ]
    held = len(stacks[id(parents.side)].layers)
    changed = layered_config(parents.side, held, sources)
    return Plan(config, method, parents, "full", layout, tuple(tasks), rows=rows, model_config=changed)


def layer_stack(model: Checkpoint) -> Stack:
    """Return a checkpoint's layers.

    Raises:
        ValueError: It has no numbered list of layers, several, or one of another length than its config says.
    """
    found: dict[str, dict[int, dict[str, Entry]]] = {}
    outside: dict[str, Entry] = {}
    for name, entry in model.tensors.items():
        match = _LAYER.match(name)
        if match is None:
            outside[name] = entry
            continue
        found.setdefault(match[1] or "", {}).setdefault(int(match[2]), {})[match[3]] = entry
    names = sorted(f"{prefix}N" for prefix in found)
    check(len(found) == 1, "slices", names, "of models with one list of layers", where=model.label)
    prefix, layers = next(iter(found.items()))
    whole = sorted(layers) == list(range(len(layers)))
    check(
        whole, "slices", sorted(layers), "of models with layers from 0 on", where=f"{model.label}: {prefix}N"
    )
    stated = stated_layers(model.config)
    rule = f"of models with as many layers as config.json says, {stated}"
    check(stated in (None, len(layers)), "slices", len(layers), rule, where=model.label)
    return Stack(prefix, [layers[number] for number in range(len(layers))], outside)


def _check_ranges(slices: Sequence[Slice], stacks: Mapping[int, Stack]) -> None:
    for one in slices:
        for parent in _all(one):
            count = len(stacks[id(parent.model)].layers)
            rule = f"within the layers of {parent.model.label}, 0 to {count}"
            fits = parent.layers is not None and parent.layers[1] <= count
            check(fits, f"{one.where}.sources.layer_range", list(parent.layers or ()), rule)


def _all(one: Slice) -> list[Parent]:
    """Return a slice's parents and its base, each once."""
    return [*one.parents, *([one.base] if one.base is not None and one.base not in one.parents else [])]


# Tensors ------------------------------------------------------------------------------------------


def _pieces(
    config: MergeConfig, parents: Parents, models: Sequence[Checkpoint], stacks: Mapping[int, Stack]
) -> tuple[list[Piece], str | None]:
    """Return the tensors of the output, and what tells matched rows of the vocabulary from others."""
    given = config.stored_dtype() is not None
    source = source_of(config, parents, models)
    aligned = _outside(parents, models, stacks, source, dtype_given=given)
    pieces = _of_outside(parents.slices, models, aligned)
    problems = _foreign(parents, stacks, dtype_given=given)
    number = 0
    for one in parents.slices:
        for place in range(one.length):
            found, wrong = _of_layer(one, place, number, stacks, dtype_given=given)
            pieces += found
            problems += wrong
            number += 1
    refuse(list(dict.fromkeys(problems)))
    _refuse_differing_integers(pieces)
    return pieces, None if aligned.matched is None else aligned.matched.digest()


def _outside(
    parents: Parents,
    models: Sequence[Checkpoint],
    stacks: Mapping[int, Stack],
    source: int | None,
    *,
    dtype_given: bool,
) -> Aligned:
    reference = parents.side
    stored = any(name.endswith("lm_head.weight") for name in reference.tensors)
    untied = not reference.config.get("tie_word_embeddings", not stored)
    views = [model.view(stacks[id(model)].outside) for model in models]
    base = None if parents.base is None else models.index(parents.base)
    return align(views, untied=untied, dtype_given=dtype_given, source=source, base=base)


def _of_outside(slices: Sequence[Slice], models: Sequence[Checkpoint], aligned: Aligned) -> list[Piece]:
    numbers = {id(model): number for number, model in enumerate(models)}
    first, last = slices[0], slices[-1]
    alike = _same_making(first, last)
    pieces: list[Piece] = []
    for name in aligned.names:
        before, after = bool(_BEFORE.search(name)), bool(_AFTER.search(name))
        rule = (
            "of one making in the first and the last slice, since it is not known which of them it belongs to"
        )
        check(alike or before != after, name, "before or after the layers", rule)
        one = first if before and not after else last

        def part(parent: Parent, name: str = name) -> Part:
            operand = aligned.operand(numbers[id(parent.model)], name)
            matched = operand if isinstance(operand, MatchedRows) else None
            return Part(parent.model, operand.entry, name, matched)

        parts = tuple(part(parent) for parent in one.parents)
        pieces.append(Piece(name, 0.0, one, parts, None if one.base is None else part(one.base)))
    return pieces


def _same_making(a: Slice, b: Slice) -> bool:
    def making(one: Slice) -> object:
        base = None if one.base is None else id(one.base.model)
        return [(id(parent.model), parent.own) for parent in one.parents], base, one.shared

    return making(a) == making(b)


def _foreign(parents: Parents, stacks: Mapping[int, Stack], *, dtype_given: bool) -> list[str]:
    """Return how the layers that are taken of other models differ from every layer of the reference."""
    reference = stacks[id(parents.reference)]

    def making(layer: Mapping[str, Entry]) -> object:
        return {
            key: (entry.shape, None if dtype_given and entry.is_float else entry.dtype)
            for key, entry in layer.items()
        }

    known = [making(layer) for layer in reference.layers]
    problems: list[str] = []
    for one in parents.slices:
        for parent in _all(one):
            if parent.model is parents.reference:
                continue
            for number in range(*(parent.layers or (0, 0))):
                layer = stacks[id(parent.model)].layers[number]
                if making(layer) in known:
                    continue
                like = min(number, len(known) - 1)
                labels = [
                    f"{parents.reference.label} (layer {like})",
                    f"{parent.model.label} (layer {number})",
                ]
                both = [_named(reference, like), _named(stacks[id(parent.model)], number, like)]
                problems += differences(labels, both, dtype_given=dtype_given)[0]
    return problems


def _named(stack: Stack, number: int, as_number: int | None = None) -> dict[str, Entry]:
    shown = number if as_number is None else as_number
    return {f"{stack.prefix}{shown}.{key}": entry for key, entry in stack.layers[number].items()}


def _of_layer(
    one: Slice, place: int, number: int, stacks: Mapping[int, Stack], *, dtype_given: bool
) -> tuple[list[Piece], list[str]]:
    """Return the tensors of one layer of the output, and how its sources differ."""
    sources = [_source(parent, place, stacks) for parent in one.parents]
    base = None if one.base is None else _source(one.base, place, stacks)
    first = base or sources[0]
    compared = [first, *(source for source in sources if source is not first)]
    labels = [f"{parent.model.label} (layer {index})" for parent, index, _ in compared]
    entries = [_named(stack, index, number) for _, index, stack in compared]
    problems, _ = differences(labels, entries, dtype_given=dtype_given)
    if problems:
        return [], problems
    position = place / (one.length - 1) if one.length > 1 else 1.0
    pieces: list[Piece] = []
    for key in first[2].layers[first[1]]:

        def part(source: tuple[Parent, int, Stack], key: str = key) -> Part:
            parent, index, stack = source
            return Part(parent.model, stack.layers[index][key], f"{stack.prefix}{index}.{key}")

        parts = tuple(part(source) for source in sources)
        name = f"{first[2].prefix}{number}.{key}"
        pieces.append(Piece(name, position, one, parts, None if base is None else part(base)))
    return pieces, []


def _source(parent: Parent, place: int, stacks: Mapping[int, Stack]) -> tuple[Parent, int, Stack]:
    return parent, (parent.layers or (0, 0))[0] + place, stacks[id(parent.model)]


def _refuse_differing_integers(pieces: Sequence[Piece]) -> None:
    wrong: list[str] = []
    for piece in pieces:
        one = piece.first
        if one.entry.is_float:
            continue
        for part in piece.parts:
            if not same_bytes(one.checkpoint, one.entry, part.checkpoint, part.entry):
                wrong.append(f"{piece.name} ({part.checkpoint.label})")
    if wrong:
        raise ValueError(f"tensors that are no floats must be equal in all models: {', '.join(wrong)}")


def _task(config: MergeConfig, method: MergeMethod, piece: Piece, index: int, slot: Slot) -> Task:
    if not piece.first.entry.is_float or excluded(piece.name, config.exclude):
        info = TensorInfo(piece.name, slot.shape, index, 1, {})
        return Task(info, slot, (piece.first.operand,), None, merged=False)
    operands = tuple(part.operand for part in piece.parts)
    values = method.values_for(
        piece.name,
        piece.position,
        [parent.own for parent in piece.of.parents],
        shared=piece.of.shared,
        sources=[part.name for part in piece.parts],
    )
    labels = tuple(operand.label for operand in operands)
    info = TensorInfo(piece.name, slot.shape, index, len(operands), values, labels)
    vectors = method.operands == "task_vectors"
    base = None
    if piece.base is not None and (vectors or method.needs_base):
        base = piece.base.operand
    return Task(info, slot, operands, base, subtract=vectors, add_base=vectors)
