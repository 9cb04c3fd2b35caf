"""What holds on embeddings and convolutions for every adapter type that takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

from hf_ext.adapters import LoraGaConfig, PissaConfig, export_to_lora
from hf_ext.adapters._layouts import KINDS as KINDS_OF_LAYERS
from hf_ext.adapters._layouts import layout_of
from hf_ext.core.registry import MethodInfo
from tests.adapters.models import Mixed, Output
from tests.contracts.test_adapters import (
    IDS,
    adapt,
    assert_base,
    assert_start,
    base_weights,
    layers_of,
    logits,
    settings,
    start,
    train,
)
from tests.registry_cases import methods

KINDS = methods("adapter", supports={"embeddings", "convolutions"})
MULTI = methods("adapter", supports={"embeddings", "convolutions", "multi_adapter"})
OURS = methods("adapter", supports={"embeddings", "convolutions"}, lacks={"peft_lora"})


def mixed(info: MethodInfo, **overrides: Any) -> Any:
    return settings(info, target_modules=list(Mixed.targets), task_type=None, **overrides)


def trained(info: MethodInfo, model: nn.Module, **overrides: Any) -> PeftModel:
    adapted = adapt(model, mixed(info, **overrides))
    train(adapted)
    return adapted


@pytest.mark.parametrize("info", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_disabling_and_loading(info: MethodInfo, dtype: torch.dtype, tmp_path: Path) -> None:
    base = logits(Mixed(dtype=dtype))
    adapted = adapt(Mixed(dtype=dtype), mixed(info))
    assert [layer.module_name for layer in layers_of(adapted)] == list(Mixed.targets)
    if dtype == torch.float32:
        assert_start(info, logits(adapted), base)
    else:  # what remains is the base dtype's rounding
        torch.testing.assert_close(logits(adapted), base, atol=4e-2, rtol=4e-2)
        assert all(layer.delta_weight("default").abs().max() < 1e-5 for layer in layers_of(adapted))
    train(adapted)
    expected = logits(adapted)
    assert (expected - base).abs().max() > 1e-2
    with adapted.disable_adapter():
        if dtype == torch.float32:
            assert_base(info, logits(adapted), base)
    adapted.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        if low_cpu_mem_usage and dtype == torch.bfloat16 and "peft_lora" in info.supports:
            continue  # upstream rounds the adapter to the base's dtype there
        loaded = PeftModel.from_pretrained(Mixed(dtype=dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("info", KINDS)
def test_merging(info: MethodInfo) -> None:
    adapted = trained(info, Mixed())
    expected, before = logits(adapted), base_weights(adapted)
    for safe_merge in (False, True):
        adapted.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
        adapted.unmerge_adapter()
        assert all(torch.equal(weight, before[name]) for name, weight in base_weights(adapted).items())
    assert_base(info, logits(copy.deepcopy(adapted).unload()), logits(Mixed()))
    broken = copy.deepcopy(adapted)
    next(p for p in layers_of(broken)[2].parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="plane"):
        broken.merge_adapter(safe_merge=True)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == Mixed().state_dict().keys()


@pytest.mark.parametrize("info", KINDS)
def test_export(info: MethodInfo, tmp_path: Path) -> None:
    adapted = trained(info, Mixed(), rank_pattern={"line": 3, "embed": 2})
    for out, options in (("exact", {}), ("as_lora", {"as_lora": True})):
        if options:
            adapted.save_pretrained(tmp_path / out, **options)
        else:
            assert set(export_to_lora(adapted, tmp_path / out).values()) == {0.0}
        lora = PeftModel.from_pretrained(Mixed(), tmp_path / out)
        assert lora.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(logits(lora), logits(adapted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("info", OURS)
def test_export_of_a_folder(info: MethodInfo, tmp_path: Path) -> None:
    adapted = adapt(Mixed(), settings(info, target_modules=["embed", "head"], task_type=None))
    train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    export_to_lora(tmp_path / "adapter", tmp_path / "lora")
    lora = PeftModel.from_pretrained(Mixed(), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(adapted), atol=1e-5, rtol=1e-5)
    trained(info, Mixed()).save_pretrained(tmp_path / "filters")
    with pytest.raises(ValueError, match=r"must be one of no convolution.*\(line\)"):
        export_to_lora(tmp_path / "filters", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("info", KINDS)
def test_mixed_batches(info: MethodInfo) -> None:
    adapted = trained(info, Mixed())
    other = {} if "multi_adapter" in info.supports else {"base_mode": info.config.untouched_mode}  # type: ignore
    adapted.add_adapter("second", mixed(info, seed=5, init_weights=False, **other))
    adapted.eval()
    names = ["second", "__base__", "default", "second", "default"]
    batch = {"input_ids": torch.cat([IDS, IDS.flip(0), IDS[:1] + 1])}
    with torch.no_grad():
        found = adapted(**batch, adapter_names=names).logits
        alone = {}
        for name in ("default", "second"):
            adapted.set_adapter(name)
            alone[name] = adapted(**batch).logits
        with adapted.disable_adapter():
            alone["__base__"] = adapted(**batch).logits
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all((alone[name] - found).abs().amax((1, 2)).max() > 1e-3 for name in alone)


@pytest.mark.parametrize("info", MULTI)
def test_several_adapters(info: MethodInfo) -> None:
    adapted = trained(info, Mixed())
    first = logits(adapted)
    adapted.add_adapter("second", mixed(info, seed=5))
    start(adapted)
    adapted.set_adapter("second")
    train(adapted, steps=2)
    adapted.base_model.set_adapter(["default", "second"])
    both, summed = logits(adapted), Mixed()
    for layer in layers_of(adapted):
        weight = summed.get_submodule(layer.module_name).weight
        weight.data += layer.get_delta_weight("default") + layer.get_delta_weight("second")
    torch.testing.assert_close(both, logits(summed), atol=2e-5, rtol=1e-4)
    adapted.delete_adapter("second")
    assert torch.equal(logits(adapted), first)


@pytest.mark.parametrize("info", methods("adapter", supports={"embeddings", "convolutions"}, variants=False))
def test_torch_compile(info: MethodInfo) -> None:
    adapted = trained(info, Mixed()).eval()
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, adapted(IDS).logits, atol=1e-6, rtol=1e-5)


# Every setting of a layer ---------------------------------------------------------------------------

ROWS = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "pointwise": (lambda: nn.Conv1d(11, 4, 1), ROWS.mT),
    "dilated": (lambda: nn.Conv1d(3, 9, 4, stride=3, padding=2, dilation=2), ROWS),
    "same": (lambda: nn.Conv1d(3, 9, 3, padding="same", dilation=2), ROWS),
    "circular": (lambda: nn.Conv1d(3, 9, 3, padding=2, padding_mode="circular"), ROWS),
    "reflecting": (
        lambda: nn.Conv2d(2, 9, 3, padding="same", padding_mode="reflect"),
        ROWS.view(1, 2, 3, 11),
    ),
    "one_row": (lambda: nn.Conv1d(3, 9, 3, bias=False), ROWS[0]),
    "volume": (lambda: nn.Conv3d(2, 4, (2, 1, 3), stride=(1, 2, 3)), ROWS.view(1, 2, 3, 1, 11)),
    "tokens": (lambda: nn.Embedding(12, 6), torch.tensor([[3, 7, 3], [0, 11, 5]])),
    "padding": (lambda: nn.Embedding(12, 6, padding_idx=-5), torch.tensor([3, 7, 3, 11])),
    "scaled": (
        lambda: BartScaledWordEmbedding(12, 6, 1, embed_scale=3.0),
        torch.tensor([[3, 7, 3], [1, 11, 5]]),
    ),
    "scaled_by_buffer": (
        lambda: Gemma3TextScaledWordEmbedding(12, 6, 1, embed_scale=3.0),
        torch.tensor([[3, 7, 3], [1, 11, 5]]),
    ),
}


class Around(nn.Module):
    """A model of one layer of any kind."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("info", OURS)
@pytest.mark.parametrize("case", LAYERS)
def test_delta_weight_is_what_forward_adds(info: MethodInfo, case: str) -> None:
    build, x = LAYERS[case]
    torch.manual_seed(0)
    model = Around(build())
    base = model(x).detach()
    config = settings(info, r=2, target_modules=["layer"], task_type=None, init_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    layer, plain = layers_of(adapted)[0], copy.deepcopy(model.layer)
    for name in type(plain).__constants__:  # models read them, as Whisper the stride of its convolutions
        assert getattr(layer, name) == getattr(plain, name), name
    assert (adapted(x) - base).abs().max() > 1e-2
    plain.weight.data = plain.weight.data + layer.get_delta_weight("default")
    torch.testing.assert_close(adapted(x), plain(x), atol=1e-5, rtol=1e-5)

    # The gradients are those of the product's factors, with G the gradient of the weight as a matrix.
    for module in (adapted, plain):
        module(x).square().sum().backward()
    is_embedding = isinstance(plain, nn.Embedding)
    gradient = plain.weight.grad.T if is_embedding else plain.weight.grad.flatten(1)
    tensors = {name: tensor.requires_grad_() for name, tensor in layer.adapter_tensors("default").items()}
    b, a = layer.trained_factors(tensors, layer.scale["default"])
    ((b @ a) * gradient).sum().backward()
    for name in layer.adapter_layer_names:
        stored = getattr(layer, name)["default"]
        found = layer.plain(name, stored.grad)
        torch.testing.assert_close(found, tensors[name].grad, atol=1e-4, rtol=1e-4)
        if name in layer.inner_names and not is_embedding:
            assert stored.shape[1:] == plain.weight.shape[1:]


def test_padding_tokens_keep_their_row() -> None:
    for info in (case.values[0] for case in OURS):
        adapted = trained(info, Mixed())
        for kept in (True, False):
            row = adapted.base_model.model.embed(torch.tensor([7 if kept else 14]))
            assert torch.allclose(row, Mixed().embed.weight[7 if kept else 14], atol=1e-6) == kept
        layer = layers_of(adapted)[0]
        assert not any(getattr(layer, name)["default"][7].any() for name in layer.inner_names)


def test_padding_tokens_keep_their_row_where_no_gradient_reached_the_embedding() -> None:
    model = Mixed()
    model.unused = nn.Embedding(12, 16, padding_idx=3)
    config = LoraGaConfig(r=2, target_modules=["embed", "unused"])
    with pytest.warns(UserWarning, match="no gradient reached unused"):
        adapted = adapt(model, config)
    factor = next(layer for layer in layers_of(adapted) if layer.module_name == "unused").loraga_A["default"]
    assert torch.equal(factor.any(1), torch.arange(12) != 3)


@pytest.mark.parametrize("info", OURS)
def test_dropout_on_tokens_drops_all_of_a_token(info: MethodInfo) -> None:
    torch.manual_seed(0)
    config = settings(info, r=2, target_modules=["layer"], task_type=None, init_weights=False, dropout=0.5)
    adapted = get_peft_model(Around(nn.Embedding(12, 6)), config)
    x = torch.arange(12).repeat(50, 1)
    with torch.no_grad():
        base, added = adapted.base_model.model.layer.get_base_layer()(x), adapted.eval()(x)
        change = added - base
        found = (adapted.train()(x) - base) / change
    kept = found.abs() > 0.5
    assert torch.equal(kept.any(-1), kept.all(-1))
    assert 0.4 < float(kept.float().mean()) < 0.6
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 2.0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[~kept], torch.zeros_like(found[~kept]), atol=1e-3, rtol=0)


# What is saved beside them --------------------------------------------------------------------------


@pytest.mark.parametrize("info", OURS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_base_that_peft_saves_beside_an_embedding(info: MethodInfo, tiny_llama: Any, tmp_path: Path) -> None:
    base, names = logits(tiny_llama()), ["embed_tokens", "lm_head"]
    adapted = adapt(tiny_llama(), settings(info, target_modules=names))
    train(adapted)
    expected = logits(adapted)
    for merged in (False, True):
        if merged:
            adapted.merge_adapter()
        out = tmp_path / str(merged)
        adapted.save_pretrained(out)
        key = "base_model.model.model.embed_tokens.base_layer.weight"
        assert key in load_file(out / "adapter_model.safetensors")
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(tiny_llama(), out, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(logits(loaded), expected)
            with loaded.disable_adapter():
                assert_base(info, logits(loaded), base)
        export_to_lora(out, tmp_path / "lora")
        lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
        torch.testing.assert_close(logits(lora), expected, atol=1e-5, rtol=1e-5)
    adapted.unmerge_adapter()

    # A second adapter's checkpoint has the base without the residual of the first, and leaves that in place.
    mode = {"base_mode": info.config.untouched_mode}  # type: ignore[union-attr]
    adapted.add_adapter("second", settings(info, target_modules=names, seed=1, init_weights=False, **mode))
    adapted.set_adapter("second")
    second = logits(adapted)
    adapted.save_pretrained(tmp_path / "two", selected_adapters=["second"])
    alone = PeftModel.from_pretrained(tiny_llama(), tmp_path / "two" / "second")
    torch.testing.assert_close(logits(alone), second, atol=1e-5, rtol=1e-5)
    first = PeftModel.from_pretrained(tiny_llama(), tmp_path / "False")
    first.load_adapter(tmp_path / "two" / "second", adapter_name="second")
    assert torch.equal(logits(first), expected)
    first.set_adapter("second")
    torch.testing.assert_close(logits(first), second, atol=1e-5, rtol=1e-5)


# Bad input ------------------------------------------------------------------------------------------


class TwiceScaled(BartScaledWordEmbedding):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.embed_scale


class OwnConvolution(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1.0


def computed_weight() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 9, 3))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups": (lambda: nn.Conv1d(4, 8, 3, groups=2), "groups must be 1.*layer"),
    "max_norm": (lambda: nn.Embedding(12, 6, max_norm=1.0), "max_norm must be None.*layer"),
    "by_freq": (lambda: nn.Embedding(12, 6, scale_grad_by_freq=True), "scale_grad_by_freq must be .*layer"),
    "positions": (
        lambda: BartLearnedPositionalEmbedding(12, 6),
        "layer: .*BartLearnedPositional.*something else",
    ),
    "one_token": (
        lambda: T5Gemma2TextScaledWordEmbedding(12, 6, 1, embed_scale=3.0, eoi_token_index=11),
        "layer: .*T5Gemma2TextScaled.* something else than Embedding",
    ),
    "twice": (lambda: TwiceScaled(12, 6, 1, embed_scale=3.0), "layer: .*TwiceScaled.*something else"),
    "own": (lambda: OwnConvolution(3, 9, 3), "layer: .*OwnConvolution.* something else than Conv1d"),
    "computed": (computed_weight, "layer: (a weight that is computed|.*something else)"),
    "transposed": (lambda: nn.ConvTranspose1d(3, 9, 3), "layer: .*ConvTranspose1d.*supported are .*Conv3d"),
    "rank_of_filters": (lambda: nn.Conv1d(1, 9, 3), "r must be at most .*layer"),
    "rank_of_all": (lambda: nn.Embedding(4, 4), "r must be .*layer"),
    "rank_of_tokens": (lambda: nn.Embedding(3, 9), "r must be at most .*layer"),
}


@pytest.mark.parametrize("info", OURS)
@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_be_adapted_are_named(info: MethodInfo, case: str) -> None:
    build, message = REFUSED[case]
    model = Around(build())
    layer = model.layer
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(model, settings(info, target_modules=["layer"], task_type=None))
    assert model.layer is layer


def test_quantized_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target_modules must be .*quantized embeddings, got 'embed'"):
        layout_of(nn.Embedding(4, 4), KINDS_OF_LAYERS, "embed", quantized=True, linear=False)


@pytest.mark.parametrize("info", OURS)
def test_shared_weights_are_refused(info: MethodInfo, tiny_llama: Any) -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"embed_tokens.*tie_word_embeddings=False"):
        get_peft_model(tied, settings(info, target_modules=["embed_tokens"]))
    model = Mixed()
    model.other = nn.Embedding(256, 16)
    model.other.weight = model.embed.weight
    with pytest.raises(ValueError, match=r"target_modules: embed\.weight is other\.weight too"):
        get_peft_model(model, mixed(info))
    assert type(model.embed) is nn.Embedding
    assert type(model.head) is nn.Linear


class Shared(nn.Module):
    """An embedding, and a head with its weight; a third layer, in one place of a block with two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(256, 64)
        self.block = self.same = nn.Sequential(nn.Linear(64, 64))
        self.head = nn.Linear(64, 256, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.head(self.block(self.embed(input_ids)))
        return Output(logits, None if labels is None else logits.square().mean())


@pytest.mark.parametrize("info", methods("adapter", lacks={"peft_lora"}))
@pytest.mark.filterwarnings("error:.*.weight is:UserWarning")
def test_linear_layers_with_a_shared_weight(info: MethodInfo) -> None:
    def own(names: list[str], **overrides: Any) -> Any:
        return settings(info, target_modules=names, task_type=None, **overrides)

    model = Shared()
    weight = model.embed.weight.clone()
    if info.config(**info.test_kwargs).writes_base:  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"target_modules: head\.weight is embed\.weight too"):
            get_peft_model(model, own(["head", "0"]))
        assert type(model.head) is type(model.block[0]) is nn.Linear
    else:
        with pytest.warns(UserWarning, match=r"head\.weight is embed\.weight too.* merge is refused"):
            adapted = adapt(model, own(["head", "block.0"]))
        train(adapted)
        expected = logits(adapted)
        for merge in (adapted.merge_adapter, adapted.merge_and_unload):
            with pytest.raises(ValueError, match=r"a merge: .*head\.weight is .*embed\.weight too"):
                merge()
            assert torch.equal(logits(adapted), expected)
        if info.name == "pissa":
            with pytest.raises(ValueError, match=r"target_modules: .*head\.weight is .*embed\.weight too"):
                adapted.add_adapter("second", own(["head"], base_mode="residual"))
        layer = adapted.base_model.model.head.base_layer
        layer.weight = nn.Parameter(layer.weight.clone())
        adapted.merge_adapter()
        torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.embed.weight, weight)
    alone = adapt(Shared(), own(["block.0"]))  # two names of one parent are one place
    alone.merge_adapter()


@pytest.mark.parametrize("twice", [False, True])
def test_linear_layers_in_two_places_are_refused(twice: bool) -> None:
    model = Shared()
    layer = model.block[0]
    model.block = nn.Sequential(layer, layer) if twice else model.block
    config = PissaConfig(r=2, target_modules=["0"], base_mode="residual")
    if twice:
        with pytest.raises(ValueError, match=r"target_modules: block\.0\.weight is block\.1\.weight"):
            get_peft_model(model, config)
    else:
        get_peft_model(model, config)


def test_models_that_are_tied_whatever_their_config_was_given() -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=False))
    names = ["shared", "lm_head"]
    for name in names:
        with pytest.raises(
            ValueError, match=rf"{name} shares .* give each layer a weight of its own and set"
        ):
            get_peft_model(model, PissaConfig(r=2, target_modules=[name]))
    for layer in (model.shared, model.lm_head):
        layer.weight = nn.Parameter(layer.weight.clone())
    model.config.tie_word_embeddings = False
    adapted = get_peft_model(model, PissaConfig(r=2, target_modules=names))
    assert [layer.module_name for layer in layers_of(adapted)] == names


@pytest.mark.parametrize("info", OURS)
def test_export_of_what_lora_has_not_is_refused(info: MethodInfo, tmp_path: Path) -> None:
    for case, name in (("dilated", "dilation"), ("circular", "padding_mode")):
        config = settings(info, r=2, target_modules=["layer"], task_type=None, init_weights=False)
        adapted = get_peft_model(Around(LAYERS[case][0]()), config)
        with pytest.raises(ValueError, match=f"layer: {name} must be "):
            export_to_lora(adapted, tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
