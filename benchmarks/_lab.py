"""What the effect scripts share: text in blocks of tokens, short runs of the embedded model, tables, plots.

Each script compares arms on the same blocks in the same order: a rate is chosen for each arm on a seed and
on held-out blocks that the reported numbers do not use.
"""

from __future__ import annotations

import io
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_ext
from hf_ext.callbacks._base import Callback
from hf_ext.core.files import write_bytes, write_json
from hf_ext.data import TASK_END, TASK_FORM, docstring_pairs

ASSETS = Path(hf_ext.__file__).parent / "assets"
MODEL = ASSETS / "tiny-llama"
LENGTH = 128  # tokens of a block
TUNING_SEED = 100


@dataclass(frozen=True)
class Corpus:
    """Blocks of LENGTH tokens: to train on, to choose rates on, and to report on."""

    train: Dataset
    validation: Dataset
    test: Dataset


@cache
def functions() -> Corpus:
    """Return (source, docstring) pairs of the standard library, in a form that the model has not read."""
    splits = {}
    for split in ("train", "validation", "test"):
        texts = [_task_text(pair) for pair in docstring_pairs(split)]
        random.Random(0).shuffle(texts)  # a split's modules are sorted by name
        splits[split] = blocks(texts)
    return Corpus(splits["train"], splits["validation"].select(range(96)), splits["test"].select(range(96)))


def _task_text(pair: Any) -> str:
    from hf_ext.data import COMPLETION_END, PROMPT_END

    source, doc = pair.prompt.removesuffix(PROMPT_END), pair.completion.removesuffix(COMPLETION_END)
    return TASK_FORM.format(source=source) + doc + TASK_END


@cache
def prose() -> Corpus:
    """Return the English text of Python's language reference, none of which the model has read."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(0).shuffle(names)
    parts = {"train": names[24:], "validation": names[:12], "test": names[12:24]}
    found = {split: blocks(topics[name] for name in chosen) for split, chosen in parts.items()}
    return Corpus(found["train"], _first(found["validation"]), _first(found["test"]))


def _first(rows: Dataset, count: int = 96) -> Dataset:
    return rows.select(range(min(count, len(rows))))


@cache
def tokenizer() -> Any:
    """Return the embedded model's tokenizer."""
    return AutoTokenizer.from_pretrained(MODEL)


def blocks(texts: Iterable[str]) -> Dataset:
    """Return texts joined by the end token and cut into blocks; the rest is dropped."""
    end, stream = tokenizer().eos_token_id, []
    for text in texts:
        stream += [*tokenizer()(text, add_special_tokens=False)["input_ids"], end]
    rows = [stream[i : i + LENGTH] for i in range(0, len(stream) - LENGTH + 1, LENGTH)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def embedded_model() -> Any:
    """Return the embedded model, fp32."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def with_weights(state: Mapping[str, torch.Tensor]) -> Any:
    """Return the embedded model with other weights; a file holds its tied head once.

    Raises:
        ValueError: A tensor is missing, or one too many.
    """
    model = embedded_model()
    differing = {*model.state_dict(), "lm_head.weight"} ^ {*state, "lm_head.weight"}
    if differing:
        raise ValueError(f"weights must be those of the embedded model, which differ in {sorted(differing)}")
    model.load_state_dict({"lm_head.weight": state["model.embed_tokens.weight"], **state})
    return model


@dataclass(frozen=True)
class Fit:
    """What a run came to.

    Args:
        losses: Held-out loss by optimizer step, nats per token; the last is that of the final model.
        steps: Optimizer steps.
        seconds: Time in `train`.
        trainer: The trainer, with its history.
    """

    losses: dict[int, float]
    steps: int
    seconds: float
    trainer: Trainer

    @property
    def final(self) -> float:
        """Held-out loss of the final model, nats per token."""
        return list(self.losses.values())[-1]


def fit(
    train: Dataset,
    held_out: Dataset,
    *,
    learning_rate: float,
    seed: int,
    max_steps: int,
    batch_size: int = 8,
    callbacks: Sequence[TrainerCallback] = (),
    model: Any = None,
    folder: Path | str | None = None,
    eval_steps: int | None = None,
    evaluate: bool = True,
    resume_from_checkpoint: str | None = None,
    **arguments: Any,
) -> Fit:
    """Train once on the CPU in fp32, and return the held-out losses.

    Args:
        train: Blocks to train on.
        held_out: Blocks to evaluate on.
        learning_rate: Peak.
        seed: Of the order of the data; nothing else in these runs is random.
        max_steps: Optimizer steps.
        batch_size: Blocks in a batch.
        callbacks: Those of the library are attached, others are passed on.
        model: Module to train, in place; None for the embedded model.
        folder: Output folder; None for one that is thrown away.
        eval_steps: Steps between evaluations; None for the end alone.
        evaluate: Whether to evaluate at the end.
        resume_from_checkpoint: Checkpoint to resume from.
        **arguments: More `TrainingArguments`.
    """
    own = [callback for callback in callbacks if isinstance(callback, Callback)]
    with tempfile.TemporaryDirectory() as thrown_away:
        settings: dict[str, Any] = {
            "output_dir": str(folder or thrown_away),
            "learning_rate": learning_rate,
            "seed": seed,
            "max_steps": max_steps,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": 32,
            "eval_strategy": "no" if eval_steps is None else "steps",
            "eval_steps": eval_steps,
            "weight_decay": 0.0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_strategy": "no",
            **arguments,
        }
        trainer = Trainer(
            model=embedded_model() if model is None else model,
            args=TrainingArguments(**settings),
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[callback for callback in callbacks if not isinstance(callback, Callback)],
        )
        trainer.remove_callback(PrinterCallback)
        hf_ext.attach(trainer, *own)
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        seconds = time.perf_counter() - start
        history = trainer.state.log_history
        losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
        if evaluate and trainer.state.global_step not in losses:
            losses[trainer.state.global_step] = trainer.evaluate()["eval_loss"]
    return Fit(losses, trainer.state.global_step, seconds, trainer)


def loss_of(model: Any, rows: Dataset) -> float:
    """Return a model's mean loss on blocks, nats per token."""
    was = model.training
    model.eval()
    ids = torch.tensor(rows["input_ids"])
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in ids.split(32)]
    model.train(was)
    return sum(losses) / len(ids)


def best_rate(run: Callable[[float], float], rates: Sequence[float], label: str = "") -> float:
    """Return the rate with the least loss; a rate that diverges loses.

    Args:
        run: Takes a rate and returns the loss.
        rates: Rates to try, ascending.
        label: What to print before each.
    """
    found: dict[float, float] = {}
    for rate in rates:
        loss = run(rate)
        found[rate] = loss if math.isfinite(loss) else math.inf
        print(f"{label} lr {rate:g}: {found[rate]:.4f}", flush=True)
    return min(found, key=found.__getitem__)


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation and the values."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": spread, "values": list(values)}


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write results with the versions and the machine's threads that they come from."""
    from hf_ext.training.run import versions

    write_json(path, {**content, "threads": torch.get_num_threads(), "versions": versions()})
    print(f"wrote {path}")


def save_plot(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (6.4, 4.0)) -> None:
    """Draw one set of axes and write it as a PNG."""
    from matplotlib.figure import Figure  # not through pyplot: its state is global

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_bytes(path, buffer.getvalue())
    print(f"wrote {path}")


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
