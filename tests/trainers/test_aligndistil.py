"""AlignDistil: the composed teacher, its strength, its loss, and the data for the reverse model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model

from hf_ext.core.registry import get
from hf_ext.trainers.aligndistil import (
    AlignDistilConfig,
    AlignDistilTrainer,
    disagreement,
    extrapolated_logits,
    reverse_preferences,
)
from tests.reference import aligndistil as reference
from tests.trainers.runs import (
    build,
    columns,
    model_folder,
    parameters,
    rows,
    tiny_model,
    tokenizer,
    training_logs,
)

INFO = get("trainer", "aligndistil")
Z_D, Z_R, Z_S = (2.0, 0.0, -1.0), (1.0, 1.0, -1.0), (1.5, 0.5, -1.0)


def logits(*values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def silent(folder: Path, **settings: Any) -> AlignDistilConfig:
    plain = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    return AlignDistilConfig(str(folder), **{**plain, **settings})


def built(folder: Path, **arguments: Any) -> Any:
    return build(INFO, folder, **{"save_strategy": "no", **arguments})


# The formulas -------------------------------------------------------------------------------------


def test_a_token_by_hand(tmp_path: Path) -> None:
    d, r, s = logits(Z_D), logits(Z_R), logits(Z_S)
    trainer = built(tmp_path)
    found = trainer.target([d, r], s.log_softmax(-1))
    apart = disagreement(d, r)
    assert apart.item() == pytest.approx(0.750968, abs=1e-6)
    assert found.metrics["ad/mean_w"].item() == pytest.approx(7.510684, abs=1e-6)
    assert found.metrics["ad/tvd"].item() == pytest.approx(0.750968 / 2, abs=1e-6)
    torch.testing.assert_close(found.logits, logits((9.510684, -7.510684, -1.0)), rtol=0, atol=2e-6)
    log_p, log_t = s.log_softmax(-1), found.logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_t)).sum(-1)
    assert kl.item() == pytest.approx(4.146867, abs=1e-6)
    assert (found.token_weights * kl).item() == pytest.approx(0.0552129, abs=1e-7)
    plain = reference.token(Z_D, Z_R, Z_S)
    assert plain["loss"] == pytest.approx((found.token_weights * kl).item(), abs=1e-12)
    assert reference.token(Z_D, Z_R, Z_S, eta=15.0)["w"] == pytest.approx(11.265526, abs=1e-6)


def test_the_strength_is_10_off_policy_and_15_on_policy(tmp_path: Path) -> None:
    assert silent(tmp_path).eta == 10.0
    assert silent(tmp_path, on_policy=True).eta == 15.0
    assert silent(tmp_path, on_policy=True, ad_eta=3.0).eta == 3.0


def test_constants_in_the_logits_change_nothing() -> None:
    torch.manual_seed(0)
    d, r = torch.randn(2, 5, 11, dtype=torch.float64)
    apart, moved = disagreement(d, r), disagreement(d + 3.0, r - 2.0)
    torch.testing.assert_close(apart, moved)
    for kind in ("aligndistil", "theorem1"):
        one = extrapolated_logits(d, r, apart, kind).softmax(-1)
        two = extrapolated_logits(d + 3.0, r - 2.0, apart, kind).softmax(-1)
        torch.testing.assert_close(one, two)


def test_swapped_models_give_the_same_strength_and_the_mirrored_teacher() -> None:
    torch.manual_seed(1)
    d, r = torch.randn(2, 5, 11, dtype=torch.float64)
    torch.testing.assert_close(disagreement(d, r), disagreement(r, d))
    w = disagreement(d, r)
    torch.testing.assert_close(extrapolated_logits(r, d, w), r + w[:, None] * (r - d))


def test_the_forms_of_the_teacher() -> None:
    torch.manual_seed(2)
    d, r = torch.randn(2, 5, 11, dtype=torch.float64)
    w = torch.full((5,), 0.4, dtype=torch.float64)
    torch.testing.assert_close(extrapolated_logits(d, r, w, "theorem1"), 0.4 * d + 0.6 * r)
    torch.testing.assert_close(extrapolated_logits(d, r, w, "theorem1_adaptive"), 0.4 * d + 0.6 * r)
    torch.testing.assert_close(extrapolated_logits(d, r, w, "theorem1_contrast"), d + 0.4 * (d - r))
    assert torch.equal(extrapolated_logits(d, r, w, "gkd"), d)


def test_the_gap_of_the_target_is_bounded() -> None:
    found = extrapolated_logits(logits(Z_D), logits(Z_R), torch.tensor([50.0]).double(), max_gap=20.0)
    torch.testing.assert_close(found, logits((52.0, 32.0, 32.0)))


def test_equal_models_give_the_dpo_model_with_the_weight_of_the_floor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = built(tmp_path)
    d, s = logits(Z_D), logits(Z_S)
    with caplog.at_level(logging.WARNING):
        found = trainer.target([d, d], s.log_softmax(-1))
    assert torch.equal(found.logits, d)
    assert found.token_weights.item() == pytest.approx(100.0)
    assert "same probabilities" in caplog.text


def test_caps_and_factors(tmp_path: Path) -> None:
    d, r, s = logits(Z_D), logits(Z_R), logits(Z_S).log_softmax(-1)
    capped = built(tmp_path, settings={"token_weight_cap": 0.01}).target([d, r], s)
    assert capped.token_weights.item() == 0.01
    assert built(tmp_path, settings={"scale_by_beta": False}).target([d, r], s).token_weights is None
    constant = built(tmp_path, settings={"teacher_type": "theorem1_contrast", "ad_weight": 5.0}).target(
        [d, r], s
    )
    assert constant.token_weights.item() == pytest.approx(0.02)


def test_the_warning_about_a_constant_factor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        silent(tmp_path, ad_eta=0.0)
    assert "= 100" in caplog.text


# The loss of a batch ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_loss_of_a_batch_is_that_of_the_plain_twin(reduction: str, tmp_path: Path) -> None:
    small = {"vocab_size": 64}
    d, r, s = (tiny_model(seed, **small) for seed in (1, 2, 0))
    for model in (d, r):  # as far apart as DPO would bring them
        with torch.no_grad():
            model.lm_head.weight.mul_(20)
    trainer = built(
        tmp_path, model=s, given={"dpo_model": d, "reverse_model": r}, settings={"loss_reduction": reduction}
    )
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    inputs = {
        "prompt_ids": torch.randint(3, 64, (3, 3)),
        "prompt_mask": torch.ones(3, 3, dtype=torch.long),
        "completion_ids": torch.randint(3, 64, (3, 4)),
        "completion_mask": mask,
    }
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], mask], 1)
    with torch.no_grad():
        found = [m(input_ids=ids, attention_mask=attention).logits[:, 2:-1] for m in (d, r, s)]
    if reduction == "sequence":
        wanted = reference.sequences(found[0], found[1], found[2], mask)
    else:
        one, two = (
            reference.sequences(found[0][[i]], found[1][[i]], found[2][[i]], mask[[i]]) for i in (0, 1)
        )
        wanted = (4 * one + 2 * two) / 6
    assert loss.item() == pytest.approx(wanted, rel=2e-5)
    assert trainer._metrics["eval"]["ad/tvd"][0] > 0.01


def test_both_teachers_side_by_side_in_the_kernel_give_the_same() -> None:
    torch.manual_seed(3)
    hidden, heads = torch.randn(3, 5, 8), torch.randn(3, 11, 8)
    s, d, r = (h @ w.t() for h, w in zip(hidden, heads, strict=True))
    w = 10 * disagreement(d, r) + 1e-3
    log_p, log_t = s.log_softmax(-1), extrapolated_logits(d, r, w).log_softmax(-1)
    dense = (log_p.exp() * (log_p - log_t)).sum(-1)
    own, dpo, reverse = ((hidden[i], heads[i]) for i in range(3))
    kernel = reference.side_by_side(own, dpo, reverse, w)
    torch.testing.assert_close(kernel, dense, rtol=1e-5, atol=1e-4)


def test_without_strength_and_floor_it_is_distillation_from_the_dpo_model(tmp_path: Path) -> None:
    ends = []
    settings = (
        {"ad_eta": 0.0, "ad_floor": 0.0, "scale_by_beta": False, "loss_reduction": "token"},
        {"teacher_type": "gkd", "loss_reduction": "token"},
    )
    for number, own in enumerate(settings):
        trainer = built(tmp_path / str(number), settings=own, max_steps=3, optim="sgd", learning_rate=1.0)
        trainer.train()
        ends.append((parameters(trainer), [entry["loss"] for entry in training_logs(trainer)]))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)
    for name, value in ends[0][0].items():
        torch.testing.assert_close(value, ends[1][0][name], rtol=0, atol=1e-6)
    assert not torch.equal(ends[0][0]["lm_head.weight"], tiny_model().lm_head.weight)


def test_a_student_at_the_target_has_no_gradient(tmp_path: Path) -> None:
    """Equal teachers are the target themselves; so is a student that equals them."""
    trainer = built(tmp_path, given={"dpo_model": tiny_model(), "reverse_model": tiny_model()}, max_steps=1)
    trainer.train()
    assert training_logs(trainer)[0]["loss"] == pytest.approx(0.0, abs=1e-5)
    assert training_logs(trainer)[0]["grad_norm"] < 1e-5


# The models ---------------------------------------------------------------------------------------


def test_adapters_of_one_model_serve_as_teachers(tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_model(), adapter)
    for number, name in enumerate(("dpo", "reverse")):
        model.add_adapter(name, adapter)
        torch.manual_seed(number)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data.normal_(std=0.3)
    model.set_adapter("default")
    kept = {k: p.detach().clone() for k, p in model.named_parameters()}
    trainer: Any = AlignDistilTrainer(
        model,
        "dpo",
        silent(tmp_path, max_steps=2, learning_rate=1e-2, max_completion_length=6, logging_steps=1),
        reverse_model="reverse",
        train_dataset=columns(rows(), ("prompt", "chosen")),
        processing_class=tokenizer(),
    )
    trainer.train()
    logs = training_logs(trainer)
    assert logs[0]["ad/tvd"] > 1e-3
    # The student begins as the base: so far from both teachers.
    assert logs[0]["ad/kl_to_dpo"] > 1e-6
    changed = {k for k, p in trainer.model.named_parameters() if not torch.equal(p, kept[k])}
    assert changed
    assert all(".default." in name for name in changed)
    trains = {k for k, p in trainer.model.named_parameters() if p.requires_grad}
    assert trains
    assert all(".default." in name for name in trains)


def test_the_adapter_in_training_is_no_teacher(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reverse_model"):
        built(tmp_path, model=model, given={"reverse_model": "default"})


@pytest.mark.parametrize("field", ["dpo_model", "reverse_model"])
def test_both_models_are_needed(field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=field):
        built(tmp_path, given={field: None})


def test_plain_distillation_does_without_the_reverse_model(tmp_path: Path) -> None:
    trainer = built(tmp_path, settings={"teacher_type": "gkd"}, given={"reverse_model": None}, max_steps=1)
    trainer.train()
    assert training_logs(trainer)[0]["loss"] > 0


def test_models_are_loaded_from_their_folders(tmp_path: Path) -> None:
    ends = []
    folders = {"dpo_model": str(model_folder(1)), "reverse_model": str(model_folder(2))}
    for number, given in enumerate((folders, {})):
        trainer = built(tmp_path / str(number), given=given, max_steps=2)
        trainer.train()
        ends.append([entry["loss"] for entry in training_logs(trainer)])
    assert ends[0] == ends[1]
    other = {"reverse_model": str(model_folder(3, vocab_size=4160))}
    with pytest.raises(ValueError, match="reverse_model's vocabulary"):
        built(tmp_path / "other", given=other)


# Data ---------------------------------------------------------------------------------------------


def test_reversed_preferences() -> None:
    data = Dataset.from_dict({"prompt": ["p"], "chosen": ["good"], "rejected": ["bad"]})
    assert reverse_preferences(data)[0] == {"prompt": "p", "chosen": "bad", "rejected": "good"}
    splits = reverse_preferences(DatasetDict({"train": data, "test": data}))
    assert splits["test"][0]["chosen"] == "bad"
    with pytest.raises(ValueError, match="rejected"):
        reverse_preferences(data.remove_columns("rejected"))
