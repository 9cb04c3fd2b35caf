"""Continual EMA: the hand-computed cases, the average in a run, evaluation with it, and the router."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hf_ext
from hf_ext.callbacks import ContinualEMACallback, TfidfRouter, ema_coefficient
from hf_ext.callbacks._base import Run
from hf_ext.core.state import load_state
from tests.callbacks.runs import (
    BEST,
    MIDDLE,
    STEPS,
    Bumpy,
    StopAt,
    build,
    equal,
    logged,
    parameters,
    rows,
    tiny_model,
)
from tests.reference import continual_ema as reference


class Loop:
    """A module whose weights and gradients the test sets, stepped as a Trainer would."""

    def __init__(self, start: list[float] | None = None, tensors: int = 1, **settings: Any) -> None:
        self.model = nn.Module()
        for index in range(tensors):
            self.model.register_parameter(f"w{index}", nn.Parameter(torch.tensor(start or [0.5, 1.0])))
        self.callback = ContinualEMACallback(**settings)
        self.args: Any = SimpleNamespace(load_best_model_at_end=False, distributed_state=None)
        self.callback.begin(Run(self.args, TrainerState(), TrainerControl(), self.model, None, None))

    def step(
        self, theta: list[float], g: list[float] | None, name: str = "w0", skipped: bool = False
    ) -> None:
        weight = self.model.get_parameter(name)
        with torch.no_grad():
            weight.copy_(torch.tensor(theta))
        weight.grad = None if g is None else torch.tensor(g)
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        nothing: Any = None
        self.callback.on_optimizer_step(nothing, nothing, nothing, optimizer=optimizer)

    def average(self, name: str = "w0") -> list[float]:
        return self.callback._average[name].tolist()

    def given(self, g_prev: list[float]) -> None:
        """Let a former update have had these gradients, and no other effect."""
        self.callback._gradient = {"w0": torch.tensor(g_prev)}


# The coefficient ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("g_prev", "expected"),
    [
        ([-4.0, 4.0], [0.597561, 1.195122]),  # a = 1.5, b = 0.2, c = 8.2: alpha = 2.4 / 12.3
        ([0.1, -0.1], [0.505, 1.01]),  # c = 0: the fallback
        ([0.0, 0.0], [0.505, 1.01]),  # c = 0.2: alpha = 8, the fallback
    ],
)
def test_the_hand_computed_cases(g_prev: list[float], expected: list[float]) -> None:
    loop = Loop()
    loop.given(g_prev)
    loop.step([1.0, 2.0], [0.1, -0.1])
    assert loop.average() == pytest.approx(expected, abs=1e-6)


def test_the_coefficient_and_its_range() -> None:
    assert ema_coefficient(1.5, 0.2, 8.2) == pytest.approx(2.4 / 12.3)
    assert ema_coefficient(1.5, 0.2, 8.2, role="old", factor=1.0) == pytest.approx(1.0 - 1.2 / 12.3)
    assert ema_coefficient(1.5, 0.2, 8.2, factor=4.0) == pytest.approx(4.8 / 12.3)
    for distance, gradient, change in ((0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, 1.0), (1.0, 0.0, 2.0)):
        assert ema_coefficient(distance, gradient, change) is None
    assert ema_coefficient(1.0, 1.0, math.nan) is None
    assert ema_coefficient(1e200, 1.0, 1e200) is None  # 1 / inf is 0


def test_the_role_of_the_old_average() -> None:
    loop = Loop(role="old")
    loop.given([-4.0, 4.0])
    loop.step([1.0, 2.0], [0.1, -0.1])
    beta = 1.2 / 12.3
    assert loop.average() == pytest.approx([beta * 0.5 + (1 - beta) * 1.0, beta * 1.0 + (1 - beta) * 2.0])


def test_equals_the_reference_over_many_steps() -> None:
    generator = torch.Generator().manual_seed(3)
    draws = torch.randn(2, 60, 5, generator=generator) * torch.tensor([3.0, 2.0])[:, None, None]
    thetas, gradients = draws.tolist()
    loop = Loop(thetas[0], fallback=0.1)
    for theta, gradient in zip(thetas[1:], gradients[1:], strict=True):
        loop.step(theta, gradient)
    assert loop.average() == pytest.approx(
        reference.average(thetas[0], thetas[1:], gradients[1:], 0.1), rel=1e-4
    )
    assert 0.5 < loop.callback.scalars()["adaptive_share"] < 1.0


def test_a_constant_coefficient_has_a_closed_form() -> None:
    alpha, thetas = 0.03, torch.randn(101, 2, generator=torch.Generator().manual_seed(0)).double()
    loop = Loop(thetas[0].tolist(), coefficient=alpha)
    for theta in thetas[1:].tolist():
        loop.step(theta, [1.0, 1.0])
    powers = (1 - alpha) ** torch.arange(99, -1, -1).double()
    expected = (1 - alpha) ** 100 * thetas[0] + alpha * (powers[:, None] * thetas[1:]).sum(0)
    assert loop.average() == pytest.approx(expected.tolist(), abs=1e-6)
    assert loop.callback.scalars() == {"alpha": alpha, "adaptive_share": 0.0}
    assert loop.callback._gradient == {}


def test_an_average_that_is_reached_stays() -> None:
    loop = Loop()
    loop.given([-4.0, 4.0])
    loop.step([0.5, 1.0], [7.0, -0.3])
    assert loop.average() == [0.5, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_the_average_lies_between_the_former_one_and_the_weights(seed: int) -> None:
    draw = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) * 5
    loop = Loop(draw[0].tolist())
    loop.given((draw[2] * 2).tolist())
    loop.step(draw[1].tolist(), draw[2].tolist())
    found, low, high = torch.tensor(loop.average()), torch.minimum(*draw[:2]), torch.maximum(*draw[:2])
    assert bool(((found >= low) & (found <= high)).all())


def test_the_scope() -> None:
    one, both = Loop(), Loop(scope="global")
    for loop in (one, both):
        loop.given([-4.0, 4.0])
        loop.step([1.0, 2.0], [0.1, -0.1])
    assert one.average() == both.average()
    several = Loop(tensors=2, scope="global")
    several.callback._gradient = {name: torch.tensor([-4.0, 4.0]) for name in ("w0", "w1")}
    several.model.get_parameter("w1").grad = torch.tensor([0.1, -0.1])
    with torch.no_grad():
        several.model.get_parameter("w1").copy_(torch.tensor([1.0, 2.0]))
    several.step([1.0, 2.0], [0.1, -0.1])
    alpha = 2 * 1.4 / (3.0 * 16.4)
    assert several.average() == several.average("w1") == pytest.approx([0.5 + alpha * 0.5, 1.0 + alpha])


def test_the_start() -> None:
    after = Loop(init="after")
    after.step([3.0, 3.0], [1.0, 1.0])
    assert after.average() == [3.0, 3.0]
    before = Loop()
    before.step([3.0, 3.0], [1.0, 1.0])
    assert before.average() == pytest.approx([0.525, 1.02])  # no former gradient: the fallback


def test_a_tensor_without_a_gradient_is_left() -> None:
    loop = Loop(tensors=2)
    loop.step([3.0, 3.0], [1.0, 1.0])
    assert loop.average("w1") == [0.5, 1.0]
    before = {name: value.clone() for name, value in loop.callback._gradient.items()}
    loop.step([9.0, 9.0], None)
    assert loop.average() == pytest.approx([0.525, 1.02])
    assert torch.equal(loop.callback._gradient["w0"], before["w0"])
    loop.step([4.0, 4.0], [2.0, 2.0])  # a = 6.455, b = 4, c = 2: alpha = 10 / 12.91
    alpha = reference.alpha([4.0, 4.0], [0.525, 1.02], [2.0, 2.0], [1.0, 1.0])
    assert 0.5 < alpha < 1.0
    assert loop.average() == pytest.approx([0.525 + alpha * 3.475, 1.02 + alpha * 2.98])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"coefficient": 0.1}, {"init": "after"}])
def test_an_update_that_is_not_finite_is_passed_over(bad: float, settings: dict[str, Any]) -> None:
    loop = Loop(**settings)
    loop.step([3.0, 3.0], [1.0, 1.0])
    before, scalars = loop.average(), loop.callback.scalars()
    gradients = {name: value.tolist() for name, value in loop.callback._gradient.items()}
    loop.step([3.0, 3.0], [bad, 1.0])
    loop.step([bad, 3.0], [1.0, 1.0])
    assert loop.average() == before
    assert loop.callback.scalars() == scalars
    assert {name: value.tolist() for name, value in loop.callback._gradient.items()} == gradients


def test_a_first_update_that_is_not_finite_does_not_start_the_average() -> None:
    loop = Loop(init="after")
    loop.step([math.nan, 3.0], [math.nan, 1.0])
    loop.step([2.0, 3.0], [1.0, 1.0])
    assert loop.average() == [2.0, 3.0]


def test_a_skipped_update_is_passed_over() -> None:
    loop = Loop()
    loop.step([3.0, 3.0], [1.0, 1.0], skipped=True)
    assert loop.average() == [0.5, 1.0]
    assert loop.callback._gradient == {}


def test_a_tensor_that_begins_to_train_joins() -> None:
    loop = Loop(tensors=2)
    late = loop.model.get_parameter("w1").requires_grad_(False)
    loop.callback._average.pop("w1")
    loop.step([3.0, 3.0], [1.0, 1.0])
    assert "w1" not in loop.callback._average
    late.requires_grad_(True)
    late.grad = torch.tensor([1.0, 1.0])
    loop.step([3.0, 3.0], [1.0, 1.0])
    assert loop.average("w1") == [0.5, 1.0]


def test_a_module_that_the_optimizer_takes_up_joins() -> None:
    loop = Loop()
    optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.0)
    nothing: Any = None
    for _ in range(2):
        loop.model.get_parameter("w0").grad = torch.ones(2)
        loop.callback.on_optimizer_step(nothing, nothing, nothing, optimizer=optimizer)
    late = nn.Linear(2, 1, bias=False)
    loop.model.add_module("late", late)
    optimizer.add_param_group({"params": list(late.parameters())})
    late.weight.grad = torch.ones(1, 2)
    loop.callback.on_optimizer_step(nothing, nothing, nothing, optimizer=optimizer)
    assert torch.equal(loop.callback._average["late.weight"], late.weight)


def test_half_precision_weights_have_a_full_precision_average() -> None:
    loop = Loop(coefficient=0.01)
    weight = loop.model.get_parameter("w0")
    weight.data = weight.data.bfloat16()
    for _ in range(3):
        with torch.no_grad():
            weight.copy_(torch.tensor([0.50390625, 1.0078125]))  # one bit above
        weight.grad = torch.ones(2, dtype=torch.bfloat16)
        nothing: Any = None
        loop.callback.on_optimizer_step(nothing, nothing, nothing, optimizer=SimpleNamespace())
    share = 1 - 0.99**3
    assert loop.average() == pytest.approx([0.5 + share * 0.00390625, 1.0 + share * 0.0078125], rel=1e-6)
    assert loop.callback._average["w0"].dtype == torch.float32


# In a run -----------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Keep weights and gradients of each update, by the names of the model."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = dict(kwargs["model"].named_parameters())
        self.weights.append({name: p.detach().clone() for name, p in named.items()})
        self.gradients.append({name: p.grad.clone() for name, p in named.items()})


def averaged(start: dict[str, Tensor], watch: Watch, fallback: float) -> dict[str, list[float]]:
    found = {}
    for name, value in start.items():
        thetas = [weights[name].flatten().tolist() for weights in watch.weights]
        gradients = [g[name].flatten().tolist() for g in watch.gradients]
        found[name] = reference.average(value.flatten().tolist(), thetas, gradients, fallback)
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_ends_with_the_average_of_its_updates(accumulation: int, tmp_path: Path) -> None:
    watch = Watch()
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}
    trainer = build(tmp_path, ContinualEMACallback(fallback=0.2), others=[watch], **options)
    start = parameters(trainer)
    trainer.train()
    expected = averaged(start, watch, 0.2)
    for name, value in parameters(trainer).items():
        # fp32 sums against exact ones move a coefficient by some parts in a million.
        assert value.flatten().tolist() == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    plain_watch = Watch()
    plain = build(tmp_path / "plain", others=[plain_watch], **options)
    plain.train()
    assert all(equal(a, b) for a, b in zip(watch.weights, plain_watch.weights, strict=True))
    assert logged(trainer, "loss") == logged(plain, "loss")


def test_the_raw_weights_can_be_kept(tmp_path: Path) -> None:
    trainer = build(tmp_path, ContinualEMACallback(replace_weights=False), save_strategy="no")
    trainer.train()
    plain = build(tmp_path, save_strategy="no")
    plain.train()
    assert equal(parameters(trainer), parameters(plain))


def test_checkpoints_hold_raw_weights_and_the_average(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    watch = Watch()
    trainer = build(tmp_path, ContinualEMACallback(fallback=0.2), others=[watch])
    start = parameters(trainer)
    trainer.train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, watch.weights[-1][name]) for name, value in weights.items())
    scalars, tensors = load_state(folder, "hf_ext_continual_ema")
    end = parameters(trainer)
    assert {name: tensors[f"average.{name}"].tolist() for name in start} == {
        name: value.tolist() for name, value in end.items()
    }
    assert all(torch.equal(tensors[f"gradient.{name}"], watch.gradients[-1][name]) for name in start)
    assert scalars["state"]["updates"] == STEPS
    trainer.save_model(str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, end[name]) for name, value in saved.items())


def test_an_exception_leaves_the_raw_weights(tmp_path: Path) -> None:
    watch, callback = Watch(), ContinualEMACallback()
    trainer = build(tmp_path, callback, others=[watch, StopAt(7)], save_strategy="no")
    with pytest.raises(InterruptedError):
        trainer.train()
    assert equal(parameters(trainer), watch.weights[-1])
    assert callback._average == {}


class SeenInEvaluation(TrainerCallback):
    """Keep the weights that an evaluation has used."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = {
            n: p.detach().clone() for n, p in kwargs["model"].named_parameters()
        }


EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no"}


@pytest.mark.parametrize("several", [False, True])
def test_evaluations_are_of_the_average(several: bool, tmp_path: Path) -> None:
    seen, watch = SeenInEvaluation(), Watch()
    trainer = build(tmp_path, ContinualEMACallback(fallback=0.2), others=[seen, watch], **EVALUATED)
    if several:
        two: Any = {"a": rows(3).select(range(2)), "b": rows(5).select(range(2))}
        trainer.eval_dataset = two
    start = parameters(trainer)
    trainer.train()
    assert equal(seen.weights[STEPS], parameters(trainer))
    half = Watch()
    half.weights, half.gradients = watch.weights[:5], watch.gradients[:5]
    for name, values in averaged(start, half, 0.2).items():
        assert seen.weights[5][name].flatten().tolist() == pytest.approx(values, rel=1e-4, abs=1e-6)
    plain = Watch()
    build(tmp_path, others=[plain], save_strategy="no").train()
    assert all(equal(a, b) for a, b in zip(watch.weights, plain.weights, strict=True))
    after = trainer.evaluate()  # after the run nothing is swapped
    assert equal(seen.weights[STEPS], parameters(trainer))
    if not several:
        history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert after["eval_loss"] == history[-1] == history[-2]


def test_an_evaluation_that_fails_leaves_the_raw_weights(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise InterruptedError("stopped by the test")

    watch = Watch()
    trainer = build(tmp_path, ContinualEMACallback(), others=[watch, Fails()], **EVALUATED)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert len(watch.weights) == 5
    assert equal(parameters(trainer), watch.weights[-1])


def test_evaluation_with_raw_weights_needs_no_attachment(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="evaluates the averaged weights"):
        build(tmp_path, ContinualEMACallback(), attach=False, **EVALUATED)
    seen, watch = SeenInEvaluation(), Watch()
    callback = ContinualEMACallback(use_for_eval=False)
    trainer = build(tmp_path, callback, attach=False, others=[seen, watch], **EVALUATED)
    trainer.train()
    assert equal(seen.weights[5], watch.weights[4])
    assert not equal(parameters(trainer), watch.weights[-1])


def test_resumed_in_the_middle_with_evaluation_and_init_after(tmp_path: Path) -> None:
    options: dict[str, Any] = {**EVALUATED, "save_strategy": "steps"}
    settings: dict[str, Any] = {"init": "after", "scope": "global", "fallback": 0.2}
    whole = build(tmp_path / "whole", ContinualEMACallback(**settings), **options)
    whole.train()
    resumed = build(tmp_path / "resumed", ContinualEMACallback(**settings), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{MIDDLE}"))
    assert equal(parameters(resumed), parameters(whole))


def test_only_the_tensors_that_are_asked_for(tmp_path: Path) -> None:
    watch = Watch()
    trainer = build(tmp_path, ContinualEMACallback(params=r"mlp\."), others=[watch], save_strategy="no")
    trainer.train()
    moved = {name for name, p in parameters(trainer).items() if not torch.equal(p, watch.weights[-1][name])}
    assert moved
    assert all("mlp." in name for name in moved)
    with pytest.raises(ValueError, match="params must be the name of some trainable tensor"):
        build(tmp_path, ContinualEMACallback(params="lora_"), save_strategy="no").train()


def test_an_adapter_alone_is_averaged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    trainer = build(tmp_path, ContinualEMACallback(), model=model)
    trainer.train()
    _, tensors = load_state(tmp_path / f"checkpoint-{STEPS}", "hf_ext_continual_ema")
    assert tensors
    assert all("lora_" in name for name in tensors)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_the_best_checkpoint_is_refused(tmp_path: Path) -> None:
    best = {**EVALUATED, "save_strategy": "steps", "save_steps": 5, "load_best_model_at_end": True}
    with pytest.raises(ValueError, match=r"must be False with ContinualEMACallback.*best_from='average'"):
        build(tmp_path, ContinualEMACallback(), **best).train()
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        build(tmp_path, ContinualEMACallback(use_for_eval=False), **best).train()
    build(tmp_path, ContinualEMACallback(use_for_eval=False, replace_weights=False), **best).train()


@pytest.mark.parametrize("choice", ["average", "raw"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_best_checkpoint_s_average_or_raw_weights(choice: str, lora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    ema = choice == "average"
    callback = ContinualEMACallback(
        coefficient=0.3, use_for_eval=ema, replace_weights=ema, best_from=choice, params=r"q_proj|norm"
    )
    model = tiny_model()
    if lora:
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, config)
    trainer = build(tmp_path, callback, model=model, load_best_model_at_end=True, save_total_limit=2, **BEST)
    bumpy = Bumpy(trainer)
    trainer.train()
    best = tmp_path / f"checkpoint-{MIDDLE}"
    assert Path(trainer.state.best_model_checkpoint or "") == best
    after = parameters(trainer)
    # In evaluations the average is in the model with "average", and the raw weights without: either way what
    # has been evaluated is the averaged tensors of the best model; the others are the best checkpoint's own.
    assert equal(after, bumpy.seen[MIDDLE - 1])
    assert not equal(after, bumpy.seen[-1])
    raw = tiny_model()
    raw = PeftModel.from_pretrained(raw, best) if lora else type(raw).from_pretrained(best)
    stored = {name: value.detach() for name, value in raw.named_parameters()}
    same = {name for name, value in after.items() if torch.equal(value, stored[name])}
    averaged = {n for n in after if "norm" in n or "q_proj" in n} if not lora else set()
    averaged |= {n for n in after if "q_proj" in n and "lora_" in n}
    assert same == set(after) - (averaged if ema else set())
    # What the run leaves can be saved and loaded.
    trainer.save_model(str(tmp_path / "out"))
    again = tiny_model()
    loaded = (
        PeftModel.from_pretrained(again, tmp_path / "out")
        if lora
        else type(again).from_pretrained(tmp_path / "out")
    )
    assert equal({n: p.detach() for n, p in loaded.named_parameters()}, after)


def test_a_resumed_run_takes_the_best_average_of_before(tmp_path: Path) -> None:
    options: dict[str, Any] = {"load_best_model_at_end": True, **BEST}
    ends = []
    for name in ("whole", "cut"):
        trainer = build(tmp_path / name, ContinualEMACallback(best_from="average"), **options)
        Bumpy(trainer)
        if name == "cut":
            trainer.add_callback(StopAt(7))
            with pytest.raises(InterruptedError):
                trainer.train()
            trainer = build(
                tmp_path / name,
                ContinualEMACallback(best_from="average"),
                load_best_model_at_end=True,
                **BEST,
            )
            Bumpy(trainer)
            trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()
        ends.append(parameters(trainer))
    assert equal(*ends)


def resume_for_the_best_average(folder: Path, *before: ContinualEMACallback) -> None:
    """Train with or without a callback, then go on with one that takes the best average of all."""
    options: dict[str, Any] = {"load_best_model_at_end": True, **BEST}
    trainer = build(folder, *before, **options)
    Bumpy(trainer)
    trainer.train()
    late = build(folder, ContinualEMACallback(best_from="average"), max_steps=12, **options)
    late.train(resume_from_checkpoint=str(folder / "checkpoint-10"))


def test_a_best_average_is_refused_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load_best_model_at_end must be True with best_from='average'"):
        build(tmp_path, ContinualEMACallback(best_from="average"), **BEST).train()
    with pytest.raises(ValueError, match=r"best_from must be 'raw' where the best .*checkpoint-5\)"):
        resume_for_the_best_average(tmp_path)


def test_a_best_checkpoint_that_raw_weights_have_chosen_is_refused(tmp_path: Path) -> None:
    raw = ContinualEMACallback(use_for_eval=False, replace_weights=False)
    with pytest.raises(ValueError, match=r"best_from must be 'raw' where .* chosen by its own weights"):
        resume_for_the_best_average(tmp_path, raw)


SIZES = ((0, 5), (12, 3), (40_000, 200), (0, 7), (300_001, 1), (40_000, 200), (7, 7))


def test_sums_do_not_depend_on_torch_s_defaults() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        callback = ContinualEMACallback()
        callback.reset()
    finally:
        torch.set_default_dtype(torch.float32)
    # Small ones, one of a block, and one of more than a block.
    xs = [torch.linspace(-1.0, 1.0, size).view(-1, width) for size, width in SIZES]
    wanted = [x.double().abs().sum().item() for x in xs]
    assert [found.item() for found in callback._l1(xs)] == pytest.approx(wanted, rel=1e-5)
    halves = callback._l1(xs, [0.5 * x for x in xs])
    assert [2.0 * found.item() for found in halves] == pytest.approx(wanted, rel=1e-5)
    assert {found.dtype for found in halves} == {torch.float32}
    assert callback._l1([]) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    build(tmp_path, ContinualEMACallback(), save_strategy="steps").train()
    folder = tmp_path / f"checkpoint-{MIDDLE}"
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    callback = ContinualEMACallback()
    callback.load_state_dict(callback.read_state(folder))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"trained tensors must be with lm_head\.weight"):
        callback.begin(Run(arguments, TrainerState(), TrainerControl(), model, None, None))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FlatParameter"])
def test_where_gradients_cannot_be_seen_it_is_refused(kind: str) -> None:
    class FlatParameter(nn.Parameter): ...

    model = nn.Linear(2, 2)
    distributed = None
    if kind == "DEEPSPEED":
        distributed = SimpleNamespace(distributed_type="DistributedType.DEEPSPEED")
    else:
        model.weight = FlatParameter(torch.zeros(2, 2))
    args: Any = SimpleNamespace(load_best_model_at_end=False, distributed_state=distributed)
    run = Run(args, TrainerState(), TrainerControl(), model, None, None)
    with pytest.raises(ValueError, match="continual_ema must be used with"):
        ContinualEMACallback().begin(run)


def test_an_optimizer_that_leaves_no_gradient_is_refused(tmp_path: Path) -> None:
    class LayerWiseSGD(torch.optim.SGD): ...

    class Unnamed(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            self.zero_grad()

    for kind, text in ((LayerWiseSGD, "steps after the backward pass"), (Unnamed, "none has been there yet")):
        model = tiny_model()
        trainer = build(tmp_path, ContinualEMACallback(), model=model)
        trainer.optimizer = kind(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=f"optim must be one that .*{text}"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_weights_that_were_handed_over_are_handed_over_anew_around_an_evaluation(tmp_path: Path) -> None:
    class Generates(TrainerCallback):
        """As TRL's trainers with vLLM do: weights go there when the step is another than the last time."""

        seen: list[tuple[int, bool]] = []

        def generate(self, trainer: Any) -> None:
            self.seen.append(
                (trainer.state.global_step, trainer.state.global_step != trainer._last_loaded_step)
            )
            trainer._last_loaded_step = trainer.state.global_step

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.generate(trainer)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.generate(trainer)  # of the step that is evaluated next

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.generate(trainer)

    generates = Generates()
    options: dict[str, Any] = {
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
    }
    options |= {"per_device_eval_batch_size": 2, "save_strategy": "no"}
    trainer: Any = build(tmp_path, ContinualEMACallback(), others=[generates], **options)
    trainer._last_loaded_step = -1
    trainer.train()
    begin, end, evaluation = True, True, [True, False]
    expected = [*evaluation, *[begin, end, *evaluation] * 2]
    assert [anew for _, anew in generates.seen] == expected


def test_large_buffers_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_ext.callbacks.continual_ema.LARGE", 16)
    with pytest.warns(UserWarning, match="two fp32 copies of each trained tensor"):
        Loop()


def test_a_task_after_another_starts_from_the_average(tmp_path: Path) -> None:
    first = build(tmp_path, ContinualEMACallback(), save_strategy="no")
    first.train()
    kept = parameters(first)
    watch = Watch()
    second = build(tmp_path, model=first.model, data=rows(7), others=[watch], save_strategy="no")
    callback = ContinualEMACallback(coefficient=1e-6)
    hf_ext.attach(second, callback)
    second.train()
    for name, value in parameters(second).items():
        torch.testing.assert_close(value, kept[name], rtol=0.0, atol=1e-5)


# The router ---------------------------------------------------------------------------------------


def test_similarity_by_hand() -> None:
    router = TfidfRouter()
    router.add("a", ["Sort the list."])
    router.add("b", ["Count the letters!"])
    common, rare, new = (
        1.0,
        math.log(3 / 2) + 1,
        math.log(3) + 1,
    )  # idf of "the", of one text's words, of none's
    known = common**2 + 2 * rare**2
    expected = (common**2 + rare**2) / math.sqrt(known * (common**2 + rare**2 + new**2))
    found = router.similarities(["sort THE numbers"])
    assert found["a"] == pytest.approx(expected)
    assert found["b"] == pytest.approx(common**2 / math.sqrt(known * (common**2 + rare**2 + new**2)))
    assert router.similarities(["sort the list"])["a"] == pytest.approx(1.0)


def test_routes() -> None:
    router = TfidfRouter(0.9)
    assert router.adapter_for_task(["Sort the list."]) is None
    with pytest.raises(ValueError, match="adapters must be at least one"):
        router.adapter_for("Sort")
    router.add("sorting", ["Sort the list."])
    router.add("counting", ["Count the letters."])
    assert router.adapter_for_task(["sort, the LIST"]) == "sorting"
    assert router.adapter_for_task(["Reverse the list."]) is None
    assert router.adapter_for("please count letters") == "counting"
    assert TfidfRouter(0.1).adapter_for_task(["sort"]) is None
    assert router.adapters == ["sorting", "counting"]


def test_several_instructions_are_a_mean() -> None:
    router = TfidfRouter()
    router.add("a", ["one two", "three four"])
    assert router.similarities(["one two"])["a"] == pytest.approx(0.5)
    assert router.similarities(["one two", "three four"])["a"] == pytest.approx(0.5)
    router.add("a", ["one two"])  # known: it changes nothing
    assert router.similarities(["one two"])["a"] == pytest.approx(0.5)


def test_a_router_survives_json() -> None:
    router = TfidfRouter(0.3)
    router.add("a", ["one two", "three"])
    again = TfidfRouter.from_json(json.loads(json.dumps(router.to_json())))
    assert again.to_json() == router.to_json()
    assert again.similarities(["three two"]) == router.similarities(["three two"])
    with pytest.raises(ValueError, match="router must be an object with the fields"):
        TfidfRouter.from_json({"threshold": 1.0})


def test_what_cannot_be_routed_is_refused() -> None:
    for threshold in (0.0, 1.1):
        with pytest.raises(ValueError, match="threshold must be in"):
            TfidfRouter(threshold)
    with pytest.raises(ValueError, match="instructions must be given with at least one word"):
        TfidfRouter().add("a", ["...", ""])
    with pytest.raises(ValueError, match="instructions must be at least one"):
        TfidfRouter().similarities([])
    for call in (lambda: TfidfRouter().add("a", "Sort the list."), lambda: TfidfRouter().similarities("ab")):
        with pytest.raises(ValueError, match="instructions must be a list of texts, not one text"):
            call()
