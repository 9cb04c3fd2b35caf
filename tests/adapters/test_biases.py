"""Biases of the base that are trained with an adapter, beyond what the contract has for every type."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_ext.adapters import BoneConfig, export_to_lora
from hf_ext.adapters._base import AdapterLinear
from hf_ext.adapters._biases import bias_owners, named_biases
from tests.adapters.models import IDS, logits, steps

WEIGHTS = "adapter_model.safetensors"


def config(**overrides: Any) -> Any:
    return BoneConfig(**{"r": 4, "bias": "all", "target_modules": ["c_attn"], **overrides})


def biases(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".bias")}


def trained(model: Any, **overrides: Any) -> Any:
    adapted = get_peft_model(model, config(**overrides))
    steps(adapted)
    return adapted


# Settings -----------------------------------------------------------------------------------------


def test_the_choice_is_checked_with_its_near_misses() -> None:
    with pytest.raises(ValueError, match=r"bias must be one of 'none', 'all', 'bone_only', got 'bone_onyl'"):
        config(bias="bone_onyl")


def test_a_model_without_biases_gives_a_warning(tiny_llama: Any) -> None:
    with pytest.warns(UserWarning, match="bias='all': there are no biases that could be trained"):
        get_peft_model(tiny_llama(), config(target_modules=["q_proj"]))


def test_a_base_without_values_is_refused_before_it_is_touched(tiny_gpt2: Any) -> None:
    with torch.device("meta"):
        model = type(tiny_gpt2())(tiny_gpt2().config)
    with pytest.raises(ValueError, match="bias must be 'none' where the base model's weights are loaded"):
        get_peft_model(model, config())
    assert not any("bone" in name for name in model.state_dict())


# Which biases -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "pefts"), [("all", "all"), ("bone_only", "lora_only")])
def test_the_same_biases_train_and_are_saved_as_with_pefts_lora(
    ours: str, pefts: str, tiny_gpt2: Any, tmp_path: Path
) -> None:
    model = get_peft_model(tiny_gpt2(), config(bias=ours))
    lora = get_peft_model(tiny_gpt2(), LoraConfig(r=2, bias=pefts, target_modules=["c_attn"]))  # type: ignore
    both: list[set[str]] = []
    for name, adapted in (("ours", model), ("lora", lora)):
        adapted.save_pretrained(tmp_path / name)
        saved = {key for key in load_file(tmp_path / name / WEIGHTS) if key.endswith(".bias")}
        training = {n for n, p in adapted.named_parameters() if p.requires_grad and n.endswith(".bias")}
        both += [saved, training]
    assert both[0] == both[1] == both[2] == both[3] != set()


def test_modules_that_are_trained_whole_keep_their_own(tiny_gpt2: Any, tmp_path: Path) -> None:
    model = trained(tiny_gpt2(), modules_to_save=["ln_f"])
    norm = model.base_model.model.transformer.ln_f
    assert torch.equal(norm.original_module.bias, tiny_gpt2().transformer.ln_f.bias)
    assert not norm.original_module.bias.requires_grad
    assert norm.modules_to_save["default"].bias.requires_grad
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path)), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_gpt2()))


def test_a_bias_that_two_modules_share_is_held_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].bias = model[0].bias
    assert bias_owners(model) == [model[0], model[2]]
    adapted = get_peft_model(model, config(target_modules=["0"], r=2))  # type: ignore[arg-type]
    before = model[1].bias.detach().clone()
    model[1].bias.data += 1.0
    with adapted.disable_adapter():
        assert torch.equal(model[1].bias, before)
    assert torch.equal(model[1].bias, before + 1.0)


# In use and not -----------------------------------------------------------------------------------


def test_training_goes_on_across_references_as_without_them(tiny_gpt2: Any) -> None:
    found = []
    for referred in (False, True):
        model = get_peft_model(tiny_gpt2(), config())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            loss = model(input_ids=IDS, labels=IDS).loss
            if referred:  # as DPO does, between forward and backward
                with torch.no_grad(), model.disable_adapter():
                    reference = model(input_ids=IDS).logits
                torch.testing.assert_close(reference, tiny_gpt2()(input_ids=IDS).logits)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_merging_and_disabling_in_turn(tiny_gpt2: Any) -> None:
    model = trained(tiny_gpt2(), bias="bone_only")
    after, base = logits(model), logits(tiny_gpt2())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), after, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), after)
    names = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")]
    assert len(names) == 2
    model.merge_adapter()
    model.unmerge_adapter()
    assert [n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")] == names


def test_a_frozen_adapter_keeps_its_biases_frozen(tiny_gpt2: Any) -> None:
    model = trained(tiny_gpt2())
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("default")
    assert sum(p.requires_grad for n, p in model.named_parameters() if n.endswith(".bias")) == 13


def test_a_copy_has_biases_of_its_own(tiny_gpt2: Any) -> None:
    model = trained(tiny_gpt2())
    twin = copy.deepcopy(model)
    with twin.disable_adapter():
        assert torch.equal(logits(twin), logits(tiny_gpt2()))
        assert not torch.equal(logits(model), logits(tiny_gpt2()))
    assert torch.equal(logits(twin), logits(model))


def test_the_base_comes_back_in_the_dtype_that_it_has_now(tiny_gpt2: Any) -> None:
    model = trained(tiny_gpt2()).to(torch.bfloat16)
    wanted = biases(tiny_gpt2(dtype=torch.bfloat16))
    with model.disable_adapter():
        found = biases(model.base_model.model)
    assert all(torch.equal(v, wanted[k.replace("base_layer.", "")]) for k, v in found.items())


@pytest.mark.parametrize("way", ["disabled", "unloaded"])
def test_a_merged_model_that_is_cast_has_the_bases_biases_back(way: str, tiny_gpt2: Any) -> None:
    model = trained(tiny_gpt2())
    after = biases(model)
    model.merge_adapter()
    model.to(torch.bfloat16)
    base = tiny_gpt2(dtype=torch.bfloat16)
    if way == "unloaded":
        assert torch.equal(logits(model.unload()), logits(base))
        return
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(base))
        assert all(torch.equal(v, after[name].bfloat16()) for name, v in biases(model).items())


@pytest.mark.parametrize("merged", [False, True])
def test_unloading_merged_from_a_disabled_adapter_keeps_what_was_trained(
    merged: bool, tiny_gpt2: Any
) -> None:
    model = trained(tiny_gpt2())
    after, wanted = biases(model), logits(model)
    if merged:
        model.merge_adapter()
    model.base_model.disable_adapter_layers()
    unloaded = model.merge_and_unload()
    torch.testing.assert_close(logits(unloaded), wanted, atol=1e-5, rtol=1e-5)
    names = {
        name.replace("base_layer.", "").removeprefix("base_model.model."): v for name, v in after.items()
    }
    assert all(torch.equal(value, names[name]) for name, value in biases(unloaded).items())


def test_unloading_another_adapter_merged_gives_the_bases_biases(tiny_gpt2: Any) -> None:
    model = trained(tiny_gpt2())
    model.add_adapter("second", config(bias="none", seed=3))
    unloaded = model.merge_and_unload(adapter_names=["second"])
    wanted = biases(tiny_gpt2())
    assert all(torch.equal(value, wanted[name]) for name, value in biases(unloaded).items())


def test_biases_in_parts_are_refused_before_the_model_is_touched(tiny_gpt2: Any) -> None:
    model = tiny_gpt2()
    model.transformer.ln_f.bias.data = torch.empty(0)
    with pytest.raises(ValueError, match="bias must be 'none' where biases are in parts"):
        get_peft_model(model, config())
    assert not any("bone" in name for name in model.state_dict())


class ZeRO3:
    """DeepSpeed's ZeRO-3 as far as it matters here: parameters are empty but while they are gathered."""

    def __init__(self, model: nn.Module) -> None:
        self.whole = {parameter: parameter.data for parameter in model.parameters()}
        for parameter in self.whole:
            parameter.data = torch.empty(0)

    @contextmanager
    def gather(self, given: Any, modifier_rank: int | None = 0) -> Iterator[None]:
        chosen = [given] if isinstance(given, nn.Parameter) else list(given)
        chosen = [parameter for parameter in chosen if parameter in self.whole]
        for parameter in chosen:
            whole = self.whole[parameter]
            parameter.data = whole if modifier_rank == 0 else whole.clone()
        yield
        for parameter in chosen:
            parameter.data = torch.empty(0)


@pytest.mark.parametrize("active", [True, False])
def test_biases_partitioned_by_zero3_are_gathered_and_their_swap_is_refused(
    active: bool, tiny_gpt2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = trained(tiny_gpt2())
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    model = tiny_gpt2()
    partition = ZeRO3(model)
    monkeypatch.setattr("hf_ext.adapters._biases.gather_params_ctx", partition.gather)
    for module in model.modules():  # PEFT reads a Conv1D's sizes off its weight, which DeepSpeed remembers
        if isinstance(module, Conv1D):
            module.weight.ds_shape = partition.whole[module.weight].shape
    if active:
        adapted = PeftModel.from_pretrained(model, tmp_path)
    else:
        adapted = get_peft_model(model, config(bias="none", seed=3), adapter_name="first")
        adapted.load_adapter(str(tmp_path), adapter_name="second")
    found = named_biases(adapted)
    assert len(found) == 13
    base = biases(tiny_gpt2())
    for key, (held, number, _) in found.items():
        in_place, beside = partition.whole[held.parameters()[number]], held.kept[number]
        before = base[key.replace("base_layer.", "").removeprefix("base_model.model.")]
        assert torch.equal(in_place, tensors[key] if active else before)
        assert torch.equal(beside, before if active else tensors[key])
    with pytest.raises(ValueError, match="bias must be 'none' where biases are sharded or offloaded"):
        adapted.base_model.disable_adapter_layers() if active else adapted.set_adapter("second")


def test_sharded_biases_are_not_overwritten(tiny_gpt2: Any) -> None:
    model = trained(tiny_gpt2())
    norm = model.base_model.model.transformer.ln_f
    before = biases(model)
    norm.bias.data = norm.bias.data[:3]  # as ZeRO-3 and FSDP leave it outside of forward
    before.pop("base_model.model.transformer.ln_f.bias")
    model.add_adapter("second", config(bias="none", seed=3))
    training = [name for name, p in model.named_parameters() if p.requires_grad]
    for change in (
        model.base_model.disable_adapter_layers,
        lambda: model.set_adapter("second"),
        lambda: model.delete_adapter("default"),
    ):
        with pytest.raises(ValueError, match="bias must be 'none' where biases are sharded or offloaded"):
            change()
        assert all(torch.equal(value, biases(model)[name]) for name, value in before.items())
        layers = [module for module in model.modules() if isinstance(module, AdapterLinear)]
        assert all("default" in layer.active_adapters and not layer._disable_adapters for layer in layers)
        assert all("default" in layer.configs and "default" in layer.bone_block for layer in layers)
        assert "default" in model.peft_config
        assert [name for name, p in model.named_parameters() if p.requires_grad] == training


def test_rows_cannot_have_different_biases(tiny_gpt2: Any) -> None:
    model = trained(tiny_gpt2()).eval()
    with pytest.raises(ValueError, match="adapter_names must be None on a model that has trained biases"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


# Checkpoints --------------------------------------------------------------------------------------


def test_loading_onto_an_adapter_that_is_not_active(tiny_gpt2: Any, tmp_path: Path) -> None:
    model = trained(tiny_gpt2())
    model.save_pretrained(tmp_path)
    loaded = get_peft_model(tiny_gpt2(), config(bias="none", seed=3), adapter_name="first")
    before = biases(loaded)
    loaded.load_adapter(str(tmp_path), adapter_name="second")
    assert all(torch.equal(value, before[name]) for name, value in biases(loaded).items())
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("first", ["biased", "other"])
def test_another_adapter_around_the_same_modules_changes_no_name(
    first: str, tiny_gpt2: Any, tmp_path: Path
) -> None:
    other = config(bias="none", target_modules=["c_fc"], modules_to_save=["ln_f"])
    adapted = get_peft_model(tiny_gpt2(), config() if first == "biased" else other, adapter_name=first)
    if first == "other":
        adapted.add_adapter("biased", config())
        adapted.set_adapter("biased")
    steps(adapted)
    if first == "biased":
        adapted.add_adapter("other", other)
    wanted = logits(adapted)
    adapted.save_pretrained(tmp_path, selected_adapters=["biased"])
    trained(tiny_gpt2()).save_pretrained(tmp_path / "alone")
    assert load_file(tmp_path / "biased" / WEIGHTS).keys() == load_file(tmp_path / "alone" / WEIGHTS).keys()
    for beside in (False, True):
        loaded = get_peft_model(tiny_gpt2(), other if beside else config(bias="none", seed=3))
        loaded.load_adapter(str(tmp_path / "biased"), adapter_name="second")
        loaded.set_adapter("second")
        assert torch.equal(logits(loaded), wanted)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(tiny_gpt2()))
    export_to_lora(adapted, tmp_path / "lora", adapter_name="biased")
    lora = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), wanted, atol=1e-5, rtol=1e-5)


def test_modules_that_another_adapter_trains_whole_start_from_the_base(tiny_gpt2: Any) -> None:
    model = trained(tiny_gpt2())
    training = [name for name, p in model.named_parameters() if p.requires_grad]
    model.add_adapter("second", config(bias="none", modules_to_save=["ln_f"]))
    norm, base = model.base_model.model.transformer.ln_f, tiny_gpt2().transformer.ln_f
    assert torch.equal(norm.modules_to_save["second"].bias, base.bias)
    assert not torch.equal(norm.original_module.bias, base.bias)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name.replace("original_module.", "") for name in names] == training
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(tiny_gpt2()))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_resuming_continues_as_the_original(low_cpu_mem_usage: bool, tiny_gpt2: Any, tmp_path: Path) -> None:
    model = trained(tiny_gpt2())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_gpt2(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    for one in (model, loaded):
        steps(one, 2)
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_gpt2()))


def test_transformers_own_adapter_calls(tiny_gpt2: Any, tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.add_adapter(config(), adapter_name="first")
    steps(model)
    after = logits(model)
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_gpt2()))
    model.enable_adapters()
    assert torch.equal(logits(model), after)
    loaded = tiny_gpt2()
    loaded.load_adapter(str(tmp_path), adapter_name="other")
    assert torch.equal(logits(loaded), after)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(tiny_gpt2()))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path)), after)


@pytest.mark.parametrize("fault", ["missing", "shape", "nan"])
def test_damaged_biases_are_named(fault: str, tiny_gpt2: Any, tmp_path: Path) -> None:
    trained(tiny_gpt2()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.transformer.h.1.ln_1.bias"
    if fault == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.zeros(3) if fault == "shape" else torch.full((64,), float("nan"))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.ln_1\.bias"):
        PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
