"""PACED: stages in one run, weights in sampling and in the loss, refreshes, and what a checkpoint holds."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from hf_ext.core.registry import get
from hf_ext.trainers._distillation import shows_teacher_more
from hf_ext.trainers.paced_distillation import PacedDistillationConfig, PacedDistillationTrainer
from tests.callbacks.runs import equal
from tests.reference import paced_distillation as reference
from tests.trainers.runs import build, columns, parameters, rows, tiny_model, training_logs

INFO = get("trainer", "paced_distillation")
assert INFO.target is PacedDistillationTrainer
assert INFO.config is PacedDistillationConfig


def built(folder: Path, data: Any = None, **arguments: Any) -> Any:
    own = {"save_strategy": "no", "max_steps": 4, **arguments}
    return build(INFO, folder, data=data, **own)


def by_row(passes: dict[str, float]) -> Any:
    """Return a verifier of which each prompt passes a share."""

    def reward(prompts: list[str], **kwargs: Any) -> list[float]:
        seen: dict[str, int] = {}
        found = []
        for prompt in prompts:
            seen[prompt] = seen.get(prompt, 0) + 1
            found.append(float(seen[prompt] <= passes.get(prompt, 0)))
        return found

    return reward


# Stages -------------------------------------------------------------------------------------------


def watched(trainer: Any) -> list[tuple[int, str, float]]:
    """Return update, source of completions and divergence of each loss of a run."""
    found: list[tuple[int, str, float]] = []
    compute = trainer.compute_loss

    def watch(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        found.append((trainer.state.global_step, trainer.completion_source(), trainer.beta))
        return loss

    trainer.compute_loss = watch
    trainer.train()
    return found


def test_forward_kl_on_the_data_comes_first_then_reverse_kl_on_samples(tmp_path: Path) -> None:
    found = watched(built(tmp_path, settings={"paced_alpha": 0.0, "paced_beta": 0.0}))
    assert found == [(0, "dataset", 0.0), (1, "dataset", 0.0), (2, "student", 1.0), (3, "student", 1.0)]


@pytest.mark.parametrize(("split", "stage"), [(0.0, 2), (1.0, 1)])
def test_one_stage_alone(split: float, stage: int, tmp_path: Path) -> None:
    settings = {"paced_alpha": 0.0, "paced_beta": 0.0, "stage_split": split}
    trainer = built(tmp_path, settings=settings, max_steps=2)
    found = watched(trainer)
    assert {source for _, source, _ in found} == {"dataset" if stage == 1 else "student"}
    assert training_logs(trainer)[-1]["paced/stage"] == stage


def test_evaluation_is_of_the_stage_of_the_last_update(tmp_path: Path) -> None:
    trainer = built(tmp_path, settings={"paced_alpha": 0.0, "paced_beta": 0.0})
    trainer.state.max_steps = 4
    trainer.model.eval()
    found = []
    for step in (0, 1, 2, 3, 4):
        trainer.state.global_step = step
        found.append(trainer.stage())
    assert found == [1, 1, 1, 2, 2]


def test_the_divergences_by_hand() -> None:
    p, q = (0.7, 0.2, 0.1), (0.4, 0.4, 0.2)
    assert reference.kl(p, q) == pytest.approx(0.183787, abs=1e-6)
    assert reference.kl(q, p) == pytest.approx(0.192042, abs=1e-6)


@pytest.mark.parametrize("reset", [True, False])
def test_moments_begin_afresh_with_the_second_stage(reset: bool, tmp_path: Path) -> None:
    trainer = built(tmp_path, settings={"paced_alpha": 0.0, "paced_beta": 0.0, "reset_optimizer": reset})
    trainer.train()
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {2 if reset else 4}


# Weights ------------------------------------------------------------------------------------------


def test_uniform_weights_sample_nothing(tmp_path: Path) -> None:
    def never(**kwargs: Any) -> list[float]:
        raise AssertionError("no pass rate is needed")

    settings = {"paced_alpha": 0.0, "paced_beta": 0.0}
    trainer = built(tmp_path, settings=settings, given={"reward_funcs": never})
    trainer.train()
    assert trainer.state_dict() == {}


def test_only_rows_with_weight_are_drawn(tmp_path: Path) -> None:
    data = columns(rows(), ("prompt", "completion"))
    prompts = data["prompt"][:]
    passes = {prompts[2]: 2.0, prompts[5]: 1.0, prompts[7]: 4.0}  # of 4: weights 0.25, 0.1875 and 0
    trainer = built(
        tmp_path,
        given={"reward_funcs": by_row(passes)},
        settings={"rollouts": 4, "truncated_fails": False, "stage_split": 1.0},
    )
    seen: list[str] = []
    generate = trainer._generate_and_score_completions

    def watch(inputs: Any) -> Any:
        seen.extend(row["prompt"] for row in inputs)
        return generate(inputs)

    trainer._generate_and_score_completions = watch
    trainer.train()
    assert set(seen) == {prompts[2], prompts[5]}
    log = training_logs(trainer)[0]
    assert log["paced/frac_zero"] == pytest.approx(9 / 12)
    assert log["paced/frac_one"] == pytest.approx(1 / 12)
    assert log["paced/mean_pass_rate"] == pytest.approx(7 / 48)
    wanted = reference.weights([0, 0, 2, 0, 0, 1, 0, 4, 0, 0, 0, 0], 4)
    assert trainer.weights_at(0).tolist() == pytest.approx(wanted)
    assert log["paced/ess"] == pytest.approx(144 / sum(w * w for w in wanted))


def test_weights_multiply_the_loss_of_their_rows(tmp_path: Path) -> None:
    data = columns(rows(), ("prompt", "completion"))
    passes = {prompt: float(i % 5) for i, prompt in enumerate(data["prompt"][:])}
    trainer = built(
        tmp_path,
        given={"reward_funcs": by_row(passes)},
        settings={"rollouts": 4, "truncated_fails": False, "stage_split": 1.0, "apply": "loss"},
        max_steps=1,
    )
    trainer.state.max_steps = 1
    trainer.begin()
    trainer.model.train()
    chosen = [trainer.train_dataset[row] for row in (1, 2, 4)]  # of weights by 1, 2 and 4 of 4
    batch = trainer._generate_and_score_completions(chosen)
    loss = trainer.compute_loss(trainer.model, batch)
    wanted = reference.weights([i % 5 for i in range(12)], 4)
    assert batch["row_weights"].tolist() == pytest.approx([wanted[1], wanted[2], wanted[4]])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    cut = slice(batch["prompt_ids"].size(1) - 1, -1)
    with torch.no_grad():
        q, p = (
            model(input_ids=ids, attention_mask=attention).logits[:, cut].double().softmax(-1)
            for model in (trainer.model, tiny_model(1))
        )
    tokens = [
        [(p[row, t].tolist(), q[row, t].tolist()) for t in mask.nonzero().flatten().tolist()]
        for row, mask in enumerate(batch["completion_mask"])
    ]
    plain = reference.batch_loss(tokens, [wanted[1], wanted[2], wanted[4]])
    assert loss.item() == pytest.approx(plain, rel=1e-4)


def test_weights_of_the_data_need_no_verifier(tmp_path: Path) -> None:
    data = columns(rows(), ("prompt", "completion"))
    weighted: Any = data.add_column("sample_weight", [2.0] + [0.0] * 10 + [6.0])  # type: ignore[call-arg]
    trainer = built(tmp_path / "w", weighted, given={"reward_funcs": None}, settings={}, max_steps=2)
    trainer.train()
    assert trainer.weights_at(0).tolist() == [3.0] + [0.0] * 10 + [9.0]
    rated: Any = data.add_column("pass_rate", [0.5, 1.0] * 6)  # type: ignore[call-arg]
    trainer = built(tmp_path / "r", rated, given={"reward_funcs": None}, settings={}, max_steps=2)
    trainer.train()
    assert trainer.weights_at(0).tolist() == [2.0, 0.0] * 6
    assert len(trainer._tables) == 1


def test_new_rates_count_after_the_batch_that_is_fetched(tmp_path: Path) -> None:
    own = {"rollouts": 4, "truncated_fails": False, "estimator": "posterior"}
    for kind, last in (("sampling", 3), ("loss", 2)):  # taken after update 2, counted from 0
        settings = {**own, "apply": kind, "refresh_every": 1}
        trainer = built(tmp_path / kind, settings=settings, max_steps=3, given={"reward_funcs": by_row({})})
        trainer.train()
        assert trainer._tables[-1][0] == last
    trainer.args.apply, trainer.args.dataloader_num_workers = "sampling", 2
    trainer.args.gradient_accumulation_steps = 2
    assert trainer._delay() == 3  # 1 batch of accelerate's and 2 of each of 2 workers, over 2 micro-batches


def test_former_weights_stay_where_new_ones_would_all_be_zero(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def once(prompts: list[str], **kwargs: Any) -> list[float]:
        asked.append(len(prompts))
        return [float(i % 2 if len(asked) == 1 else 0) for i in range(len(prompts))]

    settings = {"rollouts": 2, "truncated_fails": False}
    trainer = built(tmp_path, settings=settings, given={"reward_funcs": once})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert asked == [24, 24]
    assert "former weights stay" in caplog.text
    assert len(trainer._tables) == 1


def test_a_second_run_takes_its_own_rates(tmp_path: Path) -> None:
    trainer = built(tmp_path, max_steps=2)
    trainer.train()
    trainer.train()
    assert trainer._tables[0][0] == 0


# Refusals -----------------------------------------------------------------------------------------


def test_all_zero_weights_are_refused_before_training(tmp_path: Path) -> None:
    trainer = built(tmp_path, given={"reward_funcs": by_row({})}, settings={"rollouts": 2})
    with pytest.raises(ValueError, match="posterior"):
        trainer.train()
    assert equal(parameters(trainer), dict(tiny_model().named_parameters()))


def test_what_gives_no_rates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward_funcs is missing"):
        built(tmp_path, given={"reward_funcs": None})
    data: Any = rows().add_column("sample_weight", [1.0] * 12)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="refresh_every"):
        built(tmp_path, data, settings={"refresh_every": 2})


def test_a_streamed_data_set_is_refused(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(rows()))
    with pytest.raises(TypeError, match=r"train_dataset must be a datasets\.Dataset"):
        built(tmp_path, stream)


def test_rows_with_images_are_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images"):
        built(tmp_path, rows().add_column("images", [None] * 12))  # type: ignore[call-arg]


def test_other_rows_than_the_checkpoint_s_are_refused(tmp_path: Path) -> None:
    trainer = built(tmp_path)
    state = {"starts": [0], "weights": torch.ones(1, 7), "figures": {}}
    with pytest.raises(ValueError, match="of 7 rows"):
        trainer.load_state_dict(state)


def test_the_second_stage_alone_needs_prompts_only(tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": rows()["prompt"][:], "pass_rate": [0.5] * 12})
    settings = {"stage_split": 0.0}
    trainer = built(tmp_path, data, settings=settings, given={"reward_funcs": None}, max_steps=1)
    trainer.train()
    assert training_logs(trainer)[0]["paced/stage"] == 2


# Self-distillation --------------------------------------------------------------------------------

ALONE = {"paced_alpha": 0.0, "paced_beta": 0.0, "stage_split": 0.0}


def shown(extra: str = " The answer is: {answer}") -> Dataset:
    """Return rows whose teacher sees the answer."""
    return columns(rows(), ("prompt",)).map(
        lambda row: {"teacher_prompt": row["prompt"] + extra.format(answer=row["answer"])}
    )


def own(folder: Path, data: Any = None, settings: Any = None, **arguments: Any) -> Any:
    data = shown() if data is None else data
    arguments = {
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"]),
        "eval_strategy": "no",
        **arguments,
    }
    given = {"teacher_model": None, "eval_dataset": None, **arguments.pop("given", {})}
    return built(folder, data=data, settings={**ALONE, **(settings or {})}, given=given, **arguments)


def test_a_stream_without_column_names_shows_the_teacher_more_too() -> None:
    def stream(rows: Any) -> IterableDataset:
        found = IterableDataset.from_generator(lambda: iter(list(rows)))
        assert found.column_names is None
        return found

    assert shows_teacher_more(stream(shown()))
    assert not shows_teacher_more(stream(columns(rows(), ("prompt",))))
    assert not shows_teacher_more(None)


def of_first_loss(trainer: Any) -> tuple[float, dict[str, Any]]:
    """Return the first loss of a run, and the batch it is of."""
    found: list[tuple[float, dict[str, Any]]] = []
    compute = trainer._compute_loss

    def watch(model: Any, inputs: Any, count: Any) -> Any:
        loss = compute(model, inputs, count)
        found.append((float(loss[0]), dict(inputs)))
        return loss

    trainer._compute_loss = watch
    trainer.train()
    return found[0]


def test_the_teacher_is_the_base_shown_more(tmp_path: Path) -> None:
    trainer = own(tmp_path, max_steps=1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    student = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loss, batch = of_first_loss(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(student[name])
    trainer.model.eval()
    total, count = 0.0, 0
    # Row by row without padding: KL(student || base) of each completion token, by hand.
    for row in range(len(batch["prompt_ids"])):
        ids = batch["completion_ids"][row][batch["completion_mask"][row] == 1]
        seen = [
            batch[f"{who}prompt_ids"][row][batch[f"{who}prompt_mask"][row] == 1] for who in ("", "teacher_")
        ]
        assert trainer.processing_class.decode(seen[1]).startswith(trainer.processing_class.decode(seen[0]))
        assert len(seen[1]) > len(seen[0])
        with torch.no_grad():
            p = trainer.model(torch.cat([seen[0], ids])[None]).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
            with trainer.model.disable_adapter():
                t = (
                    trainer.model(torch.cat([seen[1], ids])[None])
                    .logits[0, -len(ids) - 1 : -1]
                    .log_softmax(-1)
                )
        total, count = total + float((p.exp() * (p - t)).sum()), count + len(ids)
    assert total / count > 1e-4
    assert loss == pytest.approx(total / count, abs=1e-6)  # the rounding of sums over the vocabulary


def test_a_teacher_shown_the_same_is_the_teacher_without_a_context(tmp_path: Path) -> None:
    losses = []
    for name, data in (("same", shown("")), ("none", columns(rows(), ("prompt",)))):
        trainer = built(tmp_path / name, data=data, settings=ALONE, given={"eval_dataset": None}, max_steps=2)
        losses.append(of_first_loss(trainer)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_teacher_shown_what_the_student_sees_has_nothing_to_teach_an_adapter_at_its_start(
    tmp_path: Path,
) -> None:
    assert of_first_loss(own(tmp_path, shown(""), max_steps=1))[0] == pytest.approx(0.0, abs=1e-7)


def test_self_distillation_learns_what_the_context_tells_and_leaves_the_base(tmp_path: Path) -> None:
    trainer = own(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=3, given={"eval_dataset": shown()})
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora" in name for name in moved)
    assert all(math.isfinite(entry["loss"]) for entry in training_logs(trainer))


def test_what_self_distillation_cannot_be_is_refused(tmp_path: Path) -> None:
    plain = columns(rows(), ("prompt",))
    empty = shown().map(
        lambda row, i: {"teacher_prompt": "" if i == 3 else row["teacher_prompt"]}, with_indices=True
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": plain}, "teacher_prompt"),
        ({"settings": {"stage_split": 0.5}}, "stage_split"),
        ({"settings": {"beta": 0.5}}, "beta"),
        ({"peft_config": None}, "teacher_model"),
        ({"data": empty}, "'teacher_prompt' of row 3 is empty"),
        ({"given": {"eval_dataset": plain}}, "eval_dataset lacks the column 'teacher_prompt'"),
        ({"data": shown(" a b c d" * 40)}, "'teacher_prompt' of row 0 has"),
    ]
    for arguments, text in cases:
        with pytest.raises(ValueError, match=text):
            own(tmp_path, **arguments)
