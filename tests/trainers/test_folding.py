"""Folding of an adapter into its base: what is read leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_ext.trainers._folding import as_lora, base_weights, folded_layers, fresh_adapter, merged_weights
from tests.trainers.runs import tiny_model


@pytest.mark.parametrize("seed", [0, 1])
def test_reading_merged_weights_changes_no_bit_of_the_base(seed: int) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    layers = folded_layers(model)  # type: ignore[arg-type]
    before = {path: weight.detach().clone() for path, weight in base_weights(layers).items()}
    merged = merged_weights(model, layers)  # type: ignore[arg-type]
    for path, weight in base_weights(layers).items():
        assert torch.equal(weight, before[path])
        delta = layers[path].get_delta_weight("default")  # type: ignore[operator]
        torch.testing.assert_close(merged[path], before[path] + delta)


def test_an_update_comes_back_as_a_lora_of_its_rank() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    layers = folded_layers(model)  # type: ignore[arg-type]
    original = {path: weight.detach().clone() for path, weight in base_weights(layers).items()}
    final = merged_weights(model, layers)  # type: ignore[arg-type]
    result = as_lora(model, original, final)  # type: ignore[arg-type]
    assert set(result.peft_config["default"].rank_pattern.values()) == {3}
    whole = {name: p.detach() for name, p in result.merge_and_unload().named_parameters()}
    for path, value in final.items():
        torch.testing.assert_close(whole[f"{path}.weight"], value, rtol=0.0, atol=1e-6)


def test_a_fresh_adapter_depends_on_its_seed_and_on_no_global_one() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    starts = []
    for seed, outside in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        fresh_adapter(model, seed)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(next(p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_an_adapter_that_moves_the_bias_too_is_not_folded() -> None:
    model = get_peft_model(nn_bias(), LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    with pytest.raises(ValueError, match="bias"):
        folded_layers(model)  # type: ignore[arg-type]


def nn_bias() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 4))
