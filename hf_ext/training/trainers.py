"""The kinds of training that a recipe names: some of TRL's trainers, and all of the library's."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._methods import METHODS
from ..core.checks import check, check_choice
from ..core.registry import Inputs

if TYPE_CHECKING:
    from .recipe import Job

# TRL's own: trainer and config by module.
_OF_TRL = {
    "sft": ("trl.trainer.sft_trainer.SFTTrainer", "trl.trainer.sft_config.SFTConfig"),
    "dpo": ("trl.trainer.dpo_trainer.DPOTrainer", "trl.trainer.dpo_config.DPOConfig"),
    "distillation": (
        "trl.trainer.distillation_trainer.DistillationTrainer",
        "trl.trainer.distillation_config.DistillationConfig",
    ),
}
_OURS = {row.name: row for row in METHODS if row.kind == "trainer"}
NAMES = (*_OF_TRL, *sorted(_OURS))


@dataclass(frozen=True)
class Kind:
    """One kind of training.

    Args:
        name: What a recipe calls it.
        trainer: The trainer's class.
        config: Its config's class.
        inputs: What it takes beside model and settings.
        in_rounds: Whether it trains in rounds, each with checkpoints of its own.
    """

    name: str
    trainer: Any
    config: Any
    inputs: Inputs
    in_rounds: bool = False


def config_of(name: str) -> Any:
    """Return the config class of a kind, without importing its trainer where it is TRL's.

    Raises:
        ValueError: There is no such kind; close matches are offered.
    """
    check_choice("trainer", name, NAMES)
    if name in _OF_TRL:
        return _imported(_OF_TRL[name][1])
    row = _OURS[name]
    return getattr(importlib.import_module(row.module), str(row.config))


@functools.cache
def kind_of(name: str) -> Kind:
    """Return a kind by its name.

    Raises:
        ValueError: There is no such kind; close matches are offered.
    """
    config = config_of(name)
    if name in _OF_TRL:
        inputs = {
            "sft": Inputs(columns=(("prompt", "completion"), ("messages",), ("text",))),
            "dpo": Inputs(columns=(("prompt", "chosen", "rejected"), ("chosen", "rejected"))),
            "distillation": Inputs(columns=(("prompt",),), models={"teacher_model": True}),
        }
        return Kind(name, _imported(_OF_TRL[name][0]), config, inputs[name])
    from ..core import registry

    importlib.import_module(_OURS[name].module)
    row = registry.get("trainer", name)
    trainer: Any = row.target
    return Kind(name, trainer, config, trainer.inputs, "rounds" in row.supports)


@contextlib.contextmanager
def _working_directory_importable() -> Generator[None]:
    # As `python script.py` has the script's folder; a function of the user's stands beside the recipe.
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_inputs(job: Job) -> None:
    """Check that a recipe gives its trainer the models, data sets and rewards that it takes.

    Raises:
        ValueError: One is missing, or the trainer takes none of that name.
    """
    kind, recipe = kind_of(job.recipe.trainer), job.recipe
    given = {"other_models": (recipe.other_models, kind.inputs.models)}
    given["other_datasets"] = (recipe.other_datasets, kind.inputs.datasets)
    for field, (names, known) in given.items():
        for name in names:
            takes = ", ".join(known) or "none"
            check(name in known, f"{job.where}: {field}", name, f"what trainer {kind.name!r} takes: {takes}")
        for name, required in known.items():
            present = name in names or not required
            check(present, f"{job.where}: {field}.{name}", None, f"given for trainer {kind.name!r}")
    rewards = recipe.reward_funcs
    if kind.inputs.reward:
        present = bool(rewards) or kind.inputs.reward_optional
        check(present, f"{job.where}: reward_funcs", rewards, f"given for trainer {kind.name!r}")
    else:
        check(
            not rewards, f"{job.where}: reward_funcs", rewards, f"left out: trainer {kind.name!r} takes none"
        )


def reward_functions(job: Job) -> list[Callable[..., Any]]:
    """Return a recipe's reward functions: those of embedded tasks by name, others by dotted path.

    Raises:
        ValueError: There is no such task or function.
    """
    from ..data import EMBEDDED, reward_function

    given = job.recipe.reward_funcs or []
    found: list[Callable[..., Any]] = []
    for name in [given] if isinstance(given, str) else given:
        if name in EMBEDDED:
            found.append(reward_function(name))
            continue
        try:
            with _working_directory_importable():
                function = _imported(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{job.where}: reward_funcs: {name!r} is neither an embedded task ({', '.join(EMBEDDED)}) "
                f"nor a function's dotted path: {error}"
            ) from error
        check(callable(function), f"{job.where}: reward_funcs", name, "a function")
        found.append(function)
    return found
