"""transformers' Trainer with SORSA on two gloo processes: ranks agree, resuming changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.conftest import build_tiny_llama
from tests.distributed.adapters_worker import adapter_state
from tests.distributed.launch import two_processes

pytestmark = pytest.mark.distributed
MODES = ("ddp", "fsdp2", "fsdp2-rank0")


@pytest.fixture(scope="module", params=MODES)
def outputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker once for a mode, on two ranks."""
    out = tmp_path_factory.mktemp(request.param)
    build_tiny_llama().save_pretrained(out / "base")
    two_processes("tests.distributed.trainer_worker", request.param, out)
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
