"""The distillation seam: completions of the data, weights, precision of logits, order of rows, refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import (
    DistillationConfig,  # pyright: ignore[reportPrivateImportUsage]
    DistillationTrainer,  # pyright: ignore[reportPrivateImportUsage]
)

from hf_ext.core.registry import get
from hf_ext.trainers._base import MethodTrainer
from hf_ext.trainers._distillation import (
    EpochSampler,
    Projection,
    States,
    TargetDistillationTrainer,
    check_rows,
)
from hf_ext.trainers._token_loss import Head
from hf_ext.trainers.aligndistil import AlignDistilTrainer  # registers a method whose row is borrowed
from tests.trainers.runs import ARGUMENTS, columns, parameters, rows, settings_of, tiny_model, tokenizer


@dataclass
class Config(DistillationConfig):
    source: str = "student"
    reduction: str = "token"
    weight: float | None = None


class Probe(MethodTrainer, TargetDistillationTrainer):
    info = replace(get("trainer", "aligndistil"), config=Config, target=AlignDistilTrainer)

    @classmethod
    def completion_sources(cls, args: Any) -> tuple[str, ...]:
        return (args.source,)

    def loss_reduction(self) -> str:
        return self.args.reduction

    def row_weights(self, rows: Any) -> Any:
        if self.args.weight is None:
            return None
        return torch.tensor([self.args.weight if "3" in row["prompt"] else 1.0 for row in rows])


def built(folder: Path, data: Any = None, *, cls: Any = Probe, config: Any = Config, **own: Any) -> Any:
    arguments = {**ARGUMENTS, "save_strategy": "no", **own}
    data = columns(rows(), ("prompt", "completion")) if data is None else data
    return cls(
        model=tiny_model(),
        teacher_model=tiny_model(1),
        args=config(output_dir=str(folder), **settings_of(config, arguments)),
        train_dataset=data,
        processing_class=tokenizer(),
    )


def batch_of(trainer: Any, data: list[dict[str, Any]]) -> dict[str, Any]:
    trainer.model.eval()
    return trainer._generate_and_score_completions(data)


# Completions of the data --------------------------------------------------------------------------


def test_completions_of_the_data_are_tokenized_as_sft_does(tmp_path: Path) -> None:
    data = [{"prompt": "Say: ", "completion": "alpha beta"}, {"prompt": "One\n", "chosen": "zeta eta theta"}]
    found = batch_of(built(tmp_path, source="dataset", max_completion_length=64), data)
    ids, end = tokenizer(), tokenizer().eos_token
    for row, example in enumerate(data):
        text = example.get("completion") or example["chosen"]
        kept = found["completion_ids"][row][found["completion_mask"][row] == 1]
        prompt = found["prompt_ids"][row][found["prompt_mask"][row] == 1]
        assert kept[-1] == ids.eos_token_id
        whole = ids(text=example["prompt"] + text + end)["input_ids"]
        assert [*prompt.tolist(), *kept.tolist()] == whole
    assert found["num_items_in_batch"] == found["completion_mask"].sum()


def test_a_long_completion_is_cut(tmp_path: Path) -> None:
    found = batch_of(built(tmp_path, source="dataset"), [{"prompt": "Say: ", "completion": "alpha " * 40}])
    assert found["completion_ids"].shape == (1, 6)


def test_a_prompt_whose_end_merges_gives_it_to_the_completion(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = tokenizer()
    whole = "return self"
    cut = next(
        i
        for i in range(1, len(whole))
        if ids(whole)["input_ids"][: len(ids(whole[:i])["input_ids"])] != ids(whole[:i])["input_ids"]
    )
    prompt, completion = whole[:cut], whole[cut:]
    found = batch_of(
        built(tmp_path, source="dataset", max_completion_length=64),
        [{"prompt": "x " + prompt, "completion": completion}],
    )
    kept = [*found["prompt_ids"][0].tolist(), *found["completion_ids"][0].tolist()]
    assert kept == ids("x " + whole + ids.eos_token)["input_ids"]
    assert "left out" in caplog.text


def test_a_chat_goes_through_its_template(tmp_path: Path) -> None:
    trainer = built(tmp_path, source="dataset", max_completion_length=64)
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    trainer.processing_class.chat_template = template
    row = {
        "prompt": [{"role": "user", "content": "alpha"}],
        "completion": [{"role": "assistant", "content": "beta gamma"}],
    }
    found = batch_of(trainer, [row])
    assert trainer.processing_class.decode(found["prompt_ids"][0]) == "<user>alpha\n<assistant>"
    assert trainer.processing_class.decode(found["completion_ids"][0]) == "beta gamma\n"


def test_rows_are_checked_by_column_and_number() -> None:
    data = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", ""]})
    check_rows(data, "train_dataset", completions=False)
    with pytest.raises(ValueError, match=r"train_dataset: 'completion' of row 1"):
        check_rows(data, "train_dataset", completions=True)
    with pytest.raises(ValueError, match="'completion' or 'chosen'"):
        check_rows(data.remove_columns("completion"), "train_dataset", completions=True)


def test_held_out_rows_are_checked_too(tmp_path: Path) -> None:
    arguments = settings_of(Config, {**ARGUMENTS, "source": "dataset"})
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\] lacks"):
        Probe(
            tiny_model(),
            tiny_model(1),
            Config(str(tmp_path), **arguments),
            rows(),
            {"a": rows(), "b": columns(rows(), ("prompt",))},
            tokenizer(),
        )


# The loss -----------------------------------------------------------------------------------------


def trained(*args: Any, **own: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return losses and weights; a run is built and trained before the next, as building it sets the seed."""
    trainer = built(*args, **own)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], parameters(trainer)


def test_without_hooks_it_is_the_parent_to_the_bit(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "beta": 0.3}
    own = trained(tmp_path / "own", **settings)
    plain = {"cls": DistillationTrainer, "config": DistillationConfig}
    theirs = trained(tmp_path / "theirs", **plain, **settings)
    assert own[0] == theirs[0]
    assert all(torch.equal(value, theirs[1][name]) for name, value in own[1].items())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_weights_of_one_are_no_weights(beta: float, tmp_path: Path) -> None:
    settings = {"beta": beta, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    one = trained(tmp_path / "one", weight=1.0, **settings)
    none = trained(tmp_path / "none", **settings)
    assert one[0] == pytest.approx(none[0], rel=1e-5)
    for name, value in none[1].items():
        torch.testing.assert_close(one[1][name], value, rtol=0, atol=1e-6)


def test_a_row_without_weight_adds_its_tokens_alone(tmp_path: Path) -> None:
    data = [{"prompt": "Say 1: ", "completion": "alpha"}, {"prompt": "Say 3: ", "completion": "eta beta mu"}]
    trainer = built(tmp_path, source="dataset", weight=0.0)
    both, first = batch_of(trainer, data), batch_of(trainer, data[:1])
    tokens = both["completion_mask"].sum(1)
    whole = trainer.compute_loss(trainer.model, both)
    alone = trainer.compute_loss(trainer.model, first)
    torch.testing.assert_close(whole, alone * tokens[0] / tokens.sum())


def test_a_mean_over_completions_does_not_weigh_by_length(tmp_path: Path) -> None:
    data = [{"prompt": "Say 1: ", "completion": "alpha"}, {"prompt": "Say 2: ", "completion": "eta beta mu"}]
    trainer = built(tmp_path, source="dataset", reduction="sequence")
    both = batch_of(trainer, data)
    assert both["num_rows_in_batch"] == 2
    assert len(set(both["completion_mask"].sum(1).tolist())) == 2
    parts = [trainer.compute_loss(trainer.model, batch_of(trainer, [row])) for row in data]
    torch.testing.assert_close(trainer.compute_loss(trainer.model, both), sum(parts) / 2)


def test_logits_are_exact_where_states_are_bf16() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 64).bfloat16(), torch.randn(100, 64)
    head = Head(weight.requires_grad_(), torch.randn(100), 0.5, 30.0)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        project = Projection.of(States(hidden, head))
        assert project.operand.dtype == torch.bfloat16
    found = project(hidden)
    assert found.dtype == torch.float32
    plain = hidden.double() @ weight.bfloat16().double().t() + head.bias.double()  # type: ignore[union-attr]
    wanted = 30 * torch.tanh(plain * 0.5 / 30)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    wanted.square().sum().backward(inputs=[hidden, weight])
    assert hidden.grad is not None
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    # Each got the gradient twice: once exact, once over operands in bf16.
    assert torch.isfinite(weight.grad).all()


def test_the_gradients_of_logits_in_fp32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 8, requires_grad=True)
    weight = torch.randn(10, 8, requires_grad=True)
    Projection(Head(weight, None, 1.0, None), torch.float32)(hidden).square().sum().backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    (hidden @ weight.t()).square().sum().backward()
    torch.testing.assert_close(grads, (hidden.grad, weight.grad))


# Order and random state ---------------------------------------------------------------------------


def test_a_resumed_epoch_has_its_own_order(tmp_path: Path) -> None:
    step = 0
    trainer = built(tmp_path, gradient_accumulation_steps=2)
    inner = DistillationTrainer._get_train_sampler(trainer)
    plain = [list(inner) for _ in range(3)]  # one after the other, as in a run that is not interrupted
    assert plain[0] != plain[1]
    sampler = EpochSampler(DistillationTrainer._get_train_sampler(trainer), lambda: step)
    assert len(sampler) == len(plain[0]) == 24
    for epoch in (2, 0, 1):
        step = 3 * epoch
        assert list(sampler) == plain[epoch]


def test_evaluation_leaves_the_random_state(tmp_path: Path) -> None:
    trainer = built(tmp_path)
    trainer.eval_dataset = rows(4, start=200)
    before = torch.get_rng_state()
    assert trainer.evaluate()["eval_loss"] > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_another_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must be a Config"):
        built(tmp_path, config=DistillationConfig)
