"""Trains every registered adapter under DDP and FSDP2; started by torchrun, one process for each rank.

Usage: torchrun --nproc_per_node 2 -m tests.distributed.adapters_worker OUT
Writes OUT/<case>.rank<k>.safetensors with the adapter's tensors as rank k has them at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_ext.adapters import awaits_data, export_to_lora, initialize_from_data
from hf_ext.core import registry
from hf_ext.core.dist import full_tensor
from tests.adapters.models import Mixed
from tests.conftest import build_tiny_llama
from tests.distributed.launch import leave

STEPS = 5
BATCH = torch.arange(4 * 12).reshape(4, 12) * 7 % 256


def cases() -> dict[str, tuple[registry.MethodInfo, dict[str, Any]]]:
    """Return every registered adapter and each of its forms, with test settings.

    One trains biases too, and some are on every kind of layer.
    """
    forms = [form for info in registry.methods("adapter") for form in info.forms()]
    found = {name: (info, dict(info.test_kwargs)) for name, info in forms}
    info, settings = found["pissa"]
    found["pissa-biases"] = (info, {**settings, "bias": "all"})
    for name in ("lora_ga", "sorsa"):
        info, settings = found[name]
        found[f"{name}-layers"] = (info, {**settings, "target_modules": list(Mixed.targets)})
    return found


def base_model(settings: dict[str, Any]) -> Any:
    """Return the small model, with biases where they are to be trained, or one of every kind of layer."""
    if "target_modules" in settings:
        return Mixed()
    return build_tiny_llama(attention_bias="bias" in settings)


def adapted(info: registry.MethodInfo, settings: dict[str, Any]) -> nn.Module:
    """Return the adapted small model; a penalty, where the method has one, is strong enough to be seen."""
    assert info.config is not None
    if "gamma" in info.config.__dataclass_fields__:
        settings = {**settings, "gamma": 0.05}
    model = get_peft_model(base_model(settings), info.config(**{"target_modules": "all-linear", **settings}))
    # Each rank its own half of the rows, as in training.
    mine = BATCH.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else BATCH
    for name in awaits_data(model):
        batch = {"input_ids": mine, "labels": mine}
        initialize_from_data(model, [batch], adapter_name=name, show_progress=False)
    return model.train()


def train(model: nn.Module, ids: Tensor, module: nn.Module | None = None) -> None:
    """Take some AdamW steps on one batch."""
    parameters = [p for p in (module or model).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's whole tensors."""
    return {
        k: full_tensor(v.detach()).clone().contiguous() for k, v in get_peft_model_state_dict(model).items()
    }


def main() -> None:
    """Run all cases."""
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    rank = dist.get_rank()
    ids = BATCH.chunk(2)[rank]
    for case, (info, settings) in cases().items():
        torch.manual_seed(1000 + rank)  # a start that used global seeds would differ between ranks
        model = adapted(info, settings)
        save_file(adapter_state(model), out / f"{case}-start.rank{rank}.safetensors")
        train(DistributedDataParallel(model), ids)
        save_file(adapter_state(model), out / f"{case}-ddp.rank{rank}.safetensors")

        torch.manual_seed(1000 + rank)
        model = adapted(info, settings)
        mesh = init_device_mesh("cpu", (2,))
        inner = model.base_model.model
        for block in inner.model.layers if hasattr(inner, "model") else inner.children():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, ids)
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        save_file(adapter_state(model), out / f"{case}-fsdp2.rank{rank}.safetensors")
        if "lora_export" in info.supports:
            export_to_lora(model, out / f"{case}-fsdp2-lora")
        if "merge" in info.supports:
            with pytest.raises(ValueError, match="sharded base"):
                model.merge_adapter()
        if "bias" in settings:
            with pytest.raises(ValueError, match="bias must be 'none' where biases are sharded"):
                model.base_model.disable_adapter_layers()
    leave()


if __name__ == "__main__":
    main()
