"""Exact properties of task arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.merging.models import equal, merged, one_tensor, random_models, tensors_of


def test_one_model_with_weight_one_comes_back_and_minus_one_negates(tmp_path: Path) -> None:
    base, model = one_tensor(tmp_path, [1.0, 2.0, -4.0], [1.5, 1.0, -4.0])
    assert merged(tmp_path, "task_arithmetic", [model], base)["w"].tolist() == [1.5, 1.0, -4.0]
    assert merged(tmp_path, "task_arithmetic", [model], base, lambda_=-1.0)["w"].tolist() == [0.5, 3.0, -4.0]


def test_weights_and_lambda_multiply(tmp_path: Path) -> None:
    base, a, b = one_tensor(tmp_path, [1.0], [2.0], [5.0])
    parents = [{"weight": 0.5}, {"weight": 0.25}]
    found = merged(tmp_path, "task_arithmetic", [a, b], base, parents=parents, lambda_=2.0)
    assert found["w"].tolist() == [1.0 + 2.0 * (0.5 * 1.0 + 0.25 * 4.0)]
    found = merged(tmp_path, "task_arithmetic", [a, b], base, parents=parents, normalize=True)
    torch.testing.assert_close(found["w"], torch.tensor([1.0 + 1.5 / 0.75]))


def test_many_small_changes_add_up_in_bf16(tmp_path: Path) -> None:
    base, *models = one_tensor(tmp_path, [1.0], *[[1.0078125]] * 3, dtype=torch.bfloat16)
    found = merged(tmp_path, "task_arithmetic", models, base, weight=0.25, options={"dtype": "float32"})
    assert found["w"].tolist() == [1.0 + 0.75 * 0.0078125]


def test_the_base_among_the_models_is_dropped_as_in_mergekits_files(tmp_path: Path) -> None:
    base, a, b = random_models(tmp_path, 3)
    with_it = merged(tmp_path, "task_arithmetic", [base, a, b], base, weight=0.5)
    assert equal(with_it, merged(tmp_path, "task_arithmetic", [a, b], base, weight=0.5))


def test_without_a_base_or_with_the_base_alone_it_is_refused(tmp_path: Path) -> None:
    base, a = random_models(tmp_path, 2)
    with pytest.raises(ValueError, match="base_model must be given"):
        merged(tmp_path, "task_arithmetic", [a])
    with pytest.raises(ValueError, match="models must be others than the base"):
        merged(tmp_path, "task_arithmetic", [base], base)


def test_weights_equal_those_of_the_sum_in_double_precision(tmp_path: Path) -> None:
    base, *models = random_models(tmp_path, 4, dtype=torch.float32)
    found = merged(tmp_path, "task_arithmetic", models, base, weight=0.3, lambda_=1.7)
    start = tensors_of(base)
    for name, value in found.items():
        change = sum(tensors_of(model)[name].double() - start[name].double() for model in models)
        torch.testing.assert_close(
            value.double(), start[name].double() + 1.7 * 0.3 * change, rtol=1e-6, atol=1e-6
        )
