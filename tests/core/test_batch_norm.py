"""Statistics of batch norms taken anew from batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_ext.core.batch_norm import batch_norms, recalibrate_batch_norm


def batches(*sizes: int, channels: int = 3, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, channels, generator=draw) * 3 + index for index, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [(50,), (10, 40), (7, 2, 31, 10)])
def test_statistics_are_those_of_all_rows_however_they_are_cut(sizes: tuple[int, ...]) -> None:
    rows = torch.cat(batches(50))
    norm = nn.BatchNorm1d(3)
    assert recalibrate_batch_norm(norm, rows.split(list(sizes))) == 1
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, rows.mean(0))
    torch.testing.assert_close(norm.running_var, rows.var(0))
    assert int(norm.num_batches_tracked or 0) == len(sizes)


def test_batches_that_lie_apart_have_a_larger_variance_than_the_mean_of_theirs() -> None:
    norm, apart = nn.BatchNorm1d(1), [torch.tensor([[-1.0], [1.0]]), torch.tensor([[9.0], [11.0]])]
    recalibrate_batch_norm(norm, apart)
    assert norm.running_var is not None
    assert norm.running_var.item() == pytest.approx(torch.cat(apart).var().item())
    assert norm.running_var.item() > 30.0  # the batches' own are 2


def test_images_and_deeper_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.BatchNorm2d(4))
    images = torch.randn(6, 2, 8, 8)
    recalibrate_batch_norm(model, [images])
    convolved = model[0](images).detach()
    torch.testing.assert_close(model[1].running_mean, convolved.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, convolved.transpose(0, 1).flatten(1).var(1))
    # The first normalizes by the batch, and dropout is off.
    torch.testing.assert_close(model[3].running_mean, torch.zeros(4), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(model[3].running_var, torch.ones(4), atol=1e-2, rtol=0.0)


def test_modes_come_back_and_the_weights_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    recalibrate_batch_norm(model, batches(4, 4))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_failure_leaves_the_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    recalibrate_batch_norm(norm, batches(5, 5))
    before = {name: value.clone() for name, value in norm.named_buffers()}

    def failing(batch: Any) -> None:
        norm(batch)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        recalibrate_batch_norm(norm, batches(5, 5, seed=1), failing)
    with pytest.raises(ValueError, match="batches must be of two values"):
        recalibrate_batch_norm(norm, [])
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())
    assert norm.training


def test_without_batch_norms_no_batch_is_taken() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert batch_norms(model) == {}
    assert recalibrate_batch_norm(model, iter(())) == 0


def test_batches_by_keyword() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    model = Model()
    (rows,) = batches(9)
    recalibrate_batch_norm(model, [{"x": rows}])
    assert model.norm.running_mean is not None
    torch.testing.assert_close(model.norm.running_mean, rows.mean(0))
