"""The k-th magnitude from histograms equals a sort."""

from __future__ import annotations

import pytest
import torch

from hf_ext.merging import _threshold as t


def find(values: torch.Tensor, k: int) -> t.Threshold:
    bits = t.magnitude_bits(values)
    high, rank = t.locate(t.high_histogram(bits.clone()), k)
    return t.threshold(high, rank, t.low_histogram(t.low_bits(bits, high)))


@pytest.mark.parametrize("seed", range(100))
def test_equals_kthvalue_with_duplicates(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 400, (1,), generator=generator))
    values = torch.randn(count, generator=generator)
    if seed % 2:
        values = (values * 4).round() / 4  # few magnitudes, zeros among them
    k = int(torch.randint(1, count + 1, (1,), generator=generator))
    found = find(values, k)
    size = values.abs()
    limit = torch.kthvalue(size, count - k + 1).values
    assert t.as_float(found.bits) == float(limit)
    assert found.equal == int((size == limit).sum())
    assert found.keep_equal == k - int((size > limit).sum())


def test_trim_keeps_the_first_of_the_equal_ones() -> None:
    values = torch.tensor([1.0, -2.0, 2.0, -1.0, 3.0, 1.0])
    one = t.magnitude_bits(torch.tensor([1.0])).item()
    assert t.trim_(values.clone(), int(one), None).tolist() == values.tolist()
    assert t.trim_(values.clone(), int(one), 2).tolist() == [1.0, -2.0, 2.0, -1.0, 3.0, 0.0]
    assert t.trim_(values.clone(), int(one), 0).tolist() == [0.0, -2.0, 2.0, 0.0, 3.0, 0.0]


def test_histograms_of_parts_add_up() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = t.high_histogram(t.magnitude_bits(values))
    parts = sum(t.high_histogram(t.magnitude_bits(part.clone())) for part in values.split(137))
    assert torch.equal(whole, parts)  # pyright: ignore[reportArgumentType]


def test_subnormal_and_extreme_numbers_keep_their_order() -> None:
    values = torch.tensor([1e-45, 1e-40, 1e-38, 3e38, 0.0, -2e-40])
    assert t.as_float(find(values, 1).bits) == float(torch.tensor(3e38))
    assert t.as_float(find(values, 3).bits) == float(torch.tensor(2e-40))
    assert t.as_float(find(values, 6).bits) == 0.0


def test_non_finite_values_are_counted() -> None:
    values = torch.tensor([1.0, float("inf"), float("nan"), -float("inf"), 3.4e38])
    assert t.non_finite(t.high_histogram(t.magnitude_bits(values))) == 3
