"""Statistics of batch norms taken anew from a trainer's data."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import torch

from ..core import dist
from ..core.batch_norm import recalibrate_batch_norm


def recalibrate(trainer: Any, model: Any, count: int) -> None:
    """Take the running statistics of a model's batch norms from rows of a trainer's training data.

    The rows are drawn with the run's seed; random numbers that training draws stay the same (a collective).

    Args:
        trainer: The trainer, with its data.
        model: The model, in place.
        count: Batches of the evaluation's size on each process.
    """

    def forward(batch: Any) -> None:
        with trainer.compute_loss_context_manager():
            model(**trainer._prepare_inputs(batch))

    with _same_random_numbers():
        recalibrate_batch_norm(model, itertools.islice(_batches(trainer, count), count), forward)


def _batches(trainer: Any, count: int) -> Iterable[Any]:
    rows = trainer.train_dataset
    if hasattr(rows, "__len__"):
        size = count * trainer.args.eval_batch_size * dist.world_size()
        draw = torch.Generator().manual_seed(trainer.args.seed)
        chosen = torch.randperm(len(rows), generator=draw)[:size].tolist()
        select = getattr(rows, "select", None)
        rows = torch.utils.data.Subset(rows, chosen) if select is None else select(chosen)
    return trainer.get_test_dataloader(rows)  # in order, and not kept by the trainer


@contextlib.contextmanager
def _same_random_numbers() -> Generator[None]:
    """Let what draws random numbers within leave no trace in those that come after."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
