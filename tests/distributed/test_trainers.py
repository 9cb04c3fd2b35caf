"""Trainers on two gloo processes: ranks agree, resuming is exact, and two processes are one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import trainers_worker as worker
from tests.distributed.launch import once_for_each_mode, result
from tests.trainers.runs import MODELS, model_folder, models_root

pytestmark = pytest.mark.distributed
Runs = Callable[[str], Path]
MODES = ("ddp", "fsdp2")


def cases(*, joined: bool = False) -> list[Any]:
    """Return modes with their cases; joined, without TRL's own sampling from each process's random state."""
    return [
        pytest.param(mode, name, id=f"{mode}-{name}")
        for mode in MODES
        for name, case in worker.cases(mode).items()
        if not (joined and "draws_by_process" in case.info.supports)
    ]


CUT = [
    pytest.param(*case.values, way, id=f"{case.id}-{way}")
    for case in cases()
    for way in worker.ways(worker.cases()[str(case.values[1])], str(case.values[0]))
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a function that runs the worker on two ranks, once for a mode, and returns its folder."""
    for seed in range(3):
        model_folder(seed)  # in a process group transformers writes on one rank alone
    environment = {"ACCELERATE_USE_CPU": "true", MODELS: str(models_root())}
    return once_for_each_mode(tmp_path_factory, "tests.distributed.trainers_worker", **environment)


@pytest.mark.parametrize(("mode", "case"), cases())
def test_ranks_agree_to_the_bit(mode: str, case: str, outputs: Runs) -> None:
    for run in ("whole", *worker.ways(worker.cases()[case], mode)):
        first, second = (result(outputs(mode), case, run, rank) for rank in (0, 1))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items() if key != "log.loss")


@pytest.mark.parametrize(("mode", "case", "way"), CUT)
def test_resumed_run_is_bit_equal(mode: str, case: str, way: str, outputs: Runs) -> None:
    whole, resumed = (result(outputs(mode), case, run) for run in ("whole", way))
    # A resumed run has no step before its own to compare the next with, and so one figure less.
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items() if key != "log.figures")


@pytest.mark.parametrize(("mode", "case"), cases(joined=True))
def test_two_processes_equal_one(mode: str, case: str, outputs: Runs, tmp_path: Path) -> None:
    alone = worker.run(tmp_path, worker.cases()[case], "accumulated")
    both = result(outputs(mode), case, "whole")
    assert alone.keys() == both.keys()
    for key, expected in alone.items():
        torch.testing.assert_close(
            both[key], expected, rtol=1e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
