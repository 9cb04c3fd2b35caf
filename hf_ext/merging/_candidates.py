"""Combinations of checkpoints evaluated in memory: nothing is written, and every checkpoint is read once.

A candidate's weights are those that the linear merge would write, to the bit: the same sums, rounded once to
the stored type.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..core.checks import check
from ._align import align
from ._checkpoint import DTYPES, Checkpoint, Entry
from ._coefficients import function_of, weighted_mean
from ._task_vectors import normalized

Evaluate: TypeAlias = Callable[[Any], float]
_BLOCK = 1 << 20  # elements that are combined at a time
_FEW = 5000  # tokens below which an evaluation is easily over-fitted by a search


class Candidates:
    """The checkpoints to combine, and the model that takes the weights of one combination after another.

    Args:
        folders: The checkpoints: all models, or all adapters of one base.
        model: The module; None to load the last checkpoint as a causal language model.
        in_memory: Whether the checkpoints are held in memory in their stored type; otherwise they are read
            again for each candidate.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: The checkpoints differ in names, shapes or types, the model lacks a tensor of theirs or
            has one that they lack, or it has batch norms.
    """

    def __init__(
        self, folders: Sequence[str | Path], model: nn.Module | None = None, *, in_memory: bool = True
    ) -> None:
        self.checkpoints = [Checkpoint(folder) for folder in folders]
        self.is_adapter = self.checkpoints[0].is_adapter
        kinds = {checkpoint.is_adapter for checkpoint in self.checkpoints}
        check(len(kinds) == 1, "checkpoints", [str(f) for f in folders], "all models or all adapters")
        stored_head = any(name.endswith("lm_head.weight") for name in self.checkpoints[0].tensors)
        untied = not self.checkpoints[0].config.get("tie_word_embeddings", not stored_head)
        aligned = align(self.checkpoints, untied=untied, dtype_given=False)
        self.entries = aligned.entries
        self.names = [name for name in aligned.names if self.entries[0][name].is_float]
        self._held = [self._all(number) for number in range(len(folders))] if in_memory else None
        self.model = _loaded(self.checkpoints[-1]) if model is None else model
        self._targets = self._find_targets()

    def _all(self, number: int) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        for name in self.names:
            entry = self.entries[number][name]
            held[name] = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
            self.checkpoints[number].read(entry, 0, held[name])
        return held

    def _find_targets(self) -> dict[str, Tensor]:
        norms = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        ]
        rule = "a model without them: the running statistics of a combination would have to be measured again"
        check(not norms, "batch norms", ", ".join(norms), rule)
        if self.is_adapter:
            return {}
        state = self.model.state_dict()
        lacking = [name for name in self.names if name not in state]
        check(not lacking, "model", f"none of {', '.join(lacking)}", "one with the checkpoints' tensors")
        wrong = [
            f"{name} {list(state[name].shape)}"
            for name in self.names
            if tuple(state[name].shape) != self.entries[0][name].shape
        ]
        check(not wrong, "model", ", ".join(wrong), "one with the checkpoints' shapes")
        written = {state[name].data_ptr() for name in self.names}
        unset = [
            name
            for name, value in state.items()
            if name not in self.entries[0] and value.data_ptr() not in written
        ]
        rule = "one whose tensors the checkpoints all have"
        check(not unset, "model", f"{', '.join(unset)} beside them", rule)
        return {name: state[name] for name in self.names}

    # Combining ------------------------------------------------------------------------------------

    def combined(self, name: str, weights: Sequence[float], start: int, stop: int) -> Tensor:
        """Return elements of one tensor of a combination, flat, in the stored type.

        Args:
            name: The tensor.
            weights: One for each checkpoint, of sum one.
            start: First element.
            stop: The element after the last one.
        """
        used = [number for number, weight in enumerate(weights) if weight != 0.0]
        operands = [self._read(number, name, start, stop) for number in used]
        mean = weighted_mean(operands, [weights[number] for number in used])
        return mean.to(DTYPES[self.entries[0][name].dtype])

    def _read(self, number: int, name: str, start: int, stop: int) -> Tensor:
        if self._held is not None:
            return self._held[number][name][start:stop].to(torch.float32, copy=True)
        entry = self.entries[number][name]
        raw = torch.empty(stop - start, dtype=DTYPES[entry.dtype])
        self.checkpoints[number].read(entry, start, raw)
        return raw.float()

    def load(self, coefficients: Sequence[float]) -> nn.Module:
        """Give the model the weights of a combination, and return it.

        Args:
            coefficients: One for each checkpoint; divided by their sum.

        Raises:
            ValueError: Their sum is zero.
        """
        weights = normalized(coefficients, "a candidate")
        if self.is_adapter:
            self._load_adapter(weights)
            return self.model
        with torch.no_grad():
            for name, target in self._targets.items():
                entry = self.entries[0][name]
                flat = target.view(-1) if target.is_contiguous() else None
                for start, stop in _spans(entry):
                    part = self.combined(name, weights, start, stop)
                    if flat is not None:
                        flat[start:stop].copy_(part)
                    else:
                        target.copy_(self.combined(name, weights, 0, entry.numel).view(entry.shape))
                        break
        return self.model

    def _load_adapter(self, weights: Sequence[float]) -> None:
        from peft import set_peft_model_state_dict

        state = {
            name: self.combined(name, weights, 0, entry.numel).view(entry.shape)
            for name, entry in ((name, self.entries[0][name]) for name in self.names)
        }
        found = set_peft_model_state_dict(cast(Any, self.model), state)
        unknown = list(getattr(found, "unexpected_keys", None) or ())
        check(not unknown, "model", f"none of {', '.join(unknown)}", "one with the adapters' tensors")

    def score(self, coefficients: Sequence[float], evaluate: Evaluate) -> float:
        """Return what `evaluate` finds for the model with a combination; infinite where it is not finite."""
        model = self.load(coefficients)
        model.eval()
        with torch.no_grad():
            found = float(evaluate(model))
        return found if math.isfinite(found) else math.inf

    def identity(self) -> list[object]:
        """Return names, sizes and times of the checkpoints' files: what tells whether they have changed."""
        return [[str(one.folder.resolve()), one.state()] for one in self.checkpoints]

    def close(self) -> None:
        """Close the files."""
        for checkpoint in self.checkpoints:
            checkpoint.close()


def _spans(entry: Entry) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, entry.numel)) for start in range(0, entry.numel, _BLOCK)]


def _loaded(checkpoint: Checkpoint) -> nn.Module:
    if checkpoint.is_adapter:
        from peft import AutoPeftModelForCausalLM

        return cast(nn.Module, AutoPeftModelForCausalLM.from_pretrained(checkpoint.folder))
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto")


# Metrics ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationLoss:
    """Mean loss of a causal language model on fixed rows, in nats per predicted token.

    Args:
        rows: Mappings with `input_ids` and, where not all tokens count, `labels`.
        batch_size: Rows in a batch.
    """

    rows: tuple[Mapping[str, Any], ...]
    batch_size: int = 16

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(label != -100 for row in self.rows for label in _labels(row)[1:])

    def __call__(self, model: Any) -> float:
        total = 0.0
        for start in range(0, len(self.rows), self.batch_size):
            total += self._batch(model, self.rows[start : start + self.batch_size])
        return total / self.tokens

    def _batch(self, model: Any, rows: Sequence[Mapping[str, Any]]) -> float:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[number, :length] = torch.tensor(row["input_ids"])
            labels[number, :length] = torch.tensor(_labels(row))
            mask[number, :length] = 1
        device = next(model.parameters()).device
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1].float()
        targets = labels[:, 1:].to(device)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return float(losses)

    def digest(self) -> str:
        """Return what tells these rows from others."""
        content = [[list(row["input_ids"]), _labels(row)] for row in self.rows]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _labels(row: Mapping[str, Any]) -> list[int]:
    labels = row.get("labels")
    return list(row["input_ids"] if labels is None else labels)


def evaluation_losses(
    data: str | Path | Iterable[Any], tokenizer: Path, share: float, length: int = 512
) -> tuple[EvaluationLoss, EvaluationLoss | None]:
    """Return the loss on one part of the rows, for a search, and that on the rest, for the choice at its end.

    Args:
        data: Rows with `input_ids` (and `labels`) or `text`; or the path of a folder that datasets'
            `save_to_disk` wrote, or of a file of JSON lines.
        tokenizer: Folder whose tokenizer cuts texts.
        share: Share of the rows that is held out, in [0, 1); 0 for none.
        length: Tokens that are kept of a text.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row has neither `input_ids` nor `text`, or there are too few rows.
    """
    rows = [_row(row, number, tokenizer, length) for number, row in enumerate(_rows(data), start=1)]
    rows = [row for row in rows if len(row["input_ids"]) > 1]
    # Spread over the rows, whose order may follow their source.
    held = [math.floor((number + 1) * share) > math.floor(number * share) for number in range(len(rows))]
    search = EvaluationLoss(tuple(row for row, out in zip(rows, held, strict=True) if not out))
    rest = (
        EvaluationLoss(tuple(row for row, out in zip(rows, held, strict=True) if out)) if any(held) else None
    )
    enough = bool(search.rows) and (rest is not None or share == 0.0)
    check(enough, "data", f"{len(rows)} rows", "enough rows for the search and for the choice after it")
    least = min(part.tokens for part in (search, rest) if part is not None)
    check(least > 0, "data", f"{least} tokens", "rows with tokens to predict in each part")
    if least < _FEW:
        text = f"data: {least} tokens are few to choose by ({_FEW} or more): a search may fit them by chance"
        warnings.warn(text, stacklevel=3)
    return search, rest


def _rows(data: str | Path | Iterable[Any]) -> Iterable[Any]:
    if not isinstance(data, str | Path):
        return data
    path = Path(data)
    if path.is_dir():
        from datasets import load_from_disk

        return cast("Iterable[Any]", load_from_disk(str(path)))
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file or folder {path}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {path} does not hold one JSON object on each line: {error}") from error


def _row(row: Any, number: int, tokenizer: Path, length: int) -> Mapping[str, Any]:
    known = isinstance(row, Mapping) and ("input_ids" in row or isinstance(row.get("text"), str))
    check(known, f"data, row {number}", row, "a mapping with input_ids or text")
    if "input_ids" in row:
        labels = row.get("labels")
        same = labels is None or len(labels) == len(row["input_ids"])
        check(same, f"data, row {number}", row, "as long in labels as in input_ids")
        return row
    return {"input_ids": _tokenizer(tokenizer)(row["text"])["input_ids"][:length]}


@cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def metric_of(evaluate: Evaluate | str, field: str = "metric") -> Evaluate:
    """Return a metric, which "module:function" may name."""
    return function_of(field, evaluate) if isinstance(evaluate, str) else evaluate


def name_of(evaluate: Evaluate | None) -> str:
    """Return what tells a metric from others, across processes."""
    if isinstance(evaluate, EvaluationLoss):
        return evaluate.digest()
    if evaluate is None:
        return ""
    named: Any = evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)
    return f"{named.__module__}:{named.__qualname__}"
