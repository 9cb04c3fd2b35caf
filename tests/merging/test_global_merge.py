"""The global merge: means of replicas, and the statistics of batch norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_ext.merging import recalibrate_batch_norm
from tests.merging.models import equal, merged, random_models, save_model, tensors_of
from tests.reference import global_merge as reference


def replica(folder: Path, mean: list[float], variance: list[float], weight: float = 1.0) -> Path:
    tensors = {
        "norm.weight": torch.full((len(mean),), weight),
        "norm.running_mean": torch.tensor(mean),
        "norm.running_var": torch.tensor(variance),
        "norm.num_batches_tracked": torch.tensor(7),
    }
    return save_model(folder, tensors)


def test_means_zero_and_two_have_a_pooled_variance_of_two(tmp_path: Path) -> None:
    models = [replica(tmp_path / "a", [0.0], [1.0], 1.0), replica(tmp_path / "b", [2.0], [1.0], 4.0)]
    pooled = merged(tmp_path, "global_merge", models)
    assert pooled["norm.running_mean"].tolist() == [1.0]
    assert pooled["norm.running_var"].tolist() == [2.0]
    assert pooled["norm.weight"].tolist() == [2.5]
    assert pooled["norm.num_batches_tracked"].item() == 7
    average = merged(tmp_path, "global_merge", models, bn="average", out="average")
    assert average["norm.running_var"].tolist() == [1.0]
    assert torch.equal(average["norm.running_mean"], pooled["norm.running_mean"])


def test_pooled_statistics_equal_the_reference(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    means = (torch.randn(5, 6, generator=draw) * 3 + 10).tolist()
    variances = torch.rand(5, 6, generator=draw).tolist()
    models = [replica(tmp_path / f"m{i}", means[i], variances[i]) for i in range(5)]
    found = merged(tmp_path, "global_merge", models)
    for channel in range(6):
        mean, variance = reference.pooled(
            [row[channel] for row in means], [row[channel] for row in variances]
        )
        assert found["norm.running_mean"][channel].item() == pytest.approx(mean, rel=1e-6)
        assert found["norm.running_var"][channel].item() == pytest.approx(variance, rel=1e-5)


def test_equal_replicas_come_back_bit_for_bit(tmp_path: Path) -> None:
    models = [replica(tmp_path / name, [0.3, -7.1], [0.7, 1e-8], 0.1) for name in "abc"]
    assert equal(merged(tmp_path, "global_merge", models), tensors_of(models[0]))
    assert equal(merged(tmp_path, "global_merge", models[:1], out="one"), tensors_of(models[0]))


def test_without_batch_norms_it_is_the_uniform_linear_merge(tmp_path: Path) -> None:
    models = random_models(tmp_path, 4)
    assert equal(merged(tmp_path, "global_merge", models), merged(tmp_path, "linear", models, out="linear"))


def test_two_parabolas_meet_in_the_optimum_of_their_sum(tmp_path: Path) -> None:
    ends = []
    for name, target in (("a", 1.0), ("b", -1.0)):
        x = 0.0
        for _ in range(50):
            x -= 0.1 * (x - target)
        ends.append(save_model(tmp_path / name, {"x": torch.tensor([x])}))
    assert tensors_of(ends[0])["x"].item() == pytest.approx(0.994846, abs=1e-6)
    assert merged(tmp_path, "global_merge", ends)["x"].tolist() == [0.0]


def test_statistics_from_data_need_the_python_call(tmp_path: Path) -> None:
    models = [replica(tmp_path / name, [0.0], [1.0]) for name in "ab"]
    with pytest.raises(ValueError, match=r"bn must be .*call recalibrate_batch_norm\("):
        merged(tmp_path, "global_merge", models, bn="recalibrate")


def test_recalibrated_statistics_are_the_merged_models_own(tmp_path: Path) -> None:
    def net(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    rows = torch.randn(90, 3, generator=torch.Generator().manual_seed(4))
    folders: list[Path] = []
    for seed in (1, 2):
        model = net(seed)
        recalibrate_batch_norm(model, [rows])
        folders.append(save_model(tmp_path / str(seed), model.state_dict()))
    model = net(0)
    model.load_state_dict(merged(tmp_path, "global_merge", folders))
    norm: Any = model[1]
    pooled: Tensor = norm.running_var.clone()
    recalibrate_batch_norm(model, rows.split(30))
    torch.testing.assert_close(norm.running_var, model[0](rows).detach().var(0))
    assert bool((pooled > norm.running_var).all())  # a mean of weights spreads less than the mixture
