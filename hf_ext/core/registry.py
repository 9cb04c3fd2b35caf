"""The registry of methods: one frozen row for each, stated on the class, read by tests, docs and the CLI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from .checks import check_choice, refuse_unknown

# The package of each kind's methods; the tests of a kind stand in a folder of the same name.
FOLDERS = {
    "adapter": "adapters",
    "callback": "callbacks",
    "trainer": "trainers",
    "optimizer": "optimizers",
    "merge": "merging",
}
KINDS = tuple(FOLDERS)


def _no_settings() -> Mapping[str, object]:
    return MappingProxyType({})


def _no_inputs() -> Mapping[str, bool]:
    return MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A form of a method that differs enough to be put through the contract suite by itself.

    Args:
        name: What the form is called in test names.
        test_kwargs: Settings that choose it, laid over those of the method.
        lacks: Capability flags of the method that this form does not have.
    """

    name: str
    test_kwargs: Mapping[str, object]
    lacks: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """What the library knows of one method.

    Args:
        name: Name that users type; also the name of the source file, the test and the page.
        kind: One of `KINDS`.
        summary: One line of what a user gets, without a full stop.
        paper: Identifier such as "arXiv:2404.02948", or None for a method without a paper.
        target: The class or function that is the method.
        config: Its settings class, or None where the target takes its settings itself.
        supports: Capability flags; each kind's contract suite says what they switch on.
        test_kwargs: Smallest settings that the contract suite runs.
        bad_kwargs: Settings that must be refused with an error that names the (last) field.
        variants: Further forms of the method, for the contract suite.
    """

    name: str
    kind: str
    summary: str
    paper: str | None
    target: object
    config: type | None = None
    supports: frozenset[str] = frozenset()
    test_kwargs: Mapping[str, object] = field(default_factory=_no_settings)
    bad_kwargs: tuple[Mapping[str, object], ...] = ()
    variants: tuple[Variant, ...] = ()

    def forms(self) -> Iterator[tuple[str, MethodInfo]]:
        """Yield a test name and a row for the method and for each of its variants."""
        yield self.name, self
        for variant in self.variants:
            settings = {**self.test_kwargs, **variant.test_kwargs}
            row = replace(self, test_kwargs=settings, supports=self.supports - variant.lacks, variants=())
            yield f"{self.name}-{variant.name}", row


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a trainer is given beside model and settings; recipes and the contract suite read it.

    Args:
        columns: Forms of the training data, each a tuple of column names; the first is the usual one.
        models: Whether each constructor argument that takes a frozen model is required.
        datasets: Whether each constructor argument that takes a second data set (of the same form unless the
            trainer says otherwise) is required.
        reward: Whether `reward_funcs`, functions with the signature of GRPO's, is an argument.
        reward_optional: Whether it may be left out.
        test_columns: Forms of held-out data, where they differ from those of the training data.
    """

    columns: tuple[tuple[str, ...], ...]
    models: Mapping[str, bool] = field(default_factory=_no_inputs)
    datasets: Mapping[str, bool] = field(default_factory=_no_inputs)
    reward: bool = False
    reward_optional: bool = False
    test_columns: tuple[tuple[str, ...], ...] | None = None


_METHODS: dict[tuple[str, str], MethodInfo] = {}


def register(info: MethodInfo) -> None:
    """Add a method.

    Raises:
        ValueError: The kind is unknown, the name is not a lower-case identifier, or it is already taken
            (by any kind: a recipe names methods without their kind).
    """
    check_choice("kind", info.kind, KINDS)
    if not (info.name.isidentifier() and info.name.islower()) or info.name.endswith("_"):
        raise ValueError(f"name must be a lower-case identifier without '_' at its end, got {info.name!r}")
    for kind, name in _METHODS:
        if name == info.name:
            raise ValueError(f"{info.kind} {info.name!r} is already registered (as {kind} {name!r})")
    _METHODS[info.kind, info.name] = info


def get(kind: str, name: str) -> MethodInfo:
    """Return a method's row.

    Raises:
        ValueError: The kind or the name is unknown; close matches are offered.
    """
    check_choice("kind", kind, KINDS)
    if (kind, name) not in _METHODS:
        refuse_unknown(kind, name, names(kind))
    return _METHODS[kind, name]


def names(kind: str) -> list[str]:
    """Return the sorted names of one kind's registered methods."""
    return sorted(name for of_kind, name in _METHODS if of_kind == kind)


def methods(kind: str | None = None) -> list[MethodInfo]:
    """Return the rows of one kind, or of all, sorted by kind and name."""
    keys = sorted(_METHODS, key=lambda key: (KINDS.index(key[0]), key[1]))
    return [_METHODS[key] for key in keys if kind is None or key[0] == kind]


def forget(kind: str, name: str) -> None:
    """Remove a row; for tests of the registry itself."""
    del _METHODS[kind, name]
