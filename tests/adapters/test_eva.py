"""EVA: the reference twin, rank redistribution, what surrounds the start, PEFT's own loader."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import EvaConfig as PeftEvaConfig
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_ext.adapters import EvaConfig, awaits_data, get_eva_state_dict, initialize_from_data
from hf_ext.adapters.eva import EvaLayer, redistribute
from tests.adapters import models
from tests.reference import eva as reference

IDS = torch.arange(4 * 24).reshape(4, 24) * 7 % 256
logits = partial(models.logits, ids=IDS)
train = partial(models.steps, ids=IDS)
BATCHES = [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}]
PREFIX = "base_model.model."


def settings(**options: Any) -> EvaConfig:
    given = {"r": 4, "rho": 2.0, "n_tokens": 96, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    given |= options
    least = 10 * round(float(given["rho"]) * int(given["r"]))  # type: ignore[arg-type]
    return EvaConfig(**{**given, "n_tokens": max(least, int(given["n_tokens"]))})  # type: ignore[arg-type]


def started(model: nn.Module, batches: Any = None, **options: Any) -> Any:
    adapted = get_peft_model(model, settings(**options))  # type: ignore[arg-type]
    return initialize_from_data(adapted, BATCHES if batches is None else batches, show_progress=False)


def a_of(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return A of each layer by path in the base model."""
    return {
        path.removeprefix(PREFIX): cast(Any, layer).lora_A[name].weight.detach().clone()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A
    }


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


class Stack(nn.Module):
    """Two layers, the second of which sees inputs that few directions explain almost alone."""

    def __init__(self, strong: int = 1, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.flat, self.steep = (nn.Linear(width, width, bias=False) for _ in range(2))
        for layer in (self.flat, self.steep):
            layer.weight.data = torch.randn(width, width, generator=generator) * width**-0.5
        self.register_buffer("spread", torch.tensor([50.0] * strong + [1.0] * (width - strong)))

    def forward(self, x: Tensor) -> Tensor:
        return self.steep(self.flat(x) * self.spread)


X = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(5))


# Against the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"whiten": True}, {"min_rank": 2}, {"rho": 1.0}, {"rho": 3.5}])
def test_equals_the_reference(options: dict[str, Any], tiny_llama: Any) -> None:
    names = linear_names(tiny_llama())
    inputs = reference.inputs_of(tiny_llama(), names, BATCHES, [None, None])
    expected = reference.start(inputs, dict.fromkeys(names, 4), **{"rho": 2.0, **options})
    found = a_of(started(tiny_llama(), **options))
    assert {name: len(a) for name, a in found.items()} == {n: len(a) for n, a in expected.items() if len(a)}
    for name, a in found.items():
        torch.testing.assert_close(a, expected[name].float(), rtol=1e-4, atol=1e-4)  # close eigenvalues


def test_masks_equal_the_reference(tiny_llama: Any) -> None:
    attention = torch.ones_like(IDS)
    attention[:, 20:] = 0
    labels = IDS.masked_fill(torch.arange(24) < 6, -100)
    batch = {"input_ids": IDS, "attention_mask": attention, "labels": labels}
    names = linear_names(tiny_llama())
    plain = {"input_ids": IDS, "attention_mask": attention}
    for use, mask in ((True, attention.bool() & (labels != -100)), (False, attention.bool())):
        inputs = reference.inputs_of(tiny_llama(), names, [plain], [mask])
        assert len(inputs[names[0]]) == int(mask.sum())
        expected = reference.start(inputs, dict.fromkeys(names, 4), rho=1.0)
        found = a_of(started(tiny_llama(), [batch], rho=1.0, n_tokens=60, use_label_mask=use))
        for name, a in found.items():
            torch.testing.assert_close(a, expected[name].float(), rtol=1e-4, atol=1e-4)


def test_order_and_split_of_batches_do_not_matter(tiny_llama: Any) -> None:
    expected = a_of(started(tiny_llama()))
    for batches in (BATCHES[::-1], [{"input_ids": IDS}], [{"input_ids": row[None]} for row in IDS]):
        found = a_of(started(tiny_llama(), batches))
        for name, a in expected.items():
            torch.testing.assert_close(found[name], a, rtol=0, atol=2e-5)  # fp32 sums, close eigenvalues


def test_sketch_with_all_directions_starts_as_gram_does(tiny_llama: Any) -> None:
    expected = a_of(started(tiny_llama(), rho=1.0))
    for n_passes in (1, 2):
        found = a_of(started(tiny_llama(), rho=1.0, method="sketch", oversample=128, n_passes=n_passes))
        for name, a in expected.items():
            torch.testing.assert_close(found[name], a, rtol=0, atol=2e-4)


def test_queries_keys_and_values_start_alike(tiny_llama: Any) -> None:
    found = a_of(started(tiny_llama()))
    for block in (0, 1):
        q, k, v = (found[f"model.layers.{block}.self_attn.{n}_proj"] for n in "qkv")
        for other in (k, v):
            shared = min(len(q), len(other))
            assert torch.equal(q[:shared], other[:shared])
        gate, up = (found[f"model.layers.{block}.mlp.{n}_proj"] for n in ("gate", "up"))
        shared = min(len(gate), len(up))
        assert torch.equal(gate[:shared], up[:shared])


def test_shared_inputs_take_four_sums_for_seven_layers(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_ext.adapters import _input_spectra

    made: list[int] = []
    sums = _input_spectra._Sums

    def counting(width: int, *arguments: Any) -> Any:
        made.append(width)
        return sums(width, *arguments)

    monkeypatch.setattr(_input_spectra, "_Sums", counting)
    started(tiny_llama())
    assert made == [64, 64, 64, 128] * 2  # q k v; o; gate up; down


# Ranks ----------------------------------------------------------------------------------------------


def test_redistribution_by_hand() -> None:
    ratios = {"a": [0.5, 0.2, 0.1, 0.05], "b": [0.3, 0.05, 0.04, 0.01]}
    assert redistribute(ratios, {"a": 2, "b": 2}) == {"a": 3, "b": 1}
    assert redistribute(ratios, {"a": 2, "b": 2}, min_rank=2) == {"a": 2, "b": 2}
    assert redistribute(ratios, {"a": 1, "b": 0}) == {"a": 1, "b": 0}


def test_ties_go_to_the_layer_that_comes_first() -> None:
    ratios = {"z": [0.25, 0.25], "a": [0.25, 0.25], "m": [0.25, 0.25]}
    assert redistribute(ratios, {"z": 1, "a": 1, "m": 1}) == {"z": 2, "a": 1, "m": 0}


def test_budget_is_kept_unless_components_run_out() -> None:
    assert sum(redistribute({"a": [0.5] * 9, "b": [0.1] * 9}, {"a": 4, "b": 5}).values()) == 9
    assert redistribute({"a": [0.5], "b": [0.1]}, {"a": 4, "b": 5}) == {"a": 1, "b": 1}
    assert redistribute({"a": [0.5, 0.1], "b": []}, {"a": 1, "b": 3}, min_rank=2) == {"a": 2, "b": 2}


def test_redistribution_equals_the_reference_on_drawn_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        count = int(torch.randint(1, 6, (1,), generator=generator))
        ranks = {str(i): int(torch.randint(1, 5, (1,), generator=generator)) for i in range(count)}
        ratios = {
            # Coarse values, so that there are ties.
            name: (torch.rand(2 * r, generator=generator).sort(descending=True).values * 5).round().tolist()
            for name, r in ranks.items()
        }
        for least in (0, 1):
            assert redistribute(ratios, ranks, least) == reference.redistribute(ratios, ranks, least)


@pytest.mark.parametrize(("rslora", "adjust"), [(False, True), (True, True), (False, False), (True, False)])
def test_scale_stays_where_ranks_change(rslora: bool, adjust: bool, tiny_llama: Any, tmp_path: Path) -> None:
    adapted = started(tiny_llama(), lora_alpha=8, use_rslora=rslora, adjust_scaling_factors=adjust)
    layers = [m for m in adapted.modules() if isinstance(m, EvaLayer)]
    ranks = {layer.r["default"] for layer in layers}  # type: ignore[attr-defined]
    assert len(ranks) > 1
    before = 8 / 4 ** (0.5 if rslora else 1.0)
    for layer in layers:
        own: Any = layer
        r = own.r["default"]
        expected = before if adjust else 8 / r ** (0.5 if rslora else 1.0)
        assert own.scaling["default"] == pytest.approx(expected, rel=1e-12)
        assert own.configs["default"].scale_of(own.module_name) == pytest.approx(expected, rel=1e-12)
    train(adapted)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(adapted))


def test_alpha_by_hand() -> None:
    adapted = started(
        Stack(), [{"x": X}], r=2, n_tokens=60, rho=2.0, target_modules=["flat", "steep"], task_type=None
    )
    flat, steep = adapted.base_model.model.flat, adapted.base_model.model.steep
    # One direction explains nearly all that steep sees: the rest of its ranks goes to flat.
    assert (flat.r["default"], steep.r["default"]) == (3, 1)
    assert (flat.lora_alpha["default"], steep.lora_alpha["default"]) == (1.5 * 8, 0.5 * 8)


def test_rho_one_leaves_every_rank(tiny_llama: Any) -> None:
    adapted = started(tiny_llama(), rho=1.0, rank_pattern={"k_proj": 2, r"mlp\.up_proj": 6}, n_tokens=96)
    for name, a in a_of(adapted).items():
        assert len(a) == (2 if "k_proj" in name else 6 if "up_proj" in name else 4)
    config = adapted.peft_config["default"]
    assert config.r == 4
    assert not config.alpha_pattern


def test_total_rank_is_kept(tiny_llama: Any) -> None:
    adapted = started(tiny_llama())
    assert sum(len(a) for a in a_of(adapted).values()) == 14 * 4


def test_min_rank(tiny_llama: Any) -> None:
    counts = [len(a) for a in a_of(started(tiny_llama(), min_rank=3, rho=4.0)).values()]
    assert len(counts) == 14
    assert min(counts) == 3
    assert sum(counts) == 56


def starved() -> Any:
    """Return a model of which one of three layers gets no rank."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Stack(strong=2)
            self.spread: Any = self.inner.spread
            self.outer = nn.Linear(8, 8, bias=False)
            nn.init.eye_(self.outer.weight)

        def forward(self, x: Tensor) -> Tensor:
            # The outer layer's inputs vary evenly, the other two hold their shares in few directions.
            return self.outer(x) + 0.1 * self.inner(x * self.spread)

    torch.manual_seed(0)
    return Three()


STARVED: dict[str, Any] = {
    "r": 1,
    "rho": 3.0,
    "n_tokens": 60,
    "task_type": None,
    "target_modules": ["flat", "steep", "outer"],
}


def test_layer_of_rank_zero_is_a_plain_layer_again_and_reloads(tmp_path: Path) -> None:
    adapted = started(starved(), [{"x": X}], **STARVED)
    ranks = {name: len(a) for name, a in a_of(adapted).items()}
    assert sum(ranks.values()) == 3
    assert "outer" not in ranks
    assert type(adapted.base_model.model.outer) is nn.Linear
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    adapted.save_pretrained(tmp_path)
    expected = adapted.eval()(x=X)
    loaded = PeftModel.from_pretrained(starved(), tmp_path).eval()
    assert type(loaded.base_model.model.outer) is nn.Linear
    assert torch.equal(loaded(x=X), expected)
    # A model that had been given the adapter and no data yet, as a Trainer has on resuming.
    fresh: Any = get_peft_model(starved(), settings(**STARVED))
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(fresh.eval()(x=X), expected)
    assert fresh.peft_config["default"].rank_pattern == adapted.peft_config["default"].rank_pattern
    assert not awaits_data(fresh)
    assert type(fresh.base_model.model.outer) is nn.Linear


def test_names_that_end_alike_reload_as_they_were(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.inner = nn.Linear(8, 8, bias=False), starved()

        def forward(self, x: Tensor) -> Tensor:
            spread: Any = self.inner.inner.spread
            return self.inner(x) + self.outer(x * spread * spread)

    torch.manual_seed(0)
    model = Nested()
    adapted = started(copy.deepcopy(model), [{"x": X}], **STARVED)
    ranks = {name: len(a) for name, a in a_of(adapted).items()}
    assert "outer" in ranks
    assert "inner.outer" not in ranks
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert {name: len(a) for name, a in a_of(loaded).items()} == ranks


# The model after the start ---------------------------------------------------------------------------


def test_output_is_the_base_to_the_bit(tiny_llama: Any) -> None:
    adapted = started(tiny_llama())
    assert torch.equal(logits(adapted), logits(tiny_llama()))
    assert all(not p.any() for name, p in adapted.named_parameters() if "lora_B" in name)
    assert all(p.requires_grad == (".lora_" in name) for name, p in adapted.named_parameters())


def test_empty_until_data_have_been_seen(tiny_llama: Any) -> None:
    adapted = get_peft_model(tiny_llama(), settings())
    assert awaits_data(adapted) == ["default"]
    assert torch.equal(logits(adapted), logits(tiny_llama()))
    adapted.train()
    with pytest.raises(RuntimeError, match=r"'default' starts from data .*initialize_from_data"):
        adapted(input_ids=IDS, labels=IDS)
    with adapted.disable_adapter():
        adapted(input_ids=IDS, labels=IDS)
    initialize_from_data(adapted, BATCHES, show_progress=False)
    assert awaits_data(adapted) == []
    adapted(input_ids=IDS, labels=IDS).loss.backward()


def test_resumes_with_redistributed_ranks(tiny_llama: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": IDS.repeat(2, 1).tolist(), "labels": IDS.repeat(2, 1).tolist()})

    def trainer(model: Any, steps: int, folder: str) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path / folder),
            max_steps=steps,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            save_steps=2,
            per_device_train_batch_size=4,
        )
        return Trainer(model, arguments, train_dataset=data)

    straight = started(tiny_llama())
    trainer(straight, 4, "straight").train()
    half = started(tiny_llama())
    trainer(half, 2, "half").train()
    resumed = get_peft_model(tiny_llama(), settings())  # has seen no data
    trainer(resumed, 4, "half").train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert torch.equal(logits(resumed), logits(straight))


def test_loaded_adapter_compiles_in_one_graph(tiny_llama: Any, tmp_path: Path) -> None:
    started(tiny_llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).train()
    torch._dynamo.reset()
    compiled: Any = torch.compile(loaded, backend="eager", fullgraph=True)
    compiled(input_ids=IDS, labels=IDS).loss.backward()


def test_deepcopy(tiny_llama: Any) -> None:
    waiting: Any = get_peft_model(tiny_llama(), settings())
    twin: Any = copy.deepcopy(waiting)
    initialize_from_data(waiting, BATCHES, show_progress=False)
    assert awaits_data(twin) == ["default"]
    initialize_from_data(twin, BATCHES, show_progress=False)
    copied = copy.deepcopy(waiting)
    for model in (twin, copied):
        assert all(torch.equal(a, a_of(waiting)[name]) for name, a in a_of(model).items())
    assert twin.peft_config["default"].rank_pattern == waiting.peft_config["default"].rank_pattern
    before = a_of(waiting)
    train(copied)
    assert all(torch.equal(a, before[name]) for name, a in a_of(waiting).items())


def test_transformers_add_adapter(tiny_llama: Any) -> None:
    model = tiny_llama()
    model.add_adapter(settings(), adapter_name="mine")
    initialize_from_data(model, BATCHES, show_progress=False)
    expected = a_of(started(tiny_llama()))
    found = a_of(model, "mine")
    assert found.keys() == expected.keys()
    assert all(torch.equal(a, expected[name]) for name, a in found.items())
    assert model.peft_config["mine"].rank_pattern


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_base_with_redistributed_ranks(autocast: bool, tiny_llama: Any) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    adapted = get_peft_model(model, settings(), autocast_adapter_dtype=autocast)
    initialize_from_data(adapted, BATCHES, show_progress=False)
    kinds = {p.dtype for name, p in adapted.named_parameters() if ".lora_" in name}
    assert kinds == {torch.float32 if autocast else torch.bfloat16}
    exact = started(tiny_llama())
    q = "model.layers.0.self_attn.q_proj"
    overlap = torch.linalg.svdvals(a_of(adapted)[q][:2].float() @ a_of(exact)[q][:2].T)
    assert overlap.min() > 0.99  # bf16 activations have the leading directions of fp32's


# Several adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("active", ["default", "second"])
def test_start_beside_a_trained_adapter(active: str, tiny_llama: Any) -> None:
    adapted = started(tiny_llama())
    train(adapted)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    trained = logits(adapted)
    adapted.add_adapter("second", settings(rho=2.0, r=3, n_tokens=96))
    adapted.set_adapter(active)
    flags = {n: p.requires_grad for n, p in adapted.named_parameters() if ".second." not in n}
    initialize_from_data(adapted, BATCHES, show_progress=False)
    for name, p in adapted.named_parameters():
        if ".second." not in name:
            assert torch.equal(p, before[name]), name
            assert p.requires_grad == flags[name], name
        else:
            assert p.requires_grad == (active == "second"), name
    # Its components are of the base's activations, not of the trained model's.
    alone = a_of(started(tiny_llama(), r=3))
    assert all(torch.equal(a, alone[name]) for name, a in a_of(adapted, "second").items())
    torch.testing.assert_close(logits(adapted), trained if active == "default" else logits(tiny_llama()))


def test_layer_that_loses_the_active_adapter_does_not_switch_to_another(tmp_path: Path) -> None:
    adapted = started(starved(), [{"x": X}], **{**STARVED, "rho": 1.0})
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    with_first = adapted.eval()(x=X)
    adapted.add_adapter("second", settings(**STARVED))
    adapted.set_adapter("second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialize_from_data(adapted, [{"x": X}], show_progress=False)
    assert "outer" not in a_of(adapted, "second")
    assert torch.equal(adapted(x=X), starved()(x=X))  # the second is empty of changes, the first is off
    assert not any(p.requires_grad for n, p in adapted.named_parameters() if ".default." in n)
    adapted.set_adapter("default")
    assert torch.equal(adapted(x=X), with_first)


# Other layers and forms of LoRA ------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_forms_of_lora(form: dict[str, Any], tiny_llama: Any, tmp_path: Path) -> None:
    bias = {"attention_bias": True} if "lora_bias" in form else {}
    if bias:
        form = {**form, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    base = logits(tiny_llama(**bias))
    waiting: Any = get_peft_model(tiny_llama(**bias), settings(**form))
    assert awaits_data(waiting) == ["default"]
    torch.testing.assert_close(logits(waiting), base, atol=1e-5, rtol=1e-5)
    initialize_from_data(waiting, BATCHES, show_progress=False)
    torch.testing.assert_close(logits(waiting), base, atol=1e-5, rtol=1e-5)
    rows = a_of(waiting)
    assert len({len(a) for a in rows.values()}) > 1
    plain = a_of(started(tiny_llama(**bias), **{k: v for k, v in form.items() if k == "target_modules"}))
    assert all(torch.equal(a, rows[name]) for name, a in plain.items())
    train(waiting)
    expected = logits(waiting)
    assert (expected - base).abs().max() > 1e-3
    waiting.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(**bias), tmp_path / "own")), expected)
    waiting.save_pretrained(tmp_path / "lora", as_lora=True)
    loaded = PeftModel.from_pretrained(tiny_llama(**bias), tmp_path / "lora")
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


class Mixed(nn.Module):
    """Embedding, convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.image = nn.Conv2d(1, 1, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.conv(self.embed(input_ids).mT).mT
        x = self.image(x[:, None])[:, 0]
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


def test_layers_without_rows_of_features_keep_loras_start() -> None:
    torch.manual_seed(0)
    model = Mixed()
    names = ["embed", "conv", "image", "attention", "linear"]
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        adapted = started(
            copy.deepcopy(model), target_modules=names, task_type=None, r=1, rho=4.0, n_tokens=96
        )
        states.append(adapted.state_dict())
    # Their rank is not given away: the budget is that of layers with components.
    assert not adapted.peft_config["default"].rank_pattern
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())  # no global seed
    assert states[0][f"{PREFIX}embed.lora_embedding_B.default"].any()
    assert states[0][f"{PREFIX}conv.lora_A.default.weight"].any()
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(IDS), model.eval()(IDS), atol=1e-6, rtol=1e-5)
    exact = reference.pca(reference.inputs_of(model, ["linear"], BATCHES, [None, None])["linear"])
    torch.testing.assert_close(a_of(adapted)["linear"], exact.v[:1].float(), rtol=0, atol=1e-5)


def test_attention_that_merges_in_every_forward_comes_back_to_its_base() -> None:
    torch.manual_seed(0)
    model = Mixed()
    plain = model.eval()(IDS)
    adapted = started(
        copy.deepcopy(model), target_modules=["attention", "linear"], task_type=None, n_tokens=96
    ).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "attention.lora_B" in name:
                parameter.normal_()
        first, second = adapted(IDS), adapted(IDS)
        with adapted.disable_adapter():
            base = adapted(IDS)
    assert not torch.allclose(first, plain, atol=1e-2)
    torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(base, plain, atol=1e-5, rtol=1e-5)


def test_target_parameters_keep_loras_start() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x @ w.T for w in self.w]).sum(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.linear = Experts(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.experts(x))

    adapted = started(
        Model(),
        [{"x": X}],
        r=2,
        n_tokens=60,
        task_type=None,
        target_modules=["linear"],
        target_parameters=["experts.w"],
    )
    assert a_of(adapted)["experts"].shape == (6, 8)
    assert a_of(adapted)["linear"].shape == (2, 8)


def test_encoder_and_decoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4, vocab_size=256
    )
    config.decoder_start_token_id = 0
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS[:, :7].contiguous()}
    adapted = started(model, [batch], target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    assert sum(len(a) for a in a_of(adapted).values()) == 6 * 4


class Experts(nn.Module):
    """Routes each token to one of three experts; the last is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 8)
        choice = (rows[:, 0] > 0.5).long()
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            if (choice == i).any():
                out[choice == i] = expert(rows[choice == i])
        return out.reshape(x.shape)


def test_experts_start_from_the_tokens_they_see() -> None:
    options = {"r": 2, "rho": 1.0, "n_tokens": 60, "task_type": None, "target_modules": r"experts\.\d"}
    with pytest.warns(UserWarning, match=r"no token reached experts\.2: rank 0"):
        adapted = started(Experts(), [{"x": X}], **options)
    found = a_of(adapted)
    rows = X.reshape(-1, 8)
    for i, seen in ((0, rows[rows[:, 0] <= 0.5]), (1, rows[rows[:, 0] > 0.5])):
        exact = reference.pca(seen)
        # The unused expert's two ranks find no taker at rho = 1.
        torch.testing.assert_close(found[f"experts.{i}"], exact.v[:2].float(), rtol=0, atol=1e-5)
    assert "experts.2" not in found


def test_unused_layer_with_a_least_rank_starts_as_lora_does() -> None:
    options = {"r": 2, "rho": 1.0, "n_tokens": 60, "task_type": None, "target_modules": r"experts\.\d"}
    rows = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        adapted = get_peft_model(Experts(), settings(min_rank=1, **options))
        torch.manual_seed(noise)
        with pytest.warns(UserWarning, match=r"no token reached experts\.2: rank 1"):
            initialize_from_data(adapted, [{"x": X}], show_progress=False)
        rows.append(a_of(adapted)["experts.2"])
    assert rows[0].shape == (1, 8)
    assert torch.equal(rows[0], rows[1])
    assert rows[0].abs().max() <= 8**-0.5  # Kaiming's uniform bound
    assert rows[0].any()


def test_inputs_that_are_all_zero(tiny_llama: Any) -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.data.zero_()
    adapted = started(model)
    assert all(torch.isfinite(a).all() for a in a_of(adapted).values())
    assert sum(len(a) for a in a_of(adapted).values()) == 56
    assert torch.isfinite(logits(adapted)).all()


# Refusals -----------------------------------------------------------------------------------------


def assert_usable_and_empty(adapted: Any, model: Any) -> None:
    assert awaits_data(adapted) == ["default"]
    assert not any(m._forward_pre_hooks for m in adapted.modules())
    assert all(p.requires_grad == (".lora_" in name) for name, p in adapted.named_parameters())
    assert not any(getattr(m, "_disable_adapters", False) for m in adapted.modules())
    assert adapted.config.use_cache
    assert torch.equal(logits(adapted), logits(model))
    initialize_from_data(adapted, BATCHES, show_progress=False)  # and can still be started


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([{"input_ids": IDS[:1, :3]}], ValueError, r"at least 8 tokens.*'3 tokens' \(.*q_proj\)"),
        ([], ValueError, "dataloader must be one that gives at least one batch"),
        ([{"labels": IDS}], ValueError, "input_ids or inputs_embeds"),
        ([IDS], ValueError, "dataloader must be an iterable of mappings.*got 'Tensor'"),
        ([{"text": ["a", "b"]}], ValueError, "dataloader must be an iterable of mappings"),
        (7, ValueError, "dataloader must be iterable"),
        ([*BATCHES[:1], {"input_ids": IDS + 10**6}], IndexError, "out of range"),
    ],
)
def test_unfit_data_leave_the_adapter_empty(
    batches: Any, error: type[Exception], match: str, tiny_llama: Any
) -> None:
    adapted = get_peft_model(tiny_llama(), settings(n_tokens=10**4)).train()
    training = {name: m.training for name, m in adapted.named_modules()}
    with pytest.raises(error, match=match):
        initialize_from_data(adapted, batches, show_progress=False)
    assert {name: m.training for name, m in adapted.named_modules()} == training
    assert_usable_and_empty(adapted, tiny_llama())


def test_second_call_is_refused(tiny_llama: Any) -> None:
    adapted = started(tiny_llama())
    train(adapted)
    before = logits(adapted)
    with pytest.raises(ValueError, match="adapters that wait for data are none"):
        initialize_from_data(adapted, BATCHES, show_progress=False)
    with pytest.raises(ValueError, match="this one has its start"):
        initialize_from_data(adapted, BATCHES, adapter_name="default", show_progress=False)
    assert torch.equal(logits(adapted), before)


def test_unknown_adapter_is_named(tiny_llama: Any) -> None:
    adapted = get_peft_model(tiny_llama(), settings())
    with pytest.raises(ValueError, match="adapter_name 'default_' is unknown; did you mean 'default'"):
        initialize_from_data(adapted, BATCHES, adapter_name="default_", show_progress=False)


def test_rank_above_the_inputs_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match=r"r must be at most 64.*q_proj"):
        get_peft_model(tiny_llama(), settings(r=65, n_tokens=10**4))
    # More components than inputs are wished for, not more rank: rho r stops at the width.
    adapted = started(tiny_llama(), r=40, rho=2.0, n_tokens=800, target_modules=["q_proj"])
    assert sum(len(a) for a in a_of(adapted).values()) == 80


def test_tau_is_named_as_without_effect() -> None:
    with pytest.warns(UserWarning, match="tau has no effect"):
        settings(tau=0.9)


# PEFT's own EVA --------------------------------------------------------------------------------------


def peft_eva(model: nn.Module, **options: Any) -> Any:
    given = {"r": 4, "target_modules": "all-linear", "eva_config": PeftEvaConfig(rho=2.0)}
    return get_peft_model(model, LoraConfig(init_lora_weights="eva", **{**given, **options}))  # type: ignore[arg-type]


def test_rows_load_through_pefts_own_call(tiny_llama: Any, tmp_path: Path) -> None:
    adapted = peft_eva(tiny_llama())
    rows = get_eva_state_dict(adapted, BATCHES, show_progress=False)
    kept = dict(rows)
    initialize_lora_eva_weights(adapted, eva_state_dict=rows)
    ours = a_of(started(tiny_llama()))
    found = a_of(adapted)
    assert {name.removeprefix(PREFIX): len(a) for name, a in kept.items() if len(a)} == {
        name: len(a) for name, a in ours.items()
    }
    assert all(torch.equal(a, ours[name]) for name, a in found.items())
    assert torch.equal(logits(adapted), logits(tiny_llama()))
    train(adapted)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(adapted))


def test_pefts_settings_are_taken(tiny_llama: Any) -> None:
    adapted = peft_eva(
        tiny_llama(), rank_pattern={"q_proj": 2}, eva_config=PeftEvaConfig(rho=1.0, whiten=True)
    )
    rows = get_eva_state_dict(adapted, BATCHES, show_progress=False)
    ours = a_of(started(tiny_llama(), rho=1.0, whiten=True, rank_pattern={"q_proj": 2}))
    assert {name.removeprefix(PREFIX) for name in rows} == ours.keys()
    assert all(torch.equal(rows[PREFIX + name], a) for name, a in ours.items())


def test_model_without_lora_is_refused(tiny_llama: Any) -> None:
    adapted = peft_eva(tiny_llama())
    with pytest.raises(ValueError, match="adapter_name must be the name of a LoRA adapter"):
        get_eva_state_dict(adapted, BATCHES, adapter_name="other", show_progress=False)
    with pytest.raises(ValueError, match="adapter_name must be the name of a LoRA adapter"):
        get_eva_state_dict(tiny_llama(), BATCHES, show_progress=False)


def test_peft_finds_the_same_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 128, 32, generator=generator) * torch.arange(1, 33) ** -0.7
    batches = [{"input": part} for part in x.split(2)]

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 4))

    options = {"r": 8, "target_modules": ["0"]}
    config = LoraConfig(init_lora_weights="eva", eva_config=PeftEvaConfig(rho=1.0, tau=0.9), **options)  # type: ignore[arg-type]
    theirs = get_peft_model(model(), config)  # type: ignore[arg-type]
    initialize_lora_eva_weights(
        theirs,  # type: ignore[arg-type]
        batches,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,  # type: ignore[arg-type]
        show_progress_bar=False,
    )
    ours = started(model(), batches, rho=1.0, n_tokens=1024, task_type=None, **options)
    overlap = torch.linalg.svdvals(a_of(theirs)["0"] @ a_of(ours)["0"].T)
    assert overlap.square().mean() > 0.98


# Loading and combining ---------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_saved_before_its_start_still_waits(
    low_cpu_mem_usage: bool, tiny_llama: Any, tmp_path: Path
) -> None:
    get_peft_model(tiny_llama(), settings()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert awaits_data(loaded) == ["default"]
    with pytest.raises(RuntimeError, match="starts from data and has seen none"):
        train(loaded, 1)
    initialize_from_data(loaded, BATCHES, show_progress=False)
    expected = a_of(started(tiny_llama()))
    assert {name: a.shape for name, a in a_of(loaded).items()} == {n: a.shape for n, a in expected.items()}
    train(loaded, 1)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_redistributed_ranks_load_bit_equal(low_cpu_mem_usage: bool, tiny_llama: Any, tmp_path: Path) -> None:
    model = started(tiny_llama())
    assert model.peft_config["default"].rank_pattern
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert awaits_data(loaded) == []
    assert torch.equal(logits(loaded), logits(model))
    fresh: Any = get_peft_model(tiny_llama(), settings(), low_cpu_mem_usage=low_cpu_mem_usage)
    fresh.load_adapter(tmp_path, "default", low_cpu_mem_usage=low_cpu_mem_usage)  # fits the ranks
    assert awaits_data(fresh) == []
    assert torch.equal(logits(fresh), logits(model))


def test_start_of_tensors_on_the_meta_device_is_refused(tiny_llama: Any) -> None:
    waiting = get_peft_model(tiny_llama(), settings(), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="low_cpu_mem_usage=False"):
        initialize_from_data(waiting, BATCHES, show_progress=False)


def test_loading_onto_other_ranks_from_data_says_what_to_leave_out(tiny_llama: Any, tmp_path: Path) -> None:
    started(tiny_llama()).save_pretrained(tmp_path)
    other = started(tiny_llama(), [{"input_ids": torch.arange(96).reshape(4, 24) // 12}])
    before = logits(other)
    with pytest.raises(ValueError, match="do not call initialize_from_data on a model that is about to"):
        other.load_adapter(tmp_path, "default")
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("length", [24, 13])
def test_masks_of_an_encoder_decoder_are_the_encoders(length: int) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4, vocab_size=256
    )
    config.decoder_start_token_id = 0
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    mask, labels = torch.ones_like(IDS), IDS[:, :length].clone()
    mask[:, 20:], labels[:, 6:] = 0, -100
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": labels}
    paths = [name for name, _ in model.named_modules() if name.endswith(".q")]
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.__setitem__(path, args[0].detach())
        )
        for path in paths
    ]
    with torch.no_grad():
        model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    found = a_of(started(model, [batch], target_modules=["q"], rho=1.0, n_tokens=40, task_type=None))
    for path in paths:
        rows = seen[path][mask.bool()] if path.startswith("encoder") else seen[path].flatten(0, 1)
        exact = reference.pca(rows).v[:4].float()
        torch.testing.assert_close(found[path], exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("combination", ["cat", "linear", "svd"])
def test_combination_of_adapters_does_not_wait(combination: str, tiny_llama: Any) -> None:
    given: dict[str, Any] = {"rho": 1.0, "n_tokens": 40, "target_modules": ["q_proj"]}
    adapted = started(tiny_llama(), **given)
    adapted.add_adapter("second", settings(**given))
    initialize_from_data(adapted, BATCHES, adapter_name="second", show_progress=False)
    adapted.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type=combination)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert not layer.awaiting
    assert layer.r["sum"] == (8 if combination == "cat" else 4)


def test_too_few_tokens_asked_for_are_refused_at_the_start(tiny_llama: Any) -> None:
    adapted = get_peft_model(tiny_llama(), EvaConfig(r=4, n_tokens=79, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="n_tokens must be at least 80, 10 for each component"):
        initialize_from_data(adapted, BATCHES, show_progress=False)
    assert awaits_data(adapted) == ["default"]
