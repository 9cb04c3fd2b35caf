"""What mixed-adapter batches have in common whatever the method: names, generation, modules trained whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from hf_ext.adapters import BoneConfig, EvaConfig
from hf_ext.adapters._mixed_batch import RowNames
from tests.adapters.models import IDS

FOUR = torch.cat([IDS, IDS.flip(1)])
NAMES = ["blue", "__base__", "red", "blue"]


def config(seed: int, kind: Any = BoneConfig, **overrides: Any) -> Any:
    return kind(r=4, init_weights=False, seed=seed, **{"target_modules": "all-linear", **overrides})


def two(model: Any, first: Any = None, second: Any = None) -> PeftModel:
    """Return a model with adapters red (active) and blue, both with a random start."""
    adapted = get_peft_model(model, first or config(1, task_type="CAUSAL_LM"), adapter_name="red")
    adapted.add_adapter("blue", second or config(2, task_type="CAUSAL_LM"))
    return adapted.eval()  # type: ignore[return-value]


def outputs(model: Any, names: list[str] | None = None, ids: Tensor = FOUR) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **({} if names is None else {"adapter_names": names})).logits


def alone(model: Any, name: str, call: Any) -> Any:
    """Return what a call gives with one adapter alone, or with none."""
    if name == "__base__":
        with model.disable_adapter():
            return call(model)
    before = model.active_adapter
    model.set_adapter(name)
    try:
        return call(model)
    finally:
        model.set_adapter(before)


def row_by_row(model: Any, names: list[str] = NAMES) -> Tensor:
    return torch.stack([alone(model, name, outputs)[row] for row, name in enumerate(names)])


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["red", "green", "red", "red"], "adapter_names 'green' is unknown.*Known: __base__, blue, red"),
        ("redblue", "adapter_names must be a list"),
        (["red", 1, "red", "red"], "adapter_names must be a list"),
        ([], "adapter_names must be a list"),
        (["red", "blue", "red"], r"one name for each of the 4 rows that the layer sees, got .*q_proj"),
        (["red", "blue"], r"each of the 4 rows .*pass num_beams or num_return_sequences to generate"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: Any, message: str, tiny_llama: Any) -> None:
    model = two(tiny_llama())
    before = outputs(model)
    with pytest.raises(ValueError, match=message):
        outputs(model, names)
    assert hooks(model) == 0  # a failed call leaves nothing behind
    assert torch.equal(outputs(model), before)


def test_training_mode_and_merged_adapters_are_refused(tiny_llama: Any) -> None:
    model = two(tiny_llama())
    with pytest.raises(ValueError, match=r"adapter_names must be None in training mode"):
        outputs(model.train(), NAMES)
    model.eval().merge_adapter(["blue"])
    with pytest.raises(ValueError, match="adapter_names must be None while adapters are merged"):
        outputs(model, NAMES)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, NAMES), row_by_row(model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [BoneConfig, EvaConfig])
def test_layers_of_experts_are_refused(kind: Any) -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:  # (rows, tokens, 8), half of the tokens to each expert
            even, odd = x.flatten(0, 1)[::2], x.flatten(0, 1)[1::2]
            return torch.stack([self.experts[0](even), self.experts[1](odd)], dim=1).view(x.shape)

    targets = ["experts.0", "experts.1"]
    settings = [kind(r=4, target_modules=targets) for _ in range(2)]
    model: Any = get_peft_model(Mixture(), settings[0], adapter_name="red")
    model.add_adapter("blue", settings[1])
    # Two rows of two tokens: each expert sees as many as there are names, of both rows.
    with pytest.raises(ValueError, match=r"adapter_names .* experts are adapted.*experts\.0"):
        model.eval()(torch.randn(2, 2, 8), adapter_names=["red", "blue"])


def test_an_adapter_cannot_have_the_name_of_the_base(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="adapter_name must be another than '__base__'"):
        get_peft_model(tiny_llama(), config(1), adapter_name="__base__")


def test_a_disabled_model_gives_the_base_for_every_row(tiny_llama: Any) -> None:
    model = two(tiny_llama())
    with model.disable_adapter():
        assert torch.equal(outputs(model, NAMES), outputs(tiny_llama().eval()))


def test_row_indices_follow_the_names() -> None:
    groups = RowNames(NAMES).groups(4, torch.device("cpu"), "layer")
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "blue": [0, 3],
        "__base__": [1],
        "red": [2],
    }


# Layers -------------------------------------------------------------------------------------------


def test_adapters_on_different_layers_and_of_different_forms(tiny_llama: Any) -> None:
    first = config(1, target_modules=["q_proj", "down_proj"], form="bat")
    model = two(tiny_llama(), first, config(2, target_modules=["q_proj", "v_proj"]))
    for name in ("red", "blue"):
        model.set_adapter(name)
        torch.testing.assert_close(outputs(model, NAMES), row_by_row(model), atol=1e-6, rtol=1e-5)


def test_half_precision_rounds_as_each_adapter_alone_does(tiny_llama: Any) -> None:
    model = two(tiny_llama(dtype=torch.bfloat16))
    mixed = outputs(model, NAMES)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, row_by_row(model), atol=1e-2, rtol=1e-2)


def test_gradients_reach_the_inputs_and_the_rows_own_adapters(tiny_llama: Any) -> None:
    model = two(tiny_llama())
    model.requires_grad_(True)
    embedded = model.get_input_embeddings()(FOUR).detach().requires_grad_()
    model(
        inputs_embeds=embedded, adapter_names=["red", "__base__", "__base__", "red"]
    ).logits.sum().backward()
    assert embedded.grad is not None
    assert bool(embedded.grad.abs().amax((1, 2)).gt(0).all())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert bool(layer.bone_block["red"].grad.any())
    assert layer.bone_block["blue"].grad is None


# Modules trained whole ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BoneConfig, EvaConfig], ids=["ours", "lora"])
@pytest.mark.parametrize("active", ["red", "blue"])
def test_a_module_that_one_adapter_trains_whole(kind: Any, active: str, tiny_llama: Any) -> None:
    # PEFT's own LoRA ends in a KeyError here: blue has no head of its own.
    target = {"target_modules": ["q_proj", "up_proj"]}
    first = config(1, kind, modules_to_save=["lm_head"], **target)
    model = two(tiny_llama(), first, config(2, kind, **target))
    model.base_model.model.lm_head.modules_to_save["red"].weight.data += 0.1
    model.set_adapter(active)
    torch.testing.assert_close(outputs(model, NAMES), row_by_row(model), atol=1e-6, rtol=1e-5)


# Generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=6, pad_token_id=0)},
    ],
    ids=["greedy", "beams", "several", "config"],
)
def test_generation_of_each_row_is_that_of_its_adapter(settings: dict[str, Any], tiny_llama: Any) -> None:
    model = two(tiny_llama())
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **settings}

    def generate(model: Any, **more: Any) -> Tensor:
        return model.generate(input_ids=FOUR, **options, **more)

    mixed = generate(model, adapter_names=NAMES)
    each = len(mixed) // 4
    found = {name: alone(model, name, generate) for name in set(NAMES)}
    for row, name in enumerate(NAMES):
        part = slice(row * each, (row + 1) * each)
        assert torch.equal(mixed[part], found[name][part]), name
    assert not torch.equal(found["red"], found["blue"])
    assert hooks(model) == 0


def test_sampling_several_sequences_of_each_prompt(tiny_llama: Any) -> None:
    model = two(tiny_llama())
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    mixed = model.generate(input_ids=FOUR, adapter_names=NAMES, **options)
    greedy = model.generate(input_ids=FOUR, adapter_names=NAMES, max_new_tokens=4, do_sample=False)
    assert torch.equal(mixed, greedy.repeat_interleave(3, dim=0))


@pytest.mark.parametrize("beams", [1, 2])
def test_encoder_decoder(beams: int) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    base = T5ForConditionalGeneration(
        T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    )
    choice = {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    model = two(base, config(1, **choice), config(2, **choice))
    for module in model.modules():  # the random start is small beside T5's embeddings
        for block in getattr(module, "bone_block", {}).values():
            block.data *= 20

    def generate(model: Any, **more: Any) -> Tensor:
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
        return model.generate(input_ids=FOUR % 64, **settings, **more)

    mixed = generate(model, adapter_names=NAMES)
    found = {name: alone(model, name, generate) for name in set(NAMES)}
    assert torch.equal(mixed, torch.stack([found[name][row] for row, name in enumerate(NAMES)]))
    assert not torch.equal(found["red"], found["blue"])
    assert not torch.equal(found["red"], found["__base__"])


# PEFT's own LoRA ----------------------------------------------------------------------------------


def test_a_lora_of_peft_is_left_as_it_is(tiny_llama: Any) -> None:
    loras = [LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) for _ in range(2)]
    model = two(tiny_llama(), *loras)
    torch.testing.assert_close(outputs(model, NAMES), row_by_row(model), atol=1e-6, rtol=1e-5)
