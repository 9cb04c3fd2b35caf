"""What the second device is, and what only shows on one; run by `tests/contracts/test_second_device.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from hf_ext.adapters import PissaConfig, SorsaConfig
from hf_ext.adapters._base import AdapterLinear
from tests.conftest import DEVICE, build_tiny_llama
from tests.contracts.test_adapters import IDS, train

from .device import DeviceMismatchError, SideTensor


def test_what_mixes_devices_is_refused() -> None:
    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    assert isinstance(there, SideTensor)
    for mixed in (
        lambda: here + there,
        lambda: torch.stack([there, here]),
        lambda: torch.stack([there.sum(), here.sum()]),
        lambda: torch.where(there > 0, there, here),
        lambda: here[there.long()],
        lambda: torch._foreach_add([there, there], [there, here]),  # pyright: ignore[reportPrivateImportUsage]
        lambda: torch.randn(3, device=DEVICE, generator=torch.Generator()),
    ):
        with pytest.raises(DeviceMismatchError):
            mixed()
    with pytest.raises(TypeError, match="host memory first"):
        there.numpy()
    there.copy_(here)
    there[[0, 2]] = 2.0
    assert (there * torch.tensor(2.0)).tolist() == [4.0, 2.0, 4.0]
    assert torch.eye(2, device=DEVICE).shape == (2, 2)


def test_numbers_are_those_of_the_cpu() -> None:
    ends = []
    for device in ("cpu", DEVICE):
        model = build_tiny_llama().to(device)
        ids = IDS.to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        ends.append(model.lm_head.weight.grad.to("cpu"))
    torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", [PissaConfig, SorsaConfig])
def test_a_residual_is_written_where_the_base_lies(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(r=4, target_modules=["q_proj"], base_mode="residual", task_type="CAUSAL_LM")
    model = get_peft_model(build_tiny_llama(), settings)
    train(model)
    state = {name: tensor.to("cpu") for name, tensor in get_peft_model_state_dict(model).items()}
    loaded = [get_peft_model(build_tiny_llama(), settings) for _ in range(2)]
    set_peft_model_state_dict(loaded[0], state)
    # Tensors of the CPU are set as they are, and moved when all have been loaded; an end that torch allows
    # for its own devices alone.
    monkeypatch.setattr(AdapterLinear, "_move_adapter_to_device_of_base_layer", lambda *_: None)
    set_peft_model_state_dict(loaded[1], state, low_cpu_mem_usage=True)
    bases = [m.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight for m in loaded]
    assert bases[1].device == DEVICE
    assert torch.equal(*bases)
    assert not torch.equal(bases[0], build_tiny_llama().model.layers[0].self_attn.q_proj.weight)
