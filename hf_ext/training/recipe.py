"""Recipes: one YAML file of flat keys, those of the trainer's config and ours, all checked.

TRL's parser hands YAML values to its dataclasses as they come, so that a list passes for a number and `1e-3`
stays text. Here a file and the command line go through the same checks before a dataclass sees a value.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..core.checks import check, check_choice, check_fields, suggest
from ..core.yaml_files import read_mapping
from . import trainers

if TYPE_CHECKING:
    from transformers import TrainingArguments

EXPECTED_PROCESSES = "HF_EXT_EXPECTED_PROCESSES"  # set by our launcher, read by every process it starts
COMMAND_LINE = "command line"

# Keys of the trainer's that would have no effect here, with the reason.
_REFUSED = {
    "hub_strategy": "the adapter is pushed once, at the end; leave it out",
    "hub_always_push": "the adapter is pushed once, at the end; leave it out",
    "eval_on_start": "evaluation before and after is always done where there is a test split; leave it out",
    "local_rank": "the launcher sets it; leave it out",
}


_ROLES = (
    *("prompt", "completion", "messages", "text", "chosen", "rejected", "answer", "anchors", "refusal"),
    *("pass_rate", "sample_weight", "label", "input_ids"),
)


def _choice(default: str, choices: tuple[str, ...]) -> Any:
    return field(default=default, metadata={"choices": choices})


@dataclass(kw_only=True)
class Recipe:
    """What a recipe says beside the trainer's own settings.

    Args:
        model_name_or_path: `embedded:tiny-llama`, a Hub id or a local folder.
        dataset_name: `embedded:stdlib-docstrings`, a Hub id, a local folder, or a json, jsonl, csv or parquet
            file.
        model_revision: Branch, tag or commit of a Hub model.
        dtype: Type of the weights in memory; "auto" for that of the model's files.
        attn_implementation: Attention of transformers, such as "sdpa"; None for the model's default.
        dataset_config: Configuration of a Hub data set.
        dataset_train_split: Name of the split to train on.
        dataset_test_split: Name of the held-out split; None for no evaluation, unless dataset_test_size is
            given.
        dataset_test_size: Rows (int), or share of the rows (float in (0, 1)), to cut from the train split.
        dataset_columns: Column by role (prompt, completion, messages, text, chosen, rejected, answer, ...),
            where the data set has other names.
        max_train_samples: Rows to train on, taken evenly over the split; None for all.
        max_eval_samples: Rows to evaluate on, taken evenly over the split; None for all.
        trainer: Kind of training: "trainer" (Transformers' own, on text), TRL's "sft", "dpo", "kto",
            "reward", "grpo", "rloo" and "distillation", or one of `hf-ext list trainer`.
        other_models: Frozen models by the trainer's argument (`teacher_model`, ...), named as
            model_name_or_path is.
        other_datasets: Further data sets by the trainer's argument (`retain_dataset`, ...), named as
            dataset_name is; split, columns and limits are those of the training data.
        reward_funcs: Rewards, for trainers that sample: an embedded task's name or a function's dotted path,
            or a list of such.
        adapter: `type` (one of `hf-ext list adapter`, or of PEFT's own) and the fields of its config; None
            trains all weights.
        callbacks: Fields of each callback by its name (`hf-ext list callback`), in the order in which they
            are attached.
        resume_from_checkpoint: True for the newest complete checkpoint in output_dir, or a checkpoint folder.
        overwrite_output_dir: Whether a fresh run may delete the checkpoints that output_dir holds.
        expected_processes: World size to insist on: `accelerate launch --cpu --num_processes 2` runs one.
        cpu_threads: Threads of each process for work on the CPU; None for torch's choice, one for each core.
            On a busy machine the threads of a small model wait for one another more than they compute.
        export_lora: Whether to write `<output_dir>/lora`, an ordinary LoRA checkpoint.
        merge: Whether to write `<output_dir>/merged`, the model with the adapter in its weights.
        verify_outputs: Whether to reload what was written and compare its logits with the trained ones.
        generate_samples: Held-out rows to generate a completion for at the end, >= 0.
        max_new_tokens: Longest generated completion, tokens.
        push_to_hub: Whether to upload the adapter (without one, the whole model) at the end.
        hub_model_id: Repository to push to.
        hub_private_repo: Whether a repository made by the push is private; None for the account's default.
        hub_token: Token for the push; None for the stored one.
        hub_revision: Branch to push to; None for the main one.
        compare: What `hf-ext compare` varies (see `comparison_settings.CompareSettings`).

    Raises:
        ValueError: A field is outside its range, or two contradict each other.
    """

    model_name_or_path: str
    dataset_name: str
    model_revision: str | None = None
    dtype: str = _choice("auto", ("auto", "float32", "bfloat16", "float16"))
    attn_implementation: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    dataset_test_size: int | float | None = None
    dataset_columns: dict[str, str] = field(default_factory=dict)
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    trainer: str = _choice("sft", trainers.NAMES)
    other_models: dict[str, str] = field(default_factory=dict)
    other_datasets: dict[str, str] = field(default_factory=dict)
    reward_funcs: str | list[str] | None = None
    adapter: dict[str, Any] | None = None
    callbacks: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    resume_from_checkpoint: bool | str | None = None
    overwrite_output_dir: bool = False
    expected_processes: int | None = None
    cpu_threads: int | None = None
    export_lora: bool = False
    merge: bool = False
    verify_outputs: bool = True
    generate_samples: int = 0
    max_new_tokens: int = 128
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_token: str | None = None
    hub_revision: str | None = None
    compare: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "expected_processes", "cpu_threads"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "at least 1")
        check(self.generate_samples >= 0, "generate_samples", self.generate_samples, "at least 0")
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        self._check_data()
        for name in ("export_lora", "merge"):
            given = getattr(self, name)
            check(not given or self.adapter is not None, name, given, "false without an adapter")
        check(
            not self.push_to_hub or bool(self.hub_model_id),
            "hub_model_id",
            self.hub_model_id,
            "a repository to push to",
        )

    def _check_data(self) -> None:
        size = self.dataset_test_size
        if size is not None:
            check(
                self.dataset_test_split is None,
                "dataset_test_size",
                size,
                "left out where dataset_test_split is given",
            )
            fits = size >= 1 if isinstance(size, int) else 0.0 < size < 1.0
            check(fits, "dataset_test_size", size, "a number of rows, or a share between 0 and 1")
        for role in self.dataset_columns:
            check_choice("dataset_columns", role, _ROLES)

    @property
    def has_eval(self) -> bool:
        """Whether the recipe names held-out data."""
        return self.dataset_test_split is not None or self.dataset_test_size is not None


@dataclass(frozen=True)
class Job:
    """A recipe whose names, types and choices have been checked.

    Args:
        where: The file, for error texts.
        recipe: Our own settings.
        settings: Those of the trainer's config, as given.
    """

    where: str
    recipe: Recipe
    settings: Mapping[str, Any]

    @property
    def output_dir(self) -> str:
        """The run's folder, as typed."""
        return str(self.settings["output_dir"])

    @property
    def kind(self) -> trainers.Kind:
        """The kind of training."""
        return trainers.kind_of(self.recipe.trainer)

    def training_arguments(self) -> TrainingArguments:
        """Return the trainer's config; this starts the process group where a launcher asks for one.

        Raises:
            ValueError: A value is outside its range, or two contradict each other; the text names the file.
        """
        config = trainers.config_of(self.recipe.trainer)
        try:
            return config(**self.settings)
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"{self.where}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return an exception's text on one line."""
    # A KeyError's text is the repr of its argument.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a recipe and lay `--key value` arguments over it.

    Args:
        path: The YAML file.
        overrides: Command-line arguments; `--adapter.r 8` sets one field of the adapter.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no YAML mapping, or a key is unknown, missing, refused or outside its range.
        TypeError: A value does not have its key's type.
    """
    where = str(path)
    content = read_mapping(Path(path), "recipe")
    hints, choices = known_fields(_trainer_of(content, overrides, where))
    values: dict[str, Any] = {}
    for source, given in ((where, content), (COMMAND_LINE, parse_overrides(overrides, hints))):
        _refuse_without_effect(given, source)
        checked = check_fields(_undo_yaml_booleans(given, choices), hints, where=source)
        _check_choices(checked, choices, source)
        values = _overlay(values, checked)
    for name in ("model_name_or_path", "dataset_name", "output_dir"):
        if not values.get(name):
            raise ValueError(f"{where}: {name} is missing")
    own = {f.name for f in dataclasses.fields(Recipe)}
    try:
        recipe = Recipe(**{name: value for name, value in values.items() if name in own})
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error
    return Job(where, recipe, {name: value for name, value in values.items() if name not in own})


def _trainer_of(content: Mapping[str, Any], overrides: Sequence[str], where: str) -> str:
    """Return the kind of training, on which the other keys depend."""
    typed = parse_overrides(overrides, {}, only="trainer")
    source, named = (COMMAND_LINE, typed) if "trainer" in typed else (where, content)
    name = named.get("trainer", "sft")
    check_choice(f"{source}: trainer", name, trainers.NAMES)
    return str(name)


def _refuse_without_effect(given: Mapping[str, Any], where: str) -> None:
    for name, reason in _REFUSED.items():
        if name in given:
            raise ValueError(f"{where}: {name} has no effect in a recipe: {reason}")


def _undo_yaml_booleans(given: Mapping[str, Any], choices: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    # YAML 1.1 reads `no` as false, and "no" is the name of a strategy.
    no = {name for name, value in given.items() if value is False and "no" in choices.get(name, ())}
    return {name: "no" if name in no else value for name, value in given.items()}


def known_fields(trainer: str = "sft") -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Return every accepted key with its type, and the choices of those that have a closed list.

    A key that is in both dataclasses means ours.

    Args:
        trainer: Kind of training.
    """
    hints: dict[str, Any] = {}
    choices: dict[str, tuple[str, ...]] = {}
    for owner in (trainers.config_of(trainer), Recipe):
        types_of = typing.get_type_hints(owner)
        for f in dataclasses.fields(owner):
            if f.init:
                hints[f.name] = types_of[f.name]
                closed = f.metadata.get("choices") or _enum_values(types_of[f.name])
                if closed:
                    choices[f.name] = tuple(closed)
    return hints, choices


def _enum_values(hint: Any) -> list[str]:
    arguments = (
        typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    )
    for argument in arguments:
        if isinstance(argument, type) and issubclass(argument, enum.Enum):
            return [str(member.value) for member in argument]
    return []


def _check_choices(given: Mapping[str, Any], choices: Mapping[str, Iterable[str]], where: str) -> None:
    for name, value in given.items():
        if name in choices and value is not None and not isinstance(value, enum.Enum):
            check_choice(f"{where}: {name}", value, choices[name])


def parse_overrides(
    arguments: Sequence[str], hints: Mapping[str, Any], only: str | None = None
) -> dict[str, Any]:
    """Return `--key value`, `--key=value`, `--flag` and `--adapter.r 8` arguments as settings.

    A key with several dots, such as `--callbacks.infinite_lr.anneal_start 0.5`, sets a field further inside.

    Args:
        arguments: The command line.
        hints: Types by key.
        only: The one key to look for; the others are passed over unread.

    Raises:
        ValueError: An argument does not begin with "--", or has no place in the settings.
    """
    settings: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ValueError(f"{COMMAND_LINE}: expected --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            # A flag alone means true; a negative number is a value.
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        name, dot, inner = key.partition(".")
        if only is not None and key != only:
            continue
        if not dot:
            settings[name] = _value(text, hints.get(name, Any))
            continue
        if name not in hints:
            raise ValueError(f"{COMMAND_LINE}: unknown field {key!r}{suggest(name, hints)}")
        nested = settings.setdefault(name, {})
        *outer, last = inner.split(".")
        for part in outer:
            nested = nested.setdefault(part, {}) if isinstance(nested, dict) else nested
        if not isinstance(nested, dict):
            raise ValueError(f"{COMMAND_LINE}: {key} sets a field of {name}, which is {nested!r}")
        nested[last] = _value(text, Any)
    return settings


def _value(text: str, hint: Any) -> Any:
    wanted = typing.get_args(hint) or (hint,)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if str in wanted and type(value) not in (*wanted, type(None), bool, list, dict):
        return text  # a name made of digits
    return None if value is None and text not in ("null", "~", "None") else value


def _overlay(given: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(given)
    for name, value in typed.items():
        below = merged.get(name)
        # `--adapter.r 8` changes one field of what the file says.
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[name] = _overlay(below, value) if both else value  # type: ignore[arg-type]
    return merged
