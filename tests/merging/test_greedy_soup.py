"""Exact properties of the greedy soup."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_ext.merging import greedy_soup_weights, greedy_weights, merge
from tests.conftest import ModelFactory
from tests.merging.models import one_tensor, tensors_of
from tests.merging.runs import Scalar, distance


def table(scores: dict[tuple[int, ...], float]) -> Any:
    """Return a score by the members of the average, and the list of what it was asked."""

    def score(weights: Sequence[float]) -> float:
        members = tuple(number for number, weight in enumerate(weights) if weight)
        assert [weights[number] for number in members] == [1 / len(members)] * len(members)
        return scores[members]

    return score


def test_the_second_model_is_kept_and_the_third_dropped() -> None:
    scores = {(0,): 0.9, (1,): 0.8, (2,): 0.7, (0, 1): 0.92, (0, 1, 2): 0.91}
    assert greedy_weights(3, table(scores), greater_is_better=True) == [0.5, 0.5, 0.0]
    losses = {members: 1.0 - score for members, score in scores.items()}
    assert greedy_weights(3, table(losses)) == [0.5, 0.5, 0.0]


def test_an_average_that_is_as_good_is_kept() -> None:
    assert greedy_weights(2, table({(0,): 1.0, (1,): 2.0, (0, 1): 1.0})) == [0.5, 0.5]


def test_models_are_added_best_first_and_equal_ones_in_their_order() -> None:
    asked: list[tuple[int, ...]] = []
    singles: dict[tuple[int, ...], float] = {(0,): 3.0, (1,): 1.0, (2,): 3.0, (3,): 2.0}

    def score(weights: Sequence[float]) -> float:
        members = tuple(number for number, weight in enumerate(weights) if weight)
        asked.append(members)
        return singles.get(members, 9.0)

    assert greedy_weights(4, score) == [0.0, 1.0, 0.0, 0.0]
    assert asked[4:] == [(1, 3), (0, 1), (1, 2)]
    assert len(asked) == 2 * 4 - 1


def test_scores_that_are_none_lose_whichever_way_is_better() -> None:
    scores = {(0,): math.nan, (1,): 1.0, (2,): 2.0, (1, 2): math.nan}
    assert greedy_weights(3, table(scores)) == [0.0, 1.0, 0.0]
    assert greedy_weights(3, table({**scores, (2,): 0.5}), greater_is_better=True) == [0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="metric must be finite for one model at least"):
        greedy_weights(1, table({(0,): math.nan}))


def test_averages_are_made_in_the_model(tmp_path: Path) -> None:
    models = one_tensor(tmp_path, [0.0], [3.0], [8.0])
    before = sorted(tmp_path.rglob("*"))
    # 3 alone is nearest to 2; with 0 the mean 1.5 is nearer; with 8 it would be 11/3.
    found = greedy_soup_weights(models, distance(2.0), model=Scalar())
    assert found == [0.5, 0.5, 0.0]
    assert greedy_soup_weights(models, distance(2.0), model=Scalar(), in_memory=False) == found
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_by_name_and_its_manifest(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    folders = [tmp_path / f"m{number}" for number in range(3)]
    for seed, folder in enumerate(folders):
        tiny_llama(seed=seed).save_pretrained(folder)
    rows = [{"input_ids": [(7 * i + j * j) % 256 for j in range(32)]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "merge_method": "greedy_soup",
        "models": [str(folder) for folder in folders],
        "parameters": {"data": str(tmp_path / "rows.jsonl")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.warns(UserWarning, match="tokens are few"):
        result = merge(tmp_path / "config.yaml", tmp_path / "out", progress=False)
    weights = [model["parameters"]["weight"] for model in result.manifest["models"]]
    kept = [folder for folder, weight in zip(folders, weights, strict=True) if weight]
    assert kept
    assert set(weights) <= {0.0, 1 / len(kept)}
    merge({"merge_method": "linear", "models": list(map(str, kept))}, tmp_path / "linear", progress=False)
    linear = tensors_of(tmp_path / "linear")
    for name, value in tensors_of(tmp_path / "out").items():
        assert torch.equal(value, linear[name]), name


def test_the_merge_by_name_refuses_models_without_weights_or_metric(tmp_path: Path) -> None:
    models = one_tensor(tmp_path, [0.0], [3.0])
    content = {"merge_method": "greedy_soup", "models": list(map(str, models))}
    with pytest.raises(ValueError, match="metric must be given, or data instead"):
        merge(content, tmp_path / "out")


def test_a_metric_or_data_is_needed_and_not_both(tmp_path: Path) -> None:
    models = one_tensor(tmp_path, [0.0], [3.0])
    for given in ({}, {"evaluate": distance(0.0), "data": [{"input_ids": [1, 2]}]}):
        with pytest.raises(ValueError, match="metric must be given, or data instead"):
            greedy_soup_weights(models, **given, model=Scalar())
