"""Completions of the policy in training: draws, their independence of batches, vLLM's calls, rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

import hf_ext.trainers._sampling as sampling
from hf_ext.trainers._sampling import (
    Sampler,
    SamplingSettings,
    decode_completions,
    tokenize_prompts,
)
from tests.conftest import build_tiny_llama

ASSETS = Path(sampling.__file__).parents[1] / "assets" / "tiny-llama"
PROMPTS = [[5, 6, 7], [9], [11, 12], [13, 14, 15, 16, 17], [18]]


def trainer_of(model: Any, **args: Any) -> Any:
    settings = {"seed": 0, "gradient_checkpointing_kwargs": None, **args}
    return SimpleNamespace(
        model=model,
        model_wrapped=model,
        accelerator=Accelerator(cpu=True),
        args=SimpleNamespace(**settings),
        state=SimpleNamespace(global_step=0),
        processing_class=AutoTokenizer.from_pretrained(ASSETS),
        is_fsdp_enabled=False,
    )


@pytest.fixture
def model() -> Any:
    return build_tiny_llama(vocab_size=4096, hidden_size=16, eos_token_id=1, bos_token_id=0, pad_token_id=2)


def make(model: Any, **settings: Any) -> Sampler:
    return Sampler(trainer_of(model), SamplingSettings(**{"max_new_tokens": 6, **settings}))


def test_draws_depend_on_seed_place_and_number_alone(model: Any) -> None:
    whole = make(model).completions(PROMPTS, 3, seed=1)
    assert [len(group) for group in whole] == [3] * 5
    assert make(model, batch_size=4).completions(PROMPTS, 3, seed=1) == whole
    assert make(model).completions(PROMPTS[:2], 2, seed=1) == [group[:2] for group in whole[:2]]
    assert make(model).completions(PROMPTS, 3, seed=2) != whole
    assert len({tuple(ids) for group in whole for ids in group}) > 10


def test_without_a_seed_the_step_decides(model: Any) -> None:
    sampler = make(model)
    first = sampler.completions(PROMPTS, 1)
    assert sampler.completions(PROMPTS, 1) == first
    sampler.trainer.state.global_step = 1
    assert sampler.completions(PROMPTS, 1) != first


def test_random_state_and_modes_are_left_alone(model: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    make(model).completions(PROMPTS, 2, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_gradient_checkpointing_is_put_back(model: Any) -> None:
    model.gradient_checkpointing_enable()
    make(model).completions(PROMPTS, 1, seed=0)
    assert model.is_gradient_checkpointing


def test_frequencies_are_the_models_probabilities(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[4:12] *= 100  # a few likely tokens
        expected = torch.softmax(model(torch.tensor([[5, 6]])).logits[0, -1].double() / 1.5, dim=-1)
    drawn = make(model, max_new_tokens=1, batch_size=4000).completions(
        [[5, 6]], 4000, temperature=1.5, seed=0
    )
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn[0]]), minlength=4096) / 4000
    likely = expected.topk(5).indices
    assert expected[likely].max() > 0.05
    spread = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts - expected).abs() <= 4.5 * spread + 1e-3)[likely].all()


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.0}])
def test_the_narrowest_settings_give_the_likeliest_tokens(model: Any, settings: dict[str, Any]) -> None:
    (found,) = make(model, **settings).completions([[5, 6, 7]], 2, seed=3)
    ids = torch.tensor([[5, 6, 7]])
    expected: list[int] = []
    for _ in range(6):
        with torch.no_grad():
            expected.append(int(model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([expected[-1:]])], dim=1)
    assert found == [expected, expected]


def test_a_completion_ends_with_the_end_token(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[1] = 0
        model.lm_head.weight[1] = 3 * model.model(torch.tensor([[5]])).last_hidden_state[0, -1]
    found = make(model, max_new_tokens=20).completions([[5]], 60, seed=0)[0]
    ended = [ids for ids in found if 1 in ids]
    assert ended
    assert all(ids.index(1) == len(ids) - 1 for ids in ended)
    assert all(len(ids) == 20 for ids in found if 1 not in ids)


def test_the_models_own_end_tokens_count(model: Any) -> None:
    found = make(model, max_new_tokens=8).completions([[5]], 3, seed=0)[0]
    other = found[0][3]
    model.generation_config.eos_token_id = [1, other]
    again = make(model, max_new_tokens=8).completions([[5]], 3, seed=0)[0]
    assert again[0] == found[0][: found[0].index(other) + 1]


def test_a_penalty_on_repetition_is_transformers_but_does_not_count_padding(model: Any) -> None:
    with torch.no_grad():  # the padding token would be the likeliest
        model.lm_head.weight[2] = 3 * model.model(torch.tensor([[5, 6]])).last_hidden_state[0, -1]
    # So large that a token which is counted as seen is never taken.
    penalized = make(model, repetition_penalty=1e4, temperature=0.0, max_new_tokens=4)
    alone = penalized.completions([[5, 6]], 1)[0]
    theirs = model.generate(
        torch.tensor([[5, 6]]),
        attention_mask=torch.ones(1, 2, dtype=torch.long),
        do_sample=False,
        max_new_tokens=4,
        repetition_penalty=1e4,
    )
    assert alone[0] == theirs[0, 2:].tolist()
    assert alone[0][0] == 2
    assert penalized.completions([[5, 6], [7] * 20], 1)[0] == alone


def test_the_models_own_generation_settings_do_not_come_in(model: Any) -> None:
    plain = make(model).completions(PROMPTS, 2, seed=0)
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=2, repetition_penalty=9.0)
    assert make(model).completions(PROMPTS, 2, seed=0) == plain


def test_another_model_can_be_drawn_from(model: Any) -> None:
    other = build_tiny_llama(seed=5, vocab_size=4096, hidden_size=16, eos_token_id=1, pad_token_id=2)
    assert make(model).completions(PROMPTS, 1, seed=0, model=other) == make(other).completions(
        PROMPTS, 1, seed=0
    )


def test_bad_prompts_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match="prompt 1 must be at least one token"):
        make(model).completions([[5], []], 1)
    with pytest.raises(ValueError, match=r"prompt 0 has 123 tokens; with max_new_tokens=6 .* room for 122"):
        make(model).completions([[5] * 123], 1)
    assert len(make(model).completions([[5] * 122], 1)[0][0]) == 6
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        make(model).completions([[5]], 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("batch_size", 0),
        ("vllm_mode", "elsewhere"),
        ("generation_kwargs", {"num_beams": 4}),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingSettings(**{field: value})


# Processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("synced", [False, True])
def test_two_processes_draw_what_one_does(model: Any, monkeypatch: pytest.MonkeyPatch, synced: bool) -> None:
    whole = make(model, batch_size=4).completions(PROMPTS, 3, seed=1)  # four batches; five below
    for prompts, expected in ((PROMPTS, whole), (PROMPTS[:1], whole[:1])):
        found, calls = _on_two(model, prompts, monkeypatch, synced)
        assert found == [expected, expected]
        if synced:
            assert calls[0] == calls[1]


def _on_two(model: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, synced: bool) -> Any:
    """Run the two processes one after the other: first for what each draws, then with both parts."""
    parts: list[Any] = []
    calls: list[int] = []
    generate = type(model).generate

    def counted(self: Any, **kwargs: Any) -> Any:
        calls[-1] += 1
        return generate(self, **{**kwargs, "synced_gpus": False})

    monkeypatch.setattr(type(model), "generate", counted)
    monkeypatch.setattr(sampling.dist, "world_size", lambda: 2)
    monkeypatch.setattr(sampling.dist, "is_distributed", lambda: True)
    monkeypatch.setattr(sampling.dist, "together", lambda: sampling.contextlib.nullcontext())

    def run(rank: int, gather: Callable[[Any], list[Any]]) -> Any:
        calls.append(0)
        monkeypatch.setattr(sampling.dist, "rank", lambda: rank)
        monkeypatch.setattr(sampling.dist, "gather_objects", gather)
        sampler = make(model, batch_size=4)
        sampler.trainer.is_fsdp_enabled = synced
        return sampler.completions(prompts, 3, seed=1)

    for rank in range(2):
        with pytest.raises(StopIteration):
            run(rank, lambda part: [parts.append(part), next(iter([]))])
    return [run(rank, lambda part: parts) for rank in range(2)], calls


# vLLM -------------------------------------------------------------------------------------------------------


class Engine:
    """Stands in for TRL's VLLMGeneration: keeps what it is given, answers with the prompt's last token."""

    def __init__(self, **settings: Any) -> None:
        self.given, self.temperature, self.calls, self.synced = settings, settings["temperature"], [], 0

    def sync_weights(self) -> None:
        self.synced += 1

    def generate(self, prompts: Any, images: Any, num_generations: int) -> tuple[Any, ...]:
        self.calls.append((prompts, images, num_generations, self.temperature))
        answers = [[ids[-1], 100 + place % num_generations, 1, 77] for place, ids in enumerate(prompts)]
        return prompts, answers, None, None


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "is_vllm_available", lambda: True)
    monkeypatch.setattr(sampling, "VLLMGeneration", Engine)


@pytest.mark.usefixtures("engine")
def test_vllm_is_made_and_called_as_trls_distillation_does(model: Any) -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    sampler = make(model, use_vllm=True, vllm_mode="server", vllm_server_port=9, temperature=0.7)
    accepted = set(VLLMGeneration.__init__.__code__.co_varnames) - {"self"}
    assert set(sampler.vllm.given) <= accepted
    assert sampler.vllm.given["mode"] == "server"
    assert sampler.vllm.given["server_port"] == 9
    assert sampler.vllm.given["max_completion_length"] == 6
    assert sampler.vllm.given["logprobs"] is None
    assert sampler.vllm.given["model"] is model
    found = sampler.completions([[5, 6], [7]], 2, temperature=0.3)
    assert found == [[[6, 100, 1], [6, 101, 1]], [[7, 100, 1], [7, 101, 1]]]
    assert sampler.vllm.calls == [([[5, 6], [5, 6], [7], [7]], None, 2, 0.3)]
    assert sampler.vllm.synced == 1
    assert sampler.vllm.temperature == 0.7


@pytest.mark.usefixtures("engine")
def test_vllm_gets_as_many_prompts_on_each_process(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.dist, "world_size", lambda: 2)
    shares: list[Any] = []
    for rank in range(2):
        monkeypatch.setattr(sampling.dist, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(sampling.dist, "gather_objects", lambda part: [part, [[["other"]]] * 2])
        sampler = make(model, use_vllm=True)
        found = sampler.completions([[5], [6], [7]], 1)
        shares.append(sampler.vllm.calls[0][0])
        assert len(found) == 3
    assert shares == [[[5], [6]], [[7], [7]]]


def test_vllm_that_is_not_installed_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match="use_vllm"):
        make(model, use_vllm=True)


def test_a_config_gives_its_vllm_fields() -> None:
    from trl import DistillationConfig

    names = {one.name for one in sampling.fields(sampling.VLLMArguments)}
    theirs = {one.name: one.default for one in sampling.fields(DistillationConfig)}
    ours = {one.name: one.default for one in sampling.fields(sampling.VLLMArguments)}
    assert {name: theirs[name] for name in names} == ours
    args = SimpleNamespace(use_vllm=True, vllm_server_port=1234)
    assert SamplingSettings.of(args, top_k=3).vllm_server_port == 1234
    assert SamplingSettings.of(args, top_k=3).top_k == 3


# Text -------------------------------------------------------------------------------------------------------


def test_prompts_are_tokenized_as_dpo_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    text, chat = tokenize_prompts(tokenizer, ["def f", [{"role": "user", "content": "def f"}]])
    assert text == tokenizer("def f")["input_ids"]
    assert tokenizer.decode(chat) == "def f;>"
    ids = [[tokenizer("a")["input_ids"] + [1]], [tokenizer("b")["input_ids"]]]
    prompts: list[Any] = ["x", [{"role": "user", "content": "x"}]]
    assert decode_completions(tokenizer, prompts, ids) == [["a"], [[{"role": "assistant", "content": "b"}]]]
