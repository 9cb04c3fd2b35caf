"""The job: a checked recipe becomes a trained adapter, proven outputs, a card and a file of metrics."""

from __future__ import annotations

import errno
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError

from ..callbacks._attach import attach
from ..core import dist, registry
from ..core.checks import check
from ..core.files import write_json
from .callbacks import AdapterMetricsCallback
from .card import CardFacts
from .checkpoints import delete_checkpoints
from .outputs import (
    Outputs,
    Trained,
    as_json,
    base_label,
    is_disk_error,
    loading_snippet,
    logits_of,
    place_of,
    probe_of,
    push,
)
from .plot import loss_plot, loss_points
from .preflight import Prepared, adapter_name, prepare
from .recipe import Job
from .samples import Sample, generate_samples
from .sources import hub_id, load_model, load_other_models

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments
    from transformers.trainer_utils import TrainOutput

T = TypeVar("T")
# Columns that trainers read beside those of their data's form.
_READ = {"tools", "images", "chat_template_kwargs", "prompt", "completion", "messages", "chosen", "rejected",
         "anchors", "refusal", "label", "input_ids", "attention_mask", "pass_rate", "pass_n",
         "sample_weight"}  # fmt: skip
Say = Callable[[str], None]
_LIBRARIES = ("hf-ext", "torch", "transformers", "peft", "trl", "accelerate", "datasets")
EXPECTED = (ValueError, TypeError, OSError, ImportError)


class WithoutCard:
    """Over a trainer of TRL's: no card of its own at each checkpoint, in the run's folder."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing; the run writes cards into the folders that hold the results."""


@functools.cache
def recipe_trainer(cls: type[Any]) -> type[Any]:
    """Return a trainer's class as recipes use it."""
    return type(cls.__name__, (WithoutCard, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


@dataclass(frozen=True)
class Ready:
    """A recipe that has passed every check, with what the checks have built.

    Args:
        job: The recipe.
        args: The trainer's settings.
        prepared: Adapter, data, tokenizer and the checkpoint to resume from.
    """

    job: Job
    args: TrainingArguments
    prepared: Prepared


def check_job(job: Job) -> Ready:
    """Check a recipe in full; on many processes all pass or all fail, with the first one's error.

    Raises:
        ValueError: Something in the recipe does not fit; the text names the file and the field.
        TypeError: A value of the adapter's does not have its field's type.
        OSError: A place cannot be written, or a file to resume from is missing.
    """
    if job.recipe.cpu_threads is not None:
        torch.set_num_threads(job.recipe.cpu_threads)
    args = job.training_arguments()
    with dist.together():
        prepared = prepare(job, args)
    return Ready(job, args, prepared)


def run_job(ready: Ready, say: Say = lambda _: None) -> dict[str, Any]:
    """Train, evaluate before and after, and write the outputs.

    Args:
        ready: The checked recipe.
        say: Receives lines for the user, on the first process alone.

    Returns:
        What `metrics.json` holds; on other processes than the first, without what the outputs have shown.

    Raises:
        OSError: A place cannot be written; what was there before is unchanged.
        ValueError: The loss is not finite.
        RuntimeError: A reloaded output does not compute what the trained model does.
    """
    started = time.monotonic()
    job, prepared = ready.job, ready.prepared
    say = say if dist.is_main() else lambda _: None
    _announce(ready, say)
    if prepared.checkpoint is None and job.recipe.overwrite_output_dir and dist.is_main():
        delete_checkpoints(job.output_dir, in_rounds=job.kind.in_rounds)
    dist.barrier()
    trainer = build_trainer(ready)
    result = _train(trainer, prepared)
    metrics = _metrics(trainer, ready, result)
    trained = _trained(trainer)
    is_main = dist.is_main()
    # What follows is one process's work with files, which may take longer than a collective waits. Without
    # the group nothing in it can wait for the others, and leaving cannot hang on a busy host.
    dist.leave_group()
    if is_main:
        facts = _facts(ready, metrics, trainer.state.log_history, say)
        outputs = Outputs(job, prepared, trained, facts)
        model = outputs.write()
        samples = _samples(ready, model)
        metrics["logit_difference"] = outputs.differences
        metrics["samples"] = [sample.as_dict() for sample in samples]
        metrics["total_seconds"] = round(time.monotonic() - started, 2)
        write_json(Path(job.output_dir) / "metrics.json", metrics)
        _tell(metrics, outputs, samples, say)
        if job.recipe.push_to_hub:
            say(f"pushed to {push(job)}")
    return metrics


def build_trainer(ready: Ready) -> Any:
    """Return the trainer, with the models read and the adapter injected."""
    from transformers import set_seed

    job, args, prepared = ready.job, ready.args, ready.prepared
    set_seed(args.seed)  # before anything random: the start of an adapter, and of weights that a model lacks
    model = load_model(job)
    # Used up, but for the revision of a reference that TRL reads by itself.
    revision = job.recipe.model_revision
    reread = {"revision": revision} if revision is not None and prepared.adapter is None else None
    setattr(args, "model_init_kwargs", reread)  # noqa: B010 - not a field of all configs
    # A checkpoint's history already holds the evaluation before the first step.
    # (Rounds see to it themselves.)
    fresh = prepared.checkpoint is None or job.kind.in_rounds
    args.eval_on_start = prepared.test is not None and fresh
    more: dict[str, Any] = dict(load_other_models(job))
    more |= {role: trained_columns(rows, job) for role, rows in prepared.others.items()}
    if prepared.rewards:
        more["reward_funcs"] = prepared.rewards
    trainer = recipe_trainer(job.kind.trainer)(
        model=model,
        args=args,
        train_dataset=trained_columns(prepared.train, job),
        eval_dataset=None if prepared.test is None else trained_columns(prepared.test, job),
        processing_class=prepared.tokenizer,
        peft_config=prepared.adapter,
        **more,
    )
    world = trainer.accelerator.num_processes
    check(
        world == args.world_size, "world size", world, f"{args.world_size}, as many processes as were started"
    )
    # First, so that reporting callbacks see its numbers.
    trainer.callback_handler.callbacks.insert(0, AdapterMetricsCallback())
    attach(trainer, *prepared.callbacks)
    if prepared.checkpoint is None:
        start_from_data(trainer)
    return trainer


def start_from_data(trainer: Any) -> None:
    """Give each adapter that waits for data its start, from the rows that the trainer will train on.

    Raises:
        ValueError: The trainer makes its rows itself, or its batches are no inputs of a model with labels.
    """
    from ..adapters import awaits_data, initialize_from_data

    model: Any = trainer.model
    for name in awaits_data(model):
        columns = set(getattr(trainer.train_dataset, "column_names", None) or ())
        rule = "False with this trainer, whose rows are not a model's inputs (input_ids, labels)"
        check({"input_ids", "labels"} <= columns, "adapter.init_weights", True, rule)
        initialize_from_data(
            model,
            trainer.get_train_dataloader(),
            adapter_name=name,
            show_progress=not trainer.args.disable_tqdm,
        )


def trained_columns(rows: Dataset, job: Job) -> Dataset:
    """Return the rows without the columns that the trainer does not read; reward functions read any."""
    if job.kind.inputs.reward:
        return rows
    text = str(job.settings.get("dataset_text_field", "text"))
    wanted = {*_READ, text, *(name for form in job.kind.inputs.columns for name in form)}
    return rows.select_columns([name for name in rows.column_names if name in wanted])


def _train(trainer: Any, prepared: Prepared) -> TrainOutput:
    checkpoint = None if prepared.checkpoint is None else str(prepared.checkpoint)
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    except (SafetensorError, RuntimeError) as error:
        if not is_disk_error(error):
            raise
        place = trainer.args.output_dir
        raise OSError(
            errno.EIO, f"cannot write a checkpoint into {place}: {error}; older ones are unchanged"
        ) from error


def _trained(trainer: Any) -> Trained:
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    wrapped: Any = trainer.model_wrapped
    model: Any = trainer.accelerator.unwrap_model(wrapped)
    rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    probe = probe_of(rows, trainer.processing_class, trainer.args.device)
    precise = {p.dtype for p in model.parameters()} == {torch.float32}
    return Trained(
        model=model,
        # Both are collectives where the weights are sharded.
        state=trainer.accelerator.get_state_dict(wrapped) if sharded else None,
        logits=logits_of(wrapped if sharded else model, probe),
        probe=probe,
        exact=precise and not trainer.args.bf16 and not trainer.args.fp16,
        device=trainer.args.device,
    )


def _metrics(trainer: Any, ready: Ready, result: TrainOutput) -> dict[str, Any]:
    args, prepared = ready.args, ready.prepared
    model: Any = trainer.model
    losses: dict[str, float | None] = {"train_loss": result.training_loss}
    measured: dict[str, float | None] = {}
    if prepared.test is not None:
        after = trainer.evaluate()
        for name in filter(None, ("loss", ready.job.kind.measure)):
            before = loss_points(trainer.state.log_history, f"eval_{name}")
            measured[f"eval_{name}_before"] = before[0][1] if before and before[0][0] == 0 else None
            measured[f"eval_{name}_after"] = after[f"eval_{name}"]
        losses |= measured
    for name, value in losses.items():
        fits = value is None or math.isfinite(value)
        check(fits, name, value, "finite; a lower learning_rate may help. Nothing was written")
    return {
        **losses,
        "trainer": ready.job.recipe.trainer,
        "adapter": adapter_name(prepared.adapter),
        "callbacks": {callback.info.name: callback.settings() for callback in prepared.callbacks},
        "steps": result.global_step,
        "resumed_from": None if prepared.checkpoint is None else prepared.checkpoint.name,
        "train_seconds": round(float(result.metrics.get("train_runtime", 0.0)), 2),
        "world_size": trainer.accelerator.num_processes,
        "seed": args.seed,
        "parameters": prepared.parameters,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of the libraries that a result depends on."""
    return {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str | None:
    if name == "hf-ext":
        from hf_ext import __version__

        return __version__
    return version(name)


def _facts(ready: Ready, metrics: Mapping[str, Any], log: list[dict[str, Any]], say: Say) -> CardFacts:
    job, prepared = ready.job, ready.prepared
    name = adapter_name(prepared.adapter)
    rows = {row.name: row for row in registry.methods("adapter")}
    plot: bytes | None = None
    if find_spec("matplotlib") is None:
        say("no loss plot without matplotlib: pip install 'hf-ext[plot]'")
    else:
        unit = f" ({job.kind.loss_unit})" if job.kind.loss_unit else ""
        plot = loss_plot(log, f"{name} on {base_label(job)}", unit)
    evaluated = [f"eval_{what}_{when}" for what in filter(None, ("loss", job.kind.measure))
                 for when in ("before", "after")]  # fmt: skip
    shown = (*evaluated, "train_loss", "steps", "train_seconds", "world_size", "trainable_parameters")
    own = {"dtype": job.recipe.dtype, "max_train_samples": job.recipe.max_train_samples}
    fields = {f"adapter.{key}": value for key, value in (job.recipe.adapter or {}).items()}
    fields |= {f"callbacks.{name}": value or {} for name, value in job.recipe.callbacks.items()}
    given = {
        key: value
        for key, value in job.settings.items()
        if key not in ("output_dir", "report_to", "run_name")
    }
    return CardFacts(
        name=str(job.recipe.hub_model_id or Path(job.output_dir).name).rpartition("/")[2],
        method=name,
        base_model=hub_id(job),
        base_label=base_label(job),
        paper=rows[name].paper if name in rows else None,
        dataset=dataset_label(job.recipe.dataset_name),
        settings={key: as_json(value) for key, value in {**fields, **own, **given}.items()},
        metrics={key: metrics[key] for key in shown if metrics.get(key) is not None},
        plot=plot,
        snippet=loading_snippet(job, name, place_of(job, "model" if name == "full" else "adapter")),
        is_adapter=name != "full",
        tags=("hf_ext", job.recipe.trainer, name),
        task=job.kind.task,
        loss_unit=job.kind.loss_unit,
    )


def dataset_label(name: str) -> str:
    """Return a data set's name for people; of a path the last part alone."""
    path = Path(name)
    return f"./{path.name}" if path.exists() else name  # the rest of a path means nothing elsewhere


def _samples(ready: Ready, model: torch.nn.Module) -> list[Sample]:
    recipe, prepared = ready.job.recipe, ready.prepared
    rows = prepared.train if prepared.test is None else prepared.test
    if not recipe.generate_samples:
        return []
    return generate_samples(
        model,
        prepared.tokenizer,
        rows,
        text_field=getattr(ready.args, "dataset_text_field", "text"),
        count=min(recipe.generate_samples, len(rows)),
        limit=recipe.max_new_tokens,
    )


# Text for the user ------------------------------------------------------------------------------------------


def _announce(ready: Ready, say: Say) -> None:
    job, prepared = ready.job, ready.prepared
    share = (
        f"{prepared.trainable:,} of {prepared.parameters:,} numbers" if prepared.trainable else "an adapter"
    )
    held_out = "nothing held out" if prepared.test is None else f"{len(prepared.test):,} held out"
    say(f"{job.recipe.model_name_or_path}: {adapter_name(prepared.adapter)} trains {share}")
    say(f"{job.recipe.dataset_name}: {len(prepared.train):,} rows to train on, {held_out}")
    for reason in prepared.skipped:
        say(f"passed over a damaged checkpoint: {reason}")
    if prepared.checkpoint is not None:
        say(f"resuming from {prepared.checkpoint}")


def _tell(metrics: Mapping[str, Any], outputs: Outputs, samples: list[Sample], say: Say) -> None:
    kind, told = outputs.job.kind, []
    for what, unit in (("loss", f" {kind.loss_unit}".rstrip()), (kind.measure, "")):
        before, after = (metrics.get(f"eval_{what}_{when}") for when in ("before", "after"))
        if after is not None:
            start = "" if before is None else f"{before:.4f} -> "
            told.append(f"{what} {start}{after:.4f}{unit}")
    if told:
        duration = f"{metrics['steps']} steps in {metrics['train_seconds']:.0f} s"
        say(f"held-out {', '.join(told)}, {duration}")
    for name, difference in outputs.differences.items():
        say(f"{outputs.folder / name}: reloaded, logits within {difference:.1e} of the trained model's")
    for sample in samples:
        say(f"\n--- {sample.title or 'held-out row'} (not seen in training)\n{sample.prompt.rstrip()}")
        say(f"\n--- the real one\n{sample.reference.strip()}\n\n--- generated\n{sample.generated.strip()}\n")
    say(f"metrics: {outputs.folder / 'metrics.json'}; total {metrics['total_seconds']:.0f} s")
