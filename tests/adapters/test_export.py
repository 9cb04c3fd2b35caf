"""What `export_to_lora` refuses, and what it writes; that it is exact stands in the adapters' contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_ext.adapters import EvaConfig, LolduConfig, SorsaConfig, export_to_lora


@pytest.fixture
def saved(tiny_llama: Any, tmp_path: Path) -> Path:
    config = SorsaConfig(r=4, alpha=8.0, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_unmoved_adapter_has_an_update_of_nothing(saved: Path, tiny_llama: Any, tmp_path: Path) -> None:
    export_to_lora(saved, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )


def test_config_says_which_modules_and_ranks(tiny_llama: Any, tmp_path: Path) -> None:
    config = SorsaConfig(
        r=4, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]
    )
    model = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "sorsa_" in name:
            parameter.data += torch.randn_like(parameter)
    export_to_lora(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert written["r"] == written["lora_alpha"]
    attention = "model.layers.1.self_attn."
    assert written["target_modules"] == [f"{attention}q_proj", f"{attention}v_proj"]
    ranks = {
        k: v.shape[0] for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in k
    }
    # Rank 2r: both factors have moved away from the frozen ones.
    assert ranks == {
        f"base_model.model.{attention}q_proj.lora_A.weight": 8,
        f"base_model.model.{attention}v_proj.lora_A.weight": 4,
    }
    assert (tmp_path / "README.md").read_text().startswith("---\nlibrary_name: peft\n")


def test_an_earlier_export_is_replaced_and_nothing_else_is(saved: Path, tmp_path: Path) -> None:
    export_to_lora(saved, tmp_path / "lora")
    export_to_lora(saved, tmp_path / "lora")
    (tmp_path / "lora" / "notes.txt").write_text("of a person")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    for out in (tmp_path / "lora", saved, tmp_path):
        with pytest.raises(ValueError, match="out must be a new or empty folder, or an earlier export"):
            export_to_lora(saved, out)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert (tmp_path / "lora" / "notes.txt").is_file()


def test_tensors_that_are_not_finite_or_do_not_fit_are_named(saved: Path, tmp_path: Path) -> None:
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.sorsa_A"
    for value, text in (
        (
            torch.full_like(tensors[name], float("nan")),
            r"sorsa_A must be finite.*layers\.1\.self_attn\.q_proj",
        ),
        (torch.ones(3, 64), r"sorsa_A must be of the config's rank 4.*layers\.1\.self_attn\.q_proj"),
        (torch.ones(4, 60), r"layers\.1\.self_attn\.q_proj: the adapter's tensors do not fit together"),
    ):
        save_file({**tensors, name: value}, path)
        with pytest.raises(ValueError, match=text):
            export_to_lora(saved, tmp_path / "lora")


def test_auto_model_loads_an_export_without_a_task_type(tiny_llama: Any, tmp_path: Path) -> None:
    from peft import AutoPeftModel
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SorsaConfig(r=4, target_modules=["q_proj"]))
    export_to_lora(model, tmp_path / "lora")
    assert (
        type(AutoPeftModel.from_pretrained(tmp_path / "lora").get_base_model()).__name__ == "LlamaForCausalLM"
    )


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_is_checked(saved: Path, rank: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank must be None or at least 1"):
        export_to_lora(saved, tmp_path / "lora", rank=rank)


def test_unknown_adapter_name_is_named(tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), SorsaConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapter_name .*'other'"):
        export_to_lora(model, tmp_path / "lora", adapter_name="other")
    assert not (tmp_path / "lora").exists()


def test_folders_that_hold_no_adapter_of_ours_are_named(saved: Path, tiny_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        export_to_lora(tmp_path / "nowhere", tmp_path / "lora")
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "plain"
    )
    with pytest.raises(ValueError, match="peft_type must be another type than LoRA"):
        export_to_lora(tmp_path / "plain", tmp_path / "lora")
    config = saved / "adapter_config.json"
    config.write_text(config.read_text().replace('"SORSA"', '"SORSAX"'))
    with pytest.raises(ValueError, match="did you mean 'sorsa'"):
        export_to_lora(saved, tmp_path / "lora")


def test_damaged_weights_are_named(saved: Path, tmp_path: Path) -> None:
    path = saved / "adapter_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        export_to_lora(saved, tmp_path / "lora")
    gone = "base_model.model.model.layers.0.self_attn.v_proj.sorsa_S"
    save_file({key: value for key, value in tensors.items() if key != gone}, path)
    with pytest.raises(
        ValueError, match=r"saved with save_basis=False.*no sorsa_S for model\.layers\.0\.self_attn\.v_proj"
    ):
        export_to_lora(saved, tmp_path / "lora")


def test_incomplete_folder_is_explained_by_its_own_field(tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LolduConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"saved with save_factors=False is exported from the .*no loldu_L, "
    ):
        export_to_lora(tmp_path / "adapter", tmp_path / "lora")


def test_folder_with_a_tensor_of_another_length_than_the_rank(tiny_llama: Any, tmp_path: Path) -> None:
    config = LolduConfig(r=4, alpha=8.0, target_modules=["q_proj"], train_scale=True, save_factors=True)
    model = get_peft_model(tiny_llama(), config).eval()
    for name, parameter in model.named_parameters():
        if "loldu_delta" in name:  # r numbers and the scale
            parameter.data += torch.linspace(0.1, 0.5, 5)
    model.save_pretrained(tmp_path / "adapter")
    export_to_lora(tmp_path / "adapter", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.loldu_delta"
    save_file({**tensors, name: torch.ones(4)}, path)  # as without train_scale
    with pytest.raises(ValueError, match=r"loldu_delta must be of the config's rank 4.*layers\.1"):
        export_to_lora(tmp_path / "adapter", tmp_path / "lora")


def test_what_the_export_is_against_is_checked(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="against must be one of 'base', 'quantized_base', got 'quantised_base'"
    ):
        export_to_lora(saved, tmp_path / "lora", against="quantised_base")
    with pytest.raises(ValueError, match="against must be 'base' for an adapter of type sorsa"):
        export_to_lora(saved, tmp_path / "lora", against="quantized_base")
    assert not (tmp_path / "lora").exists()


def test_unwritable_place_is_named(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file.lora"):
        export_to_lora(saved, tmp_path / "file" / "lora")


@pytest.mark.parametrize("rank", [None, 64])
@pytest.mark.parametrize(
    "option", [{"bias": "lora_only"}, {"bias": "all"}, {"trainable_token_indices": [3, 4]}]
)
def test_all_that_is_trained_with_a_lora_is_exported(
    option: dict[str, Any], rank: int | None, tiny_gpt2: Any, tmp_path: Path
) -> None:
    config = EvaConfig(r=2, target_modules=["c_attn"], init_weights=False, **option)
    model = get_peft_model(tiny_gpt2(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "ours")
    export_to_lora(model, tmp_path / "model", rank=rank)
    export_to_lora(tmp_path / "ours", tmp_path / "folder", rank=rank)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        for name in ("model", "folder"):
            loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / name).eval()
            torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5)


def test_save_as_lora_takes_pefts_arguments_as_pefts_own_does(tiny_llama: Any, tmp_path: Path) -> None:
    config = SorsaConfig(r=2, target_modules=["q_proj"])
    model: Any = get_peft_model(tiny_llama(), config)
    model.add_adapter("second", config)
    model.save_pretrained(str(tmp_path / "a"), True, ["second"], as_lora=True)
    assert json.loads((tmp_path / "a" / "second" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model.save_pretrained(
        str(tmp_path / "b"), selected_adapters=["default"], is_main_process=False, as_lora=True
    )
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="as_lora writes one adapter of the model"):
        model.save_pretrained(str(tmp_path / "c"), selected_adapters=["third"], as_lora=True)
