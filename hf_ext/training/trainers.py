"""The kinds of training that a recipe names: Transformers' Trainer, TRL's trainers, and the library's."""

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

_PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
# What upstream's trainers take: Transformers' own, and TRL's.
_UPSTREAM = {
    "trainer": Inputs(columns=(("text",), ("input_ids",))),
    "sft": Inputs(columns=(("prompt", "completion"), ("messages",), ("text",))),
    "dpo": Inputs(columns=_PAIRS),
    "kto": Inputs(columns=(("prompt", "completion", "label"),)),
    "reward": Inputs(columns=_PAIRS),
    "grpo": Inputs(columns=(("prompt",),), reward=True),
    "rloo": Inputs(columns=(("prompt",),), reward=True),
    "distillation": Inputs(columns=(("prompt",),), models={"teacher_model": True}),
}
_MEASURES = {"dpo": "rewards/accuracies", "reward": "accuracy", "grpo": "reward", "rloo": "reward"}
_NATS = "nats per token"
_SPELLED = {"kto": "KTO", "sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "rloo": "RLOO"}
_OURS = {row.name: row for row in METHODS if row.kind == "trainer"}
NAMES = (*_UPSTREAM, *sorted(_OURS))


@dataclass(frozen=True)
class Kind:
    """One kind of training.

    Args:
        name: What a recipe calls it.
        trainer: The trainer's class.
        config: Its config's class.
        inputs: What it takes beside model and settings.
        in_rounds: Whether it trains in rounds, each with checkpoints of its own.
        scores: Whether the model is a reward model: a causal one's body, with one number for each row.
        measure: What its evaluation measures beside the loss, as its log calls it; None for nothing.
        loss_unit: Unit of its loss; empty where it is the trainer's own.
    """

    name: str
    trainer: Any
    config: Any
    inputs: Inputs
    in_rounds: bool = False
    scores: bool = False
    measure: str | None = None
    loss_unit: str = ""

    @property
    def task_type(self) -> str:
        """PEFT's name of what the model does."""
        return "SEQ_CLS" if self.scores else "CAUSAL_LM"

    @property
    def auto_class(self) -> str:
        """Name of the class of transformers that reads the model."""
        return "AutoModelForSequenceClassification" if self.scores else "AutoModelForCausalLM"

    @property
    def task(self) -> str:
        """The Hub's name of what the model does."""
        return "text-classification" if self.scores else "text-generation"


def config_of(name: str) -> Any:
    """Return the config class of a kind, without importing its trainer where it is upstream's.

    Raises:
        ValueError: There is no such kind; close matches are offered.
    """
    check_choice("trainer", name, NAMES)
    if name == "trainer":
        return _imported("transformers.TrainingArguments")
    if name in _UPSTREAM:
        return _imported(f"trl.trainer.{name}_config.{_spelled(name)}Config")
    row = _OURS[name]
    return getattr(importlib.import_module(row.module), str(row.config))


@functools.cache
def kind_of(name: str) -> Kind:
    """Return a kind by its name.

    Raises:
        ValueError: There is no such kind; close matches are offered.
    """
    config = config_of(name)
    if name == "trainer":
        from .causal_lm import CausalLMTrainer

        return Kind(name, CausalLMTrainer, config, _UPSTREAM[name], loss_unit=_NATS)
    if name in _UPSTREAM:
        theirs = _imported(f"trl.trainer.{name}_trainer.{_spelled(name)}Trainer")
        return Kind(
            name,
            theirs,
            config,
            _UPSTREAM[name],
            scores=name == "reward",
            measure=_MEASURES.get(name),
            loss_unit=_NATS if name == "sft" else "",
        )
    from ..core import registry

    importlib.import_module(_OURS[name].module)
    row = registry.get("trainer", name)
    trainer: Any = row.target
    return Kind(name, trainer, config, trainer.inputs, "rounds" in row.supports)


def _spelled(name: str) -> str:
    return _SPELLED.get(name, name.capitalize())


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
