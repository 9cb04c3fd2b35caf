"""Exact properties of metrics-weighted averaging."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from hf_ext.merging import (
    factor_error,
    merge,
    merge_run,
    metrics_weights,
)
from tests.merging.models import equal, random_models, save_model, tensors_of
from tests.merging.runs import save_run, scalar_run, write_state

LOSSES, STEPS = [0.8, 0.5, 0.4], [100.0, 200.0, 300.0]


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (0.0, (1 / 3, 1 / 3, 1 / 3)),
        (1.0, (0.217391, 0.347826, 0.434783)),
        (2.0, (0.132275, 0.338624, 0.529101)),
        (4.0, (0.042456, 0.278242, 0.679302)),
    ],
)
def test_weights_of_three_losses(penalty: float, expected: tuple[float, ...]) -> None:
    assert metrics_weights(LOSSES, penalty=penalty) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (1.0, (0.166667, 0.333333, 0.5)),
        (0.5, (0.241181, 0.341081, 0.417738)),
        (2.0, (0.071429, 0.285714, 0.642857)),
    ],
)
def test_weights_of_three_steps(penalty: float, expected: tuple[float, ...]) -> None:
    found = metrics_weights(steps=STEPS, weighting="step", penalty=penalty)
    assert found == pytest.approx(expected, abs=5e-7)


def test_the_power_form_does_not_depend_on_the_unit_of_the_loss() -> None:
    scaled = [7.3 * loss for loss in LOSSES]
    assert metrics_weights(scaled, penalty=3.0) == pytest.approx(
        metrics_weights(LOSSES, penalty=3.0), rel=1e-12
    )


def test_the_softmax_form_does_not_depend_on_a_constant_in_the_loss() -> None:
    shifted = [loss - 4.0 for loss in LOSSES]
    softmax: dict[str, Any] = {"form": "softmax", "penalty": 3.0}
    assert metrics_weights(shifted, **softmax) == pytest.approx(metrics_weights(LOSSES, **softmax), rel=1e-12)
    expected = [math.exp(-3.0 * loss) for loss in LOSSES]
    assert metrics_weights(LOSSES, **softmax) == pytest.approx(
        [e / sum(expected) for e in expected], rel=1e-12
    )


def test_the_minmax_form_puts_the_best_at_one_and_the_worst_near_zero() -> None:
    found = metrics_weights(LOSSES, form="minmax")
    raw = [0.001, 0.751, 1.001]
    assert found == pytest.approx([value / sum(raw) for value in raw], rel=1e-9)
    assert metrics_weights([0.5, 0.5], form="minmax", penalty=3.0) == [0.5, 0.5]


def test_a_greater_metric_that_is_better_turns_the_sign() -> None:
    accuracy = [0.2, 0.4, 0.4]
    assert metrics_weights(accuracy, greater_is_better=True) == pytest.approx([0.2, 0.4, 0.4])


@pytest.mark.parametrize("form", ["power", "softmax", "minmax"])
def test_a_large_penalty_picks_the_best_without_overflow(form: str) -> None:
    assert metrics_weights([1e-8, 1.0, 2.0], penalty=1000.0, form=form)[0] == pytest.approx(1.0, abs=1e-4)
    assert metrics_weights([0.5, 0.4, 0.5], penalty=50.0)[1] == pytest.approx(1.0, abs=1e-4)
    assert metrics_weights(steps=STEPS, weighting="step", penalty=1e4, form=form)[2] == pytest.approx(1.0)


def test_weights_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        losses = (torch.rand(17, generator=generator, dtype=torch.float64) * 10 + 1e-6).tolist()
        for form in ("power", "softmax", "minmax"):
            assert abs(math.fsum(metrics_weights(losses, penalty=3.7, form=form)) - 1.0) < 1e-12


def test_a_loss_of_zero_is_refused_with_the_form_that_takes_it() -> None:
    with pytest.raises(ValueError, match=r"losses must be above 0 .* softmax.*-0\.1 \(checkpoint 2\)"):
        metrics_weights([0.3, -0.1, 0.0])
    assert sum(metrics_weights([0.3, -0.1, 0.0], form="softmax")) == pytest.approx(1.0)


# Runs ---------------------------------------------------------------------------------------------


def test_a_run_is_merged_by_the_losses_in_its_checkpoints(tmp_path: Path) -> None:
    save_run(tmp_path / "run", [{"w": torch.tensor([x])} for x in (1.0, 2.0, 4.0)], LOSSES)
    result = merge_run(tmp_path / "run", tmp_path / "out", progress=False)
    expected = sum(w * x for w, x in zip(metrics_weights(LOSSES), (1.0, 2.0, 4.0), strict=True))
    assert tensors_of(tmp_path / "out")["w"].item() == pytest.approx(expected, rel=1e-6)
    found = [model["parameters"] for model in result.manifest["models"]]
    assert found == [{"loss": loss, "step": 10.0 * i} for i, loss in enumerate(LOSSES, start=1)]


def test_the_same_config_with_its_numbers_written_out_is_an_ordinary_merge(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [{"w": torch.tensor([x])} for x in (1.0, 2.0, 4.0)], LOSSES)
    content: dict[str, Any] = {
        "merge_method": "metrics_weighted",
        "models": [str(tmp_path / "run")],
        "parameters": {"penalty": 2.0, "last": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    merge(tmp_path / "config.yaml", tmp_path / "found", progress=False)
    content["models"] = [
        {"model": str(folder), "parameters": {"loss": loss}}
        for folder, loss in zip(run[1:], LOSSES[1:], strict=True)
    ]
    content["parameters"] = {"penalty": 2.0}
    merge(content, tmp_path / "written", progress=False)
    assert equal(tensors_of(tmp_path / "found"), tensors_of(tmp_path / "written"))
    # And the linear merge with the weights themselves.
    weights = metrics_weights(LOSSES[1:], penalty=2.0)
    content["merge_method"], content["parameters"] = "linear", {}
    for model, weight in zip(content["models"], weights, strict=True):
        model["parameters"] = {"weight": weight}
    merge(content, tmp_path / "linear", progress=False)
    assert equal(tensors_of(tmp_path / "found"), tensors_of(tmp_path / "linear"))


def test_the_loss_of_a_checkpoint_is_the_mean_since_the_one_before(tmp_path: Path) -> None:
    run = scalar_run(tmp_path / "run", 0.0, 1.0)
    history = [{"loss": x, "step": s} for s, x in ((4, 9.0), (8, 3.0), (12, 2.0), (16, 1.0), (20, 0.6))]
    history.append({"eval_loss": 0.5, "step": 20})  # pyright: ignore[reportArgumentType]
    write_state(run[0], 10, history[:2])
    write_state(run[1], 20, history)
    for window, expected in (("mean", [6.0, 1.2]), ("last", [3.0, 0.6])):
        result = merge_run(tmp_path / "run", tmp_path / window, progress=False, window=window)
        found = [model["parameters"]["loss"] for model in result.manifest["models"]]
        assert found == pytest.approx(expected, rel=1e-12)
    with pytest.raises(
        ValueError, match=r"checkpoint-10.*no 'eval_loss' was logged after step 0 up to step 10"
    ):
        merge_run(tmp_path / "run", tmp_path / "out", metric="eval_loss")
    # A part of a run: the checkpoint before lies beside it.
    later = [run[1], save_model(tmp_path / "run" / "checkpoint-30", {"w": torch.tensor([2.0])})]
    write_state(later[1], 30, [*history, {"loss": 0.2, "step": 24}])
    result = merge_run(later, tmp_path / "later", progress=False)
    found = [model["parameters"]["loss"] for model in result.manifest["models"]]
    assert found == pytest.approx([1.2, 0.2], rel=1e-12)


def test_checkpoints_are_ordered_by_step_and_the_last_ones_chosen(tmp_path: Path) -> None:
    scalar_run(
        tmp_path / "run", *map(float, range(1, 13))
    )  # checkpoint-100 sorts before checkpoint-20 as text
    result = merge_run(tmp_path / "run", tmp_path / "out", progress=False, weighting="step", last=3)
    assert [model["name"] for model in result.manifest["models"]] == [
        f"checkpoint-{s}" for s in (100, 110, 120)
    ]
    expected = (10 * 100 + 11 * 110 + 12 * 120) / 330
    assert tensors_of(tmp_path / "out")["w"].item() == pytest.approx(expected, rel=1e-6)


def test_checkpoints_without_state_are_listed(tmp_path: Path) -> None:
    run = scalar_run(tmp_path / "run", 1.0, 2.0, 3.0)
    for folder in run[:2]:
        (folder / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no trainer_state\.json in .*checkpoint-10.*checkpoint-20;"):
        merge_run(tmp_path / "run", tmp_path / "out")
    merge_run(tmp_path / "run", tmp_path / "out", progress=False, weighting="uniform")
    assert tensors_of(tmp_path / "out")["w"].tolist() == [2.0]


def test_a_checkpoint_whose_loss_is_not_finite_is_left_out_with_a_warning(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [{"w": torch.tensor([x])} for x in (1.0, 2.0, 4.0)], [0.5, 0.5, 0.5])
    state = json.loads((run[2] / "trainer_state.json").read_text())
    state["log_history"][2]["loss"] = float("nan")
    (run[2] / "trainer_state.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match=r"checkpoint-30 is left out: its loss is nan"):
        merge_run(tmp_path / "run", tmp_path / "out", progress=False)
    assert tensors_of(tmp_path / "out")["w"].tolist() == [1.5]


def test_one_checkpoint_comes_out_unchanged_with_a_warning(tmp_path: Path) -> None:
    (model,) = random_models(tmp_path, 1)
    run = save_run(tmp_path / "run", [tensors_of(model)], [0.5])
    with pytest.warns(UserWarning, match="is the only checkpoint"):
        merge_run(tmp_path / "run", tmp_path / "out", progress=False)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(run[0]))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no run with folders checkpoint-<step>"):
        merge_run(tmp_path, tmp_path / "out")
    scalar_run(tmp_path / "run", 1.0, 2.0)
    with pytest.raises(ValueError, match="unknown parameter 'penaltie' of metrics_weighted; did you mean"):
        merge_run(tmp_path / "run", tmp_path / "out", penaltie=2.0)


# Adapters -----------------------------------------------------------------------------------------

MODULE = "base_model.model.model.layers.0.mlp.up_proj"


def save_adapter(folder: Path, b: Tensor, a: Tensor) -> Path:
    """Write a LoRA of scale 1 on one module."""
    folder.mkdir(parents=True)
    factors = {f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b}
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": a.shape[0], "lora_alpha": a.shape[0], "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def update_of(folder: Path) -> Tensor:
    tensors = tensors_of(folder)
    return tensors[f"{MODULE}.lora_B.weight"] @ tensors[f"{MODULE}.lora_A.weight"]


def adapter_run(tmp_path: Path, pairs: list[tuple[Any, Any]], one_run: bool = True) -> list[Path]:
    folders: list[Path] = []
    history: list[dict[str, float]] = []
    for number, (b, a) in enumerate(pairs, start=1):
        folder = save_adapter(tmp_path / "run" / f"checkpoint-{number}", torch.tensor(b), torch.tensor(a))
        entry = {"loss": 0.5, "step": float(number)}
        history = [*history, entry] if one_run else [{"loss": 0.5 + number, "step": 0.0}, entry]
        write_state(folder, number, history)
        folders.append(folder)
    return folders


ORTHOGONAL = [([[1.0], [0.0]], [[1.0, 0.0]]), ([[0.0], [1.0]], [[0.0, 1.0]])]


def test_averaged_factors_and_averaged_updates_by_hand(tmp_path: Path) -> None:
    folders = adapter_run(tmp_path, ORTHOGONAL)
    with pytest.warns(UserWarning, match=r"averaging the factors leaves out up to 0\.71 .*up_proj"):
        merge_run(tmp_path / "run", tmp_path / "factors", progress=False)
    merge_run(tmp_path / "run", tmp_path / "product", progress=False, space="product")
    factors, product = update_of(tmp_path / "factors"), update_of(tmp_path / "product")
    assert factors.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    torch.testing.assert_close(product, torch.diag(torch.tensor([0.5, 0.5])))
    torch.testing.assert_close(factors - product, -0.25 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    # ||difference|| = 1/2 and ||product|| = sqrt(1/2).
    (error,) = factor_error(folders, [0.5, 0.5]).values()
    assert error == pytest.approx(0.5 / math.sqrt(0.5), rel=1e-9)


def test_the_same_update_with_turned_signs_vanishes_in_factors_and_not_in_product(tmp_path: Path) -> None:
    b, a = [[1.0], [2.0]], [[3.0, -1.0]]
    turned = ([[-1.0], [-2.0]], [[-3.0, 1.0]])
    adapter_run(tmp_path, [(b, a), turned], one_run=False)
    # Not of one run by their logs, so updates are averaged.
    with pytest.warns(UserWarning, match="not of one run by their logs"):
        merge_run(tmp_path / "run", tmp_path / "product", progress=False)
    torch.testing.assert_close(update_of(tmp_path / "product"), torch.tensor(b) @ torch.tensor(a))
    with pytest.warns(UserWarning, match=r"leaves out up to 1\.00"):
        merge_run(tmp_path / "run", tmp_path / "factors", progress=False, space="factors")
    assert update_of(tmp_path / "factors").abs().max() == 0.0


def test_the_reported_error_is_that_of_the_updates_formed_outright(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(9, 3, generator=generator), torch.randn(3, 7, generator=generator))
    pairs = [tuple(x + 0.1 * n * torch.randn(x.shape, generator=generator) for x in start) for n in range(4)]
    folders = [save_adapter(tmp_path / f"a{n}", b, a) for n, (b, a) in enumerate(pairs)]
    weights = metrics_weights([0.9, 0.7, 0.6, 0.5], penalty=2.0)
    (found,) = factor_error(folders, weights).values()
    pairs64 = [(b.double(), a.double()) for b, a in pairs]
    mean_b = sum(w * b for w, (b, _) in zip(weights, pairs64, strict=True))
    mean_a = sum(w * a for w, (_, a) in zip(weights, pairs64, strict=True))
    whole = sum(w * b @ a for w, (b, a) in zip(weights, pairs64, strict=True))
    assert isinstance(whole, Tensor)
    assert found == pytest.approx(float((mean_b @ mean_a - whole).norm() / whole.norm()), rel=1e-9)  # type: ignore[operator]


def test_neighbors_of_one_run_are_averaged_as_factors_without_a_warning(tmp_path: Path) -> None:
    b, a = torch.randn(4, 2), torch.randn(2, 5)
    adapter_run(tmp_path, [((b + d).tolist(), (a + d).tolist()) for d in (0.0, 0.001, 0.002)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = merge_run(tmp_path / "run", tmp_path / "out", progress=False)
    assert result.manifest["space"] == "factors"
    mean = tensors_of(tmp_path / "out")[f"{MODULE}.lora_A.weight"]
    torch.testing.assert_close(mean, a + 0.001)
