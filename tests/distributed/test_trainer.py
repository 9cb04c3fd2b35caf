"""transformers' Trainer with SORSA on two gloo processes: ranks agree, resuming changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.test_utils import get_torch_dist_unique_port
from peft import PeftModel
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, build_tiny_llama
from tests.distributed.adapters_worker import adapter_state

pytestmark = pytest.mark.distributed
MODES = ("ddp", "fsdp2", "fsdp2-rank0")


@pytest.fixture(scope="module", params=MODES)
def outputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker once for a mode, on two ranks."""
    out = tmp_path_factory.mktemp(request.param)
    build_tiny_llama().save_pretrained(out / "base")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_port", str(get_torch_dist_unique_port())),
        *("-m", "tests.distributed.trainer_worker", request.param, str(out)),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("run", ["whole", "resumed"])
def test_ranks_agree_to_the_bit(run: str, outputs: Path) -> None:
    first, second = (load_file(outputs / f"{run}.rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_resumed_run_is_bit_equal(outputs: Path) -> None:
    whole, resumed = (load_file(outputs / f"{run}.rank0.safetensors") for run in ("whole", "resumed"))
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


def test_checkpoint_holds_the_whole_adapter(outputs: Path) -> None:
    loaded = PeftModel.from_pretrained(build_tiny_llama(), outputs / "whole" / "checkpoint-4")
    end = load_file(outputs / "whole.rank0.safetensors")
    assert all(torch.equal(tensor, end[key]) for key, tensor in adapter_state(loaded).items())
