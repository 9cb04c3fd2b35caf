"""Every adapter that says it supports quantized bases, on each quantization that runs on a CPU.

Backends that need a GPU or kernels of their own are stood in for by their interface: one that cannot be read,
and one that can be read and not written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hf_ext.adapters import awaits_data, initialize_from_data
from hf_ext.adapters._base import AdapterLinear
from hf_ext.adapters._lora import LoraStartLayer
from hf_ext.core.registry import MethodInfo
from tests.registry_cases import methods

QUANTIZED = methods("adapter", supports={"quantized"})
IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % 256


def swap_linears(model: nn.Module, build: Callable[[nn.Linear], nn.Module]) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, build(module))
    return model


def bitsandbytes_8bit(model: nn.Module) -> Any:
    import bitsandbytes as bnb

    def build(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(
            linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False
        )
        return new.to("cpu")

    return swap_linears(model, build)


def bitsandbytes_nf4(model: nn.Module) -> Any:
    import bitsandbytes as bnb

    def build(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
        # On CPUs with AVX512-BF16 the first evaluation repacks the weight in place, unreadably.
        new.support_avx512bf16_for_cpu = False
        return new.to("cpu")

    return swap_linears(model, build)


def torchao_int8(model: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantize_(
        model,
        config.get_apply_tensor_subclass(),
        filter_fn=lambda m, n: type(m) is nn.Linear and n != "lm_head",
    )

    class Quantizer:
        quantization_config = config

    model.hf_quantizer = Quantizer()
    return model


def hqq_4bit(model: nn.Module) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def build(linear: nn.Linear) -> nn.Module:
        config = BaseQuantizeConfig(nbits=4, group_size=32)
        return HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")

    return swap_linears(model, build)


BACKENDS = [bitsandbytes_8bit, bitsandbytes_nf4, torchao_int8, hqq_4bit]
# Logit change by re-quantizing a merged weight: rounding of the format, on random weights of this size.
MERGE_TOLERANCE = {"bitsandbytes_8bit": 0.05, "bitsandbytes_nf4": 0.6, "torchao_int8": 0.05, "hqq_4bit": 0.6}


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def settings(info: MethodInfo, **overrides: Any) -> Any:
    assert info.config is not None
    return info.config(
        **{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **info.test_kwargs, **overrides}
    )


def layers_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, AdapterLinear | LoraStartLayer)]


@pytest.mark.parametrize("info", QUANTIZED)
@pytest.mark.parametrize("quantize", BACKENDS)
def test_quantized_base(
    info: MethodInfo, quantize: Callable[[Any], Any], tiny_llama: Any, tmp_path: Path
) -> None:
    base = logits(quantize(tiny_llama(hidden_size=128)))
    choice = [
        f"{projection}_proj" for projection in ("q", "k", "v", "o", "gate", "up", "down")
    ]  # PEFT's "all-linear" looks for classes that a hand-made quantized model does not announce
    adapted = get_peft_model(quantize(tiny_llama(hidden_size=128)), settings(info, target_modules=choice))
    assert len(layers_of(adapted)) == 14
    assert not any(
        type(layer.get_base_layer()) is nn.Linear and _is_float(layer) for layer in layers_of(adapted)
    )
    for name in awaits_data(adapted):
        batch = {"input_ids": IDS, "labels": IDS}
        initialize_from_data(adapted, [batch], adapter_name=name, show_progress=False)
    if "starts_at_base" in info.supports:
        torch.testing.assert_close(logits(adapted), base, atol=1e-5, rtol=1e-4)

    adapted.train()
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1

    expected = logits(adapted)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    with torch.no_grad():
        mixed = adapted(input_ids=IDS, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([base[0], expected[1]]), atol=1e-5, rtol=1e-4)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantize(tiny_llama(hidden_size=128)), tmp_path)
    assert torch.equal(logits(loaded), expected)

    if "peft_lora" in info.supports and quantize in (bitsandbytes_8bit, bitsandbytes_nf4):
        return  # PEFT 0.21's LoRA layers merge into these on a GPU only
    adapted.merge_adapter(safe_merge=True)
    merged = (logits(adapted) - expected).abs().max()
    assert 0 < merged < MERGE_TOLERANCE[quantize.__name__]
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), expected)  # not quantized a second time
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)


@pytest.mark.parametrize("info", methods("adapter", supports={"quantized"}, variants=False))
def test_merging_keeps_the_bias(info: MethodInfo, tiny_llama: Any) -> None:
    # The layer that PEFT's HQQ backend makes of a merged weight has none.
    model = tiny_llama(hidden_size=128, attention_bias=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    config = settings(info, target_modules=["q_proj"], init_weights=False)
    adapted = get_peft_model(hqq_4bit(model), config)
    expected, layers = logits(adapted), layers_of(adapted)
    biases = [layer.get_base_layer().bias.clone() for layer in layers]
    adapted.merge_adapter()
    assert all(torch.equal(one.get_base_layer().bias, bias) for one, bias in zip(layers, biases, strict=True))
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), expected)


@pytest.mark.parametrize(
    "info", methods("adapter", lacks={"peft_lora"}, supports={"quantized"}, variants=False)
)
def test_a_bias_that_is_no_parameter_is_refused(info: MethodInfo, tiny_llama: Any) -> None:
    model = hqq_4bit(tiny_llama(hidden_size=128, attention_bias=True))
    config = settings(info, target_modules=["q_proj"], bias=f"{info.name}_only")
    with pytest.raises(
        ValueError, match=r"bias must be .* type HQQLinear .*_only' \(model\.layers\.0.*q_proj"
    ):
        get_peft_model(model, config)
    assert not layers_of(model)


class Unreadable:
    """A backend as PEFT has them for GPTQ and the like: forward only."""

    layer_type, supports_merge, backend_name = "linear", False, "stand-in"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        raise TypeError("no dequantization")

    def set_base_weight(self, peft_layer: nn.Module, weight_data: Tensor) -> None:
        raise TypeError("no requantization")

    def maybe_clone_base_result(self, x: Tensor) -> Tensor:
        return x


class Readable(Unreadable):
    """A backend that gives its weights and takes none."""

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.weight.data


def _is_float(layer: Any) -> bool:
    return type(layer.get_base_layer().weight) is nn.Parameter


@pytest.mark.parametrize("info", methods("adapter", supports={"quantized"}, lacks={"peft_lora"}))
def test_forward_only_backend(info: MethodInfo, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_ext.adapters import _base

    monkeypatch.setattr(_base, "resolve_quantization_backend", lambda *_, **__: Readable())
    adapted = get_peft_model(tiny_llama(), settings(info))
    with pytest.raises(ValueError, match=r"q_proj: a stand-in base cannot be merged into"):
        adapted.merge_adapter()
    assert torch.isfinite(logits(adapted)).all()
    monkeypatch.setattr(_base, "resolve_quantization_backend", lambda *_, **__: Unreadable())
    if layers_of(adapted)[0].needs_base_at_init:
        with pytest.raises(ValueError, match=r"q_proj: stand-in weights cannot be read back"):
            get_peft_model(tiny_llama(), settings(info))


@pytest.mark.parametrize("info", QUANTIZED)
@pytest.mark.parametrize("quantize", [bitsandbytes_8bit])
def test_mode_that_writes_the_base_is_refused(
    info: MethodInfo, quantize: Callable[[Any], Any], tiny_llama: Any
) -> None:
    assert info.config is not None
    if "base_mode" not in info.config.__dataclass_fields__:
        return
    with pytest.raises(ValueError, match=r"base_mode must be '\w+' on a quantized"):
        get_peft_model(
            quantize(tiny_llama()), settings(info, target_modules=["q_proj"], base_mode="residual")
        )
