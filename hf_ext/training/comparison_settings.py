"""What `hf-ext compare` varies: methods, seeds and learning rates, all checked before a weight is read."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.checks import check, check_fields, from_text, refuse_unknown
from .preflight import adapter_types
from .recipe import COMMAND_LINE, Job

BASELINE = "lora"
GRID = (1e-4, 3e-4, 1e-3, 3e-3)
_TUNE_SEED_OFFSET = 1000

# Known methods that are more than the name of an adapter type. LoraConfig has lora_alpha 8 whatever r is;
# a scale of 1 is the default of our own types.
_FORMS: dict[str, dict[str, Any]] = {
    "dora": {"type": "lora", "use_dora": True},
    "bone_mini": {"type": "bone", "form": "mini"},
    "bone_bat": {"type": "bone", "form": "bat"},
    "full": {"type": "none"},
}
_SCALE_ONE = ("lora", "dora", "eva")
# Types of ours that a name means before they are installed, so that the error can say which type is missing.
_TYPES = ("lora", "pissa", "sorsa", "bone", "loldu", "eva", "lora_ga")
# Fields of the recipe's `adapter` that mean the same to every type, and go to each that has them.
SHARED_FIELDS = (
    "r",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
)


@dataclass(kw_only=True)
class CompareSettings:
    """The keys of a recipe's `compare:`.

    Args:
        methods: Names of methods (`KNOWN`, or any adapter type), or a mapping from label to settings: fields
            of the adapter's config, `type` where the label is not a known name, and `learning_rates` for a
            grid of its own. The first is the baseline. None for LoRA and the recipe's own adapter.
        seeds: Number of runs of each method, >= 1; they take the recipe's `seed` and the numbers after it.
        learning_rates: The grid that every method's rate is chosen from, each > 0.
        shared_learning_rate: A rate at which all methods are reported besides; None for none.
        tune_split: Split of the data set to choose the rates on; neither the train split nor the test split.
        tune_size: Training rows to hold back instead, >= 1; None for as many as there are held-out rows.
        tune_seed: Seed of the runs that choose the rates, none of those reported; None for `seed` + 1000.
        eval_points: Evaluations of a reported run after the one at its start, evenly over its steps, >= 1;
            runs that choose a rate are evaluated once, at the end.

    Raises:
        ValueError: A field is outside its range, or two contradict each other.
    """

    methods: list[str] | dict[str, Any] | None = None
    seeds: int = 3
    learning_rates: list[float] = field(default_factory=lambda: list(GRID))
    shared_learning_rate: float | None = None
    tune_split: str | None = None
    tune_size: int | None = None
    tune_seed: int | None = None
    eval_points: int = 6

    def __post_init__(self) -> None:
        self.learning_rates = check_grid(self.learning_rates, "compare.learning_rates")
        for name in ("seeds", "eval_points"):
            check(getattr(self, name) >= 1, f"compare.{name}", getattr(self, name), "at least 1")
        rate = self.shared_learning_rate
        check(rate is None or 0.0 < rate < math.inf, "compare.shared_learning_rate", rate, "positive")
        size = self.tune_size
        check(size is None or size >= 1, "compare.tune_size", size, "at least 1")
        rule = "left out where compare.tune_split is given"
        check(size is None or self.tune_split is None, "compare.tune_size", size, rule)
        check(self.methods is None or bool(self.methods), "compare.methods", self.methods, "at least one")


@dataclass(frozen=True)
class Method:
    """One method to compare.

    Args:
        label: Its name in the report.
        adapter: Its adapter's settings, with `type`.
        learning_rates: Its grid, ascending.
        own_grid: Whether the grid is its own.
    """

    label: str
    adapter: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    own_grid: bool

    def job(self, job: Job) -> Job:
        """Return the recipe with this method's adapter."""
        return replace(job, recipe=replace(job.recipe, adapter=dict(self.adapter)))

    @property
    def field(self) -> str:
        """Where a user writes its settings, for error texts."""
        return f"compare.methods.{self.label}"


def check_grid(rates: Sequence[float], name: str) -> list[float]:
    """Return a grid of learning rates in ascending order.

    Raises:
        ValueError: It is empty, has a rate that is not positive and finite, or has one twice.
    """
    check(len(rates) > 0, name, list(rates), "at least one learning rate")
    for rate in rates:
        check(0.0 < rate < math.inf, name, rate, "positive and finite in every place")
    check(len(set(rates)) == len(rates), name, list(rates), "without repetitions")
    return sorted(float(rate) for rate in rates)


def read_settings(job: Job) -> CompareSettings:
    """Return the checked keys of the recipe's `compare`.

    Raises:
        ValueError: A key is unknown, outside its range, or contradicts another.
        TypeError: A value does not have its key's type.
    """
    given = dict(job.recipe.compare or {})
    given["learning_rates"] = _numbers(given.get("learning_rates", list(GRID)))
    hints = typing.get_type_hints(CompareSettings)
    checked: dict[str, Any] = dict(check_fields(given, hints, where=job.where, prefix="compare."))
    try:
        settings = CompareSettings(**checked)
        seed = run_seeds(job, settings)
        tune = tune_seed(job, settings)
        check(tune not in seed, "compare.tune_seed", tune, f"none of the reported seeds {seed}")
        _check_splits(job, settings)
    except ValueError as error:
        raise ValueError(f"{job.where}: {error}") from error
    return settings


def _check_splits(job: Job, settings: CompareSettings) -> None:
    recipe, split = job.recipe, settings.tune_split
    check(recipe.trainer == "sft", "trainer", recipe.trainer, "'sft' in a comparison of adapters")
    check(not recipe.callbacks, "callbacks", recipe.callbacks, "left out of a comparison of adapters")
    check(
        recipe.has_eval,
        "dataset_test_split",
        recipe.dataset_test_split,
        "given, or dataset_test_size: what is reported is the loss on held-out rows",
    )
    for name in ("dataset_test_split", "dataset_train_split"):
        rule = f"another split than {name}: a rate chosen there would not be told from overfitting"
        check(split is None or split != getattr(recipe, name), "compare.tune_split", split, rule)


def _numbers(value: object) -> object:
    # YAML 1.1 reads 1e-3 as text.
    return [from_text(item, float) for item in value] if isinstance(value, list | tuple) else value


def run_seeds(job: Job, settings: CompareSettings) -> list[int]:
    """Return the seeds of the reported runs."""
    first = int(job.settings.get("seed", 42))
    return [first + index for index in range(settings.seeds)]


def tune_seed(job: Job, settings: CompareSettings) -> int:
    """Return the seed of the runs that choose the learning rates."""
    first = int(job.settings.get("seed", 42))
    return first + _TUNE_SEED_OFFSET if settings.tune_seed is None else settings.tune_seed


# Methods ----------------------------------------------------------------------------------------------------


def read_methods(job: Job, settings: CompareSettings, chosen: Sequence[str] | None = None) -> list[Method]:
    """Return the methods to compare, the baseline first.

    Args:
        job: The recipe, for the fields of its `adapter` that all methods share.
        settings: The checked `compare`.
        chosen: Labels of the recipe's methods, or known names, to take instead of the recipe's; None for
            those.

    Raises:
        ValueError: A method, its adapter type or one of its fields is unknown, or a grid is not one.
        TypeError: A method's settings are not a mapping.
    """
    given = _given(job, settings)
    labels = list(given) if chosen is None else list(chosen)
    where = job.where if chosen is None else f"{COMMAND_LINE}: --methods"
    check(bool(labels) and all(labels), where, ",".join(labels), "names with commas between them")
    for label in labels:
        check(labels.count(label) == 1, f"{where}: {label}", label, "given once")
        if label not in given and label not in known_methods():
            refuse_unknown(f"{where}: method", label, {*given, *known_methods()})
    try:
        methods = [_method(job, settings, label, given.get(label)) for label in labels]
        _check_leftover(job, labels)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{job.where}: {error}") from error
    return methods


def known_methods() -> list[str]:
    """Return the names that need no settings."""
    return sorted({*_FORMS, *_TYPES, *adapter_types()})


def _given(job: Job, settings: CompareSettings) -> dict[str, Any]:
    if isinstance(settings.methods, dict):
        return settings.methods
    if settings.methods is not None:
        repeated = {name for name in settings.methods if settings.methods.count(name) > 1}
        check(not repeated, f"{job.where}: compare.methods", settings.methods, "without repetitions")
        return dict.fromkeys(settings.methods)
    own = (job.recipe.adapter or {}).get("type")
    return dict.fromkeys([BASELINE, *([str(own).lower()] if own and str(own).lower() != BASELINE else [])])


def _method(job: Job, settings: CompareSettings, label: str, given: object) -> Method:
    name = f"compare.methods.{label}"
    if given is None and label not in known_methods():
        refuse_unknown("compare.methods: method", label, known_methods())
    if given is not None and not isinstance(given, dict):
        raise TypeError(f"{name} must be settings of the method or nothing, got {given!r}")
    own: dict[str, Any] = dict(given or {})
    rates = own.pop("learning_rates", None)
    grid = (
        settings.learning_rates
        if rates is None
        else check_grid(_own_rates(rates, name), f"{name}.learning_rates")
    )
    if label in known_methods():
        rule = f"left out: {label!r} is the name of a method (another label may have any type)"
        check("type" not in own, f"{name}.type", own.get("type"), rule)
        own = {**_FORMS.get(label, {"type": label}), **_own_fields(job, label), **own}
    else:
        rule = "the adapter's type, since the label is no method's name"
        check(isinstance(own.get("type"), str), f"{name}.type", own.get("type"), rule)
    adapter = _with_shared(job, name, own)
    if label in _SCALE_ONE and "lora_alpha" not in adapter:
        adapter["lora_alpha"] = adapter.get("r", 8)
    return Method(label, adapter, tuple(grid), rates is not None)


def _own_rates(rates: object, name: str) -> list[float]:
    hints = {"learning_rates": list[float]}
    checked = check_fields({"learning_rates": _numbers(rates)}, hints, where="compare", prefix=f"{name}.")
    return typing.cast("list[float]", checked["learning_rates"])


def _with_shared(job: Job, name: str, own: dict[str, Any]) -> dict[str, Any]:
    kind, types = str(own["type"]).lower(), adapter_types()
    if kind == "none":
        rule = "without settings of an adapter: all weights are trained"
        check(set(own) == {"type"}, name, sorted(own), rule)
        return own
    if kind not in types:
        if kind in _TYPES:
            raise ValueError(f"{name}: the adapter type {kind!r} is not installed")
        refuse_unknown(f"{name}.type", kind, types)
    has = {f.name for f in dataclasses.fields(types[kind]) if f.init}
    given = job.recipe.adapter or {}
    return {**{key: given[key] for key in SHARED_FIELDS if key in given and key in has}, **own}


def _own_fields(job: Job, label: str) -> dict[str, Any]:
    """Return the fields of the recipe's adapter that only its own type has, where that is this method."""
    given = job.recipe.adapter or {}
    if str(given.get("type")).lower() != label:
        return {}
    return {key: value for key, value in given.items() if key not in (*SHARED_FIELDS, "type")}


def _check_leftover(job: Job, labels: Sequence[str]) -> None:
    given = job.recipe.adapter or {}
    kind = str(given.get("type")).lower()
    for key in given:
        if key not in (*SHARED_FIELDS, "type") and kind not in labels:
            raise ValueError(
                f"adapter.{key} would reach no method: all share {', '.join(SHARED_FIELDS)}; write others "
                "under compare.methods"
            )
