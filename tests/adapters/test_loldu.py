"""Properties of LoLDU, and of checkpoints that leave its factors out."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_ext.adapters import LolduConfig, export_to_lora
from hf_ext.adapters.loldu import LolduLinear, smallest_dtype
from tests.adapters.models import IDS, OneLayer, logits, steps
from tests.reference.loldu import ReferenceLoldu

HAND = torch.tensor([[2.0, 1.0, 1.0], [4.0, 3.0, 3.0], [8.0, 7.0, 9.0]])


def adapted_layer(weight: Tensor, **settings: Any) -> tuple[PeftModel, LolduLinear]:
    model = get_peft_model(OneLayer(weight), LolduConfig(target_modules=["lin"], **settings))
    return model, model.base_model.model.lin


def set_delta(layer: LolduLinear, values: list[float]) -> None:
    layer.loldu_delta["default"].data = torch.tensor(values)


# The hand-computed case and the identities --------------------------------------------------------


@pytest.mark.parametrize("train_scale", [False, True])
def test_update_of_the_hand_computed_case(train_scale: bool) -> None:
    model, layer = adapted_layer(HAND, r=2, train_scale=train_scale)
    set_delta(layer, [1.0, 2.0, 1.0] if train_scale else [1.0, 2.0])
    expected = torch.tensor([[0.25, 2.21875, 3.6145833], [0.5, 1.7708333, 2.7847222], [1.0, 0.875, 1.125]])
    torch.testing.assert_close(layer.delta_weight("default"), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(torch.eye(3)), (HAND + expected).T, atol=1e-5, rtol=0)
    if train_scale:
        set_delta(layer, [1.0, 2.0, -3.0])
        torch.testing.assert_close(layer.delta_weight("default"), -3.0 * expected, atol=1e-5, rtol=0)


def test_alpha_scales_the_update() -> None:
    _, plain = adapted_layer(HAND, r=2)
    _, scaled = adapted_layer(HAND, r=2, alpha=6.0)
    _, trained = adapted_layer(HAND, r=2, alpha=6.0, train_scale=True)
    assert scaled.scale["default"] == 3.0
    assert float(trained.loldu_delta["default"][-1]) == 3.0
    set_delta(plain, [1.0, 2.0])
    set_delta(scaled, [1.0, 2.0])
    set_delta(trained, [1.0, 2.0, 3.0])
    for layer in (scaled, trained):
        torch.testing.assert_close(layer.delta_weight("default"), 3.0 * plain.delta_weight("default"))
        unit = torch.eye(3)
        added = layer(unit) - layer.get_base_layer()(unit)
        torch.testing.assert_close(added.T, layer.delta_weight("default"), atol=1e-5, rtol=0)


def test_start_is_the_base_bit_for_bit(tiny_llama: Any) -> None:
    expected = logits(tiny_llama())
    for settings in ({}, {"selection": "largest"}, {"train_scale": True, "alpha": 3.0}):
        adapted = get_peft_model(tiny_llama(), LolduConfig(r=8, target_modules="all-linear", **settings))
        assert torch.equal(logits(adapted), expected)


def test_gradient_is_the_diagonal_of_l_g_u() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)
    model, layer = adapted_layer(weight, r=4, alpha=8.0)
    for name in (*layer.tensor_names, "weight"):  # fp64 throughout: the identity, not its rounding
        owner = layer.get_base_layer() if name == "weight" else getattr(layer, name)
        key = "weight" if name == "weight" else "default"
        owner._parameters[key].data = owner._parameters[key].data.double()
    x, target = torch.randn(7, 5).double(), torch.randn(7, 6).double()
    effective = weight.clone().requires_grad_()
    ((x @ effective.T - target) ** 2).sum().backward()
    ((model(x) - target) ** 2).sum().backward()
    assert effective.grad is not None
    expected = 2.0 * torch.diag(layer.loldu_L["default"].T @ effective.grad @ layer.loldu_U["default"].T)
    torch.testing.assert_close(layer.loldu_delta["default"].grad, expected, atol=1e-10, rtol=1e-10)
    assert layer.loldu_L["default"].grad is None
    assert layer.loldu_U["default"].grad is None


@pytest.mark.parametrize("settings", [{}, {"alpha": 8.0}])
@pytest.mark.parametrize("shape", [(10, 7), (7, 10)])
def test_training_follows_the_reference(settings: dict[str, Any], shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    model, layer = adapted_layer(weight, r=4, **settings)
    reference = ReferenceLoldu(weight.double(), 4, **settings)
    torch.testing.assert_close(layer.loldu_z0["default"], reference.z.float(), atol=1e-6, rtol=0)
    optimizers = [
        torch.optim.AdamW([layer.loldu_delta["default"]], lr=0.05, weight_decay=0.0),
        torch.optim.AdamW([reference.z], lr=0.05, weight_decay=0.0),
    ]
    for _ in range(100):
        x, target = (
            torch.randn(6, shape[1], generator=generator),
            torch.randn(6, shape[0], generator=generator),
        )
        (model(x) - target).square().mean().backward()
        (reference.forward(x.double()) - target).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    merged = layer.get_base_layer().weight + layer.stored_delta(["default"])
    torch.testing.assert_close(merged.double(), reference.weight(), atol=1e-3, rtol=1e-3)
    assert float((merged - weight).norm()) > 0.5


def test_removing_every_term_leaves_nothing() -> None:
    weight = torch.linalg.qr(torch.randn(12, 12)).Q
    model, layer = adapted_layer(weight, r=12, init_method="zeros")
    torch.testing.assert_close(layer.delta_weight("default") + weight, torch.zeros(12, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(torch.eye(12)), torch.zeros(12, 12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("train_scale", [False, True])
def test_trained_numbers(train_scale: bool, tiny_llama: Any) -> None:
    adapted = get_peft_model(
        tiny_llama(),
        LolduConfig(r=8, train_scale=train_scale, target_modules="all-linear", rank_pattern={"q_proj": 3}),
    )
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == 2 * (3 + 6 * 8) + 14 * train_scale


def test_export_is_the_update_at_rank_r(tiny_llama: Any, tmp_path: Path) -> None:
    adapted = get_peft_model(tiny_llama(), LolduConfig(r=4, target_modules="all-linear"))
    steps(adapted)
    layer = next(m for m in adapted.modules() if isinstance(m, LolduLinear))
    layer.loldu_delta["default"].data[1] = 0.0
    export_to_lora(adapted, tmp_path)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(lora), logits(adapted), atol=1e-5, rtol=1e-5)
    exported = lora.base_model.model.model.layers[0].self_attn.q_proj
    assert exported.lora_A["default"].weight.shape[0] == 3  # a term without a number is dropped
    delta = layer.delta_weight("default")
    error = (exported.get_delta_weight("default") - delta).norm() / delta.norm()
    assert float(error) < 1e-6


def test_bias_is_kept() -> None:
    base = OneLayer(torch.randn(4, 3), bias=True)
    x = torch.randn(2, 3)
    expected = base(x)
    model = get_peft_model(copy.deepcopy(base), LolduConfig(r=2, target_modules=["lin"]))
    assert torch.equal(model(x), expected)


def test_random_start_keeps_the_factors() -> None:
    weight = torch.randn(9, 8)
    _, plain = adapted_layer(weight, r=4)
    _, random = adapted_layer(weight, r=4, init_weights=False)
    assert torch.equal(plain.loldu_L["default"], random.loldu_L["default"])
    assert torch.equal(plain.loldu_U["default"], random.loldu_U["default"])
    assert float(random.loldu_delta["default"].abs().min()) > 0.0


# Warnings -----------------------------------------------------------------------------------------


def test_rows_of_zeros_are_counted_once(tiny_llama: Any) -> None:
    model = tiny_llama()
    for index in (0, 1):
        weight = model.model.layers[index].self_attn.o_proj.weight
        weight.data[2:] = 0.0  # rank 2
    with pytest.warns(UserWarning, match="trained numbers") as caught:
        adapted = get_peft_model(model, LolduConfig(r=5, target_modules="all-linear"))
    texts = [str(w.message) for w in caught if "trained numbers" in str(w.message)]
    assert len(texts) == 1
    assert texts[0].startswith("6 of 70 trained numbers have a factor of zeros and no effect, in 2 layers")
    assert "model.layers.0.self_attn.o_proj" in texts[0]
    steps(adapted, 1)
    delta = adapted.base_model.model.model.layers[0].self_attn.o_proj.loldu_delta["default"]
    assert torch.equal(delta[2:], torch.zeros(3))
    assert float(delta[:2].abs().min()) > 0.0


def test_a_huge_row_is_named_once(tiny_llama: Any) -> None:
    model = tiny_llama()
    for index in (0, 1):
        weight = model.model.layers[index].mlp.up_proj.weight
        weight.data[:, 2] = weight.data[:, 0] + 1e-6 * torch.randn(len(weight))  # a small third pivot
    with pytest.warns(UserWarning, match="median row") as caught:
        get_peft_model(model, LolduConfig(r=5, target_modules="all-linear"))
    texts = [str(w.message) for w in caught if "median row" in str(w.message)]
    assert len(texts) == 1
    assert texts[0].startswith("in 2 layers one row of U is over 10000 times as long")
    assert "mlp.up_proj" in texts[0]


def test_ordinary_weights_and_loading_give_no_warning(tiny_llama: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_llama(), LolduConfig(r=8, target_modules="all-linear"))
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    with pytest.warns(UserWarning, match="trained numbers"):
        adapted = get_peft_model(copy.deepcopy(model), LolduConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(model, tmp_path)


# Saving without the factors -----------------------------------------------------------------------


def saved(model: nn.Module, folder: Path, **settings: Any) -> PeftModel:
    adapted = get_peft_model(
        model, LolduConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], **settings})
    )
    steps(adapted)
    adapted.save_pretrained(folder)
    return adapted


def change_one_weight(model: Any, share: float = 0.01) -> Any:
    weight = model.model.layers[1].mlp.up_proj.weight.data
    rest = weight[:, -1].abs().argmin() if share == 0 else weight[:, -1].abs().argmax()
    weight[rest, -1] *= 1.0 + share  # in none of the first columns
    return model


@pytest.mark.parametrize("selection", ["leading", "largest"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_another_base_is_refused(
    selection: str, low_cpu_mem_usage: bool, tiny_llama: Any, tmp_path: Path
) -> None:
    adapted = saved(tiny_llama(), tmp_path, selection=selection)
    keys = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert keys == {"loldu_delta", "loldu_fingerprint", "loldu_pivots", "loldu_dtype"}
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(adapted))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the base weight differs from the one"):
        PeftModel.from_pretrained(
            change_one_weight(tiny_llama()), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
    with pytest.raises(ValueError, match="base weight differs from the one this adapter was trained on"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_loads_in_another_process(tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    change_one_weight(tiny_llama()).save_pretrained(tmp_path / "changed")
    adapted = saved(tiny_llama(), tmp_path / "adapter")
    save_file({"ids": IDS, "logits": logits(adapted)}, tmp_path / "expected.safetensors")
    code = f"""
import hf_ext, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
here = Path({str(tmp_path)!r})
known = load_file(here / "expected.safetensors")
def load(name):
    base = AutoModelForCausalLM.from_pretrained(here / name, dtype=torch.float32)
    return PeftModel.from_pretrained(base, here / "adapter").eval()
with torch.no_grad():
    assert torch.equal(load("base")(input_ids=known["ids"]).logits, known["logits"])
try:
    load("changed")
except ValueError as error:
    assert "model.layers.1.mlp.up_proj: the base weight differs" in str(error), error
else:
    raise SystemExit("a changed base was accepted")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def factors_of(model: nn.Module) -> list[Tensor]:
    layers = [m for m in model.modules() if isinstance(m, LolduLinear)]
    return [layer.recomputed("default")[name] for layer in layers for name in layer.recomputed_names]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_same_weights_in_another_dtype(
    half: torch.dtype, low_cpu_mem_usage: bool, tiny_llama: Any, tmp_path: Path
) -> None:
    stored = tiny_llama(dtype=half)  # what a Hub checkpoint in this dtype holds
    exact = tiny_llama()
    narrow = saved(copy.deepcopy(stored), tmp_path / "narrow")
    wide = saved(copy.deepcopy(stored).float(), tmp_path / "wide")
    full = saved(copy.deepcopy(exact), tmp_path / "full")
    load = {"low_cpu_mem_usage": low_cpu_mem_usage}
    for folder, base, source in (
        ("narrow", copy.deepcopy(stored).float(), narrow),  # the same values, wider
        ("narrow", copy.deepcopy(exact), narrow),  # values that were rounded for the training
        ("wide", copy.deepcopy(stored), wide),  # trained wider than stored
    ):
        found = PeftModel.from_pretrained(base, tmp_path / folder, **load)
        for a, b in zip(factors_of(found), factors_of(source), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=rf"it was trained on torch.float32 values.*{half} ones: load it in"):
        PeftModel.from_pretrained(copy.deepcopy(stored), tmp_path / "full", **load)
    assert torch.equal(logits(PeftModel.from_pretrained(exact, tmp_path / "full", **load)), logits(full))


def test_smallest_dtype() -> None:
    assert smallest_dtype(torch.tensor([[1.0, 0.5]])) == torch.bfloat16
    assert smallest_dtype(torch.tensor([[1.0 + 2**-10, 0.5]])) == torch.float16
    assert smallest_dtype(torch.tensor([[1.0, 0.5], [1.0 + 2**-20, 0.5]])) == torch.float32
    assert smallest_dtype(torch.tensor([[2.0**100]])) == torch.bfloat16


def test_checkpoints_pivots_win_over_the_machines(tiny_llama: Any, tmp_path: Path) -> None:
    # A machine that rounds otherwise may take another of two near-equal candidates. Here the training did:
    # its pivots are the second-best ones, and loading must follow them.
    from hf_ext.adapters import loldu as module
    from hf_ext.core.lu import truncated_lu

    adapted = saved(tiny_llama(), tmp_path / "usual")
    own = [
        layer.loldu_origin["default"].pivots for layer in adapted.modules() if isinstance(layer, LolduLinear)
    ]

    def swapped(weight: Tensor, r: int, *, pivots: Any = None, **options: Any) -> Any:
        order = truncated_lu(weight, r, **options).pivots[[1, 0, 2, 3]] if pivots is None else pivots
        return truncated_lu(weight, r, pivots=order, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "truncated_lu", swapped)
        other = saved(tiny_llama(), tmp_path / "other")
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny_llama(), tmp_path / "other", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(logits(loaded), logits(other))
        layers = [m for m in loaded.modules() if isinstance(m, LolduLinear)]
        assert all(
            torch.equal(layer.loldu_origin["default"].pivots, pivots[[1, 0, 2, 3]])
            for layer, pivots in zip(layers, own, strict=True)
        )
    loaded.save_pretrained(tmp_path / "again")  # and keep them
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    first = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_damaged_marks_are_refused(tiny_llama: Any, tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)

    def load_with(name: str, value: Tensor | None) -> None:
        key = next(k for k in sorted(whole) if k.endswith(name))
        changed = {k: v for k, v in whole.items() if k != key}
        save_file(changed if value is None else {**changed, key: value}, path)
        PeftModel.from_pretrained(tiny_llama(), tmp_path)

    for mark in ("fingerprint", "pivots", "dtype"):
        with pytest.raises(
            ValueError, match=rf"{mark} must be in a checkpoint saved with save_factors=False"
        ):
            load_with(f"loldu_{mark}", None)
    for pivots in ([0, 0, 1, 2], [0, 1, 2, 10**6], [-1, 0, 1, 2], [0, 1]):
        with pytest.raises(ValueError, match=r"pivots must be .*layers\.0\.mlp\.up_proj"):
            load_with("loldu_pivots", torch.tensor(pivots, dtype=torch.int32))
    for pivots in (torch.zeros(2, 2), torch.tensor([0.5, 1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match=r"pivots must be .*layers\.0\.mlp\.up_proj"):
            load_with("loldu_pivots", pivots)
    with pytest.raises(ValueError, match=r"fingerprint must be .* did not come out as they were"):
        load_with("loldu_pivots", whole_pivots(whole)[[2, 1, 0, 3]])
    with pytest.raises(ValueError, match="fingerprint must be two finite numbers"):
        load_with("loldu_fingerprint", torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="fingerprint must be two finite numbers"):
        load_with("loldu_fingerprint", torch.tensor([1.0]))
    with pytest.raises(ValueError, match="dtype must be a floating one"):
        load_with("loldu_dtype", torch.zeros(1, dtype=torch.int32))


def whole_pivots(tensors: dict[str, Tensor]) -> Tensor:
    return next(tensors[key] for key in sorted(tensors) if key.endswith("loldu_pivots"))


def test_refused_load_leaves_the_adapter(tiny_llama: Any, tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path / "first")
    other = saved(tiny_llama(seed=1), tmp_path / "second")
    expected = logits(other)
    with pytest.raises(ValueError, match="base weight differs"):
        other.load_adapter(tmp_path / "first", "default")
    assert torch.equal(logits(other), expected)
    other.load_adapter(tmp_path / "second", "default")
    assert torch.equal(logits(other), expected)


def test_saved_while_merged_and_after_a_copy(tiny_llama: Any, tmp_path: Path) -> None:
    adapted = saved(tiny_llama(), tmp_path / "plain")
    expected = logits(adapted)
    twin = copy.deepcopy(adapted)
    twin.merge_adapter()
    twin.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged")), expected)


def test_factors_cast_to_bf16_still_load(tiny_llama: Any, tmp_path: Path) -> None:
    adapted = get_peft_model(
        tiny_llama(), LolduConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False
    )
    steps(adapted)
    for layer in adapted.modules():
        if isinstance(layer, LolduLinear):
            for name in layer.tensor_names:
                getattr(layer, name)["default"].data = getattr(layer, name)["default"].data.bfloat16()
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert float((logits(loaded) - logits(adapted)).abs().max()) < 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_before_anything_changes(value: float, tiny_llama: Any) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"weight must be finite.*model\.layers\.1\.mlp\.up_proj"):
        get_peft_model(model, LolduConfig(r=4, target_modules="all-linear"))
    assert [(name, type(module)) for name, module in model.named_modules()] == before


# The effect ---------------------------------------------------------------------------------------


def test_the_weights_own_directions_beat_random_ones() -> None:
    from benchmarks.loldu import small_run

    for repetition in range(3):
        result = small_run(repetition, lr=0.03, methods=("loldu", "random directions"))
        assert result["loldu"] < 0.9 * result["start"]
        assert result["loldu"] < result["random directions"]
