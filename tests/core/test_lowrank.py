from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_ext.core.lowrank import TruncatedSVD, recompress, seeded, truncated_svd

SHAPES = [(96, 96), (64, 160), (160, 64), (7, 300), (300, 7)]


def matrix(m: int, n: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    """Return a matrix with the given singular values and random singular vectors, fp32."""
    generator = torch.Generator().manual_seed(seed)
    k = len(spectrum)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return ((u * spectrum.double()) @ v.T).float()


def decaying(m: int, n: int, seed: int = 0) -> Tensor:
    return matrix(m, n, torch.arange(1, min(m, n) + 1).double() ** -1.0, seed)


def product(svd: TruncatedSVD) -> Tensor:
    return (svd.u * svd.s) @ svd.vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("driver", ["exact", "krylov", "auto"])
def test_triplets_have_their_shapes_and_the_largest_values_first(shape: tuple[int, int], driver: str) -> None:
    svd = truncated_svd(decaying(*shape), 5, driver=driver)
    assert (svd.u.shape, svd.s.shape, svd.vh.shape) == ((shape[0], 5), (5,), (5, shape[1]))
    assert {svd.u.dtype, svd.s.dtype, svd.vh.dtype} == {torch.float32}
    # 1 / i is the spectrum that was put in; fp32 leaves 1e-6 of the largest.
    torch.testing.assert_close(svd.s, 1.0 / torch.arange(1, 6), rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("driver", ["exact", "krylov"])
@pytest.mark.parametrize("n_iter", [0, 1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_identities_hold_whatever_the_quality(shape: tuple[int, int], n_iter: int, driver: str) -> None:
    # A flat spectrum is the worst case: the subspace is not found, yet the start of an adapter must cancel.
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    svd = truncated_svd(weight, 4, n_iter=n_iter, oversample=0, driver=driver)
    # Over many seeds the worst entry is 4e-6, with either library's products.
    torch.testing.assert_close(svd.u.T @ svd.u, torch.eye(4), rtol=0.0, atol=8e-6)
    torch.testing.assert_close(svd.vh @ svd.vh.T, torch.eye(4), rtol=0.0, atol=8e-6)
    # Products of fp32 with entries around the largest singular value, some 20: 1e-6 of it.
    torch.testing.assert_close(svd.u.T @ weight, svd.s[:, None] * svd.vh, rtol=0.0, atol=5e-5)


def test_krylov_finds_the_subspace_of_a_decaying_spectrum() -> None:
    weight = decaying(256, 200)
    exact = truncated_svd(weight, 8, driver="exact")
    found = truncated_svd(weight, 8, driver="krylov")
    torch.testing.assert_close(found.s, exact.s, rtol=1e-5, atol=0.0)
    cosines = torch.linalg.svdvals(exact.u.double().T @ found.u.double())
    assert math.sqrt(max(0.0, 1.0 - float(cosines.min()) ** 2)) < 1e-2
    error, least = (torch.linalg.norm(weight - product(svd)) for svd in (found, exact))
    assert float(error) < 1.0001 * float(least)


@pytest.mark.parametrize("decay", ["power", "exponential"])
def test_a_spectrum_over_many_orders_of_magnitude(decay: str) -> None:
    # The squares of what is sought reach down to 1e-6 (and 4e-6) of the largest, near the rounding of fp32.
    i = torch.arange(1, 401).double()
    spectrum = i**-2.0 if decay == "power" else torch.exp(-i / 5.0)
    weight = matrix(500, 400, spectrum)
    found = truncated_svd(weight, 32, oversample=0, driver="krylov")
    torch.testing.assert_close(found.s.double(), spectrum[:32], rtol=1e-5, atol=0.0)
    error = torch.linalg.norm(weight.double() - product(found).double())
    assert float(error) < 1.0001 * float(torch.linalg.norm(spectrum[32:]))


def test_a_sketch_gives_the_best_of_all_that_it_holds() -> None:
    spectrum = torch.exp(-torch.arange(1, 401).double() / 5.0)
    weight = matrix(500, 400, spectrum)
    found = truncated_svd(weight, 16, n_iter=0, driver="krylov")  # 32 columns
    error = torch.linalg.norm(weight.double() - product(found).double())
    assert float(error) < 1.02 * float(torch.linalg.norm(spectrum[16:]))  # 1.5 for the best 16 of its rows


@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e25, 1e37])
def test_squares_of_small_and_large_matrices_stay_within_fp32(size: float) -> None:
    weight = decaying(256, 200)
    found = truncated_svd(size * weight, 8, driver="krylov")
    exact = truncated_svd(weight, 8, driver="exact")
    torch.testing.assert_close(found.s.double() / size, exact.s.double(), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("driver", ["exact", "krylov"])
def test_torch_s_defaults_and_autocast_change_nothing(driver: str) -> None:
    weight = decaying(120, 100)
    wanted = truncated_svd(weight, 5, driver=driver)
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            found = truncated_svd(weight, 5, driver=driver)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(getattr(found, part), getattr(wanted, part)) for part in ("u", "s", "vh"))
    with torch.autocast("cpu", torch.bfloat16):
        found = truncated_svd(weight, 5, driver=driver)
    assert all(torch.equal(getattr(found, part), getattr(wanted, part)) for part in ("u", "s", "vh"))


def test_more_steps_come_closer() -> None:
    weight = matrix(256, 256, torch.arange(1, 257).double() ** -0.5)
    least = torch.linalg.norm(weight - product(truncated_svd(weight, 8, driver="exact"))).item()
    excess = [
        torch.linalg.norm(weight - product(truncated_svd(weight, 8, n_iter=n, driver="krylov"))).item()
        - least
        for n in (0, 1, 3)
    ]
    assert excess[0] > 3.0 * excess[1] > 9.0 * excess[2] > 0.0


@pytest.mark.parametrize("driver", ["exact", "krylov"])
def test_rank_deficient_matrices_give_zeros_and_an_orthonormal_basis(driver: str) -> None:
    weight = matrix(80, 60, torch.tensor([3.0, 2.0]))
    svd = truncated_svd(weight, 6, driver=driver)
    torch.testing.assert_close(svd.s[:2], torch.tensor([3.0, 2.0]), rtol=1e-5, atol=0.0)
    assert float(svd.s[2:].max()) < 1e-5
    torch.testing.assert_close(svd.u.T @ svd.u, torch.eye(6), rtol=0.0, atol=2e-6)
    torch.testing.assert_close(product(svd), weight, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("driver", ["exact", "krylov"])
def test_a_zero_matrix_is_no_error(driver: str) -> None:
    svd = truncated_svd(torch.zeros(50, 40), 3, driver=driver)
    assert svd.s.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(svd.u.T @ svd.u, torch.eye(3), rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("driver", ["exact", "krylov"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 5), (5, 1), (1, 1)])
def test_full_rank_reproduces_the_matrix(shape: tuple[int, int], driver: str) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    svd = truncated_svd(weight, min(shape), driver=driver)
    # Three products of fp32 matrices with norms around 5.
    torch.testing.assert_close(product(svd), weight, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("driver", ["exact", "krylov"])
def test_the_largest_entry_of_each_left_vector_is_positive(driver: str) -> None:
    weight = decaying(60, 90, seed=3)
    for sign in (1.0, -1.0):
        u = truncated_svd(sign * weight, 5, driver=driver).u
        assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


def test_the_result_depends_on_its_arguments_alone() -> None:
    weight = decaying(120, 100)
    torch.manual_seed(1)
    first = truncated_svd(weight, 3, driver="krylov", name="q")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = truncated_svd(weight, 3, driver="krylov", name="q")
    assert all(torch.equal(getattr(first, part), getattr(second, part)) for part in ("u", "s", "vh"))
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_and_name_choose_the_starting_block() -> None:
    # One step on a flat spectrum: the result still shows where it started.
    weight = torch.randn(120, 100, generator=torch.Generator().manual_seed(4))
    found = [
        truncated_svd(weight, 3, n_iter=0, driver="krylov", seed=seed, name=name).s
        for seed, name in ((0, "q"), (1, "q"), (0, "k"))
    ]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_is_computed_in_fp32(dtype: torch.dtype) -> None:
    weight = decaying(40, 30).to(dtype).requires_grad_()
    svd = truncated_svd(weight, 4)
    assert svd.u.dtype == torch.float32
    assert not svd.u.requires_grad
    assert torch.equal(svd.s, truncated_svd(weight.detach().float(), 4).s)


def test_results_are_contiguous_and_hold_no_more_than_themselves() -> None:
    # Checkpoints store them, and a view would drag the whole decomposition along.
    svd = truncated_svd(decaying(64, 48), 3, driver="exact")
    for part in (svd.u, svd.vh):
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.numel() * 4


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("r", {"r": 0}),
        ("r", {"r": 31}),
        ("n_iter", {"r": 2, "n_iter": -1}),
        ("oversample", {"r": 2, "oversample": -1}),
        ("driver", {"r": 2, "driver": "exat"}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be"):
        truncated_svd(torch.ones(40, 30), **settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_refused_with_its_name(bad: float) -> None:
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"weight must be finite.*layers\.0\.q"):
        truncated_svd(weight, 2, name="layers.0.q")


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be a matrix, got \(2, 3, 4\)"):
        truncated_svd(torch.ones(2, 3, 4), 1)


def test_seeded_depends_on_both_arguments() -> None:
    def draw(seed: int, name: str) -> Tensor:
        return torch.randn(4, generator=seeded(seed, name))

    assert torch.equal(draw(1, "a"), draw(1, "a"))
    assert len({tuple(draw(seed, name).tolist()) for seed in (0, 1) for name in ("a", "b")}) == 4


@pytest.mark.parametrize(("m", "k", "n"), [(30, 4, 20), (20, 4, 30), (5, 12, 6), (3, 1, 3)])
def test_recompress_is_exact_at_the_numerical_rank(m: int, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(5)
    b, a = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    small_b, small_a, dropped = recompress(b, a)
    q = min(m, k, n)
    assert (small_b.shape, small_a.shape, dropped) == ((m, q), (q, n), 0.0)
    torch.testing.assert_close(small_b @ small_a, b @ a, rtol=0.0, atol=2e-5)


def test_recompress_finds_a_repeated_direction() -> None:
    # Two equal columns against two rows: rank 1, value 1 * 3 + 1 * 4 in the first row.
    b = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    a = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    small_b, small_a, dropped = recompress(b, a)
    assert (small_b.shape, small_a.shape, dropped) == ((2, 1), (1, 2), 0.0)
    torch.testing.assert_close(small_b @ small_a, torch.tensor([[7.0, 0.0], [0.0, 0.0]]))


def test_recompress_says_which_share_of_the_energy_it_dropped() -> None:
    # Singular values 4, 2, 1: keeping one drops (4 + 1) / (16 + 4 + 1).
    b, a = torch.diag(torch.tensor([4.0, 1.0, 2.0])), torch.eye(3)
    small_b, small_a, dropped = recompress(b, a, rank=1)
    assert dropped == pytest.approx(5.0 / 21.0, rel=1e-6)
    torch.testing.assert_close(small_b @ small_a, torch.diag(torch.tensor([4.0, 0.0, 0.0])))
    assert recompress(b, a, rank=3)[2] == 0.0
    assert recompress(b, a, rank=9)[0].shape == (3, 3)


def test_recompress_splits_the_singular_values_evenly() -> None:
    generator = torch.Generator().manual_seed(6)
    b, a, _ = recompress(
        100.0 * torch.randn(9, 3, generator=generator), torch.randn(3, 8, generator=generator)
    )
    torch.testing.assert_close((b * b).sum(0), (a * a).sum(1), rtol=1e-5, atol=0.0)


def test_recompress_of_nothing_keeps_one_direction_of_zeros() -> None:
    b, a, dropped = recompress(torch.zeros(4, 2), torch.ones(2, 3))
    assert (b.shape, a.shape, dropped) == ((4, 1), (1, 3), 0.0)
    assert not bool((b @ a).any())
