"""The seam in TRL's SFT: its loss exchanged, everything else its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hf_ext.core.registry import MethodInfo
from hf_ext.trainers import _token_loss
from hf_ext.trainers._base import MethodTrainer
from hf_ext.trainers._token_loss import Head, TokenLossTrainer, cross_entropy_to
from tests.callbacks.runs import equal
from tests.trainers.runs import columns, parameters, rows, tiny_model, tokenizer, training_logs

SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.05,
    "optim": "sgd",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}


class Tokens(MethodTrainer, TokenLossTrainer):
    """SFT's own loss, handed through token by token."""

    info = MethodInfo(
        name="tokens", kind="trainer", summary="", paper=None, target=SFTTrainer, config=SFTConfig
    )

    def token_loss(self, outputs: Any, inputs: Any) -> Tensor:
        return -outputs.log_probs


class Halved(Tokens):
    """Half of SFT's loss of each micro-batch."""

    loss_is_scaled_for_ga = False

    def token_loss(self, outputs: Any, inputs: Any) -> Tensor:
        return -0.5 * outputs.log_probs.sum() / outputs.label_mask.sum()


class Hidden(Tokens):
    """Keeps what it is given."""

    needs_hidden = True

    def token_loss(self, outputs: Any, inputs: Any) -> Tensor:
        self.outputs = outputs
        return -outputs.log_probs


def run(
    cls: Any, folder: Path, model: Any = None, config: Any = SFTConfig, data: Any = None, **settings: Any
) -> Any:
    trainer = cls(
        model=tiny_model() if model is None else model,
        args=config(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=columns(rows(), ("prompt", "completion")) if data is None else data,
        eval_dataset=columns(rows(4, start=50), ("prompt", "completion")),
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


def logs(trainer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "step"} for entry in training_logs(trainer)]


def mixture() -> Any:
    torch.manual_seed(0)
    ids = tokenizer()
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=4096,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
            router_aux_loss_coef=0.1,
            bos_token_id=ids.bos_token_id,
            eos_token_id=ids.eos_token_id,
        )
    )


@pytest.mark.parametrize("make", [tiny_model, mixture], ids=["dense", "mixture of experts"])
def test_its_own_loss_handed_through_is_sft_to_the_bit(make: Any, tmp_path: Path) -> None:
    ours, theirs = (run(cls, tmp_path / cls.__name__, make()) for cls in (Tokens, SFTTrainer))
    assert logs(ours) == logs(theirs)
    assert equal(parameters(ours), parameters(theirs))
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= set(logs(ours)[0])
    assert ("aux_loss" in logs(ours)[0]) is (make is mixture)


def test_a_micro_batch_costs_one_forward(tmp_path: Path) -> None:
    counts = {}
    for cls in (Tokens, SFTTrainer):
        model, calls = tiny_model(), []
        model.model.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        run(cls, tmp_path / cls.__name__, model)
        counts[cls] = len(calls)
    assert counts[Tokens] == counts[SFTTrainer] == 6


def test_a_scalar_is_averaged_over_micro_batches(tmp_path: Path) -> None:
    """With as many labels in each row, the mean of micro-batches' means is the mean over all tokens."""
    prompts = columns(rows(), ("prompt",)).remove_columns("answer")
    data = prompts.add_column("completion", ["yes"] * len(prompts))  # type: ignore[call-arg]
    settings = {"max_grad_norm": 0.0, "data": data}
    halved = run(Halved, tmp_path / "half", **settings, learning_rate=0.1)
    whole = run(SFTTrainer, tmp_path / "whole", **settings)
    for name, value in parameters(whole).items():
        # Half the loss at twice the rate; the sums are in another order.
        torch.testing.assert_close(parameters(halved)[name], value, rtol=0.0, atol=1e-5)


def test_a_scalar_keeps_the_auxiliary_loss(tmp_path: Path) -> None:
    class Nothing(Halved):
        def token_loss(self, outputs: Any, inputs: Any) -> Tensor:
            return 0.0 * outputs.log_probs.sum()

    trainer = run(Nothing, tmp_path, mixture())
    first = logs(trainer)[0]
    assert first["loss"] == pytest.approx(0.1 * first["aux_loss"], rel=1e-5)
    assert first["aux_loss"] > 0


def test_evaluation_is_sft_s(tmp_path: Path) -> None:
    class Zero(Tokens):
        def token_loss(self, outputs: Any, inputs: Any) -> Tensor:
            return 0.0 * outputs.log_probs

    trainer = run(Zero, tmp_path / "zero")
    plain = run(SFTTrainer, tmp_path / "plain", learning_rate=0.0)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"] > 1.0


def test_outputs_can_be_asked_for(tmp_path: Path) -> None:
    trainer = run(Tokens, tmp_path)
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert outputs.logits.shape == (*batch["input_ids"].shape, 4096)
    assert float(loss.detach()) > 0


def test_hidden_states_are_the_head_s_input(tmp_path: Path) -> None:
    trainer = run(Hidden, tmp_path)
    outputs = trainer.outputs
    head = Head.of(trainer.model)
    # After the last update the weights have moved: the fused head's values are of before it.
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch)
    outputs = trainer.outputs
    labels = outputs.labels[outputs.label_mask]
    found = head.log_probs(outputs.at_labels()).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(outputs.spread(found), outputs.log_probs)


@pytest.mark.parametrize(
    ("field", "value"), [("loss_type", "dft"), ("label_smoothing_factor", 0.1), ("use_liger_kernel", True)]
)
def test_other_losses_of_sft_are_refused(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=field):
        run(Tokens, tmp_path, **{field: value})


def test_arguments_must_be_the_trainer_s_own(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="args must be a SFTConfig"):
        run(Tokens, tmp_path, config=TrainingArguments)
    with pytest.raises(ValueError, match="compute_loss_func"):
        Tokens(
            model=tiny_model(),
            args=SFTConfig(output_dir=str(tmp_path), **SETTINGS),
            train_dataset=columns(rows(), ("prompt", "completion")),
            processing_class=tokenizer(),
            compute_loss_func=lambda *given, **named: None,
        )


def test_streamed_rows_have_no_numbers(tmp_path: Path) -> None:
    class Numbered(Tokens):
        def wants_row_ids(self, args: Any) -> bool:
            return True

    with pytest.raises(TypeError, match="rows of a stream"):
        Numbered(
            model=tiny_model(),
            args=SFTConfig(output_dir=str(tmp_path), **SETTINGS),
            train_dataset=columns(rows(), ("prompt", "completion")).to_iterable_dataset(),
            processing_class=tokenizer(),
        )


# Whole distributions ------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_cross_entropy_in_pieces(softcap: float | None, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, width, count = 11, 4, 7
    monkeypatch.setattr(_token_loss, "_PIECE", size * vocabulary)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    bias = torch.randn(vocabulary, requires_grad=True)
    hidden = torch.randn(count, width, requires_grad=True)
    targets = torch.randn(count, vocabulary).softmax(-1)
    logits = 0.7 * (hidden @ weight.T + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    plain = -(targets * logits.log_softmax(-1)).sum(-1)
    wanted = torch.autograd.grad(plain.square().sum(), (weight, bias, hidden))
    found = cross_entropy_to(Head(weight, bias, 0.7, softcap), hidden, lambda part: targets[part])
    gradients = torch.autograd.grad(found.square().sum(), (weight, bias, hidden))
    torch.testing.assert_close(found, plain)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_no_position_has_a_gradient_of_zero() -> None:
    head = Head(torch.randn(5, 3, requires_grad=True), None, 1.0, None)
    found = cross_entropy_to(head, torch.zeros(0, 3, requires_grad=True), lambda part: torch.zeros(0, 5))
    assert found.shape == (0,)
    found.sum().backward()


def test_a_model_s_scale_and_cap_are_read() -> None:
    model = tiny_model()
    model.config.logit_scale, model.config.final_logit_softcapping = 0.25, 30.0
    head = Head.of(model, detach=True)
    assert (head.scale, head.softcap) == (0.25, 30.0)
    assert not head.weight.requires_grad
    del model.config.logit_scale
    model.config.logits_scaling = 8.0
    assert Head.of(model).scale == 0.125
