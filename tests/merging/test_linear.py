"""Exact properties of linear merging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.merging.models import equal, merged, one_tensor, random_models, tensors_of


def test_weights_one_and_three_on_zero_and_four(tmp_path: Path) -> None:
    models = one_tensor(tmp_path, [0.0], [4.0])
    parents = [{"weight": 1.0}, {"weight": 3.0}]
    assert merged(tmp_path, "linear", models, parents=parents)["w"].tolist() == [3.0]
    assert merged(tmp_path, "linear", models, parents=parents, normalize=False)["w"].tolist() == [12.0]


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    # The next bf16 number after 1: the mean lies half way, and goes to the even one.
    models = one_tensor(tmp_path, [1.0], [1.0078125], dtype=torch.bfloat16)
    assert merged(tmp_path, "linear", models)["w"].tolist() == [1.0]
    wide = merged(tmp_path, "linear", models, options={"dtype": "float32"})
    assert wide["w"].tolist() == [1.00390625]


def test_small_changes_are_not_lost_in_bf16(tmp_path: Path) -> None:
    # Eight changes of 2^-9 on 1: added one at a time in bf16 they would all be rounded away.
    models = one_tensor(tmp_path, [1.0], *[[2.0**-9]] * 8, dtype=torch.bfloat16)
    found = merged(tmp_path, "linear", models, normalize=False)
    assert found["w"].tolist() == [1.015625]


def test_weights_whose_sum_is_zero_are_refused(tmp_path: Path) -> None:
    models = one_tensor(tmp_path, [1.0], [2.0])
    parents = [{"weight": 1.0}, {"weight": -1.0}]
    with pytest.raises(ValueError, match=r"weight must be of a sum other than zero.*\[1\.0, -1\.0\] \(w\)"):
        merged(tmp_path, "linear", models, parents=parents)
    assert merged(tmp_path, "linear", models, parents=parents, normalize=False)["w"].tolist() == [-1.0]


def test_weights_differ_by_tensor_and_layer(tmp_path: Path) -> None:
    a, b = random_models(tmp_path, 2, dtype=torch.float32)
    parents = [
        {
            "weight": [
                {"filter": "norm", "value": 0.0},
                {"filter": "*.mlp.*", "value": [1.0, 0.0]},
                {"value": 1.0},
            ]
        },
        {"weight": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 1.0}]},
    ]
    found = merged(tmp_path, "linear", [a, b], parents=parents)
    first, second = tensors_of(a), tensors_of(b)
    assert torch.equal(found["model.layers.0.norm.weight"], second["model.layers.0.norm.weight"])
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], first["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(
        found["model.layers.1.mlp.up_proj.weight"], second["model.layers.1.mlp.up_proj.weight"]
    )
    mean = (first["lm_head.weight"] + second["lm_head.weight"]) / 2
    torch.testing.assert_close(found["lm_head.weight"], mean)


def test_overflow_of_the_stored_type_is_refused_by_name(tmp_path: Path) -> None:
    models = one_tensor(tmp_path, [60000.0], [60000.0], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"w, elements 0 to 0: the result is not finite in float16"):
        merged(tmp_path, "linear", models, normalize=False)
    assert not list(tmp_path.glob("*out*"))


def test_the_same_model_twice_is_allowed_with_a_warning(tmp_path: Path) -> None:
    (model,) = random_models(tmp_path, 1)
    with pytest.warns(UserWarning, match="m0 is given twice"):
        assert equal(merged(tmp_path, "linear", [model, model]), tensors_of(model))
