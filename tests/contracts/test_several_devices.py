"""Models spread over several devices: torch's fake tensors refuse what mixes devices, without having any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_ext.callbacks import ContinualEMACallback
from hf_ext.callbacks._base import whole
from hf_ext.callbacks._gradient_noise import NoiseMeter
from hf_ext.callbacks._gradients import gradient_norm
from hf_ext.callbacks.hypergradient import _dot


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def spread() -> list[Tensor]:
    return [torch.ones(3, 2, device="cuda:0"), torch.ones(5, device="cuda:1")]


def test_fake_tensors_refuse_a_mix_of_devices() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([tensor.sum() for tensor in spread()])


@pytest.mark.parametrize("order", [1, 2])
def test_norms(order: int) -> None:
    assert gradient_norm(spread(), order).shape == ()


def test_recorded_scalars() -> None:
    assert whole([tensor.sum() for tensor in spread()]).device.type == "cpu"


def test_a_product_of_displacements() -> None:
    x, y = (dict(zip("ab", spread(), strict=True)) for _ in range(2))
    assert _dot(x, y).shape == ()


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("products", [False, True])
def test_the_noise_of_a_gradient(divided: bool, products: bool) -> None:
    parameters = [nn.Parameter(tensor) for tensor in spread()]
    divisor = torch.ones_like if divided else None
    meter = NoiseMeter(parameters, sharded=False, micro_batches=2, products=products, divisor=divisor)
    for _ in range(2):
        meter.set_aside()
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        meter.take(0.5)
    mean = meter._squares_of([parameter.grad for parameter in parameters])
    assert mean.spread(2).device.type == "cpu"
    if products:
        assert meter._local_product(meter._kept[0], meter._kept[1]).shape == (1,)


def test_the_sums_of_an_average() -> None:
    callback = ContinualEMACallback()
    callback.reset()
    names = ["a", "b"]
    callback._average = dict(zip(names, spread(), strict=True))
    callback._gradient = {"b": spread()[1]}  # "a" has no former one
    assert callback._table(spread(), spread(), names).shape == (2, 3)
