"""`attach`: callbacks that need more than events, in any Trainer, by one thin subclass of its own class."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from .._compat.transformers import TrainerSeams
from ._base import Callback, refuse_conflicts

T = TypeVar("T")


def attach(trainer: T, *callbacks: Callback) -> T:
    """Join callbacks of this library to a trainer; they need not be passed to `callbacks=` as well.

    The trainer stays the object that it is; its class becomes a subclass of its own, with small overrides for
    what no event offers (gradients before clipping, the moment before a checkpoint is pushed, exceptions).
    Every callback of the library may be attached, also one that could live on events, and several calls add
    to each other.

    Args:
        trainer: Any `transformers.Trainer`, or a trainer of TRL.
        *callbacks: The callbacks.

    Returns:
        The trainer.

    Raises:
        TypeError: The trainer is none, or a callback is not one of this library's.
        ValueError: Two callbacks are of one class, or steer the same thing, or one does not fit the trainer's
            arguments; the trainer is then unchanged.
    """
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(f"attach takes callbacks of hf_ext, got {callback!r}; others go to `callbacks=`")
    present = [c for c in trainer.callback_handler.callbacks if isinstance(c, Callback)]
    refuse_conflicts([*present, *callbacks])
    for callback in callbacks:
        callback.check_arguments(trainer.args)
    if not isinstance(trainer, TrainerSeams):
        trainer.__class__ = attached_class(type(trainer))
    for callback in callbacks:
        callback.join(trainer)
        trainer.add_callback(callback)
    for callback in present:
        callback.join(trainer)
    return trainer


@functools.cache
def attached_class(cls: type[Any]) -> type[Any]:
    """Return the subclass of a trainer's class with the overrides; it keeps the name, for cards and logs."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (TrainerSeams, cls), names)
