"""`initialize_from_data`: what it reads, what it refuses, what it leaves as it was; on EVA and LoRA-GA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hf_ext.adapters import EvaConfig, LoraGaConfig, SorsaConfig, awaits_data, initialize_from_data
from hf_ext.adapters import _data_start as data_start_module
from hf_ext.adapters._data_start import StartData, batches_of

IDS = torch.arange(6 * 12).reshape(6, 12) * 7 % 256
CONFIGS = {
    "eva": EvaConfig(r=2, rho=1.0, n_tokens=72, target_modules=["q_proj", "down_proj"]),
    "lora_ga": LoraGaConfig(r=2, n_samples=6, target_modules=["q_proj", "down_proj"]),
}
BOTH = pytest.mark.parametrize("kind", CONFIGS)


def waiting(model: nn.Module, kind: str = "eva") -> Any:
    return get_peft_model(model, CONFIGS[kind])  # type: ignore[arg-type]


def start(model: Any, data: Any, **options: Any) -> dict[str, Tensor]:
    """Start the adapter and return its tensors."""
    initialize_from_data(model, data, **{"show_progress": False, **options})
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


# What may be given ------------------------------------------------------------------------------------


@BOTH
def test_data_set_equals_batches_made_by_hand(kind: str, tiny_llama: Any) -> None:
    rows = [IDS[i, : 12 - i].tolist() for i in range(6)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows, "source": ["x"] * 6})
    batches = []
    for part in (range(4), range(4, 6)):
        width = max(len(rows[i]) for i in part)
        ids, mask, labels = (torch.full((len(part), width), fill) for fill in (0, 0, -100))
        for place, i in enumerate(part):
            ids[place, : len(rows[i])] = labels[place, : len(rows[i])] = torch.tensor(rows[i])
            mask[place, : len(rows[i])] = 1
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    found = start(waiting(tiny_llama(), kind), data, batch_size=4)
    assert_same(found, start(waiting(tiny_llama(), kind), batches))


def test_rows_of_a_data_set_that_bring_their_own_mask() -> None:
    data = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "attention_mask": [[0, 1, 1], [1]]})
    (batch,) = batches_of(data, 8)
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert "labels" not in batch


def test_data_set_without_tokens_is_refused(tiny_llama: Any) -> None:
    data = Dataset.from_dict({"text": ["a", "b"]})
    with pytest.raises(ValueError, match=r"column 'input_ids' \(tokenize it first\), got \['text'\]"):
        start(waiting(tiny_llama()), data)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        start(waiting(tiny_llama()), Dataset.from_dict({"input_ids": [[1]]}), batch_size=0)


@BOTH
def test_data_loader_and_generator(kind: str, tiny_llama: Any) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    loader = DataLoader(rows, batch_size=3)  # type: ignore[arg-type]
    expected = start(waiting(tiny_llama(), kind), loader)
    assert_same(start(waiting(tiny_llama(), kind), (batch for batch in loader)), expected)


def test_mapping_types_of_tokenizers(tiny_llama: Any) -> None:
    from transformers import BatchEncoding

    batch = BatchEncoding({"input_ids": IDS})
    assert_same(start(waiting(tiny_llama()), [batch]), start(waiting(tiny_llama()), [{"input_ids": IDS}]))


def test_no_more_is_read_than_asked_for(tiny_llama: Any) -> None:
    taken = []

    def endless() -> Iterator[dict[str, Tensor]]:
        while True:
            taken.append(1)
            yield {"input_ids": IDS[:2]}

    start(waiting(tiny_llama()), endless())
    assert len(taken) == 3  # 72 tokens in batches of 24


@BOTH
@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "dataloader must be one that gives at least one batch"),
        (None, "dataloader must be iterable, got 'NoneType'"),
        ([[1, 2]], "dataloader must be an iterable of mappings .*got 'list'"),
        ([{}], "dataloader must be an iterable of mappings"),
    ],
)
def test_unfit_data(kind: str, data: Any, match: str, tiny_llama: Any) -> None:
    model = waiting(tiny_llama(), kind)
    with pytest.raises(ValueError, match=match):
        start(model, data)
    assert awaits_data(model) == ["default"]


def test_batches_without_labels_are_refused_where_a_loss_is_needed(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match=r"batch must be a mapping with 'labels'.*got \['input_ids'\]"):
        start(waiting(tiny_llama(), "lora_ga"), [{"input_ids": IDS}])


def test_a_loss_of_ones_own(tiny_llama: Any) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss

    batches = [{"input_ids": IDS, "labels": IDS}]
    expected = start(waiting(tiny_llama(), "lora_ga"), batches)
    assert_same(start(waiting(tiny_llama(), "lora_ga"), batches, loss_function=loss), expected, atol=0)


# Which adapter ---------------------------------------------------------------------------------------


def test_adapters_are_told_apart(tiny_llama: Any) -> None:
    model = waiting(tiny_llama())
    model.add_adapter("second", CONFIGS["eva"])
    assert awaits_data(model) == ["default", "second"]
    with pytest.raises(ValueError, match=r"adapter_name must be given: .* wait for data are default, second"):
        start(model, [{"input_ids": IDS}])
    start(model, [{"input_ids": IDS}], adapter_name="second")
    assert awaits_data(model) == ["default"]
    start(model, [{"input_ids": IDS}])
    assert awaits_data(model) == []


def test_models_without_anything_to_start(tiny_llama: Any) -> None:
    for model in (tiny_llama(), get_peft_model(tiny_llama(), SorsaConfig(r=2, target_modules=["q_proj"]))):
        assert awaits_data(model) == []
        with pytest.raises(ValueError, match="wait for data are none"):
            start(model, [{"input_ids": IDS}])


@BOTH
def test_random_starts_do_not_wait(kind: str, tiny_llama: Any) -> None:
    config = type(CONFIGS[kind])(r=2, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(tiny_llama(), config)
    assert awaits_data(model) == []
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="this one has its start, or none to wait for"):
        start(model, [{"input_ids": IDS, "labels": IDS}], adapter_name="default")


@BOTH
def test_second_call_is_refused(kind: str, tiny_llama: Any) -> None:
    model = waiting(tiny_llama(), kind)
    batches = [{"input_ids": IDS, "labels": IDS}]
    before = start(model, batches)
    with pytest.raises(ValueError, match="this one has its start"):
        start(model, batches, adapter_name="default")
    assert_same({n: p for n, p in model.named_parameters() if n in before}, before, atol=0)


# What is left as it was -------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("fails", [False, True])
def test_flags_modes_and_hooks_are_put_back(kind: str, fails: bool, tiny_llama: Any) -> None:
    model = waiting(tiny_llama(), kind).train()
    model.base_model.model.model.norm.eval()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    modes = {n: m.training for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    batches = [{"input_ids": IDS + (10**6 if fails else 0), "labels": IDS}]
    if fails:
        with pytest.raises(IndexError):
            start(model, batches)
    else:
        start(model, batches)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(p.grad is None for p in model.parameters())
    assert model.config.use_cache
    assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())
    assert awaits_data(model) == (["default"] if fails else [])


def test_adapters_that_were_disabled_stay_so(tiny_llama: Any) -> None:
    model = waiting(tiny_llama())
    with model.disable_adapter():
        start(model, [{"input_ids": IDS}])
        assert all(m._disable_adapters for m in model.modules() if hasattr(m, "awaiting"))
    assert not any(m._disable_adapters for m in model.modules() if hasattr(m, "awaiting"))


# Progress -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shown", "main", "expected"), [(True, True, 2), (True, False, 0), (False, True, 0)])
def test_progress_on_the_first_process_alone(
    shown: bool, main: bool, expected: int, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    bar = data_start_module.tqdm

    def counting(*arguments: Any, **options: Any) -> Any:
        made.append(not options["disable"])
        return bar(*arguments, **{**options, "disable": True})

    monkeypatch.setattr(data_start_module, "tqdm", counting)
    monkeypatch.setattr(data_start_module.dist, "is_main", lambda: main)
    config = EvaConfig(r=2, n_tokens=72, target_modules=["q_proj"], method="sketch")  # two passes
    start(get_peft_model(tiny_llama(), config), [{"input_ids": IDS}], show_progress=shown)
    assert len(made) == 2
    assert sum(made) == expected


# Losses ---------------------------------------------------------------------------------------------


def test_mean_loss_comes_with_its_number_of_terms(tiny_llama: Any) -> None:
    labels = IDS.clone()
    labels[:, :4] = -100
    batch = {"input_ids": IDS, "labels": labels}
    model = tiny_llama()
    data = StartData(model, "default", {}, None, [batch], None, False)
    loss, count = data.mean_loss(batch)
    assert count == 6 * 8
    torch.testing.assert_close(loss, model(**batch).loss)


def test_loader_whose_length_is_unknown(tiny_llama: Any) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield from ({"input_ids": row} for row in IDS)

    found = start(waiting(tiny_llama()), DataLoader(Stream(), batch_size=3))
    assert_same(found, start(waiting(tiny_llama()), [{"input_ids": IDS[:3]}, {"input_ids": IDS[3:]}]))
