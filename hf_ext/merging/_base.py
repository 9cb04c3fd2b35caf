"""What a merge method is: a frozen dataclass of its settings with a few functions of blocks to blocks.

A method never opens a file. The engine reads the operands of each output tensor as fp32 blocks, calls the
method, rounds once to the stored type and writes. A method states what it needs:

- `granularity`: "elementwise" (blocks are flat, of any length) or "matrix" (a block is a whole tensor, in its
  own shape).
- `operands`: "weights", or "task_vectors": parent minus base, for which `map` returns the merged task vector
  and the engine adds the base.
- `scans`: how many times all blocks are shown to `scan` before `map` runs; 0 for a purely elementwise method.
- `local`: whether scans of one tensor concern that tensor alone.

Results must not depend on block size, number of threads or order: sums over a tensor are taken by
`_reductions.chunk_sums` and `math.fsum`, counts are integers, and `fold` is called in the order of the sorted
names and of the offsets.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..core.checks import check, check_choice, check_fields, suggest
from ..core.registry import MethodInfo, Variant, register
from ._parameters import Setting, checked, resolve, setting

__all__ = [
    "Block",
    "MergeMethod",
    "Models",
    "Setting",
    "TensorInfo",
    "choice",
    "register_merge",
    "setting",
]

M = TypeVar("M", bound="type[MergeMethod]")
S = TypeVar("S", bound="MergeMethod")
SPACES = ("full", "factors", "product", "merge_into_base")


def choice(default: str, choices: Sequence[str]) -> Any:
    """Return the dataclass field of a method's choice among words."""
    return field(default=default, metadata={"choices": tuple(choices)})


@dataclass(frozen=True)
class TensorInfo:
    """One output tensor that is merged.

    Args:
        name: Its key.
        shape: Its shape.
        index: Its number in the order of the sorted names.
        parents: Number of its operands.
        values: The method's settings for this tensor: a number, or one for each operand.
        labels: Names of the operands' models, for error texts.
    """

    name: str
    shape: tuple[int, ...]
    index: int
    parents: int
    values: Mapping[str, Any]
    labels: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(eq=False)
class Block:
    """A part of one tensor, as a method sees it.

    Args:
        tensor: The tensor.
        start: First element, in row-major order.
        stop: The element after the last one.
        operands: One fp32 tensor for each operand: flat, or of the tensor's shape for "matrix". `scan` must
            leave them as they are; `map` may overwrite them and return one. With `one_by_one` each is read
            when it is asked for, over the one before it.
        base: The base's values in the same form, not to be changed; None where there is no base.
        states: What `settle` has returned for each scan so far.
        seed: The merge's seed.
        scratch: Folder for `keep` and `kept`.
        workspace: The thread's buffers, for `buffer`.
    """

    tensor: TensorInfo
    start: int
    stop: int
    operands: list[Tensor]
    base: Tensor | None
    states: Sequence[Any]
    seed: int
    scratch: Path | None = None
    workspace: Any = None

    def buffer(self, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a flat buffer of the block's length, this thread's for every block; it is not zeroed."""
        return self.workspace.take(f"method {key}", self.stop - self.start, dtype)

    def value(self, name: str) -> float:
        """Return a setting's value for this tensor."""
        return self.tensor.values[name]

    def per_parent(self, name: str) -> list[float]:
        """Return a setting's values for this tensor, one for each operand."""
        return self.tensor.values[name]

    def keep(self, key: str, value: Tensor) -> None:
        """Store an fp32 tensor beside the unfinished output until the merge ends, for a later pass.

        The key is the method's own; it is kept apart for each block.
        """
        from ._scratch import put

        put(self._kept_at(key), value)

    def kept(self, key: str) -> Tensor:
        """Return what an earlier pass has kept."""
        from ._scratch import get

        return get(self._kept_at(key))

    def _kept_at(self, key: str) -> Path:
        assert self.scratch is not None
        return self.scratch / f"{self.tensor.index}-{self.start}-{key}"


@dataclass(frozen=True)
class Models:
    """What is merged, for a method's own checks before anything is written.

    Args:
        labels: Names of the parents in order.
        base: Name of the base, or None.
        space: One of `SPACES`.
        tensors: The tensors that will be merged.
    """

    labels: tuple[str, ...]
    base: str | None
    space: str
    tensors: Sequence[TensorInfo]


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """Base of the merge methods; a subclass is a `@dataclass(frozen=True, kw_only=True)` of its settings.

    Raises:
        ValueError: A setting is outside its range; the text names it.
        TypeError: A setting does not have its field's type.
    """

    info: ClassVar[MethodInfo]
    granularity: ClassVar[str] = "elementwise"
    # Whether a block holds one operand at a time, for methods that take them in turn.
    one_by_one: ClassVar[bool] = False
    operands: ClassVar[str] = "weights"
    needs_base: ClassVar[bool] = False
    # Whether a base that stands among the parents is one of them, rather than dropped from them.
    base_is_parent: ClassVar[bool] = True
    # Whether the base is the first parent, wherever and whether it stands among them.
    base_is_first: ClassVar[bool] = False
    spaces: ClassVar[frozenset[str]] = frozenset(SPACES)
    # Whether layers of the output may be made of any layers of the models.
    takes_slices: ClassVar[bool] = False
    # Whether the result is a weighted sum of the operands, so that `coefficients` says all.
    weighted_sum: ClassVar[bool] = False
    # Names of mergekit's for settings of ours, and settings of its that change nothing here.
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({"lambda": "lambda_"})
    ignored: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        plain: dict[str, object] = {}
        for own in dataclasses.fields(self):
            value = getattr(self, own.name)
            if own.metadata.get("setting"):
                object.__setattr__(self, own.name, checked(own.name.rstrip("_"), value, own))
            else:
                plain[own.name] = value
        for name, value in check_fields(plain, hints, where=self.info.name).items():
            object.__setattr__(self, name, value)
        for own in dataclasses.fields(self):
            if "choices" in own.metadata:
                check_choice(own.name, getattr(self, own.name), own.metadata["choices"])
        self.validate()

    # What a method fills in -----------------------------------------------------------------------

    def validate(self) -> None:
        """Check the settings against each other."""

    def for_space(self: S, space: str) -> S:
        """Return the method with what its settings leave open decided for a space."""
        return self

    def for_slices(self: S) -> S:
        """Return the method with what its settings leave open decided for slices of several models."""
        return self

    def prepare(self, config: Any, out: Path) -> Any:
        """Return the `MergeConfig` with what the method finds by itself written into it.

        Called before any model is opened: a run's folder may stand for its checkpoints, and weights that are
        read or searched for become settings of the models.

        Args:
            config: What was asked for.
            out: The folder that will be written.
        """
        return config

    @property
    def scans(self) -> int:
        """How many passes over the blocks come before `map`."""
        return 0

    @property
    def local(self) -> bool:
        """Whether the scans of a tensor concern it alone; the engine then takes tensor after tensor."""
        return True

    def check_models(self, models: Models) -> None:
        """Refuse what the method cannot merge (number of parents, values that contradict each other)."""

    def reads(self, name: str, parents: int) -> Sequence[tuple[int, str]] | None:
        """Return the operands of an output tensor as (parent, tensor name); None to copy the reference's.

        The reference is the base, or the first parent. Operands have the shape of the output.
        """
        return [(parent, name) for parent in range(parents)]

    def coefficients(self, tensor: TensorInfo) -> list[float]:
        """Return the weight of each operand, where `weighted_sum` holds."""
        raise TypeError(f"{type(self).__name__} states weighted_sum, and defines no coefficients")

    def scan(self, number: int, block: Block) -> Any:
        """Return what pass `number` needs of a block."""
        raise TypeError(f"{type(self).__name__} states scans, and defines no scan")

    def skips(self, number: int, states: Sequence[Any], blocks: int) -> bool:
        """Whether pass `number` is not needed after these states; its state is then None.

        Args:
            number: The pass.
            states: Those of the passes before.
            blocks: How many blocks the pass would see.
        """
        return False

    def fold(self, number: int, total: Any, part: Any, block: Block) -> Any:
        """Add a block's part to the total so far (None at first); the block has no operands any more.

        Called in order of names and offsets, in one thread.
        """
        return [*(total or []), part]

    def settle(self, number: int, total: Any, tensors: Sequence[TensorInfo], states: Sequence[Any]) -> Any:
        """Return the state that pass `number` ends with, made of JSON values.

        Args:
            number: The pass.
            total: What `fold` has made of all parts.
            tensors: Those that the pass has seen: one where `local` holds, all of them otherwise.
            states: Those of the passes before.
        """
        return total

    def map(self, block: Block) -> Tensor:
        """Return the merged block, fp32, in the form of the operands."""
        raise TypeError(f"{type(self).__name__} defines no map")

    def extra_files(self, states: Sequence[Any]) -> Mapping[str, object]:
        """Return JSON files to write into the output, by name; for what a later merge goes on from.

        Args:
            states: Those of the scans, where `local` does not hold.
        """
        return {}

    # What every method has ------------------------------------------------------------------------

    @classmethod
    def settings(cls) -> dict[str, dataclasses.Field[Any]]:
        """Return the method's fields by the names that users type."""
        return {own.name.rstrip("_"): own for own in dataclasses.fields(cls)}

    @classmethod
    def parse(cls, given: Mapping[str, object], where: str) -> dict[str, Any]:
        """Return settings by field, without those that change nothing here.

        Raises:
            ValueError: A name is unknown; close matches are offered.
        """
        fields: dict[str, Any] = {}
        known = cls.settings()
        for typed, value in given.items():
            if typed in cls.ignored:
                continue
            own = known.get(typed) or known.get(cls.aliases.get(typed, typed).rstrip("_"))
            if own is None:
                raise ValueError(
                    f"{where}: unknown parameter {typed!r} of {cls.info.name}{suggest(typed, known)}"
                )
            check(
                own.name not in fields, typed, value, f"left out beside {own.name.rstrip('_')}", where=where
            )
            fields[own.name] = value
        return fields

    @classmethod
    def parse_parent(cls, given: Mapping[str, object], where: str) -> dict[str, Setting]:
        """Return one parent's settings, checked.

        Raises:
            ValueError: A name is unknown or not a parent's, or a value is outside its range.
        """
        fields = {own.name: own for own in dataclasses.fields(cls)}
        own: dict[str, Setting] = {}
        for name, value in cls.parse(given, where).items():
            rule = "set for all parents together"
            check(bool(fields[name].metadata.get("per_parent")), name.rstrip("_"), value, rule, where=where)
            own[name] = _checked_at(where, name, value, fields[name])
        return own

    @classmethod
    def parse_shared(cls, given: Mapping[str, object], where: str) -> dict[str, Setting]:
        """Return the settings of a slice that may differ between tensors, checked.

        Raises:
            ValueError: A name is unknown, or a value is outside its range.
        """
        fields = {own.name: own for own in dataclasses.fields(cls) if own.metadata.get("setting")}
        parsed = cls.parse(given, where).items()
        return {n: _checked_at(where, n, value, fields[n]) for n, value in parsed if n in fields}

    def values_for(
        self,
        name: str,
        position: float,
        parents: Sequence[Mapping[str, Setting]],
        *,
        shared: Mapping[str, Setting] = MappingProxyType({}),
        sources: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Return the value of every setting for one tensor.

        Args:
            name: The tensor's key.
            position: Its place among the layers.
            parents: The own settings of each operand's parent.
            shared: The settings of the tensor's slice, after a parent's own and before those of all.
            sources: The key that each operand has in its model, which filters of settings that parents may
                have for themselves are compared with; None where it is `name`.

        Raises:
            ValueError: No filter of a setting without default fits the name.
        """
        found: dict[str, Any] = {}
        read = sources or [name] * len(parents)
        for own in dataclasses.fields(self):
            if own.metadata.get("per_parent"):
                pairs = zip(read, parents, strict=True)
                found[own.name] = [self._value(own, key, position, (one, shared)) for key, one in pairs]
            elif own.metadata.get("setting"):
                found[own.name] = self._value(own, name, position, (shared,))
        return found

    def _value(
        self,
        own: dataclasses.Field[Any],
        name: str,
        position: float,
        scopes: Sequence[Mapping[str, Setting]],
    ) -> float:
        candidates = [scope[own.name] for scope in scopes if own.name in scope]
        candidates.append(getattr(self, own.name))
        for candidate in candidates:
            value = resolve(candidate, name, position)
            if value is not None:
                return value
        if own.default is dataclasses.MISSING:
            raise ValueError(f"{own.name.rstrip('_')} has no value for {name}: none of its filters fits")
        return own.default


def _checked_at(where: str, name: str, value: object, own: dataclasses.Field[Any]) -> Setting:
    try:
        return checked(name.rstrip("_"), value, own)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def register_merge(
    name: str,
    *,
    summary: str,
    paper: str | None,
    supports: set[str] | frozenset[str] = frozenset(),
    test_kwargs: Mapping[str, object] = MappingProxyType({}),
    bad_kwargs: Sequence[Mapping[str, object]] = (),
    variants: Sequence[Variant] = (),
) -> Callable[[M], M]:
    """Put a merge method into the registry.

    Args:
        name: What users type as `merge_method`; also the name of the file.
        summary: One line of what a user gets, without a full stop.
        paper: Its identifier, or None.
        supports: Flags for the contract suite: "identity" (equal parents come back unchanged), "one_parent"
            (takes a single parent), "symmetric" (the order of the parents does not matter), "bit_identity"
            (one parent with default settings comes back bit for bit), "zero_weight" (a parent with weight 0
            is as if absent).
        test_kwargs: Settings for the contract suite.
        bad_kwargs: Settings that must be refused by name.
        variants: Further forms for the contract suite.
    """

    def add(cls: M) -> M:
        cls.info = MethodInfo(
            name=name,
            kind="merge",
            summary=summary,
            paper=paper,
            target=cls,
            supports=frozenset(supports),
            test_kwargs=MappingProxyType(dict(test_kwargs)),
            bad_kwargs=tuple(bad_kwargs),
            variants=tuple(variants),
        )
        register(cls.info)
        return cls

    return add
