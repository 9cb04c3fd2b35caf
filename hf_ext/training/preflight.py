"""What can be found wrong before a weight is read: adapter, targets, columns, places, disk, processes."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import tempfile
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import adapters  # noqa: F401 (registers; PEFT, imported first, would do it in the middle of `_compat`)
from .._compat.peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from ..core import registry
from ..core.checks import check, check_fields, refuse_unknown, suggest
from ..core.state import ROUNDS_FILE
from .callbacks import build_callbacks
from .checkpoints import checkpoints, find_checkpoint
from .recipe import EXPECTED_PROCESSES, Job, one_line
from .sources import (
    auto_class,
    load_config,
    load_data,
    load_other_datasets,
    load_tokenizer,
    model_options,
    model_path,
)
from .trainers import check_inputs, reward_functions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

    from ..callbacks._base import Callback

_FULL = "none"  # `adapter: {type: none}` trains all weights


@dataclass(frozen=True)
class Prepared:
    """What the checks have built on the way, for the run to use.

    Args:
        adapter: The adapter's config; None for full fine-tuning.
        tokenizer: The model's.
        train: Rows to train on.
        test: Held-out rows, or None.
        checkpoint: Folder to resume from, or None.
        skipped: Why newer checkpoints were passed over.
        parameters: Numbers in the model, without the adapter.
        trainable: Numbers that will be trained.
        callbacks: Those that the recipe names.
        others: Further data sets, by the trainer's argument.
        rewards: Reward functions.
    """

    adapter: PeftConfig | None
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    test: Dataset | None
    checkpoint: Path | None
    skipped: list[str]
    parameters: int
    trainable: int
    callbacks: list[Callback]
    others: dict[str, Dataset]
    rewards: list[Callable[..., Any]]


def prepare(job: Job, args: TrainingArguments) -> Prepared:
    """Check a recipe against the model's structure, the data, the disk and the processes.

    No weights are read: the model is built from its configuration on the meta device.

    Raises:
        ValueError: Something does not fit; the text names the file and the field.
        OSError: A place cannot be written.
    """
    check_surroundings(job, args)
    _check_compare(job)
    check_inputs(job)
    checkpoint, skipped = _checkpoint(job, args)
    _check_fresh(job, checkpoint)
    _check_push(job)
    adapter = build_adapter(job)
    _check_outputs(job, adapter)
    callbacks = build_callbacks(job, checkpoint)
    model = skeleton(job, args)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = check_targets(job, model, adapter)
    tokenizer = load_tokenizer(job)
    train, test = load_data(job)
    others, rewards = load_other_datasets(job), reward_functions(job)
    for role, name in job.recipe.other_models.items():
        model_path(job, name, f"other_models.{role}")
    _check_strategies(job, args)
    _check_disk(job, args, parameters, trainable)
    return Prepared(
        adapter,
        tokenizer,
        train,
        test,
        checkpoint,
        skipped,
        parameters,
        trainable,
        callbacks,
        others,
        rewards,
    )


def _checkpoint(job: Job, args: TrainingArguments) -> tuple[Path | None, list[str]]:
    wanted = job.recipe.resume_from_checkpoint
    if not job.kind.in_rounds:
        return find_checkpoint(job.output_dir, wanted, args.world_size)
    # Rounds know themselves where they were cut short, and by which of their folders to go on.
    run = Path(job.output_dir)
    if not wanted:
        return None, []
    named = run if wanted is True else Path(wanted)
    check(
        named.resolve() == run.resolve() and (run / ROUNDS_FILE).is_file(),
        f"{job.where}: resume_from_checkpoint",
        wanted,
        f"true, where output_dir holds a run in rounds ({ROUNDS_FILE})",
    )
    return run, []


# Processes and places ---------------------------------------------------------------------------------------


def check_surroundings(job: Job, args: TrainingArguments) -> None:
    """Check the number of processes, and that the output folder can be written.

    Raises:
        ValueError: More or fewer processes run than were asked for.
        OSError: The folder cannot be written.
    """
    _check_processes(job, args)
    _check_writable(job.output_dir)


def _check_processes(job: Job, args: TrainingArguments) -> None:
    wanted = {
        "--num_processes": os.environ.get(EXPECTED_PROCESSES),
        "expected_processes": job.recipe.expected_processes,
    }
    for name, value in wanted.items():
        if value is not None and int(value) != args.world_size:
            raise ValueError(
                f"{job.where}: {name} asks for {value} processes, but {args.world_size} run; start with "
                f"`hf-ext train {job.where} --num_processes {value}` (`accelerate launch --cpu` starts one)"
            )


def _check_writable(folder: str) -> None:
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, f"{place} is a file")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise type(error)(error.errno, f"output_dir: cannot write {folder}: {error.strerror}") from error


def _check_fresh(job: Job, checkpoint: Path | None) -> None:
    # Old checkpoints beside new ones: the trainer would rotate, and a later resume pick, the wrong ones.
    found = checkpoints(job.output_dir, in_rounds=job.kind.in_rounds)
    if checkpoint is None and found and not job.recipe.overwrite_output_dir:
        raise ValueError(
            f"{job.where}: output_dir {job.output_dir} already holds {found[-1].name}; continue with "
            "--resume_from_checkpoint true, start over with --overwrite_output_dir true, or name another"
        )


def _check_compare(job: Job) -> None:
    check(
        job.recipe.compare is None,
        f"{job.where}: compare",
        job.recipe.compare,
        "left out of a recipe to train; `hf-ext compare` reads it",
    )


def _check_push(job: Job) -> None:
    if not job.recipe.push_to_hub:
        return
    from huggingface_hub import constants, get_token

    check(
        not constants.HF_HUB_OFFLINE, f"{job.where}: push_to_hub", True, "false while HF_HUB_OFFLINE is set"
    )
    known = job.recipe.hub_token or get_token()
    check(
        bool(known), f"{job.where}: hub_token", None, "given, or stored with `hf auth login`, for push_to_hub"
    )


def _check_strategies(job: Job, args: TrainingArguments) -> None:
    chosen = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    check(
        chosen == "no" or job.recipe.has_eval,
        f"{job.where}: eval_strategy",
        chosen,
        "'no' without held-out data (dataset_test_split or dataset_test_size)",
    )


def _check_disk(job: Job, args: TrainingArguments, parameters: int, trainable: int) -> None:
    place = Path(job.output_dir).absolute()
    while not place.exists():
        place = place.parent
    saving = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
    if job.kind.in_rounds:  # the policy, the one before it, and the checkpoints of the last round
        saving = True
    kept = (args.save_total_limit or 1) + 1 if saving else 0  # one more while the oldest is not yet deleted
    width = 4 if job.recipe.dtype in ("auto", "float32") else 2
    # A checkpoint holds the weights and two moments; an adapter may carry frozen tensors of its own size.
    need = trainable * 4 * 4 * kept + trainable * 4 * (4 if job.recipe.export_lora else 2)
    need += parameters * width * (job.recipe.merge or job.recipe.adapter is None)
    free = shutil.disk_usage(place).free
    if free < need:
        raise ValueError(
            f"{job.where}: output_dir: the outputs need about {need / 1e9:.3f} GB, but {job.output_dir} has "
            f"{free / 1e9:.3f} GB free"
        )


# Adapter ----------------------------------------------------------------------------------------------------


def adapter_types() -> dict[str, type[PeftConfig]]:
    """Return every adapter type by lower-case name, ours and PEFT's own."""
    return {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def build_adapter(job: Job, field: str = "adapter") -> PeftConfig | None:
    """Return the adapter's config, or None for full fine-tuning.

    Args:
        job: The recipe.
        field: Where its user has written the settings, for error texts.

    Raises:
        ValueError: The type or a field is unknown (close matches are offered), or a value is out of range.
        TypeError: A value does not have its field's type.
    """
    given = job.recipe.adapter
    if given is None:
        return None
    kind, known = given.get("type"), adapter_types()
    try:
        check(
            isinstance(kind, str), f"{field}.type", kind, "the name of an adapter (see `hf-ext list adapter`)"
        )
        if str(kind).lower() == _FULL:
            return None
        if str(kind).lower() not in known:
            refuse_unknown(f"{field}.type", str(kind), [*known, _FULL])
    except ValueError as error:
        raise ValueError(f"{job.where}: {error}") from error
    cls = known[str(kind).lower()]
    hints = typing.get_type_hints(cls)
    own = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init and f.name != "peft_type"}
    fields = {name: value for name, value in given.items() if name != "type"}
    settings = check_fields(fields, own, where=job.where, prefix=f"{field}.")
    settings.setdefault("task_type", job.kind.task_type)
    try:
        return cls(**settings)  # type: ignore[arg-type]
    except (ValueError, TypeError, ImportError) as error:
        kind_of_error = TypeError if isinstance(error, TypeError) else ValueError
        raise kind_of_error(f"{job.where}: {field}.{one_line(error)}") from error


def adapter_name(adapter: PeftConfig | None) -> str:
    """Return the lower-case type of an adapter; "full" for full fine-tuning."""
    return "full" if adapter is None else str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower()


def _check_outputs(job: Job, adapter: PeftConfig | None) -> None:
    name = adapter_name(adapter)
    samples = job.recipe.generate_samples
    fits = not (samples and job.kind.scores)
    check(fits, f"{job.where}: generate_samples", samples, "0 for a reward model, which writes no text")
    flags: Mapping[str, frozenset[str]] = {row.name: row.supports for row in registry.methods("adapter")}
    if job.recipe.export_lora:
        able = sorted(known for known, supports in flags.items() if "lora_export" in supports)
        fits = name in able
        check(
            fits,
            f"{job.where}: export_lora",
            True,
            f"false for adapter type {name!r}; only {', '.join(able)} can",
        )
    if job.recipe.merge:
        fits = "merge" in flags.get(name, {"merge"}) and name != "full"
        check(fits, f"{job.where}: merge", True, f"false for adapter type {name!r}")


# Model ------------------------------------------------------------------------------------------------------


def _check_length(job: Job, args: TrainingArguments, config: PretrainedConfig) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    for name in ("max_length", "max_completion_length"):
        length = getattr(args, name, None)
        if isinstance(limit, int) and length is not None:
            rule = f"at most {limit}, the model's max_position_embeddings"
            check(length <= limit, f"{job.where}: {name}", length, rule)


def skeleton(job: Job, args: TrainingArguments) -> nn.Module:
    """Return the model without its weights, on the meta device.

    Raises:
        ValueError: There is no such model, or it cannot read rows of `max_length` tokens.
    """
    config = load_config(job)
    _check_length(job, args, config)
    return _on_meta(job, config)


def _on_meta(job: Job, config: PretrainedConfig) -> nn.Module:
    trust = {"trust_remote_code": bool(job.settings.get("trust_remote_code", False))}
    options = {name: value for name, value in model_options(job).items() if name == "attn_implementation"}
    try:
        with torch.device("meta"):
            return auto_class(job).from_config(copy.deepcopy(config), **trust, **options)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{job.where}: model_name_or_path {job.recipe.model_name_or_path!r}: {one_line(error)}"
        ) from error


def check_targets(job: Job, model: nn.Module, adapter: PeftConfig | None, field: str = "adapter") -> int:
    """Inject the adapter into a model on the meta device, and return how many numbers it trains.

    Args:
        job: The recipe.
        model: The model; it is changed.
        adapter: The adapter, or None for full fine-tuning.
        field: Where its user has written the settings, for error texts.

    Raises:
        ValueError: A target matches no layer (close matches are offered), or the settings do not fit a layer.
    """
    from peft import get_peft_model

    if adapter is None:
        return sum(p.numel() for p in model.parameters())
    for name in ("target_modules", "modules_to_save"):
        _check_names(job, f"{field}.{name}", getattr(adapter, name, None), model)
    try:
        injected = get_peft_model(model, _without_weights(adapter), low_cpu_mem_usage=True)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{job.where}: {field}.{one_line(error)}") from error
    except (RuntimeError, NotImplementedError):
        # Some of PEFT's own starts compute with the weights; those types are checked when they are injected.
        return 0
    return sum(p.numel() for p in injected.parameters() if p.requires_grad)


def _without_weights(adapter: PeftConfig) -> PeftConfig:
    """Return a copy of the settings for an injection that only shows whether they fit."""
    copied = copy.deepcopy(adapter)  # PEFT resolves "all-linear" in place
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(adapter.peft_type)  # type: ignore[arg-type]
    layer = getattr(tuner, "tuner_layer_cls", None)
    # Tensors that a checkpoint leaves out would be computed from the weights.
    kept_by = getattr(layer, "kept_by", None)
    if kept_by is not None:
        setattr(copied, kept_by, True)
    return copied


def _check_names(job: Job, field: str, wanted: object, model: nn.Module) -> None:
    # PEFT is content when one name of a list matches, and leaves the others out without a word.
    if not isinstance(wanted, list | set | tuple):
        return
    paths = [path for path, _ in model.named_modules() if path]
    for name in sorted(wanted):
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            endings = sorted(
                {path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()}
            )
            hint = suggest(str(name), endings) or f"; the model's layers end in {', '.join(endings)}"
            raise ValueError(f"{job.where}: {field}: {name!r} matches no layer{hint}")
