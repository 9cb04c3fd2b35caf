"""Properties of LoRA-GA: what it starts from, what its first step is, and what the start leaves alone."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hf_ext.adapters import LoraGaConfig, awaits_data, export_to_lora, initialize_from_data
from hf_ext.adapters import _base as base_module
from hf_ext.adapters.lora_ga import LoraGaLinear, directions
from tests.adapters import models
from tests.adapters.models import Mixed, OneLayer
from tests.reference.lora_ga import ReferenceLoraGa, best_of_rank, mean_gradients
from tests.reference.lora_ga import start as reference_start

IDS = torch.arange(4 * 12).reshape(4, 12) * 7 % 256
logits = partial(models.logits, ids=IDS)
BATCHES = [{"input_ids": IDS[:3], "labels": IDS[:3]}, {"input_ids": IDS[3:, :7], "labels": IDS[3:, :7]}]
ORDER = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}  # r = 2


def from_gradient(weight: Tensor, gradient: Tensor, **settings: Any) -> tuple[PeftModel, LoraGaLinear]:
    """Return a layer that was started from a given gradient of its weight."""
    model = get_peft_model(OneLayer(weight), LoraGaConfig(target_modules=["lin"], **settings))
    batch = {"x": torch.eye(weight.shape[1])}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"]) * gradient.T).sum()

    initialize_from_data(model, [batch], loss_function=loss, show_progress=False)
    return model, model.base_model.model.lin


def waiting(model: nn.Module, **settings: Any) -> PeftModel:
    choice = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(model, LoraGaConfig(**choice))  # type: ignore[arg-type]


def started(model: nn.Module, batches: Any = BATCHES, **settings: Any) -> PeftModel:
    adapted = waiting(model, **settings)
    initialize_from_data(adapted, batches, show_progress=False)
    return adapted


def layers_of(model: nn.Module) -> dict[str, LoraGaLinear]:
    return {m.module_name: m for m in model.modules() if isinstance(m, LoraGaLinear)}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    found = {path: layer.adapter_tensors("default") for path, layer in layers_of(model).items()}
    return {f"{path}.{name}": tensor for path, own in found.items() for name, tensor in own.items()}


def assert_same(one: nn.Module, two: nn.Module, tolerance: float = 0.0) -> None:
    expected = tensors_of(two)
    for key, tensor in tensors_of(one).items():
        torch.testing.assert_close(tensor, expected[key], atol=tolerance, rtol=tolerance, msg=key)


# The hand-computed case and the identity -----------------------------------------------------------


def test_start_of_a_diagonal_gradient() -> None:
    gradient = torch.diag(torch.tensor([2.0, 1.0]))
    _, layer = from_gradient(torch.eye(2), gradient, r=1)
    c = 2**0.25 / 4
    assert c == pytest.approx(0.2973018, abs=1e-7)
    torch.testing.assert_close(layer.loraga_A["default"].data, torch.tensor([[c, 0.0]]))
    torch.testing.assert_close(layer.loraga_B["default"].data, torch.tensor([[0.0], [c]]))
    product = layer.loraga_B0["default"] @ layer.loraga_A0["default"]
    torch.testing.assert_close(product.data, torch.tensor([[0.0, 0.0], [0.0883883, 0.0]]))


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("shape", [(12, 10), (10, 12)])
def test_first_step_follows_the_best_approximation_of_the_gradient(
    direction: str, shape: tuple[int, int]
) -> None:
    gradient = torch.randn(shape)
    _, layer = from_gradient(torch.randn(shape), gradient, r=2, direction=direction)
    a0, b0 = (layer.adapter_tensors("default")[name].double() for name in ("loraga_A0", "loraga_B0"))
    best = best_of_rank(gradient, 4)
    square = shape[0] ** 0.5 / 16
    change = b0 @ b0.T @ gradient.double() + gradient.double() @ a0.T @ a0
    torch.testing.assert_close(change, square * best, atol=1e-6, rtol=1e-5)


def test_a_step_of_sgd_is_that_change() -> None:
    weight, gradient = torch.randn(12, 10), torch.randn(12, 10)
    model, layer = from_gradient(weight, gradient, r=2, alpha=3.0)
    scale = layer.scale["default"]
    assert scale == pytest.approx(3.0 / math.sqrt(2.0))
    lr = 1e-4
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    (model(torch.eye(10)) * gradient.T).sum().backward()
    optimizer.step()
    expected = -lr * scale**2 * (12**0.5 / 16) * best_of_rank(gradient, 4).float()
    # What is left out is of second order in lr.
    torch.testing.assert_close(layer.delta_weight("default"), expected, atol=1e-6, rtol=1e-2)


def test_random_directions_are_disjoint_and_seeded() -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for_a, for_b = directions("random", 3, generator)
        assert sorted(for_a + for_b) == list(range(6))
        assert (for_a, for_b) == directions("random", 3, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("base_mode", ["additive", "residual"])
def test_training_follows_the_reference(base_mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, gradient = torch.randn(10, 8, generator=generator), torch.randn(10, 8, generator=generator)
    model, layer = from_gradient(weight, gradient, r=2, base_mode=base_mode)
    scale = layer.scale["default"]
    a0, b0 = reference_start(gradient, weight, 2, scale, for_a=[0, 1], for_b=[2, 3])
    reference = ReferenceLoraGa(weight, a0.float(), b0.float(), scale)
    optimizers = [
        torch.optim.AdamW([layer.loraga_A["default"], layer.loraga_B["default"]], lr=0.01),
        torch.optim.AdamW([reference.a, reference.b], lr=0.01),
    ]
    for _ in range(50):
        x, target = torch.randn(6, 8, generator=generator), torch.randn(6, 10, generator=generator)
        (model(x) - target).square().mean().backward()
        (reference.forward(x) - target).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    merged = layer.get_base_layer().weight + layer.stored_delta(["default"])
    torch.testing.assert_close(merged, reference.weight(), atol=2e-4, rtol=1e-3)


# The start on a language model -----------------------------------------------------------------------


@pytest.mark.parametrize("direction", list(ORDER))
@pytest.mark.parametrize("scale", ["stable", "unit", "gd", "weightS"])
def test_start_equals_the_reference(direction: str, scale: str, tiny_llama: Any) -> None:
    adapted = started(tiny_llama(), direction=direction, scale=scale, n_samples=4, sketch=64)
    gradients = mean_gradients(tiny_llama(), layers_of(adapted), BATCHES)
    plain = tiny_llama()
    for_a, for_b = ORDER[direction]
    for path, layer in layers_of(adapted).items():
        weight = plain.get_submodule(path).weight.data
        s = layer.scale["default"]
        a, b = reference_start(gradients[path], weight, 2, s, for_a=for_a, for_b=for_b, scale=scale)
        assert float(a.norm()) > 0.0
        assert float(b.norm()) > 0.0
        tensors = layer.adapter_tensors("default")
        torch.testing.assert_close(tensors["loraga_A"].double(), a, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(tensors["loraga_B"].double(), b, atol=2e-5, rtol=1e-3)
        assert torch.equal(tensors["loraga_A0"], tensors["loraga_A"])
        assert torch.equal(tensors["loraga_B0"], tensors["loraga_B"])


@pytest.mark.parametrize("n_passes", [1, 2, 3])
def test_sketch_of_all_directions_is_the_exact_start(n_passes: int, tiny_llama: Any) -> None:
    # 37 tokens with a label: no gradient has a higher rank than the sketch.
    settings = {
        "target_modules": ["up_proj", "down_proj"],
        "n_passes": n_passes,
        "sketch": 40,
        "n_samples": 4,
    }
    adapted = started(tiny_llama(hidden_size=256, intermediate_size=512), **settings)
    plain = tiny_llama(hidden_size=256, intermediate_size=512)
    gradients = mean_gradients(plain, layers_of(adapted), BATCHES)
    for path, layer in layers_of(adapted).items():
        weight = plain.get_submodule(path).weight.data
        a, b = reference_start(gradients[path], weight, 2, 1.0, for_a=[0, 1], for_b=[2, 3])
        torch.testing.assert_close(layer.loraga_A["default"].data.double(), a, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(layer.loraga_B["default"].data.double(), b, atol=2e-5, rtol=1e-4)


def test_start_is_the_base_to_the_bit(tiny_llama: Any) -> None:
    adapted = started(tiny_llama())
    assert torch.equal(logits(adapted), logits(tiny_llama()))
    assert torch.equal(adapted.train()(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)
    for layer in layers_of(adapted).values():
        assert layer.delta_weight("default").abs().max() < 1e-6
        assert layer.loraga_A["default"].abs().max() > 0.0
        assert layer.loraga_B["default"].abs().max() > 0.0


def test_residual_mode_writes_the_residual(tiny_llama: Any) -> None:
    plain = tiny_llama()
    adapted = started(tiny_llama(), base_mode="residual")
    torch.testing.assert_close(logits(adapted), logits(plain), atol=1e-5, rtol=1e-5)
    for path, layer in layers_of(adapted).items():
        tensors = layer.adapter_tensors("default")
        product = layer.scale["default"] * tensors["loraga_B0"] @ tensors["loraga_A0"]
        weight = plain.get_submodule(path).weight.data
        torch.testing.assert_close(layer.get_base_layer().weight.data, weight - product, atol=1e-6, rtol=0)
        assert product.abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(plain), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(adapted.unload()), logits(plain), atol=1e-5, rtol=1e-5)


def test_modes_start_and_train_alike(tiny_llama: Any) -> None:
    models = [started(tiny_llama(), base_mode=mode) for mode in ("additive", "residual")]
    assert_same(*models)
    for model in models:
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2e-3)  # s = 11
        for _ in range(5):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(models[0]), logits(models[1]), atol=2e-5, rtol=1e-4)
    assert (logits(models[0]) - logits(tiny_llama())).abs().max() > 1e-3


def test_embedding_and_head_are_left_alone(tiny_llama: Any) -> None:
    adapted = started(tiny_llama())
    assert type(adapted.base_model.model.lm_head) is nn.Linear
    assert type(adapted.base_model.model.model.embed_tokens) is nn.Embedding
    assert len(layers_of(adapted)) == 14


@pytest.mark.parametrize("base_mode", ["additive", "residual"])
def test_start_on_embeddings_and_convolutions_follows_the_gradient_of_their_matrix(base_mode: str) -> None:
    targets = list(Mixed.targets)
    adapted = started(
        Mixed(), BATCHES[:1], target_modules=targets, task_type=None, base_mode=base_mode, train_mode=True
    )
    plain = Mixed()
    loss = plain(**BATCHES[0]).loss
    assert loss is not None
    weights = [plain.get_submodule(path).weight for path in targets]
    gradients = dict(zip(targets, torch.autograd.grad(loss, weights), strict=True))
    for path, layer in layers_of(adapted).items():
        gradient, weight = gradients[path], plain.get_submodule(path).weight.detach()
        pair = (gradient.T, weight.T) if path == "embed" else (gradient.flatten(1), weight.flatten(1))
        scale, tensors = layer.scale["default"], layer.adapter_tensors("default")
        a, b = reference_start(*pair, 2, scale, for_a=[0, 1], for_b=[2, 3])
        sign_a = torch.sign((tensors["loraga_A"] * a).sum(1))[:, None].float()  # free in singular vectors
        sign_b = torch.sign((tensors["loraga_B"] * b).sum(0)).float()
        torch.testing.assert_close(tensors["loraga_A"], (sign_a * a).float(), atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(tensors["loraga_B"], (sign_b * b).float(), atol=2e-4, rtol=1e-3)
        assert torch.equal(tensors["loraga_A0"], tensors["loraga_A"])
        assert torch.equal(tensors["loraga_B0"], tensors["loraga_B"])
        product = scale * tensors["loraga_B0"] @ tensors["loraga_A0"]
        taken = product.T if path == "embed" else product.view_as(weight)
        lacks = taken if base_mode == "residual" else torch.zeros_like(weight)
        torch.testing.assert_close(layer.get_base_layer().weight.data, weight - lacks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("n_passes", [1, 2])
def test_gradient_checkpointing_gives_the_same_start(
    use_reentrant: bool, n_passes: int, tiny_llama: Any
) -> None:
    settings = {"train_mode": True, "n_passes": n_passes, "n_samples": 4}
    expected = started(tiny_llama(), **settings)
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    adapted = started(model, **settings)
    assert len(calls) == 2 * len(model.model.layers) * len(BATCHES) * n_passes  # it did recompute
    assert_same(adapted, expected)
    assert_same(
        expected, started(tiny_llama(), n_passes=n_passes, n_samples=4)
    )  # no dropout: modes are alike


def test_dropout_acts_in_train_mode_alone(tiny_llama: Any) -> None:
    still = started(tiny_llama())
    assert_same(still, started(tiny_llama(attention_dropout=0.5)))
    moved = tensors_of(started(tiny_llama(attention_dropout=0.5), train_mode=True))
    assert not all(torch.equal(value, moved[key]) for key, value in tensors_of(still).items())


def test_bf16_model_starts_near_the_fp32_one(tiny_llama: Any) -> None:
    exact, rough = started(tiny_llama()), started(tiny_llama(dtype=torch.bfloat16))
    for path, layer in layers_of(rough).items():
        own, other = layer.adapter_tensors("default"), layers_of(exact)[path].adapter_tensors("default")
        assert layer.loraga_A["default"].dtype == torch.float32
        # The spaces, not each vector: close singular values may mix.
        overlap = torch.linalg.svdvals(
            nn.functional.normalize(own["loraga_A"]) @ nn.functional.normalize(other["loraga_A"]).T
        )
        assert overlap.max() > 0.95, path
    assert torch.equal(logits(rough), logits(tiny_llama(dtype=torch.bfloat16)))


def test_norm_clip_keeps_the_product_below_the_weight() -> None:
    weight, gradient = 0.01 * torch.randn(12, 10), torch.randn(12, 10)
    free, clipped = (
        from_gradient(weight, gradient, r=2, norm_clip=clip)[1].adapter_tensors("default")
        for clip in (False, True)
    )
    scale = 16 / math.sqrt(2)
    limit = weight.abs().max()
    assert scale * (free["loraga_B0"] @ free["loraga_A0"]).abs().max() > 2 * limit
    torch.testing.assert_close(scale * (clipped["loraga_B0"] @ clipped["loraga_A0"]).abs().max(), limit)
    ratio = clipped["loraga_A0"].norm() / free["loraga_A0"].norm()
    torch.testing.assert_close(clipped["loraga_B0"].norm() / free["loraga_B0"].norm(), ratio)  # shared evenly
    large = from_gradient(100.0 * weight, gradient, r=2, norm_clip=True)[1].adapter_tensors("default")
    assert torch.equal(large["loraga_A0"], free["loraga_A0"])
    zero = from_gradient(torch.zeros(12, 10), gradient, r=2, norm_clip=True)[1].adapter_tensors("default")
    assert torch.equal(zero["loraga_A0"], free["loraga_A0"])  # nothing to stay below, and A must not vanish


def test_layers_without_a_gradient_start_as_loras_do(tiny_llama: Any) -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()  # what feeds it gets no gradient
    with pytest.warns(UserWarning, match=r"no gradient reached model\.layers\.0\.mlp\.gate_proj"):
        adapted = started(model, target_modules=["gate_proj", "q_proj"])
    tensors = layers_of(adapted)["model.layers.0.mlp.gate_proj"].adapter_tensors("default")
    assert not tensors["loraga_B"].any()
    assert not tensors["loraga_A0"].any()
    assert not tensors["loraga_B0"].any()
    bound = 1 / math.sqrt(64)  # Kaiming-uniform with a = sqrt(5)
    assert 0.8 * bound < tensors["loraga_A"].abs().max() <= bound
    assert awaits_data(adapted) == []
    assert layers_of(adapted)["model.layers.0.self_attn.q_proj"].loraga_B["default"].any()


def test_sequence_classification_and_its_gradient(tiny_llama: Any) -> None:
    from transformers import LlamaForSequenceClassification

    def build() -> Any:
        torch.manual_seed(3)
        return LlamaForSequenceClassification(tiny_llama().config).eval()

    labels = torch.tensor([0, 1, 1, 0])
    batches = [{"input_ids": IDS[:3], "labels": labels[:3]}, {"input_ids": IDS[3:], "labels": labels[3:]}]
    settings = {"task_type": "SEQ_CLS", "r": 1, "target_modules": ["q_proj"], "n_samples": 4, "sketch": 64}
    adapted = started(build(), batches, **settings)
    model = build()
    weight = model.model.layers[0].self_attn.q_proj.weight
    loss = nn.functional.cross_entropy(model(input_ids=IDS).logits, labels)
    (gradient,) = torch.autograd.grad(loss, [weight])  # the mean over rows, whatever batch they are in
    a, _ = reference_start(gradient, weight.data, 1, 1.0, for_a=[0], for_b=[1])
    found = layers_of(adapted)["model.layers.0.self_attn.q_proj"].adapter_tensors("default")["loraga_A"]
    assert float(nn.functional.cosine_similarity(found.double(), a)) > 0.999


# What estimation leaves as it was -------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("n_passes", [1, 3])
def test_nothing_else_of_the_model_changes(fails: bool, n_passes: int, tiny_llama: Any) -> None:
    adapted = waiting(tiny_llama(), n_passes=n_passes, n_samples=4, modules_to_save=["lm_head"])
    adapted.train()
    adapted.base_model.model.model.layers[1].eval()
    held = adapted.base_model.model.model.layers[0].input_layernorm.weight
    held.requires_grad_(True)
    held.grad = torch.full_like(held, 3.0)
    head = adapted.base_model.model.lm_head.modules_to_save["default"].weight
    head.grad = torch.full_like(head, 2.0)

    def state() -> Any:
        return (
            {
                name: (p.requires_grad, None if p.grad is None else p.grad.clone())
                for name, p in adapted.named_parameters()
            },
            {name: m.training for name, m in adapted.named_modules()},
            {name: (len(m._forward_hooks), len(m._backward_hooks)) for name, m in adapted.named_modules()},
            adapted.config.use_cache,
        )

    (grads, modes, hooks, cache), base = state(), logits(tiny_llama())
    weights = {n: p.detach().clone() for n, p in adapted.named_parameters() if "loraga" not in n}

    def batches() -> Any:
        yield BATCHES[0]
        if fails:
            raise RuntimeError("the disk is gone")
        yield BATCHES[1]

    if fails:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            initialize_from_data(adapted, batches(), show_progress=False)
        assert awaits_data(adapted) == ["default"]
        assert not any(tensor.any() for tensor in tensors_of(adapted).values())
    else:
        initialize_from_data(adapted, batches(), show_progress=False)
    after = state()
    assert after[1:] == (modes, hooks, cache)
    for name, (flag, grad) in after[0].items():
        assert flag == grads[name][0], name
        assert (grad is None) == (grads[name][1] is None), name
        assert grad is None or torch.equal(grad, grads[name][1]), name
    assert all(torch.equal(p, weights[n]) for n, p in adapted.named_parameters() if n in weights)
    assert torch.equal(logits(adapted), base)


def test_another_adapter_neither_acts_nor_changes(tiny_llama: Any) -> None:
    alone = started(tiny_llama())
    adapted = waiting(tiny_llama(), init_weights=False, seed=3)
    first = tensors_of(adapted)
    adapted.add_adapter("second", LoraGaConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    initialize_from_data(adapted, BATCHES, show_progress=False)  # the only one that waits
    assert all(torch.equal(value, first[key]) for key, value in tensors_of(adapted).items())
    for path, layer in layers_of(adapted).items():
        expected = layers_of(alone)[path].adapter_tensors("default")
        assert all(torch.equal(v, expected[k]) for k, v in layer.adapter_tensors("second").items())


def test_training_before_the_start_is_refused(tiny_llama: Any) -> None:
    adapted = waiting(tiny_llama()).train()
    with pytest.raises(RuntimeError, match=r"'default' starts from data.*initialize_from_data"):
        adapted(input_ids=IDS, labels=IDS)
    assert torch.equal(logits(adapted), logits(tiny_llama()))  # evaluation is that of the base


def test_data_that_give_no_gradient_are_named(tiny_llama: Any) -> None:
    masked = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    with pytest.raises(ValueError, match=r"labels that count: all of them are -100"):
        started(tiny_llama(), [masked])
    half = started(tiny_llama(), [BATCHES[0], masked], n_samples=99)
    assert_same(half, started(tiny_llama(), [BATCHES[0]], n_samples=99))  # a batch of nothing adds nothing
    broken = tiny_llama()
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="the loss of a batch is nan"):
        started(broken)


def test_rank_above_half_of_a_layer_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match=r"r must be at most 16, half of the layer's smaller side.*k_proj"):
        waiting(tiny_llama(), r=17, target_modules=["q_proj", "k_proj"])


@pytest.mark.parametrize("r", [4, 5])
def test_sketch_must_hold_twice_the_largest_rank(r: int) -> None:
    LoraGaConfig(r=2, sketch=2 * r, rank_pattern={"q_proj": r})
    with pytest.raises(ValueError, match=f"sketch must be None or at least {2 * r}"):
        LoraGaConfig(r=2, sketch=2 * r - 1, rank_pattern={"q_proj": r})


def test_scale_is_rank_stabilized_unless_told_otherwise() -> None:
    config = LoraGaConfig(r=4, alpha=8.0, rank_pattern={"q_proj": 16}, alpha_pattern={"v_proj": 2.0})
    assert [config.scale_of(name) for name in ("k_proj", "q_proj", "v_proj")] == [4.0, 2.0, 1.0]
    assert LoraGaConfig(r=4, alpha=8.0, use_rslora=False).scale_of("q_proj") == 2.0
    assert LoraGaConfig(r=4, alpha=None).scale_of("q_proj") == 1.0


# Bases, files --------------------------------------------------------------------------------------------


def test_base_that_cannot_be_read_is_started_all_the_same(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = started(tiny_llama())

    class Unreadable:
        layer_type, supports_merge, backend_name = "linear", False, "stand-in"

        def get_base_weight(self, base_layer: nn.Module) -> Tensor:
            raise TypeError("no dequantization")

        def maybe_clone_base_result(self, x: Tensor) -> Tensor:
            return x

    monkeypatch.setattr(base_module, "resolve_quantization_backend", lambda *_, **__: Unreadable())
    assert_same(started(tiny_llama()), expected)
    for settings in ({"scale": "weightS"}, {"norm_clip": True}):  # these look at the weight
        with pytest.raises(ValueError, match="stand-in weights cannot be read back"):
            started(tiny_llama(), **settings)


@pytest.mark.parametrize("base_mode", ["additive", "residual"])
def test_loading_needs_no_data(base_mode: str, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = started(tiny_llama(), base_mode=base_mode)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert awaits_data(loaded) == []
    assert torch.equal(logits(loaded), logits(adapted))
    loaded.train()(input_ids=IDS, labels=IDS).loss.backward()


def test_export_has_rank_2r_and_a_scale_of_1(tiny_llama: Any, tmp_path: Path) -> None:
    adapted = started(tiny_llama())
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    export_to_lora(adapted, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].r == 4
    assert loaded.peft_config["default"].lora_alpha == 4
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=2e-6, rtol=1e-5)


def test_output_that_is_changed_in_place() -> None:
    class Net(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stack = nn.Sequential(nn.Linear(12, 12), nn.ReLU(inplace=inplace), nn.Linear(12, 12))

        def forward(self, x: Tensor) -> Tensor:
            return self.stack(x)

    batch = {"x": torch.randn(8, 12, generator=torch.Generator().manual_seed(1))}
    models = []
    for inplace in (True, False):
        config = LoraGaConfig(r=2, n_samples=8, target_modules=["stack.0", "stack.2"])
        model = get_peft_model(Net(inplace), config)  # type: ignore[arg-type]
        initialize_from_data(
            model, [batch], loss_function=lambda m, b: m(**b).square().mean(), show_progress=False
        )
        models.append(model)
    assert len(layers_of(models[0])) == 2
    assert_same(*models)


def test_layer_that_transformers_has_loaded_compiles_whole(tiny_llama: Any, tmp_path: Path) -> None:
    saved = tiny_llama()
    saved.add_adapter(LoraGaConfig(r=4, n_samples=2, target_modules=["q_proj"]))
    batch = {"input_ids": IDS, "labels": IDS}
    initialize_from_data(saved, [batch], show_progress=False)
    saved.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    loaded.train()
    layer = loaded.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
