"""How tests start two processes of a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest
from safetensors.torch import load_file
from torch import Tensor

from hf_ext.core.dist import leave_group
from tests.conftest import REPOSITORY


def two_processes(module: str, *arguments: str | Path, timeout: int = 420, **environment: str) -> None:
    """Run a module on two gloo ranks, one thread each, and fail with what it wrote to stderr.

    Args:
        module: Dotted name.
        *arguments: Its command line.
        timeout: Seconds.
        **environment: Variables over those of this process.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # on a port that is free
    command += ["--nproc_per_node", "2", "-m", module, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def leave() -> NoReturn:
    """End a worker that has done its work, without the interpreter's own end.

    On a busy machine even `leave_group` can be too short for gloo's threads, see there.
    """
    leave_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def once_for_each_mode(
    factory: pytest.TempPathFactory, module: str, **environment: str
) -> Callable[[str], Path]:
    """Return a function that runs a worker on two ranks, once for a mode, and returns its folder."""

    @cache
    def run(mode: str) -> Path:
        out = factory.mktemp(mode)
        two_processes(module, mode, out, **environment)
        return out

    return run


def result(outputs: Path, case: str, run: str, rank: int = 0) -> dict[str, Tensor]:
    """Return what a rank wrote of a case's run."""
    return load_file(outputs / f"{case}-{run}.rank{rank}.safetensors")
