"""Progressive self-distillation: the targets, the teacher and its refreshes, the cache, the closed form."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hf_ext.core.registry import MethodInfo
from hf_ext.trainers._snapshots import HeldWeights, TopKCache
from hf_ext.trainers._token_loss import ROW
from hf_ext.trainers.self_distillation import (
    SelfDistillationTrainer,
    closed_form_weight,
    fit_two_and_mix,
    linear_alpha,
    soft_target,
    spread_top,
    target_ratio,
)
from tests.callbacks.runs import StopAt, equal
from tests.conftest import build_tiny_llama
from tests.reference import self_distillation as reference
from tests.registry_cases import methods
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

INFO = SelfDistillationTrainer.info
SETTINGS = set(INFO.config.__annotations__)  # type: ignore[union-attr]


def make(folder: Path, *callbacks: Any, **settings: Any) -> Any:
    """Return a trainer with the plain optimizer and no clipping; an epoch is 6 micro-batches."""
    training = {key: settings.pop(key) for key in list(settings) if key not in SETTINGS}
    given = {key: training.pop(key) for key in ("model", "peft_config", "data") if key in training}
    arguments = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        **training,
    }
    return build(INFO, folder, others=callbacks, settings=settings, **given, **arguments)


def gradients(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def at_epoch(trainer: Any, epoch: float, epochs: int) -> Any:
    """Put a trainer where it would be in a run."""
    trainer.state.epoch, trainer.state.num_train_epochs, trainer.state.global_step = epoch, epochs, 1
    return trainer


def noisy(model: Any, seed: int = 5, scale: float = 0.3) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def batch_of(trainer: Any) -> dict[str, Any]:
    return dict(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))


# The formulas -------------------------------------------------------------------------------------


def test_the_weight_grows_with_the_epoch() -> None:
    assert linear_alpha(0.8, 2, 10) == pytest.approx(0.24)
    assert linear_alpha(0.8, 9, 10) == 0.8
    assert linear_alpha(0.8, 12, 10) == 0.8
    assert [linear_alpha(0.5, e, 4) for e in range(4)] == [reference.alpha(0.5, e, 4) for e in range(4)]


def test_a_target_by_hand() -> None:
    previous, label = torch.tensor([[0.2, 0.7, 0.1]]), torch.tensor([1])
    target = soft_target(label, previous, 0.24)
    assert target[0].tolist() == pytest.approx([0.048, 0.928, 0.024])
    logits = torch.tensor([[0.1, 1.0, -0.5]], requires_grad=True)
    logps = logits.log_softmax(-1)
    loss = -(target * logps).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.567596, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.201475, -0.314390, 0.112915], abs=1e-6)
    kl = float((previous * (previous.log() - logps.detach())).sum())
    entropy = float(-(previous * previous.log()).sum())
    assert (kl, entropy) == (pytest.approx(0.016577, abs=1e-6), pytest.approx(0.801819, abs=1e-6))
    assert 0.76 * float(-logps[0, 1].detach()) + 0.24 * (kl + entropy) == pytest.approx(0.567596, abs=1e-6)
    p = logps.detach().exp()[0, 1]
    assert float(target_ratio(p, previous[0, 1], 0.24)) == pytest.approx(0.813660, abs=1e-6)
    assert float((p - target[0, 1]) / (p - 1)) == pytest.approx(0.813660, abs=1e-6)


def test_the_closed_form_by_hand() -> None:
    u, v, y = torch.tensor([0.2, 0.6, 1.1]), torch.tensor([0.9, 0.1, 1.8]), torch.tensor([0.8, 0.2, 1.5])
    weight = closed_form_weight(y, u, v)
    assert weight == pytest.approx(0.731707, abs=1e-6)
    residual = float((y - (weight * v + (1 - weight) * u)).square().sum())
    assert residual == pytest.approx(0.021463, abs=1e-6)
    for other in torch.linspace(0, 1, 21).tolist():
        assert float((y - (other * v + (1 - other) * u)).square().sum()) >= residual - 1e-7
    assert closed_form_weight(y, u, u) == 1.0
    assert closed_form_weight(u - (v - u), u, v) == 0.0
    assert closed_form_weight(v + (v - u), u, v) == 1.0


def test_rounds_of_ridge_regression_and_their_best_weight() -> None:
    kernel = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.5], [0.1, 0.5, 1.0]], dtype=torch.double)
    y = torch.tensor([1.0, 0.0, 2.0], dtype=torch.double)
    found = reference.ridge_rounds(kernel, 0.2, y, 0.25, 3)
    wanted = [(0.751286, 0.283019, 1.569468), (0.630051, 0.395158, 1.336663), (0.569512, 0.433584, 1.207660)]
    for one, other in zip(found, wanted, strict=True):
        assert one.tolist() == pytest.approx(other, abs=1e-6)
    limit = reference.ridge_limit(kernel, 0.2, y, 0.25)
    assert limit.tolist() == pytest.approx((0.495568, 0.410959, 1.024980), abs=1e-6)
    assert reference.ridge_rounds(kernel, 0.2, y, 0.25, 200)[-1].tolist() == pytest.approx(limit.tolist())
    # A fit that is linear in its targets: the closed form is the best of all weights.
    smoother = kernel @ torch.linalg.inv(kernel + 0.2 * torch.eye(3, dtype=torch.double))
    held_out = torch.tensor([0.7, 0.3, 1.4], dtype=torch.double)
    u, v = smoother @ found[0], smoother @ y
    best = closed_form_weight(held_out, u, v)

    def error(weight: float) -> float:
        return float((held_out - smoother @ (weight * y + (1 - weight) * found[0])).square().sum())

    assert 0 < best < 1
    assert min(error(w) for w in torch.linspace(0, 1, 101).tolist()) >= error(best)


@pytest.mark.parametrize("rest", ["drop", "uniform"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_likeliest_tokens_equal_the_reference(rest: str, k: int) -> None:
    previous = torch.randn(6, 8).softmax(-1)
    probs, tokens = previous.topk(k)
    found = spread_top(tokens, probs, 8, rest)
    torch.testing.assert_close(found.double(), reference.top_tokens(previous, k, rest), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.sum(-1), torch.ones(6))


# The loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heat", [1.0, 2.0])
def test_the_loss_equals_the_reference_twin(heat: float, tmp_path: Path) -> None:
    trainer = make(tmp_path, pskd_alpha=0.6, teacher_temperature=heat)
    start = tiny_model()
    batch = batch_of(trainer)
    at_epoch(trainer, 1.0, 3)
    assert trainer.replaces_loss()  # the teacher is the model as it is now
    noisy(trainer.model)
    found, _ = gradients(trainer, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        logits, before = (model(**inputs).logits[:, :-1][labels != -100] for model in (trainer.model, start))
    previous = (before / heat).softmax(-1)
    wanted = reference.losses(logits, previous, labels[labels != -100], reference.alpha(0.6, 1, 3))
    assert found == pytest.approx(float(wanted.mean()), rel=1e-5)


def test_a_teacher_that_is_the_model_leaves_the_likelihood_s_gradient(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", pskd_alpha=0.0)
    batch = batch_of(plain)
    _, wanted = gradients(plain, batch)
    trainer = make(tmp_path / "ours", pskd_alpha=0.6, pskd_schedule="constant")
    at_epoch(trainer, 1.0, 3)
    _, found = gradients(trainer, batch)
    metrics = trainer._metrics["train"]
    assert metrics["pskd/kl_prev"] == [pytest.approx(0.0, abs=1e-6)]
    assert metrics["pskd/target_ratio"] == [pytest.approx(0.4, abs=1e-6)]
    assert metrics["pskd/alpha"] == [pytest.approx(0.6)]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], 0.4 * value, rtol=1e-4, atol=1e-7)


def test_a_teacher_that_is_sure_of_the_truth_is_sft(tmp_path: Path) -> None:
    trainer = make(tmp_path, teacher="cache", pskd_schedule="constant", cache_top_k=1)
    batch = batch_of(trainer)
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    labels = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    at_epoch(trainer, 1.0, 2)
    trainer.replaces_loss()
    trainer._previous.write(batch[ROW], counts, labels[:, None], torch.ones(len(labels), 1))
    loss, found = gradients(trainer, batch)
    plain = make(tmp_path / "plain", pskd_alpha=0.0)
    wanted = gradients(plain, {k: v for k, v in batch.items() if k != ROW})
    assert loss == pytest.approx(wanted[0], abs=1e-6)
    for name, value in wanted[1].items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_the_first_epoch_and_evaluation_are_sft_to_the_bit(tmp_path: Path) -> None:
    data = columns(rows(), ("prompt", "completion"))
    for form in ({}, {"teacher": "cache", "cache_top_k": 5}):
        ours = make(tmp_path / "ours", **form, max_steps=6)
        settings = {**settings_of(SFTConfig, ARGUMENTS), "optim": "sgd", "learning_rate": 1.0,
                    "max_grad_norm": 0.0, "save_strategy": "no", "output_dir": str(tmp_path)}  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours.train()
        theirs = SFTTrainer(
            model=tiny_model(), args=SFTConfig(**settings), train_dataset=data, processing_class=tokenizer()
        )
        theirs.train()
        assert equal(parameters(ours), parameters(theirs))
        held_out = columns(rows(4, 50), ("prompt", "completion"))
        assert ours.evaluate(held_out)["eval_loss"] == theirs.evaluate(held_out)["eval_loss"]


def test_the_schedule_of_a_run(tmp_path: Path) -> None:
    trainer = make(tmp_path, pskd_alpha=0.6, max_steps=18)
    trainer.train()
    weights = [entry.get("pskd/alpha", 0.0) for entry in training_logs(trainer)]
    assert weights == pytest.approx([0.0] * 6 + [0.4] * 6 + [0.6] * 6)
    assert all(math.isfinite(entry["pskd/kl_prev"]) for entry in training_logs(trainer)[6:])


def test_a_run_with_no_refresh_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="plain SFT"):
        make(tmp_path, max_steps=3).train()
    with pytest.warns(UserWarning, match="pskd_alpha is 1"):
        make(tmp_path, pskd_alpha=1.0)


# The teacher --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_teacher_is_of_the_last_refresh(accumulation: int, tmp_path: Path) -> None:
    trainer = make(
        tmp_path, refresh_epochs=0.5, max_steps=8, per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    kept: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    inner = trainer.token_loss

    def watch(outputs: Any, inputs: Any) -> Any:
        step = trainer.state.global_step
        seen.setdefault(step, {n: v.clone() for n, v in trainer._held.tensors.items()})
        assert equal(seen[step], trainer._held.tensors)  # one teacher within an update
        return inner(outputs, inputs)

    trainer.token_loss = watch
    step_of = trainer.training_step

    def remember(*given: Any, **named: Any) -> Any:
        kept.setdefault(trainer.state.global_step, parameters(trainer))
        return step_of(*given, **named)

    trainer.training_step = remember
    trainer.train()
    every = 6 // accumulation
    assert min(seen) == every
    for step, tensors in seen.items():
        assert equal(tensors, kept[step - step % every]), step
    assert every >= 8 or not equal(seen[min(seen)], kept[0])


@pytest.mark.parametrize("info", methods("adapter"))
def test_old_weights_stand_in_exactly_for_every_adapter_type(info: MethodInfo) -> None:
    settings = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **info.test_kwargs}
    if "starts_from_data" in info.supports:
        settings["init_weights"] = False
    model: Any = get_peft_model(build_tiny_llama(), info.config(**settings)).train()  # type: ignore[misc]
    ids = torch.arange(10)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    noisy(model, 1, 0.05)
    before = logits()
    held = HeldWeights(model, "teacher")
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    noisy(model, 2, 0.05)
    now = logits()
    assert not torch.equal(before, now)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with held.in_place_of(model):
        assert not model.training
        assert torch.equal(model(input_ids=ids).logits, before)
    assert modes == [module.training for module in model.modules()]
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert torch.equal(logits(), now)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not frozen & set(held.tensors)


def test_an_error_inside_puts_the_weights_back() -> None:
    model = tiny_model().train()
    held = HeldWeights(model, "teacher")
    noisy(model)
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), held.in_place_of(model):
        raise RuntimeError("inside")
    assert equal(now, dict(model.named_parameters()))
    assert model.training
    with pytest.raises(ValueError, match="lm_head"):
        held.load({name: value for name, value in now.items() if name != "lm_head.weight"})


def test_the_teacher_is_kept_in_another_type(tmp_path: Path) -> None:
    trainer = make(tmp_path, teacher_dtype="bfloat16", teacher_device="cpu", pskd_schedule="constant")
    batch = batch_of(trainer)
    at_epoch(trainer, 1.0, 2)
    loss, _ = gradients(trainer, batch)
    assert {value.dtype for value in trainer._held.tensors.values()} == {torch.bfloat16}
    exact = at_epoch(make(tmp_path, pskd_schedule="constant"), 1.0, 2)
    assert loss == pytest.approx(gradients(exact, batch)[0], abs=1e-3)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_an_adapter_alone_is_copied_trained_and_saved(tmp_path: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import load_file

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make(tmp_path, peft_config=config, max_steps=12, learning_rate=10.0)
    base = tiny_model()
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"]
    assert set(trainer._held.tensors) == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.save_model(str(tmp_path / "saved"))
    assert len(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == 2
    with trainer.model.disable_adapter(), torch.no_grad():
        ids = torch.arange(5)[None]
        assert torch.equal(trainer.model.eval()(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("form", [{}, {"teacher": "cache", "cache_top_k": 5}])
def test_a_second_run_begins_without_a_teacher(form: dict[str, Any], tmp_path: Path) -> None:
    trainer = make(tmp_path, **form, learning_rate=0.1, max_steps=9)
    trainer.train()
    again = make(
        tmp_path / "fresh", **form, learning_rate=0.1, max_steps=9, model=copy.deepcopy(trainer.model)
    )
    trainer.train()
    again.train()
    assert equal(parameters(trainer), parameters(again))
    logs, expected = (training_logs(run) for run in (trainer, again))
    assert [entry["loss"] for entry in logs] == [entry["loss"] for entry in expected]
    assert [entry.get("pskd/alpha", 0.0) for entry in logs] == pytest.approx([0.0] * 6 + [0.8] * 3)


def test_a_given_teacher_is_kept_over_runs(tmp_path: Path) -> None:
    trainer = make(tmp_path, learning_rate=0.1, max_steps=1, pskd_schedule="constant")
    given = parameters(trainer)
    with pytest.raises(ValueError, match="lm_head"):
        trainer.teach({name: value for name, value in given.items() if name != "lm_head.weight"})
    trainer.teach(given)
    for _ in range(2):
        trainer.train()
        assert equal(trainer._held.tensors, given)
        assert training_logs(trainer)[-1]["pskd/alpha"] == pytest.approx(0.8)


def test_virtual_tokens_are_refused(tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="virtual tokens"):
        make(tmp_path, peft_config=config)


@pytest.mark.parametrize(
    ("settings", "refused"), [({}, True), ({"pskd_alpha": 0.0}, False), ({"teacher": "cache"}, False)]
)
def test_a_teacher_of_weights_is_refused_where_fsdp1_shards_them(
    settings: dict[str, Any], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SFTTrainer.__init__

    def sharded(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.is_fsdp_enabled = True
        plugin = SimpleNamespace(fsdp_version=1)
        monkeypatch.setattr(self.accelerator.state, "fsdp_plugin", plugin, raising=False)

    monkeypatch.setattr(SFTTrainer, "__init__", sharded)
    with pytest.raises(ValueError, match="fsdp_config's version") if refused else nullcontext():
        make(tmp_path, **settings)


def test_a_streamed_data_set_is_refused(tmp_path: Path) -> None:
    data = columns(rows(), ("prompt", "completion")).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset"):
        make(tmp_path, data=data, max_steps=3)


# The cache ----------------------------------------------------------------------------------------


def test_a_full_cache_of_the_old_weights_is_the_old_weights(tmp_path: Path) -> None:
    """Filled by a pass at the end of the epoch; the probabilities are kept in half precision."""
    cached = make(tmp_path / "cache", teacher="cache", cache_top_k=4096, pskd_schedule="constant")
    direct = make(tmp_path / "direct", pskd_schedule="constant")
    for trainer in (cached, direct):
        noisy(trainer.model, 3, 0.2)
    batch = batch_of(cached)
    at_epoch(cached, 0.0, 2)
    gradients(cached, batch)  # fills; dropout is 0, so this is the pass at the end
    for trainer in (cached, direct):
        at_epoch(trainer, 1.0, 2).replaces_loss()
        noisy(trainer.model, 4, 0.2)
    found = gradients(cached, batch)
    wanted = gradients(direct, {k: v for k, v in batch.items() if k != ROW})
    assert found[0] == pytest.approx(wanted[0], rel=2e-3)
    for name, value in wanted[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=2e-2, atol=2e-3)


def test_a_row_that_was_not_reached_has_its_own_label_for_a_target(tmp_path: Path) -> None:
    trainer = at_epoch(make(tmp_path, teacher="cache", pskd_schedule="constant", cache_top_k=4), 0.0, 2)
    batch = batch_of(trainer)
    one = {name: value[:1] for name, value in batch.items()}
    gradients(trainer, one)
    at_epoch(trainer, 1.0, 2)
    loss, _ = gradients(trainer, batch)
    plain = make(tmp_path / "plain", pskd_alpha=0.0)
    split = [
        gradients(trainer, {k: v[part] for k, v in batch.items()})[0] for part in (slice(1), slice(1, 2))
    ]
    counts = (batch["labels"][:, 1:] != -100).sum(1).tolist()
    assert loss == pytest.approx(
        sum(s * c for s, c in zip(split, counts, strict=True)) / sum(counts), rel=1e-5
    )
    alone = {k: v[1:] for k, v in batch.items() if k != ROW}
    assert split[1] == pytest.approx(gradients(plain, alone)[0], rel=1e-6)
    assert split[0] != pytest.approx(gradients(plain, {k: v[:1] for k, v in batch.items() if k != ROW})[0])


def test_the_cache_refuses_rows_that_have_changed() -> None:
    cache = TopKCache(torch.tensor([3, 0, 2]), 1)
    tokens, probs = torch.tensor([[4], [5]]), torch.tensor([[0.5], [0.25]])
    cache.write(torch.tensor([2]), torch.tensor([2]), tokens, probs)
    found = cache.read(torch.tensor([2, 0]), torch.tensor([2, 3]))
    assert found[0][:, 0].tolist() == [4, 5, 0, 0, 0]
    assert found[1][:, 0].tolist() == [0.5, 0.25, 0.0, 0.0, 0.0]
    assert found[2].tolist() == [True, True, False, False, False]
    with pytest.raises(ValueError, match="row 0"):
        cache.read(torch.tensor([2, 0]), torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="cache_top_k"):
        TopKCache(torch.tensor([3, 0, 2]), 2).load(cache.state("x"), "x")


def test_only_the_last_epoch_before_a_refresh_is_cached(tmp_path: Path) -> None:
    trainer = make(tmp_path, teacher="cache", refresh_epochs=2.0, cache_top_k=2)
    batch = batch_of(trainer)
    for epoch, filled in ((0.0, 0), (1.0, 2)):
        gradients(at_epoch(trainer, epoch, 4), batch)
        assert int(trainer._current.filled.sum()) == filled
    gradients(at_epoch(trainer, 2.0, 4), batch)
    assert int(trainer._previous.filled.sum()) == 2


def test_more_tokens_than_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache_top_k"):
        make(tmp_path, teacher="cache", cache_top_k=4097)


# The closed form ----------------------------------------------------------------------------------


def test_the_closed_form_is_found_before_training_and_leaves_the_model(tmp_path: Path) -> None:
    trainer = make(tmp_path, pskd_schedule="closed_form", max_steps=12, learning_rate=0.5)
    before = parameters(trainer)
    weight = fit_two_and_mix(trainer)
    assert equal(parameters(trainer), before)
    assert 0.0 <= weight <= 1.0
    trainer.train()
    assert trainer._mixing == 1.0 - weight
    plain = make(
        tmp_path / "plain", pskd_schedule="constant", pskd_alpha=1.0 - weight, max_steps=12, learning_rate=0.5
    )
    plain.train()
    assert equal(parameters(trainer), parameters(plain))


def test_the_closed_form_is_the_best_mix_of_two_fits(tmp_path: Path) -> None:
    """The two sums that it is made of, from logits of two models on the held-out rows."""
    from hf_ext.trainers.self_distillation import _moments

    trainer = make(tmp_path)
    other = tiny_model(seed=3)
    truth = HeldWeights(other, "teacher")
    inner, square = _moments(trainer, trainer.model, truth, trainer.eval_dataset)
    us, vs, ys = [], [], []
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor(row["input_ids"])[None], torch.tensor(row["labels"])[1:]
        kept = labels != -100
        with torch.no_grad():
            us.append(trainer.model(input_ids=ids).logits[0, :-1][kept].softmax(-1))
            vs.append(other(input_ids=ids).logits[0, :-1][kept].softmax(-1))
        ys.append(torch.nn.functional.one_hot(labels[kept], 4096).float())
    u, v, y = (torch.cat(one).double() for one in (us, vs, ys))
    assert inner == pytest.approx(float(((y - u) * (v - u)).sum()), rel=1e-4)
    assert square == pytest.approx(float((v - u).square().sum()), rel=1e-4)


def test_the_closed_form_needs_held_out_rows(tmp_path: Path) -> None:
    config: Any = INFO.config
    with pytest.raises(ValueError, match="eval_dataset"):
        SelfDistillationTrainer(
            tiny_model(),
            config(str(tmp_path), pskd_schedule="closed_form", bf16=False, use_cpu=True, report_to="none"),
            train_dataset=columns(rows(), ("prompt", "completion")),
            processing_class=tokenizer(),
        )


# Runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "stop"),
    [
        ({}, 6),
        ({}, 8),
        ({"teacher": "cache", "cache_top_k": 5}, 8),
        ({"refresh_epochs": 0.4, "teacher_dtype": "bfloat16"}, 9),
    ],
    ids=["end of an epoch", "within an epoch", "cache", "fraction"],
)
def test_a_resumed_run_is_the_same_to_the_bit(form: dict[str, Any], stop: int, tmp_path: Path) -> None:
    """Stopped in an epoch, at its end, and later than one refresh."""
    arguments = {"save_strategy": "steps", "save_steps": stop, "max_steps": 15, "optim": "adamw_torch",
                 "learning_rate": 1e-2}  # fmt: skip
    whole = make(tmp_path / "whole", **form, **{**arguments, "save_strategy": "no"})
    whole.train()
    with pytest.raises(InterruptedError):
        make(tmp_path / "cut", StopAt(stop + 1), **form, **arguments).train()
    resumed = make(tmp_path / "cut", **form, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 15
    assert equal(parameters(resumed), parameters(whole))


def test_a_checkpoint_without_its_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        make(tmp_path, StopAt(8), save_strategy="steps", save_steps=7, max_steps=12).train()
    folder = tmp_path / "checkpoint-7"
    with pytest.raises(ValueError, match="teacher must be 'checkpoint'"):
        make(tmp_path, teacher="cache", max_steps=12).train(resume_from_checkpoint=str(folder))
    (folder / "hf_ext_self_distillation.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks the state of self_distillation"):
        make(tmp_path, max_steps=12).train(resume_from_checkpoint=str(folder))
