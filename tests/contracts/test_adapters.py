"""What holds for every registered adapter type, on Llama (nn.Linear) and, where supported, GPT-2 (Conv1D)."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_ext.adapters import awaits_data, export_to_lora, initialize_from_data
from hf_ext.adapters._base import AdapterLinear
from hf_ext.adapters._lora import LoraStartLayer
from hf_ext.adapters._recomputed import RecomputedLinear
from hf_ext.core.registry import MethodInfo
from tests.conftest import DEVICE
from tests.registry_cases import methods

ADAPTERS = methods("adapter")
STARTS_AT_BASE = methods("adapter", supports={"starts_at_base"})
MERGES = methods("adapter", supports={"merge"})
EXPORTS = methods("adapter", supports={"lora_export"})
MULTI = methods("adapter", supports={"multi_adapter"})
NAMES = methods("adapter", variants=False)
CONV1D = methods("adapter", supports={"conv1d"})
IDS = (torch.arange(2 * 12).reshape(2, 12) * 7 % 256).to(DEVICE)


def settings(info: MethodInfo, **overrides: Any) -> Any:
    assert info.config is not None
    if "peft_lora" in info.supports and "dropout" in overrides:
        overrides["lora_dropout"] = overrides.pop("dropout")
    return info.config(
        **{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **info.test_kwargs, **overrides}
    )


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def start(model: nn.Module, labels: Tensor = IDS) -> Any:
    """Give every adapter that starts from data its start."""
    for name in awaits_data(model):
        batch = {"input_ids": IDS, "labels": labels}
        initialize_from_data(model, [batch], adapter_name=name, show_progress=False)
    return model


def adapt(model: nn.Module, config: Any, **options: Any) -> PeftModel:
    return start(get_peft_model(model, config, **options))  # type: ignore[arg-type]


def trained(info: MethodInfo, model: nn.Module, **overrides: Any) -> PeftModel:
    adapted = adapt(model, settings(info, **overrides))
    train(adapted)
    return adapted


def assert_base(info: MethodInfo, found: Tensor, base: Tensor) -> None:
    """Assert that logits are the base's: to the bit, or to rounding where a form writes into the base."""
    tolerance = 0.0 if "exact_base" in info.supports else 1e-5
    torch.testing.assert_close(found, base, atol=tolerance, rtol=tolerance)


def assert_start(info: MethodInfo, found: Tensor, base: Tensor) -> None:
    """Assert that logits at the start are the base's, to rounding."""
    tolerance = 2e-6 if "exact_base" in info.supports else 1e-5
    torch.testing.assert_close(found, base, atol=tolerance, rtol=1e-5)


def layers_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, AdapterLinear | LoraStartLayer)]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {layer.module_name: layer.get_base_layer().weight.detach().clone() for layer in layers_of(model)}


# Start and training -------------------------------------------------------------------------------


@pytest.mark.parametrize("info", STARTS_AT_BASE)
def test_start_equals_base(info: MethodInfo, tiny_llama: Any) -> None:
    expected = logits(tiny_llama())
    adapted = adapt(tiny_llama(), settings(info))
    assert_start(info, logits(adapted), expected)


@pytest.mark.parametrize("info", ADAPTERS)
def test_random_start_differs_and_depends_on_the_seed_alone(info: MethodInfo, tiny_llama: Any) -> None:
    outputs = []
    for seed, noise in ((0, 1), (0, 2), (1, 3)):
        torch.manual_seed(noise)
        outputs.append(logits(adapt(tiny_llama(), settings(info, init_weights=False, seed=seed))))
    assert (outputs[0] - logits(tiny_llama())).abs().max() > 1e-3
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("info", ADAPTERS)
def test_start_ignores_global_seeds(info: MethodInfo, tiny_llama: Any) -> None:
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        states.append(adapt(tiny_llama(), settings(info)).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("info", ADAPTERS)
def test_only_adapter_tensors_train_and_all_do(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = adapt(tiny_llama(), settings(info))
    names = {f".{name}." for name in layers_of(adapted)[0].adapter_layer_names}
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == any(part in name for part in names), name
    train(adapted, steps=2)
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("info", ADAPTERS)
def test_every_linear_layer_but_the_head_is_adapted(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = adapt(tiny_llama(), settings(info))
    assert len(layers_of(adapted)) == 2 * 7
    assert type(adapted.base_model.model.lm_head) is nn.Linear


# Choosing layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("info", ADAPTERS)
@pytest.mark.parametrize(
    ("choice", "count"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, 2),
        ({"target_modules": None}, 4),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 1),
    ],
)
def test_target_modules(info: MethodInfo, choice: dict[str, Any], count: int, tiny_llama: Any) -> None:
    assert len(layers_of(adapt(tiny_llama(), settings(info, **choice)))) == count


@pytest.mark.parametrize("info", ADAPTERS)
def test_rank_pattern(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = trained(info, tiny_llama(), rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 1})
    plain = adapt(tiny_llama(), settings(info))
    shapes = {
        layer.module_name: {k: tuple(v.shape) for k, v in layer.adapter_tensors("default").items()}
        for layer in layers_of(adapted)
    }
    for layer in layers_of(plain):
        changed = "q_proj" in layer.module_name or layer.module_name.endswith("layers.1.mlp.up_proj")
        same = shapes[layer.module_name] == {
            k: tuple(v.shape) for k, v in layer.adapter_tensors("default").items()
        }
        assert same != changed, layer.module_name
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(adapted))


@pytest.mark.parametrize("info", ADAPTERS)
def test_modules_to_save(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = trained(info, tiny_llama(), modules_to_save=["lm_head"])
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))
    start = adapt(tiny_llama(), settings(info, modules_to_save=["lm_head"]))
    assert not torch.equal(loaded.base_model.model.lm_head.weight, start.base_model.model.lm_head.weight)
    with loaded.disable_adapter():
        assert_base(info, logits(loaded), logits(tiny_llama()))


@pytest.mark.parametrize("info", ADAPTERS)
def test_sequence_classification(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    def build() -> Any:
        torch.manual_seed(3)
        return LlamaForSequenceClassification(copy.deepcopy(tiny_llama().config))

    adapted = start(get_peft_model(build(), settings(info, task_type="SEQ_CLS")), torch.tensor([0, 1]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))


# Saving and loading -------------------------------------------------------------------------------


@pytest.mark.parametrize("info", ADAPTERS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(info: MethodInfo, low_cpu_mem_usage: bool, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = trained(info, tiny_llama())
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    layer = layers_of(adapted)[0]
    own = set(layer.adapter_tensors("default"))
    if isinstance(layer, RecomputedLinear) and not getattr(layer.configs["default"], layer.kept_by):
        own -= set(layer.recomputed_names)
        own |= {f"{info.name}_{mark}" for mark in layer.mark_names}
    assert {key.removesuffix(".weight").rpartition(".")[2] for key in keys} == own
    assert not any("default" in key for key in keys)


@pytest.mark.parametrize("info", ADAPTERS)
def test_loaded_adapter_trains_on_as_the_original_does(
    info: MethodInfo, tiny_llama: Any, tmp_path: Path
) -> None:
    adapted = trained(info, tiny_llama())
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    for model in (adapted, loaded):
        train(model, steps=2)
    assert torch.equal(logits(loaded), logits(adapted))


@pytest.mark.parametrize("info", NAMES)
def test_loads_in_a_fresh_process(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    adapted = trained(info, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    adapted.save_pretrained(tmp_path / "adapter")
    save_file({"ids": IDS, "logits": logits(adapted)}, tmp_path / "expected.safetensors")
    code = f"""
import hf_ext, torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
known = load_file({str(tmp_path / "expected.safetensors")!r})
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    assert torch.equal(model(input_ids=known["ids"]).logits, known["logits"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("info", ADAPTERS)
def test_auto_model(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted = trained(info, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    adapted.save_pretrained(tmp_path / "adapter")
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(logits(loaded), logits(adapted))


@pytest.mark.parametrize("info", ADAPTERS)
def test_transformers_own_adapter_calls(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    expected = logits(tiny_llama())
    model = tiny_llama()
    model.add_adapter(settings(info), adapter_name="first")
    start(model)
    train(model)
    adapted = logits(model)
    assert not torch.equal(adapted, expected)
    model.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path), adapter_name="other")
    assert torch.equal(logits(loaded), adapted)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), adapted)
    model.disable_adapters()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.enable_adapters()
    assert torch.equal(logits(model), adapted)
    if "multi_adapter" not in info.supports:
        return
    model.add_adapter(settings(info), adapter_name="second")
    start(model)
    model.set_adapter("second")
    assert not torch.equal(logits(model), adapted)
    model.set_adapter("first")
    assert torch.equal(logits(model), adapted)
    model.delete_adapter("second")
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("info", ADAPTERS)
def test_config_round_trip(info: MethodInfo, tmp_path: Path) -> None:
    config = settings(info, target_modules=["q_proj"], seed=7, modules_to_save=["lm_head"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is info.config
    assert loaded == config
    json.loads((tmp_path / "adapter_config.json").read_text())


# Disabling, several adapters ----------------------------------------------------------------------


@pytest.mark.parametrize("info", ADAPTERS)
def test_disabled_adapter_is_the_base_bit_for_bit(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama())
    with adapted.disable_adapter():
        assert_base(info, logits(adapted), logits(tiny_llama()))
    assert (logits(adapted) - logits(tiny_llama())).abs().max() > 1e-3


@pytest.mark.parametrize("info", MULTI)
def test_several_adapters(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = trained(info, tiny_llama())
    first = logits(adapted)
    adapted.add_adapter("second", settings(info, seed=5))
    start(adapted)
    assert not any("second" in name for name, p in adapted.named_parameters() if p.requires_grad)
    adapted.set_adapter("second")
    assert not any("default" in name for name, p in adapted.named_parameters() if p.requires_grad)
    train(adapted, steps=2)
    second = logits(adapted)
    assert not torch.equal(first, second)
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), first)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), second)

    adapted.base_model.set_adapter(["default", "second"])
    both = logits(adapted)
    update = {
        layer.module_name: layer.stored_delta(["default", "second"])  # their sum, unless they chain
        for layer in layers_of(adapted)
    }
    summed = tiny_llama()
    for name, delta in update.items():
        summed.get_submodule(name).weight.data += delta
    torch.testing.assert_close(both, logits(summed), atol=2e-5, rtol=1e-4)

    adapted.set_adapter("second")
    with pytest.warns(UserWarning, match="deleted"):
        adapted.delete_adapter("second")  # the active one: the other takes over
    assert torch.equal(logits(adapted), first)
    assert list(adapted.peft_config) == ["default"]
    assert not any("second" in name for name in adapted.state_dict())


@pytest.mark.parametrize("info", ADAPTERS)
def test_mixed_batches(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama())
    other = {} if "multi_adapter" in info.supports else {"base_mode": info.config.untouched_mode}  # type: ignore
    adapted.add_adapter("second", settings(info, seed=5, init_weights=False, **other))
    adapted.eval()
    names = ["second", "__base__", "default", "second", "default"]
    batch = {"input_ids": torch.cat([IDS, IDS.flip(0), IDS[:1] + 1])}
    with torch.no_grad():
        mixed = adapted(**batch, adapter_names=names).logits
        alone = {}
        for name in ("default", "second"):
            adapted.set_adapter(name)
            alone[name] = adapted(**batch).logits
            assert torch.equal(adapted(**batch, adapter_names=[name] * 5).logits, alone[name])
        with adapted.disable_adapter():
            alone["__base__"] = adapted(**batch).logits
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=1e-5)
    assert all((alone[name] - mixed).abs().amax((1, 2)).max() > 1e-3 for name in alone)


# Biases -------------------------------------------------------------------------------------------

OURS = {"lacks": {"peft_lora"}, "supports": {"conv1d"}}


def biases_of(model: nn.Module, *, adapted: bool) -> dict[str, Tensor]:
    """Return copies of a GPT-2's biases by name in the bare model; those of norms unless `adapted`."""
    found = {name.replace("base_layer.", ""): p for name, p in model.named_parameters() if ".bias" in name}
    return {
        name.removeprefix("base_model.model."): p.detach().clone()
        for name, p in found.items()
        if not adapted or ".ln_" not in name
    }


@pytest.mark.parametrize(
    ("info", "whole"),
    [pytest.param(*case.values, True, id=f"{case.id}-all") for case in methods("adapter", **OURS)]
    + [
        pytest.param(*case.values, False, id=f"{case.id}-only")
        for case in methods("adapter", variants=False, **OURS)
    ],
)
def test_biases(info: MethodInfo, whole: bool, tiny_gpt2: Any, tmp_path: Path) -> None:
    bias = "all" if whole else f"{info.name}_only"
    before, base = biases_of(tiny_gpt2(), adapted=not whole), logits(tiny_gpt2())

    def assert_base_biases(model: nn.Module) -> None:
        now = biases_of(model, adapted=not whole)
        assert now.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in now.items())

    adapted = trained(info, tiny_gpt2(), bias=bias)
    own = {f".{name}." for name in layers_of(adapted)[0].adapter_layer_names}
    training = [name for name, p in adapted.named_parameters() if p.requires_grad]
    names = {name.replace("base_layer.", "").removeprefix("base_model.model.") for name in training}
    assert {name for name in names if not any(part in name for part in own)} == before.keys()
    after, wanted = biases_of(adapted, adapted=not whole), logits(adapted)
    assert not any(torch.equal(value, before[name]) for name, value in after.items())

    with adapted.disable_adapter():
        assert_base(info, logits(adapted), base)
        assert_base_biases(adapted)
        adapted.save_pretrained(tmp_path / "own")  # what is trained, in place or not
    assert torch.equal(logits(adapted), wanted)
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == training
    loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "own")
    assert torch.equal(logits(loaded), wanted)
    assert not any(p.requires_grad for p in loaded.parameters())
    if "lora_export" in info.supports:
        layer = layers_of(adapted)[0]
        whole_file = getattr(layer.configs["default"], getattr(layer, "kept_by", ""), True)
        for source in (adapted, tmp_path / "own") if whole_file else (adapted,):
            export_to_lora(source, tmp_path / "lora")
            lora = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora")
            assert lora.peft_config["default"].bias == ("all" if whole else "lora_only")
            torch.testing.assert_close(logits(lora), wanted, atol=1e-5, rtol=1e-5)

    with pytest.raises(ValueError, match="bias must be 'none' beside adapter 'default'"):
        loaded.add_adapter("second", settings(info, bias=bias))
    other = {} if "multi_adapter" in info.supports else {"base_mode": info.config.untouched_mode}  # type: ignore
    loaded.add_adapter("second", settings(info, **other))
    loaded.set_adapter("second")
    assert_base_biases(loaded)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if ".bias" in name)
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded), wanted)
    loaded.merge_adapter(["second"])
    assert_base_biases(loaded)
    loaded.unmerge_adapter()
    assert torch.equal(logits(loaded), wanted)
    merged = copy.deepcopy(loaded).merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, after[n]) for n, v in biases_of(merged, adapted=not whole).items())
    assert_base_biases(copy.deepcopy(loaded).unload())
    loaded.delete_adapter("default")
    assert_base_biases(loaded)
    loaded.add_adapter("third", settings(info, bias=bias, **other))


# Merging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", MERGES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(info: MethodInfo, safe_merge: bool, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama())
    expected, before = logits(adapted), base_weights(adapted)
    for _ in range(5):
        adapted.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
        adapted.unmerge_adapter()
        assert all(torch.equal(w, before[name]) for name, w in base_weights(adapted).items())
    assert torch.equal(logits(adapted), expected)


@pytest.mark.parametrize("info", MERGES)
def test_merge_and_unmerge_in_bf16(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama(dtype=torch.bfloat16))
    before = base_weights(adapted)
    assert all(w.dtype == torch.bfloat16 for w in before.values())
    deltas = {layer.module_name: layer.stored_delta(["default"]) for layer in layers_of(adapted)}
    adapted.merge_adapter()
    for name, weight in base_weights(adapted).items():
        exact = before[name].float() + deltas[name]
        if "peft_lora" in info.supports:  # upstream rounds the update before it adds it
            torch.testing.assert_close(weight.float(), exact, atol=1e-3, rtol=1e-2)
        else:
            assert torch.equal(weight, exact.to(torch.bfloat16)), name  # one rounding, no more
    adapted.unmerge_adapter()
    assert all(torch.equal(w, before[name]) for name, w in base_weights(adapted).items())


@pytest.mark.parametrize("info", MERGES)
def test_merge_and_unload(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama())
    expected = logits(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert {type(m) for m in merged.modules()} == {type(m) for m in tiny_llama().modules()}
    assert set(merged.state_dict()) == set(tiny_llama().state_dict())


@pytest.mark.parametrize("info", MULTI)
def test_merging_two_adapters_in_turn(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama())
    adapted.add_adapter("second", settings(info, seed=5))
    start(adapted)
    adapted.set_adapter("second")
    train(adapted)
    before = base_weights(adapted)
    adapted.base_model.set_adapter(["second", "default"])  # adapters that chain do so in this order
    both = logits(adapted)
    adapted.merge_adapter(adapter_names=["second"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        adapted.merge_adapter(adapter_names=["default"])
    torch.testing.assert_close(logits(adapted), both, atol=2e-5, rtol=1e-4)
    adapted.unmerge_adapter()
    assert all(torch.equal(w, before[name]) for name, w in base_weights(adapted).items())


@pytest.mark.parametrize("info", MERGES)
def test_unload_returns_the_base(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama())
    adapted.merge_adapter()
    assert_base(info, logits(adapted.unload()), logits(tiny_llama()))


@pytest.mark.parametrize("info", MERGES)
def test_safe_merge_refuses_and_leaves_the_base(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama())
    before = base_weights(adapted)
    broken = layers_of(adapted)[3]
    next(p for p in broken.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=broken.module_name.replace(".", r"\.")):
        adapted.merge_adapter(safe_merge=True)
    assert torch.equal(broken.get_base_layer().weight, before[broken.module_name])
    assert not broken.merged


@pytest.mark.parametrize("info", MERGES)
def test_delta_weight_is_what_forward_adds(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama()).eval()
    for layer in layers_of(adapted):
        unit = torch.eye(layer.in_features)
        with torch.no_grad():
            added = layer(unit) - layer.get_base_layer()(unit)
        torch.testing.assert_close(added.T, layer.stored_delta(["default"]), atol=1e-5, rtol=1e-4)


# Export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", methods("adapter", supports={"lora_export"}, variants=False))
def test_export_loads_in_a_process_without_this_package(
    info: MethodInfo, tiny_llama: Any, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted = trained(
        info,
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        rank_pattern={"q_proj": 2},
        exclude_modules=["k_proj"],
        modules_to_save=["lm_head"],
    )
    adapted.save_pretrained(tmp_path / "adapter")
    export_to_lora(adapted, tmp_path / "from_model")
    export_to_lora(tmp_path / "adapter", tmp_path / "from_folder")
    save_file({"ids": IDS, "logits": logits(adapted)}, tmp_path / "expected.safetensors")
    code = f"""
import sys, torch
sys.modules["hf_ext"] = None  # importing it is an error
from peft import PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
known = load_file({str(tmp_path / "expected.safetensors")!r})
for folder in ("from_model", "from_folder"):
    base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
    model = PeftModel.from_pretrained(base, {str(tmp_path)!r} + "/" + folder).eval()
    assert model.peft_config["default"].peft_type == "LORA"
    with torch.no_grad():
        difference = (model(input_ids=known["ids"]).logits - known["logits"]).abs().max().item()
    assert difference <= 1e-5, (folder, difference)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("info", methods("adapter", supports={"lora_export", "conv1d"}))
def test_export_of_conv1d(info: MethodInfo, tiny_gpt2: Any, tmp_path: Path) -> None:
    adapted = trained(info, tiny_gpt2())
    export_to_lora(adapted, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("info", EXPORTS)
def test_save_pretrained_as_lora(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = trained(info, tiny_llama())
    adapted.save_pretrained(tmp_path / "lora", as_lora=True)
    assert PeftConfig.from_pretrained(tmp_path / "lora").peft_type == "LORA"
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-5, rtol=1e-5)
    adapted.save_pretrained(tmp_path / "own")  # without the option, nothing has changed
    assert type(PeftConfig.from_pretrained(tmp_path / "own")) is info.config


@pytest.mark.parametrize("info", EXPORTS)
def test_export_after_transformers_add_adapter(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    model.add_adapter(settings(info), adapter_name="mine")
    start(model)
    train(model)
    export_to_lora(model, tmp_path, adapter_name="mine")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("info", EXPORTS)
def test_peft_conversion_to_lora(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    from peft.tuners.lora.conversion import save_as_lora

    adapted = trained(info, tiny_llama())
    export_to_lora(adapted, tmp_path / "ours")
    rank = PeftConfig.from_pretrained(tmp_path / "ours").r
    save_as_lora(tmp_path / "theirs", adapted, rank=rank)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("info", EXPORTS)
def test_truncated_export_says_what_it_drops(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = trained(info, tiny_llama())
    exact = export_to_lora(adapted, tmp_path / "exact")
    dropped = export_to_lora(adapted, tmp_path / "rank1", rank=1)
    assert set(exact.values()) == {0.0}
    for layer in layers_of(adapted):
        delta = layer.delta_weight("default")
        energy = torch.linalg.svdvals(delta.double()).square()
        assert dropped[layer.module_name] == pytest.approx(float(energy[1:].sum() / energy.sum()), abs=1e-5)


@pytest.mark.parametrize("info", EXPORTS)
def test_failed_export_leaves_the_old_one(
    info: MethodInfo, tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = trained(info, tiny_llama())
    out = tmp_path / "lora"
    export_to_lora(adapted, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_ext.core.files.os.fsync", full)
    train(adapted, steps=1)
    with pytest.raises(OSError, match=r"cannot write .*: No space left on device"):
        export_to_lora(adapted, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


# Conv1D, dtypes, compile, checkpointing, Trainer --------------------------------------------------


@pytest.mark.parametrize("info", CONV1D)
def test_conv1d(info: MethodInfo, tiny_gpt2: Any, tmp_path: Path) -> None:
    expected = logits(tiny_gpt2())
    adapted = adapt(tiny_gpt2(), settings(info))
    if "starts_at_base" in info.supports:
        assert_start(info, logits(adapted), expected)
    train(adapted)
    after = logits(adapted)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path)), after)
    before = base_weights(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), after, atol=1e-5, rtol=1e-5)
    adapted.unmerge_adapter()
    assert all(torch.equal(w, before[name]) for name, w in base_weights(adapted).items())


@pytest.mark.parametrize("info", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(info: MethodInfo, dtype: torch.dtype, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = adapt(tiny_llama(dtype=dtype), settings(info))
    assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    start = logits(adapted)
    assert start.dtype == dtype
    if (
        "starts_at_base" in info.supports
    ):  # the fp32 tensors cancel; what remains is the base dtype's rounding
        rounding = 2e-2 if "exact_base" in info.supports else 4e-2  # a written residual is rounded once more
        base = logits(tiny_llama(dtype=dtype))
        torch.testing.assert_close(start, base, atol=rounding, rtol=rounding)
        for layer in layers_of(adapted):
            assert layer.delta_weight("default").abs().max() < 1e-5
    train(adapted)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path)), logits(adapted))


@pytest.mark.parametrize("info", ADAPTERS)
def test_adapter_in_the_bases_dtype(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = adapt(tiny_llama(dtype=torch.bfloat16), settings(info), autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for p in adapted.parameters())
    assert all(torch.isfinite(logits(adapted)).flatten())


@pytest.mark.parametrize("info", ADAPTERS)
def test_autocast(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama())
    exact = logits(adapted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        layer = layers_of(adapted)[0]
        assert (
            layer(torch.ones(1, layer.in_features)).dtype == torch.bfloat16
        )  # what a plain linear layer returns
        rough = logits(adapted)
    loss.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in adapted.parameters() if p.requires_grad
    )
    torch.testing.assert_close(rough.float(), exact, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("info", ADAPTERS)
def test_gradient_checkpointing(info: MethodInfo, tiny_llama: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        adapted = adapt(tiny_llama(), settings(info)).train()
        if checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=0, rtol=0)


@pytest.mark.parametrize("info", ADAPTERS)
def test_dropout_acts_in_training_alone(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama(), dropout=0.5)
    assert torch.equal(logits(adapted), logits(adapted))
    adapted.train()
    with torch.no_grad():
        first, second = (adapted(input_ids=IDS).logits for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("info", ADAPTERS)
def test_torch_compile(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = adapt(tiny_llama(), settings(info))
    torch._dynamo.reset()  # the limit of recompilations is the process's, and every method compiles forward
    compiled = torch.compile(copy.deepcopy(adapted), backend="aot_eager", fullgraph=True)
    for model in (adapted, compiled):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(compiled), logits(adapted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("info", ADAPTERS)
def test_trainer(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    data = Dataset.from_dict({"input_ids": IDS.repeat(3, 1).tolist(), "labels": IDS.repeat(3, 1).tolist()})
    adapted = adapt(tiny_llama(), settings(info))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        use_cpu=True,
        report_to="none",
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
    )
    trainer = Trainer(adapted, arguments, train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-3")
    assert torch.equal(logits(loaded), logits(adapted))


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "bad"),
    [pytest.param(i.values[0], bad, id=f"{i.id}-{bad}") for i in NAMES for bad in i.values[0].bad_kwargs],
)
def test_bad_settings_are_named(info: MethodInfo, bad: dict[str, Any]) -> None:
    assert info.config is not None
    with pytest.raises((ValueError, TypeError), match=list(bad)[-1]):
        info.config(**bad)


@pytest.mark.parametrize("info", ADAPTERS)
def test_unknown_field_is_named(info: MethodInfo) -> None:
    assert info.config is not None
    with pytest.raises(TypeError, match="rnak"):
        info.config(rnak=3)


@pytest.mark.parametrize("info", ADAPTERS)
def test_rank_above_a_layer_is_refused_and_the_model_left_alone(info: MethodInfo, tiny_llama: Any) -> None:
    model = tiny_llama()
    before = [(name, type(module)) for name, module in model.named_modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    # Only the last layer is too small: those injected before it must go again.
    with pytest.raises(ValueError, match=r"r must be .*layers\.1\.mlp\.down_proj"):
        get_peft_model(model, settings(info, rank_pattern={r"layers\.1\.mlp\.down_proj": 1000}))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    get_peft_model(model, settings(info))


@pytest.mark.parametrize("info", MULTI)
def test_failed_second_adapter_leaves_the_first(info: MethodInfo, tiny_llama: Any) -> None:
    adapted = trained(info, tiny_llama())
    expected = logits(adapted)
    with pytest.raises(ValueError, match=r"r must be .*down_proj"):
        adapted.add_adapter("second", settings(info, rank_pattern={"down_proj": 1000}))
    assert list(adapted.peft_config) == ["default"]
    assert not any("second" in name for name in adapted.state_dict())
    assert torch.equal(logits(adapted), expected)


@pytest.mark.parametrize("info", ADAPTERS)
def test_unknown_targets_are_named(info: MethodInfo, tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="nonexistent"):
        get_peft_model(tiny_llama(), settings(info, target_modules=["nonexistent"]))


@pytest.mark.parametrize("info", methods("adapter", lacks={"embeddings"}))
def test_unsupported_layers_are_named(info: MethodInfo, tiny_llama: Any) -> None:
    with pytest.raises(TypeError, match=r"model\.embed_tokens.*Embedding"):
        get_peft_model(tiny_llama(), settings(info, target_modules=["embed_tokens"]))


@pytest.mark.parametrize("info", methods("adapter", lacks={"peft_lora"}))
def test_tied_layers_are_named(info: MethodInfo, tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match=r"lm_head.*tie_word_embeddings"):
        get_peft_model(
            tiny_llama(tie_word_embeddings=True), settings(info, target_modules=["q_proj", "lm_head"])
        )


@pytest.mark.parametrize("info", ADAPTERS)
@pytest.mark.parametrize("name", ["mlp", "q_proj"])
def test_adapter_name_that_is_a_module_name_is_refused(info: MethodInfo, name: str, tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="adapter_name"):
        get_peft_model(tiny_llama(), settings(info), adapter_name=name)


@pytest.mark.parametrize("info", ADAPTERS)
def test_damaged_checkpoints_are_refused(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = trained(info, tiny_llama())
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path)
    first = sorted(tensors)[0]
    # A process can hold several loads of one folder: each tampering starts from the whole file.
    save_file({k: v for k, v in tensors.items() if k != first}, path)
    with pytest.raises(ValueError, match="lacks .*" + first.rpartition(".")[2]):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    save_file({**tensors, first: torch.full_like(tensors[first], float("inf"))}, path)
    with pytest.raises(ValueError, match=first.rpartition(".")[2] + ".* NaN or infinite"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    extra = first.replace("layers.0", "layers.7")
    save_file({**tensors, extra: tensors[first].clone()}, path)
    with pytest.raises(ValueError, match=r"layers\.7"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("info", ADAPTERS)
def test_checkpoint_of_another_base_is_refused(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    trained(info, tiny_llama()).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"layers\.0\.(mlp|self_attn)\."):
        PeftModel.from_pretrained(tiny_llama(intermediate_size=96), tmp_path)
