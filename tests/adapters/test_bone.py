"""Properties of Bone's three forms, of their chaining, and of PEFT's old BONE checkpoints."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_ext.adapters import BoneConfig, convert_bone_checkpoint, export_to_lora
from hf_ext.adapters._block_affine import bat_linear
from hf_ext.adapters.bone import BoneLinear, slice_sums
from tests.adapters.models import OneLayer, logits
from tests.reference import bone as reference

FORMS: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 4, "form": "mini", "mini_r": 2},
    {"r": 2, "form": "mini", "mini_r": 4},
    {"r": 4, "form": "bat"},
]


def adapted_layer(
    weight: Tensor, block: Tensor | None = None, bias: bool = False, **settings: Any
) -> tuple[PeftModel, BoneLinear]:
    model = get_peft_model(OneLayer(weight, bias), BoneConfig(target_modules=["lin"], **settings))
    layer = model.base_model.model.lin
    if block is not None:
        assert layer.bone_block["default"].shape == block.shape
        layer.bone_block["default"].data = block.clone()
    return model.eval(), layer


def add(model: PeftModel, name: str, block: Tensor | None, **settings: Any) -> None:
    model.add_adapter(name, BoneConfig(target_modules=["lin"], init_weights=False, seed=3, **settings))
    if block is not None:
        model.base_model.model.lin.bone_block[name].data = block.clone()


# The hand-computed cases --------------------------------------------------------------------------


def test_plain_case_by_hand() -> None:
    model, layer = adapted_layer(torch.zeros(2, 5), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), r=2)
    delta = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0], [2.0, 4.0, 2.0, 4.0, 2.0]])
    assert torch.equal(layer.delta_weight("default"), delta)
    assert model(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])).tolist() == [[27.0, 42.0]]


def test_mini_case_by_hand() -> None:
    _, layer = adapted_layer(torch.zeros(3, 4), torch.tensor([[1.0], [2.0]]), r=2, form="mini", mini_r=1)
    assert layer.delta_weight("default").tolist() == [[1.0, 2.0, 1.0, 2.0]] * 3


@pytest.mark.parametrize("train", [False, True])
def test_bat_case_by_hand(train: bool) -> None:
    weight = torch.arange(1.0, 17.0).reshape(4, 4)
    block = torch.tensor([[[0.5, 0.0], [0.0, 0.25]], [[0.0, 1.0], [1.0, 0.0]]])
    model, layer = adapted_layer(weight, block, r=2, form="bat")
    model.train(train)
    assert layer.delta_weight("default").tolist() == [
        [1.0, 0.5, 2.0, 1.0],
        [2.5, 1.75, 3.5, 2.25],
        [10.0, 10.0, 12.0, 12.0],
        [15.0, 13.0, 17.0, 15.0],
    ]
    assert torch.linalg.matrix_rank(layer.delta_weight("default")) == 4
    assert model(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).tolist() == [[2.0, 7.5, 19.0, 28.0]]
    assert model(torch.ones(1, 4)).tolist() == [[14.5, 36.0, 86.0, 118.0]]


def test_bat_unmerges_although_its_inverse_does_not_exist() -> None:
    weight = torch.randn(4, 4)
    block = torch.tensor([[[0.5, 0.0], [0.0, 0.25]], [[0.0, 1.0], [1.0, 0.0]]])  # -1 is an eigenvalue
    model, layer = adapted_layer(weight, block, r=2, form="bat")
    expected = model(torch.eye(4))
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(torch.eye(4)), expected)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, weight)


# Against the reference and PEFT's MiSS ------------------------------------------------------------


def cases() -> list[Any]:
    """Return (form, r, mini_r, out_features, in_features) over divisible and other shapes."""
    rows = [("plain", r, 1, m, n) for r, m, n in [(1, 3, 4), (3, 5, 7), (4, 6, 4), (5, 2, 12), (7, 8, 7)]]
    rows += [("mini", r, w, m, n) for r, w, m, n in [(2, 3, 6, 5), (4, 1, 3, 4), (3, 6, 6, 7)]]
    rows += [("bat", r, 1, m, n) for r, m, n in [(1, 3, 2), (2, 4, 6), (3, 9, 3), (4, 4, 8)]]
    return [pytest.param(*row, id="-".join(map(str, row))) for row in rows]


@pytest.mark.parametrize(("form", "r", "mini_r", "m", "n"), cases())
@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_the_references(form: str, r: int, mini_r: int, m: int, n: int, bias: bool) -> None:
    weight = torch.randn(m, n)
    model, layer = adapted_layer(weight, bias=bias, r=r, form=form, mini_r=mini_r, init_weights=False)
    block = layer.bone_block["default"].detach().clone().requires_grad_()
    x = torch.randn(3, 2, n, requires_grad=True)
    target = torch.randn(3, 2, m)
    expected = F.linear(x, reference.chained(weight, [(form, block)]), layer.bias)
    ((expected - target) ** 2).sum().backward()
    assert x.grad is not None
    assert block.grad is not None
    grad_x, x.grad = x.grad, None
    found = model(x)
    ((found - target) ** 2).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, grad_x, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.bone_block["default"].grad, block.grad, atol=1e-4, rtol=1e-5)
    delta = reference.chained(weight, [(form, block.detach())]) - weight
    torch.testing.assert_close(layer.delta_weight("default"), delta, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"r": 16}, {"r": 16, "init_weights": True}),
        ({"r": 24}, {"r": 24, "init_weights": True}),  # divides neither width
        ({"r": 16, "form": "mini", "mini_r": 8}, {"r": 16, "init_weights": "mini", "mini_r": 8}),
        ({"r": 16, "form": "bat"}, {"r": 16, "init_weights": "bat"}),
    ],
)
def test_same_block_gives_the_logits_of_pefts_miss(
    ours: dict[str, Any], theirs: dict[str, Any], tiny_llama: Any
) -> None:
    adapted = get_peft_model(
        tiny_llama(), BoneConfig(target_modules="all-linear", init_weights=False, **ours)
    )
    miss = get_peft_model(tiny_llama(), MissConfig(target_modules="all-linear", **theirs))
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, BoneLinear):
            target = miss.base_model.model.get_submodule(name).miss_block["default"]
            target.data = layer.bone_block["default"].data * 0.1
            layer.bone_block["default"].data *= 0.1
    torch.testing.assert_close(logits(adapted), logits(miss), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"r": 3}, 3 * 8), ({"r": 3, "form": "mini", "mini_r": 2}, 3 * 2), ({"r": 4, "form": "bat"}, 4 * 8)],
)
def test_trainable_count(settings: dict[str, Any], count: int) -> None:
    model, _ = adapted_layer(torch.randn(8, 12), **settings)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("settings", FORMS)
def test_zero_block_changes_no_bit(settings: dict[str, Any]) -> None:
    weight, x = torch.randn(8, 12), torch.randn(5, 12)
    model, _ = adapted_layer(weight, bias=True, **settings)
    expected = model.base_model.model.lin.get_base_layer()(x)
    tolerance = 1e-6 if settings.get("form") == "bat" else 0.0  # a product of its own, in another order
    torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)


# The product of the bat form ----------------------------------------------------------------------


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(4, 4, 2), (6, 4, 2), (3, 6, 3)])
def test_bat_gradients_in_fp64(shape: tuple[int, int, int], transposed: bool, with_weight: bool) -> None:
    m, n, r = shape
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(m, n, dtype=torch.float64)
    weight = (weight.T.contiguous() if transposed else weight).requires_grad_()
    block = torch.randn(m // r, r, r, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
        return bat_linear(x, weight, block, transposed=transposed, with_weight=with_weight, rows=r)

    assert torch.autograd.gradcheck(product, (x, weight, block))
    assert torch.autograd.gradgradcheck(product, (x, weight, block))


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 100])
def test_bat_slices_give_one_result(rows: int) -> None:
    weight, block, x = torch.randn(8, 6), torch.randn(4, 2, 2), torch.randn(2, 3, 6)
    expected = F.linear(x, reference.bat_delta(weight, block))
    torch.testing.assert_close(bat_linear(x, weight, block, rows=rows), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("read", [False, True])
def test_bat_keeps_nothing_of_the_weights_size(read: bool) -> None:
    weight, block = torch.randn(64, 32), torch.zeros(16, 4, 4, requires_grad=True)
    x = torch.randn(3, 32, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = bat_linear(x, (lambda: weight.clone()) if read else weight, block, with_weight=True)
    own = {x.data_ptr(), weight.data_ptr(), block.data_ptr()}
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= own
    out.sum().backward()
    assert block.grad is not None
    assert x.grad is not None


def test_bat_trains_a_base_weight_that_is_trainable() -> None:
    weight, x = torch.randn(4, 6), torch.randn(5, 6)
    model, layer = adapted_layer(weight, r=2, form="bat", init_weights=False)
    layer.get_base_layer().weight.requires_grad_()
    model(x).square().sum().backward()
    twin = weight.clone().requires_grad_()
    F.linear(
        x, reference.chained(twin, [("bat", layer.bone_block["default"].detach())])
    ).square().sum().backward()
    torch.testing.assert_close(layer.get_base_layer().weight.grad, twin.grad, atol=1e-4, rtol=1e-4)


def test_bat_calls_what_is_hooked_or_wrapped() -> None:
    weight, x = torch.randn(4, 6), torch.randn(5, 6)
    model, layer = adapted_layer(weight, r=2, form="bat", init_weights=False)
    expected, seen = model(x), []
    hook = layer.get_base_layer().register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert seen == [1]
    hook.remove()
    inner = get_peft_model(OneLayer(weight), LoraConfig(target_modules=["lin"], r=2, init_lora_weights=False))
    added = inner(x).detach() - F.linear(x, weight)
    config = BoneConfig(target_modules=["lin"], r=2, form="bat", init_weights=False)
    outer = get_peft_model(inner.base_model.model, config, adapter_name="outer").eval()
    assert added.abs().max() > 1e-3
    torch.testing.assert_close(outer(x), expected + added, atol=1e-5, rtol=1e-5)


def test_bat_refuses_a_weight_that_is_not_there() -> None:
    model, layer = adapted_layer(torch.randn(4, 6), r=2, form="bat")
    layer.get_base_layer().weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match=r"base weight must be whole .*ZeRO-3.*\(lin\)"):
        model(torch.randn(2, 6))


def test_dropout_acts_on_the_update_alone() -> None:
    x = torch.randn(50, 8)
    for settings in FORMS:
        model, layer = adapted_layer(torch.randn(8, 8), dropout=0.5, init_weights=False, **settings)
        model.train()
        torch.manual_seed(1)
        found = model(x)
        torch.manual_seed(1)
        update = F.linear(F.dropout(x, 0.5), layer.delta_weight("default"))
        torch.testing.assert_close(found, layer.get_base_layer()(x) + update, atol=1e-5, rtol=1e-5)


# Precision ----------------------------------------------------------------------------------------


def test_slices_of_half_precision_are_summed_in_fp32() -> None:
    x = torch.full((1, 4098), 0.01, dtype=torch.bfloat16)
    x[0, :2] = 8.0  # 2048 terms of 0.01 each would be lost beside 8 in bf16
    assert slice_sums(x, 2).float() == pytest.approx(8 + 2048 * 0.01, rel=1e-2)
    assert slice_sums(x[:, :4097], 2).dtype == torch.bfloat16
    assert slice_sums(x.double(), 2).dtype == torch.float64


@pytest.mark.parametrize("settings", FORMS)
def test_small_updates_survive_autocast(settings: dict[str, Any]) -> None:
    weight, x = torch.ones(8, 8), torch.eye(8)
    model, layer = adapted_layer(weight, **settings)
    layer.bone_block["default"].data.fill_(1e-4)  # far below bf16's spacing at 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, apart = layer.forward_base(x, ["default"])
        delta = layer.forward_delta(x, "default")
        assert model(x).dtype == torch.bfloat16
    assert apart == ["default"]
    assert torch.equal(out, torch.ones(8, 8, dtype=torch.bfloat16))  # the base's product and nothing else
    torch.testing.assert_close(delta.float().T, layer.delta_weight("default"), rtol=1e-2, atol=0)


def test_bat_under_autocast_has_fp32s_gradients_to_rounding() -> None:
    weight, x = torch.randn(8, 8), torch.randn(30, 8)
    gradients = []
    for enabled in (False, True):
        model, layer = adapted_layer(weight, r=4, form="bat", init_weights=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(x).float().square().mean()
            loss.backward()  # within the context, as some loops do
        gradients.append(layer.bone_block["default"].grad)
    assert gradients[1].dtype == torch.float32
    torch.testing.assert_close(gradients[1], gradients[0], rtol=3e-2, atol=3e-2)


# Several adapters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forms", [("plain", "bat"), ("bat", "plain"), ("bat", "bat"), ("mini", "bat", "plain")]
)
def test_adapters_of_several_forms_chain_in_active_order(forms: tuple[str, ...]) -> None:
    weight, x = torch.randn(8, 8), torch.randn(5, 8)
    names = ["default", "second", "third"][: len(forms)]
    ranks = dict(zip(names, [4, 2, 8], strict=False))
    model, layer = adapted_layer(weight, r=4, form=forms[0], mini_r=2, init_weights=False, bias=True)
    for name, form in zip(names[1:], forms[1:], strict=True):
        add(model, name, None, r=ranks[name], form=form, mini_r=2)
    for order in (names, names[::-1]):
        model.base_model.set_adapter(order)
        steps = [(forms[names.index(name)], layer.bone_block[name].detach()) for name in order]
        effective = reference.chained(weight, steps)
        expected = F.linear(x, effective, layer.bias)
        torch.testing.assert_close(model.eval()(x), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.train()(x), expected, atol=1e-4, rtol=1e-4)
        model.merge_adapter(adapter_names=order)
        torch.testing.assert_close(layer.get_base_layer().weight, effective, atol=1e-4, rtol=1e-4)
        for name in names:  # also while merged, it is that of the original weight
            form, block = forms[names.index(name)], layer.bone_block[name].detach()
            alone = reference.chained(weight, [(form, block)]) - weight
            torch.testing.assert_close(layer.delta_weight(name), alone, atol=1e-5, rtol=1e-4)
        assert layer.merged_adapters == order
        model.unmerge_adapter()
        assert torch.equal(layer.get_base_layer().weight, weight)


def test_chained_adapters_train_together() -> None:
    weight, x = torch.randn(8, 8), torch.randn(5, 8)
    model, layer = adapted_layer(weight, r=4, form="bat", init_weights=False)
    add(model, "second", None, r=2, form="bat")
    model.base_model.set_adapter(["default", "second"])
    model.train()(x).square().sum().backward()
    blocks = [layer.bone_block[n].detach().clone().requires_grad_() for n in ("default", "second")]
    effective = reference.chained(weight, [("bat", block) for block in blocks])
    F.linear(x, effective).square().sum().backward()
    for name, block in zip(("default", "second"), blocks, strict=True):
        torch.testing.assert_close(layer.bone_block[name].grad, block.grad, atol=1e-3, rtol=1e-4)


def test_bat_chain_is_pefts(tiny_llama: Any) -> None:
    # MiSS has one r and one form for a layer, so that is what can be compared.
    models = [
        get_peft_model(tiny_llama(), BoneConfig(target_modules=["q_proj"], r=8, form="bat")),
        get_peft_model(tiny_llama(), MissConfig(target_modules=["q_proj"], r=8, init_weights="bat")),
    ]
    generator = torch.Generator().manual_seed(0)
    values = {
        (n, i): 0.3 * torch.randn(8, 8, 8, generator=generator) for n in ("default", "two") for i in (0, 1)
    }
    outputs = {}
    for model, attribute in zip(models, ("bone_block", "miss_block"), strict=True):
        model.add_adapter("two", model.peft_config["default"])
        for (name, index), value in values.items():
            layer = model.base_model.model.model.layers[index].self_attn.q_proj
            getattr(layer, attribute)[name].data = value.clone()
        for order in (["default", "two"], ["two", "default"]):
            model.base_model.set_adapter(order)
            outputs[attribute, order[0]] = logits(model)
    for first in ("default", "two"):
        torch.testing.assert_close(
            outputs["bone_block", first], outputs["miss_block", first], atol=1e-5, rtol=1e-5
        )
    assert (outputs["bone_block", "default"] - outputs["bone_block", "two"]).abs().max() > 1e-4


# Export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FORMS[:3])
@pytest.mark.parametrize("shape", [(8, 12), (4, 7)])
def test_lora_factors_have_the_updates_very_bits(settings: dict[str, Any], shape: tuple[int, int]) -> None:
    _, layer = adapted_layer(torch.randn(shape), init_weights=False, **settings)
    pair = layer.module_factors(layer.adapter_tensors("default"), layer.configs["default"], "lin")
    assert pair is not None
    b, a = pair
    assert torch.equal(b @ a, layer.delta_weight("default"))
    assert b.shape[1] == a.shape[0] == min(settings["r"], settings.get("mini_r", settings["r"]))


def test_bat_has_no_lora_export(tmp_path: Path) -> None:
    model, layer = adapted_layer(torch.randn(4, 4), r=2, form="bat", init_weights=False)
    assert not layer.supports_lora_conversion()
    with pytest.raises(ValueError, match=r"whose update has low rank.*lin"):
        export_to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# Settings and refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mini", "bat"])
def test_init_weights_may_name_the_form(form: str) -> None:
    config = BoneConfig(init_weights=form)
    assert (config.form, config.init_weights) == (form, True)
    assert BoneConfig(init_weights=form, form=form).form == form


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"r": 13}, r"r must be at most 12, .*got 13 \(lin\)"),
        (
            {"r": 2, "form": "bat"},
            r"r must be a divisor .*\(9, 12\).*\(1 and 0 are left over\), got 2 \(lin\)",
        ),
        ({"r": 9, "form": "bat"}, r"\(0 and 3 are left over\), got 9 \(lin\)"),
        ({"r": 2, "form": "mini", "mini_r": 4}, r"mini_r must be a divisor of out_features 9 .*1 are left"),
        ({"layer_shapes": {"lin": [9, 13]}, "r": 2}, r"layer_shapes must be \[9, 12\].*\[9, 13\] \(lin\)"),
    ],
)
def test_settings_that_do_not_fit_the_layer_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        adapted_layer(torch.randn(9, 12), **settings)


def test_bat_needs_a_base_that_can_be_read(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_ext.adapters import _base
    from tests.contracts.test_quantized import Unreadable

    monkeypatch.setattr(_base, "resolve_quantization_backend", lambda *_, **__: Unreadable())
    get_peft_model(tiny_llama(), BoneConfig(target_modules=["q_proj"], r=4))
    with pytest.raises(ValueError, match=r"q_proj: stand-in weights cannot be read back"):
        get_peft_model(tiny_llama(), BoneConfig(target_modules=["q_proj"], r=4, form="bat"))


def test_injection_leaves_the_users_config_alone() -> None:
    config = BoneConfig(target_modules=["lin"], r=2)
    model = get_peft_model(OneLayer(torch.randn(4, 6)), config)
    assert config.layer_shapes == {}
    assert model.peft_config["default"].layer_shapes == {"lin": [4, 6]}


# Checkpoints of PEFT 0.14 to 0.18 -----------------------------------------------------------------


def old_checkpoint(folder: Path, model: nn.Module, *, r: int = 8, dims: int = 2, **settings: Any) -> Path:
    """Write a checkpoint for q_proj and down_proj as PEFT's BONE did, with random blocks."""
    folder.mkdir()
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "exclude_modules": None,
        "inference_mode": True,
        "init_weights": "bat" if dims == 3 else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "BONE",
        "r": r,
        "revision": None,
        "target_modules": ["down_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            out = module.out_features
            shape = (r, out) if dims == 2 else (out // r, r, r)
            tensors[f"base_model.model.{name}.bone_block"] = 0.05 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def expected_logits(model: nn.Module, folder: Path) -> Tensor:
    for key, block in load_file(folder / "adapter_model.safetensors").items():
        weight = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".bone_block")).weight
        weight.data = reference.chained(weight.data, [("plain" if block.ndim == 2 else "bat", block)])
    return logits(model)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_old_checkpoint_loads(dims: int, low_cpu_mem_usage: bool, tiny_llama: Any, tmp_path: Path) -> None:
    folder = old_checkpoint(tmp_path / "old", tiny_llama(), dims=dims, peft_version="0.18.0", later_field=1)
    with pytest.warns(UserWarning, match="later_field"):
        loaded = PeftModel.from_pretrained(tiny_llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits(loaded), expected_logits(tiny_llama(), folder), atol=1e-5, rtol=1e-5)
    assert loaded.peft_config["default"].form == ("bat" if dims == 3 else "plain")
    loaded.save_pretrained(tmp_path / "new")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "new")
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize(("dims", "said"), [(3, True), (3, False), (2, "bat")])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_tensors_decide_the_form(
    dims: int, said: Any, low_cpu_mem_usage: bool, tiny_llama: Any, tmp_path: Path
) -> None:
    folder = old_checkpoint(tmp_path / "old", tiny_llama(), dims=dims, init_weights=said)
    form = "bat" if dims == 3 else "plain"
    with pytest.warns(UserWarning, match=f"tensors are of the {form} form") as caught:
        loaded = PeftModel.from_pretrained(
            tiny_llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
        )
    assert len([w for w in caught if "form" in str(w.message)]) == 1
    torch.testing.assert_close(logits(loaded), expected_logits(tiny_llama(), folder), atol=1e-5, rtol=1e-5)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, _ in loaded.named_parameters() if "bone_block" in n
    }
    loaded.save_pretrained(tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "new")
    assert torch.equal(logits(again), logits(loaded))
    assert not any(p.requires_grad for p in again.parameters())


def change(folder: Path, ending: str, value: Tensor) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in sorted(tensors) if ending in key)
    save_file({**tensors, key: value}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "value",
    [torch.zeros(8), torch.zeros(16, 4, 4), torch.zeros(4, 64), torch.zeros(8, 48)],
    ids=["one dimension", "of another form", "of another r", "of another layer"],
)
@pytest.mark.parametrize("route", ["load", "convert"])
def test_contradictory_tensors_are_named(route: str, value: Tensor, tiny_llama: Any, tmp_path: Path) -> None:
    folder = old_checkpoint(tmp_path / "old", tiny_llama())
    change(folder, "layers.1.mlp.down_proj", value)
    routes = {
        "load": lambda: PeftModel.from_pretrained(tiny_llama(), folder),
        "convert": lambda: convert_bone_checkpoint(folder, tmp_path / "new", "lora", base_model=tiny_llama()),
    }
    with pytest.raises(ValueError, match=r"down_proj\.bone_block"):
        routes[route]()
    assert not (tmp_path / "new").exists()


def test_bin_checkpoint_loads_without_unpickling_objects(tiny_llama: Any, tmp_path: Path) -> None:
    folder = old_checkpoint(tmp_path / "old", tiny_llama())
    expected = expected_logits(tiny_llama(), folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), folder)), expected)
    convert_bone_checkpoint(folder, tmp_path / "miss")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "miss")), expected)
    torch.save({"x": object}, folder / "adapter_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        PeftModel.from_pretrained(tiny_llama(), folder)


@pytest.mark.parametrize("bias", ["all", "bone_only", "Bone_only"])
def test_old_checkpoint_that_lacks_its_biases_loads_with_a_warning(
    bias: str, tiny_llama: Any, tmp_path: Path
) -> None:
    folder = old_checkpoint(tmp_path / "old", tiny_llama(attention_bias=True), bias=bias)
    with pytest.warns(UserWarning, match="never saved the biases"):
        loaded = PeftModel.from_pretrained(tiny_llama(attention_bias=True), folder, is_trainable=True)
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if n.endswith("bias"))
    convert_bone_checkpoint(folder, tmp_path / "miss")
    written = json.loads((tmp_path / "miss" / "adapter_config.json").read_text())["bias"]
    assert written == ("all" if bias == "all" else "MiSS_only")
    convert_bone_checkpoint(folder, tmp_path / "lora", "lora", base_model=tiny_llama(attention_bias=True))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["bias"] == "none"


@pytest.mark.parametrize("bias", ["all", "Bone_only"])
def test_old_checkpoint_that_has_its_biases_loads_them(bias: str, tiny_llama: Any, tmp_path: Path) -> None:
    folder = old_checkpoint(tmp_path / "old", tiny_llama(attention_bias=True), bias=bias)
    tensors = load_file(folder / "adapter_model.safetensors")
    names = ("q",) if bias == "Bone_only" else ("q", "k", "v", "o")
    for layer in range(2):
        for name in names:
            part = ".base_layer" if name == "q" else ""
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj{part}.bias"
            tensors[key] = torch.full((32 if name in "kv" else 64,), 0.1 + layer)
    save_file(tensors, folder / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(tiny_llama(attention_bias=True), folder)
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in tensors.items() if key.endswith(".bias"))
    convert_bone_checkpoint(folder, tmp_path / "lora", "lora", base_model=tiny_llama(attention_bias=True))
    lora = PeftModel.from_pretrained(tiny_llama(attention_bias=True), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(loaded), atol=1e-5, rtol=1e-5)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_llama(attention_bias=True)))


@pytest.mark.parametrize(("dims", "said"), [(2, True), (3, "bat"), (3, True)])
def test_converted_to_miss_it_gives_equal_logits(
    dims: int, said: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    model.bone_head = nn.Linear(4, 4)  # only the last part of a key is the tensor's name
    folder = old_checkpoint(tmp_path / "old", model, dims=dims, init_weights=said)
    tensors = load_file(folder / "adapter_model.safetensors")
    extra = {"base_model.model.bone_head.weight": torch.ones(4, 4)}
    save_file({**tensors, **extra}, folder / "adapter_model.safetensors")
    convert_bone_checkpoint(folder, tmp_path / "miss", "miss")
    written = load_file(tmp_path / "miss" / "adapter_model.safetensors")
    assert set(written) == {k.replace("bone_block", "miss_block") for k in tensors} | set(extra)
    save_file(tensors, folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the form, tested above
        loaded = PeftModel.from_pretrained(tiny_llama(), folder)
    miss = PeftModel.from_pretrained(tiny_llama(), tmp_path / "miss")
    assert miss.peft_config["default"].peft_type == "MISS"
    torch.testing.assert_close(logits(loaded), logits(miss), atol=1e-5, rtol=1e-5)


def test_converted_to_lora_it_has_the_updates_bits(tiny_llama: Any, tmp_path: Path) -> None:
    folder = old_checkpoint(tmp_path / "old", tiny_llama(), modules_to_save=["lm_head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    head = {"base_model.model.lm_head.weight": torch.randn(256, 64)}
    save_file({**tensors, **head}, folder / "adapter_model.safetensors")
    with torch.device("meta"):
        base = tiny_llama()
    convert_bone_checkpoint(folder, tmp_path / "lora", "lora", base_model=base)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    bone = PeftModel.from_pretrained(tiny_llama(), folder)
    torch.testing.assert_close(logits(lora), logits(bone), atol=1e-5, rtol=1e-5)
    for layer in (m for m in bone.modules() if isinstance(m, BoneLinear)):
        twin = lora.base_model.model.get_submodule(layer.module_name)
        assert torch.equal(twin.get_delta_weight("default"), layer.delta_weight("default"))


def test_new_checkpoints_convert_too(tiny_llama: Any, tmp_path: Path) -> None:
    for name, settings in (("plain", {"r": 24}), ("mini", {"r": 4, "form": "mini", "mini_r": 8})):
        config = BoneConfig(target_modules=["q_proj", "v_proj"], init_weights=False, **settings)
        adapted = get_peft_model(tiny_llama(), config)
        adapted.save_pretrained(tmp_path / name)
        for to in ("miss", "lora"):
            convert_bone_checkpoint(tmp_path / name, tmp_path / f"{name}-{to}", to)
            loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / f"{name}-{to}")
            assert loaded.peft_config["default"].peft_type == to.upper()
            torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-4, rtol=1e-4)


def test_conversions_that_cannot_be_are_refused(tiny_llama: Any, tmp_path: Path) -> None:
    old = old_checkpoint(tmp_path / "old", tiny_llama())
    bat = old_checkpoint(tmp_path / "bat", tiny_llama(), dims=3)
    for source, to, base, text in (
        (old, "lora", None, r"base_model must be given.*q_proj|down_proj"),
        (old, "lora", nn.Linear(2, 2), "base_model must be a model with a linear layer"),
        (bat, "lora", tiny_llama(), "to must be 'miss' for the bat form"),
        (old, "loar", None, "did you mean 'lora'"),
        (tmp_path / "nowhere", "miss", None, "src must be a folder with an adapter_config"),
    ):
        with pytest.raises(ValueError, match=text):
            convert_bone_checkpoint(source, tmp_path / "new", to, base_model=base)
        assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="dst must be a new or empty folder"):
        convert_bone_checkpoint(old, tmp_path / "full")
    with pytest.raises(ValueError, match="layer_shapes must be known"):
        export_to_lora(old, tmp_path / "new")
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="peft_type must be 'BONE', got 'LORA'"):
        convert_bone_checkpoint(tmp_path / "lora", tmp_path / "new")


def test_one_r_for_all_layers_in_miss(tiny_llama: Any, tmp_path: Path) -> None:
    config = BoneConfig(target_modules=["q_proj", "v_proj"], r=4, rank_pattern={"v_proj": 2})
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "bone")
    with pytest.raises(ValueError, match="rank_pattern must be empty"):
        convert_bone_checkpoint(tmp_path / "bone", tmp_path / "miss")
    convert_bone_checkpoint(tmp_path / "bone", tmp_path / "lora", "lora")
    ranks = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").peft_config["default"]
    assert {ranks.r, *ranks.rank_pattern.values()} == {2, 4}
