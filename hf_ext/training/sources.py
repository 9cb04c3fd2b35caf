"""Where models and data come from: embedded, on the disk, or on the Hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..assets import PREFIX, resolve
from ..core.checks import check, refuse_unknown, suggest
from .recipe import Job, one_line

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_DATA = f"{PREFIX}stdlib-docstrings"
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


# Models -----------------------------------------------------------------------------------------------------


def model_path(job: Job, name: str | None = None, field: str = "model_name_or_path") -> str:
    """Return what `from_pretrained` takes for the recipe's model, or for another that it names.

    Raises:
        ValueError: The name is an embedded one that does not exist, or a path without a folder.
    """
    name = job.recipe.model_name_or_path if name is None else name
    try:
        path = resolve(name)
    except ValueError as error:
        raise ValueError(f"{job.where}: {error}") from error
    if path == name and _is_path(name) and not Path(name).is_dir():
        raise ValueError(f"{job.where}: {field}: there is no folder {name}")
    return path


def hub_id(job: Job) -> str | None:
    """Return the model's Hub id, or None for an embedded model or a local folder."""
    name = job.recipe.model_name_or_path
    return None if name.startswith(PREFIX) or _is_path(name) or Path(name).is_dir() else name


def _is_path(name: str) -> bool:
    # A Hub id is `name` or `owner/name`; everything else that has a separator can only be a path.
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def load_config(job: Job) -> PretrainedConfig:
    """Read the model's configuration, without its weights.

    Raises:
        ValueError: There is no such model, or its configuration is damaged.
    """
    from transformers import AutoConfig

    path = model_path(job)
    try:
        labels = {"num_labels": 1} if job.kind.scores else {}
        return AutoConfig.from_pretrained(path, **_where_from(job), **labels)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{job.where}: model_name_or_path {job.recipe.model_name_or_path!r}: {one_line(error)}"
        ) from error


def load_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """Read the model's tokenizer.

    Raises:
        ValueError: The model has none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path(job), **_where_from(job))
    except (OSError, ValueError, KeyError) as error:
        name = job.recipe.model_name_or_path
        raise ValueError(
            f"{job.where}: model_name_or_path {name!r}: no tokenizer: {one_line(error)}"
        ) from error


def load_model(job: Job) -> PreTrainedModel:
    """Read the model's weights."""
    return auto_class(job).from_pretrained(model_path(job), **_where_from(job), **model_options(job))


def auto_class(job: Job) -> Any:
    """Return the class of transformers that reads the recipe's model."""
    import transformers

    return getattr(transformers, job.kind.auto_class)


def load_other_models(job: Job) -> dict[str, PreTrainedModel]:
    """Read the frozen models that a recipe names, by the trainer's argument."""
    from transformers import AutoModelForCausalLM

    options = {**_where_from(job), **model_options(job)}
    for name in ("revision", "num_labels"):  # those of the trained model
        options.pop(name, None)
    return {
        role: AutoModelForCausalLM.from_pretrained(model_path(job, name, f"other_models.{role}"), **options)
        for role, name in job.recipe.other_models.items()
    }


def model_options(job: Job) -> dict[str, Any]:
    """Return the options of `from_pretrained` that shape the model."""
    options: dict[str, Any] = dict(_as_dict(job.settings.get("model_init_kwargs")))
    options.setdefault("dtype", job.recipe.dtype)
    if job.kind.scores:
        options.setdefault("num_labels", 1)
    if job.recipe.attn_implementation is not None:
        options["attn_implementation"] = job.recipe.attn_implementation
    return options


def _as_dict(value: object) -> dict[str, Any]:
    return json.loads(value) if isinstance(value, str) else dict(value or {})  # type: ignore[call-overload]


def _where_from(job: Job) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": bool(job.settings.get("trust_remote_code", False))}
    if job.recipe.model_revision is not None:
        options["revision"] = job.recipe.model_revision
    return options


# Data -------------------------------------------------------------------------------------------------------


def load_data(job: Job) -> tuple[Dataset, Dataset | None]:
    """Return the training rows and the held-out rows, with TRL's column names.

    Raises:
        ValueError: There is no such data set, split or column; close matches are offered.
    """
    recipe = job.recipe
    train = _named(job, _load_split(job, "dataset_train_split", recipe.dataset_train_split))
    test: Dataset | None = None
    if recipe.dataset_test_split is not None:
        held_out = _load_split(job, "dataset_test_split", recipe.dataset_test_split, test=True)
        test = _named(job, held_out, test=True)
    elif recipe.dataset_test_size is not None:
        train, test = _cut(job, train, recipe.dataset_test_size)
    train = _spread(train, recipe.max_train_samples)
    for field, rows in (("dataset_train_split", train), ("dataset_test_split", test)):
        if rows is not None and not len(rows):
            raise ValueError(f"{job.where}: {field}: the split of {recipe.dataset_name} has no rows")
    return train, None if test is None else _spread(test, recipe.max_eval_samples)


def load_other_datasets(job: Job) -> dict[str, Dataset]:
    """Return the further data sets that a recipe names, by the trainer's argument.

    Raises:
        ValueError: There is no such data set, split or column.
    """
    found: dict[str, Dataset] = {}
    for role, name in job.recipe.other_datasets.items():
        other = replace(job, recipe=replace(job.recipe, dataset_name=name))
        field = f"other_datasets.{role}"
        rows = _named(other, _load_split(other, field, other.recipe.dataset_train_split))
        found[role] = _spread(rows, other.recipe.max_train_samples)
    return found


def _cut(job: Job, rows: Dataset, size: int | float) -> tuple[Dataset, Dataset]:
    held_out = size if isinstance(size, int) else max(1, round(size * len(rows)))
    check(
        held_out < len(rows),
        f"{job.where}: dataset_test_size",
        size,
        f"fewer than the {len(rows)} rows there are",
    )
    parts = rows.train_test_split(test_size=held_out, seed=int(job.settings.get("seed", 42)))
    return parts["train"], parts["test"]


def _spread(rows: Dataset, limit: int | None) -> Dataset:
    # Neighbouring rows are alike (one module, one author): the first few would not stand for the split.
    if limit is None or limit >= len(rows):
        return rows
    return rows.select([index * len(rows) // limit for index in range(limit)])


def _load_split(job: Job, field: str, split: str, *, test: bool = False) -> Dataset:
    name = job.recipe.dataset_name
    if name.startswith(PREFIX):
        return _load_embedded(job, field, split, test=test)
    path = Path(name)
    if (_is_path(name) or path.suffix in _READERS) and not path.exists():
        raise ValueError(f"{job.where}: dataset_name: there is no file or folder {name}")
    try:
        return _load_from_disk_or_hub(job, path, split)
    except (OSError, ValueError, KeyError, ImportError) as error:
        # datasets names neither the field nor a broken file; the cause says what is wrong with it.
        cause = f" ({one_line(error.__cause__)})" if error.__cause__ is not None else ""
        raise ValueError(f"{job.where}: {field} {split!r} of {name}: {one_line(error)}{cause}") from error


def _load_from_disk_or_hub(job: Job, path: Path, split: str) -> Dataset:
    from datasets import Dataset, load_dataset, load_from_disk

    name, config = job.recipe.dataset_name, job.recipe.dataset_config
    if path.is_file() and path.suffix in _READERS:
        rows = load_dataset(_READERS[path.suffix], data_files={"train": name}, split=split)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        stored = load_from_disk(name)
        names = [] if isinstance(stored, Dataset) else [str(known) for known in stored]
        if not isinstance(stored, Dataset) and split not in names:
            raise ValueError(f"there is no such split{suggest(split, names)} It has: {', '.join(names)}.")
        rows = stored if isinstance(stored, Dataset) else stored[split]
    else:
        rows = load_dataset(name, config, split=split)
    return rows


def _load_embedded(job: Job, field: str, split: str, *, test: bool = False) -> Dataset:
    from ..data import EMBEDDED, load_docstrings, load_preferences, load_prompts

    name = job.recipe.dataset_name
    task = name.removeprefix(PREFIX)
    try:
        if name == EMBEDDED_DATA:
            return load_docstrings(split)
        if task not in EMBEDDED:
            known = [EMBEDDED_DATA, *(f"{PREFIX}{task}" for task in EMBEDDED)]
            refuse_unknown("dataset_name", name, known)
        pairs = any("rejected" in form for form in _forms(job, test=test))
        return load_preferences(task, split) if pairs else load_prompts(task, split)
    except ValueError as error:
        raise ValueError(f"{job.where}: {str(error).replace('split must', f'{field} must', 1)}") from error


def _forms(job: Job, *, test: bool = False) -> tuple[tuple[str, ...], ...]:
    """Return the forms of data that the recipe's trainer takes."""
    inputs = job.kind.inputs
    forms = (inputs.test_columns if test else None) or inputs.columns
    text = str(job.settings.get("dataset_text_field", "text"))
    return tuple((text,) if form == ("text",) else form for form in forms)


def _named(job: Job, rows: Dataset, *, test: bool = False) -> Dataset:
    """Rename columns as the recipe says, and refuse data that the trainer could not use."""
    where, renamed = job.where, job.recipe.dataset_columns
    for role, column in renamed.items():
        if column not in rows.column_names:
            hint = suggest(column, rows.column_names)
            raise ValueError(
                f"{where}: dataset_columns.{role}: there is no column {column!r}{hint} {_listed(rows)}"
            )
    text = str(job.settings.get("dataset_text_field", "text"))
    rows = rows.rename_columns({column: role for role, column in renamed.items() if column != role})
    if "dataset_text_field" in job.settings and text not in rows.column_names:
        hint = suggest(text, rows.column_names)
        raise ValueError(f"{where}: dataset_text_field: there is no column {text!r}{hint} {_listed(rows)}")
    forms = _forms(job, test=test)
    if not any(set(form) <= set(rows.column_names) for form in forms):
        hints = {f"{name!r}{suggest(name, rows.column_names)}" for form in forms for name in form}
        close = " ".join(sorted(hint for hint in hints if "mean" in hint))
        wanted = ", or ".join(" and ".join(map(repr, form)) for form in forms)
        raise ValueError(
            f"{where}: dataset_name {job.recipe.dataset_name!r} needs the columns {wanted}; name them with "
            f"dataset_columns. {_listed(rows)} {close}".rstrip()
        )
    return rows


def _listed(rows: Dataset) -> str:
    return f"It has: {', '.join(rows.column_names)}."
