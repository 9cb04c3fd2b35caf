"""The runs of a comparison: how one is trained and measured, and the file that keeps the finished ones."""

from __future__ import annotations

import copy
import dataclasses
import enum
import gc
import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl.trainer.sft_trainer import SFTTrainer

from ..core.checks import check
from ..core.files import read_json, write_json
from .comparison_settings import Method
from .plot import loss_points
from .preflight import build_adapter
from .recipe import Job, one_line
from .run import recipe_trainer, start_from_data, trained_columns, versions
from .sources import load_model

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
_FORMAT = 1
# What a single run may die of without ending the comparison; a disk or an interrupt ends it.
_RUN_FAILURES = (ValueError, TypeError, ImportError, RuntimeError, ArithmeticError)
# Trainer settings that each run has its own value of, or that change nothing of what is measured.
_NOT_IN_KEY = ("output_dir", "run_name", "report_to", "disable_tqdm", "learning_rate", "seed", "push_to_hub")
_NOT_IN_KEY_PREFIXES = ("logging_", "save_", "hub_", "eval_st")


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        method: What is trained.
        learning_rate: Its peak learning rate.
        seed: Of the adapter's start, of dropout and of the order of the rows.
        split: "tune" or "test": the rows that the loss is measured on.
    """

    method: Method
    learning_rate: float
    seed: int
    split: str

    def __str__(self) -> str:
        return f"{self.split} {self.method.label} lr {self.learning_rate:g} seed {self.seed}"


# Finished runs ----------------------------------------------------------------------------------------------


class RunStore:
    """The file of finished runs, by a key of everything that determines each.

    Args:
        path: The file; read if it exists.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Record] = {}
        if path.is_file():
            content = read_json(path)
            known = isinstance(content, dict) and content.get("format") == _FORMAT
            check(known, str(path), "another file", "the runs of a comparison; move it away to start over")
            self.runs = content["runs"]

    def get(self, key: str) -> Record | None:
        """Return a finished run, or None; one that ended in an error is tried again."""
        record = self.runs.get(key)
        return None if record is None or record["status"] == "error" else record

    def put(self, key: str, record: Record) -> None:
        """Add a run and write the file, whole or not at all."""
        self.runs[key] = record
        write_json(self.path, {"format": _FORMAT, "runs": self.runs})


def key_of(facts: object) -> str:
    """Return the digest of a JSON-like value, in which sets have no order."""
    text = json.dumps(facts, sort_keys=True, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()


def _determines(name: str) -> bool:
    return name not in _NOT_IN_KEY and not name.startswith(_NOT_IN_KEY_PREFIXES)


def _as_json(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, enum.Enum):
        return value.value
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)  # type: ignore[arg-type]


def _digest_of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_of_rows(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())  # type: ignore[call-overload]
    return digest.hexdigest()


def _by_length(rows: Dataset) -> Dataset:
    # Batches of rows of one length need no padding: half the time of an evaluation.
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(lengths)), key=lambda index: lengths[index]))


# One run ----------------------------------------------------------------------------------------------------


class DivergedError(ArithmeticError):
    """A loss that is not finite: the same run would give it again."""


_Trainer: Any = recipe_trainer(SFTTrainer)


class WatchedTrainer(_Trainer):
    """The trainer of `hf-ext train`, which digests the rows it is given and stops at a loss that is none."""

    batches: Any = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train on a batch."""
        if self.batches is None:
            self.batches = hashlib.sha256()
        ids = inputs["input_ids"].cpu()
        self.batches.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes())
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise DivergedError(f"training loss {float(loss):g} at step {self.state.global_step + 1}")
        return loss


class Watch(TrainerCallback):
    """Measure the optimizer steps, and ask for evaluations evenly over the run.

    Args:
        points: Number of evaluations; the last one follows the last step.
        now: Clock in seconds that waits for the device.
    """

    def __init__(self, points: int, now: Callable[[], float]) -> None:
        self.points, self.now = points, now
        self.wanted: set[int] = set()
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.wanted = set(evaluation_steps(state.max_steps, self.points))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = self.now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(self.now() - self.started)
        control.should_evaluate = state.global_step in self.wanted


def evaluation_steps(steps: int, points: int) -> list[int]:
    """Return the steps to evaluate after: `points` of them, evenly spread, the last one included."""
    return sorted({-(-steps * index // points) for index in range(1, points + 1)})


class Bench:
    """Trains runs; the model is read and the rows are tokenized once.

    Args:
        job: The checked recipe.
        args: The trainer's settings in the recipe.
        tokenizer: The model's.
        train: Rows to train on.
        held_out: Rows to measure the loss on, by split: "tune" and "test".
        eval_points: Evaluations of a run on "test" after the one at its start; one on "tune" has one, at its
            end.

    Raises:
        ValueError: No row of a split has a token to learn within max_length.
    """

    def __init__(
        self,
        job: Job,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        held_out: Mapping[str, Dataset],
        eval_points: int,
    ) -> None:
        self.job, self.device, self.tokenizer, self.eval_points = job, args.device, tokenizer, eval_points
        self.base = cast(nn.Module, load_model(job))
        self.train, self.held_out = self._tokenize(train, held_out)
        self.common = {
            "settings": {k: v for k, v in job.settings.items() if _determines(k)},
            "model": _digest_of_weights(self.base),
            "model_options": [job.recipe.dtype, job.recipe.attn_implementation],
            "train": _digest_of_rows(self.train),
            "held_out": {name: _digest_of_rows(rows) for name, rows in self.held_out.items()},
            "machine": [platform.machine(), str(args.device), torch.get_num_threads()],
            "versions": versions(),
        }

    def _tokenize(
        self, train: Dataset, held_out: Mapping[str, Dataset]
    ) -> tuple[Dataset, dict[str, Dataset]]:
        args = self._arguments({})
        trainer = _Trainer(
            model=copy.deepcopy(self.base),  # type: ignore[arg-type]
            args=args,
            train_dataset=trained_columns(train, self.job),
            eval_dataset={name: trained_columns(rows, self.job) for name, rows in held_out.items()},
            processing_class=self.tokenizer,
        )
        prepared = {"train": cast("Dataset", trainer.train_dataset)}
        prepared |= cast("dict[str, Dataset]", trainer.eval_dataset)
        for name, rows in prepared.items():
            rule = "more than 0: no completion begins within max_length"
            check(len(rows) > 0, f"{self.job.where}: rows to {name}", len(rows), rule)
        return prepared["train"], {name: _by_length(prepared[name]) for name in held_out}

    def _arguments(self, own: Mapping[str, Any]) -> TrainingArguments:
        quiet = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "report_to": "none"}
        quiet |= {"disable_tqdm": True, "load_best_model_at_end": False, "model_init_kwargs": None}
        return replace(self.job, settings={**self.job.settings, **quiet, **own}).training_arguments()

    def _adapter(self, run: Run) -> PeftConfig | None:
        adapter = build_adapter(run.method.job(self.job), run.method.field)
        seeded = any(f.name == "seed" for f in dataclasses.fields(adapter)) if adapter is not None else False
        if seeded and "seed" not in run.method.adapter:
            adapter.seed = run.seed  # type: ignore[union-attr]
        return adapter

    def key(self, run: Run) -> str:
        """Return the digest of everything that determines a run."""
        adapter = self._adapter(run)
        return key_of(
            {
                **self.common,
                "held_out": self.common["held_out"][run.split],
                "adapter": None
                if adapter is None
                else {"class": type(adapter).__name__, **adapter.to_dict()},
                "learning_rate": run.learning_rate,
                "seed": run.seed,
                "points": self._points(run),
                "from_start": run.split == "test",
            }
        )

    def _points(self, run: Run) -> int:
        return self.eval_points if run.split == "test" else 1

    def train_once(self, run: Run) -> Record:
        """Train once, and return what was measured; a run that fails says why."""
        started = time.perf_counter()
        record: Record = {
            "method": run.method.label,
            "adapter": dict(run.method.adapter),
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "split": run.split,
            "status": "done",
            "reason": None,
        }
        try:
            record |= self._measure(run)
        except DivergedError as error:
            record |= {"status": "diverged", "reason": one_line(error)}
        except _RUN_FAILURES as error:
            record |= {"status": "error", "reason": f"{type(error).__name__}: {one_line(error)}"}
        gc.collect()  # a trainer is a cycle, and holds the model
        return {**record, "seconds": round(time.perf_counter() - started, 3)}

    def _measure(self, run: Run) -> Record:
        from peft import get_peft_model

        given = self.job.settings.get("dataset_kwargs") or {}
        own = {"learning_rate": run.learning_rate, "seed": run.seed}
        own["data_seed"] = self.job.settings.get("data_seed", run.seed)
        args = self._arguments({**own, "dataset_kwargs": {**given, "skip_prepare_dataset": True}})
        args.eval_on_start = run.split == "test"
        set_seed(run.seed)  # before anything random: the start of an adapter
        model: Any = copy.deepcopy(self.base)
        adapter = self._adapter(run)
        begun = time.perf_counter()
        if adapter is not None:
            model = get_peft_model(model, adapter)
        injection = time.perf_counter() - begun
        watch = Watch(self._points(run), lambda: _now(self.device))
        trainer = WatchedTrainer(
            model=model,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.held_out[run.split],
            processing_class=self.tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        begun = _now(self.device)
        start_from_data(trainer)
        from_data = _now(self.device) - begun
        result = trainer.train()
        curve = loss_points(trainer.state.log_history, "eval_loss")
        for step, loss in curve:
            if not math.isfinite(loss):
                raise DivergedError(f"held-out loss {loss:g} after step {step}")
        return {
            "curve": curve,
            "train_loss": result.training_loss,
            "steps": trainer.state.global_step,
            "step_seconds": statistics.median(watch.seconds),
            "start_seconds": {"injection": injection, "data": from_data},
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "optimizer_state_bytes": _state_bytes(trainer.optimizer),
            "batches": trainer.batches.hexdigest(),
        }


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _state_bytes(optimizer: Any) -> int:
    tensors = (value for entry in optimizer.state.values() for value in entry.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
