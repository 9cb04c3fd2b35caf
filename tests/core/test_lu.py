"""Truncated LU against torch's full one, against plain elimination, and where pivots vanish."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_ext.core.lu import LUFactors, truncated_lu
from tests.reference.loldu import eliminate

HAND = torch.tensor([[2.0, 1.0, 1.0], [4.0, 3.0, 3.0], [8.0, 7.0, 9.0]])


def random(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def product(lu: LUFactors) -> Tensor:
    return lu.l @ torch.diag(lu.d) @ lu.u


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_hand_computed_case() -> None:
    lu = truncated_lu(HAND, 3)
    lower = torch.tensor([[0.25, 1, 0], [0.5, 2 / 3, 1], [1, 0, 0]], dtype=torch.float64)
    upper = torch.tensor([[1, 7 / 8, 9 / 8], [0, 1, 5 / 3], [0, 0, 1]], dtype=torch.float64)
    assert_near(lu.l, lower, 1e-14)
    assert_near(lu.d, torch.tensor([8, -3 / 4, -2 / 3], dtype=torch.float64), 1e-14)
    assert_near(lu.u, upper, 1e-14)
    assert lu.pivots.tolist() == [2, 0, 1]
    assert_near(product(lu), HAND.double(), 1e-14)


@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30), (25, 25)])
@pytest.mark.parametrize("r", [1, 2, 7, 20])
def test_equals_the_first_terms_of_torchs_factorization(m: int, n: int, r: int) -> None:
    weight = random(m, n)
    permutation, lower, upper = torch.linalg.lu(weight)
    lu = truncated_lu(weight, r)
    assert torch.equal(lu.pivots, permutation.argmax(0)[:r])
    assert_near(lu.l, (permutation @ lower)[:, :r])
    assert_near(lu.d, upper.diagonal()[:r])
    assert_near(lu.u, upper[:r] / upper.diagonal()[:r, None])


@pytest.mark.parametrize(("m", "n"), [(12, 9), (9, 12)])
def test_equals_plain_elimination_with_ties(m: int, n: int) -> None:
    # Small integers: many candidates tie, and the first in LAPACK's swapped order must win.
    weight = torch.randint(-2, 3, (m, n), generator=torch.Generator().manual_seed(4)).double()
    lower, d, upper, rows = eliminate(weight)
    lu = truncated_lu(weight, 7)
    assert lu.pivots.tolist() == rows[:7]
    assert_near(lu.l, lower[:, :7])
    assert_near(lu.d, d[:7])
    assert_near(lu.u, upper[:7])


@pytest.mark.parametrize("selection", ["leading", "largest"])
@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30)])
def test_all_terms_make_the_matrix(selection: str, m: int, n: int) -> None:
    weight = random(m, n)
    lu = truncated_lu(weight, 20, selection=selection)
    assert_near(product(lu), weight)
    assert float(lu.l.abs().max()) == 1.0
    rows, terms = torch.arange(20), lu.u.gather(1, torch.arange(20)[:, None])[:, 0]
    assert torch.equal(lu.l[lu.pivots, rows], torch.ones(20).double())
    assert torch.equal(terms, torch.ones(20).double())


@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30)])
def test_largest_are_the_terms_of_largest_norm(m: int, n: int) -> None:
    weight = random(m, n)
    every = truncated_lu(weight, 20)
    size = every.l.norm(dim=0) * every.d.abs() * every.u.norm(dim=1)
    chosen = size.argsort(descending=True)[:6].sort().values
    assert chosen.tolist() != list(range(6))
    lu = truncated_lu(weight, 6, selection="largest")
    assert torch.equal(lu.pivots, every.pivots[chosen])
    for found, expected in ((lu.l, every.l[:, chosen]), (lu.d, every.d[chosen]), (lu.u, every.u[chosen])):
        assert_near(found, expected)


@pytest.mark.parametrize("selection", ["leading", "largest"])
def test_zero_pivot_keeps_its_row(selection: str) -> None:
    weight = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    lu = truncated_lu(weight, 2, selection=selection)
    assert lu.d.tolist() == [1.0, 2.0]
    assert lu.u.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert torch.equal(product(lu), weight.double())


@pytest.mark.parametrize("selection", ["leading", "largest"])
def test_rank_deficient_matrices_give_no_noise(selection: str) -> None:
    weight = random(12, 3) @ random(3, 10, seed=1)
    weight[:, 5] = 2.0 * weight[:, 0]
    lu = truncated_lu(weight, 10, selection=selection)
    assert all(bool(t.isfinite().all()) for t in (lu.l, lu.d, lu.u))
    assert float(lu.l.abs().max()) == 1.0
    assert_near(product(lu), weight)
    if selection == "leading":  # what elimination leaves of rank 3 is rounding, and counts as nothing
        assert torch.equal(lu.u[3:], torch.zeros(7, 10).double())
        assert torch.equal(lu.d[3:], torch.ones(7).double())


def test_dependent_column_before_the_rank_is_reached() -> None:
    weight = random(8, 8)
    weight[:, 1] = 3.0 * weight[:, 0]  # the second pivot is rounding noise or nothing
    lu = truncated_lu(weight, 8)
    assert float(lu.d[1]) == 1.0
    assert float(lu.u[1, 1]) == 0.0
    assert float(lu.u[1].norm()) > 0.1  # the row is there, undivided
    assert int((lu.l[:, 1] != 0.0).sum()) == 1
    assert_near(product(lu), weight)


def test_zero_matrix() -> None:
    lu = truncated_lu(torch.zeros(4, 6), 3)
    assert torch.equal(product(lu), torch.zeros(4, 6).double())
    assert lu.pivots.tolist() == [0, 1, 2]


def test_given_pivots_are_used() -> None:
    weight = random(9, 7)
    free = truncated_lu(weight, 5)
    again = truncated_lu(weight, 5, pivots=free.pivots.to(torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(vars(free).values(), vars(again).values(), strict=True))
    swapped = free.pivots[[1, 0, 2, 3, 4]]
    other = truncated_lu(weight, 5, pivots=swapped)
    assert torch.equal(other.pivots, swapped)
    torch.testing.assert_close(product(other), product(free), atol=1e-10, rtol=0)  # the same rows are taken
    assert not torch.allclose(other.u, free.u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_dtype_is_factorized_in_fp64(dtype: torch.dtype) -> None:
    weight = random(16, 12, dtype=dtype)
    lu, exact = truncated_lu(weight, 4), truncated_lu(weight.double(), 4)
    assert all(torch.equal(a, b) for a, b in zip(vars(lu).values(), vars(exact).values(), strict=True))


def test_bad_input_is_named() -> None:
    weight = random(4, 3)
    with pytest.raises(ValueError, match=r"r must be between 1 and 3.*got 4 \(some\.layer\)"):
        truncated_lu(weight, 4, name="some.layer")
    with pytest.raises(ValueError, match="selection must be one of"):
        truncated_lu(weight, 2, selection="first")
    for bad in ([0, 0], [0, 4], [-1, 0], [0]):
        with pytest.raises(ValueError, match="pivots must be 2 different rows below 4"):
            truncated_lu(weight, 2, pivots=torch.tensor(bad))
    with pytest.raises(ValueError, match="pivots must be None"):
        truncated_lu(weight, 2, selection="largest", pivots=torch.tensor([0, 1]))
    for value in (float("nan"), float("inf"), -float("inf")):
        weight[2, 1] = value
        with pytest.raises(ValueError, match=r"weight must be finite.*some\.layer"):
            truncated_lu(weight, 2, name="some.layer")


def test_far_faster_than_the_full_factorization() -> None:
    # At 4096 x 4096 and r = 64 the ratio is 30 to 200; here it is asserted with room for a busy machine.
    weight = random(1024, 1024, dtype=torch.float32)
    truncated_lu(weight, 16)

    def seconds(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    ours = min(seconds(lambda: truncated_lu(weight, 16)) for _ in range(3))
    full = min(seconds(lambda: torch.linalg.lu(weight.double())) for _ in range(2))
    assert ours < full
