"""Properties of PiSSA, and of QPiSSA on every quantization that runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_ext.adapters import PissaConfig, SorsaConfig, export_to_lora, qpissa_error_ratios
from hf_ext.adapters import _base as base_module
from hf_ext.adapters import pissa as pissa_module
from hf_ext.adapters.pissa import PissaLinear
from tests.adapters.models import Mixed, OneLayer, logits, steps
from tests.contracts.test_quantized import BACKENDS, Readable, bitsandbytes_8bit, bitsandbytes_nf4, hqq_4bit
from tests.reference.pissa import ReferencePissa, principal_factors, qpissa

Quantize = Callable[[Any], Any]
EVERY = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def adapted_layer(weight: Tensor, **settings: Any) -> tuple[PeftModel, PissaLinear]:
    model = get_peft_model(OneLayer(weight), PissaConfig(target_modules=["lin"], **settings))
    return model, model.base_model.model.lin


def layers_of(model: nn.Module) -> dict[str, PissaLinear]:
    return {m.module_name: m for m in model.modules() if isinstance(m, PissaLinear)}


# The hand-computed case and the identities ---------------------------------------------------------


def test_start_of_a_diagonal_weight_and_its_export(tmp_path: Path) -> None:
    weight = torch.diag(torch.tensor([4.0, 1.0]))
    model, layer = adapted_layer(weight, r=1)
    torch.testing.assert_close(layer.pissa_A["default"].data, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(layer.pissa_B["default"].data, torch.tensor([[2.0], [0.0]]))
    residual = weight - layer.taken_out() - layer.pissa_U["default"] @ layer.pissa_C["default"]
    torch.testing.assert_close(residual.data, torch.diag(torch.tensor([0.0, 1.0])))
    layer.pissa_A["default"].data = torch.tensor([[3.0, 0.0]])
    layer.pissa_B["default"].data = torch.tensor([[2.0], [1.0]])
    change = torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    torch.testing.assert_close(layer.delta_weight("default"), change)
    torch.testing.assert_close(model(torch.eye(2)).detach(), (weight + change).T)
    export_to_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(OneLayer(weight), tmp_path)
    torch.testing.assert_close(loaded(torch.eye(2)).detach(), (weight + change).T)


def test_alpha_scales_the_factors_and_not_their_product() -> None:
    weight = torch.randn(12, 10)
    (_, plain), (_, scaled) = adapted_layer(weight, r=4), adapted_layer(weight, r=4, alpha=8.0)
    assert scaled.scale["default"] == 2.0
    for name in ("pissa_A", "pissa_B"):
        torch.testing.assert_close(
            getattr(scaled, name)["default"] * 2**0.5, getattr(plain, name)["default"], atol=1e-6, rtol=1e-5
        )
    for name in ("pissa_U", "pissa_C"):
        assert torch.equal(getattr(scaled, name)["default"], getattr(plain, name)["default"])


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_start_is_the_best_approximation_of_the_weight(alpha: float | None) -> None:
    weight = torch.randn(12, 10)
    _, layer = adapted_layer(weight, r=4, alpha=alpha)
    scale = layer.scale["default"]
    a, b = principal_factors(weight, 4, scale)
    tensors = layer.adapter_tensors("default")
    found = scale * tensors["pissa_B"] @ tensors["pissa_A"]
    torch.testing.assert_close(found, scale * b @ a, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tensors["pissa_U"] @ tensors["pissa_C"], found, atol=1e-5, rtol=1e-4)
    for name, other in (("pissa_A", a), ("pissa_B", b)):  # what each factor carries of it
        own = tensors[name].square().sum(1 if name == "pissa_A" else 0)
        torch.testing.assert_close(own, other.square().sum(1 if name == "pissa_A" else 0))


@pytest.mark.parametrize("base_mode", ["projected", "residual"])
def test_start_on_embeddings_and_convolutions_is_that_of_their_matrix(base_mode: str) -> None:
    config = PissaConfig(r=4, alpha=8.0, target_modules=list(Mixed.targets), base_mode=base_mode)
    for path, layer in layers_of(get_peft_model(Mixed(), config)).items():  # type: ignore[arg-type]
        weight = Mixed().get_submodule(path).weight.data
        if path == "embed":
            weight[7] = 0.0  # the padding token's row stays out of it
        matrix = weight.T if path == "embed" else weight.flatten(1)
        a, b = principal_factors(matrix, 4, s=2.0)
        tensors = layer.adapter_tensors("default")
        sign = torch.sign((tensors["pissa_A"] * a).sum(1))  # the singular vectors' are free
        torch.testing.assert_close(tensors["pissa_A"], sign[:, None] * a, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tensors["pissa_B"], b * sign, atol=1e-5, rtol=1e-4)
        taken = 2.0 * b @ a
        taken_out = tensors["pissa_U"] @ tensors["pissa_C"]
        torch.testing.assert_close(taken_out, taken, atol=1e-5, rtol=1e-4)
        now, before = layer.get_base_layer().weight.data, Mixed().get_submodule(path).weight.data
        lacks = 0.0 if base_mode == "projected" else (taken.T if path == "embed" else taken.view_as(before))
        torch.testing.assert_close(now, before - lacks, atol=1e-5, rtol=1e-4)


def test_embeddings_and_convolutions_without_a_saved_basis(tmp_path: Path) -> None:
    config = PissaConfig(r=4, target_modules=list(Mixed.targets), save_basis=False)
    adapted = get_peft_model(Mixed(), config)  # type: ignore[arg-type]
    steps(adapted)
    adapted.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in keys} == {"pissa_A", "pissa_B", "pissa_fingerprint"}
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(Mixed(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-6, rtol=1e-5)  # to rounding
        assert not loaded.base_model.model.embed.pissa_C["default"][7].any()  # the padding token's
    for path in ("embed", "space"):
        other = Mixed()
        other.get_submodule(path).weight.data[3] += 0.1
        with pytest.raises(ValueError, match=rf"fingerprint.*not the base model.*\({path}\)"):
            PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("path", ["embed", "plane"])
def test_embeddings_and_convolutions_that_are_not_finite_are_named(path: str) -> None:
    model = Mixed()
    weight = model.get_submodule(path).weight.data
    weight.view(-1)[3] = float("inf")
    before = weight.clone()
    with pytest.raises(ValueError, match=rf"finite.*{path}"):
        get_peft_model(model, PissaConfig(r=4, target_modules=list(Mixed.targets), base_mode="residual"))  # type: ignore[arg-type]
    assert torch.equal(model.get_submodule(path).weight, before)
    assert all(
        torch.equal(v, Mixed().state_dict()[k]) for k, v in model.state_dict().items() if path not in k
    )


@pytest.mark.parametrize("base_mode", ["projected", "residual"])
@pytest.mark.parametrize("n_iter", [0, 1, 4])
def test_start_is_the_bases_output_whatever_the_decomposition(
    n_iter: int, base_mode: str, tiny_llama: Any
) -> None:
    expected = logits(tiny_llama(hidden_size=128))
    config = PissaConfig(
        r=4,
        n_iter=n_iter,
        oversample=0,
        target_modules="all-linear",
        base_mode=base_mode,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(tiny_llama(hidden_size=128), config)
    assert (logits(adapted) - expected).abs().max() <= 1e-5 * expected.abs().max()
    layer = layers_of(adapted)["model.layers.0.mlp.up_proj"]
    weight = tiny_llama(hidden_size=128).model.layers[0].mlp.up_proj.weight.data
    a, b = principal_factors(weight, 4)
    best, rest = (
        (weight - b @ a).norm(),
        (weight - layer.pissa_B["default"] @ layer.pissa_A["default"]).norm(),
    )
    assert rest > best * (1 + 1e-4)  # it is a rough one indeed


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("base_mode", ["projected", "residual"])
def test_training_follows_the_reference(alpha: float | None, base_mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(10, 7, generator=generator)
    model, layer = adapted_layer(weight, r=4, alpha=alpha, base_mode=base_mode)
    reference = ReferencePissa(weight, 4, alpha)
    # The reference's signs are LAPACK's; start both from one decomposition.
    reference.a.data.copy_(layer.pissa_A["default"].data)
    reference.b.data.copy_(layer.pissa_B["default"].data)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05),
        torch.optim.AdamW([reference.a, reference.b], lr=0.05),
    ]
    for _ in range(100):
        x, target = torch.randn(6, 7, generator=generator), torch.randn(6, 10, generator=generator)
        (model(x) - target).square().mean().backward()
        (reference.forward(x) - target).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    merged = layer.get_base_layer().weight + layer.stored_delta(["default"])
    torch.testing.assert_close(merged, reference.weight(), atol=2e-4, rtol=1e-3)


def test_modes_agree_after_training(tiny_llama: Any) -> None:
    found = []
    for mode in ("projected", "residual"):
        config = PissaConfig(r=4, target_modules="all-linear", base_mode=mode, task_type="CAUSAL_LM")
        adapted = get_peft_model(tiny_llama(), config)
        steps(adapted, 10, lr=1e-3)
        found.append(logits(adapted))
    assert (found[0] - logits(tiny_llama())).abs().max() > 1e-2
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


@pytest.mark.parametrize("save_basis", [True, False])
def test_loading_repeats_no_random_decomposition(save_basis: bool, tiny_llama: Any, tmp_path: Path) -> None:
    # PEFT's "pissa_niter_k" is off by half of its outputs here.
    config = PissaConfig(r=4, n_iter=0, oversample=0, target_modules="all-linear", save_basis=save_basis)
    torch.manual_seed(1)
    adapted = get_peft_model(tiny_llama(), config)
    steps(adapted, 2)
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(2)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))


def test_export_has_twice_the_rank(tiny_llama: Any, tmp_path: Path) -> None:
    config = PissaConfig(r=4, alpha=8.0, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_llama(), config)
    steps(adapted, 3)
    export_to_lora(adapted, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].r == loaded.peft_config["default"].lora_alpha == 8
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-5, rtol=1e-5)


def test_two_adapters_take_out_their_own_parts(tiny_llama: Any) -> None:
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(tiny_llama(), PissaConfig(r=4, **settings))
    adapted.add_adapter("second", PissaConfig(r=3, **settings))
    adapted.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(adapted), logits(tiny_llama()), atol=1e-5, rtol=1e-5)


def test_residual_mode_refuses_a_second_of_its_kind(tiny_llama: Any) -> None:
    config = PissaConfig(r=4, target_modules=["q_proj"], base_mode="residual")
    adapted = get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match=r"base_mode must be 'projected' beside adapter 'default'.*q_proj"):
        adapted.add_adapter("second", config)


def test_weights_of_zeros_are_named_and_others_must_be_finite() -> None:
    with pytest.warns(UserWarning, match="lin has a weight of zeros"):
        model, layer = adapted_layer(torch.zeros(6, 5), r=2)
    assert not layer.pissa_A["default"].any()
    assert not model(torch.ones(1, 5)).any()
    weight = torch.ones(6, 5)
    weight[2, 3] = float("nan")
    plain = OneLayer(weight)
    with pytest.raises(ValueError, match=r"weight must be finite.*\(lin\)"):
        get_peft_model(plain, PissaConfig(r=2, target_modules=["lin"]))
    assert type(plain.lin) is nn.Linear


# QPiSSA ------------------------------------------------------------------------------------------------


@pytest.fixture
def original(tiny_llama: Any, tmp_path: Path) -> str:
    tiny_llama(hidden_size=128).save_pretrained(tmp_path / "original", max_shard_size="300KB")
    assert len(list((tmp_path / "original").glob("*.safetensors"))) > 1
    return str(tmp_path / "original")


def settings(original: str | None, **overrides: Any) -> PissaConfig:
    choice = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "qpissa_iters": 2}
    return PissaConfig(base_mode="residual", original_weights=original, **{**choice, **overrides})


def quantized_layer(quantize: Quantize, weight: Tensor, folder: Path, **overrides: Any) -> PissaLinear:
    """Return one quantized layer under QPiSSA."""
    folder.mkdir(exist_ok=True)
    save_file({"lin.weight": weight.contiguous()}, folder / "model.safetensors")
    config = settings(str(folder), target_modules=["lin"], task_type=None, **overrides)
    return get_peft_model(quantize(OneLayer(weight)), config).base_model.model.lin


@pytest.mark.parametrize("quantize", BACKENDS)
def test_rounds_follow_the_reference(quantize: Quantize, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(128, 96, generator=generator)).Q for _ in range(2))
    weight = (u * torch.arange(1, 97).float() ** -0.5) @ v.T

    def read_back(other: Tensor) -> Tensor:
        config = PissaConfig(r=1, target_modules=["lin"])
        return get_peft_model(quantize(OneLayer(other)), config).base_model.model.lin.base_weight()

    plain, errors = (weight - read_back(weight)).norm(), []
    for rounds in (1, 2, 3):
        layer = quantized_layer(quantize, weight, tmp_path / "original", r=8, qpissa_iters=rounds)
        stored, product, error = qpissa(weight, 8, rounds, read_back)
        tensors = layer.adapter_tensors("default")
        torch.testing.assert_close(tensors["pissa_B"] @ tensors["pissa_A"], product, atol=2e-4, rtol=1e-3)
        # A difference in the last digits may round a few entries to the next level.
        assert (layer.base_weight() - stored).norm() < 0.05 * stored.norm()
        found = (weight - layer.base_weight() - tensors["pissa_B"] @ tensors["pissa_A"]).norm()
        torch.testing.assert_close(found, error, rtol=1e-2, atol=0)
        measured = layer.quantization_errors("default")
        assert measured == pytest.approx((float(plain), float(found)), rel=1e-4)
        errors.append(float(found / plain))
    assert errors[0] < 1.0
    assert sorted(errors, reverse=True) == errors
    assert len(set(errors)) == 3


@pytest.mark.parametrize("quantize", BACKENDS)
def test_qpissa_from_start_to_end(quantize: Quantize, original: str, tiny_llama: Any, tmp_path: Path) -> None:
    def build() -> Any:
        return quantize(tiny_llama(hidden_size=128))

    base, exact = logits(build()), logits(tiny_llama(hidden_size=128))
    adapted = get_peft_model(build(), settings(original, qpissa_iters=3, r=24, target_modules=EVERY))
    start = logits(adapted)
    assert (start - exact).norm() < (base - exact).norm()
    ratios = qpissa_error_ratios(adapted)
    assert list(ratios) == list(layers_of(adapted))
    assert max(ratios.values()) < 1.0
    steps(adapted, 3)
    expected = logits(adapted)
    assert (expected - start).abs().max() > 1e-2
    # LLM.int8() rounds a layer's inputs too, so that the last digits of one layer move the next one's levels.
    rounding = 5e-3 if quantize is bitsandbytes_8bit else 1e-5
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), start, atol=rounding, rtol=rounding)

    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    lean = PeftModel.from_pretrained(build(), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), expected)

    adapted.merge_adapter(safe_merge=True)
    assert 0 < (logits(adapted) - expected).abs().max() < 0.6
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), expected)

    adapted.add_adapter("second", PissaConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.set_adapter("second")
    torch.testing.assert_close(logits(adapted), start, atol=rounding, rtol=rounding)
    adapted.delete_adapter("default")
    torch.testing.assert_close(logits(adapted), base, atol=rounding, rtol=rounding)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)  # the quantized original, to the bit
    assert torch.equal(logits(loaded.unload()), base)


def quantized_residual(model: PeftModel) -> Any:
    """Return the model with QPiSSA's adapters taken away, and its residuals left in place."""
    base = model.get_base_model()
    for name, layer in layers_of(model).items():
        base.set_submodule(name, layer.get_base_layer())
    return base


@pytest.mark.parametrize("quantize", BACKENDS)
def test_export_against_the_quantized_residual(
    quantize: Quantize, original: str, tiny_llama: Any, tmp_path: Path
) -> None:
    adapted = get_peft_model(quantize(tiny_llama(hidden_size=128)), settings(original, alpha=8.0))
    steps(adapted, 2)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    for source in (adapted, tmp_path / "adapter"):
        with pytest.raises(
            ValueError, match=r"original_weights must be None .*against='quantized_base'.*_proj"
        ):
            export_to_lora(source, tmp_path / "lora")
    export_to_lora(adapted, tmp_path / "lora", against="quantized_base")
    export_to_lora(tmp_path / "adapter", tmp_path / "from_folder", against="quantized_base")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "from_folder"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    loaded = PeftModel.from_pretrained(quantized_residual(adapted), tmp_path / "lora")
    assert loaded.peft_config["default"].r == 4
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_export_against_a_residual_that_is_none_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    for mode in ("projected", "residual"):
        config = PissaConfig(r=4, target_modules=["q_proj"], base_mode=mode)
        adapted = get_peft_model(tiny_llama(), config)
        with pytest.raises(ValueError, match=r"original_weights must be set, as QPiSSA's is"):
            export_to_lora(adapted, tmp_path / "lora", against="quantized_base")


def test_checkpoint_without_the_basis(original: str, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = get_peft_model(
        bitsandbytes_nf4(tiny_llama(hidden_size=128)), settings(original, save_basis=False)
    )
    steps(adapted, 2)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(bitsandbytes_nf4(tiny_llama(hidden_size=128)), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(adapted))


@pytest.mark.parametrize("quantize", [bitsandbytes_nf4, hqq_4bit])
def test_a_bias_stays(quantize: Quantize, tmp_path: Path) -> None:
    weight, bias, x = torch.randn(64, 64), torch.randn(64), torch.randn(3, 64)

    def build() -> Any:
        model = OneLayer(weight, bias=True)
        model.lin.bias.data = bias.clone()
        if quantize is hqq_4bit:
            return quantize(model)
        model = quantize(model)
        model.lin.bias = nn.Parameter(bias.clone(), requires_grad=False)  # the stand-in makes none
        return model

    save_file({"lin.weight": weight}, tmp_path / "model.safetensors")
    base = build()(x)
    model = get_peft_model(build(), settings(str(tmp_path), target_modules=["lin"], task_type=None))
    exact = nn.functional.linear(x, weight, bias)
    assert (model(x) - exact).norm() < (base - exact).norm()
    model.add_adapter("second", PissaConfig(r=2, target_modules=["lin"]))
    model.delete_adapter("default")
    with model.disable_adapter():
        assert torch.equal(model(x), base)


def test_original_weights_that_do_not_fit_are_named(original: str, tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "narrow")
    tensors = {
        k: v for k, v in tiny_llama(hidden_size=128).state_dict().items() if "layers.1.self_attn" not in k
    }
    (tmp_path / "short").mkdir()
    save_file(tensors, tmp_path / "short" / "model.safetensors")
    (tmp_path / "empty").mkdir()
    model = bitsandbytes_nf4(tiny_llama(hidden_size=128))
    types, before = [type(m) for m in model.modules()], logits(model)
    for folder, error, text in (
        ("nowhere", FileNotFoundError, "original_weights '.*nowhere' is no folder here"),
        ("empty", FileNotFoundError, "empty holds no safetensors model"),
        ("short", ValueError, r"short: the model has no tensor model\.layers\.1\.self_attn\.q_proj\.weight"),
        ("narrow", ValueError, r"original_weights must be the model that was quantized, whose .*q_proj is"),
    ):
        with pytest.raises(error, match=text):
            get_peft_model(model, settings(str(tmp_path / folder)))
        assert [type(m) for m in model.modules()] == types
        assert torch.equal(logits(model), before)  # also where layer 0 had been rewritten already
    get_peft_model(model, settings(original))


def test_combinations_without_a_meaning_are_refused(
    original: str, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"original_weights must be None on a base that is not quantized.*q_proj"
    ):
        get_peft_model(tiny_llama(hidden_size=128), settings(original))
    with pytest.raises(ValueError, match=r"base_mode must be 'projected' on a quantized"):
        get_peft_model(bitsandbytes_nf4(tiny_llama(hidden_size=128)), settings(None))
    adapted = get_peft_model(bitsandbytes_nf4(tiny_llama(hidden_size=128)), settings(original))
    with pytest.raises(ValueError, match=r"base_mode must be 'projected' beside adapter 'default'"):
        adapted.add_adapter("second", settings(original))
    plain = get_peft_model(tiny_llama(), PissaConfig(r=4, target_modules=["q_proj"], base_mode="residual"))
    with pytest.raises(ValueError, match="adapter_name must be one in residual mode on a quantized base"):
        qpissa_error_ratios(plain)
    monkeypatch.setattr(base_module, "resolve_quantization_backend", lambda *_, **__: Readable())
    with pytest.raises(ValueError, match=r"'projected' on a stand-in base, which cannot be written.*q_proj"):
        get_peft_model(tiny_llama(hidden_size=128), settings(original))


def test_original_weights_may_be_a_hub_id(
    original: str, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return original

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pissa_module._model_folder.cache_clear()
    adapted = get_peft_model(bitsandbytes_nf4(tiny_llama(hidden_size=128)), settings("someone/original"))
    pissa_module._model_folder.cache_clear()
    assert asked == [
        ("someone/original", ["*.safetensors", "*.safetensors.index.json"])
    ]  # once for all layers
    assert max(qpissa_error_ratios(adapted).values()) < 1.0


@pytest.mark.parametrize("config", [PissaConfig, SorsaConfig])
def test_deleting_a_residual_beside_a_merged_adapter_keeps_both_right(config: Any, tiny_llama: Any) -> None:
    adapted = get_peft_model(tiny_llama(), config(r=4, base_mode="residual", target_modules=["q_proj"]))
    adapted.add_adapter("second", config(r=4, target_modules=["q_proj"], init_weights=False))
    adapted.set_adapter("second")
    expected = logits(adapted)
    adapted.merge_adapter(["second"])
    adapted.delete_adapter("default")
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(tiny_llama()), atol=1e-5, rtol=1e-5)
