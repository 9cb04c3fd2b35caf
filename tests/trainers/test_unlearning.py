"""Unlearning: the losses, the draws of retain rows, the reference, and when a run stops."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hf_ext.adapters import LoraGaConfig
from hf_ext.trainers import UnlearnCollator, UnlearningTrainer, npo_loss, npo_weight, unlearning
from hf_ext.trainers._token_loss import ROW
from tests.callbacks.runs import StopAt, equal
from tests.reference import unlearning as reference
from tests.trainers.runs import (
    ARGUMENTS,
    build,
    columns,
    parameters,
    rows,
    tiny_model,
    tokenizer,
    training_logs,
)

INFO = UnlearningTrainer.info
FORMS = [
    {"unlearn_loss": "ga"},
    {"unlearn_loss": "graddiff", "gamma_u": 0.5},
    {"unlearn_loss": "graddiff", "retain_loss": "kl"},
    {"unlearn_loss": "npo", "npo_beta": 0.3},
    {"unlearn_loss": "npo", "npo_level": "token_mean", "npo_beta": 2.0, "retain_loss": "none"},
    {"unlearn_loss": "npo", "retain_loss": "kl", "precompute_ref": False},
    {"unlearn_loss": "po", "refusals": ["I do not know."], "gamma_u": 2.0},
]


def make(folder: Path, *callbacks: Any, data: Any = None, given: Any = None, **settings: Any) -> Any:
    """Return a trainer with the plain optimizer and no clipping."""
    training = {key: settings.pop(key) for key in list(settings) if key not in SETTINGS}
    arguments = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        **training,
    }
    return build(INFO, folder, others=callbacks, settings={"max_forget_loss": 1e4, **settings}, data=data,
                 given=given, **arguments)  # fmt: skip


SETTINGS = set(INFO.config.__annotations__)  # type: ignore[union-attr]


def noisy(trainer: Any, scale: float = 0.3) -> None:
    """Move what trains away from the reference."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def batch_of(trainer: Any) -> dict[str, Any]:
    trainer.model.train()
    return dict(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))


def gradients(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def cut(trainer: Any) -> None:
    """Train until the run is stopped from within."""
    with pytest.raises(InterruptedError):
        trainer.train()


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


# The formulas -------------------------------------------------------------------------------------


def test_npo_by_hand() -> None:
    d = torch.tensor([-2.0, 0.0, 5.0], requires_grad=True)
    terms = [float(npo_loss(one[None], 0.1)) for one in d.detach()]
    assert terms == pytest.approx([11.962777, 13.862944, 19.481540], abs=2e-6)
    npo_loss(d, 0.1).backward()
    assert d.grad is not None
    assert (3 * d.grad).tolist() == pytest.approx([0.900332, 1.0, 1.244919], abs=1e-6)
    assert npo_weight(d.detach(), 0.1).tolist() == pytest.approx((3 * d.grad).tolist(), abs=1e-6)


def test_npo_is_gradient_ascent_where_beta_is_small_and_vanishes_where_a_row_is_forgotten() -> None:
    for start, beta, wanted in ((3.0, 1e-6, 1.0), (-1e4, 0.1, 0.0)):
        d = torch.tensor([start], requires_grad=True)
        npo_loss(d, beta).backward()
        assert d.grad is not None
        assert float(d.grad) == pytest.approx(wanted, abs=1e-5)
    assert math.isfinite(float(npo_loss(torch.tensor([1e5]), 0.1)))


def test_one_sequence_of_four_tokens_at_either_level() -> None:
    assert float(npo_loss(torch.tensor([-2.0]), 0.1)) == pytest.approx(11.962777, abs=2e-6)
    assert float(npo_loss(torch.tensor([-2.0 / 4]), 0.1)) == pytest.approx(13.369193, abs=2e-6)


# The loss of a batch ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_equals_the_reference_twin(form: dict[str, Any], tmp_path: Path) -> None:
    trainer = make(tmp_path, **form)
    start = tiny_model()
    noisy(trainer)
    batch = batch_of(trainer)
    count = batch["num_forget"]
    retains = form["unlearn_loss"] != "ga" and form.get("retain_loss") != "none"
    assert count == 2
    assert len(batch["input_ids"]) == (4 if retains else 2)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits, before = trainer.model(**inputs).logits, start(**inputs).logits
    streams = [
        (logits[part], before[part], batch["labels"][part]) for part in (slice(count), slice(count, None))
    ]
    wanted = reference.loss(
        form["unlearn_loss"],
        streams[0],
        streams[1] if retains else None,
        retain_loss=form.get("retain_loss", "nll"),
        gamma=form.get("gamma_u", 1.0),
        beta=form.get("npo_beta", 0.1),
        level=form.get("npo_level", "sequence"),
    )
    found, _ = gradients(trainer, batch)
    assert found == pytest.approx(wanted, rel=2e-5)


def test_npo_at_the_start_is_gradient_ascent_on_token_sums(tmp_path: Path) -> None:
    trainer = make(tmp_path, unlearn_loss="npo", retain_loss="none")
    batch = batch_of(trainer)
    loss, found = gradients(trainer, batch)
    assert loss == pytest.approx(20.0 * math.log(2.0), abs=1e-5)
    model = tiny_model()
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = outputs[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    picked.sum(1).mean().backward()
    close(found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, 2e-5)


def test_graddiff_without_retain_weight_is_ascent_is_sft_negated(tmp_path: Path) -> None:
    found = []
    for form in ({"unlearn_loss": "ga"}, {"unlearn_loss": "graddiff", "gamma_u": 0.0}):
        trainer = make(tmp_path / form["unlearn_loss"], **form)
        batch = batch_of(trainer)
        found.append(gradients(trainer, batch))
    assert found[0][0] == found[1][0]
    assert equal(found[0][1], found[1][1])
    keep = {key: value for key, value in ARGUMENTS.items() if key != "max_completion_length"}
    plain = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(output_dir=str(tmp_path / "sft"), **keep),
        train_dataset=columns(rows(), ("prompt", "completion")),
        processing_class=tokenizer(),
    )
    plain.model.train()  # pyright: ignore[reportOptionalMemberAccess]
    wanted = gradients(plain, {k: batch[k] for k in ("input_ids", "attention_mask", "labels")})
    assert found[0][0] == -wanted[0]
    close(found[0][1], {name: -value for name, value in wanted[1].items()}, 1e-7)


def test_one_set_in_both_streams_cancels(tmp_path: Path) -> None:
    trainer = make(tmp_path, unlearn_loss="graddiff")
    batch = batch_of(trainer)
    half = {k: v[:2] for k, v in batch.items() if isinstance(v, torch.Tensor) and k != ROW}
    twice = {k: torch.cat([v, v]) for k, v in half.items()}
    loss, found = gradients(trainer, {**twice, "num_forget": 2, ROW: batch[ROW]})
    assert loss == 0.0
    # The two halves go through one matrix product, which need not round them alike.
    assert max(float(value.abs().max()) for value in found.values()) < 1e-7


def test_one_forward_is_two(tmp_path: Path) -> None:
    trainer = make(tmp_path, unlearn_loss="graddiff", gamma_u=0.7)
    batch = batch_of(trainer)
    both, together = gradients(trainer, batch)
    parts = []
    for part in (slice(2), slice(2, None)):
        rows_of = {k: v[part] for k, v in batch.items() if isinstance(v, torch.Tensor) and k != ROW}
        width = int(rows_of["attention_mask"].sum(1).max())  # no padding for the other stream
        one = {k: v[:, :width] for k, v in rows_of.items()}
        trainer.args.unlearn_loss = "ga"
        parts.append(gradients(trainer, {**one, "num_forget": 2, ROW: batch[ROW]}))
    assert both == pytest.approx(parts[0][0] - 0.7 * parts[1][0], abs=1e-6)
    close(together, {n: parts[0][1][n] - 0.7 * parts[1][1][n] for n in together}, 1e-6)


def test_the_divergence_is_zero_at_the_start(tmp_path: Path) -> None:
    trainer = make(tmp_path, unlearn_loss="graddiff", retain_loss="kl", gamma_u=1e3)
    batch = batch_of(trainer)
    plain = make(tmp_path / "ga", unlearn_loss="ga")
    plain.model.train()  # pyright: ignore[reportOptionalMemberAccess]
    forget = {k: v[:2] for k, v in batch.items() if isinstance(v, torch.Tensor)}
    alone = gradients(plain, {**forget, "num_forget": 2})
    found = gradients(trainer, batch)
    assert found[0] == pytest.approx(alone[0], abs=1e-6)
    # 1000 times the rounding of a gradient that is 0.
    close(found[1], alone[1], 1e-4)


@pytest.mark.parametrize("peft", [False, True])
def test_a_kept_reference_is_the_precomputed_one(peft: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM") if peft else None
    found = []
    for name in (True, False):
        trainer = build(INFO, tmp_path / str(name), settings={"precompute_ref": name}, peft_config=config)
        noisy(trainer, 0.05)
        found.append(gradients(trainer, batch_of(trainer)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert abs(found[0][0] - 20.0 * math.log(2.0) - 8.3) > 0.01  # not at the reference
    close(found[0][1], found[1][1], 1e-6)


def test_metrics_and_an_evaluation_that_is_sft_s(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    names = ("forget_nll", "retain", "d_mean", "npo_weight", "forget_token_acc", "retain_token_acc")
    for entry in training_logs(trainer):
        assert all(math.isfinite(entry[f"unlearn/{name}"]) for name in names)
        assert entry["entropy"] > 0
    sets = {
        name: columns(rows(4, start), ("prompt", "completion"))
        for name, start in (("forget", 0), ("retain", 100))
    }
    found = trainer.evaluate(sets)
    assert not any("unlearn" in name for name in found)
    keep = {key: value for key, value in ARGUMENTS.items() if key != "max_completion_length"}
    plain = SFTTrainer(
        model=trainer.model,
        args=SFTConfig(output_dir=str(tmp_path / "sft"), **keep),
        train_dataset=sets["forget"],
        processing_class=tokenizer(),
    )
    assert found["eval_retain_loss"] == plain.evaluate(sets["retain"])["eval_loss"]
    # Rows that it was trained on draw none either.
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(
        plain.evaluate(columns(rows(), ("prompt", "completion")))["eval_loss"], rel=1e-6
    )


# The draws ----------------------------------------------------------------------------------------


def keep_list(examples: list[Any]) -> dict[str, Any]:
    return {"labels": torch.tensor([row["labels"] for row in examples])}


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("persistent", [False, True])
def test_draws_depend_on_seed_row_and_epoch_alone(workers: int, persistent: bool) -> None:
    retain = [{"input_ids": [n], "labels": [n]} for n in range(50)]
    forget: Any = [{"input_ids": [-n], "labels": [-n], ROW: n} for n in range(6)]
    found = []
    for size, processes in ((2, 0), (3, workers)):
        collator = UnlearnCollator(keep_list, retain, 2, seed=3)
        keep = persistent and processes > 0
        loader = DataLoader(
            forget,
            size,
            collate_fn=collator,
            num_workers=processes,
            persistent_workers=keep,
        )
        drawn: dict[tuple[int, int], list[int]] = {}
        for epoch in range(2):
            collator.start_epoch(epoch)
            for batch in loader:
                count, labels = batch["num_forget"], batch["labels"][:, 0].tolist()
                for i, row in enumerate(batch[ROW].tolist()):
                    drawn[epoch, row] = labels[count + 2 * i : count + 2 * i + 2]
        found.append(drawn)
    assert found[0] == found[1]
    assert any(found[0][0, row] != found[0][1, row] for row in range(6))
    assert all(len(set(pair)) == 2 for pair in found[0].values())


def test_draws_differ_by_seed_and_repeat_only_where_rows_are_few() -> None:
    retain = [{"labels": [n]} for n in range(3)]
    draws = [UnlearnCollator(keep_list, retain, 5, seed).draw(7) for seed in range(6)]
    assert all(len(one) == 5 for one in draws)
    assert len({tuple(one) for one in draws}) > 1
    counts = torch.zeros(3)
    for row in range(300):
        counts[UnlearnCollator(keep_list, retain, 1, 0).draw(row)[0]] += 1
    assert counts.min() > 70


def test_the_trainer_s_epochs_reach_the_collator(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=13)
    seen: list[tuple[int, tuple[int, ...]]] = []
    inner = trainer.unlearn_collator.inner

    def watch(examples: list[Any]) -> dict[str, Any]:
        seen.append((int(trainer.unlearn_collator._epoch), tuple(map(len, [e["labels"] for e in examples]))))
        return inner(examples)

    trainer.unlearn_collator.inner = watch
    trainer.train()
    # The last batch of an epoch is fetched with it.
    assert {epoch for epoch, _ in seen} == {0, 1, 2}
    assert [epoch for epoch, _ in seen] == sorted(epoch for epoch, _ in seen)


# Data ---------------------------------------------------------------------------------------------


def test_shared_rows_are_counted(tmp_path: Path) -> None:
    retain = columns(rows(8, start=9), ("prompt", "completion"))
    with pytest.raises(ValueError, match="share 3 rows"):
        make(tmp_path, given={"retain_dataset": retain})


def test_a_missing_retain_set_is_refused_where_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="retain_dataset is missing"):
        make(tmp_path, given={"retain_dataset": None})
    for form in ({"unlearn_loss": "ga"}, {"retain_loss": "none"}, {"gamma_u": 0.0}, {"retain_per_forget": 0}):
        make(tmp_path, given={"retain_dataset": None}, **form)


def test_bad_rows_are_refused(tmp_path: Path) -> None:
    empty = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", ""]})
    with pytest.raises(ValueError, match="train_dataset: 'completion' of row 1 is empty"):
        make(tmp_path, data=empty)
    with pytest.raises(ValueError, match="retain_dataset: 'completion' of row 1 is empty"):
        make(tmp_path, given={"retain_dataset": empty})
    with pytest.raises(ValueError, match="lacks the column 'completion'"):
        make(tmp_path, data=Dataset.from_dict({"prompt": ["a"], "answer": ["b"]}))
    with pytest.raises(TypeError, match=r"train_dataset must be a datasets\.Dataset"):
        make(tmp_path, data=columns(rows(), ("prompt", "completion")).to_iterable_dataset())
    with pytest.raises(ValueError, match="refusals is None, and train_dataset lacks the column 'refusal'"):
        make(tmp_path, unlearn_loss="po")


def test_rows_without_a_label_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = columns(rows(), ("prompt", "completion"))
    tokens = [tokenizer()(text)["input_ids"] for text in data["prompt"]]
    labels = [ids if number % 3 else [-100] * len(ids) for number, ids in enumerate(tokens)]
    prepared = Dataset.from_dict({"input_ids": tokens, "labels": labels})
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path, data=prepared, max_length=None)
    assert "4 of 12 rows have no label to predict" in caplog.text
    assert sorted(trainer.train_dataset[ROW]) == [n for n in range(12) if n % 3]
    trainer.train()


def test_refusals_come_from_the_column_or_the_list(tmp_path: Path) -> None:
    data = columns(rows(), ("prompt", "completion", "refusal"))
    texts = []
    for name, settings in (("column", {}), ("list", {"refusals": ["No.", "Never."]})):
        trainer = make(tmp_path / name, data=data, unlearn_loss="po", **settings)
        texts.append(
            [
                tokenizer()
                .decode([token for token in row if token != -100], skip_special_tokens=True)
                .strip()
                for row in trainer.train_dataset["labels"]
            ]
        )
    assert set(texts[0]) == {"I do not know."}
    assert set(texts[1]) == {"No.", "Never."}


# Runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ga", "graddiff"])
def test_a_run_that_diverges_is_stopped(loss: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(tmp_path, unlearn_loss=loss, max_forget_loss=8.5, learning_rate=5.0, max_steps=30)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert 1 <= trainer.state.global_step < 30
    assert f"training stops after step {trainer.state.global_step}" in caplog.text
    assert training_logs(trainer)[-1]["unlearn/forget_nll"] > 8.5


def test_the_default_bound_is_a_uniform_guess(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings={"unlearn_loss": "ga"})
    assert trainer.max_forget_loss == math.log(4096)


class Mask(TrainerCallback):
    """Multiplies every gradient by a number, as an update mask does."""

    def __init__(self, keep: float) -> None:
        self.keep = keep

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.keep)


def test_a_mask_on_gradients_rules_the_update(tmp_path: Path) -> None:
    ends = []
    for name, masks in (("none", ()), ("ones", (Mask(1.0),)), ("zeros", (Mask(0.0),))):
        trainer = make(tmp_path / name, *masks, max_steps=10, optim="adamw_torch")
        trainer.train()
        ends.append(parameters(trainer))
    assert equal(ends[0], ends[1])
    assert equal(ends[2], dict(tiny_model().named_parameters()))
    assert not equal(ends[0], ends[2])


@pytest.mark.parametrize("form", [FORMS[3], FORMS[5], FORMS[6]], ids=["precomputed", "kept", "refusals"])
def test_a_resumed_run_is_the_same_to_the_bit(form: dict[str, Any], tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "optim": "adamw_torch"}
    whole = make(tmp_path / "whole", **form, **arguments)
    whole.train()
    cut(make(tmp_path / "cut", StopAt(5), **form, **arguments))
    resumed = make(tmp_path / "cut", **form, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert resumed.state.global_step == 9
    assert equal(parameters(resumed), parameters(whole))


def test_another_start_is_refused_on_resume(tmp_path: Path) -> None:
    form = {**FORMS[5], "save_strategy": "steps", "save_steps": 3}
    cut(make(tmp_path, StopAt(4), **form))
    other = build(INFO, tmp_path, settings={"max_forget_loss": 1e4, **FORMS[5]}, model=tiny_model(seed=9))
    with pytest.raises(ValueError, match="the one that the run started from"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_resuming_with_another_forget_set_is_refused(tmp_path: Path) -> None:
    cut(make(tmp_path, StopAt(4), save_strategy="steps", save_steps=3))
    other = make(tmp_path, data=columns(rows(20), ("prompt", "completion")))
    with pytest.raises(ValueError, match="train_dataset must be of 12 rows"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("field", ["packing", "padding_free"])
def test_batches_that_are_not_rows_are_refused(field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=field):
        make(tmp_path, **{field: True})


def test_the_reference_of_a_loaded_adapter_is_that_adapter(tmp_path: Path) -> None:
    """Training is taken up from an adapter that has learned something: d is 0 there, not at the base."""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    for precompute in (True, False):
        settings = {"precompute_ref": precompute, "retain_loss": "none"}
        trainer = build(INFO, tmp_path / str(precompute), settings=settings, peft_config=config)
        loss, _ = gradients(trainer, batch_of(trainer))
        assert loss == pytest.approx(20.0 * math.log(2.0), abs=1e-4)


def test_an_adapter_that_waits_for_its_data_is_refused_where_its_start_is_kept(tmp_path: Path) -> None:
    waiting = LoraGaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings = {"retain_loss": "kl"}
    with pytest.raises(ValueError, match="started from its data before"):
        build(UnlearningTrainer.info, tmp_path, settings=settings, peft_config=waiting)


@pytest.mark.parametrize("field", ["train_dataset", "retain_dataset"])
def test_streams_and_images_are_refused_before_any_work(field: str, tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(rows()))
    with pytest.raises(TypeError, match=f"{field} must be a datasets.Dataset, got IterableDataset"):
        make(tmp_path, given={field: stream})
    with pytest.raises(ValueError, match="image"):  # of those to forget by TRL, before ours
        make(tmp_path, given={field: rows().add_column("image", [None] * 12)})  # type: ignore[call-arg]


# Forwards and norms -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [FORMS[i] for i in (0, 1, 2, 5)], ids=lambda form: "-".join(map(str, form.values()))
)
def test_separate_forwards_give_the_joint_gradients_without_the_others_padding(
    form: dict[str, Any], tmp_path: Path
) -> None:
    long = rows(4, start=300).map(lambda row: {"completion": 4 * row["completion"]})
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    widths: list[list[tuple[int, ...]]] = []
    for separate in (False, True):
        given = {"retain_dataset": columns(long, ("prompt", "completion"))}
        more = {"pad_to_multiple_of": 8, "max_length": 96}
        trainer = make(tmp_path / str(separate), given=given, separate_forward=separate, **form, **more)
        noisy(trainer)
        seen: list[tuple[int, ...]] = []
        hook = trainer.model.model.register_forward_pre_hook(
            lambda module, args, given, seen=seen: seen.append(tuple(given["input_ids"].shape)),
            with_kwargs=True,
        )
        found.append(gradients(trainer, batch_of(trainer)))
        widths.append(seen)
        hook.remove()
    joint, apart = widths
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    close(found[1][1], found[0][1], 2e-6)
    if form["unlearn_loss"] == "ga":
        assert apart == joint
        return
    # As many forwards again, the forget rows' shorter; lengths are multiples of eight as asked for.
    assert [rows for rows, _ in joint] == [4] * len(joint)
    assert [rows for rows, _ in apart] == [2] * 2 * len(joint)
    assert all(short < width == long for (_, short), (_, long), (_, width) in zip(
        apart[::2], apart[1::2], joint, strict=True))  # fmt: skip
    assert not any(width % 8 for _, width in apart)


@pytest.mark.parametrize(
    "form", [FORMS[i] for i in (1, 2, 3)], ids=lambda form: "-".join(map(str, form.values()))
)
def test_with_global_norm_micro_batches_are_one_batch(form: dict[str, Any], tmp_path: Path) -> None:
    uneven = rows(4).map(lambda row, i: {"completion": (1 + i % 3) * row["completion"]}, with_indices=True)
    ends: list[dict[str, torch.Tensor]] = []
    for size, accumulation, globally in ((4, 1, False), (2, 2, True), (2, 2, False)):
        trainer = make(
            tmp_path / f"{size}{globally}",
            global_norm=globally,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            data=columns(uneven, ("prompt", "completion")),
            **form,
        )
        noisy(trainer)
        trainer.train()
        ends.append(parameters(trainer))
    close(ends[1], ends[0], 2e-6)
    # Without it, rows of uneven lengths weigh by their micro-batch.
    assert max(float((ends[2][name] - ends[0][name]).abs().max()) for name in ends[0]) > 2e-5


def test_global_norm_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # This process has 3 and 5 forget tokens in two micro-batches of one row, 2 and 2 to retain; the other
    # one 4 and 8, 1 and 3.
    def batch(forget: int, retain: int) -> dict[str, Any]:
        labels = torch.full((2, 10), -100)
        labels[0, 1 : 1 + forget], labels[1, 1 : 1 + retain] = 1, 1
        return {"labels": labels, "num_forget": 1}

    other = torch.tensor([12.0, 4.0, 2.0, 2.0], dtype=torch.float64)
    monkeypatch.setattr(unlearning.dist, "all_reduce_sum_", lambda tensor: tensor.add_(other))
    counts = unlearning.Counts.of([batch(3, 2), batch(5, 2)], 1)
    assert counts == unlearning.Counts(20.0, 8.0, 4.0, 4.0)
    trainer = make(tmp_path, unlearn_loss="graddiff", global_norm=True)
    trainer._counts = counts
    # The mean over micro-batches and processes, which is trained on, divides by four: 3 tokens of mean 2 nats
    # are 6 of 20 tokens' nats; one row of the four has a quarter.
    assert float(trainer._in_update(torch.tensor(2.0), 3, "forget_tokens")) / 4 == pytest.approx(6 / 20)
    assert float(trainer._in_update(torch.tensor(2.0), 2, "retain_tokens")) / 4 == pytest.approx(4 / 8)
    assert float(trainer._in_update(torch.tensor(2.0), 1, "forget_rows")) / 4 == pytest.approx(2 / 4)


def test_a_loss_outside_of_training_is_the_micro_batchs(tmp_path: Path) -> None:
    trainer = make(tmp_path, unlearn_loss="graddiff", global_norm=True, max_steps=1)
    trainer.train()
    plain = make(tmp_path / "plain", unlearn_loss="graddiff", model=trainer.model)
    batch = batch_of(plain)
    trainer.model.train()
    assert gradients(trainer, batch)[0] == gradients(plain, batch)[0]
