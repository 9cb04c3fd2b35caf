"""Contracts on a device that is not the CPU's: nothing is made, left or read on the wrong one."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import REPOSITORY

# `make test-side` runs more of them.
CONTRACTS = (
    "tests/second_device/on_side.py",
    "tests/contracts/test_adapters.py::test_start_equals_base",
    "tests/contracts/test_adapters.py::test_merge_and_unmerge",
    "tests/contracts/test_adapters.py::test_mixed_batches",
    "tests/contracts/test_layer_kinds.py::test_merging",
    "tests/contracts/test_callbacks.py::test_interrupted_and_resumed_equals_one_run",
    "tests/contracts/test_trainers.py::test_evaluation_changes_nothing",
)


def test_contracts_on_a_second_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *CONTRACTS]
    command += ["-k", "not interrupted_and_resumed_equals_one_run[2-"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "HF_EXT_TEST_DEVICE": "side", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
