"""D2O: the paper's numbers and identities, its twin, anchors from the data and from the policy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from hf_ext.core.state import load_state
from hf_ext.trainers._anchors import ROW, spread, with_prefix
from hf_ext.trainers._log_ratios import LogRatios
from hf_ext.trainers.d2o import D2OConfig, D2OTrainer, d2o_margins
from tests.callbacks.runs import StopAt, equal
from tests.reference import d2o as reference
from tests.trainers.runs import (
    ARGUMENTS,
    build,
    columns,
    parameters,
    rows,
    settings_of,
    tiny_model,
    tokenizer,
    training_logs,
)

INFO = D2OTrainer.info
OFFLINE = {"num_anchors": 3, "anchor_max_new_tokens": 6, "online_after": None}


def with_anchors(count: int = 3, size: int = 12) -> Dataset:
    """Return rows with the column `anchors`, the first of which is `chosen`."""
    texts = ["one two", "three", "four five six seven"]
    return rows(size).map(lambda row: {"anchors": [row["chosen"], *texts][:count]}).remove_columns("chosen")


def made(folder: Path, **given: Any) -> Any:
    return build(INFO, folder, **{"settings": OFFLINE, "max_steps": 3, "save_strategy": "no", **given})


def alone(folder: Path, data: Dataset | None = None, **keywords: Any) -> Any:
    """Return a trainer without a data set for evaluation."""
    data = columns(rows(), ("prompt", "rejected")) if data is None else data
    args = D2OConfig(
        output_dir=str(folder), **settings_of(D2OConfig, {**ARGUMENTS, **OFFLINE, "max_steps": 3})
    )
    return D2OTrainer(tiny_model(), args=args, train_dataset=data, processing_class=tokenizer(), **keywords)


# The formula ------------------------------------------------------------------------------------------------

ANCHORS, FROZEN = torch.tensor([-2.0, -3.0, -4.0]), torch.tensor([-2.5, -2.5, -4.5])


def test_the_papers_sides_by_hand() -> None:
    anchors = ANCHORS.clone().requires_grad_()
    negative = torch.tensor([-1.5], requires_grad=True)
    ratios = (anchors - FROZEN)[None]
    z = d2o_margins(ratios, torch.ones(1, 3, dtype=torch.bool), negative + 1.0, beta=0.1, alpha=0.1)
    loss = -F.logsigmoid(z).sum()
    loss.backward()
    assert z.item() == pytest.approx(0.0666667, abs=1e-7)
    assert loss.item() == pytest.approx(0.660369, abs=1e-6)
    assert anchors.grad is not None
    assert negative.grad is not None
    assert anchors.grad.tolist() == pytest.approx([-0.0161113] * 3, abs=1e-7)
    assert negative.grad.item() == pytest.approx(0.0483340, abs=1e-7)


def test_the_loss_is_at_most_the_mean_of_the_instances_losses() -> None:
    ratios, negative = (ANCHORS - FROZEN)[None], torch.tensor([-0.5])
    mask = torch.ones(1, 3, dtype=torch.bool)

    def instances(values: torch.Tensor) -> float:
        return -F.logsigmoid(0.1 * values - 0.1 * negative).mean().item()

    loss = -F.logsigmoid(d2o_margins(ratios, mask, negative, beta=0.1, alpha=0.1)).item()
    assert instances(ratios) == pytest.approx(0.660647, abs=1e-6)
    assert loss <= instances(ratios)
    same = torch.full((1, 3), 0.7)
    equal_ones = -F.logsigmoid(d2o_margins(same, mask, negative, beta=0.1, alpha=0.1)).item()
    assert equal_ones == pytest.approx(instances(same), abs=1e-7)


def test_duplicated_and_permuted_anchors_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 5):
        ratios, negatives = torch.randn(4, count, generator=generator), torch.randn(4, generator=generator)
        mask = torch.ones(4, count, dtype=torch.bool)
        z = d2o_margins(ratios, mask, negatives, beta=0.3, alpha=0.2)
        twice = d2o_margins(
            torch.cat([ratios, ratios], dim=1), torch.cat([mask, mask], dim=1), negatives, beta=0.3, alpha=0.2
        )
        other = d2o_margins(ratios.flip(1), mask, negatives, beta=0.3, alpha=0.2)
        torch.testing.assert_close(twice, z, rtol=0.0, atol=1e-6)
        torch.testing.assert_close(other, z, rtol=0.0, atol=1e-6)


def test_anchors_that_are_not_there_have_no_part() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    ratios = torch.tensor([[1.0, 50.0], [50.0, 50.0]])
    z = d2o_margins(ratios, mask, torch.tensor([2.0, 2.0]), beta=1.0, alpha=0.5)
    assert z.tolist() == [0.0, -1.0]
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    laid = spread(values, torch.tensor([[False, True], [True, False]]))
    assert laid.tolist() == [[0.0, 1.0], [2.0, 0.0]]
    laid[1, 0].backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0]


# The trainer ------------------------------------------------------------------------------------------------


def test_one_anchor_that_is_the_chosen_completion_is_dpo(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    settings = settings_of(DPOConfig, {**ARGUMENTS, **options})
    theirs = DPOTrainer(
        model=tiny_model(),
        args=DPOConfig(output_dir=str(tmp_path / "theirs"), **settings),
        train_dataset=columns(rows(), ("prompt", "chosen", "rejected")),
        processing_class=tokenizer(),
    )
    theirs.train()
    ours = made(tmp_path / "ours", data=with_anchors(1), **options)
    ours.train()
    losses = [[entry["loss"] for entry in training_logs(trainer)] for trainer in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.0, abs=1e-6)
    for name, value in parameters(theirs).items():
        torch.testing.assert_close(parameters(ours)[name], value, rtol=0.0, atol=1e-6)
    shared = [[entry["entropy"] for entry in training_logs(trainer)] for trainer in (ours, theirs)]
    assert shared[0] == pytest.approx(shared[1], abs=1e-5)


@pytest.mark.parametrize("mean_over_tokens", [False, True])
def test_the_loss_is_its_twins(mean_over_tokens: bool, tmp_path: Path) -> None:
    settings = {**OFFLINE, "d2o_beta": 0.7, "d2o_alpha": 0.4, "length_normalize": mean_over_tokens}
    frozen = tiny_model(1)
    trainer = made(tmp_path, data=with_anchors(), settings=settings, given={"ref_model": frozen})
    examples = [trainer.train_dataset[number] for number in (0, 5, 7)]
    batch = trainer._prepare_inputs(trainer.data_collator(examples))
    margins = [
        reference.margin(
            *(trainer.model, frozen, frozen),
            *(one["prompt_ids"], one["rejected_ids"], one["anchor_ids"]),
            beta=0.7,
            alpha=0.4,
            mean_over_tokens=mean_over_tokens,
        )
        for one in examples
    ]
    expected = sum(reference.loss(z) for z in margins) / 3
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, abs=2e-6)
    assert abs(expected - math.log(2)) > 1e-3


def test_a_policy_that_is_the_reference_has_margin_0(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    trainer.train()
    first = training_logs(trainer)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["d2o/z"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("size", [1, 4, 3])
def test_a_microbatch_of_anchors_gives_the_same_gradient(size: int, tmp_path: Path) -> None:
    grads: list[dict[str, torch.Tensor]] = []
    for small in (None, size):
        settings = {**OFFLINE, "anchor_microbatch": small}
        frozen = tiny_model(1)
        trainer = made(tmp_path, data=with_anchors(), settings=settings, given={"ref_model": frozen})
        trainer.model.train()
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).backward()
        grads.append({name: p.grad for name, p in trainer.model.named_parameters()})
    assert max(float(g.abs().max()) for g in grads[0].values()) > 1e-3
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=0.0, atol=1e-6)


def test_a_microbatch_of_anchors_keeps_fewer_activations(tmp_path: Path) -> None:
    kept: list[int] = []
    for small in (None, 1):
        settings = {**OFFLINE, "anchor_microbatch": small}
        trainer = made(tmp_path, data=with_anchors(), settings=settings)
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            trainer.compute_loss(trainer.model, batch)
    assert kept[1] < 0.6 * kept[0]  # two rows of eight, and weights


def test_references_in_advance_change_nothing(tmp_path: Path) -> None:
    ends, losses = [], []
    for ahead in (False, True):
        for data in (None, with_anchors(2)):
            settings = {**OFFLINE, "precompute_ref_log_probs": ahead}
            trainer = made(tmp_path / str(ahead), data=data, settings=settings, eval_strategy="epoch")
            assert (trainer.ref_model is None) == ahead
            trainer.train()
            ends.append(parameters(trainer))
            losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    for one, other in ((0, 2), (1, 3)):
        assert losses[one] == pytest.approx(losses[other], abs=1e-6)
        for name, value in ends[one].items():
            torch.testing.assert_close(ends[other][name], value, rtol=0.0, atol=2e-5)
    assert not equal(ends[0], ends[1])


def test_two_frozen_adapters_are_the_two_references(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    for name in ("ref_pos", "ref_neg"):
        model.add_adapter(name, config)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if ".ref_" in name:
            parameter.requires_grad_(False)
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    trainer = made(tmp_path, data=with_anchors(), model=model)
    example = trainer.train_dataset[2]
    batch = trainer._prepare_inputs(trainer.data_collator([example]))
    found = trainer.reference_logps(batch)
    for adapter, parts in (
        ("ref_pos", [(0, "rejected_ids")]),
        ("ref_neg", [(1, None), (2, None), (3, None)]),
    ):
        model.set_adapter(adapter)
        for row, name in parts:
            ids = example[name] if name else example["anchor_ids"][row - 1]
            expected = reference.log_probability(model, example["prompt_ids"], ids)
            assert found[row].item() == pytest.approx(expected, abs=1e-4)
    model.set_adapter("default")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".ref_" in n}
    trainer.train()
    assert all(torch.equal(dict(model.named_parameters())[n], value) for n, value in before.items())
    assert training_logs(trainer)[0]["d2o/z"] != 0.0


def test_one_reference_adapter_or_a_trained_one_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    model.add_adapter("ref_pos", config)
    with pytest.raises(ValueError, match="both 'ref_pos' and 'ref_neg'"):
        made(tmp_path, data=with_anchors(), model=model)
    model = get_peft_model(tiny_model(), config)
    for name in ("ref_pos", "ref_neg"):
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ref_neg" in name)
    with pytest.raises(ValueError, match=r"ref_neg.*must be frozen"):
        made(tmp_path, data=with_anchors(), model=model)


# Data -------------------------------------------------------------------------------------------------------


def test_chosen_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="'chosen' is not used"):
        trainer = made(tmp_path, data=columns(rows(), ("prompt", "rejected", "chosen")))
    assert "chosen" not in trainer.train_dataset.column_names


def test_an_anchor_equal_to_the_bad_completion_is_dropped(tmp_path: Path) -> None:
    data = rows().map(lambda row: {"anchors": [row["rejected"], "fine"]}).remove_columns("chosen")
    trainer = made(tmp_path, data=data)
    assert {len(anchors) for anchors in trainer.train_dataset["anchor_ids"]} == {1}
    same = rows().map(lambda row: {"anchors": [row["rejected"]]}).remove_columns("chosen")
    with pytest.warns(UserWarning, match="train_dataset: 12 of 12 rows, first row 0, have no anchor"):
        trainer = made(tmp_path, data=same)
    trainer.train()
    assert training_logs(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("bad", [[], ["a", ""], ["a", "b", "c", "d"]])
def test_bad_anchors_name_the_row(bad: list[str], tmp_path: Path) -> None:
    data = with_anchors()
    data = data.map(lambda row, i: {"anchors": bad if i == 4 else row["anchors"]}, with_indices=True)
    with pytest.raises(
        ValueError, match="train_dataset: 'anchors' of row 4 must be a list of 1 to num_anchors"
    ):
        made(tmp_path, data=data)


def test_streamed_rows_bring_their_anchors(tmp_path: Path) -> None:
    data = with_anchors().to_iterable_dataset()
    streamed = made(tmp_path / "streamed", data=data)
    streamed.train()
    assert len(training_logs(streamed)) == 3
    assert ROW not in next(iter(streamed.train_dataset))
    with pytest.raises(ValueError, match="anchors"):
        made(tmp_path, data=columns(rows(), ("prompt", "rejected")).to_iterable_dataset())
    with pytest.raises(ValueError, match="online_after"):
        made(tmp_path, data=data, settings={**OFFLINE, "online_after": 1})


def test_a_collator_and_a_reference_that_trains_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data_collator"):
        made(tmp_path, given={"data_collator": lambda examples: examples})
    model = tiny_model()
    other = tiny_model(1)
    other.lm_head = model.lm_head
    with pytest.raises(ValueError, match="ref_model"):
        made(tmp_path, model=model, given={"ref_model": other})
    with pytest.raises(ValueError, match="vocab"):
        made(tmp_path, given={"ref_model": tiny_model(3, vocab_size=4160)})


# Sampled anchors --------------------------------------------------------------------------------------------


def test_instructions_are_for_sampling_only(tmp_path: Path) -> None:
    plain = made(tmp_path, settings={**OFFLINE, "anchor_prefixes": []})
    told = made(tmp_path, settings={**OFFLINE, "anchor_prefixes": ["Be kind. "]})
    for trainer in (plain, told):
        trainer.sample_first_anchors()
    sets = [trainer.anchors.sets["train"] for trainer in (plain, told)]
    assert sets[0].rows != sets[1].rows
    batches = [trainer.complete({ROW: torch.tensor([4])}) for trainer in (plain, told)]
    prompt = plain.train_dataset[4]["prompt_ids"]
    for batch in batches:
        assert batch["input_ids"][1, : len(prompt)].tolist() == prompt
        assert batch["completion_mask"][1, : len(prompt)].sum() == 0


def test_an_instruction_begins_the_first_message_of_the_user() -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert with_prefix(chat, "P ") == [chat[0], {"role": "user", "content": "P u"}]
    assert chat[1]["content"] == "u"
    assert with_prefix("x", "P ") == "P x"


def test_the_first_anchors_come_from_the_reference(tmp_path: Path) -> None:
    frozen = tiny_model(1)
    ours = made(tmp_path, given={"ref_model": frozen}, settings={**OFFLINE, "anchor_prefixes": []})
    other = made(tmp_path, model=tiny_model(1), settings={**OFFLINE, "anchor_prefixes": []})
    for trainer in (ours, other):
        trainer.sample_first_anchors()
    assert ours.anchors.sets["train"].rows == other.anchors.sets["train"].rows
    assert ours.anchors.sets["eval"].rows == other.anchors.sets["eval"].rows


@pytest.mark.parametrize("workers", [0, 2])
def test_anchors_are_replaced_on_time_whatever_has_been_prefetched(workers: int, tmp_path: Path) -> None:
    settings = {**OFFLINE, "online_after": 3, "resample_every": 2}
    trainer = made(tmp_path, settings=settings, max_steps=8, dataloader_num_workers=workers)
    trainer.train()
    assert [entry["d2o/anchor_age"] for entry in training_logs(trainer)] == [0, 1, 2, 0, 1, 0, 1, 0]


def test_given_anchors_are_replaced_too(tmp_path: Path) -> None:
    settings = {**OFFLINE, "online_after": 3, "resample_every": 50}
    trainer = made(tmp_path, data=with_anchors(), settings=settings, max_steps=6)
    trainer.train()
    assert [entry["d2o/anchor_age"] for entry in training_logs(trainer)] == [0, 1, 2, 0, 1, 2]
    assert len(trainer.anchors.sets["train"].rows[0]) == 3


def test_the_checkpoint_holds_the_anchors(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, others=[StopAt(4)])  # sampled at steps 0, 2 and 4, saved at 3
    with pytest.raises(InterruptedError):
        trainer.train()
    saved = json.loads((tmp_path / "checkpoint-3" / "hf_ext_d2o.json").read_text(encoding="utf-8"))
    assert saved["scalars"]["steps"] == {"train": 2, "eval": 0}
    fresh = build(INFO, tmp_path)
    scalars, tensors = load_state(tmp_path / "checkpoint-3", "hf_ext_d2o")
    fresh.load_state_dict({**scalars, **tensors})
    again = fresh.state_dict()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    assert tensors["train/tokens"].dtype == torch.int32
    fewer = build(INFO, tmp_path, data=columns(rows(5), ("prompt", "rejected")))
    with pytest.raises(ValueError, match="the train data set must be of 12 rows"):
        fewer.load_state_dict({**scalars, **tensors})


def test_given_anchors_need_no_state(tmp_path: Path) -> None:
    trainer = alone(tmp_path, with_anchors())
    trainer.train()
    assert not list(tmp_path.glob("**/hf_ext_*"))


def test_the_filter_has_anchors_drawn_again(tmp_path: Path) -> None:
    seen: list[int] = []

    def short(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[bool]:
        seen.append(len(prompts))
        assert len(prompts) == len(completions) == len(completion_ids)
        return [ids[0] % 2 == 0 for ids in completion_ids]

    trainer = alone(tmp_path, anchor_filter=short)
    trainer.sample_first_anchors()
    assert len(seen) == 4
    assert seen == sorted(seen, reverse=True)
    found = trainer.anchors.sets["train"].rows
    assert all(anchor[0] % 2 == 0 for row in found for anchor in row)
    assert sum(map(len, found)) > 0.85 * 36


def test_a_filter_that_refuses_all_or_miscounts_is_named(tmp_path: Path) -> None:
    nothing = made(tmp_path, given={"anchor_filter": lambda prompts, **_: [False] * len(prompts)})
    with pytest.warns(UserWarning, match="anchor_filter"):
        nothing.sample_first_anchors()
    wrong = made(tmp_path, given={"anchor_filter": lambda **_: [True]})
    with pytest.raises(ValueError, match="anchor_filter must be 36 values"):
        wrong.sample_first_anchors()


def test_a_prompt_without_room_for_anchors_names_its_row(tmp_path: Path) -> None:
    data = columns(rows(), ("prompt", "rejected"))
    trainer = made(tmp_path, data=data, settings={**OFFLINE, "anchor_max_new_tokens": 110})
    with pytest.raises(ValueError, match=r"the prompt of row 0 has \d+ tokens"):
        trainer.train()


def test_evaluation_of_another_data_set_samples_from_the_reference(tmp_path: Path) -> None:
    other = columns(rows(4, start=300), ("prompt", "rejected"))
    before = alone(tmp_path / "before")
    before.evaluate(other)
    after = alone(tmp_path / "after")
    after.train()
    after.evaluate(other)
    assert list(after.anchors.sets) == ["train", "eval"]
    drawn = [trainer.anchors.sets["eval"].rows for trainer in (before, after)]
    assert [len(row) for row in drawn[0]] == [3] * 4
    # Draws also depend on the step; the model is the same, so that anchors of one step are equal.
    after.anchors.sets["eval"].rows, after.state.global_step = None, 0
    after.sample_first_anchors()
    assert after.anchors.sets["eval"].rows == drawn[0]


def test_prompts_of_a_chat_train(tmp_path: Path) -> None:
    ids = tokenizer()
    ids.chat_template = "{% for m in messages %}{{ m.content }}<|eos|>{% endfor %}"
    data = columns(rows(), ("prompt", "rejected")).map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "anchors": ["a text", "another"],
        }
    )
    args = D2OConfig(
        output_dir=str(tmp_path), **settings_of(D2OConfig, {**ARGUMENTS, **OFFLINE, "max_steps": 2})
    )
    for given in (data, data.remove_columns("anchors")):
        trainer = D2OTrainer(tiny_model(), args=args, train_dataset=given, processing_class=ids)
        trainer.train()
        assert len(training_logs(trainer)) == 2


def test_a_hook_gets_log_ratios() -> None:
    found = LogRatios(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([2]))
    assert found.ratios.tolist() == [2.0]
