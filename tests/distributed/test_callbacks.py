"""Callbacks on two gloo processes: decisions and parameters are those of one process, ranks agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.callbacks.runs import MIDDLE, make
from tests.distributed import callbacks_worker as worker
from tests.distributed.launch import once_for_each_mode, result

pytestmark = pytest.mark.distributed
Runs = Callable[[str], Path]
MODES = ("ddp", "fsdp2")
CASES = [pytest.param(mode, case, id=f"{mode}-{case}") for mode in MODES for case in worker.cases(mode)]
# Processes that train apart are no one process with a larger batch.
JOINED = [
    pytest.param(mode, case, id=f"{mode}-{case}")
    for mode in MODES
    for case, info in worker.cases(mode).items()
    if "local_updates" not in info.supports
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a function that runs the worker on two ranks, once for a mode, and returns its folder."""
    return once_for_each_mode(tmp_path_factory, "tests.distributed.callbacks_worker")


@pytest.mark.parametrize(("mode", "case"), CASES)
@pytest.mark.parametrize("run", ["whole", "resumed"])
def test_ranks_agree_to_the_bit(mode: str, case: str, run: str, outputs: Runs) -> None:
    first, second = (result(outputs(mode), case, run, rank) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize(("mode", "case"), CASES)
def test_resumed_run_is_bit_equal(mode: str, case: str, outputs: Runs) -> None:
    whole, resumed = (result(outputs(mode), case, run) for run in ("whole", "resumed"))
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


@pytest.mark.parametrize("mode", MODES)
def test_processes_keep_a_whole_branch_and_continue_from_it(mode: str, outputs: Runs, tmp_path: Path) -> None:
    branch = outputs(mode) / "annealed" / "infinite_branch"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in branch.iterdir()}
    first, second = (result(outputs(mode), "infinite_lr", "continued", rank) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert first["log.learning_rate"].tolist() == pytest.approx([0.1 * 0.1] * 3, rel=1e-6)  # a log in float32
    assert first["log.infinite_lr/time"].tolist() == [2.0, 3.0, 4.0]
    # One process cannot read the optimizer of FSDP2, and starts from DDP's, which has done the same.
    alone = worker.continued(tmp_path, outputs("ddp") / "annealed" / "infinite_branch", "one")
    assert alone.keys() == first.keys()
    for key, expected in alone.items():
        torch.testing.assert_close(first[key], expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(("mode", "case"), JOINED)
def test_two_processes_equal_one(mode: str, case: str, outputs: Runs, tmp_path: Path) -> None:
    # What is measured between gradients sees those of each process with DDP, and their mean with FSDP2.
    alone = worker.run(tmp_path, worker.cases()[case], "accumulated" if mode == "ddp" else "one")
    both = result(outputs(mode), case, "whole")
    assert alone.keys() == both.keys()
    for key, expected in alone.items():
        # Decisions are numbers of any size: norms of gradients are sums of thousands.
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if key.startswith("log.") else {"rtol": 0.0, "atol": 1e-6}
        torch.testing.assert_close(
            both[key], expected, **tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("case", worker.cases("ddp"))
def test_one_process_goes_on_where_two_have_stopped(case: str, outputs: Runs, tmp_path: Path) -> None:
    info, checkpoint = worker.cases()[case], str(outputs("ddp") / case / f"checkpoint-{MIDDLE}")
    callback = make(info)
    if callback.per_rank or "batch_size" in callback.owns:
        with pytest.raises(ValueError, match=r"(world size|number of processes) must be 2"):
            worker.run(tmp_path, info, "accumulated", checkpoint)
        return
    alone = worker.run(tmp_path, info, "accumulated", checkpoint)
    both = result(outputs("ddp"), case, "whole")
    assert alone.keys() == both.keys()
    for key, expected in both.items():
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if key.startswith("log.") else {"rtol": 0.0, "atol": 1e-6}
        torch.testing.assert_close(
            alone[key], expected, **tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )
