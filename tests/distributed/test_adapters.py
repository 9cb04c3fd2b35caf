"""Two gloo processes: DDP and FSDP2 give one process's result, and ranks agree to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.distributed import adapters_worker as worker
from tests.distributed.launch import two_processes

pytestmark = pytest.mark.distributed
CASES = list(worker.cases())


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker once for all cases, on two ranks."""
    out = tmp_path_factory.mktemp("adapters")
    two_processes("tests.distributed.adapters_worker", out)
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", ["start", "ddp", "fsdp2"])
def test_ranks_agree_to_the_bit(case: str, stage: str, outputs: Path) -> None:
    first, second = (load_file(outputs / f"{case}-{stage}.rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", ["ddp", "fsdp2"])
def test_two_processes_equal_one(case: str, stage: str, outputs: Path) -> None:
    alone = worker.adapted(*worker.cases()[case])
    before = worker.adapter_state(alone)
    worker.train(alone, worker.BATCH)
    expected = worker.adapter_state(alone)
    found = load_file(outputs / f"{case}-{stage}.rank0.safetensors")
    for key, tensor in expected.items():
        # AdamW's first steps have full length whatever the gradient: noise in a tiny one shows at the rate's
        # size.
        torch.testing.assert_close(found[key], tensor, atol=2e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    assert any(not torch.equal(before[key], tensor) for key, tensor in expected.items())
    biases = [key for key in expected if key.endswith(".bias")]
    assert bool(biases) == ("biases" in case)
    assert all(not torch.equal(before[key], expected[key]) for key in biases)


@pytest.mark.parametrize(
    "case", [c for c, (info, _) in worker.cases().items() if "lora_export" in info.supports]
)
def test_export_from_shards(case: str, outputs: Path) -> None:
    info, settings = worker.cases()[case]
    alone = worker.adapted(info, settings)
    worker.train(alone, worker.BATCH)
    exported = PeftModel.from_pretrained(worker.base_model(settings), outputs / f"{case}-fsdp2-lora")
    with torch.no_grad():
        alone.eval()
        difference = (
            (exported(input_ids=worker.BATCH).logits - alone(input_ids=worker.BATCH).logits).abs().max()
        )
    assert difference < 1e-4
