"""The extrapolation between rounds: its recursion, exact cases, adapters, caps, resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from hf_ext.core.files import read_tensors
from hf_ext.trainers import APOTrainer, OnlineIterativeDPOTrainer, extrapolate, momentum_sum
from tests.callbacks.runs import equal
from tests.contracts.test_trainers import adapter
from tests.reference.apo import iterated_policies, momentum_increments
from tests.trainers.runs import build, parameters, tiny_model, training_logs

INFO = APOTrainer.info
SMALL: dict[str, Any] = {"num_rounds": 3, "num_candidates": 3, "kl_prompts": 0}
QUICK: dict[str, Any] = {"max_steps": 2, "save_strategy": "no"}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **settings}
    )


# The recursion ------------------------------------------------------------------------------------


def test_scalar_recursion() -> None:
    # theta_hat_{t+1} = theta_t + 1 in units of the reward: an exact inner solution.
    hat, hats, points = [torch.zeros(1)], [], []
    point = torch.zeros(1)
    for _ in range(4):
        hat.append(point + 1)
        point = extrapolate(hat[-1], hat[-2], 0.3)
        hats.append(hat[-1].item())
        points.append(point.item())
    assert hats == pytest.approx([1, 2.3, 3.69, 5.107])
    assert points[:3] == pytest.approx([1.3, 2.69, 4.107])
    assert [momentum_sum(0.3, rounds) for rounds in range(1, 5)] == pytest.approx(hats)
    assert momentum_sum(0.0, 5) == 5


def test_increments_tend_to_their_limit() -> None:
    sums = [momentum_sum(0.5, rounds) for rounds in range(5)]
    assert [b - a for a, b in pairwise(sums)] == pytest.approx(momentum_increments(0.5, 4))
    assert momentum_increments(0.5, 4) == pytest.approx([1, 1.5, 1.75, 1.875])
    assert momentum_sum(0.5, 60) - momentum_sum(0.5, 59) == pytest.approx(2)


@pytest.mark.parametrize(
    ("alpha", "hat", "point"),
    [
        (0.3, (0.975043, 0.024349, 0.000608), (0.983547, 0.016186, 0.000266)),
        (0.0, (0.950330, 0.047314, 0.002356), (0.950330, 0.047314, 0.002356)),
    ],
)
def test_tabular_softmax(alpha: float, hat: tuple[float, ...], point: tuple[float, ...]) -> None:
    reward, uniform = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    # In parameters, with our function.
    theta, previous = uniform, uniform
    for _ in range(3):
        trained = theta + reward  # the exact DPO solution with beta = 1
        theta, previous = extrapolate(trained, previous, alpha), trained
    assert previous.softmax(0).tolist() == pytest.approx(hat, abs=1e-6)
    assert theta.softmax(0).tolist() == pytest.approx(point, abs=1e-6)
    # In policies, from the paper's equation.
    hats, policies = iterated_policies(reward, uniform.softmax(0), alpha, rounds=3)
    torch.testing.assert_close(hats[-1], previous.softmax(0), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(policies[-1], theta.softmax(0), rtol=0.0, atol=1e-12)


def test_extrapolation_is_affine() -> None:
    hat, previous = torch.randn(2, 5, dtype=torch.float64).unbind()
    point = extrapolate(hat, previous, 0.4)
    torch.testing.assert_close(extrapolate(hat + 3, previous + 3, 0.4), point + 3)
    torch.testing.assert_close(extrapolate(hat, previous, 0.2) - hat, (point - hat) / 2)
    assert extrapolate(hat, previous, 0.0) is hat


def test_bf16_is_widened_and_rounded_once() -> None:
    hat, previous = torch.tensor([1.0078125]).bfloat16(), torch.tensor([1.0]).bfloat16()
    assert (
        extrapolate(hat, previous, 0.3).item() == torch.tensor(1.0078125 + 0.3 * 0.0078125).bfloat16().item()
    )


# Rounds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, lora])
def test_without_extrapolation_it_is_iterative_dpo(config: Callable[[], Any] | None, tmp_path: Path) -> None:
    ours = build(
        INFO,
        tmp_path / "ours",
        settings={**SMALL, "extrapolation_alpha": 0.0},
        peft_config=config and config(),
        **QUICK,
    )
    ours.train()
    plain = build(
        OnlineIterativeDPOTrainer.info,
        tmp_path / "plain",
        settings=SMALL,
        peft_config=config and config(),
        **QUICK,
    )
    plain.train()
    assert equal(parameters(ours), parameters(plain))


def states_of(trainer: Any, folder: Path) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Train, and return each round's trained point and the next policy, as they were in the files."""
    found: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    finish = trainer._finish_round

    def watched(run: Path, place: Path, *args: Any, **kwargs: Any) -> None:
        finish(run, place, *args, **kwargs)
        found.append((read_tensors(place / "hat.safetensors"), read_tensors(place / "policy.safetensors")))

    trainer._finish_round = watched
    trainer.train()
    return found


def test_policies_are_extrapolated_from_trained_points(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings=SMALL, **QUICK)
    previous = {name: p.detach().clone() for name, p in tiny_model().named_parameters()}
    found = states_of(trainer, tmp_path)
    assert len(found) == 3
    for hat, policy in found:
        for name, value in hat.items():
            torch.testing.assert_close(
                policy[name], value + 0.3 * (value - previous[name]), rtol=0.0, atol=1e-7
            )
        assert any(not torch.equal(policy[name], value) for name, value in hat.items())
        previous = hat
    assert equal(parameters(trainer), found[-1][1])


@pytest.mark.parametrize("config", [None, lora])
def test_final_chooses_what_is_returned(config: Callable[[], Any] | None, tmp_path: Path) -> None:
    ends = {}
    for final in ("extrapolated", "hat"):
        trainer = build(
            INFO,
            tmp_path / final,
            settings={**SMALL, "final": final},
            peft_config=config and config(),
            **QUICK,
        )
        found = states_of(trainer, tmp_path / final)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if config is not None:
            model = model.merge_and_unload()
            found = [({f"{k}.weight": v for k, v in hat.items()}, policy) for hat, policy in found]
        ends[final] = {name: p.detach() for name, p in model.named_parameters()}
        if final == "hat":
            for name, value in found[-1][0].items():
                torch.testing.assert_close(ends[final][name], value, rtol=0.0, atol=1e-6)
    assert not equal(ends["hat"], ends["extrapolated"])


def test_a_round_without_pairs_is_no_trained_point(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings={**SMALL, "min_pairs": 1}, **QUICK)

    def none_in_the_second(*args: Any) -> Any:
        rows, figures = sample(*args)
        return (rows.select([]) if trainer.round == 1 else rows), figures

    sample, trainer._sample_pairs = trainer._sample_pairs, none_in_the_second
    found = states_of(trainer, tmp_path)
    (_, first), (hat, second), (last_hat, last) = found
    assert equal(hat, first)
    assert equal(second, first)
    for name, value in last_hat.items():
        torch.testing.assert_close(last[name], value + 0.3 * (value - hat[name]), rtol=0.0, atol=1e-7)


def test_the_cap_shortens_the_step(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings={**SMALL, "max_extrapolation_ratio": 1e-5}, **QUICK)
    trainer.train()
    figures = json.loads((tmp_path / "rounds.json").read_text())["figures"]
    weight = math.sqrt(sum(float(p.detach().double().square().sum()) for p in tiny_model().parameters()))
    for entry in figures:
        assert entry["apo/extrapolation_norm"] == pytest.approx(1e-5 * weight, rel=0.3)
        assert entry["apo/extrapolation_norm"] < 0.3 * entry["apo/step_norm"]


def test_only_chosen_tensors_are_extrapolated(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings={**SMALL, "extrapolate_modules": "lm_head"}, **QUICK)
    for hat, policy in states_of(trainer, tmp_path):
        moved = {name for name, value in hat.items() if not torch.equal(policy[name], value)}
        assert moved == {"lm_head.weight"}
    nothing = build(INFO, tmp_path / "b", settings={**SMALL, "extrapolate_modules": "no_such"}, **QUICK)
    with pytest.raises(ValueError, match="extrapolate_modules"):
        nothing.train()


def test_the_log_tells_steps_and_their_agreement(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings=SMALL, **QUICK)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "apo/step_norm" in entry]
    assert [entry["round"] for entry in logged] == [0, 1, 2]
    assert "apo/cos" not in logged[0]
    assert all(-1 <= entry["apo/cos"] <= 1 for entry in logged[1:])
    assert len(training_logs(trainer)) == 6


# Adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "sorsa", "loldu"])
def test_an_adapters_weights_are_extrapolated_and_come_back_as_lora(kind: str, tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings=SMALL, peft_config=adapter(kind), **QUICK)
    original = {name: p.detach().clone() for name, p in tiny_model().named_parameters()}
    found = states_of(trainer, tmp_path)
    previous = {path: original[f"{path}.weight"] for path in found[0][0]}
    for hat, policy in found:
        for path, value in hat.items():
            expected = value + 0.3 * (value - previous[path])
            torch.testing.assert_close(policy[f"base.{path}"], expected, rtol=0.0, atol=1e-6)
        previous = hat
    model = trainer.model
    assert isinstance(model, PeftModel)
    assert isinstance(model.peft_config["default"], LoraConfig)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved").merge_and_unload()
    final = {name: p.detach() for name, p in loaded.named_parameters()}
    for path in found[-1][0]:
        torch.testing.assert_close(final[f"{path}.weight"], found[-1][1][f"base.{path}"], rtol=0.0, atol=1e-6)
        assert not torch.equal(final[f"{path}.weight"], original[f"{path}.weight"])


def test_the_rank_is_that_of_the_update(tmp_path: Path) -> None:
    trainer = build(INFO, tmp_path, settings={**SMALL, "num_rounds": 2}, peft_config=lora(r=1), **QUICK)
    trainer.train()
    # Two rounds of rank one.
    assert set(trainer.model.peft_config["default"].rank_pattern.values()) == {2}


@pytest.mark.parametrize("kind", ["lora", "loldu"])
def test_a_run_with_an_adapter_cut_between_rounds_goes_on(kind: str, tmp_path: Path) -> None:
    whole = build(INFO, tmp_path / "whole", settings=SMALL, peft_config=adapter(kind), **QUICK)
    whole.train()
    cut = build(INFO, tmp_path / "cut", settings=SMALL, peft_config=adapter(kind), **QUICK)

    def stop(*args: Any) -> Any:
        if cut.round == 2:
            raise InterruptedError
        return sample(*args)

    sample, cut._sample_pairs = cut._sample_pairs, stop
    with pytest.raises(InterruptedError):
        cut.train()
    resumed = build(INFO, tmp_path / "cut", settings=SMALL, peft_config=adapter(kind), **QUICK)
    resumed.train(resume_from_checkpoint=True)
    assert equal(parameters(resumed), parameters(whole))


def test_what_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"reset_optimizer": False}, lora(), "reset_optimizer"),
        ({"reference": "initial"}, lora(), "reference"),
        ({}, lora(modules_to_save=["lm_head"]), "modules_to_save"),
        ({}, lora(target_modules=["embed_tokens"]), "embed_tokens"),
    ]
    for settings, config, name in cases:
        with pytest.raises(ValueError, match=name):
            build(INFO, tmp_path, settings={**SMALL, **settings}, peft_config=config)
    for config in (None, lora()):  # PEFT keeps the adapter of a bf16 base in fp32
        with pytest.raises(ValueError, match="dtype"):
            build(INFO, tmp_path, settings=SMALL, model=tiny_model().bfloat16(), peft_config=config)


def test_a_second_run_folds_the_adapter_of_the_first(tmp_path: Path) -> None:
    settings = {**SMALL, "num_rounds": 2}
    trainer = build(INFO, tmp_path, settings=settings, peft_config=lora(), **QUICK)
    trainer.train()
    first = trainer.model.get_base_model().state_dict()
    found = states_of(trainer, tmp_path)
    assert set(found[0][0]) == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    again = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(again[name], first[name]) for name in first if "base_layer" in name)
