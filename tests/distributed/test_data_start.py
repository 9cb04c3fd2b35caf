"""Two gloo processes with half of the data each start as one with all of it does, and fail together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed import data_start_worker as worker
from tests.distributed.launch import two_processes

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker once for all cases, on two ranks."""
    out = tmp_path_factory.mktemp("data_start")
    two_processes("tests.distributed.data_start_worker", out)
    return out


def both(outputs: Path, case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = (load_file(outputs / f"{case}.rank{rank}.safetensors") for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("case", [*worker.CASES, "peft-rows"])
def test_processes_agree_to_the_bit(case: str, outputs: Path) -> None:
    first, second = both(outputs, case)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_equal_one(case: str, outputs: Path) -> None:
    expected, found = worker.state(worker.CASES[case]()), both(outputs, case)[0]
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}  # equal ranks
    for key, tensor in expected.items():
        size = float(tensor.abs().max())
        # fp32 sums in another order, times the nearness of two components (1e-6 where none are near).
        bound = 1e-6 if case.startswith("lora_ga") else 2e-5
        torch.testing.assert_close(
            found[key], tensor, rtol=0, atol=bound * max(size, 1.0), msg=lambda m, k=key: f"{k}: {m}"
        )


def test_rows_for_peft_equal_one_process(outputs: Path) -> None:
    expected, found = worker.peft_rows(), both(outputs, "peft-rows")[0]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-5)


def test_unfit_data_on_one_process_are_told_on_both(outputs: Path) -> None:
    first, second = (json.loads((outputs / f"errors.rank{rank}.json").read_text()) for rank in (0, 1))
    assert first.keys() == second.keys()
    texts = {
        "nothing": "at least one batch",
        "no mapping": "iterable of mappings",
        "no tokens": "out of range",
    }
    for kind in ("eva", "lora_ga"):
        for name, text in texts.items():
            own, elsewhere = second[f"{kind}, {name}"], first[f"{kind}, {name}"]
            assert text in own
            assert elsewhere.startswith("ValueError: process 1: ")
            assert text in elsewhere
    assert first["eva, too few"] == second["eva, too few"]
    assert "q_proj" in first["eva, too few"]
