"""Checkpoints that later runs continue from: a copy that none of them writes into, and whether it fits."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState

from .._compat.transformers import checkpoint_of
from ..core import dist
from ..core.checks import check
from ..core.files import atomic_folder
from ..core.state import load_state, save_state

# What wrappers of a model put into the names of its parameters.
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|^module)\.")


def resumed_from(state: TrainerState) -> Path | None:
    """Return the checkpoint that a run was resumed from, or None for a run that began at step 0."""
    return checkpoint_of(state) if state.global_step > 0 else None


def keep(checkpoint: Path, branch: Path, name: str, changes: Mapping[str, Any]) -> None:
    """Copy a checkpoint, with values of a callback's state changed in the copy (a collective).

    The files are copies and no links: most files of a checkpoint are written in place, so that a run which
    comes to the same step in the same folder would write into its links too.

    Args:
        checkpoint: Whole on the process that calls; each has its own files in it, such as its random numbers.
        branch: The copy, put in the place of an earlier one once it is whole.
        name: Base name of the callback's files.
        changes: Values of its state by name.

    Raises:
        OSError: The copy cannot be written; an earlier one is unchanged.
    """
    if checkpoint.resolve() == branch.resolve():  # a run that was resumed from the branch
        return

    def copy() -> None:
        with atomic_folder(branch) as fresh:
            shutil.copytree(checkpoint, fresh, dirs_exist_ok=True)
            scalars, tensors = load_state(fresh, name)
            scalars["state"].update(changes)
            save_state(fresh, name, scalars, tensors)

    dist.barrier()
    dist.on_main(copy)


def trained_tensors(model: Any, optimizer: Any = None) -> dict[str, Any] | None:
    """Return what an optimizer's state is for.

    Args:
        model: The model, wrapped or not.
        optimizer: The optimizer; None where it has not been made yet.

    Returns:
        "shapes", those of the trained tensors by name, and "groups", the number of them in each parameter
        group (None where it is not known); None for a model whose tensors are shown in parts.
    """
    if type(model).__name__ == "FullyShardedDataParallel":
        return None
    shapes = {
        _WRAPPERS.sub("", name): list(getattr(parameter, "ds_shape", parameter.shape))  # whole with ZeRO-3
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    groups = [len(group["params"]) for group in optimizer.param_groups] if optimizer is not None else []
    flat = sum(groups) != len(shapes)  # DeepSpeed makes one tensor of many
    return {"shapes": shapes, "groups": None if flat else groups}


def check_trained(
    saved: Mapping[str, Any] | None, here: Mapping[str, Any] | None, field: str, value: object
) -> None:
    """Raise unless a model trains the tensors that a checkpoint's optimizer has a state for.

    Args:
        saved: `trained_tensors` of the checkpoint's run; None for one that has not noted them.
        here: Those of this run.
        field: Name of the setting that names the checkpoint.
        value: Its value.

    Raises:
        ValueError: It trains others, of other shapes, or in other groups; the text names both.
    """
    if saved is None or here is None:
        return
    there, ours = saved["shapes"], here["shapes"]
    both = [name for name in there if name in ours]
    found = {
        "trained there alone": [name for name in there if name not in ours],
        "trained here alone": [name for name in ours if name not in there],
        "of another shape": [f"{n} {there[n]} there, {ours[n]} here" for n in both if there[n] != ours[n]],
    }
    text = "; ".join(f"{what}: {_few(names)}" for what, names in found.items() if names)
    check(not text, field, value, "a checkpoint of a run that trained the same tensors", where=text)
    groups = (saved["groups"], here["groups"])
    same = None in groups or groups[0] == groups[1]
    rule = f"one with parameter groups of {groups[0]} tensors, as in {value}"
    check(same, "optimizer", f"groups of {groups[1]}", rule)


def _few(names: Iterable[str]) -> str:
    first, *rest = names
    shown = [first, *rest[:2]]
    return ", ".join(shown) + (f" and {len(rest) - 2} more" if len(rest) > 2 else "")
