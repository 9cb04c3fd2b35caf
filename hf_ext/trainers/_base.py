"""What every trainer of the library shares: its registration, its state in checkpoints, metrics, checks.

A method is a subclass of one of TRL's trainers with `MethodTrainer` first among its bases, and a config that
adds its own fields to TRL's. The seams that several methods share stand beside this file:

- `_reference.py`: the frozen policy (a model, the disabled adapter, a frozen adapter) and log-probabilities;
- `_token_loss.py`: TRL's SFT with a loss over the per-token log-probabilities of a batch;
- `_log_ratios.py`: TRL's DPO with a loss over the log-ratios of any number of completions for a prompt;
- `_distillation.py`: TRL's distillation with a target, token weights and a source of completions to choose;
- `_sampling.py`: completions of the current policy, by transformers or vLLM;
- `_rounds.py`: generate, score, pair and train, round after round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from ..core import dist
from ..core.checks import check
from ..core.registry import Inputs, MethodInfo, Variant, register
from ..core.state import load_state, save_state

T = TypeVar("T", bound="type[MethodTrainer]")


@dataclass(frozen=True, kw_only=True)
class Neutral:
    """Settings under which a trainer computes what TRL's does.

    Args:
        parent: TRL's trainer.
        config: Its config.
        settings: Fields of ours that make the two agree.
        parent_settings: Fields of TRL's that the parent needs for it.
        models: Which of our constructor arguments is which of the parent's, for frozen models.
        exact: Whether they agree to the bit; else to 1e-6.
    """

    parent: type
    config: type
    settings: Mapping[str, Any] = field(default_factory=dict)
    parent_settings: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True


class MethodTrainer:
    """First base of the library's trainers, before one of TRL's.

    A method overrides `state_dict` and `load_state_dict` where the rest of a run depends on more than
    weights, optimizer, schedule and step. They are written into each checkpoint as `hf_ext_<name>.json`
    (and `.safetensors` where there are tensors) by the first process, and read on every process.
    """

    info: ClassVar[MethodInfo]
    inputs: ClassVar[Inputs]
    neutral: ClassVar[Neutral | None]

    # What TRL's trainers bring.
    args: Any
    model: Any
    accelerator: Any
    state: Any
    model_wrapped: Any
    is_in_train: bool
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    _metrics: dict[str, dict[str, list[float]]]

    # State ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values and tensors by name; empty for none. The first process writes its own."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # pyright: ignore[reportAttributeAccessIssue]
        state = self.state_dict()
        if not state:
            return
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        scalars = {name: value for name, value in state.items() if name not in tensors}
        run_dir = self._get_output_dir(trial=trial)  # pyright: ignore[reportAttributeAccessIssue]
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        dist.on_main(lambda: save_state(folder, f"hf_ext_{self.info.name}", scalars, tensors))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
        if checkpoint is None or not self.state_dict():
            return
        name = f"hf_ext_{self.info.name}"
        try:
            scalars, tensors = load_state(checkpoint, name)
        except FileNotFoundError as error:
            raise ValueError(
                f"{checkpoint} lacks the state of {self.info.name} ({name}.json, or its tensors): it was cut "
                "short while it was written, or is another trainer's; take an older checkpoint"
            ) from error
        self.load_state_dict({**scalars, **tensors})

    # Evaluation -----------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the parent does; a model that has not trained stays one that DDP has yet to wrap."""
        output = super().evaluation_loop(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        bare = self.model_wrapped is self.model and not self.is_in_train
        if bare and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Accelerate takes what it prepared for evaluation alone to be ready for training too: each
            # process would train a model of its own, without a word.
            self.model._is_accelerate_prepared = False
        return output

    # Metrics --------------------------------------------------------------------------------------

    def record(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Keep scalars for the next log, each as its mean over processes (a collective, one for all).

        Every process must give the same names in the same order, outside of a wrapped forward.
        """
        if not metrics:
            return
        device = self.accelerator.device
        values = [torch.as_tensor(value, device=device).detach().float() for value in metrics.values()]
        means = self.accelerator.gather(torch.stack(values)[None]).nanmean(dim=0).tolist()
        mode = "train" if self.model.training else "eval"
        for name, value in zip(metrics, means, strict=True):
            self._metrics[mode][name].append(value)


def register_trainer(
    name: str,
    *,
    summary: str,
    title: str,
    paper: str | None,
    config: type,
    inputs: Inputs,
    neutral: Neutral | None,
    supports: set[str] | frozenset[str] = frozenset(),
    test_kwargs: Mapping[str, object] | None = None,
    bad_kwargs: tuple[Mapping[str, object], ...] = (),
    variants: tuple[Variant, ...] = (),
) -> Callable[[T], T]:
    """Register a trainer class under a name; the row is its `info`.

    Args:
        name: Name that users type in a recipe; also that of the source file, the test and the page.
        summary: One line of what a user gets.
        title: Title of the paper, for model cards.
        paper: Identifier such as "arXiv:2404.02948", or None.
        config: Its settings class.
        inputs: What it takes beside model and settings.
        neutral: Settings under which it is TRL's; None where no parent computes anything alike.
        supports: Flags. "generates": completions are sampled while it trains; "rounds": it trains in rounds,
            each with its own checkpoints; "draws_by_process": what it samples depends on the number of
            processes; "per_micro_batch": the loss is a mean of each micro-batch's, so
            that rows weigh by the micro-batch that they fall in.
        test_kwargs: Settings that the contract suite runs.
        bad_kwargs: Settings that must be refused with an error that names the (last) field.
        variants: Further forms of the method, for the contract suite.
    """

    def add(cls: T) -> T:
        cls.info = MethodInfo(
            name=name,
            kind="trainer",
            summary=summary,
            paper=paper,
            target=cls,
            config=config,
            supports=frozenset(supports),
            test_kwargs=dict(test_kwargs or {}),
            bad_kwargs=bad_kwargs,
            variants=variants,
        )
        cls.inputs, cls.neutral = inputs, neutral
        card: Any = cls  # attributes that TRL's card reads
        card._tag_names = ["trl", "hf_ext", name]
        card._name = cls.__name__.removesuffix("Trainer")
        card._paper = {"title": title, "id": (paper or "").removeprefix("arXiv:") or None}
        register(cls.info)
        return cls

    return add


def own_args(trainer: Any, args: Any) -> Any:
    """Return a trainer's settings: those given, or its config's defaults.

    Raises:
        TypeError: They are not of the trainer's own config.
    """
    config: Any = trainer.info.config
    if args is None:
        return config(f"{type(trainer).__name__.removesuffix('Trainer')}-output")
    if not isinstance(args, config):
        raise TypeError(f"args must be a {config.__name__}, got {type(args).__name__}")
    return args


def zero_stage(trainer: Any) -> int:
    """Return the stage of DeepSpeed's ZeRO that a trainer runs under, 0 without DeepSpeed too."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.zero_stage)


def place_for_deepspeed(trainer: Any) -> None:
    """Put the model on the device before there is an engine, which Trainer leaves to DeepSpeed.

    With stage 3 nothing is done: the model need not fit.
    """
    enabled = getattr(trainer.accelerator.state, "deepspeed_plugin", None) is not None
    if enabled and trainer.deepspeed is None and zero_stage(trainer) < 3:
        trainer.model.to(trainer.args.device)


def check_parts(trainer: Any, what: str) -> None:
    """Raise where a process cannot exchange its parts of a sharded model's weights for others.

    Args:
        trainer: The trainer.
        what: What they are needed for.

    Raises:
        ValueError: FSDP1 shards them, or ZeRO-3 in a form that keeps other parts too, or parts on disk.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    version = None if plugin is None else plugin.fsdp_version
    check(version != 1, "fsdp_config's version", version, f"2 for {what}")
    if zero_stage(trainer) < 3:
        return
    zero = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config.get("zero_optimization", {})
    groups = zero.get("zero_hpz_partition_size", 1)
    check(groups in (0, 1), "DeepSpeed's zero_hpz_partition_size", groups, f"1 for {what}")
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        check(not zero.get(name, False), f"DeepSpeed's {name}", True, f"false for {what}")
    place = (zero.get("offload_param") or {}).get("device", "none")
    check(place != "nvme", "DeepSpeed's offload_param.device", place, f"'none' or 'cpu' for {what}")


# Data -------------------------------------------------------------------------------------------------------


def map_rows(dataset: Any, function: Any, args: Any, what: str, **given: Any) -> Any:
    """Return a data set with a function over its rows, streamed or not; the first process goes first."""
    streamed = isinstance(dataset, IterableDataset)
    how: dict[str, Any] = {} if streamed else {"num_proc": args.dataset_num_proc, "desc": what}
    with args.main_process_first(local=False, desc=what):
        return dataset.map(function, **how, **given)


# Checks -----------------------------------------------------------------------------------------------------


def refuse_trained_reference(model: nn.Module, frozen: nn.Module | None, field: str) -> None:
    """Raise unless a frozen model shares no tensor with what is trained.

    Args:
        model: The model in training.
        frozen: A reference or teacher, or None.
        field: The argument that gave it, for the error.

    Raises:
        ValueError: They share a tensor that trains.
    """
    if frozen is None:
        return
    trained = {p.data_ptr(): name for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    for name, parameter in frozen.named_parameters():
        if parameter.data_ptr() in trained and not parameter.is_meta:
            raise ValueError(
                f"{field} shares {name!r} with the model in training ({trained[parameter.data_ptr()]!r}): it "
                "would be trained too. Give a copy of its own, or leave it out where the adapter's base is "
                "meant"
            )


def check_vocabulary(student: nn.Module, teacher: nn.Module, field: str) -> None:
    """Raise unless two causal language models have vocabularies of one size.

    Raises:
        ValueError: The sizes differ.
    """
    sizes = [_vocabulary_size(model) for model in (student, teacher)]
    check(
        sizes[0] == sizes[1],
        f"{field}'s vocabulary",
        sizes[1],
        f"of {sizes[0]} tokens, as the trained model's; their distributions are compared token by token",
    )


def _vocabulary_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def check_columns(dataset: Any, needed: Iterable[str], field: str) -> None:
    """Raise unless a data set has columns, by its first row where it streams.

    Raises:
        ValueError: One is missing, or the data set is empty; the text lists what is there.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{field} has no rows")
    missing = [name for name in needed if name not in first]
    if missing:
        raise ValueError(
            f"{field} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}; it "
            f"has: {', '.join(map(repr, first))}"
        )


def check_map(dataset: Any, field: str, why: str) -> None:
    """Raise unless a data set is in memory or on disk, and of text alone.

    Args:
        dataset: The data set.
        field: The argument that gave it.
        why: What needs that.

    Raises:
        TypeError: It streams, or is no data set.
        ValueError: It has a column of images.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{field} must be a datasets.Dataset, got {type(dataset).__name__}: {why}")
    pictures = [name for name in ("image", "images") if name in dataset.column_names]
    check(not pictures, f"{field}'s columns", pictures, f"of text: {why}")


def check_filled(dataset: Any, columns: Iterable[str], field: str) -> None:
    """Raise if a row's text in one of the columns is empty; streamed data sets are not read.

    Raises:
        ValueError: A text is empty; the row is named.
    """
    if not hasattr(dataset, "__len__"):
        return
    present = [name for name in columns if name in dataset.column_names]
    for name in present:
        for row, value in enumerate(dataset[name]):
            text = value[-1].get("content") if isinstance(value, list) and value else value
            if not text:
                raise ValueError(f"{field}: {name!r} of row {row} is empty; leave such rows out")
