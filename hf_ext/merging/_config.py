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
}
# Keys of mergekit's that have no counterpart, with what to do.
_REFUSED = {
    "modules": "merge the modules' folders one by one",
    "tokenizer": "vocabularies must be equal; make them so before the merge",
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
class MergeConfig:
    """What to merge, and how.

    Args:
        merge_method: One of `hf-ext list merge`, or mergekit's name for it.
        models: The parents in order: names, or mappings with the fields of `ParentConfig`.
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
        tokenizer_source: Where tokenizer and other side files come from: "base", or one of the models; None
            for the reference (the base, or the first model).
        exclude: Patterns of tensor names that are copied from the reference.
        max_shard_size: Bytes in an output file, such as "5GB".
        block_bytes: Bytes of an fp32 block of one operand, at least 65536.
        threads: Workers; None for the processors that the process may use, 8 at most.
        seed: Seed of random masks.
        layers: Number of layers that the models must have; mergekit's slices state it.

    Raises:
        ValueError: A field is unknown or outside its range; the text names it.
        TypeError: A value does not have its field's type.
    """

    merge_method: str
    models: list[Any]
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
    layers: int | None = None

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
        check(bool(self.models), "models", self.models, "a list of at least one model")
        parents = [_parent(item, index) for index, item in enumerate(self.models)]
        object.__setattr__(self, "models", parents)
        # The method's own settings are checked here, before any parent is looked at.
        self.method()
        for parent in parents:
            self.method_class().parse_parent(parent.parameters, f"models: {parent.model}")

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], where: str) -> MergeConfig:
        """Return the config that a file's content says.

        Raises:
            ValueError: A key is unknown, refused or outside its range; the text names file and key.
            TypeError: A value does not have its key's type.
        """
        content = dict(content)
        if content.get("slices") is not None:
            content = _without_slices(content, where)
        known = {own.name for own in dataclasses.fields(cls)}
        for key, value in list(content.items()):
            if key in _REFUSED and value is not None:
                raise ValueError(f"{where}: {key} cannot be used here: {_REFUSED[key]}")
            if key in _REFUSED or (key not in known and value is None and key == "slices"):
                del content[key]
            elif key not in known:
                raise ValueError(f"{where}: unknown field {key!r}{suggest(key, known)}")
        if "models" not in content and content.get("merge_method") and "base_model" in content:
            content["models"] = []
        for key in ("merge_method", "models"):
            check(key in content, key, None, "given", where=where)
        content = {key: value for key, value in content.items() if value is not None}
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
        twice = sorted(set(fixed) & set(given))
        check(not twice, twice[0] if twice else "", None, f"left out with merge_method {self.merge_method!r}")
        given = {**given, **fixed}
        for own in dataclasses.fields(cls):
            # A setting that every parent brings for itself needs no common value.
            required = own.default is dataclasses.MISSING and own.default_factory is dataclasses.MISSING
            if required and own.name not in given:
                # In mergekit's files the base often stands among the models, without parameters.
                brought = [one.parameters for one in self.models if one.model != self.base_model]
                each = (
                    own.metadata.get("per_parent")
                    and bool(brought)
                    and all(own.name in cls.parse(one, "parameters") for one in brought)
                )
                name = own.name.rstrip("_")
                check(bool(each), name, None, "given", where=f"parameters of {self.merge_method}")
                given[own.name] = _for_no_tensor(cls.parse(brought[0], "parameters")[own.name])
        return cls(**given)

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


def _parent(item: Any, index: int) -> ParentConfig:
    where = f"models[{index}]"
    if isinstance(item, ParentConfig):
        return item
    if isinstance(item, str):
        item = {"model": item}
    if not isinstance(item, Mapping):
        raise TypeError(f"{where} must be a name or a mapping with 'model', got {item!r}")
    item = dict(item)
    if isinstance(item.get("model"), Mapping):  # mergekit's long form
        inner = item.pop("model")
        path = inner.get("model", inner)
        item = {**item, **(path if isinstance(path, Mapping) else {"path": path})}
        item["model"] = item.pop("path", None)
    hints = typing.get_type_hints(ParentConfig)
    given = {key: value for key, value in item.items() if value is not None}
    checked = check_fields(given, hints, where=where)
    check(bool(checked.get("model")), f"{where}.model", item.get("model"), "a folder or a name")
    return ParentConfig(**cast(dict[str, Any], checked))


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


def _without_slices(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Turn one slice over all layers of every source into a list of models."""
    slices = content.pop("slices")
    rule = "one slice with the same layer_range, from 0 on, of all its sources; layers cannot be recombined"
    fits = isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], dict)
    check(fits and content.get("models") is None, "slices", slices, rule, where=where)
    only = dict(slices[0])
    unknown = sorted(set(only) - {"sources", "parameters", "base_model"})
    check(not unknown, "slices", unknown, "made of sources and parameters", where=where)
    sources = only.get("sources") or []
    ranges = [list(source.get("layer_range") or []) for source in sources if isinstance(source, dict)]
    same = len(ranges) == len(sources) and bool(ranges) and all(r == ranges[0] for r in ranges)
    check(same and len(ranges[0]) == 2 and ranges[0][0] == 0, "slices", ranges, rule, where=where)
    models = [{key: value for key, value in source.items() if key != "layer_range"} for source in sources]
    content.pop("models", None)
    parameters = {**(content.get("parameters") or {}), **(only.get("parameters") or {})}
    base = only.get("base_model") or content.get("base_model")
    whole = {"models": models, "parameters": parameters, "base_model": base, "layers": ranges[0][1]}
    return {**content, **whole}
