"""Properties of SORSA and of the principal-component family under it."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_ext.adapters import SorsaConfig, export_to_lora, orthonormality
from hf_ext.adapters.sorsa import ORTHONORMALITY, SorsaLinear, orthonormality_gradients
from tests.adapters.models import IDS, Mixed, OneLayer, logits, steps
from tests.reference.sorsa import ReferenceSorsa


def adapted_layer(weight: Tensor, **settings: Any) -> tuple[PeftModel, SorsaLinear]:
    model = get_peft_model(OneLayer(weight), SorsaConfig(target_modules=["lin"], **settings))
    return model, model.base_model.model.lin


# The hand-computed case and the identities --------------------------------------------------------


def test_penalty_of_the_hand_computed_case() -> None:
    a = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    b = torch.eye(3)[:, :2]
    norms, (grad_a, grad_b) = orthonormality_gradients([a, b], [True, False], eps=0.0)
    assert [float(n) for n in norms] == [3.0, 0.0]  # R = (3 + 0) / 2 = 1.5
    assert torch.equal(grad_a / 2, torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(grad_b, torch.zeros(3, 2))


def test_penalty_and_its_mean_over_a_model() -> None:
    model, layer = adapted_layer(torch.diag(torch.tensor([3.0, 2.0, 1.0])), r=2)
    assert orthonormality(model) == pytest.approx(0.0, abs=1e-6)
    layer.sorsa_A["default"].data = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    layer.sorsa_B["default"].data = torch.eye(3)[:, :2].clone()
    assert orthonormality(model) == pytest.approx(1.5, abs=1e-6)


def test_smoothing_removes_the_gradient_of_rounding_noise() -> None:
    rows = torch.eye(2, 5)
    norms, (gradient,) = orthonormality_gradients([rows], [True], eps=1e-4)
    assert float(norms[0]) == 0.0
    assert torch.equal(gradient, torch.zeros(2, 5))
    noisy = torch.linalg.qr(torch.randn(64, 8)).Q.T.contiguous()  # orthonormal to fp32 rounding
    norms, (sharp,) = orthonormality_gradients([noisy], [True], eps=0.0)
    assert float(norms[0]) < 1e-5
    assert float(sharp.norm()) == pytest.approx(2.0, rel=0.01)
    _, (smooth,) = orthonormality_gradients([noisy], [True], eps=1e-4)
    assert float(smooth.norm()) < 0.05


def test_start_of_a_diagonal_weight() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    model, layer = adapted_layer(weight, r=2)
    torch.testing.assert_close(layer.sorsa_S["default"].data, torch.tensor([3.0, 2.0]))
    residual = layer.get_base_layer().weight - layer.sorsa_U["default"] @ layer.sorsa_C["default"]
    torch.testing.assert_close(residual, torch.diag(torch.tensor([0.0, 0.0, 1.0])), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(torch.eye(3)), weight.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["norm", "squared"])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_closed_form_gradient_is_autograds(form: str, eps: float) -> None:
    for shape, rows in (((4, 9), True), ((7, 3), False), ((4, 9), True)):
        factor = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        gram = factor @ factor.T if rows else factor.T @ factor
        square = (gram - torch.eye(len(gram), dtype=torch.float64)).square().sum()
        e = eps * math.sqrt(len(gram))
        value = square if form == "squared" else (square + e * e).sqrt() - e
        (expected,) = torch.autograd.grad(value, factor)
        norms, (gradient,) = orthonormality_gradients([factor.detach()], [rows], eps, form)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(norms[0], value.detach(), rtol=1e-9, atol=1e-12)


def test_batching_by_shape_keeps_each_factors_own_gradient() -> None:
    factors = [torch.randn(3, 8), torch.randn(8, 3), torch.randn(3, 8), torch.randn(2, 8), torch.randn(8, 8)]
    rows = [True, False, True, True, False]
    norms, gradients = orthonormality_gradients(factors, rows, eps=1e-4)
    for factor, by_rows, norm, gradient in zip(factors, rows, norms, gradients, strict=True):
        (alone,), (own,) = orthonormality_gradients([factor], [by_rows], eps=1e-4)
        torch.testing.assert_close(norm, alone)
        torch.testing.assert_close(gradient, own)


def test_singular_value_gradient_is_the_diagonal_of_u_g_v() -> None:
    weight = torch.randn(3, 3)
    model, layer = adapted_layer(weight, r=3, gamma=0.0)
    x, target = torch.randn(5, 3), torch.randn(5, 3)
    effective = weight.clone().requires_grad_()
    ((x @ effective.T - target) ** 2).sum().backward()
    ((model(x) - target) ** 2).sum().backward()
    b, a, s = (getattr(layer, n)["default"].detach() for n in ("sorsa_B", "sorsa_A", "sorsa_S"))
    assert effective.grad is not None
    torch.testing.assert_close(
        layer.sorsa_S["default"].grad, torch.diag(b.T @ effective.grad @ a.T), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        layer.sorsa_A["default"].grad, torch.diag(s) @ b.T @ effective.grad, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("base_mode", ["projected", "residual"])
def test_training_follows_the_reference(alpha: float | None, base_mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(10, 7, generator=generator)
    gamma, lr = 0.02, 0.05
    model, layer = adapted_layer(weight, r=4, alpha=alpha, gamma=gamma, ortho_eps=1e-2, base_mode=base_mode)
    reference = ReferenceSorsa(weight, 4, alpha, eps=1e-2)
    # The reference's signs are LAPACK's; start both from one decomposition.
    scale = layer.scale["default"]
    for name, own in (("sorsa_A", reference.a), ("sorsa_S", reference.sigma), ("sorsa_B", reference.b)):
        own.data.copy_(getattr(layer, name)["default"].data)
    assert scale == reference.s
    torch.testing.assert_close(
        layer.sorsa_B["default"] @ layer.sorsa_S["default"].diag() * scale,
        layer.sorsa_U["default"] @ (layer.sorsa_S["default"] * scale).diag(),
    )
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
        torch.optim.AdamW([reference.a, reference.sigma, reference.b], lr=lr, weight_decay=0.0),
    ]
    for _ in range(100):
        x, target = torch.randn(6, 7, generator=generator), torch.randn(6, 10, generator=generator)
        (model(x) - target).square().mean().backward()
        # In the reference R is part of the loss: without clipping that is the same.
        ((reference.forward(x) - target).square().mean() + gamma / lr * reference.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    merged = layer.get_base_layer().weight + layer.stored_delta(["default"])
    torch.testing.assert_close(merged, reference.weight(), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(layer.sorsa_S["default"], reference.sigma, atol=2e-4, rtol=1e-3)


# The penalty in any loop --------------------------------------------------------------------------


def penalty_step(layer: SorsaLinear, lr: float, gamma: float) -> dict[str, Tensor]:
    """What one SGD step of the penalty alone subtracts, by the formula."""
    a, b = layer.sorsa_A["default"].detach(), layer.sorsa_B["default"].detach()
    config = layer.configs["default"]
    _, (grad_a, grad_b) = orthonormality_gradients([a, b], [True, False], config.ortho_eps)
    factor = lr * gamma / lr / 2  # eta * (gamma / eta_max), mean over the two matrices
    return {"sorsa_A": factor * grad_a, "sorsa_B": factor * grad_b}


def skewed(**settings: Any) -> tuple[PeftModel, SorsaLinear]:
    model, layer = adapted_layer(torch.randn(6, 5), r=3, **settings)
    for name in ("sorsa_A", "sorsa_B"):
        getattr(layer, name)["default"].data += 0.3 * torch.randn_like(getattr(layer, name)["default"])
    return model, layer


@pytest.mark.parametrize("clip", [None, 1e-9])
def test_sgd_step_without_a_task_gradient_is_the_penaltys(clip: float | None) -> None:
    model, layer = skewed(gamma=0.01)
    expected = penalty_step(layer, lr=0.1, gamma=0.01)
    before = {name: getattr(layer, name)["default"].detach().clone() for name in expected}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(torch.randn(4, 5)).sum() * (0.0 if clip is None else 1.0)).backward()
    if clip is not None:  # clipped to nothing: the penalty comes after clipping
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    for name, change in expected.items():
        moved = before[name] - getattr(layer, name)["default"].detach()
        torch.testing.assert_close(moved, change, rtol=1e-5, atol=1e-7)


def test_strength_follows_the_schedule_relative_to_its_peak() -> None:
    model, layer = skewed(gamma=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.25, 1.0][step])
    expected = penalty_step(layer, lr=0.1, gamma=0.01)["sorsa_A"] * 0.25  # gamma * eta / eta_max
    before = layer.sorsa_A["default"].detach().clone()
    (model(torch.zeros(1, 5)) * 0).sum().backward()
    optimizer.step()
    scheduler.step()
    torch.testing.assert_close(before - layer.sorsa_A["default"].detach(), expected, rtol=1e-5, atol=1e-7)


def test_gradient_accumulation_adds_the_penalty_once() -> None:
    moved = []
    for parts in (1, 4):
        torch.manual_seed(4)
        model, layer = skewed(gamma=0.05)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(8, 5)
        for part in x.chunk(parts):
            (model(part).sum() / 8).backward()
        optimizer.step()
        moved.append(layer.sorsa_A["default"].detach().clone())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=1e-6)


def test_loss_scaling_leaves_the_penalty_alone() -> None:
    results = []
    for scaled in (False, True):
        torch.manual_seed(4)
        model, layer = skewed(gamma=0.05)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = model(torch.ones(2, 5)).sum()
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        else:
            loss.backward()
            optimizer.step()
        results.append(layer.sorsa_A["default"].detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_gamma_zero_is_no_penalty_at_all() -> None:
    model, layer = skewed(gamma=0.0)
    before = layer.sorsa_A["default"].detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(torch.zeros(1, 5)) * 0).sum().backward()
    optimizer.step()
    assert torch.equal(layer.sorsa_A["default"], before)


def test_frozen_factors_and_inactive_adapters_are_left_alone() -> None:
    model, layer = skewed(gamma=0.05)
    model.add_adapter("second", SorsaConfig(r=3, gamma=0.05, target_modules=["lin"]))
    layer.sorsa_A["second"].data += 0.5
    layer.sorsa_B["default"].requires_grad_(False)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(torch.zeros(1, 5)) * 0).sum().backward()
    optimizer.step()
    changed = {key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"sorsa_A.default"}


def test_mean_is_over_the_matrices_of_one_adapter(tiny_llama: Any) -> None:
    adapted = get_peft_model(tiny_llama(), SorsaConfig(r=4, gamma=0.1, target_modules=["q_proj"]))
    layer = next(m for m in adapted.modules() if isinstance(m, SorsaLinear))
    layer.sorsa_A["default"].data *= 2.0
    a = layer.sorsa_A["default"].detach().clone()
    _, (gradient,) = orthonormality_gradients([a], [True], 1e-4)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()  # no task gradient at all
    torch.testing.assert_close(
        a - layer.sorsa_A["default"].detach(), 0.1 / 4 * gradient
    )  # two layers, four matrices


def test_copied_and_unpickled_models_carry_the_penalty() -> None:
    model, _ = skewed(gamma=0.05)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = twin.base_model.model.lin
        expected = penalty_step(layer, lr=0.1, gamma=0.05)["sorsa_A"]
        before = layer.sorsa_A["default"].detach().clone()
        (twin(torch.zeros(1, 5)) * 0).sum().backward()
        torch.optim.SGD(twin.parameters(), lr=0.1).step()
        torch.testing.assert_close(before - layer.sorsa_A["default"].detach(), expected, rtol=1e-5, atol=1e-7)


def test_dead_models_are_forgotten() -> None:
    gc.collect()
    count = len(ORTHONORMALITY.modules())
    model, layer = skewed()
    assert len(ORTHONORMALITY.modules()) == count + 1
    del model, layer
    gc.collect()
    assert len(ORTHONORMALITY.modules()) == count


def test_zero_peak_rate_is_refused_and_weight_decay_warned_of() -> None:
    model, _ = skewed(gamma=0.05)
    (model(torch.zeros(1, 5)) * 0).sum().backward()
    with pytest.raises(ValueError, match="gamma must be 0 where the peak learning rate is 0"):
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    with pytest.warns(UserWarning, match="weight_decay"):
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01).step()


def test_penalty_keeps_factors_nearer_to_orthonormal(tiny_llama: Any) -> None:
    ends = []
    for gamma in (0.0, 4e-4, 4e-2):
        adapted = get_peft_model(tiny_llama(), SorsaConfig(r=4, gamma=gamma, target_modules="all-linear"))
        steps(adapted, 20, lr=3e-3)
        ends.append(orthonormality(adapted))
    assert ends[2] < 0.5 * ends[0]
    assert ends[1] < ends[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_applies_the_penalty_after_clipping(
    accumulation: int, tiny_llama: Any, tmp_path: Path
) -> None:
    from datasets import Dataset

    adapted = get_peft_model(tiny_llama(), SorsaConfig(r=4, gamma=0.1, target_modules=["q_proj"]))
    layer = next(m for m in adapted.modules() if isinstance(m, SorsaLinear))
    layer.sorsa_A["default"].data *= 2.0
    a = layer.sorsa_A["default"].detach().clone()
    _, (gradient,) = orthonormality_gradients([a], [True], 1e-4)
    data = Dataset.from_dict({"input_ids": IDS.tolist() * 2, "labels": IDS.tolist() * 2})
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=1e-9,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    Trainer(adapted, arguments, train_dataset=data).train()
    torch.testing.assert_close(
        a - layer.sorsa_A["default"].detach(), 0.1 / 4 * gradient, rtol=1e-5, atol=1e-7
    )


# Base modes ---------------------------------------------------------------------------------------


def test_residual_and_projected_agree_after_training(tiny_llama: Any) -> None:
    outputs = []
    for mode in ("projected", "residual"):
        adapted = get_peft_model(tiny_llama(), SorsaConfig(r=8, base_mode=mode, target_modules="all-linear"))
        steps(adapted, 10, lr=1e-3)
        outputs.append(logits(adapted))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def residual_model(model: nn.Module, **settings: Any) -> PeftModel:
    return get_peft_model(
        model, SorsaConfig(r=8, base_mode="residual", target_modules="all-linear", **settings)
    )


def test_residual_is_written_into_the_base(tiny_llama: Any) -> None:
    adapted = residual_model(tiny_llama())
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    original = tiny_llama().model.layers[0].self_attn.q_proj.weight
    sigma = torch.linalg.svdvals(original)
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight)[:-8], sigma[8:], atol=1e-4, rtol=1e-4)


def test_residual_disable_delete_unload_give_the_base_back(tiny_llama: Any) -> None:
    expected = logits(tiny_llama())
    adapted = residual_model(tiny_llama())
    steps(adapted, 3)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
    adapted.add_adapter("second", SorsaConfig(r=4, target_modules="all-linear"))
    adapted.set_adapter("second")
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)  # starts at the base as well
    adapted.delete_adapter("default")
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
    adapted = residual_model(tiny_llama())
    steps(adapted, 3)
    torch.testing.assert_close(logits(adapted.unload()), expected, atol=1e-5, rtol=1e-5)


def test_residual_unused_is_undone_exactly(tiny_llama: Any) -> None:
    assert torch.equal(logits(residual_model(tiny_llama()).unload()), logits(tiny_llama()))


def test_residual_composes_and_merges_with_a_second_adapter(tiny_llama: Any) -> None:
    adapted = residual_model(tiny_llama())
    steps(adapted, 3)
    adapted.add_adapter("second", SorsaConfig(r=4, target_modules="all-linear"))
    adapted.set_adapter("second")
    steps(adapted, 3)
    second = logits(adapted)
    for names in (["second"], ["default", "second"]):
        adapted.base_model.set_adapter(names)
        expected = logits(adapted)
        adapted.merge_adapter()
        torch.testing.assert_close(logits(adapted), expected, atol=2e-5, rtol=1e-4)
        adapted.unmerge_adapter()
        assert torch.equal(logits(adapted), expected)
    adapted.base_model.set_adapter(["second"])
    assert torch.equal(logits(adapted), second)


def test_second_residual_is_refused(tiny_llama: Any) -> None:
    adapted = residual_model(tiny_llama())
    with pytest.raises(ValueError, match=r"base_mode must be 'projected' beside adapter 'default'"):
        adapted.add_adapter("second", SorsaConfig(r=4, base_mode="residual", target_modules="all-linear"))
    assert list(adapted.peft_config) == ["default"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_residual_reloads_bit_equal(low_cpu_mem_usage: bool, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = residual_model(tiny_llama())
    steps(adapted, 3)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(adapted))


def test_residual_of_another_decomposition_is_rebuilt_at_load(tiny_llama: Any, tmp_path: Path) -> None:
    # A checkpoint from a machine whose decomposition came out otherwise: another seed and no Krylov steps.
    adapted = residual_model(tiny_llama(), seed=9, n_iter=0, oversample=0)
    steps(adapted, 3)
    adapted.save_pretrained(tmp_path)
    expected = logits(adapted)
    fresh = residual_model(tiny_llama())
    fresh.load_adapter(tmp_path, "default")
    assert torch.equal(logits(fresh), expected)
    used = residual_model(tiny_llama())
    steps(used, 2)
    used.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(used), expected, atol=1e-5, rtol=1e-4)


def test_residual_state_of_the_whole_model_is_taken_as_it_is(tiny_llama: Any) -> None:
    adapted = residual_model(tiny_llama(), seed=9, n_iter=0, oversample=0)
    steps(adapted, 3)
    other = residual_model(tiny_llama(seed=4))
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(logits(other), logits(adapted))
    with other.disable_adapter():
        torch.testing.assert_close(logits(other), logits(tiny_llama()), atol=1e-5, rtol=1e-5)


def test_residual_merge_and_export(tiny_llama: Any, tmp_path: Path) -> None:
    adapted = residual_model(tiny_llama())
    steps(adapted, 3)
    expected = logits(adapted)
    export_to_lora(adapted, tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


# Saving without the basis -------------------------------------------------------------------------


@pytest.mark.parametrize("base_mode", ["projected", "residual"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_without_basis(base_mode: str, low_cpu_mem_usage: bool, tiny_llama: Any, tmp_path: Path) -> None:
    config = SorsaConfig(r=4, base_mode=base_mode, save_basis=False, target_modules=["q_proj", "up_proj"])
    adapted = get_peft_model(tiny_llama(), config)
    steps(adapted, 3)
    adapted.save_pretrained(tmp_path)
    assert not any(
        "sorsa_U" in key or "sorsa_C" in key for key in load_file(tmp_path / "adapter_model.safetensors")
    )
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"fingerprint.*not the base model"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(ValueError, match="save_basis=False is exported from the loaded model"):
        export_to_lora(tmp_path, tmp_path / "lora")


# Starts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_iter", [0, 1, 4, 9])
@pytest.mark.parametrize("alpha", [None, 32.0])
def test_start_is_exact_whatever_the_decompositions_quality(n_iter: int, alpha: float | None) -> None:
    weight = torch.randn(300, 200)
    model, layer = adapted_layer(weight, r=8, n_iter=n_iter, oversample=2, alpha=alpha)
    x = torch.randn(16, 200)
    torch.testing.assert_close(model(x), x @ weight.T, atol=1e-4, rtol=1e-5)
    u, c = layer.offset("default")
    torch.testing.assert_close(u.T @ weight, c, atol=2e-4, rtol=1e-4)


def test_scaled_start_divides_the_singular_values() -> None:
    weight = torch.diag(torch.tensor([4.0, 1.0]))
    _, plain = adapted_layer(weight, r=1)
    _, scaled = adapted_layer(weight, r=1, alpha=2.0)
    assert float(plain.sorsa_S["default"]) == pytest.approx(4.0)
    assert float(scaled.sorsa_S["default"]) == pytest.approx(2.0)
    torch.testing.assert_close(plain.sorsa_A["default"], scaled.sorsa_A["default"])
    torch.testing.assert_close(scaled.delta_weight("default"), torch.zeros(2, 2), atol=1e-6, rtol=0)


def test_zero_weight_starts_at_zero() -> None:
    model, layer = adapted_layer(torch.zeros(6, 5), r=2)
    assert torch.equal(model(torch.randn(3, 5)), torch.zeros(3, 6))
    assert torch.equal(layer.sorsa_S["default"], torch.zeros(2))
    assert orthonormality(model) < 1e-5


def test_full_rank_leaves_no_residual() -> None:
    weight = torch.randn(6, 4)
    model, layer = adapted_layer(weight, r=4)
    u, c = layer.offset("default")
    torch.testing.assert_close(u @ c, weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(torch.eye(4)), weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_before_anything_changes(value: float, tiny_llama: Any) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"weight must be finite.*model\.layers\.1\.mlp\.up_proj"):
        get_peft_model(model, SorsaConfig(r=4, target_modules="all-linear"))
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_bias_is_kept() -> None:
    base = OneLayer(torch.randn(4, 3), bias=True)
    x = torch.randn(2, 3)
    expected = base(x)
    for mode in ("projected", "residual"):
        model = get_peft_model(copy.deepcopy(base), SorsaConfig(r=2, base_mode=mode, target_modules=["lin"]))
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "mark", ["ds_id", "_hp_mapping"]
)  # what DeepSpeed ZeRO-3 and ZeRO-1/2 leave on parameters
def test_engines_that_step_copies_are_refused_only_with_a_penalty(mark: str) -> None:
    for gamma in (0.05, 0.0):
        model, layer = skewed(gamma=gamma)
        setattr(layer.sorsa_A["default"], mark, 1)
        copy_of_all = nn.Parameter(torch.zeros(8))
        copy_of_all.grad = torch.ones(8)
        optimizer = torch.optim.SGD([copy_of_all], lr=0.1)
        if gamma:
            with pytest.raises(RuntimeError, match=r"SORSA's gamma.*DeepSpeed ZeRO or FSDP1"):
                optimizer.step()
        else:
            optimizer.step()
            assert float(copy_of_all.detach().sum()) < 0
        del model, layer
        gc.collect()


# States that must stay consistent --------------------------------------------------


def test_adding_a_reference_as_trl_does(tiny_llama: Any) -> None:
    # DPO, GRPO and KTO trainers give the very config object of the trained adapter to their reference.
    adapted = get_peft_model(tiny_llama(), SorsaConfig(r=4, target_modules="all-linear"))
    adapted.add_adapter("ref", adapted.peft_config["default"])
    steps(adapted, 2)
    adapted.set_adapter("ref")
    torch.testing.assert_close(logits(adapted), logits(tiny_llama()), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("base_mode", ["projected", "residual"])
def test_failed_injection_leaves_the_weights(base_mode: str, tiny_llama: Any) -> None:
    model = tiny_llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="r must be at most 32"):
        get_peft_model(model, SorsaConfig(r=40, base_mode=base_mode, target_modules="all-linear"))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_refused_load_leaves_the_weights(tiny_llama: Any, tmp_path: Path) -> None:
    config = SorsaConfig(r=4, base_mode="residual", save_basis=False, target_modules=["q_proj", "up_proj"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    other = get_peft_model(tiny_llama(seed=1), copy.deepcopy(config))
    expected = logits(other)
    with pytest.raises(ValueError, match="not the base model"):
        other.load_adapter(tmp_path, "default")  # onto an existing adapter, as a Trainer resumes
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("first", ["all-linear", ["q_proj"]])
def test_residual_beside_an_adapter_with_other_targets(first: Any, tiny_llama: Any) -> None:
    second = ["q_proj"] if first == "all-linear" else "all-linear"
    adapted = get_peft_model(tiny_llama(), SorsaConfig(r=8, base_mode="residual", target_modules=first))
    steps(adapted, 2)
    adapted.add_adapter("second", SorsaConfig(r=4, target_modules=second))
    adapted.set_adapter("second")
    steps(adapted, 2)
    expected = logits(adapted)
    adapted.base_model.set_adapter(["second"])
    assert torch.equal(logits(adapted), expected)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=2e-5, rtol=1e-4)


def test_unknown_names_to_merge_are_refused(tiny_llama: Any) -> None:
    adapted = residual_model(tiny_llama())
    for call in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match="adapter_names 'defaults' is unknown; did you mean 'default'"):
            call(adapter_names=["defaults"])


def test_refused_safe_merge_and_unload_leaves_every_layer(tiny_llama: Any) -> None:
    adapted = residual_model(tiny_llama())
    steps(adapted, 2)
    expected = logits(adapted)
    layer = [m for m in adapted.modules() if isinstance(m, SorsaLinear)][6]
    kept = layer.sorsa_S["default"].data.clone()
    layer.sorsa_S["default"].data[0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        adapted.merge_and_unload(safe_merge=True)
    layer.sorsa_S["default"].data.copy_(kept)
    assert torch.equal(logits(adapted), expected)


def test_safe_merge_sees_what_overflows_in_the_bases_dtype(tiny_llama: Any) -> None:
    config = SorsaConfig(r=4, target_modules=["q_proj"])
    adapted = get_peft_model(tiny_llama(dtype=torch.float16), config)
    layer = next(m for m in adapted.modules() if isinstance(m, SorsaLinear))
    layer.sorsa_S["default"].data *= 1e7
    with pytest.raises(ValueError, match="NaN or infinite"):
        adapted.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("gamma", [4e-4, 0.0])
def test_trained_model_pickles(gamma: float, tiny_llama: Any) -> None:
    adapted = get_peft_model(tiny_llama(), SorsaConfig(r=4, gamma=gamma, target_modules=["q_proj"]))
    steps(adapted, 1)
    assert torch.equal(logits(pickle.loads(pickle.dumps(adapted))), logits(adapted))


def test_compiled_optimizer_steps_apply_the_penalty() -> None:
    ends = []
    for compiled in (False, True):
        torch.manual_seed(4)
        model, layer = skewed(gamma=0.05)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            (model(torch.zeros(1, 5)) * 0).sum().backward()
            step()
            optimizer.zero_grad()
        ends.append(layer.sorsa_A["default"].detach().clone())
    torch.testing.assert_close(ends[0], ends[1])


def test_trained_tensors_cast_as_trl_casts_them_still_run(tiny_llama: Any) -> None:
    adapted = get_peft_model(tiny_llama(), SorsaConfig(r=4, target_modules="all-linear"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    torch.testing.assert_close(logits(adapted), logits(tiny_llama()), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("scheduler", ["one-cycle", "constant"])
def test_one_cycle_schedules_peak_at_their_maximum(scheduler: str) -> None:
    model, layer = skewed(gamma=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if scheduler == "one-cycle":
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)
    rate = optimizer.param_groups[0]["lr"]
    expected = penalty_step(layer, lr=0.1, gamma=0.01)["sorsa_A"] * rate / 0.1
    before = layer.sorsa_A["default"].detach().clone()
    (model(torch.zeros(1, 5)) * 0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(before - layer.sorsa_A["default"].detach(), expected, rtol=1e-4, atol=1e-7)


def test_optimizers_that_share_an_adapter_keep_its_mean() -> None:
    moved = []
    for shared in (False, True):
        torch.manual_seed(4)
        model, layer = skewed(gamma=0.05)
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [[p] for p in parameters] if shared else [parameters]
        (model(torch.zeros(1, 5)) * 0).sum().backward()
        for group in groups:
            torch.optim.SGD(group, lr=0.1).step()
        moved.append(layer.sorsa_A["default"].detach().clone())
    torch.testing.assert_close(moved[0], moved[1])


def test_one_config_object_does_not_tie_two_models() -> None:
    config = SorsaConfig(r=3, gamma=0.05, target_modules=["lin"])
    torch.manual_seed(4)
    models = [get_peft_model(OneLayer(torch.randn(6, 5)), config) for _ in range(2)]
    layer = models[0].base_model.model.lin
    layer.sorsa_A["default"].data += 0.3
    expected = penalty_step(layer, lr=0.1, gamma=0.05)["sorsa_A"]
    before = layer.sorsa_A["default"].detach().clone()
    torch.optim.SGD([p for m in models for p in m.parameters()], lr=0.1).step()
    torch.testing.assert_close(before - layer.sorsa_A["default"].detach(), expected, rtol=1e-4, atol=1e-7)


def test_disabled_adapter_gets_no_penalty() -> None:
    model, layer = skewed(gamma=0.05)
    before = layer.sorsa_A["default"].detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.disable_adapter():
        optimizer.step()
    assert torch.equal(layer.sorsa_A["default"], before)


def test_adding_to_a_merged_model_starts_from_its_base(tiny_llama: Any) -> None:
    adapted = get_peft_model(tiny_llama(), SorsaConfig(r=4, target_modules=["q_proj"]))
    steps(adapted, 2)
    adapted.merge_adapter()
    with pytest.warns(UserWarning, match="unmerging it to add an adapter"):
        adapted.add_adapter("second", SorsaConfig(r=4, base_mode="residual", target_modules=["q_proj"]))
    adapted.set_adapter("second")
    torch.testing.assert_close(logits(adapted), logits(tiny_llama()), atol=1e-5, rtol=1e-5)
    fresh = get_peft_model(tiny_llama(), SorsaConfig(r=4, target_modules=["q_proj"]))
    for old, new in zip(
        (m for m in adapted.modules() if isinstance(m, SorsaLinear)),
        (m for m in fresh.modules() if isinstance(m, SorsaLinear)),
        strict=True,
    ):
        assert torch.equal(old.sorsa_U["second"], new.sorsa_U["default"])


def test_second_start_beside_a_residual_is_that_of_the_original_weight(tiny_llama: Any) -> None:
    adapted = residual_model(tiny_llama())
    adapted.add_adapter("second", SorsaConfig(r=4, target_modules="all-linear"))
    fresh = get_peft_model(tiny_llama(), SorsaConfig(r=4, target_modules="all-linear"))
    for old, new in zip(
        (m for m in adapted.modules() if isinstance(m, SorsaLinear)),
        (m for m in fresh.modules() if isinstance(m, SorsaLinear)),
        strict=True,
    ):
        torch.testing.assert_close(old.sorsa_S["second"], new.sorsa_S["default"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merge", [False, True])
def test_casting_the_model_casts_what_is_restored(merge: bool, tiny_llama: Any) -> None:
    adapted = residual_model(tiny_llama())
    if merge:
        adapted.merge_adapter()
    adapted.to(torch.bfloat16)
    if merge:
        adapted.unmerge_adapter()
    base = adapted.unload()
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    expected = logits(tiny_llama(dtype=torch.bfloat16))
    torch.testing.assert_close(logits(base), expected, atol=5e-2, rtol=5e-2)


def test_original_weight_is_let_go_at_the_first_forward(tiny_llama: Any) -> None:
    adapted = residual_model(tiny_llama())
    layers = [m for m in adapted.modules() if isinstance(m, SorsaLinear)]
    assert all(layer._original is not None for layer in layers)
    logits(adapted)
    assert all(layer._original is None for layer in layers)


def test_residual_loaded_by_transformers(tiny_llama: Any, tmp_path: Path) -> None:
    adapted = residual_model(tiny_llama(), seed=9, n_iter=0, oversample=0)
    steps(adapted, 3)
    adapted.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), logits(adapted))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("gamma", float("inf"), ValueError),
        ("rank_pattern", {"q_proj": 2.5}, TypeError),
        ("target_modules", [1], TypeError),
        ("r", "eight", TypeError),
    ],
)
def test_settings_are_named_when_they_do_not_fit(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        SorsaConfig(**{field: value})


def test_text_that_spells_a_number_is_one() -> None:
    config = SorsaConfig(r="8", gamma="1e-3", dropout="0.1", seed="3")  # type: ignore[arg-type]
    assert (config.r, config.gamma, config.dropout, config.seed) == (8, 1e-3, 0.1, 3)


# Embeddings and convolutions -----------------------------------------------------------------------


def test_penalty_on_embeddings_and_convolutions_is_that_of_their_matrices() -> None:
    config = SorsaConfig(r=4, gamma=0.5, ortho_eps=0.0, target_modules=list(Mixed.targets))
    adapted = get_peft_model(Mixed(), config)  # type: ignore[arg-type]
    layers = [module for module in adapted.modules() if isinstance(module, SorsaLinear)]
    norms, expected = [], {}
    for layer in layers:
        for name in ("sorsa_A", "sorsa_B"):
            parameter = getattr(layer, name)["default"]
            parameter.data += 0.1 * torch.randn(parameter.shape)
            matrix = layer.adapter_tensors("default")[name].clone().requires_grad_()
            gram = matrix @ matrix.T if name == "sorsa_A" else matrix.T @ matrix
            norms.append((gram - torch.eye(4)).norm())
            (change,) = torch.autograd.grad(norms[-1], [matrix], retain_graph=True)
            expected[layer.module_name, name] = matrix.detach() - 0.5 / 10 * change
    assert orthonormality(adapted) == pytest.approx(float(torch.stack(norms).mean()), rel=1e-5)
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
    for layer in layers:
        for name in ("sorsa_A", "sorsa_B"):
            found = layer.adapter_tensors("default")[name]
            torch.testing.assert_close(found, expected[layer.module_name, name], atol=1e-5, rtol=1e-4)
