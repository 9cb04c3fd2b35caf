"""A merge as one file says it: ours and, for the methods that both have, mergekit's."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..core.checks import check, check_choice, check_fields, suggest
from ..core.registry import get
from ..core.yaml_files import read_mapping
from ._base import SPACES, MergeMethod
from ._layout import parse_size
from ._reductions import CHUNK

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "fp32": "F32", "fp16": "F16", "bf16": "BF16",
}  # fmt: skip
# mergekit's names for forms of one method here.
_METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "dare_linear": ("dare", {"merge": "linear"}),
    "dare_ties": ("dare", {"merge": "ties"}),
    "passthrough": ("linear", {"normalize": False}),
}
# Keys of mergekit's that have no counterpart, with what to do.
_REFUSED = {
    "modules": "merge the modules' folders one by one",
    "chat_template": "the template of the reference is carried over; change it in the output",
}


@dataclass(frozen=True, kw_only=True)
class ParentConfig:
    """One of the models to merge.

    Args:
        model: Folder, or name on the Hub; "name@revision" sets the revision.
        revision: Branch, tag or commit of a Hub model.
        parameters: The method's settings for this parent alone.
    """

    model: str
    revision: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ParentConfig):
    """One of the models that a slice of the output is made of.

    Args:
        layer_range: First of its layers, and the layer after the last one.
    """

    layer_range: list[int]


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """Some layers of the output, one after another, as in mergekit's files.

    Args:
        sources: What they are made of, layer by layer as whole models are: mappings with the fields of
            `SourceConfig`, all of as many layers.
        base_model: The slice's own base; None for the one of all.
        parameters: The method's settings for this slice; anchors run over its layers.
    """

    sources: list[Any]
    base_model: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What to merge, and how.

    Args:
        merge_method: One of `hf-ext list merge`, or mergekit's name for it.
        models: The parents in order: names, or mappings with the fields of `ParentConfig`.
        slices: Instead of models: what the layers of the output are made of, in order; mappings with the
            fields of `SliceConfig`. What stands before the layers is made as the first slice is, and what
            follows them as the last one.
        base_model: What task vectors are taken from; None for methods without a base.
        parameters: The method's settings; each may be a number, anchors over the layers, or a list of
            {filter, value}.
        dtype: Stored type of the output: float32, bfloat16 or float16; None for that of the reference, tensor
            by tensor. Arithmetic is fp32 whatever it is.
        out_dtype: The same, where `dtype` names mergekit's type of the arithmetic.
        space: "full" for models; for adapters "product" (on the updates B A, written as a LoRA), "factors"
            (on A and B apart) or "merge_into_base" (a model comes out); "auto" for full or product, by the
            parents.
        out_rank: Rank of the merged LoRA in product space; None for the sum of the parents' ranks where
            that is exact.
        tokenizer_source: Where tokenizer, config and other side files come from: "base", or one of the
            models, to whose tokens those of the others are matched; None, and "union" where vocabularies are
            equal, for the reference (the base, or the first model).
        exclude: Patterns of tensor names that are copied from the reference.
        max_shard_size: Bytes in an output file, such as "5GB".
        block_bytes: Bytes of an fp32 block of one operand, at least 65536.
        threads: Workers; None for the processors that the process may use, 8 at most.
        seed: Seed of random masks.

    Raises:
        ValueError: A field is unknown or outside its range; the text names it.
        TypeError: A value does not have its field's type.
    """

    merge_method: str
    models: list[Any] = field(default_factory=list)
    slices: list[Any] = field(default_factory=list)
    base_model: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    space: str = "auto"
    out_rank: int | None = None
    tokenizer_source: str | None = None
    exclude: list[str] = field(default_factory=list)
    max_shard_size: int | str = "5GB"
    block_bytes: int = 1 << 20
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        given = {own.name: getattr(self, own.name) for own in dataclasses.fields(self)}
        for name, value in check_fields(given, hints, where="merge").items():
            object.__setattr__(self, name, value)
        for name in ("dtype", "out_dtype"):
            value = getattr(self, name)
            if value is not None:
                check_choice(name, value, tuple(_DTYPES))
        check_choice("space", self.space, ("auto", *SPACES))
        check(self.out_rank is None or self.out_rank >= 1, "out_rank", self.out_rank, "at least 1")
        check(self.block_bytes >= 4 * CHUNK, "block_bytes", self.block_bytes, f"at least {4 * CHUNK}")
        check(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        parse_size("max_shard_size", self.max_shard_size)
        check(bool(self.models or self.slices), "models", self.models, "a list of at least one model")
        check(not (self.models and self.slices), "models", self.models, "left out where slices are given")
        parents = [_parent(item, f"models[{index}]") for index, item in enumerate(self.models)]
        object.__setattr__(self, "models", parents)
        object.__setattr__(
            self, "slices", [_slice(item, f"slices[{i}]") for i, item in enumerate(self.slices)]
        )
        if self.slices:
            takes = self.method_class().takes_slices
            check(takes, "merge_method", self.merge_method, "one that merges by layer, with slices")
        if self.merge_method == "passthrough":
            for where, group in self.groups():
                check(len(group) == 1, where, [one.model for one in group], "a single one with passthrough")
        # The method's own settings are checked here, before any parent is looked at.
        self.method()
        for where, group in self.groups():
            for parent in group:
                self.method_class().parse_parent(parent.parameters, f"{where}: {parent.model}")
        for index, one in enumerate(self.slices):
            self.method_class().parse_shared(one.parameters, f"slices[{index}].parameters")

    def groups(self) -> list[tuple[str, list[ParentConfig]]]:
        """Return what is merged together, with its place in the file: all models, or each slice's sources."""
        if self.slices:
            return [(f"slices[{index}].sources", one.sources) for index, one in enumerate(self.slices)]
        return [("models", self.models)]

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], where: str) -> MergeConfig:
        """Return the config that a file's content says.

        Raises:
            ValueError: A key is unknown, refused or outside its range; the text names file and key.
            TypeError: A value does not have its key's type.
        """
        content = dict(content)
        _tokenizer(content, where)
        known = {own.name for own in dataclasses.fields(cls)}
        for key, value in list(content.items()):
            if key in _REFUSED and value is not None:
                raise ValueError(f"{where}: {key} cannot be used here: {_REFUSED[key]}")
            if key in _REFUSED:
                del content[key]
            elif key not in known:
                raise ValueError(f"{where}: unknown field {key!r}{suggest(key, known)}")
        check("merge_method" in content, "merge_method", None, "given", where=where)
        content = {key: value for key, value in content.items() if value is not None}
        check("models" in content or "slices" in content, "models", None, "given", where=where)
        try:
            return cls(**content)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{where}: {error}") from error

    def method_class(self) -> type[MergeMethod]:
        """Return the method's class."""
        return cast(
            "type[MergeMethod]", get("merge", _METHODS.get(self.merge_method, (self.merge_method,))[0]).target
        )

    def method(self) -> MergeMethod:
        """Return the method with its settings.

        Raises:
            ValueError: A setting is unknown or outside its range.
        """
        cls = self.method_class()
        fixed = _METHODS.get(self.merge_method, ("", {}))[1]
        given = cls.parse(self.parameters, "parameters")
        given |= self._of_all_slices(given)
        twice = sorted(set(fixed) & set(given))
        check(not twice, twice[0] if twice else "", None, f"left out with merge_method {self.merge_method!r}")
        given = {**given, **fixed}
        for own in dataclasses.fields(cls):
            required = own.default is dataclasses.MISSING and own.default_factory is dataclasses.MISSING
            if required and own.name not in given:
                brought = self._brought(own)
                name = own.name.rstrip("_")
                check(bool(brought), name, None, "given", where=f"parameters of {self.merge_method}")
                given[own.name] = _for_no_tensor(brought[0])
        return cls(**given)

    def _brought(self, own: dataclasses.Field[Any]) -> list[Any]:
        """Return what the slices, or the parents for themselves, give for a setting; nothing if one does not.

        A setting that all of them give needs no common value.
        """
        cls, found = self.method_class(), []
        slices: list[SliceConfig | None] = list(self.slices) or [None]
        for one, (_, group) in zip(slices, self.groups(), strict=True):
            shared = {} if one is None else cls.parse(one.parameters, "parameters")
            base = (one.base_model if one is not None else None) or self.base_model
            # In mergekit's files the base often stands among the models, without parameters.
            own_values = [
                cls.parse(parent.parameters, "parameters") for parent in group if parent.model != base
            ]
            if own.name in shared:
                found.append(shared[own.name])
            elif own.metadata.get("per_parent") and own_values and all(own.name in one for one in own_values):
                found.append(own_values[0][own.name])
            else:
                return []
        return found

    def _of_all_slices(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that cannot differ between tensors, as the slices give them.

        Raises:
            ValueError: Slices give different ones.
        """
        cls = self.method_class()
        slices = [cls.parse(one.parameters, f"slices[{i}].parameters") for i, one in enumerate(self.slices)]
        found: dict[str, Any] = {}
        for own in dataclasses.fields(cls):
            if own.metadata.get("setting") or not any(own.name in one for one in slices):
                continue
            otherwise = given.get(own.name, own.default)
            values = [one.get(own.name, otherwise) for one in slices]
            name = own.name.rstrip("_")
            check(
                all(v == values[0] for v in values), name, values, "the same for all slices", where="slices"
            )
            found[own.name] = values[0]
        return found

    def stored_dtype(self) -> str | None:
        """Return the type of the output as safetensors spells it, or None."""
        name = self.out_dtype or self.dtype
        return None if name is None else _DTYPES[name]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values from which `from_mapping` makes the same config."""
        return dataclasses.asdict(self)


def read_config(path: str | Path, *, threads: int | None = None) -> MergeConfig:
    """Read a merge file.

    Args:
        path: The YAML file.
        threads: Workers; None for what the file says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no YAML mapping, or a key is unknown, refused or outside its range.
        TypeError: A value does not have its key's type.
    """
    path = Path(path)
    content = read_mapping(path, "merge file")
    return MergeConfig.from_mapping(
        {**content, **({"threads": threads} if threads is not None else {})}, str(path)
    )


def _parent(item: Any, where: str, kind: type[ParentConfig] = ParentConfig) -> Any:
    """Return one model of a list as an object of `kind`.

    Raises:
        ValueError: A field is unknown, or the model is not given; the text names it.
        TypeError: A value does not have its field's type.
    """
    if isinstance(item, kind):
        return item
    if isinstance(item, str) and kind is ParentConfig:
        item = {"model": item}
    if not isinstance(item, Mapping):
        raise TypeError(f"{where} must be a name or a mapping with 'model', got {item!r}")
    item = dict(item)
    if isinstance(item.get("model"), Mapping):  # mergekit's long form
        inner = item.pop("model")
        path = inner.get("model", inner)
        item = {**item, **(path if isinstance(path, Mapping) else {"path": path})}
        item["model"] = item.pop("path", None)
    hints = typing.get_type_hints(kind)
    given = {key: value for key, value in item.items() if value is not None}
    checked = check_fields(given, hints, where=where)
    check(bool(checked.get("model")), f"{where}.model", item.get("model"), "a folder or a name")
    if kind is SourceConfig:
        layers = cast("list[int]", checked.get("layer_range") or [])
        fits = len(layers) == 2 and all(type(one) is int for one in layers) and 0 <= layers[0] < layers[-1]
        rule = "two whole numbers, the first layer and the one after the last"
        check(fits, f"{where}.layer_range", item.get("layer_range"), rule)
        checked["layer_range"] = list(layers)
    return kind(**cast(dict[str, Any], checked))


def _slice(item: Any, where: str) -> SliceConfig:
    if isinstance(item, SliceConfig):
        return item
    if not isinstance(item, Mapping):
        raise TypeError(f"{where} must be a mapping with 'sources', got {item!r}")
    given = {key: value for key, value in item.items() if value is not None}
    checked = cast("dict[str, Any]", check_fields(given, typing.get_type_hints(SliceConfig), where=where))
    check(
        bool(checked.get("sources")), f"{where}.sources", item.get("sources"), "a list of at least one model"
    )
    sources = [
        _parent(source, f"{where}.sources[{index}]", SourceConfig)
        for index, source in enumerate(checked["sources"])
    ]
    ranges = [source.layer_range for source in sources]
    same = len({stop - start for start, stop in ranges}) == 1
    check(same, f"{where}.sources", ranges, "of layer_ranges of one length")
    return SliceConfig(**{**checked, "sources": sources})


def _tokenizer(content: dict[str, Any], where: str) -> None:
    """Put mergekit's `tokenizer: {source: ...}` in the place of `tokenizer_source`."""
    given = content.pop("tokenizer", None)
    if given is None:
        return
    check(isinstance(given, Mapping), "tokenizer", given, "a mapping with 'source'", where=where)
    further = sorted(key for key, value in given.items() if key != "source" and value not in (None, {}))
    rule = "made of 'source' alone: the vocabulary stays that of the models"
    check(not further, "tokenizer", ", ".join(further), rule, where=where)
    double = content.get("tokenizer_source") is None
    check(
        double, "tokenizer_source", content.get("tokenizer_source"), "left out beside tokenizer", where=where
    )
    content["tokenizer_source"] = given.get("source") or "union"


def split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """Return a name without its "@revision", and the revision.

    Raises:
        ValueError: The name has mergekit's "+adapter", or two revisions are given.
    """
    if Path(name).is_dir():
        return name, revision
    check("+" not in name, "model", name, "a name without '+': merge the adapter by space: merge_into_base")
    plain, _, tail = name.partition("@")
    check(not (tail and revision and tail != revision), "revision", revision, f"the one of {name!r}")
    return plain, tail or revision


def _for_no_tensor(value: Any) -> list[dict[str, Any]]:
    """Return a setting of the same numbers that fits no tensor: each model has its own."""
    while isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
        value = (value if isinstance(value, dict) else value[0]).get("value")
    return [{"filter": "\0", "value": value}]
