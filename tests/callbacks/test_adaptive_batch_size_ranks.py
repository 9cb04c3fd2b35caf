"""Adaptive batch size on two gloo processes: shares of tokens, later epochs, resuming; and the worker.

Usage of the worker: torchrun --nproc_per_node 2 -m tests.callbacks.test_adaptive_batch_size_ranks MODE OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ext.callbacks import AdaptiveBatchSizeCallback
from hf_ext.core.dist import full_tensor
from tests.callbacks.runs import build, logged, rows
from tests.conftest import freeze_modules
from tests.distributed.callbacks_worker import _switch_fsdp_on
from tests.distributed.launch import leave, two_processes

pytestmark = pytest.mark.distributed

SETTINGS: dict[str, Any] = {
    "batch_max": 32,
    "batch_start": 8,
    "test_interval": 2,
    "growth_cap": 2.0,
    "eta": 0.6,
}
CASES: dict[str, dict[str, Any]] = {
    "norm": {},
    "augmented": {"test": "augmented", "theta": 1.0, "nu": 0.6},
    "coordinate": {"test": "coordinate", "eta": 0.7, "accumulation": 2},
    "preconditioned": {"metric": "preconditioned"},
    "tokens_by_rank": {"average_tokens_across_devices": False},
}
RESUMED = {1: 6, 2: 4}  # by accumulation: a step in a later epoch
KEYS = ("loss", "learning_rate", "adaptive_batch_size/batch", "adaptive_batch_size/required", "epoch")


def data() -> Dataset:
    """Return 32 rows of 12 tokens with 3 to 11 labels; each fourth has the same number."""
    ids = rows().select(range(32))["input_ids"]
    labels = [[-100] * (index % 4 * 3) + row[index % 4 * 3 :] for index, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def run(folder: Path, case: str, mode: str, checkpoint: str | None = None) -> dict[str, Tensor]:
    """Train for about 100 samples, past two ends of the data, and return whole parameters and logs."""
    options = dict(CASES[case])
    across = options.pop("average_tokens_across_devices", True)
    accumulation = options.pop("accumulation", 1)
    updates = 25 // accumulation
    arguments: dict[str, Any] = {"adam_epsilon": 0.1, "learning_rate": 0.1, "max_steps": updates}
    arguments |= {"average_tokens_across_devices": across, "data": data(), "save_steps": 2}
    arguments["per_device_train_batch_size"] = 4 if mode == "one" else 2
    arguments["gradient_accumulation_steps"] = accumulation * (2 if mode == "accumulated" else 1)
    if mode == "fsdp2":
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        arguments.update(fsdp=True, fsdp_config={**wrapped, "state_dict_type": "FULL_STATE_DICT"})
    prepare: Any = _switch_fsdp_on if mode == "fsdp2" else lambda _: None
    callback = AdaptiveBatchSizeCallback(**{**SETTINGS, **options})
    trainer: Any = build(folder, callback, prepare=prepare, **arguments)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]
    assert logged(trainer, "adaptive_batch_size/samples")[-1] == updates * 4 * accumulation
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {name: full_tensor(p.detach()).clone().contiguous() for name, p in model.named_parameters()}
    return found | {f"log.{key}": torch.tensor(logged(trainer, key)).double() for key in KEYS}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def outputs(mode: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(mode)
    two_processes("tests.callbacks.test_adaptive_batch_size_ranks", mode, out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_processes_decide_as_one(case: str, mode: str, outputs: Path, tmp_path: Path) -> None:
    first, second = (load_file(outputs / f"{case}-whole.rank{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    batches = first["log.adaptive_batch_size/batch"]
    assert batches[0] == 8
    assert batches.max() >= 16
    if case == "tokens_by_rank":  # another weighting of the tokens than one process can have
        return
    alone = run(tmp_path, case, "accumulated" if mode == "ddp" else "one")
    for key, expected in alone.items():
        rtol, atol = (1e-4, 1e-5) if key.startswith("log.") else (0.0, 2e-6)
        torch.testing.assert_close(first[key], expected, rtol=rtol, atol=atol, msg=key)


@pytest.mark.parametrize("case", CASES)
def test_resumed_in_a_later_epoch(case: str, outputs: Path) -> None:
    checkpoint = outputs / case / f"checkpoint-{_resumed(case)}"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["epoch"] > 1.0
    whole, resumed = (
        load_file(outputs / f"{case}-{kind}.rank0.safetensors") for kind in ("whole", "resumed")
    )
    for key, expected in whole.items():
        assert torch.equal(resumed[key], expected), key


def _resumed(case: str) -> int:
    return RESUMED[CASES[case].get("accumulation", 1)]


def main() -> None:
    """Train every case, then again from a checkpoint of a later epoch."""
    mode, out = sys.argv[1], Path(sys.argv[2])
    for case in CASES:
        whole = run(out / case, case, mode)
        rank = torch_dist.get_rank()
        save_file(whole, out / f"{case}-whole.rank{rank}.safetensors")
        resumed = run(out / f"{case}-again", case, mode, str(out / case / f"checkpoint-{_resumed(case)}"))
        save_file(resumed, out / f"{case}-resumed.rank{rank}.safetensors")
    leave()


if __name__ == "__main__":
    freeze_modules()
    main()
