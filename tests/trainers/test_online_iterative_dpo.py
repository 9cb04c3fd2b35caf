"""Rounds: what they train on, where they resume, what the reference is, and the smoothed loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from hf_ext.core.files import read_tensors
from hf_ext.trainers import OnlineIterativeDPOConfig, OnlineIterativeDPOTrainer
from hf_ext.trainers._round_files import read_rows
from tests.callbacks.runs import StopAt, equal
from tests.trainers.runs import (
    ARGUMENTS,
    build,
    columns,
    model_folder,
    parameters,
    rows,
    settings_of,
    tiny_model,
    tokenizer,
    training_logs,
)

INFO = OnlineIterativeDPOTrainer.info
SMALL: dict[str, Any] = {"num_rounds": 2, "num_candidates": 3, "kl_prompts": 0}


def flat(completions: list[str], **kwargs: Any) -> list[float]:
    """Reward: the same for all."""
    return [1.0] * len(completions)


def pairs_of(folder: Path, number: int) -> Dataset:
    return read_rows(folder / f"round_{number}" / "pairs.parquet")


# Rows ---------------------------------------------------------------------------------------------


def test_rounds_take_disjoint_prompts_and_keep_ids(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings=SMALL, max_steps=1, save_strategy="no")
    trainer.train()
    first, second = (pairs_of(tmp_path, number) for number in range(2))
    assert not {tuple(ids) for ids in first["prompt_ids"]} & {tuple(ids) for ids in second["prompt_ids"]}
    lines = (tmp_path / "round_0" / "candidates.jsonl").read_text().splitlines()
    assert len(lines) == 6
    ids = tokenizer()
    for row, line in zip(first, map(json.loads, lines), strict=True):
        better, worse = line["pair"]
        assert ids.decode(row["chosen_ids"], skip_special_tokens=True) == line["completions"][better]
        assert ids.decode(row["rejected_ids"], skip_special_tokens=True) == line["completions"][worse]
        assert line["scores"][better] == max(line["scores"])
        assert line["scores"][worse] == min(line["scores"])
        assert row["chosen_reward"] > row["rejected_reward"]


def test_prompts_per_round_begin_anew_when_they_are_used_up(tmp_path: Path) -> None:
    settings = {**SMALL, "num_rounds": 4, "prompts_per_round": 5}
    trainer = build(INFO, tmp_path, settings=settings)
    seen = [list(trainer.prompts_of(number)["prompt"]) for number in range(4)]
    assert [len(part) for part in seen] == [5, 5, 5, 5]
    assert len({*seen[0], *seen[1]}) == 10
    assert seen[2][2:] == seen[0][:3]


def test_accumulated_rounds_train_on_all_pairs_so_far(tmp_path: Path) -> None:
    settings = {**SMALL, "num_rounds": 3}
    alone = build(INFO, tmp_path / "a", settings=settings, max_steps=1, save_strategy="no")
    alone.train()
    joined = build(
        INFO,
        tmp_path / "b",
        settings={**settings, "accumulate_rounds": True},
        max_steps=1,
        save_strategy="no",
    )
    joined.train()
    sizes = [len(pairs_of(tmp_path / "a", number)) for number in range(3)]
    found = [pairs_of(tmp_path / "b", number) for number in range(3)]
    assert [len(part) for part in found] == [sizes[0], len(found[0]) + sizes[1], len(found[1]) + sizes[2]]
    assert found[1]["chosen_ids"][: sizes[0]] == found[0]["chosen_ids"][:]


def test_ties_everywhere_leave_the_policy_as_it_is(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings=SMALL, given={"reward_funcs": flat})
    output = trainer.train()
    assert output.global_step == 0
    assert equal(parameters(trainer), dict(tiny_model().named_parameters()))
    figures = json.loads((tmp_path / "rounds.json").read_text())["figures"]
    assert [entry["pairs"] for entry in figures] == [0.0, 0.0]
    assert all(math.isfinite(value) for entry in figures for value in entry.values())


def test_kept_moments_outlive_rounds_that_train_nothing(tmp_path: Path) -> None:
    settings = {**SMALL, "num_rounds": 1, "prompts_per_round": 4, "reset_optimizer": False}
    build(INFO, tmp_path, settings=settings, given={"reward_funcs": flat}).train()
    build(INFO, tmp_path, settings={**settings, "num_rounds": 2}).train(resume_from_checkpoint=True)
    kept = read_tensors(tmp_path / "round_1" / "optimizer.safetensors")
    assert any(bool(value.abs().sum() > 0) for value in kept.values())
    idle = build(INFO, tmp_path, settings={**settings, "num_rounds": 3}, given={"reward_funcs": flat})
    idle.train(resume_from_checkpoint=True)
    after = read_tensors(tmp_path / "round_2" / "optimizer.safetensors")
    assert equal(kept, after)
    last = build(INFO, tmp_path, settings={**settings, "num_rounds": 4}, max_steps=1, save_strategy="no")
    last.train(resume_from_checkpoint=True)
    steps = [
        v for n, v in read_tensors(tmp_path / "round_3" / "optimizer.safetensors").items() if "step" in n
    ]
    before = [v for n, v in kept.items() if "step" in n]
    assert [float(now) for now in steps] == [float(then) + 1 for then in before]


def test_a_missing_end_costs_its_penalty(tmp_path: Path) -> None:
    def by_length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    end = tokenizer().eos_token_id
    for penalty, ended in ((None, False), (100.0, True)):
        settings = {**SMALL, "num_candidates": 48, "num_rounds": 1, "missing_eos_penalty": penalty}
        trainer = build(
            INFO,
            tmp_path / str(penalty),
            settings=settings,
            given={"reward_funcs": by_length},
            max_steps=1,
            save_strategy="no",
            max_completion_length=40,
            max_length=80,
        )
        # A model that ends one completion in some twenty tokens.
        with torch.no_grad():
            trainer.model.lm_head.weight[end] *= 40
        trainer.train()
        chosen = pairs_of(tmp_path / str(penalty), 0)["chosen_ids"]
        if ended:
            assert all(ids[-1] == end for ids in chosen)
        else:
            assert any(ids[-1] != end for ids in chosen)


def test_temperatures_are_taken_in_turn(tmp_path: Path) -> None:
    settings = {**SMALL, "num_candidates": 5, "temperatures": [1.0, 0.3]}
    trainer = build(INFO, tmp_path, settings=settings)
    asked: list[tuple[int, float]] = []
    draw = trainer.sampler.completions

    def watched(prompt_ids: Any, n: int, **given: Any) -> Any:
        asked.append((n, given["temperature"]))
        return draw(prompt_ids, n, **given)

    trainer.sampler.completions = watched
    candidates = trainer._candidates([[5, 6, 7], [8, 9]])
    assert asked == [(3, 1.0), (2, 0.3)]
    assert [len(group) for group in candidates] == [5, 5]


def test_candidates_of_the_policy_before_the_last_round(tmp_path: Path) -> None:
    settings = {**SMALL, "num_candidates": 4, "mix_previous_policy": 0.5}
    trainer = build(INFO, tmp_path, settings=settings)
    trainer.round = 1
    other = {name: value.clone() for name, value in trainer.policy_state().items()}
    for value in other.values():
        value.mul_(0.5)
    trainer.previous_policy = other
    before = parameters(trainer)
    mixed = trainer._candidates([[5, 6, 7], [8, 9]])
    assert equal(parameters(trainer), before)
    trainer.load_policy(other)
    seed = trainer.args.seed + 1000 + 500
    assert [group[2:] for group in mixed] == trainer.sampler.completions(
        [[5, 6, 7], [8, 9]], 2, temperature=1.0, seed=seed
    )


# Loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("reference", ["round_start", "initial"])
def test_the_first_round_is_dpo_on_its_pairs(reference: str, peft: bool, tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM") if peft else None
    settings = {"num_rounds": 1, "num_candidates": 2, "reference": reference, "kl_prompts": 0}
    arguments = {"max_steps": 3, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.1}
    ours = build(INFO, tmp_path / "ours", settings=settings, peft_config=adapter, **arguments)
    ours.train()
    data = pairs_of(tmp_path / "ours", 0).select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])

    class OfIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    theirs = OfIds(
        model=tiny_model(),
        args=DPOConfig(str(tmp_path / "theirs"), **{**settings_of(DPOConfig, ARGUMENTS), **arguments}),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=adapter,
    )
    theirs.train()
    expected = [entry["loss"] for entry in training_logs(theirs)]
    assert [entry["loss"] for entry in training_logs(ours)] == pytest.approx(expected, abs=1e-6)
    for name, value in parameters(theirs).items():
        torch.testing.assert_close(parameters(ours)[name], value, rtol=0.0, atol=1e-6)


def test_the_reference_is_the_policy_that_a_round_begins_with(tmp_path: Path) -> None:
    for reference in ("round_start", "initial"):
        trainer = build(
            INFO,
            tmp_path / reference,
            settings={**SMALL, "reference": reference},
            max_steps=3,
            save_strategy="no",
        )
        trainer.train()
        first = [next(e for e in training_logs(trainer) if e["round"] == number) for number in range(2)]
        assert first[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        at_start = first[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert at_start == (reference == "round_start")


@pytest.mark.parametrize(("z", "epsilon"), [(0.3, 0.1), (-1.2, 0.3)])
def test_smoothing_is_conservative_dpo(z: float, epsilon: float, tmp_path: Path) -> None:
    config = OnlineIterativeDPOConfig(str(tmp_path), bf16=False, label_smoothing=epsilon, report_to="none")
    ell = torch.nn.functional.logsigmoid
    plus, minus = -ell(torch.tensor(z)), -ell(torch.tensor(-z))
    parts = {
        "robust": ((1 - epsilon) * plus - epsilon * minus) / (1 - 2 * epsilon),
        "sigmoid": plus,
    }
    assert config.loss_weights is not None
    found = sum(w * parts[name] for name, w in zip(config.loss_type, config.loss_weights, strict=True))
    assert found == pytest.approx(float((1 - epsilon) * plus + epsilon * minus), abs=1e-6)
    if (z, epsilon) == (0.3, 0.1):
        assert found == pytest.approx(0.584355, abs=1e-6)
    again = OnlineIterativeDPOConfig(**{**config.to_dict(), "output_dir": str(tmp_path)})
    assert (again.loss_type, again.loss_weights) == (config.loss_type, config.loss_weights)


# Resuming -----------------------------------------------------------------------------------------


class StopWhileSampling(Exception):
    pass


@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("reset", [True, False])
def test_a_run_cut_between_rounds_goes_on(adapter: str | None, reset: bool, tmp_path: Path) -> None:
    config = None
    if adapter:
        config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    settings = {**SMALL, "reset_optimizer": reset, "mix_previous_policy": 0.4}
    arguments = {"max_steps": 3, "save_strategy": "no"}
    whole = build(INFO, tmp_path / "whole", settings=settings, peft_config=config, **arguments)
    whole.train()
    cut = build(INFO, tmp_path / "cut", settings=settings, peft_config=config, **arguments)

    def stop(*args: Any) -> Any:
        if cut.round == 1:
            raise StopWhileSampling
        return sample(*args)

    sample, cut._sample_pairs = cut._sample_pairs, stop
    with pytest.raises(StopWhileSampling):
        cut.train()
    resumed = build(INFO, tmp_path / "cut", settings=settings, peft_config=config, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert equal(parameters(resumed), parameters(whole))
    for entry, expected in zip(training_logs(resumed), training_logs(whole), strict=True):
        assert {**entry, "num_tokens": 0} == {**expected, "num_tokens": 0}  # TRL counts tokens by process


def test_a_finished_run_resumed_does_nothing_more(tmp_path: Path) -> None:
    first = build(INFO, tmp_path, settings=SMALL, max_steps=1, save_strategy="no")
    first.train()
    again = build(INFO, tmp_path, settings=SMALL, max_steps=1, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert equal(parameters(again), parameters(first))


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    build(INFO, tmp_path, settings=SMALL, max_steps=1, save_strategy="no").train()
    other = build(INFO, tmp_path, settings={**SMALL, "num_candidates": 4})
    with pytest.raises(ValueError, match="num_candidates must be 3"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint .*round_0"):
        build(INFO, tmp_path, settings=SMALL).train(resume_from_checkpoint=str(tmp_path / "round_0"))
    with pytest.raises(ValueError, match=r"rounds\.json"):
        build(INFO, tmp_path / "none", settings=SMALL).train(resume_from_checkpoint=True)
    (tmp_path / "rounds.json").write_text('{"round": 1}')
    with pytest.raises(ValueError, match=r"rounds\.json is not a record"):
        build(INFO, tmp_path, settings=SMALL).train(resume_from_checkpoint=True)


def test_a_fresh_run_over_an_old_one_takes_nothing_of_it(tmp_path: Path) -> None:
    for seed in (7, 8):
        trainer = build(INFO, tmp_path, settings=SMALL, max_steps=2, seed=seed)
        trainer.train()
    alone = build(INFO, tmp_path / "alone", settings=SMALL, max_steps=2, seed=8)
    alone.train()
    assert equal(parameters(trainer), parameters(alone))
    assert pairs_of(tmp_path, 1)["chosen_ids"][:] == pairs_of(tmp_path / "alone", 1)["chosen_ids"][:]


def test_only_two_policies_are_kept(tmp_path: Path) -> None:
    build(INFO, tmp_path, settings={**SMALL, "num_rounds": 4}, max_steps=1, save_strategy="no").train()
    kept = sorted(path.parent.name for path in tmp_path.glob("round_*/policy.safetensors"))
    assert kept == ["round_2", "round_3"]
    assert read_tensors(tmp_path / "round_3" / "policy.safetensors").keys()


# Bad input ----------------------------------------------------------------------------------------


def test_rewards_that_are_no_numbers_stop_the_run_before_training(tmp_path: Path) -> None:
    def nothing(completions: list[str], **kwargs: Any) -> list[float]:
        return [math.nan] * len(completions)

    trainer = build(INFO, tmp_path, settings=SMALL, given={"reward_funcs": nothing})
    with pytest.raises(ValueError, match="nothing"):
        trainer.train()
    assert not (tmp_path / "rounds.json").exists()


def test_what_a_round_cannot_use_is_refused(tmp_path: Path) -> None:
    frozen = tiny_model(1)
    with pytest.raises(ValueError, match="ref_model"):
        build(INFO, tmp_path, settings=SMALL, given={"ref_model": frozen})
    with pytest.raises(TypeError, match=r"reward_funcs\[0\]"):
        build(INFO, tmp_path, settings=SMALL, given={"reward_funcs": frozen})
    with pytest.raises(TypeError, match="train_dataset"):
        build(INFO, tmp_path, settings=SMALL, data=columns(rows(), ["prompt"]).to_iterable_dataset())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train_dataset's rows"):
        build(INFO, tmp_path, settings={**SMALL, "num_rounds": 13}).train()


@pytest.mark.parametrize(
    ("sharding", "name"),
    [
        ({"fsdp_version": 1, "activation_checkpointing": False}, "fsdp_config's version"),
        ({"fsdp_version": 2, "activation_checkpointing": True}, "activation_checkpointing"),
    ],
)
def test_sharding_that_rounds_cannot_read_is_refused(
    sharding: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = DPOTrainer.__init__

    def sharded(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.is_fsdp_enabled = True
        plugin = SimpleNamespace(**sharding)
        monkeypatch.setattr(self.accelerator.state, "fsdp_plugin", plugin, raising=False)

    monkeypatch.setattr(DPOTrainer, "__init__", sharded)
    with pytest.raises(ValueError, match=name):
        build(INFO, tmp_path, settings=SMALL)


def test_the_initial_model_can_be_given(tmp_path: Path) -> None:
    settings = {**SMALL, "reference": "initial", "kl_prompts": 2}
    arguments = {"max_steps": 2, "save_strategy": "no"}
    given = build(INFO, tmp_path / "a", settings=settings, given={"ref_model": tiny_model()}, **arguments)
    given.train()
    ahead = {**settings, "precompute_ref_log_probs": True}  # as it is in any case
    read = build(INFO, tmp_path / "b", settings=ahead, **arguments)
    read.train()
    assert equal(parameters(given), parameters(read))
    assert Path(read.ref_model.config._name_or_path) == model_folder(0)


def test_prompts_that_leave_a_completion_no_room_are_dropped(tmp_path: Path) -> None:
    lengths = [len(ids) for ids in build(INFO, tmp_path / "a", settings=SMALL).prompts["prompt_ids"]]
    limit = sorted(lengths)[6]
    kept = build(INFO, tmp_path / "b", settings=SMALL, max_length=limit).prompts
    assert [len(ids) for ids in kept["prompt_ids"]] == [length for length in lengths if length < limit]
    with pytest.raises(ValueError, match="max_length"):
        build(INFO, tmp_path / "c", settings=SMALL, max_length=2)


def test_prompts_that_are_used_again_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"4 rounds of 5 prompts .* 12 prompts again"):
        build(INFO, tmp_path, settings={**SMALL, "num_rounds": 4, "prompts_per_round": 5})


def test_streams_and_images_are_refused_before_any_work(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(rows()))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"train_dataset": stream}, "train_dataset"),
        ({"eval_dataset": stream}, "eval_dataset"),
        ({"eval_dataset": {"held": stream}}, r"eval_dataset\['held'\]"),
    ]
    for given, name in cases:
        with pytest.raises(TypeError, match=f"{name} must be a datasets.Dataset, got IterableDataset"):
            build(INFO, tmp_path, settings=SMALL, given=given)
        field, value = next(iter(given.items()))
        seen: Any = rows().add_column("images", [None] * 12)  # type: ignore[call-arg]
        pictured = {"held": seen} if isinstance(value, dict) else seen
        with pytest.raises(ValueError, match=f"{name}'s columns must be of text"):
            build(INFO, tmp_path, settings=SMALL, given={field: pictured})


def test_held_out_pairs_need_their_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval_dataset.*'rejected'"):
        build(INFO, tmp_path, settings=SMALL, given={"eval_dataset": columns(rows(), ["prompt", "chosen"])})


def test_settings_of_another_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="OnlineIterativeDPOConfig"):
        build(INFO, tmp_path, settings=SMALL, given={"args": DPOConfig(str(tmp_path), bf16=False)})


def test_the_same_object_resumes_from_its_first_policy(tmp_path: Path) -> None:
    whole = build(INFO, tmp_path / "whole", settings=SMALL, max_steps=3, save_strategy="no")
    whole.train()
    stop = StopAt(2)
    cut = build(INFO, tmp_path / "cut", settings=SMALL, max_steps=3, save_strategy="no", others=[stop])
    with pytest.raises(InterruptedError):
        cut.train()
    stop.step = -1
    cut.train(resume_from_checkpoint=True)
    assert equal(parameters(cut), parameters(whole))


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": 3, "save_steps": 1}
    whole = build(INFO, tmp_path / "whole", settings=SMALL, **arguments)
    whole.train()
    cut = build(INFO, tmp_path / "cut", settings=SMALL, others=[StopAt(3)], **arguments)
    with pytest.raises(InterruptedError):
        cut.train()
    (tmp_path / "cut" / "round_0" / "checkpoint-2" / "trainer_state.json").unlink()
    resumed = build(INFO, tmp_path / "cut", settings=SMALL, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert equal(parameters(resumed), parameters(whole))


def test_pairs_evaluated_later_are_compared_with_the_rounds_first_policy(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    trainer = build(INFO, tmp_path, settings=SMALL, peft_config=config, max_steps=3, save_strategy="no")
    trainer.train()
    given = trainer.evaluate()["eval_loss"]
    before = parameters(trainer)
    later = trainer.evaluate(columns(rows(4, start=200), ["prompt", "chosen", "rejected"]))["eval_loss"]
    assert later == pytest.approx(given, abs=1e-6)
    assert later != pytest.approx(math.log(2), abs=1e-4)
    assert equal(parameters(trainer), before)


def test_a_number_that_json_lacks_does_not_end_a_run(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            state.log_history[-1]["grad_norm"] = math.nan

    trainer = build(INFO, tmp_path, settings=SMALL, others=[Broken()], max_steps=1, save_strategy="no")
    trainer.train()
    logs = json.loads((tmp_path / "rounds.json").read_text())["logs"]
    assert logs[0]["grad_norm"] is None


def test_every_token_that_ends_a_completion_counts_as_its_end(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings={**SMALL, "missing_eos_penalty": 0.5})
    end = tokenizer().eos_token_id
    trainer.model.generation_config.eos_token_id = [7]
    assert trainer._unended([[[5, end], [5, 7], [5, 6]]]).tolist() == [[0.0, 0.0, 0.5]]


def test_a_prompt_without_room_is_named_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Say \d+.*max_completion_length=120"):
        build(INFO, tmp_path, settings=SMALL, max_completion_length=120)


def test_only_the_last_round_keeps_its_checkpoints(tmp_path: Path) -> None:
    build(INFO, tmp_path, settings={**SMALL, "num_rounds": 3}, max_steps=1, save_steps=1).train()
    assert [path.parent.name for path in tmp_path.glob("round_*/checkpoint-*")] == ["round_2"]


def test_a_round_taken_up_in_its_middle_is_not_evaluated_as_at_its_start(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "eval_on_start": True}
    cut = build(INFO, tmp_path, settings=SMALL, others=[StopAt(2)], **arguments)
    with pytest.raises(InterruptedError):
        cut.train()
    resumed = build(INFO, tmp_path, settings=SMALL, **arguments)
    resumed.train(resume_from_checkpoint=True)
    evaluated = [entry["round"] for entry in resumed.state.log_history if "eval_loss" in entry]
    assert evaluated == [0, 1]  # the first one is the cut run's, kept in its checkpoint
