"""Exact properties of SLERP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.merging.models import equal, merged, one_tensor, random_models, save_model, tensors_of


def slerp(tmp_path: Path, a: list[float], b: list[float], t: float, **settings: Any) -> torch.Tensor:
    return merged(tmp_path, "slerp", one_tensor(tmp_path, a, b), t=t, **settings)["w"]


def test_hand_computed_points(tmp_path: Path) -> None:
    half = slerp(tmp_path, [1.0, 0.0], [0.0, 2.0], 0.5)
    torch.testing.assert_close(half, torch.tensor([0.707107, 1.414214]), rtol=0.0, atol=1e-6)
    quarter = slerp(tmp_path, [1.0, 0.0], [0.0, 2.0], 0.25)
    torch.testing.assert_close(quarter, torch.tensor([0.923880, 0.765367]), rtol=0.0, atol=1e-6)


def test_the_ends_are_the_models_bit_for_bit(tmp_path: Path) -> None:
    models = random_models(tmp_path, 2)
    for t, model in zip((0.0, 1.0), models, strict=True):
        assert equal(merged(tmp_path, "slerp", models, t=t), tensors_of(model))


@pytest.mark.parametrize("t", [0.1, 0.37, 0.5, 0.92])
def test_the_norm_of_models_of_equal_norm_stays(t: float, tmp_path: Path) -> None:
    assert abs(float(slerp(tmp_path, [1.0, 0.0], [0.0, 1.0], t).norm()) - 1.0) < 1e-6


def test_parallel_opposite_and_zero_tensors_are_interpolated_linearly(tmp_path: Path) -> None:
    assert slerp(tmp_path, [1.0, 1.0], [3.0, 3.0], 0.5).tolist() == [2.0, 2.0]
    assert slerp(tmp_path, [0.0, 0.0], [3.0, 1.0], 0.5).tolist() == [1.5, 0.5]
    with pytest.warns(UserWarning, match="w: the models are opposite"):
        assert slerp(tmp_path, [1.0, 2.0], [-1.0, -2.0], 0.5).tolist() == [0.0, 0.0]


def test_large_tensors_equal_the_formula_in_double_precision(tmp_path: Path) -> None:
    models = random_models(tmp_path, 1, dtype=torch.float32) + random_models(
        tmp_path / "other", 1, dtype=torch.float32, seed=1
    )
    found = merged(tmp_path, "slerp", models, t=0.3, options={"block_bytes": 65536})
    first, second = (tensors_of(model) for model in models)
    for name, value in found.items():
        a, b = first[name].double(), second[name].double()
        if not a.numel():
            continue
        angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
        if abs(math.cos(angle)) > 0.9995:
            wanted = 0.7 * a + 0.3 * b
        else:
            wanted = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_base_is_the_start_wherever_it_stands(tmp_path: Path) -> None:
    a, b = random_models(tmp_path, 2)
    wanted = merged(tmp_path, "slerp", [a, b], t=0.25)
    assert equal(merged(tmp_path, "slerp", [b, a], a, t=0.25), wanted)
    assert equal(merged(tmp_path, "slerp", [b], a, t=0.25), wanted)


def test_around_a_base_the_changes_are_interpolated(tmp_path: Path) -> None:
    base, a, b = one_tensor(tmp_path, [1.0, 1.0], [2.0, 1.0], [1.0, 3.0])
    found = merged(tmp_path, "slerp", [a, b], base, t=0.5, around_base=True)["w"]
    torch.testing.assert_close(found, torch.tensor([1.707107, 2.414214]), rtol=0.0, atol=1e-6)


def test_other_numbers_of_models_and_positions_are_refused(tmp_path: Path) -> None:
    models = random_models(tmp_path, 3)
    with pytest.raises(ValueError, match="models must be exactly two"):
        merged(tmp_path, "slerp", models, t=0.5)
    with pytest.raises(ValueError, match="t must be given"):
        merged(tmp_path, "slerp", models[:2])
    with pytest.raises(ValueError, match=r"t must be between 0 and 1, or extrapolate: true, got 1\.25"):
        merged(tmp_path, "slerp", models[:2], t=[0.5, 1.25])
    merged(tmp_path, "slerp", models[:2], t=1.25, extrapolate=True)
    with pytest.raises(ValueError, match=r"t has no value for lm_head\.weight: none of its filters fits"):
        merged(tmp_path, "slerp", models[:2], t=[{"filter": "mlp", "value": 0.5}], out="other")


def test_the_layers_follow_the_anchors(tmp_path: Path) -> None:
    def model(name: str, value: float) -> Path:
        tensors = {f"model.layers.{i}.w": torch.full((1,), value) for i in range(5)}
        return save_model(tmp_path / name, tensors)

    found = merged(tmp_path, "slerp", [model("a", 0.0), model("b", 4.0)], t=[0.0, 1.0])
    assert [float(found[f"model.layers.{i}.w"]) for i in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
