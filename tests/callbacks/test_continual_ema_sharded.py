"""The average on two gloo processes under FSDP2: evaluated, and of the best checkpoint.

After an evaluation FSDP2's root still has the weights that it has gathered for it.

As a program: torchrun --nproc_per_node 2 -m tests.callbacks.test_continual_ema_sharded OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ext.callbacks import ContinualEMACallback
from hf_ext.core.dist import full_tensor
from tests.callbacks.runs import STEPS, build
from tests.conftest import freeze_modules
from tests.distributed.callbacks_worker import _switch_fsdp_on
from tests.distributed.launch import leave, two_processes

pytestmark = pytest.mark.distributed

FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
    },
}


# The highest loss, which is not that of the last model.
BEST = {"save_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}


def run(folder: Path, *, evaluates: bool, sharded: bool, best: bool = False) -> dict[str, Tensor]:
    """Train with or without evaluations, and return the parameters and the held-out losses."""
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2} if evaluates else {}
    options |= FSDP2 if sharded else {}
    options |= BEST if best else {"save_strategy": "no"}
    batch = 2 if sharded else 4
    trainer: Any = build(
        folder,
        ContinualEMACallback(fallback=0.2, best_from="average" if best else "raw"),
        prepare=_switch_fsdp_on if sharded else lambda _: None,
        per_device_train_batch_size=batch,
        adam_epsilon=0.1,
        learning_rate=0.1,
        **options,
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {name: full_tensor(p.detach()).clone().contiguous() for name, p in model.named_parameters()}
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return found | {"losses": torch.tensor(losses).double()}


def main() -> None:
    """Run with and without evaluations on this process of two."""
    out = Path(sys.argv[1])
    for evaluates in (False, True):
        found = run(out, evaluates=evaluates, sharded=True)
        save_file(found, out / f"{evaluates}.rank{dist.get_rank()}.safetensors")
    found = run(out / "best", evaluates=True, sharded=True, best=True)
    save_file(found, out / f"best.rank{dist.get_rank()}.safetensors")
    leave()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with what two processes have found."""
    out = tmp_path_factory.mktemp("two")
    two_processes("tests.callbacks.test_continual_ema_sharded", out)
    return out


def test_the_best_checkpoint_s_average(two: Path, tmp_path: Path) -> None:
    alone = run(tmp_path, evaluates=True, sharded=False, best=True)
    losses = alone.pop("losses")
    assert losses.argmax() == 0  # so the best is the average after two updates
    for rank in (0, 1):
        found, last = (load_file(two / f"{name}.rank{rank}.safetensors") for name in ("best", "True"))
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
            assert not torch.allclose(found[name], last[name], rtol=1e-4, atol=1e-6), name


def test_evaluations_are_of_the_average_and_change_nothing(two: Path, tmp_path: Path) -> None:
    alone = run(tmp_path, evaluates=True, sharded=False)
    for rank in (0, 1):
        without, with_them = (load_file(two / f"{flag}.rank{rank}.safetensors") for flag in (False, True))
        losses = with_them.pop("losses")
        assert len(losses) == STEPS // 2
        without.pop("losses")
        assert all(torch.equal(value, without[name]) for name, value in with_them.items())
        # The sums of gradients run in another order on two processes.
        torch.testing.assert_close(losses, alone["losses"], rtol=1e-5, atol=0.0)


if __name__ == "__main__":
    freeze_modules()
    main()
