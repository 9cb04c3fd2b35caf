"""LoRA adapters as parents: what PEFT computes, merged exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ext.merging import merge
from hf_ext.merging._checkpoint import Checkpoint
from hf_ext.merging._lora import read_adapter
from tests.conftest import ModelFactory, build_tiny_gpt2, build_tiny_llama
from tests.merging.models import equal, merged, tensors_of

IDS = torch.tensor([[1, 7, 200, 33, 5, 90]])


def adapter(folder: Path, seed: int, model: Any = None, **settings: Any) -> Path:
    """Write a random LoRA of the tiny Llama, and the base beside it."""
    from peft import LoraConfig, get_peft_model

    base = model if model is not None else build_tiny_llama()
    if not (folder.parent / "base").exists():
        base.save_pretrained(str(folder.parent / "base"))
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **settings})
    tuned = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(str(folder))
    return folder


def logits(base: Path, *adapters: Path) -> Tensor:
    """Return the logits of a base, with an adapter where one is given."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    for folder in adapters:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return model(IDS).logits


def deltas(folder: Path) -> dict[str, Tensor]:
    """Return the dense updates of an adapter by module."""
    one = read_adapter(Checkpoint(folder))
    return {module: torch.matmul(*one.factors(module)) for module in one.modules}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"up_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["plain", "rslora", "patterns", "rslora_patterns", "modules_to_save", "embeddings"],
)
@pytest.mark.parametrize("space", ["product", "merge_into_base", "factors"])
def test_one_adapter_with_weight_one_is_the_same_model(
    settings: dict[str, Any], space: str, tmp_path: Path
) -> None:
    one = adapter(tmp_path / "a", 1, **settings)
    before = logits(tmp_path / "base", one)
    options: dict[str, Any] = {"space": space}
    base = tmp_path / "base" if space == "merge_into_base" else None
    merged(tmp_path, "linear", [one], base, options=options)
    after = logits(tmp_path / "out") if base else logits(tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert float((before - logits(tmp_path / "base")).abs().max()) > 0.1, "the adapter does something"


def test_the_weighted_sum_of_updates_is_exact_at_the_sum_of_the_ranks(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, r=8, use_rslora=True)
    parents = [{"weight": 0.75}, {"weight": -0.5}]
    merged(tmp_path, "linear", [a, b], parents=parents, normalize=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (12, 12, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    found, first, second = deltas(tmp_path / "out"), deltas(a), deltas(b)
    for module, delta in found.items():
        torch.testing.assert_close(delta, 0.75 * first[module] - 0.5 * second[module], rtol=1e-5, atol=1e-6)


def test_below_the_sum_of_the_ranks_it_is_the_best_of_that_rank(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, r=8)
    merged(tmp_path, "linear", [a, b], options={"out_rank": 5})
    found, first, second = deltas(tmp_path / "out"), deltas(a), deltas(b)
    notes = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["by_tensor"]
    for module, delta in found.items():
        whole = 0.5 * (first[module] + second[module])
        u, s, vh = torch.linalg.svd(whole.double())
        best = (u[:, :5] * s[:5]) @ vh[:5]
        torch.testing.assert_close(delta.double(), best, rtol=1e-5, atol=1e-5)
        dropped = float(s[5:].square().sum() / s.square().sum())
        assert abs(notes[f"{module}.weight"]["dropped_energy"] - dropped) < 1e-5


def test_factors_and_products_differ_by_the_known_amount(tmp_path: Path) -> None:
    # B1 A1 and B2 A2 in different places: averaging factors gives all entries 1/4, averaging updates the
    # diagonal.
    def one(name: str, b: list[list[float]], a: list[list[float]]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tensors = {
            "base_model.model.w.lora_A.weight": torch.tensor(a),
            "base_model.model.w.lora_B.weight": torch.tensor(b),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["w"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    x = one("x", [[1.0], [0.0]], [[1.0, 0.0]])
    y = one("y", [[0.0], [1.0]], [[0.0, 1.0]])
    merged(tmp_path, "linear", [x, y], options={"space": "factors"})
    assert deltas(tmp_path / "out")["w"].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    merged(tmp_path, "linear", [x, y])
    assert deltas(tmp_path / "out")["w"].tolist() == [[0.5, 0.0], [0.0, 0.5]]
    same, minus = one("same", [[2.0], [1.0]], [[1.0, 3.0]]), one("minus", [[-2.0], [-1.0]], [[-1.0, -3.0]])
    merged(tmp_path, "linear", [same, minus])
    assert deltas(tmp_path / "out")["w"].tolist() == [[2.0, 6.0], [1.0, 3.0]]


@pytest.mark.parametrize(
    ("method", "settings"),
    [("task_arithmetic", {"weight": 0.4}), ("ties", {"density": 0.5}), ("dare", {"density": 0.5})],
)
def test_methods_on_updates_equal_those_on_full_models(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    a, b = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    base = tmp_path / "base"
    full = []
    for name, folder in (("fa", a), ("fb", b)):
        merged(tmp_path, "linear", [folder], base, out=name, options={"space": "merge_into_base"})
        full.append(tmp_path / name)
    scope: dict[str, Any] = {"scope": "tensor"} if method == "ties" else {}
    wanted = merged(tmp_path, method, full, base, out="full", **settings, **scope)
    into = merged(tmp_path, method, [a, b], base, options={"space": "merge_into_base"}, **settings)
    product = merged(tmp_path, method, [a, b], out="product", options={"out_rank": 64}, **settings)
    assert product
    start, made = tensors_of(base), deltas(tmp_path / "product")
    for name, value in wanted.items():
        torch.testing.assert_close(into[name], value, rtol=1e-5, atol=2e-6)
        module = name.removesuffix(".weight")
        if module in made:
            torch.testing.assert_close(start[name] + made[module], value, rtol=1e-4, atol=1e-5)


def test_bits_do_not_depend_on_blocks_and_threads(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    runs = [
        merged(
            tmp_path,
            "ties",
            [a, b],
            tmp_path / "base",
            density=0.5,
            options={"space": "merge_into_base", **options},
        )
        for options in ({"block_bytes": 65536, "threads": 3}, {"block_bytes": 1 << 24, "threads": 1})
    ]
    assert equal(*runs)
    runs = [
        merged(tmp_path, "linear", [a, b], options={"threads": threads, "out_rank": 5}) for threads in (1, 3)
    ]
    assert equal(*runs)


def test_transposed_weights_of_gpt2_are_merged(tmp_path: Path) -> None:
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    one = adapter(tmp_path / "a", 1, build_tiny_gpt2(), **settings)
    before = logits(tmp_path / "base", one)
    merged(tmp_path, "linear", [one], tmp_path / "base", options={"space": "merge_into_base"})
    torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_updates_of_embeddings_are_merged_as_those_of_layers(method: str, tmp_path: Path) -> None:
    settings = {"target_modules": ["embed_tokens", "q_proj"]}
    pair = [adapter(tmp_path / name, seed, **settings) for seed, name in enumerate("ab")]
    options = {"out_rank": 8} if method == "linear" else {"out_rank": 64}
    own: dict[str, Any] = {"density": 0.5} if method == "ties" else {}
    merged(tmp_path, method, pair, options=options, **own)
    found, first, second = deltas(tmp_path / "out"), deltas(pair[0]), deltas(pair[1])
    for module, delta in found.items():
        if method == "linear":
            wanted = 0.5 * (first[module] + second[module])
        else:
            trimmed = torch.stack([_largest_half(d[module]) for d in (first, second)])
            elected = trimmed.sum(0).sign()
            agrees = (trimmed.sign() == elected) & (trimmed != 0)
            wanted = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-5)
    assert found["model.embed_tokens"].shape == (256, 64)
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert torch.equal(kept[key], load_file(pair[0] / "adapter_model.safetensors")[key])


def _largest_half(delta: Tensor) -> Tensor:
    threshold = delta.abs().flatten().sort(descending=True).values[delta.numel() // 2 - 1]
    return torch.where(delta.abs() >= threshold, delta, torch.zeros_like(delta))


def test_embeddings_whose_base_was_loaded_in_another_type_are_the_same(tmp_path: Path) -> None:
    settings = {"target_modules": ["embed_tokens"]}
    wide = adapter(tmp_path / "wide", 1, build_tiny_llama().bfloat16().float(), **settings)
    narrow = adapter(tmp_path / "narrow", 2, **settings)
    rewrite(narrow, "base_layer.weight", lambda tensor: tensor.bfloat16())
    path = tmp_path / "base" / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path, {"format": "pt"})
    merged(tmp_path, "linear", [wide, narrow], tmp_path / "base", options={"space": "merge_into_base"})
    rewrite(wide, "base_layer.weight", lambda tensor: tensor * 1.1)
    with pytest.raises(ValueError, match="embed_tokens"):
        merged(tmp_path, "linear", [wide], tmp_path / "base", out="o", options={"space": "merge_into_base"})


def test_embeddings_of_another_base_or_a_tied_one_are_refused(tmp_path: Path) -> None:
    settings = {"target_modules": ["embed_tokens"]}
    a, b = adapter(tmp_path / "a", 1, **settings), adapter(tmp_path / "b", 2, **settings)
    rewrite(b, "embed_tokens.base_layer.weight", lambda tensor: tensor + 1.0)
    with pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight of b is not a's"):
        merged(tmp_path, "linear", [a, b])
    with pytest.raises(ValueError, match=r"embed_tokens\.weight \(the adapter's file has another one"):
        merged(tmp_path, "linear", [b], tmp_path / "base", options={"space": "merge_into_base"})
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="tie_word_embeddings must be false"):
        merged(tmp_path, "linear", [a], tmp_path / "base", options={"space": "merge_into_base"})
    assert not list(tmp_path.glob("*out*"))


def rewrite(folder: Path, end: str, change: Callable[[Tensor], Tensor]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: change(t) if n.endswith(end) else t for n, t in tensors.items()}, path)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "use_dora must be off"),
        ({"lora_bias": True}, "lora_bias must be off"),
        ({"bias": "lora_only"}, "bias must be 'none'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices must be off"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("space", ["product", "merge_into_base"])
def test_what_is_more_than_b_a_is_refused_by_name(
    settings: dict[str, Any], match: str, space: str, tmp_path: Path
) -> None:
    one = adapter(tmp_path / "a", 1, **settings)
    base = tmp_path / "base" if space == "merge_into_base" else None
    with pytest.raises(ValueError, match=match):
        merged(tmp_path, "linear", [one], base, options={"space": space})
    assert not list(tmp_path.glob("*out*"))


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_adapters_that_do_not_fit_together_are_refused_by_name(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, target_modules=["q_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"b lacks .*up_proj.*only b has .*down_proj"):
        merged(tmp_path, "linear", [a, b])
    c = adapter(tmp_path / "c", 3, r=8)
    with pytest.raises(ValueError, match="r must be 4, that of a, for factors; or set space: product"):
        merged(tmp_path, "linear", [a, c], options={"space": "factors"})
    with pytest.raises(ValueError, match="models must be all models or all adapters; adapters are a"):
        merged(tmp_path, "linear", [a, tmp_path / "base"])
    with pytest.raises(
        ValueError, match="out_rank must be given: what ties makes of updates has no low rank"
    ):
        merged(tmp_path, "ties", [a, a], density=0.5)
    with pytest.raises(ValueError, match="base_model must be the model that the adapters are merged into"):
        merged(tmp_path, "linear", [a], options={"space": "merge_into_base"})
    for settings, match in (
        ({"peft_type": "SORSA"}, "peft_type must be 'LORA'; export another type"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights must be one that leaves the base"),
        ({"r": 3}, r"rank of .*up_proj must be 3, as its config says"),
    ):
        d = adapter(tmp_path / "d", 4)
        change(d, **settings)
        with pytest.raises(ValueError, match=match):
            merged(tmp_path, "linear", [d])
    assert not list(tmp_path.glob("*out*"))


def test_a_base_of_another_shape_is_refused_by_name(tmp_path: Path, tiny_llama: ModelFactory) -> None:
    a = adapter(tmp_path / "a", 1)
    tiny_llama(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"other is not the base of these adapters: .*q_proj\.weight \[64, 64\]"
    ):
        merged(tmp_path, "linear", [a], tmp_path / "other", options={"space": "merge_into_base"})


def test_the_pickle_form_of_an_adapter_is_refused(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", 1)
    (a / "adapter_model.safetensors").rename(a / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"pickle files \(adapter_model\.bin\)"):
        merged(tmp_path, "linear", [a])


def test_the_card_and_the_config_name_the_base(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    for folder in (a, b):
        change(folder, base_model_name_or_path="org/base")
    merge({"merge_method": "linear", "models": [str(a), str(b)]}, tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
