"""What is added to PEFT's LoRA layers for every adapter that is a LoRA with another start; shown on EVA."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_ext.adapters import EvaConfig, export_to_lora, initialize_from_data
from hf_ext.adapters._lora import LoraStartLayer, layers_of
from tests.adapters import models

IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 256
logits = partial(models.logits, ids=IDS)


def settings(**options: Any) -> EvaConfig:
    return EvaConfig(
        **{"r": 4, "rho": 1.0, "n_tokens": 48, "target_modules": ["q_proj", "down_proj"], **options}
    )


def adapted(model: Any, **options: Any) -> Any:
    """Return the model with an adapter whose B is not zero."""
    result = get_peft_model(model, settings(**options))
    initialize_from_data(result, [{"input_ids": IDS}], show_progress=False)
    generator = torch.Generator().manual_seed(3)
    for name, p in result.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return result


def test_layers_are_pefts_and_carry_the_start(tiny_llama: Any) -> None:
    from peft.tuners.lora import Linear, LoraLayer

    model = adapted(tiny_llama())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, Linear)
    assert isinstance(layer, LoraLayer)
    assert isinstance(layer, LoraStartLayer)
    assert type(layer).__name__ == "EvaLinear"
    assert set(layers_of(model, "default")) == {
        f"base_model.model.model.layers.{i}.{n}"
        for i in (0, 1)
        for n in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert layers_of(model, "other") == {}
    assert sys.modules[type(layer).__module__].EvaLinear is type(layer)  # can be found again


def test_update_of_two_by_two_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    config = settings(r=1, lora_alpha=3, n_tokens=10, target_modules=["0"], init_weights=False)
    result: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    layer = result.base_model.model[0]
    layer.lora_A["default"].weight.data = torch.tensor([[1.0, 2.0]])
    layer.lora_B["default"].weight.data = torch.tensor([[1.0], [-1.0]])
    expected = torch.tensor([[3.0, 6.0], [-3.0, -6.0]])
    assert torch.equal(layer.delta_weight("default"), expected)
    assert torch.equal(layer.stored_delta(["default", "default"]), 2 * expected)
    b, a = layer.module_factors(layer.adapter_tensors("default"), layer.configs["default"], "0")
    assert torch.equal(b @ a, expected)


@pytest.mark.parametrize(
    ("pattern", "rslora", "expected"),
    [({}, False, 2.0), ({}, True, 4.0), ({"q_proj": 16}, False, 0.5), ({"q_proj": 16}, True, 2.0)],
)
def test_scale(pattern: dict[str, int], rslora: bool, expected: float) -> None:
    config = settings(lora_alpha=8, rank_pattern=pattern, use_rslora=rslora)
    assert config.scale_of("model.layers.0.self_attn.q_proj") == expected
    config.alpha_pattern = {"q_proj": 4}
    assert config.scale_of("model.layers.0.self_attn.q_proj") == expected / 2


def test_plain_lora_has_every_setting_of_loras() -> None:
    config = settings(
        lora_alpha=5, use_rslora=True, lora_dropout=0.25, rank_pattern={"q": 2}, bias="lora_only"
    )
    plain = config.plain_lora()
    assert type(plain) is LoraConfig
    assert plain.peft_type == "LORA"
    for name in ("r", "lora_alpha", "use_rslora", "lora_dropout", "rank_pattern", "bias", "target_modules"):
        assert getattr(plain, name) == getattr(config, name)


def test_exact_export_has_the_adapters_own_tensors(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path / "own")
    export_to_lora(model, tmp_path / "lora")
    own, exported = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("own", "lora"))
    assert own.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[key]) for key, tensor in own.items())


@pytest.mark.parametrize("form", [{"use_dora": True}, {}])
@pytest.mark.parametrize("times", [1, 3])
def test_unmerging_restores_every_bit(form: dict[str, Any], times: int, tiny_llama: Any) -> None:
    model = adapted(tiny_llama(dtype=torch.bfloat16), **form)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(times):
        model.merge_adapter()
        assert not torch.equal(
            model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight,
            before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"],
        )
        model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_unmerging_after_a_cast(tiny_llama: Any) -> None:
    model = adapted(tiny_llama())
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    expected = tiny_llama().to(torch.bfloat16).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, expected)


def test_unknown_adapter_to_merge_is_named(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="adapter_names 'default_' is unknown; did you mean 'default'"):
        adapted(tiny_llama()).merge_adapter(adapter_names=["default_"])


def test_unmerging_twice_warns(tiny_llama: Any) -> None:
    model = adapted(tiny_llama())
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.base_model.model.model.layers[0].self_attn.q_proj.unmerge()


def test_starts_leave_the_global_generator_alone(tiny_llama: Any) -> None:
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    model = tiny_llama()
    get_peft_model(model, settings(target_modules=["q_proj", "embed_tokens"]))
    assert torch.equal(torch.randn(3), expected)


def test_dora_magnitudes_are_of_the_base_weight(tiny_llama: Any) -> None:
    for options in ({}, {"init_weights": False}):
        model = get_peft_model(tiny_llama(), settings(use_dora=True, **options))
        for layer in layers_of(model, "default").values():
            magnitude = layer.lora_magnitude_vector["default"].weight
            if not options:
                torch.testing.assert_close(magnitude, layer.get_base_layer().weight.norm(dim=1))
            names = [key for key, _ in layer.adapter_parameters("default")]
            assert names == ["lora_A", "lora_B", "lora_magnitude_vector"]  # each of them once
            assert [key for key, _ in layer.low_rank_parameters("default")] == ["lora_A", "lora_B"]


def test_biases_of_b_are_tensors_of_their_own(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(tiny_llama(attention_bias=True), lora_bias=True, target_modules=["q_proj"])
    layer = next(iter(layers_of(model, "default").values()))
    assert {k: v.dim() for k, v in layer.adapter_tensors("default").items()} == {
        "lora_A": 2,
        "lora_B": 2,
        "lora_B.bias": 1,
    }
    assert layer.module_factors(layer.adapter_tensors("default"), layer.configs["default"], "") is None
    with pytest.raises(ValueError, match="low rank"):
        export_to_lora(model, tmp_path / "small", rank=1)
    base, before = layer.get_base_layer(), layer.get_base_layer().bias.detach().clone()
    nn.init.ones_(layer.lora_B["default"].bias)
    model.merge_adapter()
    torch.testing.assert_close(base.bias.detach() - before, torch.full_like(before, layer.scaling["default"]))
    model.unmerge_adapter()
    assert torch.equal(base.bias, before)


def test_init_lora_weights_is_the_methods() -> None:
    with pytest.raises(ValueError, match="init_lora_weights must be left out: the start is EvaConfig's own"):
        settings(init_lora_weights="gaussian")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lora_alpha": -1}, ValueError, "lora_alpha must be positive"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout must be at least 0 and below 1"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be at least 1"),
        ({"rho": float("nan")}, ValueError, "rho must be finite"),
        ({"seed": "first"}, TypeError, "seed must be int"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        settings(**options)


def test_text_that_spells_a_number_is_one() -> None:
    config = settings(r="8", rho="1.5", seed="3", n_tokens="120", lora_dropout="0.1")
    assert (config.r, config.rho, config.seed, config.n_tokens, config.lora_dropout) == (8, 1.5, 3, 120, 0.1)


def test_settings_given_twice_do_not_tie_two_models(tiny_llama: Any) -> None:
    config = settings(rho=2.0, n_tokens=80)
    first, second = (cast(Any, get_peft_model(tiny_llama(), config)) for _ in range(2))
    initialize_from_data(first, [{"input_ids": IDS}] * 2, show_progress=False)
    assert first.peft_config["default"].rank_pattern
    assert not second.peft_config["default"].rank_pattern
    assert not config.rank_pattern


def test_failed_injection_leaves_no_trace(tiny_llama: Any) -> None:
    model = tiny_llama()
    before = [(name, type(m)) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=r"r must be at most 64.*layers\.1\.self_attn\.q_proj"):
        get_peft_model(model, settings(rank_pattern={r"layers\.1\.self_attn\.q_proj": 65}))
    assert [(name, type(m)) for name, m in model.named_modules()] == before


def test_merged_model_copies_and_unmerges(tiny_llama: Any) -> None:
    model = adapted(tiny_llama())
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    with twin.disable_adapter():
        assert torch.equal(logits(twin), logits(tiny_llama()))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged


def test_loading_into_a_model_with_another_adapter(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="first")
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(model))


def test_pickled_model_loads_in_a_process_that_made_no_such_layer(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    torch.save(model.base_model.model.model.layers[0].self_attn.q_proj, tmp_path / "layer.pt")
    code = (
        "import sys, torch, hf_ext.adapters\n"
        "layer = torch.load(sys.argv[1], weights_only=False)\n"
        "assert type(layer).__name__ == 'EvaLinear', type(layer)\n"
        "print(layer(torch.ones(1, 64)).sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "layer.pt")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.eval()
    assert float(done.stdout) == pytest.approx(layer(torch.ones(1, 64)).sum().item(), abs=1e-4)


class Experts(nn.Module):
    """Two parameters that are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 8, 8, generator=generator))
        self.down = nn.Parameter(torch.randn(3, 8, 8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ u.T @ d.T for u, d in zip(self.up, self.down, strict=True)]).sum(0)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.linear = Experts(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.experts(x))


def test_several_parameters_of_a_module_and_several_adapters(tmp_path: Path) -> None:
    parameters = {"target_modules": ["linear"], "target_parameters": ["experts.up", "experts.down"]}
    model: Any = get_peft_model(Mixture(), settings(r=2, init_weights=False, **parameters))  # type: ignore[arg-type]
    kinds = [type(m) for m in model.modules() if isinstance(m, LoraStartLayer)]
    assert [kind.__name__ for kind in kinds] == ["ParamWrapper", "ParamWrapper", "EvaLinear"]
    x = torch.ones(2, 8)
    model.save_pretrained(tmp_path / "ours")
    export_to_lora(model, tmp_path / "lora")
    for name in ("ours", "lora"):
        loaded = PeftModel.from_pretrained(Mixture(), tmp_path / name)  # type: ignore[arg-type]
        assert torch.equal(loaded(x), model(x))
    assert not torch.equal(model(x), Mixture()(x))
    one: Any = get_peft_model(
        Mixture(),  # type: ignore[arg-type]
        settings(r=2, target_modules=["linear"], target_parameters=["experts.up"], init_weights=False),
    )
    one.add_adapter("second", settings(r=2, target_modules=["linear"], target_parameters=["experts.up"]))
    assert len(layers_of(one, "second")) == 2
