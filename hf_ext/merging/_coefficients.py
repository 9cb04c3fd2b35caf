"""What the methods share that find one weight for each model: a linear merge with weights found beforehand.

A provider reads, evaluates or searches, and writes the weights that it has found into the config; from there
on the merge is the linear one, bit for bit. `prepare` is the step from the config that a user writes (a run,
a metric) to the one that the engine carries out.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.checks import check
from ._base import Block, MergeMethod, Models, TensorInfo, setting
from ._config import MergeConfig, ParentConfig
from ._task_vectors import normalized

_SAVED = re.compile(r"checkpoint-(\d+)")


def weighted_mean(operands: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return x_a + sum_i w_i (x_i - x_a), in place of operand a, the first whose weight is not zero.

    The same sums in the same order as the linear merge, so that a candidate has the bits of what is written.

    Args:
        operands: fp32 tensors of one shape; overwritten.
        weights: One for each, of sum one.
    """
    anchor = next(index for index, weight in enumerate(weights) if weight != 0.0)
    first = operands[anchor]
    others = [
        (operand.sub_(first), weight)
        for index, (operand, weight) in enumerate(zip(operands, weights, strict=True))
        if index != anchor and weight != 0.0
    ]
    for difference, weight in others:
        first.add_(difference, alpha=weight)
    return first


@dataclass(frozen=True, kw_only=True)
class CoefficientMerge(MergeMethod):
    """Base of the linear merges whose weights a provider finds."""

    weighted_sum = True

    def map(self, block: Block) -> Tensor:
        return weighted_mean(block.operands, self.coefficients(block.tensor))


@dataclass(frozen=True, kw_only=True)
class FoundWeights(CoefficientMerge):
    """Base of the methods that find their weights by evaluating models.

    Args:
        weight: Weight of a model, as found; left out in what a user writes.
    """

    weight: float = setting(
        math.nan, rule="a finite number", fits=lambda value: not math.isinf(value), per_parent=True
    )

    def check_models(self, models: Models) -> None:
        for tensor in models.tensors:
            weights: list[float] = tensor.values["weight"]
            lacking = [label for label, w in zip(models.labels, weights, strict=True) if math.isnan(w)]
            rule = "given for all models or for none"
            check(not lacking, "weight", ", ".join(lacking), rule, where=tensor.name)
            normalized(weights, tensor.name)

    def coefficients(self, tensor: TensorInfo) -> list[float]:
        return normalized(tensor.values["weight"], tensor.name)


# From what a user writes to what is carried out ---------------------------------------------------


def with_models(config: MergeConfig, models: Sequence[ParentConfig], **changes: Any) -> MergeConfig:
    """Return a config with other models, and other fields where given."""
    return dataclasses.replace(config, models=list(models), **changes)


def saved_checkpoints(run: str | Path) -> list[Path]:
    """Return the folders checkpoint-<step> of a run, by their step."""
    folders = [path for path in Path(run).glob("checkpoint-*") if _SAVED.fullmatch(path.name)]
    return sorted((path for path in folders if path.is_dir()), key=saved_step)


def saved_step(folder: Path) -> int:
    """Return the step in the name of a folder checkpoint-<step>."""
    return int(folder.name.rpartition("-")[2])


def expanded(models: Sequence[ParentConfig]) -> list[ParentConfig]:
    """Return models with a run's folder, where it is the only entry, replaced by its checkpoints.

    Raises:
        ValueError: The run's folder was given settings that only a model can have.
    """
    if len(models) != 1:
        return list(models)
    folders = saved_checkpoints(models[0].model)
    if not folders:
        return list(models)
    check(not models[0].parameters, "parameters", models[0].parameters, "left out for a run's folder")
    return [ParentConfig(model=str(folder)) for folder in folders]


def folders_of(models: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the checkpoints of a run, or the folders themselves where several are given.

    Raises:
        FileNotFoundError: A run has no checkpoints, or a folder does not exist.
    """
    if isinstance(models, str | Path):
        folders = saved_checkpoints(models)
        if not folders:
            raise FileNotFoundError(f"{models}: there is no run with folders checkpoint-<step>")
        return folders
    folders = [Path(model) for model in models]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder")
    return folders


def function_of(field: str, text: str) -> Callable[..., Any]:
    """Return the function that "module:function" names.

    Args:
        field: The setting, for the error.
        text: Dotted module, a colon, and a name in it.

    Raises:
        ValueError: It has another form, or the module has no such function.
        ImportError: The module cannot be imported.
    """
    module_name, _, name = text.partition(":")
    check(bool(module_name) and name.isidentifier(), field, text, "of the form module:function")
    found = getattr(importlib.import_module(module_name), name, None)
    check(callable(found), field, text, f"a function of {module_name}")
    assert callable(found)
    return found
